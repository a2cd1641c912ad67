"""Where logs go: to the terminal as lines for people, or to a file or pipe as JSON; and what never gets into them."""

import json
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

_SHORTEST_SECRET = 8
_NOTHING = re.compile(r"(?!)")

_concealed: set[str] = set()
_pattern = _NOTHING
_lowered: tuple[str, ...] = ()


def configure(to: Path | None = None) -> None:
    """Log to a file, or to standard error."""
    stream: TextIO = sys.stderr
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        stream = to.open("a", buffering=1)
    renderer = structlog.dev.ConsoleRenderer() if stream.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
            _redact_line,
        ],
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )


def conceal(*secrets: str) -> None:
    """From now on, put a word in the place of these texts, in any case, wherever they would be written.

    The last line of defence: no event should hold them to begin with. Texts of fewer than 8 characters are left, as
    they would blank out what has nothing to do with them.
    """
    global _pattern, _lowered  # noqa: PLW0603 - structlog's configuration is the process's, too
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            for text in (secret, repr(secret)[1:-1]):
                _concealed.update((text, json.dumps(text)[1:-1]))
    longest_first = sorted(_concealed, key=len, reverse=True)
    _pattern = re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE) if _concealed else _NOTHING
    _lowered = tuple({secret.lower() for secret in _concealed})


def redact(text: str) -> str:
    """The text without what is concealed."""
    if text.isascii():
        # Five times faster than the pattern, and every call logs several lines.
        lower = text.lower()
        if not any(secret in lower for secret in _lowered):
            return text
    return _pattern.sub("[concealed]", text)


def keep(error: Exception) -> Path:
    """Write the traceback of an error nobody foresaw; where it is."""
    with tempfile.NamedTemporaryFile("w", prefix="waterfall-", suffix=".log", delete=False) as file:
        file.write(redact("".join(traceback.format_exception(error))))
    return Path(file.name)


def _redact_line(_: WrappedLogger, __: str, line: EventDict | str | bytes) -> str:
    """The last processor: rendered, an event has no place left where anything could hide."""
    return redact(str(line))
