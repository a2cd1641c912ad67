import itertools

import pytest
from making import (
    ACCOUNT,
    BLOCK_TIME,
    CHAIN_ID,
    FUNDED,
    OTHER,
    PLATFORM,
    USD,
    VAULT,
    block,
    charged,
    deposited,
    policy_set,
    rejected,
)

from waterfall.chain.events import ExitRequested
from waterfall.errors import AccountNotFound, ReceiptNotFound
from waterfall.ledger import journal, projection, views
from waterfall.types import Policy


async def calls(desk, **which):
    return await desk.ledger.read(lambda c: views.calls(c, CHAIN_ID, VAULT, **which))


async def statement(desk, after=0, limit=100, account=ACCOUNT):
    return await desk.ledger.read(lambda c: views.statement(c, account, after, limit))


# ── Accounts ─────────────────────────────────────────────────────────────────────────────────────────


async def test_account__unknown__is_not_found(desk):
    with pytest.raises(AccountNotFound):
        await desk.record(OTHER)


async def test_account__everything_at_once__is_shown(desk):
    policy = Policy(max_per_charge=USD, max_per_window=2 * USD, window_seconds=3600, expires_at=2**39)
    await desk.apply(
        block(2), policy_set(ACCOUNT, policy), ExitRequested(PLATFORM, ACCOUNT, USD, USD, 2**39, 2)
    )
    await desk.apply(block(3), deposited(ACCOUNT, 5, entry=3), spendable=2)
    await desk.order(Policy(max_per_charge=9))
    await desk.charge(3)
    await desk.hold(2)
    record = await desk.record()
    assert (record.policy, record.wanted) == (policy, Policy(max_per_charge=9))
    assert (record.exit_amount, record.exit_matures_at) == (USD, 2**39)
    wallet = record.wallet
    assert (wallet.balance, wallet.pending) == (FUNDED - USD + 5, 5)
    assert (wallet.held, wallet.unsettled) == (2, 3)
    assert wallet.available == FUNDED - USD - 5
    assert wallet.policies == (policy, Policy(max_per_charge=9))


async def test_accounts__several__oldest_first(desk, monkeypatch):
    later = itertools.count(journal.now_ms() + 1)
    monkeypatch.setattr(projection, "now_ms", lambda: next(later))
    await desk.open("bob")
    await desk.open("cyd")
    records = await desk.ledger.read(views.accounts)
    assert [record.label for record in records] == [None, "bob", "cyd"]


# ── Calls and receipts ───────────────────────────────────────────────────────────────────────────────


async def test_call__unknown_receipt__is_not_found(desk):
    with pytest.raises(ReceiptNotFound):
        await desk.ledger.read(lambda c: views.call(c, "ab" * 16, CHAIN_ID, VAULT))


async def test_call__settled__says_where_on_the_chain(desk):
    held = await desk.hold(5)
    await desk.capture(held, 3)
    (charge,) = await desk.charges()
    await desk.apply(block(2), charged(charge))
    call = await desk.call(held)
    assert (call.charge_id, call.account, call.model, call.held) == (held.charge_id, ACCOUNT, "small", 5)
    at = call.settlement
    assert (at.state, at.block, at.reason) == ("settled", 2, None)
    assert at.transaction.startswith("0x")
    assert at.captured_at <= at.settled_at
    assert call.receipt.receipt.amount == 3


async def test_calls__many__newest_first_in_pages(desk):
    for _ in range(5):
        await desk.hold(1)
    page = await calls(desk, limit=2)
    assert [call.charge_id & 0xFFFF for call in page] == [5, 4]
    page = await calls(desk, limit=2, before=4)
    assert [call.charge_id & 0xFFFF for call in page] == [3, 2]


async def test_calls__by_account_and_state__only_those(desk):
    await desk.apply(block(2), deposited(OTHER, FUNDED, label="bob"))
    open_, released, lost = [await desk.hold(1) for _ in range(3)]
    await desk.ledger.release(released, "not reached")
    await desk.ledger.lose(lost, "cut")
    charges = [await desk.charge(n) for n in (2, 3)]
    await desk.charge(4, account=OTHER)
    await desk.apply(block(3), charged(charges[0]), rejected(charges[1]))

    async def found(**which):
        return {call.charge_id for call in await calls(desk, **which)}

    assert await found(state="held") == {open_.charge_id}
    assert await found(state="released") == {released.charge_id}
    assert await found(state="lost") == {lost.charge_id}
    assert await found(state="settled") == {charges[0].id}
    assert await found(state="rejected", account=ACCOUNT) == {charges[1].id}
    assert await found(state="rejected", account=OTHER) == set()
    assert len(await found(account=OTHER)) == 1
    assert len(await found()) == 6
    assert await found(state="no such") == set()


