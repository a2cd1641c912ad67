"""Policies, windows of block time, deposits that are not final, and a chain or ledger that fails: refused, told."""

import asyncio
import contextlib

import pytest
from service import ADMIN_KEY, running, settings_for
from sse import error_of, events_of

from waterfall.ledger import journal, schema
from waterfall.money import format_usd, parse_usd

DEPOSIT = 1_000_000
CALL = parse_usd("0.000017")


async def maximum_of_a_call(client) -> int:
    """What a call may cost at most."""
    _, key = await client.open_account()
    status, refusal, _ = await client.chat(key)
    assert (status, refusal["error"]["code"]) == (402, "insufficient_funds")
    return parse_usd(refusal["error"]["maximum"])


async def put_policy(client, account: dict, **policy: object) -> dict:
    path = f"/api/accounts/{account['id']}/policy"
    status, shown, _ = await client.request("PUT", path, json=policy)
    assert status == 202, shown
    return shown


async def on_chain(client, account: dict) -> dict:
    return await client.until(account["id"], lambda a: a["wanted_policy"] is None)


async def refused(client, key: str, code: str, scope: str | None = None, **fields: object) -> dict:
    status, body, _ = await client.chat(key, **fields)
    assert (status, body["error"]["code"], body["error"].get("scope")) == (402, code, scope), body
    assert set(body["error"]) >= {"message", "type", "code", "param"}
    assert body["error"]["type"] == "payment_required"
    return body["error"]


@contextlib.asynccontextmanager
async def no_blocks(net):
    """The chain takes transactions in and mines none."""
    await net.anvil.rpc.call("evm_setAutomine", False)
    try:
        yield
    finally:
        await net.anvil.rpc.call("evm_setAutomine", True)
        await net.anvil.rpc.call("anvil_mine", "0x1")


# ── Policies ─────────────────────────────────────────────────────────────────────────────────────────


