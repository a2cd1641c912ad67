"""Backups made under load, databases lost and brought back, and everything held against a real chain."""

import asyncio
import json
import stat
from pathlib import Path

import aiohttp
import psycopg
import sqlalchemy as sa
from eth_abi.abi import encode
from processes import served, waterfall, write_config
from service import ADMIN_KEY, Client, running, settings_for

from waterfall.cli.receipts import prove
from waterfall.devnet import deploy
from waterfall.keccak import keccak
from waterfall.ledger import backup, schema
from waterfall.ledger.snapshot import Identity
from waterfall.money import parse_usd
from waterfall.settlement.reconcile import reconcile


def identity(net) -> Identity:
    return Identity(net.chain.chain_id, net.chain.vault, net.chain.platform)


async def calls(client: Client, key: str, count: int) -> None:
    gate = asyncio.Semaphore(8)

    async def call() -> None:
        async with gate:
            status, answer, _ = await client.chat(key)
            assert status == 200, answer

    await asyncio.gather(*(call() for _ in range(count)))


def rows_of(database: str) -> dict[str, list[object]]:
    """Everything that is in the database."""
    engine = sa.create_engine(database.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        rows = {
            table.name: list(connection.execute(sa.select(table))) for table in schema.metadata.sorted_tables
        }
    engine.dispose()
    return rows


def lose(database: str) -> None:
    """The database as nobody has ever used it."""
    if database.startswith("sqlite"):
        file = Path(database.removeprefix("sqlite:///"))
        for each in file.parent.glob(f"{file.name}*"):
            each.unlink()
    else:
        with psycopg.connect(database) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")


async def test_backup__made_under_load_and_restored_after_the_loss__balances_hold_and_settlement_goes_on(
    net, upstream, database, tmp_path
):
    settings = settings_for(upstream.base_url, database)
    file = tmp_path / "ledger.backup"
    upstream.delay = 0.02
    async with running(net, settings) as client:
        account, key = await client.open_account("ada", micro_usd=1_000_000)
        working = asyncio.create_task(calls(client, key, 60))
        while upstream.counts["started"] < 20:
            await asyncio.sleep(0.005)
        made = await asyncio.to_thread(backup.backup, database, file)
        await working
        before = await client.settled(account["id"])
    assert 0 < made.rows["charges"] < 60
    lose(database)
    backup.restore(database, file, identity(net))

    async with running(net, settings) as client:
        after = await client.settled(account["id"])
        assert (after["balance"], after["label"]) == (before["balance"], "ada")
        report = await reconcile(net.vault, database)
        assert report.differences == []
        assert (report.charges, report.unknown) == (made.rows["charges"], 60 - made.rows["charges"])
        await calls(client, key, 5)  # with the key of before
        settled = await client.settled(account["id"])
        report = await reconcile(net.vault, database)
        assert report.equal, report.differences
    on_chain = await net.vault.account(net.chain.platform, account["id"])
    assert on_chain.balance == parse_usd(settled["balance"])


async def test_restore__from_a_file_into_postgresql__goes_on_there(net, upstream, tmp_path, postgres_url):
    file, sqlite = tmp_path / "ledger.backup", f"sqlite:///{tmp_path}/waterfall.db"
    async with running(net, settings_for(upstream.base_url, sqlite)) as client:
        account, key = await client.open_account("ada", micro_usd=1_000_000)
        await calls(client, key, 10)
        before = await client.settled(account["id"])
    backup.backup(sqlite, file)
    backup.restore(postgres_url, file, identity(net))
    async with running(net, settings_for(upstream.base_url, postgres_url)) as client:
        assert {**(await client.account(account["id"]))} == before
        await calls(client, key, 10)
        await client.settled(account["id"])
        report = await reconcile(net.vault, postgres_url)
    assert report.differences == []
    assert (report.charges, report.unknown) == (20, 0)


async def test_reconcile__everything_a_real_vault_can_do__is_followed(net, client, database):
    """Policy, allowance, refund, allocation, an exit taken back, earnings withdrawn."""
    rpc, platform = net.anvil.rpc, net.chain.platform
    owner = (await rpc.call("eth_accounts"))[7]

    async def send(sender: str, signature: str, *values: object) -> None:
        types = signature[signature.index("(") + 1 : -1].split(",")
        values = [bytes.fromhex(v[2:]) if t == "bytes32" else v for t, v in zip(types, values, strict=True)]
        data = "0x" + (keccak(signature.encode())[:4] + encode(types, values)).hex()
        call = {"from": sender, "to": net.chain.vault, "data": data, "gas": hex(500_000)}
        receipt = None
        sent = await rpc.call("eth_sendTransaction", call)
        while receipt is None:
            receipt = await rpc.call("eth_getTransactionReceipt", sent)
        assert receipt["status"] == "0x1", signature

    by_platform = deploy.OWNER.address
    ada, key = await client.open_account("ada", micro_usd=1_000_000)
    _, bob, _ = await client.request("POST", "/api/accounts", json={"label": "bob", "owner": owner})
    _, made, _ = await client.request("POST", f"/api/accounts/{bob['id']}/keys", json={})
    await net.deposit(bob, 1_000_000)
    await client.until(bob["id"], lambda a: a["balance"] != "0.00")
    limits = {"max_per_charge": "0.5", "max_per_window": "0.9", "window_seconds": 60}
    await client.request("PUT", f"/api/accounts/{ada['id']}/policy", json=limits)
    await client.until(ada["id"], lambda a: a["wanted_policy"] is None)
    its = platform, owner, bob["label_hash"]
    await send(owner, "setAllowance(uint128,address,bytes32,uint96,uint40)", *its, parse_usd("0.8"), 2**39)
    await client.until(bob["id"], lambda a: a["allowance"] is not None)
    await calls(client, key, 5)
    await calls(client, made["key"], 5)
    await client.settled(ada["id"])
    await client.settled(bob["id"])
    charged = int((await client.calls(ada))[0]["charge_id"])
    back = platform, charged, ada["owner"], ada["label_hash"], 7
    await send(by_platform, "refund(uint128,uint64,address,bytes32,uint96)", *back)
    given = platform, ada["label_hash"], owner, bob["label_hash"], 11
    await send(by_platform, "allocate(uint128,bytes32,address,bytes32,uint96)", *given)
    await send(by_platform, "withdrawEarnings(uint128,uint256)", platform, 1)
    await send(owner, "requestExit(uint128,address,bytes32,uint256)", *its, 900_000)
    await client.until(bob["id"], lambda a: a["exit"] is not None)
    await calls(client, made["key"], 3)
    await client.settled(bob["id"])
    report = await reconcile(net.vault, database, deployed_block=net.chain.deployed_block)
    # The platform's owner, whose key sends policies, was used by hand: that is all.
    assert [difference.subject for difference in report.differences] == [f"key {by_platform}"]
    assert (report.charges, report.accounts, report.waiting) == (13, 2, 0)

    await send(owner, "cancelExit(uint128,address,bytes32)", *its)
    await client.until(bob["id"], lambda a: a["exit"] is None)
    assert len((await reconcile(net.vault, database)).differences) == 1


async def test_commands__beside_a_running_service__work_and_say_what_is_wrong(
    net, upstream, tmp_path, database
):
    config, file = write_config(tmp_path, net, upstream, database), tmp_path / "ledger.backup"
    async with served(config) as service:
        async with aiohttp.ClientSession() as session:
            client = Client(service.url, None, net, session)
            account, key = await client.open_account("ada", micro_usd=1_000_000)
            await calls(client, key, 3)
            await client.settled(account["id"])
        code, said, _ = await waterfall("backup", file, "--config", config, "--json")
        assert (code, json.loads(said)["rows"]["charges"]) == (0, 3)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        code, _, complained = await waterfall("backup", file, "--config", config)
        assert code == 1
        assert "exists already" in complained
        assert (await waterfall("backup", file, "--verify"))[0] == 0
        code, said, complained = await waterfall("reconcile", "--config", config, "--json")
        assert (code, json.loads(said)["equal"]) == (0, True), complained
        for command in (("restore", file, "--force"), ("rebuild",), ("rebuild", "--accept-loss")):
            code, _, complained = await waterfall(*command, "--config", config)
            assert (code, "use" in complained) == (1, True), complained

    engine = sa.create_engine(database.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(schema.wallets.update().values(balance=1))
    engine.dispose()
    code, said, complained = await waterfall("reconcile", "--config", config)
    assert code == 1
    assert "run `waterfall rebuild`" in said
    assert account["id"] in said
    assert "differs" in complained
    code, _, complained = await waterfall("restore", file, "--config", config)
    assert code == 1
    assert "--force" in complained
    code, said, complained = await waterfall("restore", file, "--config", config, "--force")
    assert (code, "0 charges: sent again" in said) == (0, True), complained
    code, said, complained = await waterfall("restore", file, "--config", config, "--force", "--json")
    assert (code, json.loads(said)["replaced_calls"]) == (0, 3), complained
    code, said, _ = await waterfall("reconcile", "--config", config, "--json")
    assert (code, json.loads(said)["equal"]) == (0, True)


async def test_rebuild__database_lost__goes_on_only_when_told_and_says_what_is_not_known(
    net, upstream, tmp_path, database
):
    async with running(net, settings_for(upstream.base_url, database)) as client:
        account, key = await client.open_account("ada", micro_usd=1_000_000)
        await calls(client, key, 3)
        before = await client.settled(account["id"])
    lose(database)
    config = write_config(tmp_path, net, upstream, database)
    refused = []
    for _ in range(2):
        code, _, complained = await waterfall("rebuild", "--config", config)
        assert code == 1
        assert "waterfall restore" in complained
        refused.append(rows_of(database))
    assert refused[0] == refused[1], "a refusal changes nothing"
    assert {name for name, rows in refused[0].items() if rows} == {"meta"}, "and reads nothing in"
    code, said, _ = await waterfall("rebuild", "--config", config, "--accept-loss")
    assert (code, "the receipts of 3 charges" in said, "API keys" in said) == (0, True, True)
    code, said, _ = await waterfall("rebuild", "--config", config, "--accept-loss", "--json")
    result = json.loads(said)
    assert (code, result["journal_lost"], result["unknown_charges"]) == (0, True, 3)
    assert result["balance"] == before["balance"]
    report = await reconcile(net.vault, database)
    assert (report.equal, report.unknown) == (True, 3)


async def test_forget__account_with_calls__its_key_opens_nothing_and_receipts_still_hold(net, client):
    account, key = await client.open_account("ada", micro_usd=1_000_000)
    _, _, headers = await client.chat(key)
    before = await client.settled(account["id"])
    path = f"/api/accounts/{account['id']}/data"
    assert (await client.request("DELETE", path, key=key))[0] == 403
    by_hand = "accounts", "forget", account["id"], "--url", client.url, "--key", ADMIN_KEY
    assert (await waterfall(*by_hand))[0] == 130  # nobody says yes
    assert (await client.account(account["id"]))["label"] == "ada"
    code, said, complained = await waterfall(*by_hand, "--yes", "--json")
    assert (code, json.loads(said)) == (
        0,
        {"account": account["id"], "label": True, "keys": 1, "usage": 1, "details": 1, "idempotency": 0},
    ), complained
    assert (await client.chat(key))[0] == 401
    assert await client.account(account["id"]) == {**before, "label": None}
    receipt = await client.receipt(headers["X-Waterfall-Receipt-Id"])
    assert (receipt["receipt"]["usage"], receipt["receipt"]["usage_removed"]) == (None, True)
    _, proof = await prove(receipt, net.vault, net.chain.chain_id)
    assert any("kept no more" in shown for shown in proof.shown)
    code, said, _ = await waterfall(*by_hand, "--yes")
    assert code == 0
    assert "no chain forgets" in said
    status, again, _ = await client.request("POST", "/api/accounts", json={"label": "ada"})
    assert (status, again["id"]) == (201, account["id"])


async def test_forget__call_running__is_refused(client, upstream):
    upstream.delay = 1
    account, key = await client.open_account("ada", micro_usd=1_000_000)
    running_ = asyncio.create_task(client.chat(key))
    await client.until(account["id"], lambda a: a["held"] != "0.00")
    status, refusal, _ = await client.request("DELETE", f"/api/accounts/{account['id']}/data")
    assert (status, refusal["error"]["code"]) == (409, "account_busy")
    assert (await running_)[0] == 200
