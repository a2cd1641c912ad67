import asyncio
import inspect
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fake_chain import EXIT_DELAY, SILENCE, FakeChain
from making import (
    ACCOUNT,
    CHAIN_ID,
    GAS,
    GAS_TOO,
    METER,
    OTHER,
    OWNER,
    PLATFORM,
    TOKEN,
    USD,
    VAULT,
    Desk,
    block,
    charged,
    policy_set,
    rejected,
    word,
)
from relaying import ADA, Clock, Relay
from scrape import samples

from waterfall.chain.events import Rejection
from waterfall.chain.transactions import Fees, Signed
from waterfall.chain.vault import Vault, deposit_address, settle_gas
from waterfall.errors import ChainError, LaneHalted, LedgerError, Unavailable
from waterfall.ledger import schema
from waterfall.ledger.slots import Attempt, Slot, open_slot
from waterfall.ledger.store import Ledger
from waterfall.settlement import relayer as relayers
from waterfall.settlement import watching
from waterfall.settlement.indexer import ChainStateLost
from waterfall.settlement.parts import State
from waterfall.settlement.relayer import Relayer, RelayerSettings
from waterfall.types import Policy

SETTINGS = RelayerSettings(
    deployed_block=0,
    finality="latest",
    final_depth=64,
    poll_seconds=0.001,
    most_charges=500,
    max_fee_cap=100 * 10**9,
)


SETTLE, SETTLE_TOO = f"settle {GAS.address}", f"settle {GAS_TOO.address}"


@pytest.fixture
def clock(monkeypatch):
    return Clock().install(monkeypatch)


def make(ledger, chain, owner=OWNER, gas=(GAS,), **settings):
    return Relayer(
        Vault(chain, VAULT),
        ledger,
        replace(SETTINGS, **settings),
        token=TOKEN,
        exit_delay=EXIT_DELAY,
        meter=METER,
        gas=gas,
        owner=owner,
    )


class Mining(FakeChain):
    """Makes a block whenever a transaction arrives, as a development chain does."""

    mines_at_once = True

    async def call(self, method, *parameters):
        answer = await super().call(method, *parameters)
        if method == "eth_sendRawTransaction" and self.mines_at_once:
            self.mine()
        return answer


@pytest.fixture
def chain():
    chain = Mining(final_depth=20)
    chain.mine(lambda state: state.deposit(10 * USD, label=ADA))
    return chain


@pytest.fixture
async def relayer(ledger, chain):
    relayer = make(ledger, chain)
    await relayer.catch_up()
    return relayer


async def until(condition, seconds=10):
    async with asyncio.timeout(seconds):
        while not await _value(condition()):
            await asyncio.sleep(0.001)


async def _value(found):
    return await found if inspect.isawaitable(found) else found


class Running:
    """A relayer at work for the length of a block."""

    def __init__(self, relayer):
        self._relayer = relayer

    async def __aenter__(self):
        self._task = asyncio.create_task(self._relayer.run())

    async def __aexit__(self, *_):
        self._task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self._task


# ── Watching it ──────────────────────────────────────────────────────────────────────────────────────


async def test_facts__of_a_key_that_has_sent_nothing__tell_what_it_has_all_the_same(ledger, chain, relayer):
    async with Running(relayer):
        await until(lambda: all(lane.facts.balance is not None for lane in relayer.lanes.values()))
    facts = relayer.lanes[SETTLE].facts
    assert facts.balance == await relayer.lanes[SETTLE].purse._balance()  # noqa: SLF001
    assert facts.batches_left == pytest.approx(facts.balance / (settle_gas(500) * 2 * 10**9), rel=10)


async def test_families__of_a_lane_that_another_process_works_on__leave_it_to_that_one(relayer):
    relayer.parts[SETTLE] = relayer.parts[SETTLE].become(State.NOT_LEADING)
    seen = {sample.labels.get("lane") for family in watching._lanes(relayer) for sample in family.samples}  # noqa: SLF001
    assert seen == {"policy"}