async def test_policy__lowered__binds_before_the_chain_has_it(client, net, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    async with no_blocks(net):
        shown = await put_policy(client, account, max_per_charge="0")
        assert shown["policy"]["max_per_charge"] is None
        assert shown["wanted_policy"]["max_per_charge"] == "0.00"
        error = await refused(client, key, "limit_exceeded", "per_charge")
        assert (error["available"], error["balance"], error["account"]) == ("0.00", "1.00", account["id"])
        assert upstream.counts["started"] == 0
    assert (await on_chain(client, account))["policy"]["max_per_charge"] == "0.00"
    await refused(client, key, "limit_exceeded", "per_charge")


@pytest.mark.parametrize("raised", [{"max_per_charge": "1"}, {}], ids=["raised", "removed"])
async def test_policy__raised__waits_for_the_chain(client, net, raised):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    await put_policy(client, account, max_per_charge="0.00001")
    await on_chain(client, account)

    async with no_blocks(net):
        await put_policy(client, account, **raised)
        await refused(client, key, "limit_exceeded", "per_charge")
    shown = await on_chain(client, account)
    assert shown["policy"]["max_per_charge"] == ("1.00" if raised else None)
    assert (await client.chat(key))[0] == 200
    await client.check_books(account, DEPOSIT, "0.000017")


async def test_policy__asked_for_thrice_at_once__the_last_stands(client, net):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    async with no_blocks(net):
        for limit in ("0.1", "0", "0.3"):
            await put_policy(client, account, max_per_charge=limit)
    shown = await on_chain(client, account)
    assert shown["policy"]["max_per_charge"] == "0.30"
    chain = await net.vault.account(net.chain.platform, account["id"])
    assert chain.policy.max_per_charge == parse_usd("0.3")
    assert (await client.chat(key))[0] == 200


async def test_policy__lowered_below_a_running_call__its_charge_settles_first(client, net, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.permits = asyncio.Semaphore(0)
    call = asyncio.create_task(client.chat(key))
    await upstream.until("started", 1)

    await put_policy(client, account, max_per_charge="0")
    await refused(client, key, "limit_exceeded", "per_charge")
    assert (await client.account(account["id"]))["wanted_policy"] is not None
    upstream.permits.release()
    status, _, headers = await call

    assert status == 200
    assert (await on_chain(client, account))["policy"]["max_per_charge"] == "0.00"
    receipt = await client.receipt(headers["X-Waterfall-Receipt-Id"])
    assert receipt["status"] in {"settled", "final"}, receipt["reason"]
    await client.check_books(account, DEPOSIT, "0.000017")


async def test_window__used_up__refuses_until_block_time_turns_it(client, net, upstream):
    maximum = await maximum_of_a_call(client)
    account, key = await client.open_account(micro_usd=DEPOSIT)
    await put_policy(client, account, max_per_window=format_usd(maximum), window_seconds=3600)
    await on_chain(client, account)
    # At the start of a window, so that it does not turn by itself.
    now = int((await net.anvil.rpc.call("eth_getBlockByNumber", "latest", False))["timestamp"], 16)
    await turn_to(client, net, (now // 3600 + 1) * 3600)

    assert (await client.chat(key))[0] == 200
    await client.settled(account["id"])
    error = await refused(client, key, "limit_exceeded", "per_window")
    assert parse_usd(error["available"]) == maximum - CALL
    assert upstream.counts["started"] == 1

    await turn_to(client, net, (now // 3600 + 2) * 3600)
    assert (await client.chat(key))[0] == 200
    await refused(client, key, "limit_exceeded", "per_window")
    await client.check_books(account, DEPOSIT, "0.000034")


async def turn_to(client, net, timestamp: int) -> None:
    """Mine a block of this time and wait until the gateway has seen it."""
    await net.anvil.rpc.call("evm_setNextBlockTimestamp", timestamp)
    await net.anvil.rpc.call("anvil_mine", "0x1")
    async with asyncio.timeout(10):
        while (await client.request("GET", "/api/platform"))[1]["head_timestamp"] < timestamp:
            await asyncio.sleep(0.02)


async def test_window__with_calls_running__counts_what_they_hold(client, upstream):
    maximum = await maximum_of_a_call(client)
    account, key = await client.open_account(micro_usd=DEPOSIT)
    await put_policy(client, account, max_per_window=format_usd(maximum), window_seconds=3600)
    await on_chain(client, account)
    upstream.permits = asyncio.Semaphore(0)
    calls = [asyncio.create_task(client.chat(key)) for _ in range(8)]
    async with asyncio.timeout(10):
        while sum(call.done() for call in calls) < 7:
            await asyncio.sleep(0.01)
    upstream.permits.release()

    statuses = [status for status, _, _ in await asyncio.gather(*calls)]
    assert sorted(statuses) == [200] + [402] * 7
    assert upstream.counts["started"] == 1
    await client.check_books(account, DEPOSIT, "0.000017")


async def test_policy__about_to_expire__refuses_before_a_charge_could_come_too_late(client, net):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    head = (await client.request("GET", "/api/platform"))[1]["head_timestamp"]
    await put_policy(client, account, expires_at=head + 3600)
    assert (await client.chat(key))[0] == 200
    await client.settled(account["id"])

    await put_policy(client, account, expires_at=head + 30)  # a call and its settlement may take longer

    error = await refused(client, key, "policy_expired")
    assert error["expires_at"] == head + 30
    await client.check_books(account, DEPOSIT, "0.000017")


# ── Funds ────────────────────────────────────────────────────────────────────────────────────────────


async def test_funds__too_few__says_what_it_takes_and_where_to_send_it(client, upstream):
    account, key = await client.open_account(micro_usd=10)

    error = await refused(client, key, "insufficient_funds")

    assert error["deposit_address"] == account["deposit_address"]
    assert (error["available"], error["balance"], error["held"]) == ("0.00001", "0.00001", "0.00")
    assert parse_usd(error["required"]) == parse_usd(error["maximum"]) > parse_usd(error["available"])
    assert error["required"] in error["message"]
    assert upstream.counts["started"] == 0
    short = parse_usd(error["required"]) - parse_usd(error["available"])
    await client.net.deposit(account, short // 10**6)
    await client.until(account["id"], lambda a: a["available"] == error["required"])
    assert (await client.chat(key))[0] == 200


async def test_funds__held_by_a_running_call__are_told_apart(client, upstream):
    maximum = await maximum_of_a_call(client)
    account, key = await client.open_account(micro_usd=maximum // 10**6)
    upstream.permits = asyncio.Semaphore(0)
    call = asyncio.create_task(client.chat(key))
    await upstream.until("started", 1)

    status, body, headers = await client.chat(key)

    assert (status, body["error"]["code"]) == (402, "funds_held")
    assert body["error"]["held"] == format_usd(maximum)
    assert headers["Retry-After"] == "1"
    upstream.permits.release()
    assert (await call)[0] == 200
    await client.check_books(account, maximum // 10**6, "0.000017")


async def test_deposit__not_final__is_shown_and_not_spendable(net, upstream, database):
    """Peers let an unconfirmed deposit be spent and then reorganised away (x402 #2559, #3464)."""
    careful = type(net)(net.anvil, net.chain.model_copy(update={"finality": "finalized"}), net.token)
    async with running(careful, settings_for(upstream.base_url, database)) as client:
        account, key = await client.open_account(micro_usd=DEPOSIT)
        shown = await client.account(account["id"])
        assert (shown["balance"], shown["pending"], shown["available"]) == ("1.00", "1.00", "0.00")
        await refused(client, key, "insufficient_funds")
        assert upstream.counts["started"] == 0

        await net.anvil.rpc.call("anvil_mine", "0x2")

        await client.until(account["id"], lambda a: (a["pending"], a["available"]) == ("0.00", "1.00"))
        assert (await client.chat(key))[0] == 200
        await client.check_books(account, DEPOSIT, "0.000017")


# ── A chain or a ledger that fails ───────────────────────────────────────────────────────────────────


async def test_chain__silent_for_too_long__no_call_is_authorised(net, upstream, database):
    settings = settings_for(upstream.base_url, database, max_projection_age_seconds=0.5)
    async with running(net, settings) as client:
        account, key = await client.open_account(micro_usd=DEPOSIT)
        assert (await client.chat(key))[0] == 200
        await client.settled(account["id"])
        await net.anvil.stop()

        async with asyncio.timeout(10):
            while (answer := await client.chat(key))[0] == 200:
                await asyncio.sleep(0.05)
        status, body, headers = answer
        assert (status, body["error"]["code"]) == (503, "unavailable")
        assert headers["Retry-After"] == "1"
        started = upstream.counts["started"]
        for number in range(3):
            sent = {"account": account["id"], "amount": "0.01"}
            status, body, _ = await client.request(
                "POST", "/api/charges", json=sent, headers={"Idempotency-Key": str(number)}
            )
            assert (status, body["error"]["code"]) == (503, "unavailable")
        assert (await client.chat(key, stream=True))[0] == 503
        assert upstream.counts["started"] == started
        assert (await client.account(account["id"]))["held"] == "0.00"  # reading goes on


_BREAK = {
    "sqlite": ["CREATE TRIGGER broken BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'disk full'); END"],
    "postgresql": [
        "CREATE FUNCTION break() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'disk full'; END $$",
        "CREATE TRIGGER broken BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION break()",
    ],
}
_MEND = {
    "sqlite": ["DROP TRIGGER broken"],
    "postgresql": ["DROP TRIGGER broken ON {table}", "DROP FUNCTION break"],
}


@contextlib.contextmanager
def broken(ledger, table: str):
    """Every row that is added to a table fails, as on a full disk."""
    engine = ledger._database.engine  # noqa: SLF001

    def execute(statements):
        with engine.begin() as connection:
            for statement in statements[engine.dialect.name]:
                connection.exec_driver_sql(statement.format(table=table))

    execute(_BREAK)
    try:
        yield
    finally:
        execute(_MEND)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_row_04__ledger_cannot_hold__refuses_and_calls_nobody(client, upstream, stream):
    """Peers fail open when their store fails (LiteLLM #33923)."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    with broken(client.ledger, "holds"):
        status, body, _ = await client.chat(key, stream=stream)
        headers = {"X-Waterfall-Account": account["id"]}
        _, to_platform, _ = await client.chat(ADMIN_KEY, stream=stream, headers=headers)
    assert (status, body["error"]["code"]) == (503, "ledger_error")
    assert "disk full" not in str(body), "the database's words are for the platform only"
    assert "disk full" in to_platform["error"]["message"]
    assert upstream.counts["started"] == 0
    assert (await client.chat(key, stream=stream))[0] == 200
    await client.check_books(account, DEPOSIT, "0.000017")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_ledger__cannot_capture__keeps_the_answers_end_until_it_can(client, upstream, stream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    with broken(client.ledger, "charges"):
        call = asyncio.create_task(client.chat(key, stream=stream))
        await upstream.until("answered", 1)
        done, _ = await asyncio.wait([call], timeout=0.4)
        assert not done, "answered before the charge was durable"
        assert (await client.calls(account))[0]["status"] == "held"
    async with asyncio.timeout(10):
        status, body, _ = await call
    assert status == 200
    assert "[DONE]" in body if stream else body["usage"]
    await client.check_books(account, DEPOSIT, "0.000017")


async def test_ledger__cannot_capture_what_its_client_left__charges_it_later(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    with broken(client.ledger, "charges"):
        async with client.streaming(key) as response:
            await response.content.readany()
        await upstream.until("answered", 1)
    assert (await client.ended(account))["cost"] == "0.000017"
    await client.check_books(account, DEPOSIT, "0.000017")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_hold__taken_for_abandoned_while_its_call_runs__is_charged_all_the_same(
    client, upstream, stream
):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    async with abandoned(client, upstream, key, stream) as call:
        pass
    assert (await call)[0] == 200
    await client.check_books(account, DEPOSIT, "0.000017")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_hold__taken_for_abandoned_and_its_money_spent__is_lost_and_not_tried_again(
    client, upstream, stream
):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    async with abandoned(client, upstream, key, stream) as call:
        spend = {"account": account["id"], "amount": format_usd(DEPOSIT * 10**6)}
        status, _, _ = await client.request(
            "POST", "/api/charges", headers={"Idempotency-Key": "all"}, json=spend
        )
        assert status == 202

    status, body, headers = await call

    if stream:
        assert error_of(events_of(body))["code"] == "hold_not_open"
    else:
        assert (status, body["error"]["code"]) == (409, "hold_not_open")
        assert headers["x-should-retry"] == "false"
    assert [c["status"] for c in await client.calls(account, status="lost")] == ["lost"]
    await client.check_books(account, DEPOSIT, format_usd(DEPOSIT * 10**6))


@contextlib.asynccontextmanager
async def abandoned(client, upstream, key, stream):
    """A call whose hold is closed while it runs, as after a lease in which its process stood still."""
    upstream.permits = asyncio.Semaphore(0)
    call = asyncio.create_task(client.chat(key, stream=stream))
    await upstream.until("started", 1)
    past = schema.holds.update().values(lease_until=0)
    await client.ledger.write(lambda tx: tx.run(past))
    assert await client.ledger.write(journal.lose_abandoned_holds) == 1
    yield call
    for _ in range(10):
        upstream.permits.release()
