import asyncio
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from making import (
    ACCOUNT,
    BLOCK_TIME,
    CHAIN_ID,
    FUNDED,
    METER,
    OTHER,
    PLATFORM,
    USD,
    VAULT,
    block,
    card,
    policy_set,
)

from waterfall.chain.verify import check_amount
from waterfall.errors import (
    AccountNotFound,
    HoldNotOpen,
    IdempotencyConflict,
    InsufficientFunds,
    LedgerError,
    LimitExceeded,
    PolicyExpired,
    SignerUnavailable,
    Unavailable,
)
from waterfall.gateway import calls as rooms
from waterfall.gateway.calls import Calls, Metered
from waterfall.ledger import journal, schema
from waterfall.ledger.journal import Caller
from waterfall.metering import prices
from waterfall.metering.prices import Most
from waterfall.receipts import bytes_hash, check_signature, price_id
from waterfall.types import Policy, Usage

TARIFF = card("small", "1", "2")
MODEL = SimpleNamespace(
    name="small",
    card=TARIFF,
    vendor_card=TARIFF,
    price_id=price_id(TARIFF),
    upstream=SimpleNamespace(name="local"),
)
UNIT = 10**6  # what a token costs at a dollar per million
USAGE = {"prompt_tokens": 10, "completion_tokens": 5}
CALLER = Caller(ACCOUNT, None)


def metered(usage=USAGE, tokens=(10, 5)):
    counted = Usage(input_tokens=tokens[0], output_tokens=tokens[1])
    return Metered(counted, usage, bytes_hash(b"request"), bytes_hash(b"response"))


@pytest.fixture
def calls(desk):
    return Calls(desk.ledger, METER, max_projection_age_seconds=60, longest_call_seconds=100)


def bound(tokens=100):
    return prices.bound(TARIFF, Most(10), tokens, tokens)


async def state(desk, held):
    return (await desk.call(held)).settlement.state


# ── Hold and capture ─────────────────────────────────────────────────────────────────────────────────


async def test_capture__metered_call__receipt_proves_itself(calls, desk):
    held = await calls.hold(CALLER, "chat", MODEL, bound())
    assert held.amount == (10 + 200) * UNIT
    captured = await calls.capture(held, "chat", MODEL, metered())
    assert (captured.amount, captured.balance) == (20 * UNIT, FUNDED - 20 * UNIT)
    signed = (await desk.call(held)).receipt
    check_signature(signed)
    assert "recomputed" in check_amount(signed)
    receipt = signed.receipt
    assert (receipt.platform, receipt.account, receipt.charge_id) == (PLATFORM, ACCOUNT, held.charge_id)
    assert (receipt.model, receipt.complete, signed.usage) == ("small", True, USAGE)
    assert (receipt.request_hash, receipt.response_hash) == (bytes_hash(b"request"), bytes_hash(b"response"))
    assert (signed.chain_id, signed.vault, signed.meter) == (CHAIN_ID, VAULT, METER.address)


async def test_capture__usage_never_came__is_not_complete(calls, desk):
    held = await calls.hold(CALLER, "chat", MODEL, bound())
    await calls.capture(held, "chat", MODEL, metered(None, (0, 5)))
    signed = (await desk.call(held)).receipt
    check_signature(signed)
    assert (signed.receipt.complete, signed.usage, signed.receipt.amount) == (False, None, 10 * UNIT)


async def test_capture__provider_broke_the_bound__charges_the_hold_and_keeps_the_rest_as_our_loss(
    calls, desk
):
    held = await calls.hold(CALLER, "chat", MODEL, bound(1))
    captured = await calls.capture(held, "chat", MODEL, metered(tokens=(10, 50)))
    assert captured.amount == held.amount == 12 * UNIT
    (row,) = await desk.table(schema.charges)
    assert row["excess"] == (110 - 12) * UNIT


