import asyncio
import json
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule
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
    Desk,
    allowance_set,
    block,
    card,
    charged,
    deposited,
    only_postgres,
    policy_set,
    rejected,
    sign,
    word,
)

from waterfall.chain.events import Rejection
from waterfall.errors import (
    AccountNotFound,
    CallRepeated,
    FundsHeld,
    HoldNotOpen,
    IdempotencyConflict,
    InsufficientFunds,
    LedgerError,
    LimitExceeded,
    PaymentRequired,
)
from waterfall.ledger import journal, schema
from waterfall.ledger.books import Hold, Once
from waterfall.ledger.journal import Answer, Caller
from waterfall.ledger.store import Ledger
from waterfall.metering import prices
from waterfall.receipts import price_id
from waterfall.types import Allowance, Policy, RateCard, UsageReceipt


async def reserved(desk, account=None):
    wallet = await desk.wallet(account)
    return wallet.held, wallet.unsettled


# ── Hold ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_hold__money_there__is_set_aside(desk):
    held = await desk.hold(3 * USD)
    assert (held.account, held.amount) == (ACCOUNT, 3 * USD)
    assert await reserved(desk) == (3 * USD, 0)
    record = await desk.call(held)
    assert (record.settlement.state, record.held, record.receipt) == ("held", 3 * USD, None)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_charge_id__any__has_its_epoch_and_its_sequence(epoch, sequence):
    id_ = journal.charge_id(epoch, sequence)
    assert (journal.epoch_of(id_), journal.sequence_of(id_)) == (epoch, sequence)


async def test_hold__charge_id__is_epoch_and_sequence(desk):
    first, second = await desk.hold(1), await desk.hold(1)
    assert second.sequence == first.sequence + 1, "dense ids make cheap batches"
    assert first.charge_id == desk.ledger.epoch * 2**32 + first.sequence
    assert first.charge_id < 2**64
    assert len(first.receipt_id) == 32
    assert first.receipt_id != second.receipt_id


async def test_hold__unknown_account__is_refused(desk):
    with pytest.raises(AccountNotFound):
        await desk.hold(1, account=OTHER)


async def test_hold__refused__leaves_nothing_behind(desk):
    with pytest.raises(InsufficientFunds):
        await desk.hold(FUNDED + 1)
    assert await reserved(desk) == (0, 0)
    assert await desk.table(schema.holds) == []


