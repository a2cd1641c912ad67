"""When to look again. Measured with the monotonic clock: the host's may jump, and nothing here moves with it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

A = TypeVar("A")
T = TypeVar("T")

_EARLY, _LATE = 0.9, 2.0
_FINEST_SECONDS = 0.01
_ALERT_SECONDS = 60


class Pace:
    """How often blocks come, from when they were seen to come, and when to look for the next one."""

    def __init__(self, poll_seconds: float) -> None:
        """A pace that is not known yet; `poll_seconds` is how often to look while no block is due."""
        self._poll = poll_seconds
        self.newest: int | None = None
        """Number of the chain's newest block, as last seen."""
        self._seen_at = 0.0
        self.interval: float | None = None
        """Seconds between blocks, as seen lately; None: not known yet."""

    def saw(self, number: int) -> None:
        """The chain's newest block has this number now."""
        if number == self.newest:
            return
        now = time.monotonic()
        if self.newest is not None and number > self.newest:
            seen = (now - self._seen_at) / (number - self.newest)
            self.interval = seen if self.interval is None else self.interval + (seen - self.interval) / 4
        self.newest, self._seen_at = number, now

    @property
    def waited(self) -> float:
        """Seconds since the newest block was first seen."""
        return time.monotonic() - self._seen_at

    def pause(self) -> float:
        """Seconds to wait before looking again: less when the next block is due, more when it is not."""
        if self.interval is None:
            return self._poll
        finest = max(_FINEST_SECONDS, self.interval / 20)
        waited = self.waited
        if waited < _EARLY * self.interval:
            return min(self._poll, max(finest, _EARLY * self.interval - waited))
        return min(self._poll, finest) if waited < _LATE * self.interval else self._poll


class Alerts:
    """Lets the same alert through once a minute: a lane looks many times a second."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def due(self, alert: str) -> bool:
        """Whether this alert is to be raised now."""
        now = time.monotonic()
        if now - self._last.get(alert, float("-inf")) < _ALERT_SECONDS:
            return False
        self._last[alert] = now
        return True


async def gather(call: Callable[[A], Awaitable[T]], of: Iterable[A], at_once: int = 16) -> list[T]:
    """The results of a call of each of many things, in their order, no more than so many under way at once."""
    places = asyncio.Semaphore(at_once)

    async def place(one: A) -> T:
        async with places:
            return await call(one)

    return await asyncio.gather(*(place(one) for one in of))
