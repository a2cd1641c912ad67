"""A lane: one key, one nonce sequence, one slot in flight. recover → confirm → send.

The vault makes resubmission safe for money; the care for nonces here only saves gas and time. Learned from
op-service/txmgr and engine-core, and from what broke in others (docs/decisions/0003-one-slot-in-flight.md).
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from waterfall.chain.events import decided_in
from waterfall.chain.rpc import Rpc, member, quantity
from waterfall.chain.transactions import Broadcast, Fees, Refusal, broadcast, bump, sign
from waterfall.errors import EventsMissing, LaneHalted
from waterfall.failpoints import failpoint
from waterfall.ledger import slots
from waterfall.ledger.journal import now_ms
from waterfall.ledger.slots import Attempt, Mined, Slot, WorkTaken
from waterfall.ledger.store import Ledger
from waterfall.settlement.gas import HeldBack, Purse
from waterfall.settlement.pace import Alerts, gather
from waterfall.settlement.parts import State
from waterfall.settlement.work import Later, Outcome, Source, Work
from waterfall.signers import Signer

log = structlog.get_logger()

_DEADLINE_MARGIN_SECONDS = 120
_FIRST_LOOK_SECONDS = 0.005
_BUMP_SECONDS = 1
"""Between replacements that a refusal asks for."""
_IDLE_SECONDS = 0.5
"""Charges and blocks wake an idle lane; this is for what other processes capture."""
_HELD_BACK_SECONDS = 1
_PURSE_SECONDS = 60
"""For how long a balance says something: another process may have taken over, and somebody sent money."""


@dataclass(frozen=True)
class LaneSettings:
    """How a lane sends; fees in wei per gas."""

    max_fee_cap: int
    worst_gas: int = 0
    """Gas limit of the largest transaction it sends."""
    gas_batches: int = 3
    """How many of those the key's balance must pay for before anything is sent."""
    poll_seconds: float = 0.5
    rebroadcast_seconds: float = 5
    replace_seconds: float = 30
    foreign_seconds: float = 60
    """How long a nonce may be used and no attempt have a receipt: nodes lag."""


@dataclass(frozen=True)
class LaneFacts:
    """What a lane is doing."""

    signer: str
    nonce: int | None
    """Of the slot in flight."""
    slot_age: float
    """Seconds since this process first saw that slot; monotonic."""
    attempts: int
    """Of that slot."""
    balance: int | None
    """The key's, in wei; None: not asked lately."""
    batches_left: float | None
    """How many of its dearest transactions that pays for."""


@dataclass
class _Watch:
    """An attempt as this process has seen it, in monotonic time: the journal's times are the host's, which may jump."""

    since: float
    head: int
    """The newest block then: as long as none has come since, a higher fee would change nothing but the price."""
    not_before: float = float("-inf")
    """No replacement until then."""
    broadcast_at: float = float("-inf")
    refused: Refusal | None = None
    held_back: HeldBack | None = None
    """Why nothing better is sent in its place."""