async def test_step__that_fails__is_counted_by_its_part_and_error(ledger, chain, relayer):
    chain.script("eth_getBlockByNumber", SILENCE)

    def failures():
        return samples(ledger.metrics.render().decode()).get(
            ("waterfall_part_failures_total", "rpc_unavailable", "indexer")
        )

    async with Running(relayer):
        await until(lambda: failures() == 1)


async def test_step__mistake_that_nobody_foresaw__is_that_parts_alone_and_tried_again(
    ledger, chain, relayer, monkeypatch
):
    monkeypatch.setattr("waterfall.settlement.relayer._SLOWEST_RETRY_SECONDS", 0.01)
    desk = Desk(ledger, METER)
    chain.script("eth_getTransactionCount", KeyError("odd"), KeyError("odd"))
    await desk.charge(1)
    async with Running(relayer):
        await until(lambda: "KeyError('odd')" in (relayer.parts[SETTLE].reason or ""))
        assert relayer.parts["indexer"].state is State.OK
        while await desk.states() != ["settled"]:
            chain.mine()
            await asyncio.sleep(0.01)


# ── Stopping ─────────────────────────────────────────────────────────────────────────────────────────


async def test_stop__while_a_transaction_is_given_to_the_nodes__ends_after_they_have_it(
    ledger, chain, relayer
):
    """What is cut between the journal and the nodes is only found at the next start."""
    giving, given = asyncio.Event(), asyncio.Event()
    call = chain.call

    async def slow(method, *parameters):
        if method == "eth_sendRawTransaction":
            giving.set()
            await given.wait()
        return await call(method, *parameters)

    chain.call = slow
    running = asyncio.create_task(relayer.run())
    await Desk(ledger, METER).charge(5)
    await giving.wait()
    relayer.stop()
    done, _ = await asyncio.wait([running], timeout=0.05)
    assert not done, "it does not leave the step it is at"
    given.set()
    await asyncio.wait_for(running, 10)
    (attempt,) = await Desk(ledger, METER).table(schema.attempts)
    assert attempt["state"] == "accepted"


@pytest.mark.parametrize("fault", ["halted", "failing", "idle"])
async def test_stop__whatever_its_parts_are_at__ends(ledger, chain, relayer, fault):
    running = asyncio.create_task(relayer.run())
    if fault == "halted":
        chain.meters.clear()
        await Desk(ledger, METER).charge(5)
        await until(lambda: SETTLE in relayer.halted)
    if fault == "failing":
        chain.script("eth_getBlockByNumber", *[SILENCE] * 1000)
        await until(lambda: relayer.parts["indexer"].state == "retrying")
    relayer.stop()
    await asyncio.wait_for(running, 10)


# ── At work ──────────────────────────────────────────────────────────────────────────────────────────


async def test_run__charges_policies_and_deposits__all_reach_the_chain(ledger, chain, relayer):
    desk = Desk(ledger, METER)
    await desk.open("bob")
    async with Running(relayer):
        charge = await desk.charge(5)
        await desk.order(Policy(max_per_charge=USD))
        chain.mine(chain.send_tokens(deposit_address(VAULT, OTHER), 7))

        async def done():
            record, other = await desk.record(), await desk.record(OTHER)
            arrived = record.policy == Policy(max_per_charge=USD) and record.wanted is None
            return arrived and other.wallet.balance == 7 * 10**6 and await desk.states() == ["settled"]

        await until(done)
    assert chain.state.used == {charge.id}
    assert relayer.halted == {}


async def test_run__no_owner_key__policies_bind_here_and_are_not_sent(ledger, chain):
    relayer = make(ledger, chain, owner=None)
    await relayer.catch_up()
    desk = Desk(ledger, METER)
    await desk.order(Policy(max_per_charge=5))
    async with Running(relayer):
        await desk.charge(5)

        async def settled():
            return await desk.states() == ["settled"]

        await until(settled)
    assert (await desk.record()).wanted == Policy(max_per_charge=5)
    assert chain.state.accounts[ACCOUNT].policy == Policy()


async def test_run__node_out_for_a_while__goes_on_by_itself(ledger, chain, relayer):
    desk = Desk(ledger, METER)
    for method in ("eth_getBlockByNumber", "eth_getTransactionCount", "eth_getLogs"):
        chain.script(method, *[SILENCE] * 3)
    async with Running(relayer):
        await desk.charge(5)

        async def settled():
            return await desk.states() == ["settled"]

        await until(settled)
    assert relayer.halted == {}


