import asyncio
import contextlib
from dataclasses import replace
from tempfile import TemporaryDirectory

import pytest
from fake_chain import SILENCE, FakeChain
from hypothesis import given, settings
from hypothesis import strategies as st
from making import ACCOUNT, CHAIN_ID, METER, OTHER, PLATFORM, SALT, USD, VAULT, Desk
from relaying import Clock

from waterfall.chain.rpc import RpcError
from waterfall.chain.vault import Vault
from waterfall.errors import ChainError, EventsMissing, Unavailable
from waterfall.ledger import accounts, schema
from waterfall.ledger.store import Ledger
from waterfall.settlement.finality import Finality
from waterfall.settlement.indexer import ChainStateLost, Indexer
from waterfall.types import Policy

ADA, BOB = accounts.label_hash(SALT, "ada"), accounts.label_hash(SALT, "bob")


@pytest.fixture
def clock(monkeypatch):
    return Clock().install(monkeypatch)


def index(chain, ledger, *, finality="safe", final_depth=64, **options):
    options = {"deployed_block": 0, **options}
    return Indexer(Vault(chain, VAULT), ledger, Finality(chain, finality, final_depth), **options)


async def catch_up(indexer, most=200):
    steps = 0
    while await indexer.step():
        steps += 1
        assert steps < most, "it never arrives"
    return steps


def deposit(amount, label=ADA):
    return lambda state: state.deposit(amount, label=label)


async def followed(ledger, amounts, **depths):
    """A chain with a block for a deposit of each amount, and the indexer that has read it."""
    chain = FakeChain(**depths)
    for amount in amounts:
        chain.mine(deposit(amount))
    indexer = index(chain, ledger)
    await catch_up(indexer)
    return chain, indexer


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
    assert (ledger.view.head.block.number, ledger.view.head.block.hash) == (9, chain.head.hash)
    assert ledger.block_time(60) == chain.head.timestamp


async def test_step__far_behind__calls_are_refused_until_the_head_is_read(ledger):
    """After an outage an old balance is read first: what was spent since, only at the head."""
    chain, indexer = await followed(ledger, [5], final_depth=1000)
    ledger.view.head = replace(ledger.view.head, seen_at=float("-inf"))
    chain.skip(100)
    chain.mine(lambda state: state.request_exit(ACCOUNT, 5))
    while await indexer.step():
        if ledger.view.head.block.number < 102:
            with pytest.raises(Unavailable):
                ledger.block_time(60)
    assert ledger.block_time(60) == chain.head.timestamp


async def test_step__reorg__view_is_no_fresher_than_before(ledger):
    chain, indexer = await followed(ledger, range(1, 6), final_depth=20)
    seen_at = ledger.view.head.seen_at
    chain.reorg(2)
    chain.mine()
    assert await indexer.step()
    assert (ledger.view.head.block.number, ledger.view.head.seen_at) == (3, seen_at)


async def test_step__node_lacks_a_block_below_finality__head_is_kept_and_goes_on(ledger, monkeypatch):
    """What is final may be beyond what is read: without the head, which is kept all the same, no step could go on."""
    chain, indexer = await followed(ledger, [1], final_depth=1)
    for amount in range(2, 8):
        chain.mine(deposit(amount))
    answer = chain.call

    async def without(method, *parameters):
        lacks = method == "eth_getBlockByNumber" and parameters[0] == "0x4"
        return None if lacks else await answer(method, *parameters)

    monkeypatch.setattr(chain, "call", without)
    assert await indexer.step()
    assert [block.number for block in await ledger.view.recent_blocks()] == [3]
    monkeypatch.undo()
    await catch_up(indexer)
    assert ledger.view.head.block.hash == chain.head.hash
    assert await balances(ledger) == truth(chain)


async def test_step__nothing_new__says_so_and_sees_the_head(ledger):
    _, indexer = await followed(ledger, [1])
    before = ledger.view.head.seen_at
    assert await indexer.step() is False
    assert ledger.view.head.seen_at > before


async def test_step__deployed_late__starts_there(ledger):
    chain = FakeChain(final_depth=2)
    chain.skip(50)
    chain.mine(deposit(5))
    chain.skip(50)
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
    chain.skip(50)
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