async def test_calls__by_completeness__those_whose_usage_came_or_never_did(desk):
    await desk.hold(1)
    made = {}
    for usage in (None, {"prompt_tokens": 1, "completion_tokens": 1}):
        held = await desk.hold(5)
        await desk.capture(held, 5, usage=usage)
        made[usage is not None] = held.charge_id
    for complete in (True, False):
        assert [call.charge_id for call in await calls(desk, complete=complete)] == [made[complete]]
    assert len(await calls(desk)) == 3


async def test_call__metered_beyond_the_hold__shows_the_excess(desk):
    held = await desk.hold(5)
    assert (await desk.call(held)).excess == 0
    await desk.capture(held, 5, excess=2)
    assert (await desk.call(held)).excess == 2


async def test_unsettled__of_an_account__those_not_on_the_chain(desk):
    charges = [await desk.charge(n) for n in (1, 2, 3)]
    await desk.apply(block(2), charged(charges[0]), rejected(charges[1]))
    found = await desk.ledger.read(lambda c: views.unsettled(c, CHAIN_ID, VAULT, ACCOUNT))
    assert [call.charge_id for call in found] == [charges[2].id, charges[1].id]
    assert await desk.ledger.read(lambda c: views.unsettled(c, CHAIN_ID, VAULT, OTHER)) == []


# ── Statements ───────────────────────────────────────────────────────────────────────────────────────


async def test_statement__lines__gapless_in_order_with_their_receipts(desk):
    held = await desk.hold(5)
    await desk.capture(held, 5)
    (charge,) = await desk.charges()
    await desk.apply(block(2), deposited(ACCOUNT, USD, entry=2), charged(charge, entry=3))
    lines = await statement(desk)
    assert [(line.entry, line.event, line.amount) for line in lines] == [
        (1, "Deposited", FUNDED),
        (2, "Deposited", USD),
        (3, "Charged", 5),
    ]
    assert [line.receipt_id for line in lines] == [None, None, held.receipt_id]
    assert lines[2].charge_id == str(held.charge_id)
    assert (lines[0].block, lines[0].timestamp) == (1, BLOCK_TIME)


async def test_statement__pages__go_on_after_a_line(desk):
    for number in range(2, 6):
        await desk.apply(block(number), deposited(ACCOUNT, number, entry=number))
    assert [line.entry for line in await statement(desk, limit=2)] == [1, 2]
    assert [line.entry for line in await statement(desk, after=2, limit=2)] == [3, 4]
    assert await statement(desk, after=5) == []


async def test_statement__charge_of_another_ledger__has_no_receipt_here(desk):
    charge = await desk.charge(5)
    await desk.apply(block(2), charged(charge, id=charge.id ^ 2**40))
    assert [line.receipt_id for line in await statement(desk)] == [None, None]


async def test_statement__events_that_move_no_money__are_no_lines(desk):
    await desk.apply(block(2), policy_set(ACCOUNT, Policy(max_per_charge=1)), rejected(await desk.charge(5)))
    assert [line.event for line in await statement(desk)] == ["Deposited"]


# ── Totals ───────────────────────────────────────────────────────────────────────────────────────────


async def test_totals__ledger_at_work__sums_and_counts(desk):
    huge = 20_000_000 * USD
    await desk.apply(block(2), deposited(OTHER, huge, label="bob"))
    await desk.hold(3)
    await desk.ledger.lose(await desk.hold(1), "cut")
    charges = [await desk.charge(n) for n in (5, 7)]
    await desk.apply(block(3), charged(charges[0]))
    totals = await desk.ledger.read(views.totals)
    assert (totals.balance, totals.held, totals.unsettled) == (FUNDED + huge - 5, 3, 7)
    assert totals.calls == {"held": 1, "lost": 1, "settled": 1, "queued": 1}


async def test_totals__losses__excess_is_summed_exactly_and_incomplete_calls_are_counted(desk):
    assert await losses(desk) == (0, 0)
    huge = 20_000_000 * USD  # with the next, more than 64 bits hold
    for excess, complete in ((huge, True), (1, False), (0, False)):
        await desk.capture(await desk.hold(5), 5, excess=excess, complete=complete)
    assert await losses(desk) == (huge + 1, 2)


async def losses(desk):
    totals = await desk.ledger.read(views.totals)
    return totals.excess, totals.incomplete
