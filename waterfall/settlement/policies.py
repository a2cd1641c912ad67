"""Policies asked for, each once the calls made under the old one have settled for good."""

from dataclasses import dataclass
from typing import ClassVar

import structlog

from waterfall.chain import vault as calls
from waterfall.chain.rpc import Rpc
from waterfall.errors import LaneHalted
from waterfall.ledger import slots
from waterfall.ledger.slots import Slot
from waterfall.ledger.store import Ledger
from waterfall.settlement.finality import Finality
from waterfall.settlement.work import Later, Outcome, Work, why_reverted

log = structlog.get_logger()


@dataclass
class Policies:
    """What the platform owner's lane sends.

    A policy waits until the charges before it are as final as a deposit must be to be spent: another order of the
    two, after a reorg, would have the vault reject charges that were made in good faith.
    """

    rpc: Rpc
    ledger: Ledger
    finality: Finality
    purpose: ClassVar[str] = "policy"

    async def next_work(self) -> Work | Later | None:
        """The oldest policy order that nothing stands before."""
        head = self.ledger.view.head
        if head is None or not await self.ledger.read(slots.waits_for_policy):
            return None
        marks = await self.finality.marks(head.block.number)
        due = await self.ledger.read(lambda c: slots.due_policy(c, marks.spendable))
        if due is None:
            return None
        order, account, policy = due
        return Work(
            purpose=self.purpose,
            reference=str(order),
            target=self.ledger.vault,
            calldata=calls.set_policy(self.ledger.platform, account, policy),
            gas=calls.SET_POLICY_GAS,
        )

    async def renew_work(self, slot: Slot) -> Work:
        """The same call."""
        return Work(slot.purpose, slot.target, slot.calldata, slot.gas, slot.reference)

    async def smaller_work(self, slot: Slot) -> Work | None:  # noqa: ARG002
        """There is no less of it."""
        return None

    async def mined(self, slot: Slot, outcome: Outcome) -> None:
        """A policy that reverted would do so again: its order waits until the lane is started anew.

        Raises:
            LaneHalted
        """
        if not outcome.succeeded:
            reason = await why_reverted(self.rpc, slot) or "the node does not say why"
            raise LaneHalted(
                reason=f"{slot.signer} cannot set policies of platform {self.ledger.platform}: {reason}"
            )
        log.info("policy set", order=slot.reference)
