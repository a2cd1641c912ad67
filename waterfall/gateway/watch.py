"""How a service is: /healthz for people and alerts, /readyz for load balancers, /metrics for Prometheus.

Neither a database that is locked nor a chain that is down makes any of them wait: what is not known within a second is
left out, and said to be.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Generic, Literal, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from waterfall import __version__
from waterfall.errors import LedgerError, Unavailable
from waterfall.gateway.wire import Shown
from waterfall.ledger.figures import Count, Figures
from waterfall.ledger.journal import now_ms
from waterfall.ledger.store import Ledger
from waterfall.metrics import CONTENT_TYPE, CREDITS, Metric, Samples, gauge
from waterfall.settlement.parts import PartState, State

T = TypeVar("T")

LATE_SECONDS = 300
"""A third of the least after which new calls are refused, which is a quarter of the shortest exit delay, an hour."""
_PATIENCE_SECONDS = 30
_ANSWER_SECONDS = _AGE_SECONDS = 1
_INDEXER, _SETTLES = "indexer", "settle "


class Part(Shown):
    """One part of the relayer."""

    state: State
    reason: str | None
    since: float
    """Unix seconds."""


class Health(Shown):
    """Whether anything needs a person; why, is told to the platform only."""

    status: Literal["ok", "degraded", "halted"]
    """degraded: calls are served and settled, and something needs looking after. halted: nothing is settled."""
    reasons: list[str]
    """Why it is not ok."""
    halted: dict[str, str]
    """Parts that have stopped → reason."""
    parts: dict[str, Part]
    """The relayer's, where there is one in this process."""
    version: str


class Readiness(Shown):
    """Whether new calls are accepted now; why not, is told to the platform only."""

    ready: bool
    reasons: list[str]
    """Why not."""