@pytest.mark.parametrize("ahead", [-(10**9), 10**9])
async def test_sign__host_clock__never_before_the_newest_block(calls, desk, ahead):
    await desk.apply(block(2, BLOCK_TIME + ahead if ahead > 0 else BLOCK_TIME + 1))
    held = await calls.hold(CALLER, "chat", MODEL, bound())
    await calls.capture(held, "chat", MODEL, metered())
    assert (await desk.call(held)).receipt.receipt.issued_at >= desk.ledger.view.head.block.timestamp


async def test_capture__database_fails_for_a_moment__is_tried_until_it_is_durable(calls, desk, monkeypatch):
    held = await calls.hold(CALLER, "chat", MODEL, bound())
    failures, real, paused = [LedgerError(reason="disk full")] * 3, desk.ledger.capture, []

    async def capture(*arguments, **options):
        if failures:
            raise failures.pop()
        return await real(*arguments, **options)

    async def sleep(seconds):
        paused.append(seconds)

    monkeypatch.setattr(desk.ledger, "capture", capture)
    monkeypatch.setattr(rooms, "asyncio", SimpleNamespace(sleep=sleep))
    await calls.capture(held, "chat", MODEL, metered())
    assert paused == [0.05, 0.1, 0.2]
    assert await state(desk, held) == "queued"
    assert (await desk.wallet()).unsettled == 20 * UNIT