@pytest.mark.parametrize(
    "answer",
    [
        None,
        (-32000, "finalized block not found"),
        (-32001, "block not found: finalized"),
        (-39001, "Unknown block"),
    ],
)
async def test_step__node_knows_no_final_block_yet__nothing_becomes_final_by_depth(
    ledger, monkeypatch, answer
):
    """As after a node's restart, until its consensus client has spoken."""
    chain = FakeChain(final_depth=2)
    chain.mine(deposit(USD))
    indexer = index(chain, ledger, finality="finalized", final_depth=1)
    await catch_up(indexer)
    ask = chain.call

    async def silent(method, *parameters):
        if method != "eth_getBlockByNumber" or parameters[0] != "finalized":
            return await ask(method, *parameters)
        if answer is None:
            return None
        code, reason = answer
        raise RpcError(method=method, reason=reason, data=None, code=code)

    monkeypatch.setattr(chain, "call", silent)
    chain.skip(10)
    await catch_up(indexer)
    await catch_up(index(chain, ledger, finality="finalized", final_depth=1))
    assert (await Desk(ledger, METER).wallet(ACCOUNT)).pending == USD
    monkeypatch.undo()
    chain.skip(1)
    await catch_up(indexer)
    assert (await Desk(ledger, METER).wallet(ACCOUNT)).pending == 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (-32000, "Unable to complete request at this time."),
        (-32603, "backend response too old"),
        (-32602, "invalid argument 0: hex string without 0x prefix"),  # of one that is older than the others
    ],
)
async def test_step__chain_has_the_tag_and_a_node_says_no__nothing_becomes_final_by_depth(
    ledger, code, reason
):
    chain, indexer = await followed(ledger, [USD], final_depth=2)
    chain.skip(10, seconds=1)
    chain.final_depth = 11
    chain.script("eth_getBlockByNumber", None)
    ask = chain._eth_getBlockByNumber  # noqa: SLF001

    def refuses(which, full):
        if which == "finalized":
            raise RpcError(method="eth_getBlockByNumber", reason=reason, data=None, code=code)
        return ask(which, full)

    chain._eth_getBlockByNumber = refuses  # noqa: SLF001
    indexer = index(chain, ledger, finality="finalized", final_depth=1) if code != -32602 else indexer
    with pytest.raises(RpcError):
        await catch_up(indexer)
    assert ledger.view.head.block.number == 1


async def test_step__deposit_becomes_final__counts_without_a_new_event(ledger, clock):
    chain, indexer = await followed(ledger, [USD], safe_depth=3)
    desk = Desk(ledger, METER)
    assert (await desk.wallet(ACCOUNT)).pending == USD
    chain.safe_depth = 0  # the tag moves while no block comes
    clock.seconds += 1
    assert await indexer.step() is False
    assert (await desk.wallet(ACCOUNT)).pending == 0


# ── Events that a node leaves out ────────────────────────────────────────────────────────────────────


async def test_step__node_left_a_deposit_out__shows_with_the_next_line_and_is_read_again(ledger):
    chain, indexer = await followed(ledger, [5], final_depth=20)
    chain.script("eth_getLogs", [])
    chain.mine(deposit(7))
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 5}
    chain.mine(deposit(9))
    with pytest.raises(EventsMissing, match=r"line 2 .* line 3 follows"):
        await indexer.step()
    await catch_up(indexer)
    assert await balances(ledger) == truth(chain)


async def test_step__what_was_left_out_is_final__goes_no_further_and_says_what_to_do(ledger):
    chain, indexer = await followed(ledger, [5], final_depth=1)
    chain.script("eth_getLogs", [])
    chain.mine(deposit(7))
    await catch_up(indexer)
    chain.skip(5)
    await catch_up(indexer)
    head = ledger.view.head
    chain.mine(deposit(9))
    for _ in range(3):
        with pytest.raises(EventsMissing, match="waterfall rebuild"):
            await catch_up(indexer)
    assert ledger.view.head.block.number <= head.block.number, "so that the view ages, and calls are refused"
    await ledger.view.rebuild()
    await catch_up(index(chain, ledger))
    assert await balances(ledger) == truth(chain)


# ── A chain that stands still ────────────────────────────────────────────────────────────────────────