async def test_run__meter_retired__halts_every_lane_and_refuses_calls(ledger, chain):
    relayer = make(ledger, chain, gas=(GAS, GAS_TOO))
    await relayer.catch_up()
    desk = Desk(ledger, METER)
    chain.meters.clear()
    async with Running(relayer):
        await desk.charge(5)
        await until(lambda: set(relayer.halted) == {SETTLE, SETTLE_TOO})
        await relayer._check_gate()  # noqa: SLF001
        with pytest.raises(Unavailable, match="is not a meter"):
            ledger.block_time(60)
        chain.mine(lambda state: state.deposit(USD, label=ADA))

        async def read_on():
            return (await desk.wallet()).balance == 11 * USD

        await until(read_on)
    assert await desk.states() == ["queued"]
    reverted = [t for block in chain.blocks for t in block.transactions]
    assert len(reverted) == 1, "one revert says it to both"


# ── Lanes ────────────────────────────────────────────────────────────────────────────────────────────


async def test_run__several_keys__all_settle_and_nothing_twice(ledger, chain):
    chain.mines_at_once = False
    relayer = make(ledger, chain, gas=(GAS, GAS_TOO), most_charges=3)
    await relayer.catch_up()
    desk = Desk(ledger, METER)
    charges = [await desk.charge(n) for n in range(1, 21)]
    async with Running(relayer):
        # The first may be final before the last is settled.
        while not set(await desk.states()) <= {"settled", "final"}:
            await asyncio.sleep(0.02)
            chain.mine()
    assert chain.state.used == {charge.id for charge in charges}
    assert chain.state.accounts[ACCOUNT].balance == 10 * USD - sum(range(1, 21))
    nonces = [chain.state.nonces[signer.address] for signer in (GAS, GAS_TOO)]
    assert min(nonces) >= 2
    assert sum(nonces) <= 20


async def test_run__one_lane_halts__the_other_settles_what_it_had_and_calls_go_on(ledger, chain):
    chain.mines_at_once = False
    relayer = make(ledger, chain, gas=(GAS, GAS_TOO))
    await relayer.catch_up()
    desk = Desk(ledger, METER)
    lane = relayer.lanes[SETTLE]
    lane.settings = replace(lane.settings, foreign_seconds=0.02)
    charges = [await desk.charge(n) for n in (1, 2)]
    assert await lane.step() is True
    chain.pending.clear()
    chain.mine(chain.foreign_transaction(GAS.address))
    async with Running(relayer):
        await until(lambda: SETTLE in relayer.halted)
        chain.mines_at_once = True

        async def settled():
            return await desk.states() == ["settled"] * 2

        await until(settled)
        assert ledger.block_time(60)
        await until(lambda: not relayer._is_batch_in_flight())  # noqa: SLF001
        assert lane.slot is not None, "what a halted lane has in flight is not waited for"
        charge = await desk.charge(3)

        async def settled_too():
            return (await desk.states())[2] == "settled"

        await until(settled_too)
    assert chain.state.used == {c.id for c in (*charges, charge)}
    assert "was used by a transaction that is not in the journal" in relayer.halted[SETTLE]
    assert relayer.parts[SETTLE].state == "halted"
    assert relayer.parts[SETTLE_TOO].state == "ok"


async def test_run__charges_come_back_to_a_halted_lane_by_a_reorg__go_to_the_other(
    ledger, chain, monkeypatch
):
    monkeypatch.setattr(relayers, "_GIVE_BACK_SECONDS", 0.01)
    relayer = make(ledger, chain, gas=(GAS, GAS_TOO))
    await relayer.catch_up()
    desk = Desk(ledger, METER)
    await desk.charge(1)
    lane = relayer.lanes[SETTLE]
    while await lane.step() or lane.slot is not None:
        await relayer.catch_up()
    assert await desk.states() == ["settled"]

    async def strange():
        raise LaneHalted(reason="strange")

    relayer._sending[SETTLE].step = strange  # noqa: SLF001
    async with Running(relayer):
        await until(lambda: SETTLE in relayer.halted)
        chain.reorg(1, transactions=False)
        chain.mine(chain.foreign_transaction(GAS.address))

        async def settled():
            return chain.state.nonces[GAS_TOO.address] == 1 and await desk.states() == ["settled"]

        await until(settled)


