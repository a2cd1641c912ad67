"""Named places in the code where a test can make this process die, as if its power was cut there.

`WATERFALL_FAILPOINT=NAME` kills the process with SIGKILL when it gets to that place, `NAME:3` when it gets there for
the third time. `NAME:3:freeze` stops it there with SIGSTOP instead, once, as a machine that is suspended: until SIGCONT.
Nothing happens without that variable.
"""

import os
import signal

from waterfall.errors import SettingsError

NAMES = frozenset(
    {
        "call.held",  # a hold is durable, its upstream not called yet
        "call.answered",  # the upstream has answered, nothing is captured yet
        "call.captured",  # the capture is durable, the client has not its last bytes yet
        "lane.planned",  # the work is chosen and signed for, nothing journalled yet
        "lane.journalled",  # the attempt is durable, not broadcast yet
        "lane.broadcast",  # the attempt was broadcast, its outcome not written yet
        "lane.mined",  # its receipt was seen, its slot not closed yet
        "indexer.read",  # blocks were read, not applied yet
        "indexer.applied",  # blocks were applied, nothing else done yet
    }
)

_passes: dict[str, int] = {}


def _armed() -> tuple[str, int, bool] | None:
    name, _, when = os.environ.get("WATERFALL_FAILPOINT", "").partition(":")
    nth, _, how = when.partition(":")
    if not name:
        return None
    if name not in NAMES or not (nth or "1").isdecimal() or how not in {"", "freeze"}:
        raise SettingsError(reason=f"WATERFALL_FAILPOINT: {name!r} is none of {', '.join(sorted(NAMES))}")
    return name, int(nth or 1), how == "freeze"


_ARMED = _armed()


def failpoint(name: str) -> None:
    """Die here, or freeze, if a test asks for it."""
    if _ARMED is None or _ARMED[0] != name:
        return
    _, nth, freezes = _ARMED
    _passes[name] = _passes.get(name, 0) + 1
    if _passes[name] == nth:
        os.kill(os.getpid(), signal.SIGSTOP if freezes else signal.SIGKILL)
