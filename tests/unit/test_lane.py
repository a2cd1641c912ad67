import asyncio
import contextlib
from dataclasses import replace
from tempfile import TemporaryDirectory

import pytest
from fake_chain import GAS_PRICE_ORACLE, SILENCE, TIP, After, FakeChain
from hypothesis import given, settings
from hypothesis import strategies as st
from making import ACCOUNT, CHAIN_ID, GAS, GAS_TOO, OTHER, OWNER, PLATFORM, USD, VAULT, word
from relaying import ADA, BOB, CAP, GWEI, Clock, Relay

from waterfall.chain import vault
from waterfall.chain.rpc import RpcError
from waterfall.chain.transactions import Fees
from waterfall.errors import ChainError, EventsMissing, LaneHalted, PaymentRequired
from waterfall.ledger import schema
from waterfall.ledger.store import Ledger
from waterfall.settlement import gas, indexer, lane
from waterfall.types import Charge, Policy


@pytest.fixture
def clock(monkeypatch):
    return Clock().install(monkeypatch)


@pytest.fixture
async def relay(ledger, clock):
    relay = Relay(ledger, clock)
    await relay.fund()
    return relay


@pytest.fixture
def alerts(monkeypatch):
    """What was logged as an error by a lane."""
    raised = []
    monkeypatch.setattr(
        lane.log, "error", lambda event, **facts: raised.append((event, facts)), raising=False
    )
    return raised


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


@pytest.mark.parametrize("answer", ["nothing", {"number": 7}])
@pytest.mark.parametrize(
    "method",
    ["eth_getBlockByNumber", "eth_getTransactionCount", "eth_getBalance", "eth_getTransactionReceipt"],
)
async def test_step__node_answers_what_it_should_not__is_a_chain_error_and_tried_again(relay, method, answer):
    """What is wrong with one node's answer is no reason to stop: the next may be right."""
    await relay.desk.charge(1)
    if method == "eth_getTransactionReceipt":
        await relay.lane.step()
    relay.chain.script(method, answer)
    with pytest.raises(ChainError):
        await relay.lane.step()
    await relay.settle()
    assert relay.balance() == 10 * USD - 1


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
    """Let time pass, and a block without our transaction, until the lane has looked again; the attempts, newest first."""
    relay.clock.seconds += seconds
    relay.chain.skip()
    await relay.index()
    await relay.lane.step()
    return (await relay.in_flight()).attempts


