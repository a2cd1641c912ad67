import asyncio
import json
from tempfile import TemporaryDirectory

import pytest
from fake_chain import EXIT_DELAY, FakeChain
from hypothesis import given, settings
from hypothesis import strategies as st
from making import (
    ACCOUNT,
    BLOCK_TIME,
    CHAIN_ID,
    FUNDED,
    GAS,
    METER,
    OTHER,
    PLATFORM,
    SALT,
    USD,
    VAULT,
    Desk,
    batch,
    block,
    charged,
    deposited,
    policy_set,
    rejected,
    word,
)

from waterfall.chain import events as chain_events
from waterfall.chain.events import ExitDrawn, Rejection
from waterfall.chain.transactions import Fees, Signed
from waterfall.errors import InsufficientFunds, LimitExceeded
from waterfall.ledger import accounts, schema, slots, views
from waterfall.ledger.projection import Block
from waterfall.ledger.slots import Attempt, Slot
from waterfall.ledger.store import Ledger
from waterfall.types import Policy

LABELS = {ACCOUNT: accounts.label_hash(SALT, "ada"), OTHER: accounts.label_hash(SALT, "bob")}
TIGHT, LOOSE = Policy(max_per_charge=USD), Policy(max_per_charge=2 * USD)


# ── Money in ─────────────────────────────────────────────────────────────────────────────────────────


async def test_apply__deposit_of_an_unknown_account__opens_it(desk):
    await desk.apply(block(2), deposited(OTHER, 5, label="bob"))
    record = await desk.record(OTHER)
    assert (record.wallet.balance, record.label, record.label_hash) == (5, None, LABELS[OTHER])
    assert await desk.open("bob") == OTHER, "the gateway gives it its label"
    assert (await desk.record(OTHER)).label == "bob"


async def test_apply__deposit_not_final_yet__is_not_spendable(desk):
    await desk.apply(block(2), deposited(ACCOUNT, USD), spendable=1)
    wallet = await desk.wallet()
    assert (wallet.balance, wallet.pending, wallet.available) == (FUNDED + USD, USD, FUNDED)
    with pytest.raises(InsufficientFunds):
        await desk.hold(FUNDED + 1)
    await desk.ledger.view.finalize(spendable=2, final=0)
    assert (await desk.wallet()).pending == 0
    assert (await desk.hold(FUNDED + USD)).amount == FUNDED + USD


async def test_apply__deposits_of_several_blocks__each_counts_at_its_own_time(desk):
    await desk.apply(block(2), deposited(ACCOUNT, 1), spendable=0)
    await desk.apply(block(3), deposited(ACCOUNT, 2), deposited(ACCOUNT, 4), spendable=0)
    assert (await desk.wallet()).pending == 7
    await desk.ledger.view.finalize(spendable=2, final=0)
    assert (await desk.wallet()).pending == 6
    await desk.apply(block(4), spendable=3)
    assert (await desk.wallet()).pending == 0


async def test_apply__events_of_another_platform__are_left_alone(desk):
    other = chain_events.Deposited(7, OTHER, VAULT, VAULT, word("l"), 5, 1)
    await desk.apply(block(2), other, chain_events.Charged(OTHER, 1, 5, 2, word("r")))
    assert len(await desk.table(schema.wallets)) == 1
    assert [row["name"] for row in await desk.table(schema.events)] == ["Deposited"]


# ── Charges ──────────────────────────────────────────────────────────────────────────────────────────


async def test_apply__charge_settled__is_never_counted_twice_or_not_at_all(desk):
    charge = await desk.charge(3 * USD)
    assert (await desk.wallet()).available == 7 * USD
    await desk.apply(block(2), charged(charge))
    wallet = await desk.wallet()
    assert (wallet.balance, wallet.unsettled, wallet.available) == (7 * USD, 0, 7 * USD)
    assert await desk.states() == ["settled"]
    await desk.ledger.view.finalize(spendable=2, final=2)
    assert await desk.states() == ["final"]


async def test_apply__charge_rejected__stays_a_debt_with_its_reason(desk):
    charge = await desk.charge(3 * USD)
    await desk.apply(block(2), rejected(charge, Rejection.POLICY_EXPIRED))
    wallet = await desk.wallet()
    assert (wallet.unsettled, wallet.available) == (3 * USD, 7 * USD)
    (call,) = await desk.ledger.read(lambda c: views.unsettled(c, CHAIN_ID, VAULT, ACCOUNT))
    assert (call.settlement.state, call.settlement.reason) == ("rejected", "policy_expired")


