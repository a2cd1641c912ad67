"""The service as a process of its own, killed where it hurts and started again."""

import asyncio
import contextlib
import json
from pathlib import Path

import aiohttp
import psycopg
import pytest
from processes import served, waterfall, write_config
from service import Client, running, settings_for

from waterfall.devnet import deploy
from waterfall.money import parse_usd
from waterfall.receipts import bytes_hash


@pytest.mark.parametrize("rounds", [(60,), (10, 5, 15)], ids=["once", "three times"])
async def test_calls__process_killed_among_a_hundred__each_charged_once_or_listed_as_lost(
    net, upstream, tmp_path, rounds, database
):
    """Peers lose charges at shutdown (LiteLLM #38157) or charge twice on recovery."""
    upstream.delay = 0.05
    config = write_config(tmp_path, net, upstream, database)
    answered: set[str] = set()
    sent: set[str] = set()
    account: dict = {}
    key = ""

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call(url: str, number: str, gate: asyncio.Semaphore) -> None:
            content = [{"role": "user", "content": f"call {number}"}]
            body = json.dumps({"model": "micro", "messages": content, "max_tokens": 20}).encode()
            sent.add(bytes_hash(body))
            async with gate:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.post(
                        f"{url}/v1/chat/completions", data=body, headers={"Authorization": f"Bearer {key}"}
                    ) as response:
                        await response.read()
                        if response.status == 200:
                            answered.add(bytes_hash(body))

        for round_number, kill_after in enumerate(rounds):
            async with served(config) as service:
                client = Client(service.url, None, net, session)
                if not account:
                    account, key = await client.open_account(micro_usd=1_000_000)
                before, gate = upstream.counts["started"], asyncio.Semaphore(16)
                calls = [
                    asyncio.create_task(call(service.url, f"{round_number}.{n}", gate)) for n in range(100)
                ]
                async with asyncio.timeout(30):
                    while upstream.counts["started"] < before + kill_after:
                        await asyncio.sleep(0.005)
                await service.kill()
                await asyncio.gather(*calls)

        async with served(config) as service:
            client = Client(service.url, None, net, session)
            settled = await client.settled(account["id"])
            _, calls_, _ = await client.request("GET", "/api/calls?limit=1000")
            totals = (await client.request("GET", "/api/totals"))[1]

    captured = [c["receipt"]["receipt"]["request_hash"] for c in calls_ if c["receipt"] is not None]
    lost = [c for c in calls_ if c["status"] == "lost"]
    assert len(captured) == len(set(captured)), "charged twice"
    assert answered <= set(captured), "answered and not charged"
    assert set(captured) <= sent
    assert len(captured) + len(lost) >= upstream.counts["started"], (
        "a call that reached the upstream has vanished"
    )
    assert all(c["reason"] for c in lost)
    assert totals["held"] == "0.00"
    assert len(answered) < upstream.counts["started"], "nothing was under way when it was killed"
    charged = sum(parse_usd(c["cost"]) for c in calls_ if c["cost"] is not None)
    assert parse_usd(settled["balance"]) == parse_usd("1") - charged
    assert (await net.vault.account(net.chain.platform, account["id"])).balance == parse_usd("1") - charged


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_service__second_on_the_same_ledger__refuses_to_start(net, upstream, tmp_path, database):
    config = write_config(tmp_path, net, upstream, database)
    async with served(config):
        code, _, complained = await waterfall("serve", "--config", config)
    assert code == 1
    assert complained.strip().endswith("in use by another process.")


async def test_database__deleted__every_balance_is_rebuilt_under_a_new_epoch(
    net, upstream, tmp_path, database
):
    settings = settings_for(upstream.base_url, database)
    async with running(net, settings) as client:
        epoch = client.ledger.epoch
        account, key = await client.open_account("ada", micro_usd=1_000_000)
        for _ in range(3):
            assert (await client.chat(key))[0] == 200
        before = await client.settled(account["id"])
        await client.request("PUT", f"/api/accounts/{account['id']}/policy", json={"max_per_charge": "0.5"})
        await client.until(account["id"], lambda a: a["wanted_policy"] is None)
    lose(database)

    async with running(net, settings) as client:
        assert client.ledger.epoch != epoch
        after = await client.account(account["id"])
        assert (after["balance"], after["label"]) == (before["balance"], None)
        assert after["policy"]["max_per_charge"] == "0.50"
        status, again, _ = await client.request("POST", "/api/accounts", json={"label": "ada"})
        assert (status, again["id"], again["label"]) == (201, account["id"], "ada")
        statement = (await client.request("GET", f"/api/accounts/{account['id']}/statement"))[1]
        assert [line["event"] for line in statement["lines"]] == ["Deposited"] + ["Charged"] * 3
        _, made, _ = await client.request("POST", f"/api/accounts/{account['id']}/keys", json={})
        assert (await client.chat(made["key"]))[0] == 200
        settled = await client.settled(account["id"])
    assert (await net.vault.account(net.chain.platform, account["id"])).balance == parse_usd(
        settled["balance"]
    )


def lose(database: str) -> None:
    """Nothing of a database is left."""
    if database.startswith("sqlite"):
        for file in Path(database.removeprefix("sqlite:///")).parent.glob("waterfall.db*"):
            file.unlink()
    else:
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")


async def test_rebuild__in_place__keeps_what_the_chain_cannot_know(net, upstream, tmp_path, database):
    settings = settings_for(upstream.base_url, database)
    async with running(net, settings) as client:
        account, key = await client.open_account("ada", micro_usd=1_000_000)
        _, _, headers = await client.chat(key)
        before = await client.settled(account["id"])

    config = write_config(tmp_path, net, upstream, database)
    code, said, complained = await waterfall("rebuild", "--json", "--config", config)
    assert code == 0, complained
    result = json.loads(said)
    assert result["epoch"] != result["epoch_before"]
    assert (result["balance"], result["unsettled"], result["held"]) == (before["balance"], "0.00", "0.00")

    async with running(net, settings) as client:
        assert {**(await client.account(account["id"])), "created_at": 0} == {**before, "created_at": 0}
        receipt = await client.receipt(headers["X-Waterfall-Receipt-Id"])
        assert receipt["status"] in {"settled", "final"}
        assert (await client.chat(key))[0] == 200
        await client.settled(account["id"])


async def test_chain__restarted_empty__is_noticed_and_nothing_is_authorised(net, upstream, database):
    settings = settings_for(upstream.base_url, database)
    async with running(net, settings) as client:
        _, key = await client.open_account(micro_usd=1_000_000)
        await net.anvil.rpc.call("anvil_reset")
        await deploy.deploy(net.anvil.rpc)
        async with asyncio.timeout(20):
            while (health := await client.request("GET", "/healthz"))[0] == 200:
                await asyncio.sleep(0.02)
        assert "has lost block" in health[1]["halted"]["indexer"]
        status, refusal, _ = await client.chat(key)
    assert (status, refusal["error"]["code"]) == (503, "unavailable")
    assert upstream.counts["started"] == 0