async def test_step__no_block_for_too_long__counts_as_not_seen(ledger, clock):
    """A node that is cut off from the chain answers as before."""
    chain = FakeChain()
    chain.mine(deposit(1))
    indexer = index(chain, ledger, max_block_gap=120)
    await catch_up(indexer)
    seen = []
    for _ in range(130):
        clock.seconds += 1
        before = ledger.view.head.seen_at
        await indexer.step()
        seen.append(ledger.view.head.seen_at > before)
    assert seen == [True] * 120 + [False] * 10
    chain.skip()
    before = ledger.view.head.seen_at
    await catch_up(indexer)
    assert ledger.view.head.seen_at > before


# ── Reorgs ───────────────────────────────────────────────────────────────────────────────────────────


async def test_step__deposit_reorged_away__is_gone(ledger):
    chain, indexer = await followed(ledger, [1], final_depth=10)
    chain.mine(deposit(2))
    chain.mine(deposit(4, BOB))
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 3, OTHER: 4}
    chain.reorg(2)
    chain.skip(3)
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 1, OTHER: 0}
    assert ledger.view.head.block.hash == chain.head.hash


async def test_step__shorter_fork__is_followed(ledger):
    chain, indexer = await followed(ledger, [1] * 5, final_depth=10)
    chain.reorg(3)
    chain.mine(deposit(7))
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 9}
    assert ledger.view.head.block.number == 3


async def test_step__whole_chain_of_a_young_vault_replaced__is_followed(ledger):
    """A reorg back to the block where indexing began is a reorg like any other."""
    chain, indexer = await followed(ledger, [1] * 3, final_depth=64)
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
    chain, indexer = await followed(ledger, [1] * 10, final_depth=2)
    before = await balances(ledger)
    chain.reorg(9)
    chain.skip(20)
    with pytest.raises(ChainStateLost):
        await catch_up(indexer)
    assert await balances(ledger) == before


@pytest.mark.parametrize("back", [1, 3, 6, 9], ids=lambda n: f"{n} blocks behind")
async def test_step__node_falls_behind__nothing_is_undone_and_nothing_counts_as_seen(ledger, clock, back):
    """A replica that is a few blocks late is no reorg (the last two cases: behind all that is not final)."""
    chain = FakeChain(final_depth=4)
    for _ in range(9):
        chain.mine(deposit(1))
    indexer = index(chain, ledger, finality="latest")
    await catch_up(indexer)
    seen_at = ledger.view.head.seen_at
    ahead = chain.blocks[-back:]
    del chain.blocks[-back:]
    for _ in range(5):
        clock.seconds += 1
        chain.asked.clear()
        assert await indexer.step() is False
        assert len(chain.asked) <= 2, "waiting is cheap"
    assert await balances(ledger) == {ACCOUNT: 9}
    assert (ledger.view.head.block.number, ledger.view.head.seen_at) == (9, seen_at)
    assert indexer.facts.reorgs == 0
    chain.blocks += ahead
    chain.mine(deposit(1))
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 10}


async def test_step__newest_block_from_one_node_and_the_head_from_one_behind__waits(ledger):
    chain, indexer = await followed(ledger, [1], final_depth=10)
    chain.skip(2)
    answer = chain.call

    async def call(method, *parameters):
        if method == "eth_getBlockByNumber" and parameters[0] == "0x1":
            return None
        return await answer(method, *parameters)

    chain.call = call
    assert await indexer.step() is False
    assert ledger.view.head.block.number == 1
    chain.call = answer
    await catch_up(indexer)
    assert ledger.view.head.block.number == 3


async def test_step__another_fork_was_shown_and_is_gone_when_looked_for__nothing_is_undone(ledger):
    chain, indexer = await followed(ledger, [1] * 5, final_depth=10)
    latest = await chain.call("eth_getBlockByNumber", "latest", False)
    chain.script("eth_getBlockByNumber", {**latest, "hash": "0x" + "99" * 32})
    assert await indexer.step() is False
    assert (await balances(ledger), indexer.facts.reorgs) == ({ACCOUNT: 5}, 0)


