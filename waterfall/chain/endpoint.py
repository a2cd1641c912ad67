"""One node of several: whether it can be used, and how it has done."""

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import structlog

from waterfall.chain.jsonrpc import BatchesRefused, Call, NoAnswer, Node, Refused, name_of

log = structlog.get_logger()

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_FIRST_BACKOFF_SECONDS = 1
_LONGEST_BACKOFF_SECONDS = 60
_LONGEST_RETRY_AFTER_SECONDS = 300
_FORGIVEN_SECONDS = 60
"""Without a failure for so long, an endpoint's backoff starts anew."""
_BATCH = 100
_SINGLES_AT_ONCE = 8


@dataclass
class Latency:
    """How long an endpoint's answers took, in seconds."""

    count: int = 0
    total: float = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    """How many took at most as long as the bound in `BUCKETS` and longer than the one before; the last: longer."""

    def add(self, seconds: float) -> None:
        """Count one."""
        self.count += 1
        self.total += seconds
        self.buckets[bisect_left(BUCKETS, seconds)] += 1


class Endpoint:
    """One node. Everything public may be shown."""

    def __init__(
        self,
        url: str,
        *,
        chain_id: int | None,
        timeout_seconds: float,
        most_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        """Describe a node.

        Raises:
            ValueError: not an http(s) URL; the message does not show it.
        """
        self.name = name_of(url)
        """Host and port."""
        self.last_error: str | None = None
        """Why it is not healthy, or None."""
        self.requests: Counter[str] = Counter()
        """How many requests ended how: `answered`, `refused` (an error about the request), `limited` (asked for
        less), `failed` (no answer, or none that can be used), `wrong_chain`."""
        self.latency = Latency()
        self._node = Node(url, timeout_seconds=timeout_seconds, most_bytes=most_bytes)
        self._chain_id = chain_id
        self._clock = clock
        self._verified = chain_id is None
        self._verification: asyncio.Task[Any] | None = None
        self._failures = 0
        self._takes_batches = True
        self.is_of_another_chain = False
        """Whether that is why it cannot be used."""
        self.is_behind = False
        """Whether it lacks blocks that another node has had for a while."""
        self.failed_at = float("-inf")
        """On the clock: its last failure."""
        self._avoided_until = float("-inf")

    def __repr__(self) -> str:
        return f"Endpoint({self.name})"

    @property
    def healthy(self) -> bool:
        """Whether its last answer could be used, and it has the newest blocks."""
        return self.last_error is None and not self.is_behind

    @property
    def is_due(self) -> bool:
        """Whether its backoff is over."""
        return self._clock() >= self._avoided_until

    @property
    def is_ready(self) -> bool:
        """Whether it can be used at once: it is due, and is known to be of the right chain."""
        return self.is_due and self._verified

    @property
    def is_being_verified(self) -> bool:
        """Whether its chain is being asked for."""
        return self._verification is not None

    # ── Asking ───────────────────────────────────────────────────────────────────────────────────────

    async def call(self, http: aiohttp.ClientSession, method: str, parameters: Sequence[Any]) -> Any:
        """The result of one call, by a node of the right chain.

        Raises:
            NoAnswer, Refused
        """
        await self.verify(http)
        return await self._watched(self._node.single(http, method, parameters))

    async def batch(self, http: aiohttp.ClientSession, calls: Sequence[Call]) -> list[Any]:
        """The results of many calls, each its own or a `Refused`; in one request where the node takes that.

        Raises:
            NoAnswer: to one of them at least.
        """
        await self.verify(http)
        answers: list[Any] = []
        for start in range(0, len(calls), _BATCH):
            answers += await self._watched(self._part(http, calls[start : start + _BATCH]))
        return answers

    async def verify(self, http: aiohttp.ClientSession) -> None:
        """Make sure that this is a node of the right chain, unless that is known; once for all who wait for it.

        Raises:
            NoAnswer: it is not, or does not say.
        """
        if self._verified:
            return
        if self._verification is None:
            self._verification = asyncio.create_task(self._watched(self._verify(http), is_probe=True))
            self._verification.add_done_callback(self._verification_ended)
        await asyncio.shield(self._verification)

    def _verification_ended(self, task: asyncio.Task[Any]) -> None:
        self._verification = None
        if not task.cancelled():
            task.exception()  # whoever waited has it

    async def close(self) -> None:
        """End what nobody waits for."""
        if self._verification is not None:
            self._verification.cancel()
            await asyncio.wait([self._verification])

    async def _verify(self, http: aiohttp.ClientSession) -> None:
        try:
            found = await self._node.single(http, "eth_chainId", ())
        except Refused as refused:
            raise NoAnswer(f"it does not tell its chain: {refused.message}", delivered=False) from None
        except NoAnswer as failure:
            failure.delivered = False
            raise
        chain = int(found, 16) if _is_quantity(found) else None
        if chain != self._chain_id:
            shown = "none" if chain is None else f"chain {chain}"
            reason = f"it is a node of {shown}, not of chain {self._chain_id}"
            raise NoAnswer(reason, outcome="wrong_chain", delivered=False)
        self._verified = True

    async def _part(self, http: aiohttp.ClientSession, calls: Sequence[Call]) -> list[Any]:
        if self._takes_batches and len(calls) > 1:
            try:
                return await self._node.together(http, calls)
            except BatchesRefused:
                self._takes_batches = False
                log.info("no batches", endpoint=self.name)
        turn = asyncio.Semaphore(_SINGLES_AT_ONCE)

        async def one(method: str, parameters: Sequence[Any]) -> Any:
            async with turn:
                try:
                    return await self._node.single(http, method, parameters)
                except Refused as refused:
                    return refused

        try:
            async with asyncio.TaskGroup() as together:
                answers = [together.create_task(one(*call)) for call in calls]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return [answer.result() for answer in answers]

    # ── Health ───────────────────────────────────────────────────────────────────────────────────────

    async def _watched(self, work: Coroutine[Any, Any, Any], *, is_probe: bool = False) -> Any:
        """Do a request and keep how it went."""
        started = self._clock()
        try:
            answer = await work
        except Refused:
            self._succeeded(started, "refused")
            raise
        except NoAnswer as failure:
            self._failed(failure)
            raise
        self._succeeded(started, "answered", is_probe=is_probe)
        return answer

    def _succeeded(self, started: float, outcome: str, *, is_probe: bool = False) -> None:
        self.requests[outcome] += 1
        self.latency.add(self._clock() - started)
        # An answer to a question older than the last failure says nothing about now, and within the backoff a probe
        # says nothing about other methods.
        counts = started >= self.failed_at and (self.is_due or not is_probe)
        if self.last_error is not None and counts:
            log.info("node answers again", endpoint=self.name)
            self.last_error = None
            self._avoided_until = float("-inf")

    def _failed(self, failure: NoAnswer) -> None:
        now = self._clock()
        self.requests[failure.outcome] += 1
        if self.last_error != failure.reason:
            level = log.error if failure.outcome == "wrong_chain" else log.warning
            level("node cannot be used", endpoint=self.name, reason=failure.reason)
        self.last_error = failure.reason
        self.is_of_another_chain = failure.outcome == "wrong_chain"
        self._verified = self._chain_id is None
        failed_before, self.failed_at = self.failed_at, now
        if now < self._avoided_until:
            return  # calls that were under way together count as one
        if now > failed_before + _FORGIVEN_SECONDS + self._backoff():
            self._failures = 0
        self._failures += 1
        asked_for = min(failure.retry_after, _LONGEST_RETRY_AFTER_SECONDS)
        self._avoided_until = now + max(self._backoff(), asked_for)

    def _backoff(self) -> float:
        if self._failures == 0:
            return 0
        # No jitter: the few that ask one node are not in step with each other.
        return float(min(_FIRST_BACKOFF_SECONDS * 2 ** min(self._failures - 1, 10), _LONGEST_BACKOFF_SECONDS))


def _is_quantity(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.startswith("0x") and int(value, 16) >= 0
    except ValueError:
        return False
