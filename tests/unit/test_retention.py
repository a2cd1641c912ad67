"""What is removed of calls, when, and that what can be proven stays."""

import asyncio

import pytest
from making import ACCOUNT, FUNDED, OTHER, USD, block, card, charged, deposited, only_postgres, sign

from waterfall.chain.verify import check_amount
from waterfall.errors import AccountBusy, AccountNotFound, VerificationFailed
from waterfall.ledger import retention, schema, views
from waterfall.ledger.books import Once
from waterfall.ledger.journal import Answer, Caller, now_ms
from waterfall.ledger.retention import RetentionSettings, sweep
from waterfall.metering import prices
from waterfall.receipts import check_signature
from waterfall.types import Attribution

DAY = 24 * 60 * 60 * 1000
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
ALL = RetentionSettings(usage_days=2, details_days=2, idempotency_days=2)
LATER = now_ms() + 3 * DAY


async def call(desk, amount=USD, key="key_1", account=ACCOUNT):
    """A captured call with a usage object and an API key."""
    held = await desk.ledger.hold(
        Caller(account, key), "small", prices.fixed(amount), block_time=0, expiry_margin=0
    )
    await desk.capture(held, amount, usage=USAGE)
    return held


async def asked(desk, idempotency_key):
    """A charge under an idempotency key."""
    caller = Caller(ACCOUNT, "key_1")
    drawn = await desk.ledger.draw(caller, 1)
    await desk.ledger.charge(
        caller,
        "small",
        prices.fixed(1),
        drawn,
        sign(drawn, 1),
        block_time=0,
        expiry_margin=0,
        idempotency_key=idempotency_key,
        body_hash="hash",
    )


async def settle(desk, number=2, final=0):
    """Everything captured is on the chain."""
    states = {row["sequence"]: row["state"] for row in await desk.table(schema.charges)}
    waiting = [c for c in await desk.charges() if states[c.id & 0xFFFFFFFF] == "queued"]
    await desk.apply(block(number), *map(charged, waiting))
    await desk.ledger.view.finalize(spendable=number, final=final or number)


async def swept(desk, settings=ALL, now=LATER):
    return await desk.ledger.write(lambda tx: sweep(tx, settings, now))


async def test_sweep__nothing_set__keeps_everything(desk):
    await call(desk)
    await settle(desk)
    before = await desk.table(schema.charges), await desk.table(schema.holds), await desk.table(schema.meta)
    assert await swept(desk, RetentionSettings(), LATER * 2) == retention.Removed()
    assert before == (
        await desk.table(schema.charges),
        await desk.table(schema.holds),
        await desk.table(schema.meta),
    )


async def test_sweep__old_call__is_found_no_more_by_whom_it_was_for(desk):
    caller = Caller(ACCOUNT, "key_1", attribution=Attribution(user="ada", tags=("beta", "beta")))
    held = await desk.ledger.hold(caller, "small", prices.fixed(USD), block_time=0, expiry_margin=0)
    await desk.capture(held, USD, usage=USAGE)
    await settle(desk)
    kept = [(row["name"], row["value"]) for row in await desk.table(schema.attributed)]
    assert kept == [("tag", "beta"), ("user", "ada")]
    await swept(desk)
    assert await desk.table(schema.attributed) == []
    assert (await desk.call(held)).attribution == Attribution()


async def test_sweep__old_enough__removes_what_is_not_for_ever_and_nothing_else(desk):
    held = await call(desk)
    released = await desk.hold(5)
    await desk.ledger.release(released, "the provider said this and that")
    await asked(desk, "their order 17")
    await settle(desk)
    before = await desk.call(held)
    assert await swept(desk, now=now_ms() + DAY) == retention.Removed()
    assert await swept(desk) == retention.Removed(usage=1, details=3, idempotency=1)
    assert await swept(desk) == retention.Removed()
    after = await desk.call(held)
    assert before.receipt.usage == USAGE
    assert (after.receipt.usage, after.receipt.usage_removed) == (None, True)
    assert after.receipt.receipt == before.receipt.receipt
    assert after.settlement == before.settlement
    assert (await desk.call(released)).settlement.reason is None
    assert {row["api_key"] for row in await desk.table(schema.holds)} == {None}
    assert await desk.table(schema.idempotency) == []


