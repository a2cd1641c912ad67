"""The parts of a relayer, and how each of them is."""

import time
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a part is."""

    OK = "ok"
    WAITING = "waiting"
    """For something outside: the fee, the node."""
    RETRYING = "retrying"
    """The last step failed; it is tried again."""
    LOW_ON_GAS = "low_on_gas"
    """The key has not the money for enough batches: nothing is sent until somebody refills it."""
    HALTED = "halted"
    """Needs a person."""
    NOT_LEADING = "not_leading"
    """Another process works on it."""


@dataclass(frozen=True, slots=True)
class PartState:
    """How a part is, and since when."""

    state: State = State.OK
    reason: str | None = None
    since: float = 0
    """Unix seconds of the host's clock."""
    failures: int = 0
    """Steps that failed since the last one that did not."""

    def become(self, state: State, reason: str | None = None, failures: int = 0) -> "PartState":
        """The same part, some time later."""
        since = self.since if state is self.state else time.time()
        return PartState(state, reason, since, failures)
