"""Server-sent events of a chat completion: passed on as they come, metered on a copy.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

_MAX_EVENT_BYTES = 16 * 2**20
DONE = b"[DONE]"


class NotAStream(ValueError):
    """The upstream's bytes are not the event stream of a chat completion."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its bytes as they came, with the blank line, and what its data says."""

    raw: bytes
    done: bool
    usage: dict[str, Any] | None
    """The provider's usage object, where the event carries one."""
    has_choices: bool
    pieces: int
    """Choices with a piece of output in them: each is one token or more."""


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """Cut an upstream's bytes into events.

    Raises:
        NotAStream: an event that is too large, or whose data is not a JSON object or [DONE].
    """
    buffer = b""
    async for chunk in chunks:
        buffer += chunk
        while (end := _end_of_event(buffer)) is not None:
            raw, buffer = buffer[:end], buffer[end:]
            yield _event(raw)
        if len(buffer) > _MAX_EVENT_BYTES:
            raise NotAStream("an event is too large")
    if buffer.strip():
        yield _event(buffer)


def _end_of_event(buffer: bytes) -> int | None:
    ends = [at + len(mark) for mark in (b"\n\n", b"\r\n\r\n", b"\r\r") if (at := buffer.find(mark)) >= 0]
    return min(ends, default=None)


def _event(raw: bytes) -> Event:
    data = b"\n".join(line[5:].removeprefix(b" ") for line in raw.splitlines() if line.startswith(b"data:"))
    if not data:  # a comment, such as a keep-alive
        return Event(raw, done=False, usage=None, has_choices=True, pieces=0)
    if data.strip() == DONE:
        return Event(raw, done=True, usage=None, has_choices=False, pieces=0)
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise NotAStream("an event's data is not JSON") from None
    if not isinstance(chunk, dict):
        raise NotAStream("an event's data is not an object")
    if chunk.get("error") is not None:
        raise NotAStream(f"it reports an error: {str(chunk['error'])[:200]}")
    choices = chunk.get("choices") or []
    usage = chunk.get("usage")
    return Event(
        raw,
        done=False,
        usage=usage if isinstance(usage, dict) else None,
        has_choices=bool(choices),
        pieces=sum(_has_output(choice) for choice in choices),
    )


def _has_output(choice: Any) -> bool:
    delta = choice.get("delta") if isinstance(choice, Mapping) else None
    if not isinstance(delta, Mapping):
        return False
    return any(value for name, value in delta.items() if name != "role")