@pytest.mark.parametrize(
    "event",
    [
        deposited(ACCOUNT, 1),
        policy_set(ACCOUNT, LOOSE),
        chain_events.ExitCancelled(PLATFORM, ACCOUNT, 1, None),
    ],
    ids=lambda event: type(event).__name__,
)
async def test_apply__whatever_lets_a_rejected_charge_fit__queues_it_again(desk, event):
    charge = await desk.charge(3 * USD)
    await desk.apply(block(2), rejected(charge))
    await desk.apply(block(3), event, spendable=2)
    assert await desk.states() == ["queued"]
    assert (await desk.wallet()).unsettled == 3 * USD
    (call,) = await desk.ledger.read(lambda c: views.unsettled(c, CHAIN_ID, VAULT, ACCOUNT))
    assert (call.settlement.reason, call.settlement.transaction, call.settlement.block) == (None, None, None)


async def test_apply__charge_rejected_then_settled__counts_once(desk):
    charge = await desk.charge(3 * USD)
    await desk.apply(block(2), rejected(charge))
    await desk.apply(block(3), charged(charge))
    wallet = await desk.wallet()
    assert (wallet.balance, wallet.unsettled) == (7 * USD, 0)
    assert await desk.states() == ["settled"]


@pytest.mark.parametrize(
    "change", [{"amount": 1}, {"receipt_hash": word("other")}], ids=lambda change: next(iter(change))
)
async def test_apply__chain_charged_something_else__is_a_mismatch(desk, change):
    charge = await desk.charge(3 * USD)
    await desk.apply(block(2), charged(charge, **change))
    (mismatch,) = desk.ledger.view.mismatches
    assert str(charge.id) in mismatch
    assert (await desk.wallet()).unsettled == 0


async def test_apply__charge_that_this_ledger_never_made__lowers_the_balance_all_the_same(desk):
    foreign = chain_events.Charged(ACCOUNT, 5, USD, 2, word("r"))
    await desk.apply(block(2), foreign)
    assert (await desk.wallet()).balance == FUNDED - USD
    assert desk.ledger.view.mismatches == []


async def test_apply__charge_of_its_own_epoch_that_it_does_not_know__is_a_mismatch(desk):
    """A database put back from a copy has forgotten what it charged since."""
    charge = await desk.charge(USD)
    await desk.apply(block(2), charged(charge, id=charge.id + 7))
    (mismatch,) = desk.ledger.view.mismatches
    assert "older than the chain" in mismatch
    assert (await desk.wallet()).balance == FUNDED - USD


async def test_apply__id_of_another_epoch__is_another_charge(desk):
    charge = await desk.charge(USD)
    await desk.apply(block(2), charged(charge, id=charge.id ^ 2**40))
    assert await desk.states() == ["queued"]
    assert (await desk.wallet()).unsettled == USD


# ── Exits ────────────────────────────────────────────────────────────────────────────────────────────


async def test_apply__exit__counts_at_first_sight_and_its_return_once_final(desk):
    matures = BLOCK_TIME + EXIT_DELAY
    request = chain_events.ExitRequested(PLATFORM, ACCOUNT, 4 * USD, 4 * USD, matures, 2)
    await desk.apply(block(2), request, spendable=0)
    record = await desk.record()
    assert (record.wallet.available, record.exit_amount, record.exit_matures_at) == (
        6 * USD,
        4 * USD,
        matures,
    )
    await desk.apply(block(3), chain_events.ExitCancelled(PLATFORM, ACCOUNT, 4 * USD, 3), spendable=0)
    record = await desk.record()
    assert (record.wallet.balance, record.wallet.available, record.exit_amount) == (FUNDED, 6 * USD, 0)
    await desk.ledger.view.finalize(spendable=3, final=0)
    assert (await desk.wallet()).available == FUNDED