async def test_run__policy_refused__stops_policies_and_nothing_else(ledger, chain, relayer):
    desk = Desk(ledger, METER)
    chain.refuses_policies = True
    async with Running(relayer):
        await desk.order(Policy(max_per_charge=USD))
        await until(lambda: "policy" in relayer.halted)
        assert ledger.block_time(60)
        await desk.charge(5)

        async def settled():
            return await desk.states() == ["settled"]

        await until(settled)
    reverted = [t for block in chain.blocks for t, succeeded in block.transactions if not succeeded]
    assert len(reverted) == 1, "and is not sent again"


async def test_run__chain_lost__nothing_is_sent_to_what_is_in_its_place(ledger, chain, relayer):
    desk = Desk(ledger, METER)
    chain.blocks[0].hash = "0x" + "99" * 32
    del chain.blocks[1:]
    chain.skip()
    async with Running(relayer):
        await until(lambda: "indexer" in relayer.halted)
        await desk.charge(5)
        chain.asked.clear()
        await asyncio.sleep(0.02)
        assert chain.sent("eth_sendRawTransaction") == []
        assert relayer.parts[SETTLE].state == "waiting"
    assert await desk.states() == ["queued"]


async def test_run__another_process_leads__nothing_is_done_until_it_does_not(
    ledger, chain, relayer, monkeypatch
):
    desk = Desk(ledger, METER)
    leading = set()

    async def leads(part):
        return part in leading

    monkeypatch.setattr(ledger, "leads", leads)
    await desk.charge(5)
    await desk.order(Policy(max_per_charge=USD))
    chain.mine(lambda state: state.deposit(USD, label=ADA))
    chain.asked.clear()
    async with Running(relayer):
        assert len(relayer.parts) == 5
        await until(lambda: {part.state for part in relayer.parts.values()} == {"not_leading"})
        await asyncio.sleep(0.02)
        assert chain.asked == []
        leading |= {"indexer", SETTLE}

        async def settled():
            return await desk.states() == ["settled"]

        await until(settled)
    assert relayer.parts[SETTLE].state == "ok"
    assert relayer.parts["policy"].state == "not_leading"


async def test_catch_up__another_process_leads__leaves_it_to_that(ledger, chain, monkeypatch):
    async def leads(part):
        return False

    monkeypatch.setattr(ledger, "leads", leads)
    await make(ledger, chain).catch_up()
    assert ledger.view.head is None


async def test_run__low_on_gas__calls_go_on_until_too_much_waits_and_refilling_is_enough(ledger, chain):
    relayer = make(ledger, chain, gas_batches=3, max_unsettled=2)
    await relayer.catch_up()
    desk = Desk(ledger, METER)
    dearest = settle_gas(500) * (2 * chain.base_fee + chain.tip)
    chain.wei[GAS.address] = 3 * dearest - 1
    async with Running(relayer):
        await desk.charge(1)
        await until(lambda: relayer.parts[SETTLE].state == "low_on_gas")
        assert relayer.halted == {}
        await desk.charge(2)
        await relayer._check_gate()  # noqa: SLF001
        assert ledger.block_time(60), "two may wait"
        await desk.charge(3)
        await relayer._check_gate()  # noqa: SLF001
        with pytest.raises(Unavailable, match="3 charges wait for settlement"):
            ledger.block_time(60)
        chain.wei[GAS.address] = 3 * dearest

        async def settled():
            return set(await desk.states()) == {"settled"}

        await until(settled)
        await relayer._check_gate()  # noqa: SLF001
        assert ledger.block_time(60)
        await until(lambda: relayer.parts[SETTLE].state == "ok")


