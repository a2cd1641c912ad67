"""One process of Waterfall, started again whenever it ends, as an operator's supervisor would."""

import asyncio
import contextlib
import re
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from waterfall.devnet.processes import Child, ProcessFailed
from waterfall.errors import SettingsError

_READY = re.compile(r"Waterfall serves platform \d+ at (http://\S+)|Waterfall settles for platform")
_READY_SECONDS = 40
_POLL_SECONDS = 0.05
_PAUSE_SECONDS = 0.3
_PAUSE_AFTER_FAILURE_SECONDS = 1.0
_SUSPICIOUS = (
    '"event":"unexpected"',
    '"event":"halted"',
    '"event":"bound broken"',
    '"event":"sums did not add up',
    "Waterfall failed, ",
    "Traceback (most recent call last)",
)
"""In a log: what no fault excuses."""


@dataclass
class Service:
    """A process and its supervisor."""

    name: str
    command: str
    """serve, gateway or relayer."""
    config: Path
    environment: Mapping[str, str] = field(repr=False)
    url: str | None = field(default=None, init=False)
    """Of its gateway, while it is up."""
    ends: Counter[str] = field(default_factory=Counter, init=False)
    """How often it ended, by what ended it."""
    starts: int = field(default=0, init=False)
    died_at_failpoints: int = field(default=0, init=False)
    findings: list[str] = field(default_factory=list, init=False)
    """What it should not have done."""
    _child: Child | None = field(default=None, init=False)
    _failpoint: str | None = field(default=None, init=False)
    _why: str | None = field(default=None, init=False)
    _up: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _keeping: "asyncio.Task[None] | None" = field(default=None, init=False)

    async def start(self) -> None:
        """Start it, and keep it up from now on.

        Raises:
            SettingsError: it does not come up at all.
        """
        self._keeping = asyncio.create_task(self._keep_up())
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self._up.wait()
        except TimeoutError:
            tail = "" if self._child is None else self._child.log_tail()
            raise SettingsError(reason=f"{self.name} does not start:\n{tail}") from None

    async def stop(self) -> None:
        """End it by SIGTERM, for good."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        if self._child is not None:
            self._child.signal(signal.SIGCONT)
            await self._child.stop(seconds=30)
            self._look_through(self._child)
            self._child = None

    def signal(self, number: signal.Signals, why: str | None = None) -> None:
        """Send it a signal; `why` names what then ends it."""
        if self._child is not None and self._child.pid is not None:
            self._why = why or self._why
            self._child.signal(number)

    def die_at(self, point: str) -> None:
        """Kill it, and have the next one die at a failpoint."""
        self._failpoint = point
        self.signal(signal.SIGKILL, "kill")

    @property
    def log(self) -> Path | None:
        """The newest process's."""
        return None if self._child is None else self._child.log

    async def _keep_up(self) -> None:
        while True:
            point, self._failpoint, self._why = self._failpoint, None, None
            self.starts += 1
            child = self._child = self._next(point)
            child.start()
            failed = False
            with contextlib.suppress(ProcessFailed):
                found = await child.wait_for(lambda child=child: self._ready(child), seconds=_READY_SECONDS)  # type: ignore[misc]
                self.url = found or None
                self._up.set()
            was_up = self._up.is_set()
            while child.pid is not None:
                if not was_up:  # it neither came up in time nor ended
                    child.signal(signal.SIGKILL)
                await asyncio.sleep(_POLL_SECONDS)
            self.url = None
            self._up.clear()
            failed = self._ended(child, point, was_up=was_up)
            await child.stop()
            await asyncio.sleep(_PAUSE_AFTER_FAILURE_SECONDS if failed else _PAUSE_SECONDS)

    def _next(self, point: str | None) -> Child:
        waterfall = "from waterfall.cli import main; main()"
        command = [sys.executable, "-P", "-c", waterfall, self.command, "--config", str(self.config)]
        environment = {**self.environment, **({"WATERFALL_FAILPOINT": point} if point else {})}
        return Child(f"{self.name}-{self.starts:03}", command, self.config.parent / "logs", environment)

    def _ready(self, child: Child) -> str | None:
        found = _READY.search(child.log.read_text("utf-8", "replace"))
        return None if found is None else found[1] or ""

    def _ended(self, child: Child, point: str | None, *, was_up: bool) -> bool:
        """Note how it ended; whether by a failure of its own."""
        self._look_through(child)
        if self._why is not None:
            self.ends[self._why] += 1
            return False
        if point is not None and child.code == -signal.SIGKILL:
            self.died_at_failpoints += 1
            self.ends[f"failpoint {point.partition(':')[0]}"] += 1
            return False
        if not was_up:
            self.ends["could not start"] += 1
            return True
        self.ends["by itself"] += 1
        self.findings.append(f"{self.name} ended by itself with code {child.code}: see {child.log}")
        return True

    def _look_through(self, child: Child) -> None:
        for line in child.log.read_text("utf-8", "replace").splitlines():
            if any(word in line for word in _SUSPICIOUS):
                self.findings.append(f"{child.log}: {line[:500]}")
