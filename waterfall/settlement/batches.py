"""Batches of the charges that wait, signed by the meter."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import structlog

from waterfall.chain import vault as calls
from waterfall.chain.rpc import Rpc, member, quantity
from waterfall.errors import ChainError, LaneHalted, LedgerError
from waterfall.ledger import slots
from waterfall.ledger.slots import Slot
from waterfall.ledger.store import Ledger
from waterfall.receipts import Domain, settlement_digest
from waterfall.settlement.work import Later, Outcome, Work, revert_reason, why_reverted
from waterfall.signers import Signer
from waterfall.types import Charge

log = structlog.get_logger()

_NOT_A_METER, _LATE = "NotAMeter(", "DeadlinePassed("
_MOST_ALONE = 3
"""How often a charge may revert alone without the node knowing why."""
_BATCH_SECONDS = 30 * 60
_SHARE_OF_A_BLOCK = 0.5
_LOOKS = 4
"""How often to see whether a batch is full while it is gathered."""


@dataclass
class Batches:
    """What the lanes of all gas keys settle.

    A batch goes at once while no other is on its way. While one is, the next is gathered for half a block first,
    unless it is full: with two lanes, half of what is captured between two blocks is so still in the next one.
    """

    rpc: Rpc
    ledger: Ledger
    meter: Signer
    most_charges: int
    is_in_flight: Callable[[], bool] = lambda: False
    """Whether any lane has a batch on its way."""
    block_interval: Callable[[], float | None] = lambda: None
    """Seconds between blocks, if known."""
    gather_seconds: float | None = None
    """How long to gather instead of half a block."""
    purpose: ClassVar[str] = "settle"
    _limit: int = field(init=False)
    _suspects: set[int] = field(default_factory=set, init=False)
    """Ids of charges that were in a batch that reverted: tried out before they are sent again."""
    _alone: Counter[int] = field(default_factory=Counter, init=False)
    _gathering_since: float | None = field(default=None, init=False)
    _halted: str | None = field(default=None, init=False)
    _domain: Domain = field(init=False)

    def __post_init__(self) -> None:
        self._limit = self.most_charges
        self._domain = Domain(self.ledger.chain_id, self.ledger.vault)

    async def next_work(self) -> Work | Later | None:
        """The next batch, if charges wait.

        Raises:
            LaneHalted: the chain shows what the journal cannot explain, or the meter was retired.
        """
        halted = self.ledger.view.mismatches[0] if self.ledger.view.mismatches else self._halted
        if halted is not None:
            raise LaneHalted(reason=halted)
        if self.is_in_flight():
            waiting = await self.ledger.read(lambda c: slots.count_queued(c, self._limit))
            wait = self._wait(waiting) if waiting else 0
            if wait > 0:
                return Later(wait)
        while charges := tuple(await self.ledger.read(lambda c: slots.queued_charges(c, self._limit))):
            work = await self._batch(charges)
            if not self._suspects.isdisjoint(charge.id for charge in charges):
                tried = await self._try_out(work)
                if tried is None:
                    continue
                work = tried
            self._gathering_since = None
            return work
        return None

    async def renew_work(self, slot: Slot) -> Work:
        """The same charges with a later deadline; what nothing is left of goes once more as it was, for its nonce."""
        charges = await self.ledger.read(lambda c: slots.batched_charges(c.execute, slot))
        if charges:
            return await self._batch(tuple(charges))
        return Work(slot.purpose, slot.target, slot.calldata, slot.gas)

    async def smaller_work(self, slot: Slot) -> Work | None:
        """Half of the charges; the others go back to the queue, for batches that are no larger."""
        charges = await self.ledger.read(lambda c: slots.batched_charges(c.execute, slot))
        if len(charges) <= 1:
            return None
        self._limit = len(charges) // 2
        log.warning("batch too large for the nodes", nonce=slot.nonce, charges=len(charges), gas=slot.gas)
        return await self._batch(tuple(charges[: self._limit]))

    async def mined(self, slot: Slot, outcome: Outcome) -> None:
        """After a revert, try out and halve; a charge that reverts alone is set aside.

        Raises:
            LaneHalted: no batch can succeed.
        """
        if outcome.succeeded:
            self._limit = min(2 * self._limit, self.most_charges)
            return
        if not outcome.charges:
            return  # it went once more for its nonce alone
        reason = await why_reverted(self.rpc, slot)
        log.error(
            "batch reverted",
            nonce=slot.nonce,
            charges=len(outcome.charges),
            out_of_gas=outcome.out_of_gas,
            reason=reason or "not known",
        )
        self._refuse_meter(reason)
        if reason is not None and reason.startswith(_LATE):
            return  # nothing is wrong with its charges
        self._suspects.update(charge.id for charge in outcome.charges)
        self._limit = max(1, len(outcome.charges) // 2)
        if len(outcome.charges) == 1:
            (charge,) = outcome.charges
            self._alone[charge.id] += 1
            if reason is not None or self._alone[charge.id] >= _MOST_ALONE:
                await self._set_aside(charge, reason or "only when it is mined, not when it is tried out")

    # ── Inside ───────────────────────────────────────────────────────────────────────────────────────

    def _wait(self, waiting: int) -> float:
        """Seconds to gather more, while so many charges wait and a batch is on its way."""
        now = time.monotonic()
        if self._gathering_since is None:
            self._gathering_since = now
        if waiting >= self._limit:
            return 0
        seconds = self.gather_seconds
        if seconds is None:
            seconds = _SHARE_OF_A_BLOCK * (self.block_interval() or 0)
        left = self._gathering_since + seconds - now
        return 0 if left <= 0 else min(left, max(seconds / _LOOKS, 0.001))

    async def _try_out(self, work: Work) -> Work | None:
        """The part of a batch that would not revert; None when a charge that would, alone, was set aside."""
        while True:
            try:
                reason = await revert_reason(self.rpc, self.meter.address, work)
            except ChainError as error:
                log.warning("cannot be tried out", charges=len(work.charges), reason=error.message)
                return work  # then the chain has to say, and `_limit` is how large a batch may be
            if reason is None:
                return work
            self._refuse_meter(reason)
            if len(work.charges) == 1:
                await self._set_aside(work.charges[0], reason)
                return None
            work = await self._batch(work.charges[: len(work.charges) // 2])

    async def _set_aside(self, charge: Charge, reason: str) -> None:
        log.error("charge set aside", charge=charge.id, account=charge.account, reason=reason)
        await self.ledger.write(lambda tx: slots.set_aside(tx, charge, reason))

    def _refuse_meter(self, reason: str | None) -> None:
        if reason is not None and reason.startswith(_NOT_A_METER):
            self._halted = f"{self.meter.address} is not a meter of platform {self.ledger.platform} any more"
            raise LaneHalted(reason=self._halted)

    async def _batch(self, charges: tuple[Charge, ...]) -> Work:
        if self.ledger.view.head is None:
            raise LedgerError(reason="the chain has not been read yet")
        latest = await self.rpc.call(
            "eth_getBlockByNumber", "latest", False
        )  # the projection may be far behind
        deadline = quantity(member(latest, "timestamp")) + _BATCH_SECONDS
        digest = settlement_digest(self._domain, self.ledger.platform, charges, deadline)
        signature = await asyncio.to_thread(self.meter.sign, digest)  # the key may be far away
        return Work(
            purpose=self.purpose,
            target=self.ledger.vault,
            calldata=calls.settle(self.ledger.platform, charges, deadline, signature),
            gas=calls.settle_gas(len(charges)),
            deadline=deadline,
            charges=charges,
        )
