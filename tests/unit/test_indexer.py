import asyncio
import contextlib
from tempfile import TemporaryDirectory

import pytest
from fake_chain import SILENCE, FakeChain
from hypothesis import given, settings
from hypothesis import strategies as st
from making import ACCOUNT, CHAIN_ID, METER, OTHER, PLATFORM, SALT, USD, VAULT, Desk

from waterfall.chain.rpc import RpcError
from waterfall.chain.vault import Vault
from waterfall.errors import ChainError
from waterfall.ledger import accounts, schema
from waterfall.ledger.store import Ledger
from waterfall.settlement.indexer import ChainStateLost, Indexer
from waterfall.types import Policy

ADA, BOB = accounts.label_hash(SALT, "ada"), accounts.label_hash(SALT, "bob")


def index(chain, ledger, *, deployed_block=0, finality="safe", final_depth=64):
    return Indexer(
        Vault(chain, VAULT),
        ledger,
        deployed_block=deployed_block,
        finality=finality,
        final_depth=final_depth,
    )


async def catch_up(indexer, most=200):
    steps = 0
    while await indexer.step():
        steps += 1
        assert steps < most, "it never arrives"
    return steps


def deposit(amount, label=ADA):
    return lambda state: state.deposit(amount, label=label)


async def balances(ledger):
    table = schema.wallets
    rows = await Desk(ledger, METER).table(table)
    return {row["account"]: row["balance"] for row in rows}


def truth(chain):
    return {account: state.balance for account, state in chain.state.accounts.items()}


# ── Catching up ──────────────────────────────────────────────────────────────────────────────────────


async def test_step__empty_ledger__reads_up_to_the_head(ledger):
    chain = FakeChain(final_depth=3)
    for amount in range(1, 10):
        chain.mine(deposit(amount))
    await catch_up(index(chain, ledger))
    assert await balances(ledger) == {ACCOUNT: 45}
    assert (ledger.head.block.number, ledger.head.block.hash) == (9, chain.head.hash)
    assert ledger.block_time(60) == chain.head.timestamp


async def test_step__nothing_new__says_so_and_sees_the_head(ledger):
    chain = FakeChain()
    chain.mine(deposit(1))
    indexer = index(chain, ledger)
    await catch_up(indexer)
    before = ledger.head.seen_at
    assert await indexer.step() is False
    assert ledger.head.seen_at > before


async def test_step__deployed_late__starts_there(ledger):
    chain = FakeChain(final_depth=2)
    chain.skip(50)
    chain.mine(deposit(5))
    chain.skip(10)
    await catch_up(index(chain, ledger, deployed_block=51))
    assert await balances(ledger) == {ACCOUNT: 5}
    first = min(
        int(criteria["fromBlock"], 16) for (criteria,) in chain.sent("eth_getLogs") if "fromBlock" in criteria
    )
    assert first == 51


async def test_step__node_limits_ranges__asks_for_less_until_it_is_answered(ledger):
    chain = FakeChain(final_depth=0)
    chain.range_limit = 10
    for amount in range(1, 60):
        chain.mine(deposit(amount))
    await catch_up(index(chain, ledger))
    assert await balances(ledger) == {ACCOUNT: sum(range(1, 60))}


async def test_step__node_refuses_every_range__is_a_chain_error(ledger):
    chain = FakeChain(final_depth=0)
    chain.range_limit = 0
    chain.skip(5)
    with pytest.raises(ChainError, match="too wide"):
        await catch_up(index(chain, ledger))


async def test_step__restart__goes_on_where_it_was(ledger, open_ledger):
    chain = FakeChain()
    chain.mine(deposit(1))
    await catch_up(index(chain, ledger))
    ledger.close()
    again = open_ledger()
    chain.mine(deposit(2))
    chain.asked.clear()
    await catch_up(index(chain, again))
    assert await balances(again) == {ACCOUNT: 3}
    read = [
        int(criteria["fromBlock"], 16) for (criteria,) in chain.sent("eth_getLogs") if "fromBlock" in criteria
    ]
    assert all(first > 1 for first in read)


@pytest.mark.parametrize("method", ["eth_getBlockByNumber", "eth_getLogs"])
async def test_step__node_does_not_answer__nothing_is_lost(ledger, method):
    chain = FakeChain(final_depth=2)
    for amount in range(1, 6):
        chain.mine(deposit(amount))
    indexer = index(chain, ledger)
    for _ in range(8):
        chain.script(method, SILENCE)
        with pytest.raises(ChainError):
            await catch_up(indexer)
        await indexer.step()
        chain.mine(deposit(1))
    await catch_up(indexer)
    assert await balances(ledger) == truth(chain)


async def test_step__more_blocks_than_a_commit_takes__all_projected(ledger):
    chain = FakeChain(final_depth=500)
    for _ in range(120):
        chain.mine(deposit(1))
    assert await catch_up(index(chain, ledger)) >= 3
    assert await balances(ledger) == {ACCOUNT: 120}


