"""How far the chain is final: by its own tags where it has them, by depth elsewhere.

Source: https://ethereum.github.io/execution-apis (eth_getBlockByNumber, `safe` and `finalized`).
"""

import asyncio
from dataclasses import dataclass, field

from waterfall.chain.refusals import Fault, fault, has_no_block_yet
from waterfall.chain.rpc import Rpc, RpcError, member, quantity


@dataclass(frozen=True, slots=True)
class Marks:
    """Two block numbers."""

    spendable: int
    """Up to here deposits may be spent."""
    final: int
    """Up to here nothing is ever undone."""

    def at_least(self, other: "Marks") -> "Marks":
        """The further of both: a node that is behind takes nothing back."""
        return Marks(max(self.spendable, other.spendable), max(self.final, other.final))


@dataclass
class Finality:
    """From when on a block counts."""

    rpc: Rpc
    spendable: str | int
    """From when on a deposit may be spent: `latest`, `safe`, `finalized`, or a depth in blocks."""
    final_depth: int
    """Depth at which a block is final on chains without the tags."""
    _tags: set[str] = field(default_factory=set, init=False)
    """Those that this chain was seen to have: a node that refuses one of them is no reason to go by depth."""

    async def marks(self, latest: int) -> Marks:
        """How far the chain is now, if its newest block is `latest`.

        Raises:
            ChainError
        """
        if self.spendable == "finalized":
            final = await self._mark("finalized", latest)
            return Marks(final, final)
        return Marks(
            *await asyncio.gather(self._mark(self.spendable, latest), self._mark("finalized", latest))
        )

    async def _mark(self, finality: str | int, latest: int) -> int:
        if finality == "latest":
            return latest
        if isinstance(finality, int):
            return max(0, latest - finality)
        try:
            block = await self.rpc.call("eth_getBlockByNumber", finality, False)
        except RpcError as error:
            code, reason = error.details["code"], str(error.details["reason"])
            if has_no_block_yet(code, reason):
                return 0  # that says nothing of the chain, and least of all that a depth would do
            if finality in self._tags or fault(code, reason) is not Fault.REQUEST:
                raise
            return max(0, latest - self.final_depth)  # this chain has no such tag
        if not block:
            return 0
        self._tags.add(finality)
        return quantity(member(block, "number"))
