"""The life of one call's money, whatever the surface: hold → capture | release | lose."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from waterfall.errors import (
    FundsHeld,
    HoldNotOpen,
    InsufficientFunds,
    LedgerError,
    SignerUnavailable,
    Unavailable,
)
from waterfall.failpoints import failpoint
from waterfall.gateway.models import Model
from waterfall.gateway.tracing import Tracing
from waterfall.ledger import views
from waterfall.ledger.books import Hold, Once
from waterfall.ledger.journal import Answer, Caller, Captured
from waterfall.ledger.store import Ledger, new_receipt_id
from waterfall.ledger.views import CallRecord
from waterfall.metering import prices
from waterfall.metering.prices import Bound
from waterfall.receipts import Domain, canonical_hash, receipt_digest
from waterfall.signers import Signer, signature_of
from waterfall.types import RateCard, SignedReceipt, Surface, Usage, UsageReceipt

log = structlog.get_logger()

T = TypeVar("T")

_RENEWALS_IN_A_LEASE = 5
_SLOWEST_RETRY_SECONDS = 5.0
_SETTLEMENT_BOUND_SECONDS = 60
_LOOK_AGAIN_SECONDS = 0.1
_STEP_SECONDS = 0.01
"""Between looks whether a call has gone on to its next step."""


@dataclass(frozen=True, slots=True)
class Metered:
    """What one call turned out to be."""

    usage: Usage
    reported: dict[str, Any] | None
    """The provider's whole usage object; None: it never came, and `usage` is what was provably delivered."""
    request_hash: str
    response_hash: str


