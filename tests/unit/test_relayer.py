import asyncio
from types import SimpleNamespace

import pytest
from fake_chain import EXIT_DELAY, SILENCE, FakeChain
from making import (
    ACCOUNT,
    GAS,
    METER,
    OTHER,
    OWNER,
    TOKEN,
    USD,
    VAULT,
    Desk,
    block,
    charged,
    policy_set,
    rejected,
)
from relaying import ADA

from waterfall.chain.events import Rejection
from waterfall.chain.vault import Vault, deposit_address
from waterfall.errors import ChainError, LaneHalted, LedgerError, Unavailable
from waterfall.ledger import journal
from waterfall.settlement import relayer as relayers
from waterfall.settlement.indexer import ChainStateLost
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


def make(ledger, chain, owner=OWNER):
    return Relayer(
        Vault(chain, VAULT),
        ledger,
        SETTINGS,
        token=TOKEN,
        exit_delay=EXIT_DELAY,
        meter=METER,
        gas=GAS,
        owner=owner,
    )


class Mining(FakeChain):
    """Makes a block whenever a transaction arrives, as a development chain does."""

    async def call(self, method, *parameters):
        answer = await super().call(method, *parameters)
        if method == "eth_sendRawTransaction":
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
        while not await condition():
            await asyncio.sleep(0.001)


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


async def test_run__meter_retired__halts_that_part_and_refuses_calls(ledger, chain, relayer):
    desk = Desk(ledger, METER)
    chain.meters.clear()
    async with Running(relayer):
        await desk.charge(5)

        async def halted():
            return "settle" in relayer.halted

        await until(halted)
        with pytest.raises(Unavailable, match="is not a meter"):
            ledger.block_time(60)
        chain.mine(lambda state: state.deposit(USD, label=ADA))

        async def read_on():
            return (await desk.wallet()).balance == 11 * USD

        await until(read_on)
    assert await desk.states() == ["queued"]


# ── Trying again ─────────────────────────────────────────────────────────────────────────────────────


class Stop(Exception):
    """Ends a loop that would go on for ever."""


async def pauses(relayer, outcomes):
    """How long a part pauses after each outcome of its step."""
    steps = iter([*outcomes, Stop()])
    paused = []

    async def step():
        outcome = next(steps)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def rest(seconds):
        paused.append(seconds)

    with pytest.raises(Stop):
        await relayer._repeat("part", step, 0.5, rest)  # noqa: SLF001
    return paused


async def test_repeat__something_done__goes_on_at_once(relayer):
    assert await pauses(relayer, [True, False, True]) == [0, 0.5, 0]


async def test_repeat__failures__pause_longer_and_longer_up_to_a_limit(relayer):
    failure = ChainError(reason="down")
    assert await pauses(relayer, [failure] * 6) == [1, 2, 4, 8, 10, 10]
    assert await pauses(relayer, [failure, failure, False, LedgerError(reason="busy")]) == [1, 2, 0.5, 1]


async def test_repeat__node_down_for_a_night__is_still_trying(relayer):
    assert (await pauses(relayer, [ChainError(reason="down")] * 5000))[-1] == 10


@pytest.mark.parametrize(
    "error", [LaneHalted(reason="strange"), ChainStateLost(number=1, hash="0x1")], ids=lambda e: e.code
)
async def test_repeat__only_a_person_can_tell__stops_and_says_so(ledger, relayer, error):
    async def step():
        raise error

    await relayer._repeat("part", step, 0.5)  # noqa: SLF001
    assert relayer.halted == {"part": error.message}
    with pytest.raises(Unavailable):
        ledger.block_time(60)


# ── Housekeeping ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def now(monkeypatch):
    clock = SimpleNamespace(ahead=0)
    monkeypatch.setattr(relayers, "now_ms", lambda: journal.now_ms() + clock.ahead)
    return clock


async def keep_house(relayer):
    assert await relayer._keep_house() is False  # noqa: SLF001


async def test_keep_house__abandoned_hold__is_lost(ledger, relayer, now):
    desk = Desk(ledger, METER)
    held = await desk.hold(5)
    await keep_house(relayer)
    assert (await desk.call(held)).settlement.state == "held"
    now.ahead = 6 * 60 * 1000
    await keep_house(relayer)
    at = (await desk.call(held)).settlement
    assert (at.state, at.reason) == ("lost", "its call was abandoned")


async def test_keep_house__settlement_late__refuses_until_it_has_caught_up(ledger, relayer, now):
    desk = Desk(ledger, METER)
    charge = await desk.charge(5)
    now.ahead = EXIT_DELAY * 1000 // 4 - 60_000
    await keep_house(relayer)
    assert ledger.block_time(60)
    now.ahead += 120_000
    await keep_house(relayer)
    with pytest.raises(Unavailable, match=r"settlement is .* s behind"):
        ledger.block_time(60)
    await desk.apply(block(2), charged(charge))
    await keep_house(relayer)
    assert ledger.block_time(60)


async def test_keep_house__halted__the_reason_stays(ledger, relayer, now):
    relayer.halted["settle"] = "strange"
    ledger.refuse("strange")
    await keep_house(relayer)
    with pytest.raises(Unavailable, match="strange"):
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