async def test_step__spendable_by_depth__is_counted_on_the_fork_that_is_followed(ledger):
    """What was deep enough on the fork before says nothing of blocks that are new."""
    chain = FakeChain(final_depth=20)
    chain.skip(10)
    indexer = index(chain, ledger, finality=3)
    await catch_up(indexer)
    chain.reorg(6)
    for _ in range(3):
        chain.mine(deposit(USD))
    await catch_up(indexer)
    assert (await Desk(ledger, METER).wallet(ACCOUNT)).pending == 3 * USD


@pytest.mark.parametrize("depth", [1, 2, 5, 19])
async def test_step__reorg_of_any_depth_above_the_final__is_followed(ledger, depth, clock):
    chain, indexer = await followed(ledger, [1] * 40, final_depth=20)
    chain.reorg(depth)
    for _ in range(depth + 1):
        chain.mine(deposit(2))
    await catch_up(indexer)
    assert await balances(ledger) == truth(chain) == {ACCOUNT: 40 - depth + 2 * (depth + 1)}
    assert (indexer.facts.reorgs, indexer.facts.deepest_reorg) == (1, depth)
    clock.seconds += 3600
    assert (indexer.facts.reorgs, indexer.facts.deepest_reorg) == (1, 0), "of the last hour"


async def test_step__reorg_between_two_answers__never_mixes_two_forks(ledger):
    """The logs asked for by a block's hash are gone when they are asked for."""
    chain, indexer = await followed(ledger, [1], final_depth=10)
    chain.mine(deposit(2))
    chain.script("eth_getLogs", RpcError(method="eth_getLogs", reason="unknown block", data=None))
    with pytest.raises(ChainError):
        await indexer.step()
    chain.reorg(1)
    chain.mine(deposit(4))
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 5}


async def test_step__next_block_has_another_parent__waits_for_the_rewind(ledger):
    chain, indexer = await followed(ledger, [1], final_depth=10)
    chain.mine(deposit(2))
    chain.mine(deposit(4))
    answer = chain.call

    async def call(method, *parameters):
        found = await answer(method, *parameters)
        if method == "eth_getBlockByNumber" and parameters[0] == "0x2":
            return {**found, "parentHash": "0x" + "99" * 32}
        return found

    chain.call = call
    assert await indexer.step() is False
    assert await balances(ledger) == {ACCOUNT: 1}
    chain.call = answer
    await catch_up(indexer)
    assert await balances(ledger) == {ACCOUNT: 7}


def restarted(chain, blocks):
    """The same chain from nothing: another first block."""
    other = FakeChain(final_depth=chain.final_depth)
    other._forks = 99  # noqa: SLF001
    other.blocks[0].hash = "0x" + "99" * 32
    other.skip(blocks)
    return other


@pytest.mark.parametrize("blocks", [0, 1, 4, 5, 6, 30])
async def test_step__chain_restarted_empty__stops_for_a_person_however_long_it_is(
    ledger, open_ledger, blocks
):
    chain = FakeChain(final_depth=2)
    chain.mine(deposit(1))
    chain.skip(5)
    await catch_up(index(chain, ledger))
    ledger.close()
    again = open_ledger()
    with pytest.raises(ChainStateLost, match=r"has lost block 6 .* begins with another block"):
        await catch_up(index(restarted(chain, blocks), again))
    assert await balances(again) == {ACCOUNT: 1}


async def test_step__chain_lost_its_newest_blocks__stops_once_it_has_others_where_ours_were_final(ledger):
    chain, indexer = await followed(ledger, [1] * 10, final_depth=2)
    chain.reorg(6)
    assert await indexer.step() is False, "so far it may only be behind"
    for _ in range(3):
        chain.mine()
        assert await indexer.step() is False
    chain.mine()
    with pytest.raises(ChainStateLost, match=r"has lost block 8 .* never undone"):
        await indexer.step()
    assert await balances(ledger) == {ACCOUNT: 10}


async def test_step__ledger_that_does_not_know_its_first_block__learns_it(ledger, open_ledger):
    chain = FakeChain(final_depth=2)
    chain.skip(5)
    await catch_up(index(chain, ledger))
    await ledger.write(lambda tx: tx.run(schema.meta.delete().where(schema.meta.c.key == "first_block")))
    ledger.close()
    again = open_ledger()
    chain.mine(deposit(1))
    await catch_up(index(chain, again))
    with pytest.raises(ChainStateLost, match="begins with another block"):
        await catch_up(index(restarted(chain, 2), again))


