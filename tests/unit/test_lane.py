import asyncio
import contextlib
from tempfile import TemporaryDirectory

import pytest
from fake_chain import SILENCE, After, FakeChain
from hypothesis import given, settings
from hypothesis import strategies as st
from making import ACCOUNT, CHAIN_ID, GAS, OTHER, OWNER, PLATFORM, USD, VAULT, word
from relaying import ADA, BOB, CAP, Clock, Relay

from waterfall.chain.rpc import RpcError
from waterfall.chain.transactions import Fees
from waterfall.errors import ChainError, LaneHalted, PaymentRequired
from waterfall.ledger import schema
from waterfall.ledger.store import Ledger
from waterfall.types import Policy


@pytest.fixture
def clock(monkeypatch):
    return Clock().install(monkeypatch)


@pytest.fixture
async def relay(ledger, clock):
    relay = Relay(ledger, clock)
    await relay.fund()
    return relay


# ── Send ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_step__nothing_to_send__asks_the_chain_nothing(relay):
    relay.chain.asked.clear()
    assert await relay.lane.step() is False
    assert relay.chain.asked == []


async def test_step__charges_wait__sends_them_in_one_transaction(relay):
    charges = [await relay.desk.charge(n) for n in (1, 2, 3)]
    assert await relay.lane.step() is True
    (transaction,) = relay.pending()
    assert (transaction.nonce, transaction.target) == (0, VAULT)
    assert await relay.desk.states() == ["batched"] * 3
    await relay.settle()
    assert await relay.desk.states() == ["settled"] * 3
    assert relay.chain.state.used == {charge.id for charge in charges}
    assert relay.balance() == 10 * USD - 6
    assert (await relay.desk.wallet()).unsettled == 0


async def test_step__attempt__is_journaled_before_it_is_broadcast(relay):
    await relay.desk.charge(1)
    journaled = []
    answer = relay.chain.call

    async def call(method, *parameters):
        if method == "eth_sendRawTransaction":
            (attempt,) = (await relay.in_flight()).attempts
            journaled.append("0x" + attempt.signed.raw.hex() == parameters[0])
        return await answer(method, *parameters)

    relay.chain.call = call
    await relay.lane.step()
    assert journaled == [True]