async def test_run__one_key_without_gas_money__is_shown_so_while_the_other_settles_everything(ledger, chain):
    relayer = make(ledger, chain, gas=(GAS, GAS_TOO))
    await relayer.catch_up()
    desk = Desk(ledger, METER)
    chain.wei[GAS_TOO.address] = 0

    def shown():
        return relayer.parts[SETTLE].state, relayer.parts[SETTLE_TOO].state

    async def settled():
        return set(await desk.states()) == {"settled"} and shown() == ("ok", "low_on_gas")

    async with Running(relayer):
        await until(lambda: shown() == ("ok", "low_on_gas"))  # before there is anything to pay for
        assert GAS_TOO.address in relayer.parts[SETTLE_TOO].reason
        await desk.charge(1)
        await until(settled)
        assert chain.state.nonces[GAS_TOO.address] == 0


@pytest.mark.parametrize("by_turns", [True, False])
async def test_two_relayers__one_key_and_two_databases__one_halts_and_nothing_is_debited_twice(
    ledger, tmp_path, clock, by_turns
):
    """Somebody has put a copy to work beside the original."""
    chain = FakeChain(final_depth=20)
    second = Ledger.open(f"sqlite:///{tmp_path}/second.db", chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM)
    relays = [Relay(its, clock, chain) for its in (ledger, second)]
    try:
        await relays[0].fund()
        await relays[1].index()
        halted, charges = {}, []
        for _ in range(60):
            clock.seconds += 7
            for number, relay in enumerate(relays):
                await relay.index()
                if len(charges) < 20:
                    charges.append(await relay.desk.charge(1000))
                if number not in halted:
                    try:
                        await relay.lane.step()
                    except LaneHalted as error:
                        halted[number] = error.message
                if by_turns:
                    chain.mine()
            chain.mine()
        ((loser, reason),) = halted.items()
        assert "not in the journal" in reason
        assert GAS.address in reason
        winners = await relays[1 - loser].desk.charges()
        assert chain.state.used >= {charge.id for charge in winners}
        paid = len(chain.state.used)
        assert chain.state.earned == 1000 * paid
        assert chain.state.accounts[ACCOUNT].balance == 10 * USD - 1000 * paid
    finally:
        second.close()


# ── Trying again ─────────────────────────────────────────────────────────────────────────────────────


class Stop(BaseException):
    """Ends a loop that goes on after whatever is an exception."""