async def test_apply__charge_that_draws_on_an_exit__takes_both(desk):
    charge = await desk.charge(3 * USD)
    request = chain_events.ExitRequested(PLATFORM, ACCOUNT, 9 * USD, 9 * USD, 2**39, 2)
    await desk.apply(block(2), request, ExitDrawn(ACCOUNT, charge.id, 2 * USD), charged(charge, entry=3))
    record = await desk.record()
    assert (record.wallet.balance, record.exit_amount, record.wallet.unsettled) == (0, 7 * USD, 0)
    await desk.apply(block(3), chain_events.ExitFinalized(PLATFORM, ACCOUNT, VAULT, 7 * 10**6 - 1, 10**6, 4))
    record = await desk.record()
    assert (record.wallet.balance, record.exit_amount) == (10**6, 0)


# ── Policies ─────────────────────────────────────────────────────────────────────────────────────────


async def test_apply__tighter_policy__binds_at_first_sight(desk):
    await desk.apply(block(2), policy_set(ACCOUNT, TIGHT), spendable=0)
    with pytest.raises(LimitExceeded):
        await desk.hold(USD + 1)


async def test_apply__looser_policy__binds_as_before_until_it_is_final(desk):
    await desk.apply(block(2), policy_set(ACCOUNT, TIGHT))
    await desk.apply(block(3), policy_set(ACCOUNT, LOOSE), spendable=2)
    with pytest.raises(LimitExceeded):
        await desk.hold(USD + 1)
    await desk.ledger.view.finalize(spendable=3, final=0)
    assert (await desk.hold(2 * USD)).amount == 2 * USD


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Policy(max_per_charge=5), Policy()),
        (Policy(max_per_charge=5), Policy(max_per_charge=6)),
        (Policy(max_per_charge=5), Policy(max_per_charge=4, expires_at=2**39)),
        (Policy(expires_at=2**38), Policy(expires_at=2**39)),
        (Policy(max_per_window=5, window_seconds=60), Policy(max_per_window=6, window_seconds=60)),
        (Policy(max_per_window=5, window_seconds=60), Policy(max_per_window=4, window_seconds=120)),
        (Policy(max_per_window=5, window_seconds=60), Policy()),
        (Policy(), Policy(max_per_charge=5)),
    ],
)
async def test_apply__policy_change__the_old_one_goes_on_binding_if_anything_was_loosened(
    desk, before, after
):
    await desk.apply(block(2), policy_set(ACCOUNT, before))
    await desk.apply(block(3), policy_set(ACCOUNT, after), spendable=2)

    def allows(policy, other):
        """Whether `policy` allows something that `other` forbids, field by field."""
        pairs = [
            (getattr(policy, name), getattr(other, name))
            for name in ("max_per_charge", "max_per_window", "expires_at")
        ]
        wider = any(old is not None and (new is None or new > old) for new, old in pairs)
        return wider or (other.window_seconds is not None and policy.window_seconds != other.window_seconds)

    expected = {p for p in (after, before if allows(after, before) else after) if p != Policy()}
    assert set((await desk.wallet()).policies) == expected