async def test_step__slot_in_flight__what_comes_later_waits(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    await relay.desk.charge(2)
    await relay.lane.step()
    assert len(relay.pending()) == 1
    assert await relay.desk.states() == ["batched", "queued"]
    await relay.settle()
    assert await relay.desk.states() == ["settled", "settled"]
    assert relay.chain.state.nonces[GAS.address] == 2


# ── Confirm ──────────────────────────────────────────────────────────────────────────────────────────


async def test_step__mined_but_not_projected__waits_for_the_projection(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    relay.chain.mine()
    assert await relay.lane.step() is False
    assert (await relay.in_flight()).nonce == 0
    await relay.index()
    assert await relay.lane.step() is True
    assert await relay.in_flight() is None


async def test_step__receipt_of_a_block_that_the_projection_does_not_have__waits_for_it(relay):
    """Two nodes behind one address differ while the chain is reorganised."""
    await relay.desk.charge(1)
    await relay.lane.step()
    await relay.mine()
    (waiting, _), *_ = relay.chain.head.transactions
    receipt = await relay.chain.call("eth_getTransactionReceipt", waiting.hash)
    relay.chain.script("eth_getTransactionReceipt", {**receipt, "blockHash": word("another fork")})
    assert await relay.lane.step() is False
    assert await relay.in_flight() is not None
    assert await relay.lane.step() is True
    assert await relay.in_flight() is None


async def test_step__one_charge_rejected__the_rest_settle_and_it_stays_a_debt(relay):
    await relay.fund(1, label=BOB)
    first = await relay.desk.charge(USD, account=OTHER)
    second = await relay.desk.charge(2)
    relay.chain.mine(lambda state: state.set_policy(OTHER, Policy(max_per_charge=1)))
    await relay.lane.step()
    relay.chain.mine()
    await relay.index()
    await relay.lane.step()
    assert await relay.desk.states() == ["rejected", "settled"]
    assert (await relay.desk.wallet(OTHER)).unsettled == USD
    assert relay.chain.state.used == {second.id}
    relay.chain.mine(lambda state: state.set_policy(OTHER, Policy()))
    await relay.settle()
    assert relay.chain.state.used == {first.id, second.id}
    assert (await relay.desk.wallet(OTHER)).unsettled == 0


async def test_step__reverted__everything_goes_back_and_is_sent_again(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    relay.clock.seconds += 3
    relay.chain.mine(seconds=3600)  # its deadline has passed by then
    await relay.index()
    await relay.lane.step()
    assert await relay.desk.states() == ["queued"]
    (row,) = await relay.desk.table(schema.slots)
    assert row["state"] == "reverted"
    await relay.settle()
    assert await relay.desk.states() == ["settled"]


# ── Answers that never come ──────────────────────────────────────────────────────────────────────────


async def test_step__broadcast_lost_on_its_way_back__is_no_failure(relay):
    await relay.desk.charge(1)
    relay.chain.script("eth_sendRawTransaction", After(SILENCE))
    await relay.lane.step()
    (attempt,) = (await relay.in_flight()).attempts
    assert attempt.state == "unknown"
    relay.clock.seconds += 6
    await relay.lane.step()
    (attempt,) = (await relay.in_flight()).attempts
    assert attempt.state == "accepted", "already known"
    assert len(set(relay.sent())) == 1
    await relay.settle()
    assert relay.balance() == 10 * USD - 1


@pytest.mark.parametrize(
    "answer", [SILENCE, RpcError(method="eth_sendRawTransaction", reason="txpool is full", data=None)]
)
async def test_step__broadcast_never_arrived__same_bytes_are_sent_again(relay, answer):
    await relay.desk.charge(1)
    relay.chain.script("eth_sendRawTransaction", answer)
    await relay.lane.step()
    assert relay.pending() == []
    relay.clock.seconds += 4
    await relay.lane.step()
    assert len(relay.sent()) == 1, "not yet"
    relay.clock.seconds += 2
    await relay.lane.step()
    assert len(relay.sent()) == 2
    assert len(set(relay.sent())) == 1
    await relay.settle()
    assert relay.balance() == 10 * USD - 1


async def test_step__dropped_from_the_mempool__same_bytes_are_sent_again(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    relay.chain.pending.clear()
    relay.clock.seconds += 6
    await relay.lane.step()
    assert len(relay.pending()) == 1
    assert len(set(relay.sent())) == 1


async def test_step__process_dies_before_the_broadcast__the_journal_is_sent(relay):
    await relay.desk.charge(1)
    relay.chain.script("eth_sendRawTransaction", RuntimeError("killed"))
    with pytest.raises(RuntimeError):
        await relay.lane.step()
    relay.start()
    await relay.settle()
    assert await relay.desk.states() == ["settled"]
    assert len(set(relay.sent())) == 1
    assert relay.balance() == 10 * USD - 1


async def test_step__process_dies_after_the_broadcast__one_debit(relay):
    await relay.desk.charge(1)
    relay.chain.script("eth_sendRawTransaction", After(RuntimeError("killed")))
    with pytest.raises(RuntimeError):
        await relay.lane.step()
    relay.chain.mine()
    relay.start()
    await relay.settle()
    assert relay.chain.state.nonces[GAS.address] == 1
    assert relay.balance() == 10 * USD - 1


@pytest.mark.parametrize(
    "method", ["eth_getTransactionCount", "eth_getBlockByNumber", "eth_maxPriorityFeePerGas"]
)
async def test_step__node_does_not_answer_before_sending__nothing_is_lost(relay, method):
    await relay.desk.charge(1)
    relay.chain.script(method, SILENCE)
    with pytest.raises(ChainError):
        await relay.lane.step()
    assert await relay.desk.states() == ["queued"]
    await relay.settle()
    assert await relay.desk.states() == ["settled"]


# ── Replacing ────────────────────────────────────────────────────────────────────────────────────────


async def replaced(relay, seconds=31):
    """Let time pass until the lane has looked again; the attempts, newest first."""
    relay.clock.seconds += seconds
    await relay.lane.step()
    return (await relay.in_flight()).attempts


async def test_step__not_mined_for_long__replaced_at_the_same_nonce_with_higher_fees(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    relay.chain.base_fee = 10**12  # nothing is mined at these fees
    new, old = await replaced(relay)
    assert 10 * new.fees.max_fee >= 11 * old.fees.max_fee
    assert 10 * new.fees.priority_fee >= 11 * old.fees.priority_fee
    (transaction,) = relay.pending()
    assert (transaction.nonce, transaction.hash) == (0, new.signed.tx_hash)


async def test_step__replaced_just_now__is_not_replaced_again(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    assert len(await replaced(relay)) == 2
    assert len(await replaced(relay, 29)) == 2
    assert len(await replaced(relay, 2)) == 3


async def test_step__an_older_attempt_is_mined__closes_the_slot(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    (old,) = relay.pending()
    await replaced(relay)
    relay.chain.pending = {(GAS.address, 0): old}
    await relay.mine()
    await relay.lane.step()
    (row,) = await relay.desk.table(schema.slots)
    assert (row["state"], row["tx_hash"]) == ("mined", old.hash)
    assert relay.balance() == 10 * USD - 1


async def test_step__fees_at_the_cap__goes_on_with_the_last_attempt(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    relay.chain.base_fee = 10**12
    for _ in range(60):
        attempts = await replaced(relay)
    assert all(attempt.fees.max_fee <= CAP for attempt in attempts)
    assert attempts[0].fees.max_fee > CAP * 8 // 9 - 1
    before = len(relay.sent())
    again = await replaced(relay)
    assert len(again) == len(attempts)
    assert len(relay.sent()) == before + 1
    relay.chain.base_fee = 1
    await relay.settle()
    assert await relay.desk.states() == ["settled"]


async def test_step__fees_in_the_first_attempt__follow_the_block_within_the_cap(relay):
    relay.chain.base_fee = 10**12
    await relay.desk.charge(1)
    await relay.lane.step()
    (attempt,) = (await relay.in_flight()).attempts
    assert attempt.fees == Fees(CAP, relay.chain.tip)


async def test_step__deadline_near__replaced_once_with_a_later_one(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    deadline = (await relay.in_flight()).deadline
    await relay.mine(seconds=30 * 60 - 60, transactions=False)
    assert len(await replaced(relay, 1)) == 2
    for _ in range(20):
        attempts = await replaced(relay, 1)
    assert len(attempts) == 2, "its own deadline is far away"
    slot = await relay.in_flight()
    assert slot.deadline > deadline + 1500
    assert slot.nonce == 0
    await relay.settle()
    assert await relay.desk.states() == ["settled"]


async def test_step__replaced_after_a_restart__is_still_replaced_once(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    await relay.mine(seconds=30 * 60 - 60, transactions=False)
    relay.start()
    assert len(await replaced(relay, 1)) == 2
    relay.start()
    assert len(await replaced(relay, 1)) == 2


# ── Nonces ───────────────────────────────────────────────────────────────────────────────────────────


async def test_step__somebody_else_used_the_key__halts_before_sending(relay):
    await relay.mine(relay.chain.foreign_transaction(GAS.address))
    await relay.desk.charge(1)
    await relay.lane.step()
    await relay.settle()
    await relay.mine(relay.chain.foreign_transaction(GAS.address))
    await relay.desk.charge(2)
    with pytest.raises(LaneHalted, match="not in the journal"):
        await relay.lane.step()
    assert await relay.desk.states() == ["settled", "queued"]


async def test_step__somebody_else_took_the_slots_nonce__halts_once_it_is_sure(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    relay.chain.pending.clear()
    await relay.mine(relay.chain.foreign_transaction(GAS.address))
    for _ in range(119):
        assert await relay.lane.step() is False, "the node may only lag"
    with pytest.raises(LaneHalted, match=r"nonce 0 .* was used"):
        await relay.lane.step()
    assert await relay.desk.states() == ["batched"]


async def test_step__receipt_comes_late__is_waited_for(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    relay.chain.mine()
    await relay.index()
    receipt = await relay.chain.call("eth_getTransactionReceipt", relay.chain.head.transactions[0][0].hash)
    blocks, relay.chain.blocks[-1].transactions = relay.chain.head.transactions, []
    for _ in range(10):
        assert await relay.lane.step() is False
    relay.chain.blocks[-1].transactions = blocks
    assert receipt is not None
    assert await relay.lane.step() is True
    assert await relay.in_flight() is None


async def test_step__first_nonce_of_a_used_key__is_the_chains(relay):
    await relay.mine(*[relay.chain.foreign_transaction(GAS.address)] * 7)
    await relay.desk.charge(1)
    await relay.lane.step()
    assert (await relay.in_flight()).nonce == 7
    await relay.settle()


# ── What the chain should never show ─────────────────────────────────────────────────────────────────


async def test_step__charges_skipped_as_settled_by_nobody_known__halts(relay):
    charge = await relay.desk.charge(1)
    relay.chain.state.used.add(charge.id)
    await relay.lane.step()
    relay.chain.mine()
    await relay.index()
    await relay.lane.step()
    with pytest.raises(LaneHalted, match="skipped as settled before"):
        await relay.lane.step()
    assert await relay.desk.states() == ["queued"]
    relay.start()
    with pytest.raises(LaneHalted, match="skipped as settled before"):
        await relay.lane.step()


# ── Reorgs ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kept", [True, False], ids=["back in the mempool", "vanished"])
@pytest.mark.parametrize("closed", [True, False], ids=["slot closed", "slot not closed yet"])
async def test_step__settled_then_reorged_away__settles_once(relay, kept, closed):
    await relay.desk.charge(5)
    await relay.lane.step()
    relay.chain.mine()
    await relay.index()
    if closed:
        await relay.lane.step()
    assert await relay.desk.states() == ["settled"]
    relay.chain.reorg(1, transactions=kept)
    relay.chain.mine(transactions=False)
    await relay.index()
    assert await relay.desk.states() == ["batched"]
    assert (await relay.desk.wallet()).unsettled == 5
    relay.clock.seconds += 6
    await relay.settle()
    assert await relay.desk.states() == ["settled"]
    assert relay.balance() == 10 * USD - 5
    assert relay.chain.state.nonces[GAS.address] == 1
    assert len(set(relay.sent())) == 1


async def test_step__chain_went_back_and_the_projection_not_yet__waits(relay):
    await relay.desk.charge(5)
    await relay.settle()
    await relay.desk.charge(6)
    relay.chain.reorg(2)
    relay.chain.skip(1)
    assert await relay.lane.step() is False
    assert len(set(relay.sent())) == 1
    await relay.settle()
    assert await relay.desk.states() == ["settled", "settled"]
    assert relay.balance() == 10 * USD - 11


async def test_step__two_slots_reorged_away__go_again_in_their_order(relay):
    for amount in (5, 6):
        await relay.desk.charge(amount)
        await relay.settle()
    depth = relay.chain.head.number - 1
    relay.chain.reorg(depth, transactions=False)
    relay.chain.skip(depth + 1)
    await relay.index()
    assert (await relay.in_flight()).nonce == 0
    await relay.settle(40)
    assert relay.balance() == 10 * USD - 11
    assert relay.chain.state.nonces[GAS.address] == 2
    assert await relay.desk.states() == ["settled", "settled"]


# ── Policies ─────────────────────────────────────────────────────────────────────────────────────────


async def test_policy_lane__asked_for__arrives_after_the_calls_before_it(relay):
    held = await relay.desk.hold(5)
    policy = Policy(max_per_charge=3)
    await relay.desk.order(policy)
    assert await relay.policy_lane.step() is False
    await relay.desk.capture(held, 5)
    assert await relay.policy_lane.step() is False
    await relay.settle()
    assert await relay.policy_lane.step() is True
    await relay.mine()
    await relay.policy_lane.step()
    record = await relay.desk.record()
    assert (record.policy, record.wanted) == (policy, None)
    assert relay.chain.state.accounts[ACCOUNT].policy == policy
    assert await relay.policy_lane.step() is False
    assert await relay.desk.states() == ["settled"]


async def test_policy_lane__refused_by_the_vault__halts(relay):
    await relay.desk.order(Policy(max_per_charge=3))
    await relay.policy_lane.step()
    (transaction,) = relay.pending(OWNER)
    relay.chain.pending = {
        (OWNER.address, 0): type(transaction)(**{**vars(transaction), "calldata": b"????"})
    }
    await relay.mine()
    with pytest.raises(LaneHalted, match="may not set policies"):
        await relay.policy_lane.step()


# ── Whatever happens ─────────────────────────────────────────────────────────────────────────────────

METHODS = [
    "eth_sendRawTransaction",
    "eth_getTransactionReceipt",
    "eth_getTransactionCount",
    "eth_getBlockByNumber",
    "eth_getLogs",
    "eth_maxPriorityFeePerGas",
]
EVENTS = st.one_of(
    st.tuples(st.just("charge"), st.integers(1, USD)),
    st.tuples(st.just("charge"), st.integers(1, 5 * USD)),
    st.tuples(st.just("lane"), st.none()),
    st.tuples(st.just("lane"), st.none()),
    st.tuples(st.just("index"), st.none()),
    st.tuples(st.just("mine"), st.sampled_from([1, 12, 1700])),
    st.tuples(st.just("empty"), st.sampled_from([1, 12, 1700])),
    st.tuples(st.just("reorg"), st.integers(1, 6)),
    st.tuples(st.just("vanish"), st.integers(1, 6)),
    st.tuples(st.just("drop"), st.none()),
    st.tuples(st.just("silence"), st.sampled_from(METHODS)),
    st.tuples(st.just("lost_answer"), st.sampled_from(METHODS)),
    st.tuples(st.just("time"), st.integers(1, 40)),
    st.tuples(st.just("fees"), st.sampled_from([1, 10**9, 10**12])),
    st.tuples(st.just("policy"), st.none() | st.integers(1, 3 * USD)),
    st.tuples(st.just("deposit"), st.integers(1, 10)),
    st.tuples(st.just("exit"), st.floats(0, 1)),
    st.tuples(st.just("restart"), st.none()),
)


class Story:
    """A relay and everything that may happen to it."""

    def __init__(self, url, clock):
        self._url, self._clock = url, clock
        self._oldest = 1  # the block that no reorg reaches
        self.ledger = self._open()
        self.relay = Relay(self.ledger, clock, FakeChain(final_depth=20))
        self.captured = []

    def _open(self):
        return Ledger.open(self._url, chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM)

    async def tolerate(self, work):
        with contextlib.suppress(ChainError):
            await work

    async def charge(self, amount):
        with contextlib.suppress(PaymentRequired):
            self.captured.append(await self.relay.desk.charge(amount))

    async def lane(self, _):
        await self.tolerate(self.relay.lane.step())

    async def index(self, _):
        await self.tolerate(self.relay.indexer.step())

    async def mine(self, seconds):
        self.relay.chain.mine(seconds=seconds)
        self._oldest = max(self._oldest, self.relay.chain.head.number - 20)

    async def empty(self, seconds):
        self.relay.chain.mine(seconds=seconds, transactions=False)
        self._oldest = max(self._oldest, self.relay.chain.head.number - 20)

    async def reorg(self, depth, *, transactions=True):
        depth = min(depth, self.relay.chain.head.number - self._oldest)
        if depth > 0:
            self.relay.chain.reorg(depth, transactions=transactions)
            self.relay.chain.skip(depth)

    async def vanish(self, depth):
        await self.reorg(depth, transactions=False)

    async def drop(self, _):
        self.relay.chain.pending.clear()

    async def silence(self, method):
        self.relay.chain.script(method, SILENCE)

    async def lost_answer(self, method):
        self.relay.chain.script(method, After(SILENCE))

    async def time(self, seconds):
        self._clock.seconds += seconds

    async def fees(self, base_fee):
        self.relay.chain.base_fee = base_fee

    async def policy(self, most):
        self.relay.chain.mine(lambda state: state.set_policy(ACCOUNT, Policy(max_per_charge=most)))

    async def deposit(self, dollars):
        self.relay.chain.mine(lambda state: state.deposit(dollars * USD, label=ADA))

    async def exit(self, part):
        def request(state):
            amount = int(state.accounts[ACCOUNT].balance * part)
            return state.request_exit(ACCOUNT, amount) if amount else []

        self.relay.chain.mine(request)

    async def restart(self, _):
        self.ledger.close()
        self.ledger = self._open()
        self.relay.ledger = self.relay.desk.ledger = self.ledger
        self.relay.start()

    async def end(self):
        """The storm passes: the node answers, fees are low, the account has money and no limit."""
        chain = self.relay.chain
        for method in METHODS:
            chain.script(method, None)
        chain.base_fee = 1
        chain.mine(
            lambda state: state.deposit(10**4 * USD, label=ADA),
            lambda state: state.set_policy(ACCOUNT, Policy()),
        )
        for _ in range(40):
            self._clock.seconds += 31
            await self.relay.index()
            await self.relay.lane.step()
            chain.mine()
        await self.relay.index()


@given(st.lists(EVENTS, max_size=40))
@settings(max_examples=15)
def test_relay__any_storm__every_charge_is_settled_exactly_once(history):
    async def scenario(folder, clock):
        story = Story(f"sqlite:///{folder}/waterfall.db", clock)
        try:
            await story.relay.fund()
            for name, value in history:
                await getattr(story, name)(value)
            await story.end()
            chain, desk = story.relay.chain, story.relay.desk
            assert await desk.states() == [
                state for state in await desk.states() if state in {"settled", "final"}
            ]
            assert chain.state.used == {charge.id for charge in story.captured}
            assert chain.state.earned == sum(charge.amount for charge in story.captured)
            record, state = await desk.record(), chain.state.accounts[ACCOUNT]
            assert record.wallet.balance == state.balance
            assert record.exit_amount == state.exit_amount
            assert (record.wallet.unsettled, record.wallet.held) == (0, 0)
            assert story.ledger.mismatches == []
            assert await story.relay.in_flight() is None
        finally:
            story.ledger.close()

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(scenario(folder, Clock().install(monkeypatch)))
