"""Reads the vault's events into the projection, block by block; rewinds when the chain does.

A block is taken away only where a node shows another one in its place. A node that has fewer blocks than we have
read is behind, and shows nothing. What was final is never undone.

Sources: finality tags, https://ethereum.github.io/execution-apis (eth_getBlockByNumber).
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from waterfall.chain.rpc import RpcError, member, quantity
from waterfall.chain.vault import Vault
from waterfall.errors import ChainError, EventsMissing
from waterfall.failpoints import failpoint
from waterfall.ledger import shared
from waterfall.ledger.projection import Block, Events
from waterfall.ledger.store import Ledger
from waterfall.settlement.finality import Finality, Marks
from waterfall.settlement.pace import Alerts, Pace, gather

log = structlog.get_logger()

_RANGE = 2000
_BLOCKS_PER_COMMIT = 20
_HOUR = 3600
_MARKS_SECONDS = 1
"""How often to ask how far finality is while no block comes."""


class ChainStateLost(ChainError):
    """The chain has lost block {number} ({hash}): {reason}. Name the right chain, or `waterfall rebuild`."""

    code = "chain_state_lost"


@dataclass(frozen=True)
class Facts:
    """What the indexer knows of the chain; block numbers, 0 before it has read any."""

    head: int = 0
    spendable: int = 0
    """The newest block whose deposits may be spent."""
    final: int = 0
    """The newest block that is never undone."""
    newest: int = 0
    """The newest block of the chain."""
    reorgs: int = 0
    """Since the start of this process."""
    deepest_reorg: int = 0
    """Of the last hour, in blocks taken back."""
    block_interval: float | None = None
    """Seconds between blocks, as seen lately."""


@dataclass(frozen=True, slots=True)
class _Header:
    block: Block
    parent: str


class Indexer:
    """Keeps the ledger's projection at the chain's head."""

    def __init__(
        self,
        vault: Vault,
        ledger: Ledger,
        finality: Finality,
        *,
        deployed_block: int,
        poll_seconds: float = 0.5,
        max_block_gap: float = float("inf"),
    ) -> None:
        """An indexer.

        Args:
            vault: what to read.
            ledger: where to keep it.
            finality: from when on a deposit may be spent, and from when on nothing is undone.
            deployed_block: the block in which the vault was deployed.
            poll_seconds: how often to look for blocks while none is due.
            max_block_gap: seconds without a new block after which the node is taken for cut off from the chain.
        """
        self._rpc = vault.rpc
        self._vault = vault
        self._ledger = ledger
        self._finality = finality
        self._deployed_block = deployed_block
        self.pace = Pace(poll_seconds)
        self._max_block_gap = max_block_gap
        self._range = _RANGE
        self._marks = Marks(0, 0)
        self._marked_at = float("-inf")
        self._asked_at = float("-inf")
        """When the node was last asked for its newest block."""
        self._anchored = False
        self._reorgs: list[tuple[int, float]] = []
        """Of each, its depth and when it was seen."""
        self._alerts = Alerts()

    @property
    def facts(self) -> Facts:
        """What is known of the chain."""
        head = self._ledger.view.head
        return Facts(
            head=0 if head is None else head.block.number,
            spendable=self._marks.spendable,
            final=self._marks.final,
            newest=self.pace.newest or 0,
            reorgs=len(self._reorgs),
            deepest_reorg=max(
                (depth for depth, at in self._reorgs if time.monotonic() - at < _HOUR), default=0
            ),
            block_interval=self.pace.interval,
        )

    async def step(self) -> bool:
        """Bring the projection closer to the chain's head; whether there was anything to do.

        Raises:
            ChainError: the chain cannot be read.
            EventsMissing: a node has left some out; where that can be, they are read again with the next steps.
            ChainStateLost: it has lost what was final.
        """
        self._asked_at = time.monotonic()
        latest = await self._header("latest")
        self.pace.saw(latest.block.number)
        head = (
            self._ledger.view.head.block if self._ledger.view.head is not None else await self._start(latest)
        )
        if latest.block == head:
            await self._stay(head)
            return False
        if latest.block.number <= head.number:
            return await self._look_back(head, latest.block)
        if latest.block.number == head.number + 1 and latest.parent == head.hash:
            return await self._append(head, [latest], latest)
        return await self._catch_up(head, latest)

    # ── Onward ───────────────────────────────────────────────────────────────────────────────────────

    async def _start(self, latest: _Header) -> Block:
        """Where an empty ledger begins: the block before the vault's; kept, as a reorg may lead back to it."""
        marks = await self._finality.marks(latest.block.number)
        start = (await self._header(hex(max(0, min(self._deployed_block - 1, marks.final))))).block
        first = await self._find(0)
        if first is not None:
            await self._keep_first_block(first.block)
        await self._ledger.view.apply([(start, [])], spendable=start.number, final=start.number)
        log.info("indexing from the start", block=start.number)
        return start

    async def _stay(self, head: Block) -> None:
        """No block has come; finality may have moved all the same."""
        if time.monotonic() - self._marked_at >= _MARKS_SECONDS:
            await self._mark(head.number)
            await self._ledger.view.finalize(spendable=self._marks.spendable, final=self._marks.final)
        if self.pace.waited <= self._max_block_gap:
            self._ledger.view.saw_head()
        elif self._alerts.due("no block"):
            log.error(
                "no block comes: is the node cut off?", head=head.number, seconds=round(self.pace.waited)
            )

    async def _catch_up(self, head: Block, latest: _Header) -> bool:
        """Several blocks have come, or another fork's: go on from the head if it is still of this chain."""
        first, last = head.number + 1, min(head.number + _BLOCKS_PER_COMMIT, latest.block.number)
        is_far = last < latest.block.number
        there, marks, found = await asyncio.gather(
            self._find(head.number),
            self._finality.marks(latest.block.number),
            gather(self._find, () if is_far else range(first, last + 1)),
        )
        if there is None or there.block != head:
            return await self._rewind()
        if is_far and last < marks.final:
            return await self._read_range(head, marks)
        if is_far:
            found = await gather(self._find, range(first, last + 1))
        headers: list[_Header] = []
        parent = head.hash
        for header in found:
            if header is None or header.parent != parent:
                break  # a reorg under way: the next step sees where it leads
            headers.append(header)
            parent = header.block.hash
        return await self._append(head, headers, latest)

    async def _append(self, head: Block, headers: Sequence[_Header], latest: _Header) -> bool:
        """Follow the head, each block by its hash, so that no answer can mix two forks."""
        if not headers:
            return False
        logs = gather(lambda header: self._vault.logs(blockHash=header.block.hash), headers)
        events, _ = await asyncio.gather(logs, self._mark(headers[-1].block.number))
        blocks = [(header.block, found) for header, found in zip(headers, events, strict=True)]
        seen_at = self._asked_at if headers[-1] == latest else None
        await self._apply(head, blocks, self._marks, seen_at)
        return head.number < headers[-1].block.number

    async def _read_range(self, head: Block, marks: Marks) -> bool:
        """Catch up through final blocks, of which only those with events are looked at."""
        first = head.number + 1
        last = min(marks.final, first + self._range - 1)
        try:
            logs = await self._vault.logs(fromBlock=hex(first), toBlock=hex(last))
        except RpcError:
            if self._range == 1:
                raise
            self._range = max(1, self._range // 2)  # nodes limit ranges and answers, each in its own words
            return True
        self._range = min(_RANGE, self._range + self._range // 4 + 1)
        by_block: dict[int, list[Any]] = {last: []}
        for position, event in logs:
            by_block.setdefault(position.block, []).append((position, event))
        headers = await gather(self._header, [hex(number) for number in sorted(by_block)])
        blocks = [(header.block, by_block[header.block.number]) for header in headers]
        # Not beyond what was read: the last block read is where a restart goes on.
        await self._apply(head, blocks, Marks(marks.spendable, last))
        log.info("indexed", first=first, last=last, events=len(logs))
        return True

    async def _apply(
        self,
        head: Block,
        blocks: Sequence[tuple[Block, Events]],
        marks: Marks,
        seen_at: float | None = None,
    ) -> None:
        failpoint("indexer.read")
        try:
            await self._ledger.view.apply(
                blocks, spendable=marks.spendable, final=marks.final, after=head, seen_at=seen_at
            )
        except EventsMissing as error:
            await self.read_again(error)
            raise
        failpoint("indexer.applied")
        if not self._anchored:
            await self._keep_anchor()

    async def _mark(self, latest: int) -> None:
        self._marks = self._marks.at_least(await self._finality.marks(latest))
        self._marked_at = time.monotonic()

    # ── Back ─────────────────────────────────────────────────────────────────────────────────────────

    async def _look_back(self, head: Block, latest: Block) -> bool:
        """The node has no more blocks than we have read: it is behind, or the chain was shortened by a reorg."""
        known = [block for block in await self._ledger.view.recent_blocks() if block.number == latest.number]
        if known == [latest]:
            return self._behind(head)
        if known:
            return await self._rewind()
        await self._check_anchor(head)
        return self._behind(head)

    def _behind(self, head: Block) -> bool:
        """Wait for the node: if it does not come back, the projection grows too old and calls are refused."""
        if self._alerts.due("behind"):
            log.warning("the node is behind", head=head.number)
        return False

    async def _rewind(self) -> bool:
        """Find the newest block that is still of this chain, and undo what was read after it."""
        known: Sequence[Block] = await self._ledger.view.recent_blocks()
        replaced: Block | None = None
        for at in range(0, len(known), _BLOCKS_PER_COMMIT):
            blocks = known[at : at + _BLOCKS_PER_COMMIT]
            found = await gather(self._find, [block.number for block in blocks])
            for block, there in zip(blocks, found, strict=True):
                if there is None:
                    continue
                if there.block != block:
                    replaced = block
                elif replaced is None:
                    return self._behind(known[0])  # the node lacks the newer ones and has others for none
                else:
                    return await self._rewind_to(block, known[0])
        await self._check_anchor(known[0])
        if replaced is None:
            return self._behind(known[0])
        raise ChainStateLost(
            number=replaced.number,
            hash=replaced.hash,
            reason="it was final, and what is final is never undone",
        )

    async def _rewind_to(self, block: Block, head: Block) -> bool:
        depth = head.number - block.number
        log.warning("reorg", back_to=block.number, depth=depth)
        await self._undo_to(block, head)
        self._reorgs.append((depth, time.monotonic()))
        return True

    async def read_again(self, missing: EventsMissing) -> None:
        """Undo what was read after the last block that had all its events, or all that can be undone."""
        log.error("events missing", reason=missing.message)
        known = await self._ledger.view.recent_blocks()
        after = int(str(missing.details["after"]))
        await self._undo_to(next((block for block in known if block.number <= after), known[-1]), known[0])

    async def _undo_to(self, block: Block, head: Block) -> None:
        if block != head:
            await self._ledger.view.rewind(block, head=head)
            self._marks = Marks(min(self._marks.spendable, block.number), self._marks.final)

    async def _keep_anchor(self) -> None:
        """Ledgers that do not know their chain's first block learn it while they follow that chain."""
        if (await self._ledger.read(shared.read)).first_block is None:
            first = await self._find(0)
            if first is not None:
                await self._keep_first_block(first.block)
        self._anchored = True

    async def _keep_first_block(self, first: Block) -> None:
        await self._ledger.write(lambda tx: shared.publish(tx, {shared.FIRST_BLOCK: first.hash}))

    async def _check_anchor(self, head: Block) -> None:
        """None of our blocks is there: another chain shows by its first block."""
        known, first = await asyncio.gather(self._ledger.read(shared.read), self._find(0))
        if known.first_block is not None and first is not None and first.block.hash != known.first_block:
            reason = "and all before; it begins with another block now"
            raise ChainStateLost(number=head.number, hash=head.hash, reason=reason)

    # ── Blocks ───────────────────────────────────────────────────────────────────────────────────────

    async def _header(self, which: str) -> _Header:
        found = await self._rpc.call("eth_getBlockByNumber", which, False)
        if found is None:
            raise ChainError(reason=f"the node has no block {which}")
        return _read(found)

    async def _find(self, number: int) -> _Header | None:
        found = await self._rpc.call("eth_getBlockByNumber", hex(number), False)
        return None if found is None else _read(found)


def _read(found: Any) -> _Header:
    number, timestamp = quantity(member(found, "number")), quantity(member(found, "timestamp"))
    return _Header(Block(number, str(member(found, "hash")), timestamp), str(member(found, "parentHash")))