@pytest.mark.parametrize(
    ("settings", "removed"),
    [
        (RetentionSettings(usage_days=2), retention.Removed(usage=1)),
        (RetentionSettings(details_days=2), retention.Removed(details=2)),
        (RetentionSettings(idempotency_days=2), retention.Removed(idempotency=1)),
        (RetentionSettings(usage_days=2, details_days=9), retention.Removed(usage=1)),
        (RetentionSettings(usage_days=9, details_days=2), retention.Removed(details=2)),
    ],
)
async def test_sweep__each_setting__removes_its_own(desk, settings, removed):
    await call(desk)
    await asked(desk, "k")
    await settle(desk)
    assert await swept(desk, settings) == removed


async def test_sweep__not_settled_for_good__is_kept(desk):
    await call(desk)
    await settle(desk, final=1)  # settled, and may still be undone
    await call(desk)  # queued
    await desk.hold(1)  # running
    assert (await swept(desk)).usage == 0
    assert {row["usage"] is None for row in await desk.table(schema.charges)} == {False}


async def test_sweep__more_than_at_once__comes_to_all_in_rounds(desk, monkeypatch):
    monkeypatch.setattr(retention, "_AT_ONCE", 3)
    for _ in range(4):
        await call(desk, 1)
    await settle(desk, final=1)
    for _ in range(4):
        await call(desk, 1)
    await settle(desk, 3, final=1)
    assert (await swept(desk)).usage == 0  # the round has begun; nothing of it is final
    await desk.ledger.view.finalize(spendable=3, final=3)
    counts = [(await swept(desk)).usage for _ in range(7)]
    assert max(counts) <= 3
    assert sum(counts) == 8
    assert (await swept(desk)).usage == 0


async def test_sweep__young_calls__ends_the_round_before_them(desk, monkeypatch):
    monkeypatch.setattr(retention, "_AT_ONCE", 2)
    for _ in range(5):
        await call(desk, 1)
    assert (await swept(desk, now=now_ms())) == retention.Removed()
    assert "swept" not in {row["key"] for row in await desk.table(schema.meta)}


# ── A receipt without its usage ──────────────────────────────────────────────────────────────────────


async def test_receipt__usage_removed__still_holds_and_says_so(desk):
    held = await call(desk)
    await settle(desk)
    await swept(desk)
    signed = (await desk.call(held)).receipt
    check_signature(signed)
    assert '"usage_removed":true' in signed.model_dump_json()
    with_card = signed.model_copy(update={"rate_card": card("small", "1000000", "0")})
    assert "the provider's usage object is kept no more" in check_amount(with_card)


async def test_receipt__usage_left_out_and_not_said_to_be__does_not_hold(desk):
    signed = (await desk.call(await call(desk))).receipt
    with pytest.raises(VerificationFailed, match="usage object"):
        check_signature(signed.model_copy(update={"usage": None}))
    with pytest.raises(VerificationFailed, match="said to lack"):
        check_signature(signed.model_copy(update={"usage_removed": True}))


async def test_receipt__usage_never_came__cannot_be_said_to_be_removed(desk):
    held = await desk.hold(1)
    await desk.capture(held, 1)
    signed = (await desk.call(held)).receipt
    assert not signed.usage_removed
    with pytest.raises(VerificationFailed, match="never had"):
        check_signature(signed.model_copy(update={"usage_removed": True}))


# ── Forgetting an account ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def two(desk):
    """Two accounts with labels, keys and calls."""
    await desk.open("ada")
    await desk.apply(block(2), deposited(OTHER, FUNDED, label="bob"))
    await desk.open("bob")
    for account in (ACCOUNT, OTHER):
        await desk.ledger.keys.add(
            f"wf_{account}", account=account, name=f"{'her' if account == ACCOUNT else 'his'} laptop"
        )
        await call(desk, account=account)
    lost = await desk.hold(3)
    await desk.ledger.lose(lost, "words of the provider")
    await asked(desk, "their order 17")
    await settle(desk, 3)
    return desk


