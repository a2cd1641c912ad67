"""What lanes send, and where it comes from."""

from dataclasses import dataclass
from typing import Protocol

from waterfall.chain.rpc import Rpc, RpcError
from waterfall.chain.vault import refusal
from waterfall.errors import ChainError
from waterfall.ledger.slots import Slot
from waterfall.types import Charge

_REVERTS = ("revert", "out of gas", "evm error", "invalid opcode")
"""What nodes say of a call that was run and failed; anything else is about the node, not the call."""


@dataclass(frozen=True)
class Work:
    """Something to send."""

    purpose: str
    target: str
    calldata: bytes
    gas: int
    reference: str | None = None
    deadline: int = 0
    """Block time after which it would revert; 0: none."""
    charges: tuple[Charge, ...] = ()


@dataclass(frozen=True)
class Later:
    """There will be something to send, and it should not be sent yet."""

    seconds: float
    """After which to ask again."""


@dataclass(frozen=True)
class Outcome:
    """What became of a slot's transaction, once mined."""

    succeeded: bool
    out_of_gas: bool = False
    """It reverted and had used all it was given."""
    charges: tuple[Charge, ...] = ()
    """What it carried, if it reverted."""


class Source(Protocol):
    """A kind of work. A lane's sources are asked in their order."""

    @property
    def purpose(self) -> str:
        """Of its work and of the slots that carry it."""

    async def next_work(self) -> Work | Later | None:
        """What to send next, if anything.

        Raises:
            LaneHalted: nothing more may be sent.
        """

    async def renew_work(self, slot: Slot) -> Work:
        """The same slot's work again, to be mined instead: with a later deadline."""

    async def smaller_work(self, slot: Slot) -> Work | None:
        """Less of a slot's work, to be mined instead, as nodes refuse so much gas; None: it cannot be less."""

    async def mined(self, slot: Slot, outcome: Outcome) -> None:
        """Told of every slot of this purpose whose transaction was mined.

        Raises:
            LaneHalted: nothing more may be sent.
        """


async def revert_reason(rpc: Rpc, sender: str, work: Work | Slot) -> str | None:
    """Why a transaction would revert, as the node tells when asked to run it; None: it would not.

    Raises:
        RpcError: the node would not run it, or says so in words that nobody knows.
        RpcUnavailable: it does not answer.
    """
    call = {"from": sender, "to": work.target, "data": "0x" + work.calldata.hex(), "gas": hex(work.gas)}
    try:
        await rpc.call("eth_call", call, "latest")
    except RpcError as error:
        data, reason = error.details.get("data"), str(error.details["reason"])
        if isinstance(data, str) or any(word in reason.lower() for word in _REVERTS):
            return refusal(data) or reason
        raise
    return None


async def why_reverted(rpc: Rpc, slot: Slot) -> str | None:
    """Why a slot's transaction reverted; None where the node has nothing to say: it may be different by now."""
    try:
        return await revert_reason(rpc, slot.signer, slot)
    except ChainError:
        return None
