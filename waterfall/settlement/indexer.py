"""Reads the vault's events into the projection, block by block; rewinds when the chain does.

Sources: finality tags, https://ethereum.github.io/execution-apis (eth_getBlockByNumber).
"""

from collections.abc import Sequence
from typing import Any

import structlog

from waterfall.chain.rpc import RpcError
from waterfall.chain.vault import Vault
from waterfall.errors import ChainError
from waterfall.ledger.projection import Block, Events
from waterfall.ledger.store import Ledger

log = structlog.get_logger()

_RANGE = 2000
_BLOCKS_PER_COMMIT = 50


class ChainStateLost(ChainError):
    """The chain has lost block {number} ({hash}) and all before: name the right chain, or `waterfall rebuild`."""

    code = "chain_state_lost"


class Indexer:
    """Keeps the ledger's projection at the chain's head."""

    def __init__(
        self, vault: Vault, ledger: Ledger, *, deployed_block: int, finality: str | int, final_depth: int
    ) -> None:
        """An indexer.

        Args:
            vault: what to read.
            ledger: where to keep it.
            deployed_block: the block in which the vault was deployed.
            finality: from when on a deposit may be spent: `latest`, `safe`, `finalized`, or a depth in blocks.
            final_depth: depth at which a block is final on chains without the `finalized` tag.
        """
        self._rpc = vault.rpc
        self._vault = vault
        self._ledger = ledger
        self._deployed_block = deployed_block
        self._finality = finality
        self._final_depth = final_depth
        self._range = _RANGE

    async def step(self) -> bool:
        """Bring the projection closer to the chain's head; whether there was anything to do.

        Raises:
            ChainError: the chain cannot be read, or has lost the ledger's blocks.
        """
        latest = _block(await self._rpc.call("eth_getBlockByNumber", "latest", False))
        spendable = await self._number(self._finality, latest)
        final = await self._number("finalized", latest)
        head = self._ledger.head.block if self._ledger.head is not None else await self._start(final)
        if head.number > latest.number or not await self._is_canonical(head):
            await self._rewind()
            return True
        if head.number == latest.number:
            await self._ledger.finalize(spendable=spendable, final=final)
            self._ledger.saw_head()
            return False
        if head.number < final:
            await self._read_range(head.number + 1, final, spendable=spendable, final=final)
        else:
            await self._read_blocks(head, latest.number, spendable=spendable, final=final)
        return True

    async def _start(self, final: int) -> Block:
        """Where an empty ledger begins: the block before the vault's; kept, as a reorg may lead back to it."""
        start = await self._block(max(0, min(self._deployed_block - 1, final)))
        await self._ledger.apply([(start, [])], spendable=start.number, final=start.number)
        log.info("indexing from the start", block=start.number)
        return start

    async def _number(self, finality: str | int, latest: Block) -> int:
        if finality == "latest":
            return latest.number
        if isinstance(finality, int):
            return max(0, latest.number - finality)
        try:
            block = await self._rpc.call("eth_getBlockByNumber", finality, False)
        except RpcError:
            block = None  # this chain has no such tag
        return _block(block).number if block else max(0, latest.number - self._final_depth)

    async def _block(self, number: int) -> Block:
        found = await self._rpc.call("eth_getBlockByNumber", hex(number), False)
        if found is None:
            raise ChainError(reason=f"the node has no block {number}")
        return _block(found)

    async def _is_canonical(self, block: Block) -> bool:
        found = await self._rpc.call("eth_getBlockByNumber", hex(block.number), False)
        return found is not None and found["hash"] == block.hash

    async def _read_range(self, first: int, last: int, *, spendable: int, final: int) -> None:
        """Catch up through final blocks, of which only those with events are looked at."""
        last = min(last, first + self._range - 1)
        try:
            logs = await self._vault.logs(fromBlock=hex(first), toBlock=hex(last))
        except RpcError:
            if self._range == 1:
                raise
            self._range = max(1, self._range // 4)  # nodes limit ranges and answers, each in its own words
            return
        by_block: dict[int, list[Any]] = {}
        for position, event in logs:
            by_block.setdefault(position.block, []).append((position, event))
        blocks = [(await self._block(number), by_block[number]) for number in sorted(by_block)]
        if last not in by_block:
            blocks.append((await self._block(last), []))
        await self._ledger.apply(blocks, spendable=spendable, final=final)
        log.info("indexed", first=first, last=last, events=len(logs))

    async def _read_blocks(self, head: Block, last: int, *, spendable: int, final: int) -> None:
        """Follow the head, each block by its hash, so that no answer can mix two forks."""
        blocks: list[tuple[Block, Events]] = []
        for number in range(head.number + 1, min(last, head.number + _BLOCKS_PER_COMMIT) + 1):
            found = await self._rpc.call("eth_getBlockByNumber", hex(number), False)
            if found is None or found["parentHash"] != head.hash:
                break  # a reorg under way: the next step sees where it leads
            head = _block(found)
            blocks.append((head, await self._vault.logs(blockHash=head.hash)))
        if blocks:
            await self._ledger.apply(blocks, spendable=spendable, final=final)

    async def _rewind(self) -> None:
        known: Sequence[Block] = await self._ledger.recent_blocks()
        for block in known:
            if await self._is_canonical(block):
                log.warning("reorg", back_to=block.number, depth=known[0].number - block.number)
                await self._ledger.rewind(block)
                return
        raise ChainStateLost(number=known[0].number, hash=known[0].hash)


def _block(found: Any) -> Block:
    return Block(int(found["number"], 16), found["hash"], int(found["timestamp"], 16))