async def test_hold__sixty_at_once_on_a_wallet_for_ten__exactly_ten(desk):
    results = await asyncio.gather(*(desk.hold(FUNDED // 10) for _ in range(60)), return_exceptions=True)
    assert sum(not isinstance(result, Exception) for result in results) == 10
    assert {type(result) for result in results if isinstance(result, Exception)} == {FundsHeld}
    assert await reserved(desk) == (FUNDED, 0)


async def test_hold__sixty_at_once_on_a_window_for_ten__exactly_ten(desk):
    policy = Policy(max_per_window=USD, window_seconds=60)
    await desk.apply(block(2), policy_set(ACCOUNT, policy))
    results = await asyncio.gather(*(desk.hold(USD // 10) for _ in range(60)), return_exceptions=True)
    assert sum(not isinstance(result, Exception) for result in results) == 10
    assert {type(result) for result in results if isinstance(result, Exception)} == {LimitExceeded}


async def test_hold__policy_asked_for__binds_at_once(desk):
    await desk.order(Policy(max_per_charge=5))
    assert (await desk.hold(5)).amount == 5
    with pytest.raises(LimitExceeded):
        await desk.hold(6)


async def test_hold__epoch_with_no_ids_left__is_refused(desk, monkeypatch):
    ids = iter((2**32 - 1, 2**32))
    monkeypatch.setattr(desk.ledger._database, "draw", lambda: next(ids))  # noqa: SLF001
    assert (await desk.hold(1)).sequence == 2**32 - 1
    with pytest.raises(LedgerError, match="used up"):
        await desk.hold(1)
    assert await reserved(desk) == (1, 0)


# ── Capture ──────────────────────────────────────────────────────────────────────────────────────────


async def test_capture__part_of_the_hold__the_rest_is_free_again(desk):
    held = await desk.hold(3 * USD)
    captured = await desk.capture(held, USD)
    assert (captured.amount, captured.balance) == (USD, FUNDED - USD)
    assert captured.receipt_id == held.receipt_id
    assert await reserved(desk) == (0, USD)
    assert (await desk.wallet()).available == FUNDED - USD


async def test_capture__receipt__is_kept_word_for_word(desk):
    held = await desk.hold(USD)
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.1, "at": 2**60}
    signed = sign(held, 7, usage=usage)
    await desk.ledger.capture(held, signed)
    record = await desk.call(held)
    assert record.receipt == signed
    assert record.settlement.state == "queued"


async def test_capture__twice__one_debit(desk):
    """Whoever was told of an error cannot know whether it was written: it asks again."""
    held = await desk.hold(USD)
    first = await desk.capture(held, 5)
    assert await desk.capture(held, 5) == first
    assert await reserved(desk) == (0, 5)


async def test_capture__twice_with_another_receipt__is_refused(desk):
    held = await desk.hold(USD)
    await desk.capture(held, 5)
    with pytest.raises(HoldNotOpen):
        await desk.capture(held, 6)
    assert await reserved(desk) == (0, 5)


async def test_capture__hold_closed_as_abandoned__is_charged_late(desk):
    held = await abandon(desk, USD)
    captured = await desk.capture(held, 5, excess=3)
    assert [row["excess"] for row in await desk.table(schema.charges)] == [3]
    assert (captured.amount, captured.balance) == (5, FUNDED - 5)
    assert await reserved(desk) == (0, 5)
    assert (await desk.call(held)).settlement.state == "queued"


async def test_capture__hold_closed_as_abandoned_and_money_gone__is_refused(desk):
    held = await abandon(desk, USD)
    await desk.charge(FUNDED - 4)
    with pytest.raises(HoldNotOpen):
        await desk.capture(held, 5)
    assert await reserved(desk) == (0, FUNDED - 4)
    assert (await desk.call(held)).settlement.state == "lost"


async def is_refused_late(desk, held, amount):
    """Whether a call that ended after its hold was closed is not charged, and stays lost."""
    before = await reserved(desk)
    with pytest.raises(HoldNotOpen):
        await desk.capture(held, amount)
    return await reserved(desk) == before and (await desk.call(held)).settlement.state == "lost"


async def test_capture__hold_closed_as_abandoned_and_window_used_up__is_refused(desk):
    """The vault would reject it: its room in the window went to another call."""
    await desk.apply(block(2), policy_set(ACCOUNT, Policy(max_per_window=USD, window_seconds=60)))
    held = await abandon(desk, USD)
    await desk.charge(USD - 5)
    assert await is_refused_late(desk, held, 6)
    assert (await desk.capture(held, 5)).amount == 5


async def test_capture__hold_closed_as_abandoned_in_a_window_that_has_turned__is_charged(desk):
    await desk.apply(block(2), policy_set(ACCOUNT, Policy(max_per_window=USD, window_seconds=60)))
    held = await abandon(desk, USD)
    await desk.apply(block(3), charged(await desk.charge(USD)))
    assert await is_refused_late(desk, held, USD)
    await desk.apply(block(4, block(3).timestamp + 60))
    assert (await desk.capture(held, USD)).amount == USD


@pytest.mark.parametrize(
    "limit",
    [
        policy_set(ACCOUNT, Policy(max_per_charge=5)),
        policy_set(ACCOUNT, Policy(expires_at=block(3).timestamp + 60)),
        allowance_set(ACCOUNT, Allowance(cap=5, expires_at=2**39)),
        allowance_set(ACCOUNT, Allowance(cap=USD, expires_at=block(3).timestamp + 60)),
    ],
)
async def test_capture__hold_closed_as_abandoned_and_limit_set_since__is_refused(desk, limit):
    held = await abandon(desk, USD)
    await desk.apply(block(3), limit)
    with pytest.raises(HoldNotOpen):
        await desk.ledger.capture(held, sign(held, 6), expiry_margin=60)
    assert await reserved(desk) == (0, 0)
    assert (await desk.ledger.capture(held, sign(held, 5), expiry_margin=59)).amount == 5


async def test_capture__hold_closed_as_abandoned_and_chain_not_read__is_to_be_asked_for_again(desk):
    """A rebuilt ledger knows no block for a moment, and no balance: that is no refusal."""
    held = await abandon(desk, USD)
    again = await desk.hold(USD)
    await desk.capture(again, 5)
    await desk.ledger.view.rebuild()
    with pytest.raises(LedgerError, match="not been read"):
        await desk.capture(held, 5)
    assert (await desk.capture(again, 5)).amount == 5, "what was charged before needs no block"
    await desk.apply(block(1, BLOCK_TIME), deposited(ACCOUNT, FUNDED))
    assert (await desk.capture(held, 5)).amount == 5


async def abandon(desk, amount):
    """A hold whose call runs on, though its lease ran out and it was closed."""
    held = await desk.hold(amount)
    await desk.ledger.write(lambda tx: journal.renew(tx, [held.sequence], -1000))
    assert await desk.ledger.write(journal.lose_abandoned_holds) == 1
    return held


async def test_release_unanswered__hold_was_written__is_given_back(desk):
    held = await desk.hold(5)
    await desk.ledger.release_unanswered(held.receipt_id, held.account, "nobody was told")
    at = (await desk.call(held)).settlement
    assert (at.state, at.reason) == ("released", "nobody was told")
    assert await reserved(desk) == (0, 0)


async def test_release_unanswered__hold_was_not_written__changes_nothing(desk):
    await desk.ledger.release_unanswered("00" * 16, ACCOUNT, "nobody was told")
    assert await reserved(desk) == (0, 0)


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
async def test_release__reason_that_no_database_takes__is_kept_as_far_as_it_goes(desk, text):
    held = await desk.hold(5)
    await desk.ledger.release(held, text)
    assert (await desk.call(held)).settlement.reason in {"a\N{REPLACEMENT CHARACTER}b", "a?b"}


async def test_capture__more_than_the_hold__is_refused_and_undone(desk):
    held = await desk.hold(5)
    with pytest.raises(ValueError, match="larger than its hold"):
        await desk.capture(held, 6)
    assert await reserved(desk) == (5, 0)
    assert (await desk.call(held)).settlement.state == "held"


async def test_capture__excess__is_kept_apart_and_never_charged(desk):
    held = await desk.hold(5)
    await desk.capture(held, 5, excess=3)
    (row,) = await desk.table(schema.charges)
    assert (row["amount"], row["excess"]) == (5, 3)
    assert await reserved(desk) == (0, 5)


async def test_capture__nothing__is_recorded_and_never_goes_to_the_chain(desk):
    held = await desk.hold(5)
    await desk.capture(held, 0)
    assert (await desk.call(held)).settlement.state == "free"
    assert await reserved(desk) == (0, 0)


async def test_capture__after_release__is_refused(desk):
    held = await desk.hold(5)
    await desk.ledger.release(held, "not reached")
    with pytest.raises(HoldNotOpen):
        await desk.capture(held, 5)
    assert await reserved(desk) == (0, 0)


async def test_capture__sets_captured__so_that_settlement_wakes(desk):
    desk.ledger.captured.clear()
    await desk.charge(5)
    assert desk.ledger.captured.is_set()


# ── Release and loss ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("end", "state"), [("release", "released"), ("lose", "lost")])
async def test_hold_given_back__whole__with_its_reason(desk, end, state):
    held = await desk.hold(5)
    await getattr(desk.ledger, end)(held, "because")
    assert await reserved(desk) == (0, 0)
    at = (await desk.call(held)).settlement
    assert (at.state, at.reason) == (state, "because")
    with pytest.raises(HoldNotOpen):
        await getattr(desk.ledger, end)(held, "again")
    assert await reserved(desk) == (0, 0)


async def test_lose_abandoned_holds__expired_leases__only_those(desk):
    running = await desk.hold(7)
    abandoned = await abandon(desk, 5)
    assert (await desk.call(abandoned)).settlement.state == "lost"
    assert (await desk.call(running)).settlement.state == "held"
    assert await reserved(desk) == (7, 0)


@only_postgres
async def test_lose_abandoned_holds__renewed_meanwhile__is_not_lost(desk, open_ledger, monkeypatch):
    other, lock = open_ledger(), journal.lock_wallets
    held = await desk.hold(5)
    await desk.ledger.write(lambda tx: journal.renew(tx, [held.sequence], -1000))

    def lock_late(tx, accounts):
        other._writer.run_sync(lambda tx: journal.renew(tx, [held.sequence], 60_000))  # noqa: SLF001
        return lock(tx, accounts)

    monkeypatch.setattr(journal, "lock_wallets", lock_late)
    assert await desk.ledger.write(journal.lose_abandoned_holds) == 0
    assert (await desk.call(held)).settlement.state == "held"
    assert await reserved(desk) == (5, 0)


async def test_renew__running_call__is_not_taken_for_abandoned(desk):
    held = await desk.hold(5)
    await desk.ledger.write(lambda tx: journal.renew(tx, [held.sequence], -1000))
    await desk.ledger.renew([held])
    assert await desk.ledger.write(journal.lose_abandoned_holds) == 0


# ── Beyond 64 bits ───────────────────────────────────────────────────────────────────────────────────


async def test_money__twenty_million_deposited_and_charged__exact_at_every_step(desk):
    """Credit units of 9.2 million USD fill a 64-bit integer; SQLite would go on with floats."""
    whole = 20_000_000 * USD + 1
    assert whole > 2**63
    await desk.apply(block(2), deposited(ACCOUNT, whole, entry=2))
    assert (await desk.wallet()).balance == FUNDED + whole
    charge = await desk.charge(whole)
    assert charge.amount == whole
    assert await reserved(desk) == (0, whole)
    assert (await desk.wallet()).available == FUNDED
    await desk.apply(block(3), charged(charge, entry=3))
    assert await reserved(desk) == (0, 0)
    assert (await desk.wallet()).balance == FUNDED
    await desk.ledger.view.rewind(block(1))
    assert await reserved(desk) == (0, whole)
    assert (await desk.wallet()).balance == FUNDED
    (row,) = await desk.table(schema.charges)
    assert row["amount"] == whole


# ── Rate cards ───────────────────────────────────────────────────────────────────────────────────────


async def test_keep_rate_card__twice__kept_once_and_shown_with_the_receipt(desk):
    tariff = card("small", "0.150", "2")
    for _ in range(2):
        await desk.ledger.write(lambda tx: journal.keep_rate_card(tx, price_id(tariff), tariff))
    held = await desk.hold(5)
    await desk.capture(held, 5, price_id=price_id(tariff))
    assert (await desk.call(held)).receipt.rate_card == tariff
    (row,) = await desk.table(schema.rate_cards)
    assert price_id(RateCard.model_validate_json(row["card"])) == row["price_id"]


# ── Charges metered elsewhere ────────────────────────────────────────────────────────────────────────


async def charge_elsewhere(desk, amount, key="k1", body="b1", api_key="key_1", account=ACCOUNT):
    caller = Caller(account, api_key)
    drawn = await desk.ledger.draw(caller, amount)
    return await desk.ledger.charge(
        caller,
        "",
        prices.fixed(amount),
        drawn,
        sign(drawn, amount, model=""),
        block_time=BLOCK_TIME,
        expiry_margin=0,
        idempotency_key=key,
        body_hash=word(body),
    )


async def test_charge__same_key_and_body__charged_once(desk):
    first = await charge_elsewhere(desk, 5)
    assert await charge_elsewhere(desk, 5) == first
    assert await reserved(desk) == (0, 5)
    assert await desk.states() == ["queued"]


async def test_find_charge__key__is_the_charge_that_was_made_under_it(desk):
    async def find(key, body="b1"):
        return await desk.ledger.find_charge(idempotency_key=key, body_hash=word(body))

    made = await charge_elsewhere(desk, 5)
    assert await find("k1") == made
    assert await find("another") is None
    with pytest.raises(IdempotencyConflict):
        await find("k1", "b2")


async def test_charge__same_key_at_once__charged_once(desk):
    receipts = await asyncio.gather(*(charge_elsewhere(desk, 5) for _ in range(20)))
    assert len(set(receipts)) == 1
    assert await reserved(desk) == (0, 5)


async def test_charge__same_key_when_the_money_is_gone__is_still_answered(desk):
    first = await charge_elsewhere(desk, FUNDED)
    assert await charge_elsewhere(desk, FUNDED) == first


async def test_charge__same_key_with_another_body__is_a_conflict(desk):
    await charge_elsewhere(desk, 5)
    with pytest.raises(IdempotencyConflict):
        await charge_elsewhere(desk, 6, body="b2")
    assert await reserved(desk) == (0, 5)


async def test_charge__same_key_shown_with_another_api_key__charged_once(desk):
    """A platform that replaces its API key between a try and the next has the same idempotency keys."""
    first = await charge_elsewhere(desk, 5)
    assert await charge_elsewhere(desk, 5, api_key="key_2") == first
    assert await reserved(desk) == (0, 5)


async def test_charge__refused__may_be_repeated_with_the_same_key(desk):
    with pytest.raises(InsufficientFunds):
        await charge_elsewhere(desk, FUNDED + 1)
    await charge_elsewhere(desk, 5, body="b2")
    assert await reserved(desk) == (0, 5)


# ── Retry and recount ────────────────────────────────────────────────────────────────────────────────


WINDOW = 3600
TURN = (BLOCK_TIME // WINDOW + 1) * WINDOW  # the second at which the next window begins


async def retry(desk, block_time):
    await desk.ledger.write(lambda tx: journal.retry_rejected(tx, block_time))
    return await desk.states()


async def test_retry_rejected__by_the_window__not_before_it_has_turned(desk):
    charges = [await desk.charge(n) for n in (8, 5)]
    policy = Policy(max_per_window=10, window_seconds=WINDOW)
    await desk.apply(block(2, BLOCK_TIME + 1), policy_set(ACCOUNT, policy), charged(charges[0]))
    await desk.apply(block(3, BLOCK_TIME + 2), rejected(charges[1], Rejection.MAX_PER_WINDOW))
    assert await retry(desk, TURN - 1) == ["settled", "rejected"]
    assert await retry(desk, TURN) == ["settled", "queued"]
    assert await reserved(desk) == (0, 5)


async def test_retry_rejected__larger_than_a_whole_window__waits_for_another_policy(desk):
    charge = await desk.charge(11)
    policy = Policy(max_per_window=10, window_seconds=WINDOW)
    await desk.apply(block(2), policy_set(ACCOUNT, policy), rejected(charge, Rejection.MAX_PER_WINDOW))
    assert await retry(desk, TURN + 10 * WINDOW) == ["rejected"]
    await desk.apply(block(3), policy_set(ACCOUNT, Policy(max_per_window=11, window_seconds=WINDOW)))
    assert await desk.states() == ["queued"]


async def test_retry_rejected__by_anything_else__is_left_alone(desk):
    charge = await desk.charge(5)
    await desk.apply(block(2), rejected(charge, Rejection.BALANCE))
    assert await retry(desk, TURN + WINDOW) == ["rejected"]


async def test_recount__sums_that_drifted__are_derived_anew_and_named(desk):
    await desk.hold(3)
    await desk.charge(5)
    await desk.apply(block(2), deposited(OTHER, USD, label="bob"))
    its = schema.wallets.c.account == ACCOUNT
    await desk.ledger.write(lambda tx: tx.run(schema.wallets.update().where(its).values(held=9, unsettled=9)))
    assert await desk.ledger.write(journal.recount) == [ACCOUNT]
    assert await reserved(desk) == (3, 5)
    assert await desk.ledger.write(journal.recount) == []


async def test_capture__stored_receipt__is_json_of_the_struct(desk):
    held = await desk.hold(5)
    await desk.capture(held, 5)
    (row,) = await desk.table(schema.charges)
    assert UsageReceipt.model_validate_json(row["receipt"]).charge_id == held.charge_id
    assert json.loads(row["receipt"])["amount"] == "0.000000000005"


# ── Any sequence of calls ────────────────────────────────────────────────────────────────────────────

MOST = 100


class Calls(RuleBasedStateMachine):
    """Whatever calls do, sums are those of the rows and no account or policy is overspent."""

    held = Bundle("held")

    def __init__(self):
        super().__init__()
        self._folder = TemporaryDirectory()
        self._runner = asyncio.Runner()
        url = f"sqlite:///{self._folder.name}/waterfall.db"
        self.desk = Desk(Ledger.open(url, chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM), METER)
        self.open, self.unsettled = {}, {}
        self.balances = dict.fromkeys((ACCOUNT, OTHER), MOST)
        self.policy = Policy(max_per_window=MOST // 2, window_seconds=10**9)
        self.spent = 0
        self.number = 1
        self.run(
            self.desk.apply(
                block(1),
                deposited(ACCOUNT, MOST),
                deposited(OTHER, MOST, label="bob"),
                policy_set(OTHER, self.policy),
            )
        )

    def run(self, work):
        return self._runner.run(work)

    def committed(self, account):
        return sum(
            amount
            for amounts in (self.open, self.unsettled)
            for who, amount in amounts.values()
            if who == account
        )

    @rule(target=held, account=st.sampled_from([ACCOUNT, OTHER]), amount=st.integers(1, MOST))
    def hold(self, account, amount):
        room = self.balances[account] - self.committed(account)
        if account == OTHER:
            room = min(room, self.policy.max_per_window - self.spent - self.committed(account))
        try:
            held = self.run(self.desk.hold(amount, account=account))
        except PaymentRequired:
            assert amount > room
            return multiple()
        assert amount <= room
        self.open[held.sequence] = account, amount
        return held

    @rule(held=held, part=st.fractions(0, 1))
    def capture(self, held, part):
        if held.sequence not in self.open:
            with pytest.raises(HoldNotOpen):
                self.run(self.desk.capture(held, 0, model="other"))
            return
        account, most = self.open.pop(held.sequence)
        amount = int(most * part)
        self.run(self.desk.capture(held, amount))
        if amount:
            self.unsettled[held.charge_id] = account, amount

    @rule(held=held, end=st.sampled_from(["release", "lose"]))
    def give_back(self, held, end):
        if held.sequence not in self.open:
            with pytest.raises(HoldNotOpen):
                self.run(getattr(self.desk.ledger, end)(held, "again"))
            return
        self.run(getattr(self.desk.ledger, end)(held, "because"))
        del self.open[held.sequence]

    @rule(most=st.integers(1, 3), left_out=st.booleans())
    def settle(self, most, left_out):
        batch = [charge for charge in self.run(self.desk.charges()) if charge.id in self.unsettled][:most]
        self.number += 1
        if left_out:
            self.run(self.desk.apply(block(self.number), *map(rejected, batch)))
            return
        self.run(self.desk.apply(block(self.number), *map(charged, batch)))
        for charge in batch:
            account, amount = self.unsettled.pop(charge.id)
            self.balances[account] -= amount
            self.spent += amount * (account == OTHER)

    @rule(account=st.sampled_from([ACCOUNT, OTHER]), amount=st.integers(1, MOST))
    def deposit(self, account, amount):
        self.number += 1
        label = "ada" if account == ACCOUNT else "bob"
        self.run(self.desk.apply(block(self.number), deposited(account, amount, label=label)))
        self.balances[account] += amount

    @rule()
    def restart(self):
        """A process that dies leaves its holds open: their calls are lost, nothing else changes."""
        ledger = self.desk.ledger
        ledger.close()
        url = f"sqlite:///{self._folder.name}/waterfall.db"
        self.desk.ledger = Ledger.open(url, chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM)
        assert self.desk.ledger.lost_at_start == len(self.open)
        assert self.desk.ledger.recounted_at_start == []
        self.open.clear()

    @invariant()
    def sums_are_those_of_the_rows(self):
        for account in (ACCOUNT, OTHER):
            wallet = self.run(self.desk.wallet(account))
            assert wallet.held == sum(amount for who, amount in self.open.values() if who == account)
            assert wallet.unsettled == sum(
                amount for who, amount in self.unsettled.values() if who == account
            )
            assert wallet.balance == self.balances[account]
            assert wallet.held + wallet.unsettled <= wallet.balance
        assert self.spent + self.committed(OTHER) <= self.policy.max_per_window

    def teardown(self):
        self.desk.ledger.close()
        self._runner.close()
        self._folder.cleanup()


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=10, stateful_step_count=20)


# ── Calls under an idempotency key ───────────────────────────────────────────────────────────────────

ONCE = Once("calls of somebody", "key", word("body"))


async def hold_once(desk, once=ONCE, after=None):
    return await desk.ledger.hold(
        Caller(ACCOUNT, None),
        "small",
        prices.fixed(USD),
        block_time=BLOCK_TIME,
        expiry_margin=0,
        once=once,
        after=after,
    )


async def test_hold__under_a_key_that_was_used__is_refused_with_the_first_ones_receipt(desk):
    first = await hold_once(desk)
    for _ in range(2):
        with pytest.raises(CallRepeated) as repeated:
            await hold_once(desk)
        assert repeated.value.details["receipt"] == first.receipt_id
    with pytest.raises(IdempotencyConflict):
        await hold_once(desk, Once(ONCE.scope, ONCE.key, word("other")))
    assert await reserved(desk) == (USD, 0)
    assert (await hold_once(desk, Once("of another", ONCE.key, ONCE.body_hash))).sequence != first.sequence


async def test_holds__under_one_key_at_once__one_is_made(desk):
    outcomes = await asyncio.gather(*(hold_once(desk) for _ in range(20)), return_exceptions=True)
    (made,) = [outcome for outcome in outcomes if isinstance(outcome, Hold)]
    others = [outcome for outcome in outcomes if outcome is not made]
    assert {type(other) for other in others} == {CallRepeated}
    assert {other.details["receipt"] for other in others} == {made.receipt_id}
    assert await reserved(desk) == (USD, 0)


async def test_hold__under_the_key_of_one_that_was_released__takes_its_place(desk):
    first = await hold_once(desk)
    await desk.ledger.release(first, "not reached")
    second = await hold_once(desk)
    with pytest.raises(CallRepeated) as repeated:
        await hold_once(desk)
    assert repeated.value.details["receipt"] == second.receipt_id


async def test_holds__at_once_under_the_key_of_one_that_was_released__one_is_made(desk):
    first = await hold_once(desk)
    await desk.ledger.release(first, "not reached")
    outcomes = await asyncio.gather(*(hold_once(desk) for _ in range(20)), return_exceptions=True)
    (made,) = [outcome for outcome in outcomes if isinstance(outcome, Hold)]
    assert {type(outcome) for outcome in outcomes if outcome is not made} == {CallRepeated}
    assert await reserved(desk) == (USD, 0)
    other = Once(ONCE.scope, "other key", ONCE.body_hash)
    conflict = Once(ONCE.scope, "other key", word("other"))
    outcomes = await asyncio.gather(hold_once(desk, other), hold_once(desk, conflict), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {Hold, IdempotencyConflict}


async def test_hold__under_the_key_of_one_that_was_lost__only_for_the_same_call(desk):
    first = await hold_once(desk)
    await desk.ledger.lose(first, "it broke off")
    with pytest.raises(CallRepeated):
        await hold_once(desk)
    second = await hold_once(desk, after=first.sequence)
    with pytest.raises(CallRepeated) as repeated:
        await hold_once(desk, after=first.sequence)
    assert repeated.value.details["receipt"] == second.receipt_id


async def test_hold__refused_under_a_key__leaves_the_key_free(desk):
    with pytest.raises(InsufficientFunds):
        await desk.ledger.hold(
            Caller(ACCOUNT, None),
            "small",
            prices.fixed(FUNDED + 1),
            block_time=BLOCK_TIME,
            expiry_margin=0,
            once=ONCE,
        )
    assert await desk.table(schema.idempotency) == []
    assert await hold_once(desk)


async def test_capture__with_an_answer__keeps_it_for_repeats(desk):
    held = await hold_once(desk)
    assert await desk.ledger.find_answer(ONCE) is None
    given = Answer(ONCE, "application/json", b'{"\xff": 1}')
    await desk.ledger.capture(held, sign(held, 5), answer=given)
    assert await desk.ledger.find_answer(ONCE) == given