# ── Finality ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("finality", "tags", "pending"),
    [
        ("latest", {}, 0),
        ("safe", {"safe_depth": 2}, 2 * USD),
        ("finalized", {"final_depth": 3}, 3 * USD),
        (4, {}, 4 * USD),
        (100, {}, 5 * USD),
        ("safe", {"safe_depth": None}, 1 * USD),  # no such tag: the depth says
        ("finalized", {"final_depth": None}, 1 * USD),
    ],
)
async def test_step__finality__says_from_when_a_deposit_may_be_spent(ledger, finality, tags, pending):
    chain = FakeChain(**{"safe_depth": 0, "final_depth": 5, **tags})
    for _ in range(5):
        chain.mine(deposit(USD))
    indexer = index(chain, ledger, finality=finality, final_depth=1)
    await catch_up(indexer)
    wallet = await Desk(ledger, METER).wallet(ACCOUNT)
    assert (wallet.balance, wallet.pending) == (5 * USD, pending)


async def test_step__tag_that_is_null_yet__is_the_depth(ledger):
    chain = FakeChain()
    chain.mine(deposit(USD))
    chain.safe_depth = None
    await catch_up(index(chain, ledger, final_depth=1))
    assert (await Desk(ledger, METER).wallet(ACCOUNT)).pending == USD


async def test_step__deposit_becomes_final__counts_without_a_new_event(ledger):
    chain = FakeChain(safe_depth=3)
    chain.mine(deposit(USD))
    indexer = index(chain, ledger)
    await catch_up(indexer)
    desk = Desk(ledger, METER)
    assert (await desk.wallet(ACCOUNT)).pending == USD
    chain.safe_depth = 0  # the tag moves while no block comes
    assert await indexer.step() is False
    assert (await desk.wallet(ACCOUNT)).pending == 0


# ── Reorgs ───────────────────────────────────────────────────────────────────────────────────────────


async def test_step__deposit_reorged_away__is_gone(ledger):
    chain = FakeChain(final_depth=10)
    chain.mine(deposit(1))
    indexer = index(chain, ledger)
    await catch_up(indexer)
    chain.mine(deposit(2))
    chain.mine(deposit(4, BOB))
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 3, OTHER: 4}
    chain.reorg(2)
    chain.skip(3)
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 1, OTHER: 0}
    assert ledger.head.block.hash == chain.head.hash


async def test_step__shorter_fork__is_followed(ledger):
    chain = FakeChain(final_depth=10)
    for _ in range(5):
        chain.mine(deposit(1))
    indexer = index(chain, ledger)
    await catch_up(indexer)
    chain.reorg(3)
    chain.mine(deposit(7))
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 9}
    assert ledger.head.block.number == 3


async def test_step__whole_chain_of_a_young_vault_replaced__is_followed(ledger):
    """A reorg back to the block where indexing began is a reorg like any other."""
    chain = FakeChain(final_depth=64)
    for _ in range(3):
        chain.mine(deposit(1))
    indexer = index(chain, ledger)
    await catch_up(indexer)
    chain.reorg(3)
    for _ in range(4):
        chain.mine(deposit(2))
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 8}


async def test_step__restart_on_another_fork__is_rewound(ledger, open_ledger):
    chain = FakeChain(final_depth=10)
    for _ in range(5):
        chain.mine(deposit(1))
    await catch_up(index(chain, ledger))
    ledger.close()
    chain.reorg(4)
    chain.skip(10)
    again = open_ledger()
    await catch_up(index(chain, again))
    assert await balances(again) == {ACCOUNT: 1}


async def test_step__chain_replaced_beyond_what_is_final__stops_for_a_person(ledger):
    chain = FakeChain(final_depth=2)
    for _ in range(10):
        chain.mine(deposit(1))
    indexer = index(chain, ledger)
    await catch_up(indexer)
    before = await balances(ledger)
    chain.reorg(9)
    chain.skip(20)
    with pytest.raises(ChainStateLost):
        await catch_up(indexer)
    assert await balances(ledger) == before


async def test_step__node_falls_behind__ends_where_it_is_and_comes_back(ledger):
    chain = FakeChain(final_depth=10)
    for _ in range(6):
        chain.mine(deposit(1))
    indexer = index(chain, ledger)
    await catch_up(indexer)
    ahead = chain.blocks[-3:]
    del chain.blocks[-3:]
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 3}
    chain.blocks += ahead
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 6}


async def test_step__reorg_between_two_answers__never_mixes_two_forks(ledger):
    """The logs asked for by a block's hash are gone when they are asked for."""
    chain = FakeChain(final_depth=10)
    chain.mine(deposit(1))
    indexer = index(chain, ledger)
    await catch_up(indexer)
    chain.mine(deposit(2))
    chain.script("eth_getLogs", RpcError(method="eth_getLogs", reason="unknown block", data=None))
    with pytest.raises(ChainError):
        await indexer.step()
    chain.reorg(1)
    chain.mine(deposit(4))
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 5}


