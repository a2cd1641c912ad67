"""Where logs go: to the terminal as lines for people, or to a file or pipe as JSON; and what never gets into them."""

import atexit
import json
import re
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

_SHORTEST_SECRET = 8
_TOGETHER_SECONDS = 0.01
_NOTHING = re.compile(r"(?!)")

_concealed: set[str] = set()
_pattern = _NOTHING
_lowered: tuple[str, ...] = ()


def configure(to: Path | None = None) -> None:
    """Log to a file, or to standard error."""
    stream: TextIO = sys.stderr
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        stream = to.open("a")
    renderer = (
        structlog.dev.ConsoleRenderer() if stream.isatty() else structlog.processors.JSONRenderer(_json)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
            _redact_line,
        ],
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, Lines(stream))),
        cache_logger_on_first_use=False,
    )


def _json(event: EventDict, **options: Any) -> str:
    try:
        return orjson.dumps(event, default=options["default"]).decode()
    except TypeError:  # amounts beyond 64 bits, halves of characters
        return json.dumps(event, **options, separators=(",", ":"))


class Lines:
    """A file whose lines are written at once while they come now and then, and together while they come thick.

    Every call logs several. Each write lets other threads take the interpreter, and the caller waits for it to come back,
    for longer than everything else that a line costs. A process that is killed loses what came in the last hundredth of
    a second, in which it had written before.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: deque[str] = deque()
        self._written_at = 0.0
        self._writing = threading.Lock()
        self._some_wait = threading.Event()
        threading.Thread(target=self._write_later, name="log", daemon=True).start()
        atexit.register(self._write)

    def write(self, line: str) -> None:
        """Take a line."""
        self._lines.append(line)

    def flush(self) -> None:
        """Write what there is, or let it wait for what comes at the same time."""
        if time.monotonic() - self._written_at >= _TOGETHER_SECONDS:
            self._write()
        elif not self._some_wait.is_set():
            self._some_wait.set()

    def _write(self) -> None:
        with self._writing, suppress(OSError, ValueError):  # nobody reads any more: the service goes on
            while self._lines:
                self._stream.write(self._lines.popleft())
            self._stream.flush()
        self._written_at = time.monotonic()

    def _write_later(self) -> None:
        while self._some_wait.wait():
            time.sleep(_TOGETHER_SECONDS)
            self._some_wait.clear()
            self._write()


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