async def test_capture__meters_key_is_out_of_reach__is_tried_until_it_signs_and_charged_once(
    desk, monkeypatch
):
    """A key in a service of its own may be unreachable: what was delivered is charged when it is back."""
    meter = Unreachable(times=2)
    calls = Calls(desk.ledger, meter, max_projection_age_seconds=60, longest_call_seconds=100)
    monkeypatch.setattr(rooms, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": no_sleep}))
    held = await calls.hold(CALLER, "chat", MODEL, bound())
    await calls.capture(held, "chat", MODEL, metered())
    assert meter.times == 0
    check_signature((await desk.call(held)).receipt)
    assert await desk.states() == ["queued"]


async def test_capture__answered_by_an_error_though_durable__is_charged_once(calls, desk, monkeypatch):
    """A connection that is lost in a commit says nothing of whether it held."""
    held, real, lost = await calls.hold(CALLER, "chat", MODEL, bound()), desk.ledger.capture, []

    async def capture(*arguments, **options):
        captured = await real(*arguments, **options)
        if not lost:
            lost.append(captured)
            raise LedgerError(reason="server closed the connection")
        return captured

    monkeypatch.setattr(desk.ledger, "capture", capture)
    captured = await calls.capture(held, "chat", MODEL, metered())
    assert captured == lost[0]
    assert await desk.states() == ["queued"]
    assert (await desk.wallet()).unsettled == captured.amount


async def test_hold__answered_by_an_error_though_durable__is_given_back(calls, desk, monkeypatch):
    real = desk.ledger.hold

    async def hold(*arguments, **options):
        await real(*arguments, **options)
        raise LedgerError(reason="server closed the connection")

    monkeypatch.setattr(desk.ledger, "hold", hold)
    with pytest.raises(LedgerError):
        await calls.hold(CALLER, "chat", MODEL, bound())
    await calls.drain(5)
    (row,) = await desk.table(schema.holds)
    assert (row["state"], (await desk.wallet()).held) == ("released", 0)


class Unreachable:
    """A key that cannot be asked the first few times."""

    address = METER.address

    def __init__(self, times):
        self.times = times

    def sign(self, digest):
        if self.times:
            self.times -= 1
            raise SignerUnavailable(reason="no answer")
        return METER.sign(digest)


async def no_sleep(_):
    pass


async def test_capture__hold_taken_away_meanwhile__is_refused_and_not_repeated_for_ever(calls, desk):
    held = await calls.hold(CALLER, "chat", MODEL, bound())
    await desk.ledger.lose(held, "by another")
    with pytest.raises(HoldNotOpen):
        await calls.capture(held, "chat", MODEL, metered())
    assert await state(desk, held) == "lost"
    assert (await desk.wallet()).unsettled == 0


@pytest.mark.parametrize(("seconds", "expected"), [(60, "lost"), (61, "queued")])
async def test_capture__hold_closed_as_abandoned__is_charged_only_where_it_still_settles_in_time(
    calls, desk, seconds, expected
):
    held = await calls.hold(CALLER, "chat", MODEL, bound())
    await desk.ledger.write(lambda tx: journal.renew(tx, [held.sequence], -1000))
    await desk.ledger.write(journal.lose_abandoned_holds)
    policy = Policy(expires_at=block(2).timestamp + seconds)
    await desk.apply(block(2), policy_set(ACCOUNT, policy))
    with nullcontext() if expected == "queued" else pytest.raises(HoldNotOpen):
        await calls.capture(held, "chat", MODEL, metered())
    assert await state(desk, held) == expected


@pytest.mark.parametrize(("end", "expected"), [("release", "released"), ("lose", "lost")])
async def test_give_back__hold__free_again(calls, desk, end, expected):
    held = await calls.hold(CALLER, "chat", MODEL, bound())
    await getattr(calls, end)(held, "because")
    assert await state(desk, held) == expected
    assert (await desk.wallet()).available == FUNDED


async def test_hold__caller_gone_before_it_is_durable__is_given_back(calls, desk):
    await desk.ledger.keep_rate_card(MODEL.price_id, MODEL.card)
    holding = asyncio.create_task(calls.hold(CALLER, "chat", MODEL, bound()))
    await asyncio.sleep(0)
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    await calls.drain(5)
    await calls.drain(5)
    (row,) = await desk.table(schema.holds)
    assert row["state"] == "released"
    assert (await desk.wallet()).held == 0


async def test_drain__call_that_waits_for_its_hold__is_waited_for(calls, desk):
    await desk.ledger.keep_rate_card(MODEL.price_id, MODEL.card)
    holding = asyncio.create_task(calls.hold(CALLER, "chat", MODEL, bound()))
    await asyncio.sleep(0)
    draining = asyncio.create_task(calls.drain(5))
    held = await holding
    await asyncio.sleep(0)
    assert not draining.done()
    await calls.capture(held, "chat", MODEL, metered())
    await draining
    assert await desk.states() == ["queued"]


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────


async def test_hold__refused__says_where_to_send_money(calls, desk):
    with pytest.raises(InsufficientFunds) as refusal:
        await calls.hold(CALLER, "chat", MODEL, prices.fixed(FUNDED + 1))
    assert refusal.value.details["deposit_address"] == desk.ledger.deposit_address(ACCOUNT)


async def test_hold__unknown_account__is_not_found(calls):
    with pytest.raises(AccountNotFound):
        await calls.hold(Caller(OTHER, None), "chat", MODEL, bound())


async def test_hold__policy_expires_before_the_longest_call_could_settle__is_refused(calls, desk):
    await desk.order(Policy(expires_at=BLOCK_TIME + 161))
    await calls.hold(CALLER, "chat", MODEL, bound())
    await desk.order(Policy(expires_at=BLOCK_TIME + 160))
    with pytest.raises(PolicyExpired):
        await calls.hold(CALLER, "chat", MODEL, bound())


async def test_hold__policy__binds(calls, desk):
    await desk.order(Policy(max_per_charge=5))
    with pytest.raises(LimitExceeded):
        await calls.hold(CALLER, "chat", MODEL, bound())


async def test_hold__view_of_the_chain_too_old__nothing_is_held(calls, desk, monkeypatch):
    seen = desk.ledger.view.head.seen_at
    monkeypatch.setattr("waterfall.ledger.chain_view.time", SimpleNamespace(monotonic=lambda: seen + 61))
    with pytest.raises(Unavailable):
        await calls.hold(CALLER, "chat", MODEL, bound())
    with pytest.raises(Unavailable):
        await elsewhere(calls)
    assert await desk.table(schema.holds) == []


async def test_hold__database_closed__is_refused(calls, desk):
    desk.ledger.close()
    with pytest.raises(LedgerError):
        await calls.hold(CALLER, "chat", MODEL, bound())


# ── Charges metered elsewhere ────────────────────────────────────────────────────────────────────────


async def elsewhere(calls, *, key="k", amount=20 * UNIT, tariff=TARIFF, usage=USAGE):
    return await calls.charge(
        CALLER,
        surface="chat",
        model="small",
        card=tariff,
        amount=amount,
        metered=metered(usage),
        idempotency_key=key,
        vendor_cost=None,
    )


async def test_charge__with_usage__receipt_proves_itself(calls, desk):
    receipt_id = await elsewhere(calls)
    assert await elsewhere(calls) == receipt_id
    signed = (await desk.call(SimpleNamespace(receipt_id=receipt_id))).receipt
    check_signature(signed)
    assert "recomputed" in check_amount(signed)
    assert (await desk.wallet()).unsettled == 20 * UNIT


async def test_charge__amount_only__is_what_the_platform_stated(calls, desk):
    receipt_id = await elsewhere(calls, tariff=None, usage=None, amount=USD)
    signed = (await desk.call(SimpleNamespace(receipt_id=receipt_id))).receipt
    check_signature(signed)
    assert "stated by the platform" in check_amount(signed)
    assert signed.receipt.complete


async def test_charge__refused_for_want_of_money__says_where_to_send_some(calls, desk):
    with pytest.raises(InsufficientFunds) as refusal:
        await elsewhere(calls, amount=FUNDED + 1)
    assert refusal.value.details["deposit_address"] == desk.ledger.deposit_address(ACCOUNT)


async def test_charge__key_reused_for_another_body__is_a_conflict(calls):
    await elsewhere(calls)
    other = Metered(Usage(input_tokens=1, output_tokens=1), None, bytes_hash(b"other"), bytes_hash(b""))
    with pytest.raises(IdempotencyConflict):
        await calls.charge(
            CALLER,
            surface=None,
            model="",
            card=None,
            amount=1,
            metered=other,
            idempotency_key="k",
            vendor_cost=None,
        )


# ── Running calls ────────────────────────────────────────────────────────────────────────────────────


async def test_renew_leases__open_holds_only__until_they_end(calls, desk, monkeypatch):
    running, ended = [await calls.hold(CALLER, "chat", MODEL, bound()) for _ in range(2)]
    await calls.capture(ended, "chat", MODEL, metered())
    renewed, turns = [], []

    async def renew(running):
        renewed.append([held.sequence for held in running])
        if len(renewed) == 1:
            raise LedgerError(reason="busy")

    async def sleep(seconds):
        turns.append(seconds)
        if len(turns) > 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(desk.ledger, "renew", renew)
    monkeypatch.setattr(rooms, "asyncio", SimpleNamespace(sleep=sleep))
    with pytest.raises(asyncio.CancelledError):
        await calls.renew_leases()
    assert renewed == [[running.sequence]] * 3
    assert set(turns) == {12}


async def test_drain__running_call__is_waited_for(calls):
    ended = []

    async def work():
        await asyncio.sleep(0)
        ended.append(True)

    calls.start(work())
    await calls.drain(5)
    assert ended == [True]


async def test_drain__call_between_two_steps__is_waited_for(calls, desk):
    """Its hold is written, and what comes next has not begun."""
    held = await calls.hold(CALLER, "chat", MODEL, bound())

    async def go_on():
        await asyncio.sleep(0.05)
        await calls.capture(held, "chat", MODEL, metered())

    going_on = asyncio.create_task(go_on())
    await calls.drain(5)
    assert going_on.done()
    assert await state(desk, held) == "queued"


async def test_drain__call_that_does_not_end__is_waited_for_no_longer_than_told(calls):
    forever = calls.start(asyncio.Event().wait())
    await calls.drain(0.01)
    assert not forever.done()
    forever.cancel()


async def test_start__client_gone__the_call_goes_on(calls):
    entered, leave, ended = asyncio.Event(), asyncio.Event(), []

    async def work():
        entered.set()
        await leave.wait()
        ended.append(True)

    async def request():
        await asyncio.shield(calls.start(work()))

    client = asyncio.create_task(request())
    await entered.wait()
    client.cancel()
    leave.set()
    await calls.drain(5)
    assert ended == [True]