async def test_apply__window__counts_as_the_vault_does(desk):
    minute = Policy(max_per_window=FUNDED, window_seconds=60)
    await desk.apply(block(2, BLOCK_TIME), policy_set(ACCOUNT, minute))
    charges = [await desk.charge(USD) for _ in range(3)]
    await desk.apply(block(3, BLOCK_TIME + 1), charged(charges[0]), charged(charges[1], entry=3))
    wallet = await desk.wallet()
    assert (wallet.spent, wallet.window) == (2 * USD, (BLOCK_TIME + 1) // 60)
    await desk.apply(block(4, BLOCK_TIME + 61), charged(charges[2], entry=4))
    wallet = await desk.wallet()
    assert (wallet.spent, wallet.window) == (USD, (BLOCK_TIME + 61) // 60)


async def test_apply__wanted_policy_arrived__is_wanted_no_more(desk):
    await desk.order(TIGHT)
    assert (await desk.record()).wanted == TIGHT
    await desk.apply(block(2), policy_set(ACCOUNT, LOOSE))
    assert (await desk.record()).wanted == TIGHT, "that was another one"
    await desk.apply(block(3), policy_set(ACCOUNT, TIGHT))
    assert (await desk.record()).wanted is None
    assert (await desk.record()).policy == TIGHT


async def test_apply__policy_of_an_account_not_opened_yet__is_kept_for_when_the_gateway_opens_it(desk):
    await desk.apply(block(2), policy_set(OTHER, TIGHT))
    assert await desk.open("bob") == OTHER
    record = await desk.record(OTHER)
    assert (record.policy, record.label, record.label_hash) == (TIGHT, "bob", LABELS[OTHER])


async def test_apply__policy_of_an_account_before_its_first_deposit__is_not_forgotten(desk):
    """A ledger rebuilt from the chain meets accounts that only the lost one had opened."""
    await desk.apply(block(2), policy_set(OTHER, TIGHT))
    await desk.apply(block(3), deposited(OTHER, FUNDED, label="bob"))
    record = await desk.record(OTHER)
    assert record.policy == TIGHT
    assert record.label_hash == LABELS[OTHER]
    with pytest.raises(LimitExceeded):
        await desk.hold(USD + 1, account=OTHER)


# ── Rewind ───────────────────────────────────────────────────────────────────────────────────────────


async def test_rewind__settled_charge__is_unsettled_again_and_settles_once(desk):
    charge = await desk.charge(3 * USD)
    slot = await batch(desk, [charge])
    await desk.apply(block(2), charged(charge))
    await desk.close(slot)
    await desk.ledger.view.rewind(block(1))
    wallet = await desk.wallet()
    assert (wallet.balance, wallet.unsettled, wallet.available) == (FUNDED, 3 * USD, 7 * USD)
    assert await desk.states() == ["batched"]
    again = await desk.ledger.read(lambda c: slots.first_open_slot(c, GAS.address))
    assert again.nonce == 0
    assert await desk.ledger.read(lambda c: slots.batched_charges(c.execute, again)) == [charge]
    await desk.apply(block(2, fork="b"), charged(charge))
    wallet = await desk.wallet()
    assert (wallet.balance, wallet.unsettled) == (7 * USD, 0)


async def test_row_15__deposit_read_again_from_another_block__is_credited_once(desk):
    """Peers credit the same top-up twice: lago-api#5870."""
    for fork in ("a", "b", "c"):
        await desk.apply(block(2, fork=fork), deposited(ACCOUNT, USD))
        assert (await desk.wallet()).balance == FUNDED + USD
        await desk.ledger.view.rewind(block(1))
        assert (await desk.wallet()).balance == FUNDED
    await desk.apply(block(2, fork="d"))
    await desk.apply(block(3, fork="d"), deposited(ACCOUNT, USD))
    assert (await desk.wallet()).balance == FUNDED + USD


async def test_rewind__deposit__is_gone_with_what_was_pending(desk):
    await desk.apply(block(2), deposited(ACCOUNT, USD), spendable=0)
    await desk.ledger.view.rewind(block(1))
    wallet = await desk.wallet()
    assert (wallet.balance, wallet.pending) == (FUNDED, 0)
    await desk.apply(block(2, fork="b"), deposited(ACCOUNT, 5), spendable=0)
    assert (await desk.wallet()).pending == 5


async def test_rewind__spent_deposit_reorged_away__nothing_more_is_authorised(desk):
    await desk.apply(block(2), deposited(ACCOUNT, USD))
    await desk.charge(FUNDED + USD)
    await desk.ledger.view.rewind(block(1))
    assert (await desk.wallet()).available == 0
    with pytest.raises(InsufficientFunds):
        await desk.hold(1)


@pytest.mark.parametrize("closed", [True, False], ids=["slot closed", "slot not closed yet"])
async def test_rewind__wanted_policy_that_had_arrived__binds_again(desk, closed):
    await desk.order(TIGHT)
    order, account, _ = await desk.ledger.read(lambda c: slots.due_policy(c, 100))
    assert account == ACCOUNT
    slot = Slot(GAS.address, 0, "policy", str(order), VAULT, b"", 1, 0)
    attempt = Attempt(Signed(b"p", word("p")), Fees(1, 1), "signed", 0)
    await desk.ledger.write(lambda tx: slots.open_slot(tx, slot, attempt))
    await desk.apply(block(2), policy_set(ACCOUNT, TIGHT))
    assert (await desk.record()).wanted is None
    if closed:
        await desk.close(slot)
    await desk.ledger.view.rewind(block(1))
    record = await desk.record()
    assert (record.policy, record.wanted) == (Policy(), TIGHT)
    with pytest.raises(LimitExceeded):
        await desk.hold(USD + 1)


async def test_rewind__policy_ordered_since__the_newest_is_the_wanted_one(desk):
    await desk.order(TIGHT)
    order, *_ = await desk.ledger.read(lambda c: slots.due_policy(c, 100))
    slot = Slot(GAS.address, 0, "policy", str(order), VAULT, b"", 1, 0)
    attempt = Attempt(Signed(b"p", word("p")), Fees(1, 1), "signed", 0)
    await desk.ledger.write(lambda tx: slots.open_slot(tx, slot, attempt))
    await desk.apply(block(2), policy_set(ACCOUNT, TIGHT))
    await desk.close(slot)
    lower = Policy(max_per_charge=5)
    await desk.order(lower)
    await desk.ledger.view.rewind(block(1))
    assert (await desk.record()).wanted == lower


async def test_caught_up__older_block_shows_what_is_wanted_anew__it_stays_wanted(desk):
    """A rebuild meets every policy that ever was, the wanted one among them."""
    await desk.apply(block(2), policy_set(ACCOUNT, TIGHT))
    await desk.apply(block(3), policy_set(ACCOUNT, LOOSE))
    await desk.order(TIGHT)
    await desk.ledger.view.rebuild()
    await desk.apply(block(1, BLOCK_TIME), deposited(ACCOUNT, FUNDED))
    await desk.apply(block(2), policy_set(ACCOUNT, TIGHT))
    await desk.apply(block(3), policy_set(ACCOUNT, LOOSE))
    await desk.ledger.view.caught_up()
    record = await desk.record()
    assert (record.policy, record.wanted) == (LOOSE, TIGHT)
    with pytest.raises(LimitExceeded):
        await desk.hold(USD + 1)


async def test_caught_up__nothing_waits__nothing_is_wanted(desk):
    await desk.apply(block(2), policy_set(ACCOUNT, TIGHT))
    await desk.ledger.view.caught_up()
    assert (await desk.record()).wanted is None


async def test_rewind__to_the_head__changes_nothing(desk):
    await desk.charge(3 * USD)
    tables = [table for table in schema.metadata.sorted_tables if table is not schema.meta]
    before = [await desk.table(table) for table in tables]
    await desk.ledger.view.rewind(block(1))
    assert [await desk.table(table) for table in tables] == before


async def test_finalize__blocks_and_undo_rows__are_kept_no_longer_than_they_can_be_needed(desk):
    for number in range(2, 6):
        await desk.apply(block(number), deposited(ACCOUNT, 1, entry=number))
    await desk.ledger.view.finalize(spendable=5, final=4)
    assert [row["number"] for row in await desk.table(schema.blocks)] == [4, 5]
    assert [row["block"] for row in await desk.table(schema.undo)] == [5]


# ── Any history ──────────────────────────────────────────────────────────────────────────────────────

AMOUNTS = st.integers(1, 30_000_000 * USD)
POLICIES = st.builds(Policy, max_per_charge=st.none() | AMOUNTS.map(lambda a: a % 2**80)) | st.builds(
    Policy, max_per_window=AMOUNTS, window_seconds=st.sampled_from([60, 3600])
)
ACTIONS = st.one_of(
    st.tuples(st.just("deposit"), AMOUNTS),
    st.tuples(st.just("policy"), POLICIES),
    st.tuples(st.just("request_exit"), st.fractions(0, 1)),
    st.tuples(st.just("cancel_exit"), st.none()),
    st.tuples(st.just("finalize_exit"), st.none()),
    st.tuples(st.just("settle"), st.sets(st.integers(0, 5))),
)
STEPS = st.tuples(st.sampled_from([ACCOUNT, OTHER]), ACTIONS)
BLOCKS = st.lists(
    st.tuples(st.lists(STEPS, max_size=3), st.sampled_from([1, 30, 4000]), st.integers(0, 3)),
    min_size=2,
    max_size=6,
)


def play(step, charges):
    """An action on the fake vault; what the vault would refuse does not happen."""
    account, (name, value) = step

    def action(state):
        wallet = state.accounts[account]
        match name:
            case "deposit":
                return state.deposit(value, label=LABELS[account])
            case "policy":
                return state.set_policy(account, value)
            case "request_exit":
                amount = int(wallet.balance * value)
                return state.request_exit(account, amount) if amount else []
            case "cancel_exit":
                return state.cancel_exit(account) if wallet.exit_amount else []
            case "finalize_exit":
                return state.finalize_exit(account) if wallet.exit_amount else []
            case "settle":
                return state.settle([c for n, c in enumerate(charges) if n in value])

    return action


async def project(desk, chain, number, spendable):
    made = chain.blocks[number]
    logs = [chain_events.decode(log) for log in made.logs]
    block = Block(made.number, made.hash, made.timestamp)
    await desk.ledger.view.apply([(block, logs)], spendable=spendable, final=0)


async def compare(desk, chain, number):
    """The projection is what the vault holds."""
    for account in (ACCOUNT, OTHER):
        record, truth = await desk.record(account), chain.blocks[number].state.accounts[account]
        assert record.wallet.balance == truth.balance
        assert record.exit_amount == truth.exit_amount
        assert not truth.exit_amount or record.exit_matures_at == truth.exit_matures_at
        assert record.policy == truth.policy
        if truth.policy.window_seconds is not None:
            assert (record.wallet.spent, record.wallet.window) == (truth.spent, truth.window)


async def snapshot(desk):
    """All that a rewind must bring back. Waiting charges may wait in another way: they are sent again."""
    tables = {}
    for table in (schema.wallets, schema.charges, schema.events, schema.undo, schema.raises, schema.blocks):
        tables[table.name] = [
            {name: json.loads(value) if name == "before" else value for name, value in row.items()}
            for row in await desk.table(table)
        ]
    for row in tables["charges"]:
        if row["state"] in {"queued", "batched", "rejected"}:
            row["state"] = "waiting"
        for name in ("reason", "block", "tx_hash", "settled_at"):
            if row["state"] == "waiting" or name == "settled_at":
                del row[name]
    return tables


@given(
    BLOCKS, st.lists(st.tuples(st.sampled_from([ACCOUNT, OTHER]), AMOUNTS), min_size=1, max_size=6), st.data()
)
@settings(max_examples=25)
def test_apply_and_rewind__any_history__exactly_the_earlier_state(history, amounts, data):
    async def scenario(folder):
        ledger = Ledger.open(
            f"sqlite:///{folder}/waterfall.db", chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM
        )
        try:
            desk, chain = Desk(ledger, METER), FakeChain()
            rich = 10**9 * USD
            chain.mine(*(lambda s, label=label: s.deposit(rich, label=label) for label in LABELS.values()))
            await project(desk, chain, 1, spendable=1)
            charges = [await desk.charge(amount, account=account) for account, amount in amounts]
            await batch(desk, charges)
            snapshots = {1: await snapshot(desk)}
            for steps, seconds, lag in history:
                number = chain.mine(*(play(step, charges) for step in steps), seconds=seconds).number
                await project(desk, chain, number, spendable=max(1, number - lag))
                await compare(desk, chain, number)
                snapshots[number] = await snapshot(desk)
            target = data.draw(st.integers(1, chain.head.number - 1))
            earlier = chain.blocks[target]
            await ledger.view.rewind(Block(earlier.number, earlier.hash, earlier.timestamp))
            restored = await snapshot(desk)
            await compare(desk, chain, target)
            # What counted meanwhile as final goes on counting: a rewind does not make it pending again.
            for table in ("wallets", "charges", "events", "undo", "blocks"):
                ignored = {"pending", "superseded"} if table == "wallets" else set()
                assert [{n: v for n, v in row.items() if n not in ignored} for row in restored[table]] == [
                    {n: v for n, v in row.items() if n not in ignored} for row in snapshots[target][table]
                ]
            raised = [row for row in snapshots[target]["raises"] if row in restored["raises"]]
            assert restored["raises"] == raised
            for row in restored["wallets"]:
                pending = sum(r["amount"] for r in restored["raises"] if r["account"] == row["account"])
                assert row["pending"] == pending
            for number in range(target + 1, chain.head.number + 1):
                await project(desk, chain, number, spendable=number)
                await compare(desk, chain, number)
            assert ledger.view.mismatches == []
            unsettled = {row["account"]: row["unsettled"] for row in await desk.table(schema.wallets)}
            for account in (ACCOUNT, OTHER):
                waiting = [c for c in charges if c.account == account and c.id not in chain.state.used]
                assert unsettled[account] == sum(c.amount for c in waiting)
        finally:
            ledger.close()

    with TemporaryDirectory() as folder:
        asyncio.run(scenario(folder))
