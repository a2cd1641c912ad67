"""What an API key may still spend and how often it may call: its own limits, within what its account may.

A budget counts what calls of its window were charged, and what those that run may be. It is the ledger's, so it holds however
many calls come at once and whichever gateways they come to; that its account's wallet is locked, locks it too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from waterfall.errors import RateLimited
from waterfall.ledger import schema
from waterfall.types import KeyLimits

_MINUTE_MS = 60_000


@dataclass(frozen=True, slots=True)
class Draw:
    """What a call's hold was counted against."""

    budget: str
    window: int


@dataclass(slots=True)
class Budget:
    """A budget as the books have it. A fresh key that takes an old one's place goes on with the old one's."""

    id: str
    window: int
    """Unix second at which the window began that `used` counts; 0: for ever."""
    used: int
    """Credit units: charged to calls of this window, and held for those that run."""
    next_call_at: int
    """Unix milliseconds: the time at which all earlier calls would have come, had they come evenly."""

    def turn(self, limits: KeyLimits, now: int) -> Draw:
        """Go on to the window of now, Unix milliseconds of the host's clock; never back, whatever that does."""
        seconds = limits.budget_seconds
        window = 0 if seconds is None else now // 1000 // seconds * seconds
        if window > self.window:
            self.window, self.used = window, 0
        return Draw(self.id, self.window)

    def count_call(self, limits: KeyLimits, now: int) -> None:
        """Count a call, if it may come now: as many as a minute's at once, then evenly.

        Raises:
            RateLimited: with the milliseconds after which it may.

        Source: the generic cell rate algorithm, https://www.itu.int/rec/T-REC-I.371-200403-I/en
        """
        if limits.calls_per_minute is None:
            return
        apart = _MINUTE_MS / limits.calls_per_minute
        due = max(self.next_call_at, now)
        wait = due + apart - _MINUTE_MS - now
        if wait > 0:
            raise RateLimited(limit=limits.calls_per_minute, retry_after_ms=int(wait) + 1)
        self.next_call_at = round(due + apart)


def find(execute: Callable[[sa.Executable], sa.CursorResult[Any]], id_: str) -> Budget | None:
    """A budget as it was written last."""
    table = schema.key_budgets
    columns = table.c.id, table.c.window, table.c.used, table.c.next_call_at
    row = execute(sa.select(*columns).where(table.c.id == id_)).one_or_none()
    return None if row is None else Budget(row.id, row.window, row.used, row.next_call_at)
