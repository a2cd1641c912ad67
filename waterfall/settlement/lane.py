"""A lane: one key, one nonce sequence, one slot in flight. recover → confirm → send.

The vault makes resubmission safe for money; the care for nonces here only saves gas and time. Learned from
op-service/txmgr and engine-core, and from what broke in others (docs/decisions/0003-one-slot-in-flight.md).
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from waterfall.chain.rpc import Rpc, RpcError
from waterfall.chain.transactions import Broadcast, Fees, broadcast, bump, sign, suggest_fees
from waterfall.errors import LaneHalted
from waterfall.ledger import slots
from waterfall.ledger.journal import now_ms
from waterfall.ledger.slots import Attempt, Slot
from waterfall.ledger.store import Ledger
from waterfall.signers import Signer
from waterfall.types import Charge

log = structlog.get_logger()

_DEADLINE_MARGIN_SECONDS = 120
_POLLS_BEFORE_FOREIGN = 120


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
class LaneSettings:
    """How a lane sends; fees in wei per gas."""

    max_fee_cap: int
    rebroadcast_seconds: float = 5
    replace_seconds: float = 30


@dataclass
class Lane:
    """Sends work under one key, one transaction at a time."""

    name: str
    rpc: Rpc
    ledger: Ledger
    signer: Signer
    next_work: Callable[[], Awaitable[Work | None]]
    """What to send next, if anything."""
    renew_work: Callable[[Slot], Awaitable[Work]]
    """The same slot's work again, to be mined instead: with a later deadline."""
    mined: Callable[[Slot, bool], Awaitable[None]]
    """Told of every slot whose transaction was mined, and whether it succeeded."""
    settings: LaneSettings
    in_flight: bool = field(default=False, init=False)
    """Whether the last step left a transaction on its way, which only the chain can change."""
    _last_broadcast: float = field(default=0, init=False)
    _puzzled: int = field(default=0, init=False)

    async def step(self) -> bool:
        """Do what can be done now; whether anything was.

        Raises:
            ChainError: the chain cannot be used now; nothing is lost.
            LaneHalted: only a person can tell what happened.
        """
        slot = await self.ledger.read(lambda c: slots.first_open_slot(c, self.signer.address))
        self.in_flight = slot is not None
        return await (self._send_next() if slot is None else self._confirm(slot))

    # ── Send ─────────────────────────────────────────────────────────────────────────────────────────

    async def _send_next(self) -> bool:
        work = await self.next_work()
        if work is None:
            return False
        nonce = await self._next_nonce()
        if nonce is None:
            return False
        slot = Slot(
            self.signer.address,
            nonce,
            work.purpose,
            work.reference,
            work.target,
            work.calldata,
            work.gas,
            work.deadline,
        )
        attempt = self._sign(slot, work, await suggest_fees(self.rpc, self.settings.max_fee_cap))
        await self.ledger.write(lambda tx: slots.open_slot(tx, slot, attempt, work.charges))
        await self._broadcast(slot, attempt)
        return True

    async def _next_nonce(self) -> int | None:
        """The chain's nonce, if the journal agrees that it is free; None while the chain is being reorganised."""
        chain = await self._chain_nonce()
        last = await self.ledger.read(lambda c: slots.last_nonce(c, self.signer.address))
        if last is None or chain == last + 1:
            return chain
        if chain <= last:
            return None
        raise LaneHalted(
            reason=f"{self.signer.address} sent nonces {last + 1}…{chain - 1} that are not in the journal"
        )

    async def _chain_nonce(self) -> int:
        return int(await self.rpc.call("eth_getTransactionCount", self.signer.address, "latest"), 16)

    def _sign(self, slot: Slot, work: Work, fees: Fees) -> Attempt:
        signed = sign(
            self.signer,
            chain_id=self.ledger.chain_id,
            nonce=slot.nonce,
            target=work.target,
            calldata=work.calldata,
            gas=work.gas,
            fees=fees,
        )
        return Attempt(signed, fees, "signed", now_ms())

    async def _broadcast(self, slot: Slot, attempt: Attempt) -> None:
        outcome, detail = await broadcast(self.rpc, attempt.signed.raw)
        self._last_broadcast = time.monotonic()
        if outcome is not Broadcast.ACCEPTED:
            log.warning("broadcast", lane=self.name, nonce=slot.nonce, outcome=outcome.value, detail=detail)
        if outcome.value != attempt.state:
            await self.ledger.write(lambda tx: slots.note_broadcast(tx, attempt, outcome, detail))

    # ── Confirm ──────────────────────────────────────────────────────────────────────────────────────

    async def _confirm(self, slot: Slot) -> bool:
        for attempt in slot.attempts:
            receipt = await self.rpc.call("eth_getTransactionReceipt", attempt.signed.tx_hash)
            if receipt is not None:
                self._puzzled = 0
                return await self._close(slot, receipt)
        if await self._chain_nonce() > slot.nonce:
            return self._puzzle(slot)
        await self._push(slot)
        return False

    async def _close(self, slot: Slot, receipt: Any) -> bool:
        """Close a mined slot, once the projection has its block: charges move there, not here."""
        block = int(receipt["blockNumber"], 16)
        head = self.ledger.head
        if head is None or head.block.number < block or not await self._is_projected(receipt, block):
            return False
        succeeded = receipt["status"] == "0x1"
        tx_hash = receipt["transactionHash"]
        back = await self.ledger.write(
            lambda tx: slots.close_slot(tx, slot, tx_hash=tx_hash, block=block, succeeded=succeeded)
        )
        log.info(
            "mined",
            lane=self.name,
            purpose=slot.purpose,
            nonce=slot.nonce,
            transaction=tx_hash,
            block=block,
            gas_used=int(receipt["gasUsed"], 16),
            succeeded=succeeded,
            back_in_queue=back,
        )
        if succeeded and back:
            mismatch = f"{tx_hash} settled, but {back} of its charges were skipped as settled before, by nobody known"
            await self.ledger.note_mismatch(mismatch)
        await self.mined(slot, succeeded)
        return True

    async def _is_projected(self, receipt: Any, block: int) -> bool:
        """Whether the block that the projection has at this height is the receipt's: nodes differ during a reorg."""
        known = [kept.hash for kept in await self.ledger.recent_blocks() if kept.number == block]
        return known in ([], [receipt["blockHash"]])

    def _puzzle(self, slot: Slot) -> bool:
        """The nonce is used, yet no attempt has a receipt: the node may lag, or somebody else has the key."""
        self._puzzled += 1
        if self._puzzled < _POLLS_BEFORE_FOREIGN:
            return False
        raise LaneHalted(
            reason=f"nonce {slot.nonce} of {self.signer.address} was used by a transaction that is not in the journal"
        )

    async def _push(self, slot: Slot) -> None:
        """Not mined yet: replace what is too cheap or about to expire, else send the same bytes again."""
        newest = slot.attempts[0]
        head = self.ledger.head
        expiring = (
            slot.deadline
            and head is not None
            and head.block.timestamp > slot.deadline - _DEADLINE_MARGIN_SECONDS
        )
        if expiring or now_ms() - newest.created_at > 1000 * self.settings.replace_seconds:
            suggested = await suggest_fees(self.rpc, self.settings.max_fee_cap)
            fees = bump(newest.fees, suggested, self.settings.max_fee_cap)
            if fees is not None:
                work = await self.renew_work(slot)
                attempt = self._sign(slot, work, fees)
                renewed = replace(slot, calldata=work.calldata, gas=work.gas, deadline=work.deadline)
                await self.ledger.write(lambda tx: slots.renew_slot(tx, renewed, attempt))
                await self._broadcast(renewed, attempt)
                return
            log.error("at the fee cap", lane=self.name, nonce=slot.nonce, max_fee=newest.fees.max_fee)
        if time.monotonic() - self._last_broadcast > self.settings.rebroadcast_seconds:
            await self._broadcast(slot, newest)


async def revert_reason(rpc: Rpc, sender: str, slot: Slot) -> str:
    """Why a slot's transaction reverts, as the node tells it when asked again; the error's selector."""
    call = {"from": sender, "to": slot.target, "data": "0x" + slot.calldata.hex(), "gas": hex(slot.gas)}
    try:
        await rpc.call("eth_call", call, "latest")
    except RpcError as error:
        data = error.details.get("data")
        return data[:10] if isinstance(data, str) else str(error.details["reason"])
    return "none: it would succeed now"