async def test_forget__account__loses_all_that_is_not_on_the_chain_and_no_other_does(two):
    desk, others = two, await _of(two, OTHER)
    before = await desk.record()
    done = await desk.ledger.forget(ACCOUNT)
    assert done == retention.Forgotten(label=True, keys=1, usage=1, details=3, idempotency=1)
    assert desk.ledger.keys.find(f"wf_{ACCOUNT}") is None
    assert desk.ledger.keys.find(f"wf_{OTHER}") is not None
    after = await desk.record()
    assert after.label is None
    assert after.wallet == before.wallet
    assert await _of(desk, OTHER) == others
    text = str([await desk.table(table) for table in schema.metadata.sorted_tables])
    for word in ("'ada'", "her laptop", "their order", "words of the provider"):
        assert word not in text, word
    statement = await desk.ledger.read(lambda c: views.statement(c, ACCOUNT, 0, 100))
    assert [line.event for line in statement] == ["Deposited", "Charged", "Charged"]


async def _of(desk, account):
    calls = await desk.ledger.read(lambda c: views.calls(c, 1, "0x" + "00" * 20, account=account))
    return await desk.record(account), calls


async def test_forget__again__does_nothing_more(two):
    await two.ledger.forget(ACCOUNT)
    assert await two.ledger.forget(ACCOUNT) == retention.Forgotten(
        label=False, keys=0, usage=0, details=0, idempotency=0
    )


async def test_forget__label_used_again__is_the_same_account(two):
    await two.ledger.forget(ACCOUNT)
    assert await two.open("ada") == ACCOUNT
    assert (await two.record()).label == "ada"


async def test_forget__call_running_or_unsettled__is_refused_and_nothing_is_erased(two):
    held = await two.hold(1)
    with pytest.raises(AccountBusy):
        await two.ledger.forget(ACCOUNT)
    await two.capture(held, 1)
    with pytest.raises(AccountBusy):
        await two.ledger.forget(ACCOUNT)
    assert (await two.record()).label == "ada"
    assert two.ledger.keys.find(f"wf_{ACCOUNT}") is not None


async def test_forget__no_such_account__is_told(desk):
    with pytest.raises(AccountNotFound):
        await desk.ledger.forget(OTHER)


@only_postgres
async def test_forget__other_process__lets_nobody_in_with_the_keys_either(two, open_ledger):
    other = open_ledger()
    following = asyncio.create_task(other.follow())
    assert other.keys.find(f"wf_{ACCOUNT}") is not None
    await two.ledger.forget(ACCOUNT)
    async with asyncio.timeout(10):
        while other.keys.find(f"wf_{ACCOUNT}") is not None:
            await asyncio.sleep(0.01)
    following.cancel()
    assert other.keys.find(f"wf_{OTHER}") is not None


async def test_sweep__answers__are_kept_for_their_hours_and_their_keys_for_longer(desk):
    once = Once("calls", "key", "hash")
    held = await desk.ledger.hold(
        Caller(ACCOUNT, None), "small", prices.fixed(USD), block_time=0, expiry_margin=0, once=once
    )
    await desk.ledger.capture(held, sign(held, 5), answer=Answer(once, "text/plain", b"hi"))
    hour = DAY // 24
    assert (await swept(desk, RetentionSettings(), now_ms() + 23 * hour)).answers == 0
    assert await desk.ledger.find_answer(once) is not None
    assert (await swept(desk, RetentionSettings(), now_ms() + 25 * hour)).answers == 1
    assert await desk.ledger.find_answer(once) is None
    (row,) = await desk.table(schema.idempotency)
    assert (row["key"], row["sequence"]) == ("key", held.sequence)
    assert (await swept(desk, RetentionSettings(), now_ms() + 25 * hour)).answers == 0
