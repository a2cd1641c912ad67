"""What a lane's key pays with: fees within the cap, and enough money for what comes after."""

import asyncio
import secrets
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field

from waterfall.chain import vault as calls
from waterfall.chain.fees import FeeAboveCap, Fees, l1_fee, minable_fees, worst_cost
from waterfall.chain.rpc import Rpc, quantity
from waterfall.errors import ChainError
from waterfall.settlement.parts import State
from waterfall.types import Charge


@dataclass(frozen=True, slots=True)
class HeldBack:
    """Why nothing is sent now."""

    state: State
    reason: str


@dataclass
class Purse:
    """The gas money of one key."""

    rpc: Rpc
    address: str
    max_fee_cap: int
    """In wei per gas."""
    worst_gas: int
    """Gas limit of the largest transaction it pays for."""
    batches: int
    """How many of those it must be able to pay for."""
    balance: int | None = field(default=None, init=False)
    """In wei, when last asked."""
    batches_left: float | None = field(default=None, init=False)
    """How many of its dearest transactions that pays for, at the fees of then; None: those are above the cap."""
    short: HeldBack | None = field(default=None, init=False)
    """Why it is not enough, as of then; None: it is."""
    looked_at: float = field(default=float("-inf"), init=False)
    """`time.monotonic()` of then."""
    _l1: int = field(default=0, init=False)
    _has_l1_fee: bool = field(default=True, init=False)
    _dearest: bytes = field(init=False, repr=False)
    """Calldata of the largest transaction."""

    def __post_init__(self) -> None:
        self._dearest = _full_batch(self.worst_gas)

    async def fees(self) -> Fees | HeldBack:
        """Fees that get a transaction mined now, within the cap.

        Raises:
            ChainError
        """
        try:
            return await minable_fees(self.rpc, self.max_fee_cap)
        except FeeAboveCap as error:
            return HeldBack(State.WAITING, error.message)

    async def afford(self, calldata: bytes) -> Fees | HeldBack:
        """The same, if the key has the money for enough of its dearest transactions; `calldata` is of the next.

        Raises:
            ChainError
        """
        # What goes now may be a batch of one charge, and its data far cheaper than that of what comes after.
        fees = await self._count(self._l1_fee(max(calldata, self._dearest, key=len)))
        return fees if isinstance(fees, HeldBack) or self.short is None else self.short

    async def look(self) -> None:
        """Know what is left, though nothing is to be paid for.

        Raises:
            ChainError
        """
        await self._count(asyncio.sleep(0, self._l1))

    async def _count(self, l1_fee: Awaitable[int]) -> Fees | HeldBack:
        """The fees; what the balance pays for at them is known then."""
        fees, balance, self._l1 = await asyncio.gather(self.fees(), self._balance(), l1_fee)
        self.balance, self.looked_at = balance, time.monotonic()
        worst = 0 if isinstance(fees, HeldBack) else worst_cost(self.worst_gas, fees, self._l1)
        self.batches_left = balance / worst if worst else None
        needed = self.batches * worst
        if balance >= needed:
            self.short = None
        else:
            reason = (
                f"{self.address} has {balance} wei, and {needed} would pay for {self.batches} transactions"
            )
            self.short = HeldBack(State.LOW_ON_GAS, f"{reason}: send it some")
        return fees

    async def _balance(self) -> int:
        return quantity(await self.rpc.call("eth_getBalance", self.address, "latest"))

    async def _l1_fee(self, calldata: bytes) -> int:
        """What the data costs on L1; a chain that once took nothing for it is not asked again."""
        if not self._has_l1_fee:
            return 0
        try:
            fee = await l1_fee(self.rpc, calldata)
        except ChainError:
            return 0  # a node that runs no calls must not stop settlement; one that is down says so elsewhere
        self._has_l1_fee = fee > 0
        return fee


def _full_batch(gas: int) -> bytes:
    """A batch of as many charges as a gas limit is for, and of data that no chain compresses, as some do for the fee."""
    base = calls.settle_gas(0)
    charges = [
        Charge(
            account="0x" + secrets.token_hex(32),
            id=secrets.randbits(64),
            amount=secrets.randbits(96),
            receipt_hash="0x" + secrets.token_hex(32),
        )
        for _ in range((gas - base) // (calls.settle_gas(1) - base))
    ]
    return calls.settle(0, charges, secrets.randbits(40), secrets.token_bytes(65))
