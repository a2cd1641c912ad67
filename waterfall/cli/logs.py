"""Where logs go: to the terminal as lines for people, or to a file or pipe as JSON."""

import sys
import tempfile
import traceback
from pathlib import Path
from typing import TextIO

import structlog


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
        ],
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )


def keep(error: Exception) -> Path:
    """Write the traceback of an error nobody foresaw; where it is."""
    with tempfile.NamedTemporaryFile("w", prefix="waterfall-", suffix=".log", delete=False) as file:
        traceback.print_exception(error, file=file)
    return Path(file.name)