class Calls:
    """All calls of this process, and the meter that signs for them."""

    def __init__(
        self,
        ledger: Ledger,
        meter: Signer,
        *,
        max_projection_age_seconds: float,
        longest_call_seconds: float,
        keeps_answers: bool = True,
        tracing: Tracing | None = None,
    ) -> None:
        """Calls over one ledger.

        Args:
            ledger: where the money is.
            meter: signs receipts.
            max_projection_age_seconds: no call is authorised on an older view of the chain.
            longest_call_seconds: with the settlement's bound, how long before its expiry a policy counts as
                expired.
            keeps_answers: whether a repeat of a call is given its answer.
            tracing: takes the spans of their steps.
        """
        self.ledger = ledger
        self.tracing = tracing or Tracing()
        self.is_stopping = False
        """Whether no new ones are taken."""
        self.keeps_answers = keeps_answers
        self.meter_address = meter.address
        self._meter = meter
        self._max_age = max_projection_age_seconds
        self._expiry_margin = int(longest_call_seconds) + _SETTLEMENT_BOUND_SECONDS
        self._domain = Domain(ledger.chain_id, ledger.vault)
        self._running: set[asyncio.Task[Any]] = set()
        self._beginning = 0
        """How many calls wait for their holds."""
        self._open: dict[int, Hold] = {}
        self._freed = asyncio.Event()
        """Set whenever a hold of this process has ended."""

    async def hold(
        self,
        caller: Caller,
        surface: Surface,
        model: Model,
        bound: Bound,
        *,
        wait_seconds: float = 0,
        once: Once | None = None,
        after: int | None = None,
    ) -> Hold:
        """Set the call's provable maximum aside. If the caller is cancelled meanwhile, it is given back.

        Args:
            caller: who pays.
            surface: in whose words the model is called.
            model: the model.
            bound: the provable maximum.
            wait_seconds: how long to wait, where the account's own running calls hold what is missing.
            once: the idempotency key of the call.
            after: the sequence of the attempt for the same call that this one follows.

        Raises:
            AccountNotFound, PaymentRequired, Unavailable, LedgerError
        """
        until = time.monotonic() + wait_seconds
        while True:
            try:
                with self.tracing.span("hold", model=model.name) as span:
                    held = await self._hold(caller, surface, model, bound, once, after)
                    span.set_attribute("waterfall.charge_id", str(held.charge_id))
                    span.set_attribute("waterfall.receipt_id", held.receipt_id)
                    return held
            except FundsHeld:
                left = until - time.monotonic()
                if left <= 0:
                    raise
                self._freed.clear()
                with suppress(TimeoutError):  # another process frees what this one is not told of
                    await asyncio.wait_for(self._freed.wait(), min(left, _LOOK_AGAIN_SECONDS))

    async def _hold(
        self,
        caller: Caller,
        surface: Surface,
        model: Model,
        bound: Bound,
        once: Once | None,
        after: int | None,
    ) -> Hold:
        block_time = self._block_time()
        receipt_id = new_receipt_id()
        with self._top_up(caller.account), self._begun():
            await self.ledger.keep_rate_card(model.price_id, model.card)
            try:
                held = await self.ledger.hold(
                    caller,
                    model.name,
                    bound,
                    block_time=block_time,
                    expiry_margin=self._expiry_margin,
                    surface=surface,
                    receipt_id=receipt_id,
                    once=once,
                    after=after,
                )
            except (LedgerError, asyncio.CancelledError) as error:
                self.start(self._release_unanswered(receipt_id, caller.account, error))
                raise
        self._open[held.sequence] = held
        failpoint("call.held")
        return held

    def _block_time(self) -> int:
        if self.is_stopping:
            raise Unavailable(reason="this gateway is stopping")
        return self.ledger.block_time(self._max_age)

    def _log(self, event: str, held: Hold, **facts: Any) -> None:
        """Log a step of a call; the charge's id is what the relayer's lines go on with."""
        log.info(event, charge=held.charge_id, receipt=held.receipt_id, account=held.account, **facts)

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """A call has begun, though it has no hold yet: a stop waits for it."""
        self._beginning += 1
        try:
            yield
        finally:
            self._beginning -= 1

    @contextmanager
    def _top_up(self, account: str) -> Iterator[None]:
        """A refusal for want of money tells where to send some."""
        try:
            yield
        except (InsufficientFunds, FundsHeld) as error:
            error.details["deposit_address"] = self.ledger.deposit_address(account)
            raise

    async def _release_unanswered(self, receipt_id: str, account: str, error: BaseException) -> None:
        """Give back what may have been set aside for a call that does not go on."""
        was = "answered by an error" if isinstance(error, LedgerError) else "cancelled"
        reason = f"its hold was {was}, so the upstream was not called"
        await _until_durable(lambda: self.ledger.release_unanswered(receipt_id, account, reason))

    async def capture(
        self, held: Hold, surface: Surface, model: Model, metered: Metered, answer: Answer | None = None
    ) -> Captured:
        """Charge what was metered. Tried until it is durable: delivered work never goes uncharged by a hiccup.

        Raises:
            HoldNotOpen: it was closed meanwhile as one that nobody works on.
        """
        price = prices.amount(metered.usage, model.card)
        amount = min(price, held.amount)
        if price > held.amount:
            log.error(
                "bound broken", receipt=held.receipt_id, held=held.amount, metered=price, model=model.name
            )
        signed: SignedReceipt | None = None

        async def write() -> Captured:
            nonlocal signed
            if signed is None:  # signed once: what is asked for again is the same receipt
                signed = await self.sign(
                    held, surface, model.name, model.card, model.price_id, amount, metered
                )
            return await self.ledger.capture(
                held,
                signed,
                price - amount,
                vendor_cost=prices.amount(metered.usage, model.vendor_card),
                answer=answer,
                expiry_margin=_SETTLEMENT_BOUND_SECONDS,
            )

        failpoint("call.answered")
        with self.tracing.span("capture", amount=str(amount)):
            captured = await self._end(held, write)
        self._log("captured", held, model=model.name, upstream=model.upstream.name, amount=captured.amount)
        failpoint("call.captured")
        return captured

    async def release(self, held: Hold, reason: str) -> None:
        """Give the hold back: the call cost nothing."""
        with suppress(HoldNotOpen):
            await self._end(held, lambda: self.ledger.release(held, reason))
            self._log("released", held, reason=reason)

    async def lose(self, held: Hold, reason: str) -> None:
        """Give the hold back, and list the call as one that may have cost something."""
        log.error(
            "call lost",
            charge=held.charge_id,
            receipt=held.receipt_id,
            account=held.account,
            held=held.amount,
            reason=reason,
        )
        with suppress(HoldNotOpen):
            await self._end(held, lambda: self.ledger.lose(held, reason))

    async def _end(self, held: Hold, write: Callable[[], Awaitable[T]]) -> T:
        try:
            return await _until_durable(write)
        finally:
            self._open.pop(held.sequence, None)
            self._freed.set()

    async def ended(self, receipt_id: str, seconds: float) -> CallRecord:
        """A call that another request made, once it has ended.

        Raises:
            Unavailable: it has not in this time.
        """
        ledger, until = self.ledger, time.monotonic() + seconds
        while True:
            call = await ledger.read(lambda c: views.call(c, receipt_id, ledger.chain_id, ledger.vault))
            if call.settlement.state != "held":
                return call
            if self.is_stopping or time.monotonic() > until:
                raise Unavailable(reason=f"the call {receipt_id} of this Idempotency-Key is still running")
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)

    async def settled(self, captured: Captured) -> str | None:
        """The transaction that has brought a charge to the chain, once one has.

        None: it costs nothing, was rejected by the vault, is not there after a minute, or the gateway stops.
        """
        until = time.monotonic() + _SETTLEMENT_BOUND_SECONDS
        while captured.amount and not self.is_stopping and time.monotonic() < until:
            with suppress(LedgerError):
                state, transaction = await self.ledger.read(lambda c: views.settlement(c, captured.sequence))
                if state not in {"queued", "batched"}:
                    return transaction if state in {"settled", "final"} else None
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        return None

    async def charge(
        self,
        caller: Caller,
        *,
        surface: Surface | None,
        model: str,
        card: RateCard | None,
        amount: int,
        metered: Metered,
        idempotency_key: str,
        vendor_cost: int | None,
    ) -> str:
        """Charge a call that was metered elsewhere, once per idempotency key; the receipt's id.

        Raises:
            AccountNotFound, PaymentRequired, IdempotencyConflict, Unavailable, LedgerError
        """
        price_id = canonical_hash(None if card is None else card.model_dump(mode="json"))
        if card is not None:
            await self.ledger.keep_rate_card(price_id, card)
        drawn = await self.ledger.draw(caller, amount)
        signed = await self.sign(drawn, surface, model, card, price_id, amount, metered)
        with self._top_up(caller.account):
            receipt_id = await self.ledger.charge(
                caller,
                model,
                prices.fixed(amount),
                drawn,
                signed,
                block_time=self._block_time(),
                expiry_margin=_SETTLEMENT_BOUND_SECONDS,
                idempotency_key=idempotency_key,
                body_hash=metered.request_hash,
                surface=surface,
                vendor_cost=vendor_cost,
            )
        if receipt_id == drawn.receipt_id:
            self._log("captured", drawn, model=model, amount=amount)
        return receipt_id

    async def sign(
        self,
        held: Hold,
        surface: Surface | None,
        model: str,
        card: RateCard | None,
        price_id: str,
        amount: int,
        metered: Metered,
    ) -> SignedReceipt:
        """The signed receipt of a call.

        Raises:
            SignerUnavailable: whatever holds the meter's key gave no signature.
        """
        head = self.ledger.view.head
        usage = metered.usage
        receipt = UsageReceipt(
            platform=self.ledger.platform,
            account=held.account,
            charge_id=held.charge_id,
            request_hash=metered.request_hash,
            response_hash=metered.response_hash,
            model=model,
            input_tokens=usage.input_tokens,
            cached_input_tokens=usage.cached_input_tokens,
            output_tokens=usage.output_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            usage_hash=canonical_hash(metered.reported),
            price_id=price_id,
            amount=amount,
            # Never before the newest block, so that the meter was valid on the chain by then.
            issued_at=max(int(time.time()), head.block.timestamp if head is not None else 0),
            complete=metered.reported is not None
            or card is None,  # an amount that the platform gave is whole
        )
        digest = receipt_digest(self._domain, receipt)
        return SignedReceipt(
            id=held.receipt_id,
            chain_id=self.ledger.chain_id,
            vault=self.ledger.vault,
            receipt=receipt,
            digest="0x" + digest.hex(),
            meter=self._meter.address,
            signature="0x" + (await signature_of(self._meter, digest)).hex(),
            surface=surface,
            metered=usage,
            usage=metered.reported,
            rate_card=card,
        )

    # ── Running ──────────────────────────────────────────────────────────────────────────────────────

    def start(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Run the part of a call that no vanished client may cancel."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # its hold's end tells it; where nobody waits any more, asyncio would complain

    async def renew_leases(self) -> None:
        """Keep the holds of running calls from being taken for abandoned. Runs until cancelled."""
        while True:
            await asyncio.sleep(self.ledger.lease_seconds / _RENEWALS_IN_A_LEASE)
            try:
                await self.ledger.renew(list(self._open.values()))
            except LedgerError as error:
                log.warning("leases not renewed", holds=len(self._open), reason=error.message)

    async def drain(self, seconds: float) -> None:
        """Wait for running calls to end, so that a stop loses nothing.

        A call goes on from one step to the next, and between two of them none is: so it is looked for again, in the loop's
        next turns, before nothing is left.
        """
        if self._running:
            log.info("waiting for calls to end", calls=len(self._running))
        until = time.monotonic() + seconds
        while self._beginning or self._open or self._running:
            left = until - time.monotonic()
            if left <= 0:
                return
            if self._running:
                await asyncio.wait(self._running, timeout=left)
            else:
                await asyncio.sleep(min(left, _STEP_SECONDS))


async def _until_durable(write: Callable[[], Awaitable[T]]) -> T:
    pause = 0.05
    while True:
        try:
            return await write()
        except (LedgerError, SignerUnavailable) as error:
            log.error("not durable yet, trying again", reason=error.message)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _SLOWEST_RETRY_SECONDS)