@dataclass
class Lane:
    """Sends work under one key, one transaction at a time."""

    name: str
    rpc: Rpc
    ledger: Ledger
    signer: Signer
    sources: Sequence[Source]
    """What to send, the most urgent first."""
    settings: LaneSettings
    read_again: Callable[[EventsMissing], Awaitable[None]]
    """Told when a receipt shows what its block, as projected, does not."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from choosing work until it is journalled, so that lanes that share it do not choose the same."""
    saw_receipt: Callable[[], None] = lambda: None
    """Told when a receipt is there and its block is not projected yet."""
    state: State = field(default=State.OK, init=False)
    reason: str | None = field(default=None, init=False)
    slot: Slot | None = field(default=None, init=False)
    """On its way when last looked at; only the chain can change that."""
    purse: Purse = field(init=False)
    pause: float = field(default=0, init=False)
    """Seconds until it is worth to look again, unless something happens."""
    patient: bool = field(default=False, init=False)
    """Whether new work is no reason to look before `pause` is over."""
    _slot_since: float = field(default=0, init=False)
    _look: float = field(default=_FIRST_LOOK_SECONDS, init=False)
    _watched: dict[str, _Watch] = field(default_factory=dict, init=False)
    _nonce_asked_at: float = field(default=float("-inf"), init=False)
    _nonce_asked_for: object = field(default=None, init=False)
    _puzzled_since: float | None = field(default=None, init=False)
    _alerts: Alerts = field(default_factory=Alerts, init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        for source, result in itertools.product(self.sources, ("succeeded", "reverted")):
            # Rates are told of what has been seen to be zero.
            self.ledger.metrics.slots_closed.labels(self.name, source.purpose, result)
        self.purse = Purse(
            self.rpc, self.signer.address, settings.max_fee_cap, settings.worst_gas, settings.gas_batches
        )

    @property
    def facts(self) -> LaneFacts:
        """What it is doing."""
        slot = self.slot
        knows_purse = time.monotonic() - self.purse.looked_at < _PURSE_SECONDS
        return LaneFacts(
            signer=self.signer.address,
            nonce=None if slot is None else slot.nonce,
            slot_age=0 if slot is None else time.monotonic() - self._slot_since,
            attempts=0 if slot is None else len(slot.attempts),
            balance=self.purse.balance if knows_purse else None,
            batches_left=self.purse.batches_left if knows_purse else None,
        )

    async def step(self) -> bool:
        """Do what can be done now; whether anything was.

        Raises:
            ChainError: the chain cannot be used now; nothing is lost.
            EventsMissing: the projection lacks what a receipt shows; where that can be, it is read again.
            LaneHalted: only a person can tell what happened.
        """
        self._take(await self.ledger.read(lambda c: slots.first_open_slot(c, self.signer.address)))
        self.state, self.reason, self.patient = State.OK, None, False
        self.pause = max(self.settings.poll_seconds, _IDLE_SECONDS)
        if self.slot is None:
            return await self._send_next()
        worked = await self._confirm(self.slot)
        self.pause = self._look = min(2 * self._look, self.settings.poll_seconds)
        return worked

    def _take(self, slot: Slot | None) -> None:
        if slot is None or self.slot is None or slot.nonce != self.slot.nonce:
            self._slot_since, self._look = time.monotonic(), _FIRST_LOOK_SECONDS / 2
            self._puzzled_since = None
            self._watched.clear()
        self.slot = slot

    # ── Send ─────────────────────────────────────────────────────────────────────────────────────────

    async def _send_next(self) -> bool:
        async with self.turn:
            work = await self._next_work()
            if work is None:
                self._show_purse()
                return False
            nonce, fees = await asyncio.gather(self._next_nonce(), self.purse.afford(work.calldata))
            if nonce is None:
                self.state, self.reason = State.WAITING, "the node has not the blocks of what was sent before"
                self.pause = self.settings.poll_seconds
                return False
            if isinstance(fees, HeldBack):
                self._hold_back(fees)
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
            attempt = await self._sign(slot, fees)
            failpoint("lane.planned")
            try:
                await self.ledger.write(lambda tx: slots.open_slot(tx, slot, attempt, work.charges))
            except WorkTaken as error:
                log.info("planning again", lane=self.name, reason=error.message)
                return True
            self._take(replace(slot, attempts=(attempt,)))
        self._log_attempt("batched", slot, attempt, charges=[charge.id for charge in work.charges])
        failpoint("lane.journalled")
        self.pause = self._look
        await self._broadcast(slot, attempt)
        return True

    def _show_purse(self) -> None:
        """A key without money is low on it also while another one settles everything."""
        if self.purse.short is not None:
            self.state, self.reason = self.purse.short.state, self.purse.short.reason

    async def _next_work(self) -> Work | None:
        for source in self.sources:
            found = await source.next_work()
            if isinstance(found, Work):
                return found
            if isinstance(found, Later):
                self.pause, self.patient = min(found.seconds, self.settings.poll_seconds), True
                return None
        return None

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
        return quantity(await self.rpc.call("eth_getTransactionCount", self.signer.address, "latest"))

    def _hold_back(self, why: HeldBack) -> None:
        self.state, self.reason, self.patient = why.state, why.reason, True
        self.pause = max(self.settings.poll_seconds, _HELD_BACK_SECONDS)
        if self._alerts.due(why.state.value):
            log.error("held back", lane=self.name, state=why.state.value, reason=why.reason)

    async def _sign(self, slot: Slot, fees: Fees) -> Attempt:
        """A new attempt. In a thread, as a key may be far away."""
        signed = await asyncio.to_thread(
            sign,
            self.signer,
            chain_id=self.ledger.chain_id,
            nonce=slot.nonce,
            target=slot.target,
            calldata=slot.calldata,
            gas=slot.gas,
            fees=fees,
        )
        return Attempt(signed, fees, "signed", now_ms())

    def _log_attempt(self, event: str, slot: Slot, attempt: Attempt, **facts: Any) -> None:
        log.info(
            event,
            lane=self.name,
            purpose=slot.purpose,
            nonce=slot.nonce,
            transaction=attempt.signed.tx_hash,
            **facts,
        )

    async def _broadcast(self, slot: Slot, attempt: Attempt) -> None:
        """Send an attempt's bytes, the same whenever it is."""
        watch = self._watch(attempt)
        sent = await broadcast(self.rpc, attempt.signed.raw)
        outcome, detail = sent
        failpoint("lane.broadcast")
        watch.broadcast_at = time.monotonic()
        watch.refused = sent.reason
        self.ledger.metrics.broadcasts.labels(self.name, outcome.value, sent.reason or "").inc()
        if watch.refused is Refusal.INSUFFICIENT_FUNDS:
            reason = f"{self.signer.address} cannot pay for its transaction: send it some"
            watch.held_back = HeldBack(State.LOW_ON_GAS, reason)
        elif watch.held_back is not None and watch.held_back.state is State.LOW_ON_GAS:
            watch.held_back = None
        self._show(watch)
        if outcome is not Broadcast.ACCEPTED and self._alerts.due(f"{outcome.value} {watch.refused}"):
            log.warning("broadcast", lane=self.name, nonce=slot.nonce, outcome=outcome.value, detail=detail)
        if outcome.value != attempt.state:
            self._log_attempt("broadcast", slot, attempt, outcome=outcome.value)
            await self.ledger.write(lambda tx: slots.note_broadcast(tx, attempt, outcome, detail))

    def _watch(self, attempt: Attempt) -> _Watch:
        """What this process has seen of an attempt; one from before its start counts from now."""
        watch = _Watch(since=time.monotonic(), head=self._newest_block)
        return self._watched.setdefault(attempt.signed.tx_hash, watch)

    @property
    def _newest_block(self) -> int:
        head = self.ledger.view.head
        return 0 if head is None else head.block.number

    def _show(self, watch: _Watch) -> None:
        if watch.held_back is not None:
            self._hold_back(watch.held_back)

    # ── Confirm ──────────────────────────────────────────────────────────────────────────────────────

    async def _confirm(self, slot: Slot) -> bool:
        for receipt in await gather(self._receipt, slot.attempts):
            if receipt is not None:
                self._puzzled_since = None
                return await self._close(slot, receipt)
        if await self._is_nonce_used(slot):
            return await self._puzzle(slot)
        self._puzzled_since = None
        await self._push(slot)
        return False

    async def _receipt(self, attempt: Attempt) -> Any:
        return await self.rpc.call("eth_getTransactionReceipt", attempt.signed.tx_hash)

    async def _is_nonce_used(self, slot: Slot) -> bool:
        """Whether the chain has a transaction of this nonce. Asked with every block, and now and then without."""
        now, head = time.monotonic(), self.ledger.view.head and self.ledger.view.head.block
        moved = head != self._nonce_asked_for or self._puzzled_since is not None
        if not moved and now - self._nonce_asked_at < self.settings.rebroadcast_seconds:
            return False
        used = await self._chain_nonce() > slot.nonce
        self._nonce_asked_for, self._nonce_asked_at = head, now
        return used

    async def _close(self, slot: Slot, receipt: Any) -> bool:
        """Close a mined slot, once the projection has its block: charges move there, not here."""
        mined = Mined(
            tx_hash=str(member(receipt, "transactionHash")),
            block=quantity(member(receipt, "blockNumber")),
            block_hash=str(member(receipt, "blockHash")),
            succeeded=quantity(member(receipt, "status")) == 1,
            decided=decided_in(member(receipt, "logs"), self.ledger.vault),
        )
        head = self.ledger.view.head
        if head is None or head.block.number < mined.block:
            self.saw_receipt()
            return False
        failpoint("lane.mined")
        gas_used = quantity(member(receipt, "gasUsed"))
        if mined.succeeded:
            return await self._close_slot(slot, mined, gas_used)
        async with self.turn:  # what it taught is known before its charges are chosen again
            return await self._close_slot(slot, mined, gas_used)

    async def _close_slot(self, slot: Slot, mined: Mined, gas_used: int) -> bool:
        outcome = Outcome(mined.succeeded)
        if not mined.succeeded:
            carried = await self.ledger.read(lambda c: slots.batched_charges(c.execute, slot))
            outcome = Outcome(mined.succeeded, gas_used >= slot.gas, tuple(carried))
        try:
            back = await self.ledger.write(lambda tx: slots.close_slot(tx, slot, mined))
        except EventsMissing as error:
            await self.read_again(error)
            raise
        if back is None:  # nodes differ during a reorg
            self.saw_receipt()
            return False
        self._take(None)
        metrics = self.ledger.metrics
        result = "succeeded" if mined.succeeded else "reverted"
        metrics.slots_closed.labels(self.name, slot.purpose, result).inc()
        metrics.slot_attempts.labels(self.name).observe(len(slot.attempts))
        log.info(
            "mined",
            lane=self.name,
            purpose=slot.purpose,
            nonce=slot.nonce,
            transaction=mined.tx_hash,
            block=mined.block,
            gas_used=gas_used,
            succeeded=mined.succeeded,
            back_in_queue=back,
        )
        if mined.succeeded and back:
            mismatch = (
                f"{mined.tx_hash} settled, but {back} of its charges were skipped as settled before, "
                "by nobody known"
            )
            await self.ledger.view.note_mismatch(mismatch)
        await self._source(slot).mined(slot, outcome)
        return True

    def _source(self, slot: Slot) -> Source:
        for source in self.sources:
            if source.purpose == slot.purpose:
                return source
        raise LaneHalted(
            reason=f"{self.signer.address} has a {slot.purpose} in flight, which lane {self.name} does not send"
        )

    async def _puzzle(self, slot: Slot) -> bool:
        """The nonce is used, yet no attempt has a receipt: the node may lag, or somebody else has the key."""
        now = time.monotonic()
        if self._puzzled_since is None:
            self._puzzled_since = now
        if now - self._puzzled_since < self.settings.foreign_seconds:
            self.state, self.reason = (
                State.WAITING,
                f"nonce {slot.nonce} is used, and no receipt says by what",
            )
            return False
        if await self.ledger.write(lambda tx: slots.forget_first(tx, slot)):
            log.warning("taken by a transaction from before", lane=self.name, nonce=slot.nonce)
            self._take(None)
            return True
        raise LaneHalted(
            reason=f"nonce {slot.nonce} of {self.signer.address} was used by a transaction that is not in the journal"
        )

    # ── Push ─────────────────────────────────────────────────────────────────────────────────────────

    async def _push(self, slot: Slot) -> None:
        """Not mined yet: replace what is too cheap or about to expire, else send the same bytes again."""
        newest = slot.attempts[0]
        watch = self._watch(newest)
        if self._should_replace(slot, watch):
            suggested = await self.purse.fees()
            if isinstance(suggested, HeldBack):
                watch.held_back = suggested
            elif (fees := bump(newest.fees, suggested, self.settings.max_fee_cap)) is None:
                reason = f"at the fee cap with {newest.fees.max_fee} wei, sending the same again"
                watch.held_back = HeldBack(State.WAITING, reason)
            elif await self._replace(slot, fees, watch.refused):
                return
            else:
                watch.held_back = HeldBack(State.WAITING, f"no node takes a transaction of {slot.gas} gas")
            watch.not_before = time.monotonic() + self.settings.rebroadcast_seconds
        if time.monotonic() - watch.broadcast_at > self.settings.rebroadcast_seconds:
            await self._broadcast(slot, newest)
        else:
            self._show(watch)

    def _should_replace(self, slot: Slot, watch: _Watch) -> bool:
        now, head = time.monotonic(), self.ledger.view.head
        if now < watch.not_before:
            return False
        expires_at = slot.deadline - _DEADLINE_MARGIN_SECONDS
        if slot.deadline and head is not None and head.block.timestamp > expires_at:
            return True
        if watch.refused in {Refusal.UNDERPRICED, Refusal.FEE_BELOW_BASE, Refusal.GAS_LIMIT}:
            return now - watch.since >= _BUMP_SECONDS
        return (
            now - watch.since > self.settings.replace_seconds
            and watch.refused is not Refusal.INSUFFICIENT_FUNDS
            and self._newest_block > watch.head
        )

    async def _replace(self, slot: Slot, fees: Fees, refused: Refusal | None) -> bool:
        """Send something better under the same nonce, if there is anything."""
        source = self._source(slot)
        too_large = refused is Refusal.GAS_LIMIT
        work = await (source.smaller_work(slot) if too_large else source.renew_work(slot))
        if work is None:
            return False
        renewed = replace(slot, calldata=work.calldata, gas=work.gas, deadline=work.deadline)
        attempt = await self._sign(renewed, fees)
        failpoint("lane.planned")
        await self.ledger.write(lambda tx: slots.renew_slot(tx, renewed, attempt, work.charges))
        self._log_attempt("replaced", renewed, attempt)
        failpoint("lane.journalled")
        self._look = _FIRST_LOOK_SECONDS
        await self._broadcast(renewed, attempt)
        return True
