"""The life of one call's money, whatever the surface: hold → capture | release | lose."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from waterfall.errors import FundsHeld, HoldNotOpen, InsufficientFunds, LedgerError, WaterfallError
from waterfall.gateway.models import Model
from waterfall.ledger.journal import Caller, Captured, Hold
from waterfall.ledger.store import LEASE_MS, Ledger
from waterfall.metering import prices
from waterfall.metering.prices import Bound
from waterfall.receipts import Domain, canonical_hash, receipt_digest
from waterfall.signers import Signer
from waterfall.types import RateCard, SignedReceipt, Usage, UsageReceipt

log = structlog.get_logger()

T = TypeVar("T")

_RENEW_SECONDS = LEASE_MS / 1000 / 5
_SLOWEST_RETRY_SECONDS = 5.0
_SETTLEMENT_BOUND_SECONDS = 60


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
        self, ledger: Ledger, meter: Signer, *, max_projection_age_seconds: float, longest_call_seconds: float
    ) -> None:
        """Calls over one ledger.

        Args:
            ledger: where the money is.
            meter: signs receipts.
            max_projection_age_seconds: no call is authorised on an older view of the chain.
            longest_call_seconds: with the settlement's bound, how long before its expiry a policy counts as
                expired.
        """
        self.ledger = ledger
        self.meter_address = meter.address
        self._meter = meter
        self._max_age = max_projection_age_seconds
        self._expiry_margin = int(longest_call_seconds) + _SETTLEMENT_BOUND_SECONDS
        self._domain = Domain(ledger.chain_id, ledger.vault)
        self._running: set[asyncio.Task[Any]] = set()
        self._open: dict[int, Hold] = {}

    async def hold(self, caller: Caller, model: Model, bound: Bound) -> Hold:
        """Set the call's provable maximum aside. If the caller is cancelled meanwhile, it is given back.

        Raises:
            AccountNotFound, PaymentRequired, Unavailable, LedgerError
        """
        holding = self.start(self._hold(caller, model, bound))
        try:
            return await asyncio.shield(holding)
        except asyncio.CancelledError:
            self.start(self._release_unused(holding))
            raise

    async def _hold(self, caller: Caller, model: Model, bound: Bound) -> Hold:
        block_time = self.ledger.block_time(self._max_age)
        await self.ledger.keep_rate_card(model.price_id, model.card)
        with self._top_up(caller.account):
            held = await self.ledger.hold(
                caller, model.name, bound, block_time=block_time, expiry_margin=self._expiry_margin
            )
        self._open[held.sequence] = held
        return held

    @contextmanager
    def _top_up(self, account: str) -> Iterator[None]:
        """A refusal for want of money tells where to send some."""
        try:
            yield
        except (InsufficientFunds, FundsHeld) as error:
            error.details["deposit_address"] = self.ledger.deposit_address(account)
            raise

    async def _release_unused(self, holding: "asyncio.Task[Hold]") -> None:
        with suppress(WaterfallError):
            await self.release(await holding, "it was cancelled before the upstream was called")

    async def capture(self, held: Hold, model: Model, metered: Metered) -> Captured:
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
        signed = self.sign(held, model.name, model.card, model.price_id, amount, metered)
        return await self._end(held, lambda: self.ledger.capture(held, signed, price - amount))

    async def release(self, held: Hold, reason: str) -> None:
        """Give the hold back: the call cost nothing."""
        with suppress(HoldNotOpen):
            await self._end(held, lambda: self.ledger.release(held, reason))

    async def lose(self, held: Hold, reason: str) -> None:
        """Give the hold back, and list the call as one that may have cost something."""
        log.error("call lost", receipt=held.receipt_id, held=held.amount, reason=reason)
        with suppress(HoldNotOpen):
            await self._end(held, lambda: self.ledger.lose(held, reason))

    async def _end(self, held: Hold, write: Callable[[], Awaitable[T]]) -> T:
        try:
            return await _until_durable(write)
        finally:
            self._open.pop(held.sequence, None)

    async def charge(
        self,
        caller: Caller,
        *,
        model: str,
        card: RateCard | None,
        amount: int,
        metered: Metered,
        idempotency_key: str,
    ) -> str:
        """Charge a call that was metered elsewhere, once per idempotency key; the receipt's id.

        Raises:
            AccountNotFound, PaymentRequired, IdempotencyConflict, Unavailable, LedgerError
        """
        price_id = canonical_hash(None if card is None else card.model_dump(mode="json"))
        if card is not None:
            await self.ledger.keep_rate_card(price_id, card)
        with self._top_up(caller.account):
            return await self.ledger.charge(
                caller,
                model,
                prices.fixed(amount),
                lambda held: self.sign(held, model, card, price_id, amount, metered),
                block_time=self.ledger.block_time(self._max_age),
                expiry_margin=_SETTLEMENT_BOUND_SECONDS,
                idempotency_key=idempotency_key,
                body_hash=metered.request_hash,
            )

    def sign(
        self, held: Hold, model: str, card: RateCard | None, price_id: str, amount: int, metered: Metered
    ) -> SignedReceipt:
        """The signed receipt of a call."""
        head = self.ledger.head
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
            signature="0x" + self._meter.sign(digest).hex(),
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
            await asyncio.sleep(_RENEW_SECONDS)
            for held in list(self._open.values()):
                try:
                    await self.ledger.renew(held)
                except LedgerError as error:
                    log.warning("lease not renewed", receipt=held.receipt_id, reason=error.message)

    async def drain(self, seconds: float) -> None:
        """Wait for running calls to end, so that a stop loses nothing."""
        if self._running:
            log.info("waiting for calls to end", calls=len(self._running))
            await asyncio.wait(self._running, timeout=seconds)


async def _until_durable(write: Callable[[], Awaitable[T]]) -> T:
    pause = 0.05
    while True:
        try:
            return await write()
        except LedgerError as error:
            log.error("not durable yet, trying again", reason=error.message)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _SLOWEST_RETRY_SECONDS)