class Steps:
    """A part whose steps go as they are told."""

    def __init__(self, monkeypatch, relayer, outcomes):
        self._outcomes = iter([*outcomes, Stop()])
        self._relayer = relayer
        self.paused = []
        self.part = relayers._Part("indexer", self.step, lambda: 0.5)  # noqa: SLF001
        monkeypatch.setattr(relayer, "_rest", self.rest)

    async def step(self):
        outcome = next(self._outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def rest(self, part, seconds, *, in_error=False):
        self.paused.append(seconds)

    async def run(self):
        with pytest.raises(Stop):
            await self._relayer._repeat(self.part)  # noqa: SLF001
        return self.paused


@pytest.fixture
def pauses(monkeypatch, ledger, chain):
    """How long a part pauses after each outcome of its step."""

    async def pauses(outcomes):
        return await Steps(monkeypatch, make(ledger, chain, poll_seconds=0.5), outcomes).run()

    return pauses


async def test_repeat__something_done__goes_on_at_once(pauses):
    assert await pauses([True, False, True]) == [0, 0.5, 0]


async def test_repeat__failures__pause_longer_and_longer_up_to_a_limit(pauses):
    failure = ChainError(reason="down")
    assert await pauses([failure] * 6) == [1, 2, 4, 8, 10, 10]
    assert await pauses([failure, failure, False, LedgerError(reason="busy")]) == [1, 2, 0.5, 1]


async def test_repeat__node_down_for_a_night__is_still_trying(pauses):
    assert (await pauses([ChainError(reason="down")] * 5000))[-1] == 10


@pytest.mark.parametrize(
    "error",
    [LaneHalted(reason="strange"), ChainStateLost(number=1, hash="0x1", reason="it was final")],
    ids=lambda e: e.code,
)
async def test_repeat__only_a_person_can_tell__stops_and_says_so(relayer, error):
    async def step():
        raise error

    await relayer._repeat(relayers._Part("indexer", step, lambda: 0.5))  # noqa: SLF001
    assert relayer.halted == {"indexer": error.message}
    assert (relayer.parts["indexer"].state, relayer.parts["indexer"].reason) == ("halted", error.message)


# ── Housekeeping ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def now(monkeypatch, relayer):
    """How many seconds the host's clock and the monotonic one have moved since the start."""
    clock = SimpleNamespace(host=0, monotonic=0)
    start, then = relayer._started  # noqa: SLF001
    monkeypatch.setattr(relayers, "now_ms", lambda: start + 1000 + int(1000 * clock.host))
    monkeypatch.setattr(
        relayers, "time", SimpleNamespace(monotonic=lambda: then + 1 + clock.monotonic, time=time.time)
    )
    return clock


async def keep_house(relayer):
    assert await relayer._keep_house() is False  # noqa: SLF001


async def test_keep_house__abandoned_hold__is_lost(ledger, relayer):
    desk = Desk(ledger, METER)
    held = await desk.hold(5)
    await keep_house(relayer)
    assert (await desk.call(held)).settlement.state == "held"
    await ledger.write(lambda tx: tx.run(schema.holds.update().values(lease_until=0)))
    await keep_house(relayer)
    at = (await desk.call(held)).settlement
    assert (at.state, at.reason) == ("lost", "its call was abandoned")


async def test_keep_house__key_taken_out_of_the_configuration__what_it_had_goes_to_others(
    ledger, relayer, now
):
    desk = Desk(ledger, METER)
    charge = await desk.charge(5)
    slot = Slot(GAS_TOO.address, 0, "settle", None, VAULT, b"", 1, 0)
    attempt = Attempt(Signed(b"", word("attempt")), Fees(1, 1), "signed", 0)
    await ledger.write(lambda tx: open_slot(tx, slot, attempt, [charge]))
    await keep_house(relayer)
    assert await desk.states() == ["batched"]
    now.host = now.monotonic = 11 * 60
    await keep_house(relayer)
    assert await desk.states() == ["queued"]


@pytest.mark.parametrize("clock_set_by", [0, -7200, 7200])
async def test_gate__settlement_late__refuses_until_it_has_caught_up(ledger, relayer, now, clock_set_by):
    desk = Desk(ledger, METER)
    charge = await desk.charge(5)

    async def waited(seconds):
        now.monotonic = seconds
        now.host = seconds + clock_set_by
        await relayer._check_gate()  # noqa: SLF001

    await waited(0)
    await waited(EXIT_DELAY / 4 - 60)
    assert ledger.block_time(60)
    await waited(EXIT_DELAY / 4 + 60)
    with pytest.raises(Unavailable, match=r"settlement is .* s behind"):
        ledger.block_time(60)
    await desk.apply(block(2), charged(charge))
    await waited(EXIT_DELAY / 4 + 61)
    assert ledger.block_time(60)


async def test_gate__indexer_halted__the_reason_stays(ledger, relayer):
    relayer.halted["indexer"] = "strange"
    await relayer._check_gate()  # noqa: SLF001
    with pytest.raises(Unavailable, match="strange"):
        ledger.block_time(60)


async def test_gate__chain_and_journal_differ__refuses(ledger, relayer):
    await ledger.view.note_mismatch("they differ")
    await relayer._check_gate()  # noqa: SLF001
    with pytest.raises(Unavailable, match="they differ"):
        ledger.block_time(60)


async def test_keep_house__rejected_by_its_window__is_queued_again_when_that_turns(ledger, chain, relayer):
    desk = Desk(ledger, METER)
    charge = await desk.charge(5)
    now = chain.head.timestamp
    left_out = rejected(charge, Rejection.MAX_PER_WINDOW)
    spent = charged(charge, id=1, amount=9)  # of another ledger, in the same window
    policy = Policy(max_per_window=10, window_seconds=60)
    await desk.apply(block(2, now), policy_set(ACCOUNT, policy), spent, left_out)
    await keep_house(relayer)
    assert await desk.states() == ["rejected"]
    await desk.apply(block(3, now + 60))
    await keep_house(relayer)
    assert await desk.states() == ["queued"]