async def test_step__not_mined_for_long__replaced_at_the_same_nonce_with_higher_fees(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    relay.chain.base_fee = 10 * GWEI  # nothing is mined at the fees before
    new, old = await replaced(relay)
    assert 10 * new.fees.max_fee >= 11 * old.fees.max_fee
    assert 10 * new.fees.priority_fee >= 11 * old.fees.priority_fee
    (transaction,) = relay.pending()
    assert (transaction.nonce, transaction.hash) == (0, new.signed.tx_hash)


async def test_step__no_block_comes__pays_no_more_for_it(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    for _ in range(60):
        relay.clock.seconds += 30
        await relay.lane.step()
    assert len((await relay.in_flight()).attempts) == 1
    assert len(await replaced(relay)) == 2


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


async def test_step__fees_at_the_cap__goes_on_with_the_last_attempt_and_says_so(relay, alerts):
    await relay.desk.charge(1)
    await relay.lane.step()
    relay.chain.base_fee = 60 * GWEI
    for _ in range(10):
        attempts = await replaced(relay)
    assert all(attempt.fees.max_fee <= CAP for attempt in attempts)
    assert attempts[0].fees.max_fee > CAP * 8 // 9 - 1
    before = len(relay.sent())
    alerts.clear()
    for _ in range(50):
        again = await replaced(relay, 6)
        assert relay.lane.state == "waiting"
        assert "at the fee cap" in relay.lane.reason
    assert len(again) == len(attempts)
    assert len(relay.sent()) == before + 50, "the same bytes go on being sent"
    assert len(set(relay.sent()[before:])) == 1
    assert 1 <= len(alerts) <= 6, "once a minute, not with every look"
    relay.chain.base_fee = 1
    await relay.settle()
    assert await relay.desk.states() == ["settled"]


async def test_step__fees_in_the_first_attempt__follow_the_block_within_the_cap(relay):
    relay.chain.base_fee = 60 * GWEI
    await relay.desk.charge(1)
    await relay.lane.step()
    (attempt,) = (await relay.in_flight()).attempts
    assert attempt.fees == Fees(CAP, relay.chain.tip)


async def test_step__base_fee_above_the_cap__waits_and_goes_on_by_itself(relay):
    relay.chain.base_fee = CAP + 1
    await relay.desk.charge(1)
    assert await relay.lane.step() is False
    assert (await relay.in_flight(), relay.lane.state) == (None, "waiting")
    assert await relay.desk.states() == ["queued"]
    relay.chain.base_fee = GWEI
    assert await relay.lane.step() is True
    await relay.settle()


async def test_step__base_fee_rises_above_the_cap__no_replacement_that_could_not_be_mined(relay):
    await relay.desk.charge(1)
    await relay.lane.step()
    relay.chain.base_fee = CAP + 1
    for _ in range(5):
        assert len(await replaced(relay)) == 1
    assert relay.lane.state == "waiting"
    relay.chain.base_fee = 10 * GWEI
    assert len(await replaced(relay)) == 2


@pytest.mark.parametrize("hours", [1, -1])
async def test_step__hosts_clock_jumps__nothing_is_replaced_or_delayed_for_it(relay, hours):
    await relay.desk.charge(1)
    await relay.lane.step()
    for _ in range(20):
        relay.clock.host_ahead += hours * 3600
        assert len(await replaced(relay, 1)) == 1
    assert len(relay.sent()) == 4, "every five seconds"
    assert len(await replaced(relay, 11)) == 2
    relay.clock.host_ahead -= hours * 7200
    assert len(await replaced(relay, 29)) == 2
    assert len(await replaced(relay, 2)) == 3


# ── Refused ──────────────────────────────────────────────────────────────────────────────────────────


def no(reason):
    return RpcError(method="eth_sendRawTransaction", reason=reason, data=None)


@pytest.mark.parametrize(
    "reason",
    [
        "replacement transaction underpriced",
        "transaction underpriced: gas tip cap 1, minimum needed 1000000",
        "max fee per gas less than block base fee: address 0x…, maxFeePerGas: 1, baseFee: 2",
    ],
)
async def test_step__refused_as_too_cheap__the_next_attempt_pays_more_and_none_is_signed_twice(relay, reason):
    await relay.desk.charge(1)
    relay.chain.script("eth_sendRawTransaction", no(reason))
    await relay.lane.step()
    assert relay.pending() == []
    assert len(await replaced(relay, 0.1)) == 1, "not in a hot loop"
    new, old = await replaced(relay, 1)
    assert 10 * new.fees.max_fee >= 11 * old.fees.max_fee
    assert 10 * new.fees.priority_fee >= 11 * old.fees.priority_fee
    assert [t.hash for t in relay.pending()] == [new.signed.tx_hash]
    assert len(await replaced(relay, 2)) == 2, "accepted"
    assert len(set(relay.sent())) == len(relay.sent()) == 2
    await relay.settle()


@pytest.mark.parametrize(
    "reason", ["exceeds block gas limit", "transaction gas limit too high (cap: 16777216, tx: 24150000)"]
)
async def test_step__refused_for_its_size__half_of_it_goes_under_the_same_nonce_and_the_rest_later(
    relay, reason
):
    """Sent again as it was it would hold the lane's only nonce for ever."""
    for amount in (1, 2, 3, 4, 5):
        await relay.desk.charge(amount)
    relay.chain.script("eth_sendRawTransaction", no(reason), no(reason))
    await relay.lane.step()
    assert len(await replaced(relay, 0.1)) == 1, "not in a hot loop"
    assert len(await replaced(relay, 1)) == 2
    assert await relay.desk.states() == ["batched", "batched", "queued", "queued", "queued"]
    assert len(await replaced(relay, 1)) == 3, "still too large"
    assert await relay.desk.states() == ["batched", "queued", "queued", "queued", "queued"]
    assert (await relay.in_flight()).nonce == 0
    await relay.settle()
    assert await relay.desk.states() == ["settled"] * 5
    assert relay.balance() == 10 * USD - 15


async def test_step__refused_for_its_size_and_mined_all_the_same__nothing_is_settled_twice(relay):
    for amount in (1, 2):
        await relay.desk.charge(amount)
    await relay.lane.step()
    (large,) = relay.pending()
    relay.chain.pending.clear()
    relay.chain.script("eth_sendRawTransaction", no("exceeds block gas limit"))
    await replaced(relay, 6)
    assert len(await replaced(relay, 2)) == 2
    assert await relay.desk.states() == ["batched", "queued"]
    relay.chain.pending.clear()
    relay.chain.pending[GAS.address, 0] = large
    await relay.settle()
    assert await relay.desk.states() == ["settled"] * 2
    assert relay.balance() == 10 * USD - 3
    assert relay.desk.ledger.view.mismatches == []


async def test_step__single_charge_refused_for_its_size__same_bytes_until_a_node_takes_it(relay):
    await relay.desk.charge(1)
    relay.chain.script("eth_sendRawTransaction", *[no("exceeds block gas limit")] * 10)
    await relay.lane.step()
    for _ in range(9):
        assert len(await replaced(relay, 6)) == 1, "dearer it would be as large"
        assert relay.lane.state == "waiting"
        assert "gas" in relay.lane.reason
    assert len(set(relay.sent())) == 1
    await replaced(relay, 6)
    await relay.settle()
    assert await relay.desk.states() == ["settled"]


async def test_step__something_unknown_is_pending_at_its_nonce__is_outbid(relay):
    """What an older ledger sent under this key, for example."""
    await relay.desk.charge(1)
    await relay.lane.step()
    (mine,) = relay.pending()
    relay.chain.pending[GAS.address, 0] = replace(
        mine, hash="0x01", max_fee=3 * mine.max_fee, priority_fee=3 * mine.priority_fee
    )
    for _ in range(20):
        await replaced(relay, 6)
    (pending,) = relay.pending()
    assert pending.hash in {attempt.signed.tx_hash for attempt in (await relay.in_flight()).attempts}
    await relay.settle()
    assert relay.balance() == 10 * USD - 1


async def test_step__refused_for_want_of_funds__same_bytes_until_the_key_is_refilled(relay):
    await relay.desk.charge(1)
    relay.chain.script("eth_sendRawTransaction", *[no("insufficient funds for gas * price + value")] * 20)
    await relay.lane.step()
    for _ in range(19):
        assert len(await replaced(relay, 6)) == 1, "a dearer one could be paid for even less"
        assert relay.lane.state == "low_on_gas"
    await replaced(relay, 6)
    assert relay.lane.state == "ok"
    assert len(set(relay.sent())) == 1
    await relay.settle()
    assert await relay.desk.states() == ["settled"]


async def test_step__refused_as_nonce_too_low__nothing_is_assigned_again_and_the_receipts_decide(relay):
    charge = await relay.desk.charge(1)
    relay.chain.script("eth_sendRawTransaction", After(no("nonce too low")))
    await relay.lane.step()
    relay.chain.mine()
    relay.clock.seconds += 6
    await relay.lane.step()
    assert (await relay.in_flight()).nonce == 0
    await relay.index()
    await relay.lane.step()
    assert relay.chain.state.used == {charge.id}
    (row,) = await relay.desk.table(schema.slots)
    assert (row["nonce"], row["state"]) == (0, "mined")


# ── Gas money ────────────────────────────────────────────────────────────────────────────────────────


async def test_step__chain_takes_a_fee_for_data__counts_too(relay):
    relay.worst_gas = 10**6
    relay.start()
    relay.chain.l1_fee = 10**15
    needed = 3 * (10**6 * (2 * relay.chain.base_fee + relay.chain.tip) + 2 * 10**15)
    relay.chain.wei[GAS.address] = needed - 1
    await relay.desk.charge(1)
    assert await relay.lane.step() is False
    relay.chain.wei[GAS.address] = needed
    assert await relay.lane.step() is True


async def test_step__chain_takes_a_fee_for_data__prices_a_full_batch_whatever_goes_now(relay):
    relay.worst_gas = vault.settle_gas(500)
    relay.start()
    relay.chain.l1_fee_per_byte = 10**12
    full = [Charge(account=word(f"a {n}"), id=n, amount=n, receipt_hash=word(f"r {n}")) for n in range(500)]
    data = relay.chain.l1_fee_for(vault.settle(PLATFORM, full, relay.chain.head.timestamp, bytes(65)))
    each = relay.worst_gas * (2 * relay.chain.base_fee + relay.chain.tip) + 2 * data
    relay.chain.wei[GAS.address] = 3 * each - 1
    await relay.desk.charge(1)
    assert await relay.lane.step() is False
    assert relay.lane.state == "low_on_gas"
    relay.chain.wei[GAS.address] = 5 * each
    assert await relay.lane.step() is True
    assert 3 <= relay.lane.facts.batches_left <= 5
    asked = [call for call, _ in relay.chain.sent("eth_call") if call["to"] == GAS_PRICE_ORACLE]
    assert len(asked) == 2, "once a step"


async def test_step__key_cannot_pay_for_three_of_the_dearest__sends_nothing_until_refilled(relay, alerts):
    relay.worst_gas = 10**6
    relay.start()
    needed = 3 * 10**6 * (2 * relay.chain.base_fee + relay.chain.tip)
    relay.chain.wei[GAS.address] = needed - 1
    await relay.desk.charge(1)
    for _ in range(30):
        relay.clock.seconds += 1
        assert await relay.lane.step() is False
    assert (relay.lane.state, relay.lane.facts.balance) == ("low_on_gas", needed - 1)
    relay.clock.seconds += 60
    assert (relay.lane.facts.balance, relay.lane.facts.batches_left) == (None, None), (
        "nobody has looked since"
    )
    assert GAS.address in relay.lane.reason
    assert (await relay.desk.states(), relay.sent()) == (["queued"], [])
    assert len(alerts) == 1
    relay.chain.wei[GAS.address] = needed
    assert await relay.lane.step() is True
    assert relay.lane.state == "ok"
    await relay.settle()


@pytest.mark.parametrize(
    ("base_fee", "offered"),
    [(GWEI, 2 * GWEI + TIP), (CAP // 2, CAP), (CAP, CAP), (CAP + 1, None)],
    ids=["below the cap", "offer capped", "base fee at the cap", "base fee above the cap"],
)
async def test_facts__gas_money__batches_at_what_would_be_offered_now_and_no_number_above_the_cap(
    relay, base_fee, offered
):
    """Above the cap nothing is sent, so it is not known how far the money goes: neither far, nor as far as before."""
    relay.worst_gas = 10**6
    relay.start()
    relay.chain.wei[GAS.address] = 10**18
    await relay.lane.purse.look()
    relay.chain.base_fee = base_fee
    await relay.lane.purse.look()
    assert relay.lane.facts.balance == 10**18
    expected = None if offered is None else pytest.approx(10**12 / offered)
    assert relay.lane.facts.batches_left == expected


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


# ── Where it may die ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def dying(monkeypatch):
    """Makes settlement die at a failpoint, as far as the rest of it can tell."""

    def dying(place):
        def failpoint(name):
            if name == place:
                raise RuntimeError(place)

        for module in (lane, indexer):
            monkeypatch.setattr(module, "failpoint", failpoint)

    return dying


@pytest.mark.parametrize(
    ("place", "state", "broadcasts"),
    [
        ("lane.planned", "queued", 0),
        ("lane.journalled", "batched", 0),
        ("lane.broadcast", "batched", 1),
        ("indexer.read", "batched", 1),
        ("indexer.applied", "settled", 1),
        ("lane.mined", "settled", 1),
    ],
)
async def test_failpoint__each__is_where_its_name_says_and_nothing_is_lost(
    relay, dying, place, state, broadcasts
):
    charge = await relay.desk.charge(1)
    dying(place)

    async def go_on():
        for _ in range(4):
            await relay.lane.step()
            relay.chain.mine()
            await relay.index()

    with pytest.raises(RuntimeError, match=place):
        await go_on()
    assert await relay.desk.states() == [state]
    assert len(relay.sent()) == broadcasts
    assert (await relay.in_flight() is None) == (place == "lane.planned")
    dying(None)
    relay.start()
    await relay.settle()
    assert await relay.desk.states() == ["settled"]
    assert relay.chain.state.used == {charge.id}
    assert relay.chain.state.nonces[GAS.address] == 1


# ── Several lanes ────────────────────────────────────────────────────────────────────────────────────


async def test_step__two_lanes_at_once__never_take_the_same_charges(ledger, clock):
    relay = Relay(ledger, clock, signers=(GAS, GAS_TOO), most_charges=3)
    await relay.fund()
    charges = [await relay.desk.charge(n) for n in range(1, 7)]
    assert await asyncio.gather(*(each.step() for each in relay.lanes)) == [True, True]
    relay.chain.mine()
    await relay.index()
    assert await relay.desk.states() == ["settled"] * 6
    sent = [transaction for transaction, _ in relay.chain.head.transactions]
    assert {transaction.sender for transaction in sent} == {GAS.address, GAS_TOO.address}
    assert relay.chain.state.used == {charge.id for charge in charges}


async def test_step__another_process_takes_the_charges_first__plans_again(relay, ledger, clock):
    """Each process has its own lanes and locks; only the database is between them."""
    other = Relay(ledger, clock, relay.chain, signers=(GAS_TOO,))
    await relay.desk.charge(1)
    fees = gas.minable_fees

    async def slow(rpc, cap):
        await relay.desk.charge(2)
        gas.minable_fees = fees
        assert await other.lane.step() is True
        return await fees(rpc, cap)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gas, "minable_fees", slow)
        assert await relay.lane.step() is True
    assert await relay.in_flight() is None, "nothing is journalled of a plan that was overtaken"
    assert relay.pending() == []
    assert len(relay.pending(GAS_TOO)) == 1
    await relay.desk.charge(3)
    assert await relay.lane.step() is True
    assert await relay.desk.states() == ["batched"] * 3


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
    await replaced(relay)
    relay.chain.pending.clear()
    await relay.mine(relay.chain.foreign_transaction(GAS.address))
    relay.chain.asked.clear()
    for _ in range(60):
        assert await relay.lane.step() is False, "the node may only lag"
        relay.clock.seconds += 1
    assert relay.sent() == [], "nothing is sent under a nonce that is used"
    with pytest.raises(LaneHalted, match=r"nonce 0 .* was used"):
        await relay.lane.step()
    asked = [hash_ for (hash_,) in relay.chain.sent("eth_getTransactionReceipt")]
    attempts = {attempt.signed.tx_hash for attempt in (await relay.in_flight()).attempts}
    assert (len(attempts), set(asked[-2:])) == (2, attempts), "every attempt was looked for first"
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


async def test_step__receipt_shows_what_the_projection_lacks__is_read_again_and_nobody_is_blamed(relay):
    relay.chain.final_depth = 10
    await relay.desk.charge(1)
    await relay.lane.step()
    relay.chain.script("eth_getLogs", [])
    await relay.mine()
    assert await relay.desk.states() == ["batched"]
    with pytest.raises(EventsMissing, match="took charges"):
        await relay.lane.step()
    await relay.index()
    assert await relay.desk.states() == ["settled"]
    await relay.lane.step()
    assert await relay.in_flight() is None
    assert relay.ledger.view.mismatches == []


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
    with pytest.raises(LaneHalted, match=r"cannot set policies of platform \d+: the node does not say why"):
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
    st.tuples(st.just("exit"), st.fractions(0, 1)),
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
            assert story.ledger.view.mismatches == []
            assert await story.relay.in_flight() is None
        finally:
            story.ledger.close()

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(scenario(folder, Clock().install(monkeypatch)))