class Watch:
    """Looks at one service."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        max_age_seconds: float | None,
        parts: Mapping[str, PartState] | None = None,
        families: Callable[[], Iterable[Metric]] = tuple,
    ) -> None:
        """Watch a service.

        Args:
            ledger: its ledger.
            max_age_seconds: when its view of the chain is too old for calls; None: it takes no calls.
            parts: the relayer's, where there is one in this process.
            families: what else to look up for Prometheus.
        """
        self.is_stopping = False
        """Whether it stops, and begins nothing new."""
        self._ledger = ledger
        self._max_age = max_age_seconds
        self._parts = parts or {}
        self._families = families
        self._figures = _Lately(ledger.figures)
        self._is_read = _Lately(lambda: ledger.is_led(_INDEXER))
        self._probe = _Lately(ledger.probe)

    def app(self) -> Starlette:
        """The three of them, for a listener of their own."""

        def answering(look: Callable[[], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
            async def answer(_: Request) -> Response:
                return await look()

            return answer

        routes = {"/healthz": self.health, "/readyz": self.readiness, "/metrics": self.metrics}
        return Starlette(routes=[Route(path, answering(look)) for path, look in routes.items()])

    # ── /healthz ─────────────────────────────────────────────────────────────────────────────────────

    async def health(self, *, with_reasons: bool = True) -> Response:
        """Whether anything needs a person; 503 when nothing is settled any more.

        Reasons name keys, nodes and the database: they are not for everybody.
        """
        halted = [reason async for reason in self._why_halted()]
        reasons = list(dict.fromkeys([*halted, *[reason async for reason in self._why_degraded()]]))
        status: Literal["ok", "degraded", "halted"] = "halted" if halted else "degraded" if reasons else "ok"
        parts = self._parts.items() if with_reasons else ()
        body = Health(
            status=status,
            reasons=reasons if with_reasons else [],
            halted={name: part.reason or "" for name, part in parts if part.state is State.HALTED},
            parts={
                name: Part(state=part.state, reason=part.reason, since=part.since) for name, part in parts
            },
            version=__version__,
        )
        return JSONResponse(body.model_dump(mode="json"), status_code=503 if halted else 200)

    async def _why_halted(self) -> AsyncIterator[str]:
        for mismatch in self._ledger.view.mismatches:
            yield mismatch
        indexer = self._parts.get(_INDEXER)
        if indexer is not None and indexer.state is State.HALTED:
            yield f"the chain is not read: {indexer.reason}"
        lanes = [part.state for name, part in self._parts.items() if name.startswith(_SETTLES)]
        if lanes and set(lanes) <= {State.HALTED, State.LOW_ON_GAS}:
            yield "no lane settles"
        try:
            if not await self._is_read():
                yield "no relayer works"
        except LedgerError as error:
            yield error.message

    async def _why_degraded(self) -> AsyncIterator[str]:
        for name, part in self._parts.items():
            needs_a_person = part.state in {State.HALTED, State.LOW_ON_GAS}
            may_pass = part.state in {State.RETRYING, State.WAITING}
            if needs_a_person or (may_pass and time.time() - part.since > _PATIENCE_SECONDS):
                yield f"{name} is {part.state.value}: {part.reason}"
        if self._max_age is not None and (reason := self._why_refused(self._max_age)) is not None:
            yield f"new calls are refused: {reason}"
        try:
            waited = _age((await self._figures()).oldest)
        except LedgerError as error:
            yield error.message
        else:
            if waited > LATE_SECONDS:
                yield f"a charge has waited for settlement for {waited:.0f} s"

    def _why_refused(self, max_age: float) -> str | None:
        try:
            self._ledger.block_time(max_age)
        except Unavailable as error:
            return str(error.details["reason"])
        return None

    # ── /readyz ──────────────────────────────────────────────────────────────────────────────────────

    async def readiness(self, *, with_reasons: bool = True) -> Response:
        """Whether new calls are accepted now; 503 where they are not. Of a relayer alone: whether it works."""
        reasons = [reason async for reason in self._why_not_ready()]
        body = Readiness(ready=not reasons, reasons=reasons if with_reasons else [])
        return JSONResponse(body.model_dump(), status_code=503 if reasons else 200)

    async def _why_not_ready(self) -> AsyncIterator[str]:
        if self.is_stopping:
            yield "it is stopping"
        indexer = self._parts.get(_INDEXER)
        if self._max_age is not None:
            if (reason := self._why_refused(self._max_age)) is not None:
                yield reason
        elif indexer is not None and indexer.state in {State.HALTED, State.RETRYING}:
            yield f"the chain is not read: {indexer.reason}"
        try:
            await self._probe()
        except LedgerError as error:
            yield error.message

    # ── /metrics ─────────────────────────────────────────────────────────────────────────────────────

    async def metrics(self) -> Response:
        """Everything, for Prometheus."""
        try:
            figures = await self._figures()
        except LedgerError:
            figures = None
        families = [*self._of_service(), *self._families()]
        families.append(gauge("ledger_readable", "Whether the ledger answered.", float(figures is not None)))
        if figures is not None:
            families += [*_of_money(figures), *self._of_finality(figures)]
        return Response(self._ledger.metrics.render(families), headers={"Content-Type": CONTENT_TYPE})

    def _of_service(self) -> Iterator[Metric]:
        ledger, head = self._ledger, self._ledger.view.head
        yield gauge("build_info", "What runs.", {(__version__,): 1}, ("version",))
        yield gauge(
            "stopping", "Whether this process stops, and begins nothing new.", float(self.is_stopping)
        )
        yield gauge(
            "refusing", "Whether a relayer has new calls refused.", float(ledger.gate.refusal is not None)
        )
        yield gauge(
            "mismatch", "Whether the chain contradicts the journal.", float(bool(ledger.view.mismatches))
        )
        yield gauge("ledger_queue_operations", "Operations that wait for a commit.", ledger.waiting)
        if head is not None:
            yield gauge("head_block", "The newest block that was read.", head.block.number)
            yield gauge(
                "head_lag_seconds", "Time since the newest block that was read.", _since(head.block.timestamp)
            )
        yield gauge(
            "head_seen_seconds",
            "Time since a node showed that there is no newer block than was read; +Inf: not since the start.",
            float("inf") if head is None else time.monotonic() - head.seen_at,
        )

    def _of_finality(self, figures: Figures) -> Iterator[Metric]:
        head, final = self._ledger.view.head, figures.final
        if head is not None and final is not None:
            yield gauge(
                "final_lag_blocks",
                "Blocks from the newest final one to the newest.",
                head.block.number - final.number,
            )
            yield gauge("final_lag_seconds", "Time since the newest final block.", _since(final.timestamp))


def _of_money(figures: Figures) -> Iterator[Metric]:
    owed = dict.fromkeys(("queued", "batched", "rejected"), Count()) | figures.charges
    numbers = {state: of.number for state, of in owed.items()} | {"settled": figures.settled}
    yield gauge(
        "charges",
        "Charges by state: those that are owed, and settled ones not final yet.",
        {(state,): number for state, number in numbers.items()},
        ("state",),
    )
    amounts: Samples = {(state,): of.amount for state, of in owed.items()}
    yield gauge("unsettled_credits", f"Charges that are owed, by state, {CREDITS}.", amounts, ("state",))
    yield gauge(
        "oldest_unsettled_seconds",
        "How long the oldest charge has waited for settlement; 0: none does.",
        _age(figures.oldest),
    )
    for name, text, of in (
        ("open_holds", "Running calls' holds", figures.holds),
        (
            "lost_calls",
            "Calls that could not be metered; as an amount, what they may have cost",
            figures.lost,
        ),
        (
            "excess_charges",
            "Charges metered beyond their holds, and the platform's loss by it",
            figures.excess,
        ),
        ("written_off_charges", "Charges that were written off", figures.voided),
    ):
        yield gauge(name, f"{text}.", of.number)
        yield gauge(f"{name}_credits", f"{text}, {CREDITS}.", of.amount)


def _since(timestamp: int) -> float:
    return time.time() - timestamp


def _age(captured_at: int | None) -> float:
    return 0 if captured_at is None else max(0.0, (now_ms() - captured_at) / 1000)


class _Lately(Generic[T]):
    """The answer to a question to the ledger, which is asked once at a time and once a second."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self._ask = ask
        self._asked: asyncio.Future[T] | None = None
        self._asked_at = 0.0

    async def __call__(self) -> T:
        """The answer.

        Raises:
            LedgerError: or none came in time.
        """
        now = time.monotonic()
        asked = self._asked
        if asked is None or (asked.done() and now - self._asked_at > _AGE_SECONDS):
            asked = self._asked = asyncio.ensure_future(self._ask())
            self._asked_at = now
            asked.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await asyncio.wait([asked], timeout=_ANSWER_SECONDS)
        if not asked.done():
            raise LedgerError(reason="it does not answer")
        return asked.result()