async def test_step__next_block_has_another_parent__waits_for_the_rewind(ledger):
    chain = FakeChain(final_depth=10)
    chain.mine(deposit(1))
    indexer = index(chain, ledger)
    await catch_up(indexer)
    chain.mine(deposit(2))
    block = await chain.call("eth_getBlockByNumber", "0x2", False)
    latest = await chain.call("eth_getBlockByNumber", "latest", False)
    head = await chain.call("eth_getBlockByNumber", "0x1", False)
    final = await chain.call("eth_getBlockByNumber", "0x0", False)
    other_parent = {**block, "parentHash": "0x" + "99" * 32}
    chain.script("eth_getBlockByNumber", latest, latest, final, head, other_parent)
    await indexer.step()
    assert await balances(ledger) == {ACCOUNT: 1}
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 3}


async def test_step__ledger_of_another_chain__stops_for_a_person(ledger):
    chain = FakeChain(final_depth=0)
    chain.skip(5)
    await catch_up(index(chain, ledger))
    other = FakeChain(final_depth=0)
    other._forks = 99  # noqa: SLF001
    other.blocks[0].hash = "0x" + "99" * 32
    other.skip(10)
    with pytest.raises(ChainStateLost):
        await catch_up(index(other, ledger))


# ── Any history ──────────────────────────────────────────────────────────────────────────────────────

ACTIONS = st.one_of(
    st.tuples(st.just("deposit"), st.integers(1, 2**70)),
    st.tuples(st.just("policy"), st.sampled_from([Policy(), Policy(max_per_window=5, window_seconds=60)])),
    st.tuples(st.just("exit"), st.floats(0, 1)),
    st.tuples(st.just("cancel"), st.none()),
)
EVENTS = st.one_of(
    st.tuples(st.just("mine"), st.lists(st.tuples(ACTIONS, st.sampled_from([ADA, BOB])), max_size=3)),
    st.tuples(st.just("reorg"), st.integers(1, 4)),
    st.tuples(st.just("step"), st.none()),
    st.tuples(st.just("fail"), st.sampled_from(["eth_getBlockByNumber", "eth_getLogs"])),
    st.tuples(st.just("restart"), st.none()),
)


def act(action, label):
    name, value = action
    account = ACCOUNT if label == ADA else OTHER

    def run(state):
        wallet = state.accounts[account]
        match name:
            case "deposit":
                return state.deposit(value, label=label)
            case "policy":
                return state.set_policy(account, value) if wallet.entries else []
            case "exit":
                amount = int(wallet.balance * value)
                return state.request_exit(account, amount) if amount else []
            case "cancel":
                return state.cancel_exit(account) if wallet.exit_amount else []

    return run


class Story:
    """A chain and an indexer, and what may happen to them."""

    def __init__(self, url, blocks):
        self._url, self._youngest = url, blocks
        self.chain = FakeChain(final_depth=5, safe_depth=2)
        self.chain.skip(blocks)
        self.ledger = None

    async def restart(self, _=None):
        if self.ledger is not None:
            self.ledger.close()
        self.ledger = Ledger.open(self._url, chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM)
        self.indexer = index(self.chain, self.ledger)

    async def mine(self, actions):
        self.chain.mine(*(act(*action) for action in actions))
        self._youngest = max(self._youngest, self.chain.head.number - 5)

    async def reorg(self, depth):
        """Never beyond what the chain had called final."""
        depth = min(depth, self.chain.head.number - self._youngest)
        if depth > 0:
            self.chain.reorg(depth)
            self.chain.skip(depth)

    async def step(self, _):
        await self.indexer.step()

    async def fail(self, method):
        self.chain.script(method, SILENCE)
        with contextlib.suppress(ChainError):
            await self.indexer.step()
        self.chain.script(method, None)


@given(st.lists(EVENTS, max_size=20), st.sampled_from([0, 5]))
@settings(max_examples=25)
def test_step__any_history__ends_at_what_the_vault_holds(history, blocks):
    async def scenario(folder):
        story = Story(f"sqlite:///{folder}/waterfall.db", blocks)
        await story.restart()
        try:
            for name, value in history:
                await getattr(story, name)(value)
            await catch_up(story.indexer)
            desk = Desk(story.ledger, METER)
            for account, state in story.chain.state.accounts.items():
                if state.entries:
                    record = await desk.record(account)
                    assert record.wallet.balance == state.balance
                    assert record.exit_amount == state.exit_amount
                    assert record.policy == state.policy
        finally:
            story.ledger.close()

    with TemporaryDirectory() as folder:
        asyncio.run(scenario(folder))