# ── What it asks ─────────────────────────────────────────────────────────────────────────────────────


async def test_step__nothing_new__asks_for_the_newest_block_and_once_a_second_for_finality(ledger, clock):
    chain = FakeChain()
    chain.skip(3)
    indexer = index(chain, ledger)
    await catch_up(indexer)
    chain.asked.clear()
    for _ in range(10):
        clock.seconds += 0.25
        await indexer.step()
    tags = [which for which, _ in chain.sent("eth_getBlockByNumber")]
    assert tags.count("latest") == len(chain.asked) - tags.count("safe") - tags.count("finalized") == 10
    assert tags.count("safe") == tags.count("finalized") == 2


async def test_step__one_new_block__two_rounds_of_questions(ledger):
    chain = Rounds(final_depth=3)
    chain.skip(5)
    indexer = index(chain, ledger)
    await catch_up(indexer)
    chain.mine(deposit(1))
    chain.rounds = []
    await indexer.step()
    assert chain.rounds == [["latest"], ["eth_getBlockByHash", "eth_getLogs", "finalized", "safe"]]


async def test_step__some_new_blocks__three_rounds_of_questions(ledger):
    chain = Rounds(final_depth=30)
    chain.skip(5)
    indexer = index(chain, ledger)
    await catch_up(indexer)
    chain.skip(6)
    chain.rounds = []
    await indexer.step()
    assert len(chain.rounds) == 3
    assert ledger.view.head.block.number == 11


class Rounds(FakeChain):
    """Answers what is asked at the same time together, as if it was far away."""

    rounds = ()

    async def call(self, method, *parameters):
        open_ = getattr(self, "_open", None)
        if open_ is None:
            open_ = self._open = []
            self.rounds = [*self.rounds, open_]
            asyncio.get_running_loop().call_later(0.01, lambda: setattr(self, "_open", None))
        open_.append(parameters[0] if method == "eth_getBlockByNumber" else method)
        open_.sort()
        await asyncio.sleep(0.01)
        return await super().call(method, *parameters)

    async def batch(self, calls):
        return await asyncio.gather(*(self.call(method, *parameters) for method, parameters in calls))


async def test_step__catching_up__each_block_of_a_range_is_looked_up_once(ledger):
    chain = FakeChain(final_depth=0)
    for amount in range(1, 50):
        chain.mine(deposit(amount))
    await catch_up(index(chain, ledger))
    looked_up = [which for which, _ in chain.sent("eth_getBlockByNumber") if which.startswith("0x")]
    assert max(looked_up.count(which) for which in looked_up if which not in {"0x0", "0x31"}) == 1


async def test_step__range_refused_once__grows_again(ledger):
    chain = FakeChain(final_depth=0)
    chain.skip(60_000)
    chain.range_limit = 100
    indexer = index(chain, ledger)
    for _ in range(30):
        await indexer.step()
    chain.range_limit = 10**9
    await catch_up(indexer)
    asked = [c for (c,) in chain.sent("eth_getLogs") if "fromBlock" in c]
    widths = [int(c["toBlock"], 16) - int(c["fromBlock"], 16) + 1 for c in asked]
    assert min(widths) < 100
    assert widths[-2] > 1000


async def test_step__killed_while_catching_up__goes_on_where_it_was(ledger, open_ledger):
    chain = FakeChain(final_depth=0)
    chain.range_limit = 25
    for amount in range(1, 90):
        chain.mine(deposit(amount))
    indexer = index(chain, ledger)
    while ledger.view.head is None or ledger.view.head.block.number == 0:
        await indexer.step()
    read = ledger.view.head.block.number
    assert 0 < read < 89
    ledger.close()
    again = open_ledger()
    assert again.view.head.block.number == read
    await catch_up(index(chain, again))
    assert await balances(again) == truth(chain)


# ── Any history ──────────────────────────────────────────────────────────────────────────────────────

ACTIONS = st.one_of(
    st.tuples(st.just("deposit"), st.integers(1, 2**70)),
    st.tuples(st.just("policy"), st.sampled_from([Policy(), Policy(max_per_window=5, window_seconds=60)])),
    st.tuples(st.just("exit"), st.fractions(0, 1)),
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
