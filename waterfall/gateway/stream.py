"""Server-sent events of a chat completion: passed on as they come, metered on a copy.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

_MAX_EVENT_BYTES = 16 * 2**20
_END_OF_EVENT = re.compile(rb"\n\n|\r\n\r\n|\r\r")
_LONGEST_END = 4
DONE = b"[DONE]"
_FIELDS_WITHOUT_DATA = {b"", b"event", b"id", b"retry"}  # "" also begins a comment


class NotAStream(ValueError):
    """The upstream's bytes are not the event stream of a chat completion."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its bytes as they came, with the blank line, and what its data says."""

    raw: bytes
    done: bool = False
    usage: dict[str, Any] | None = None
    """The provider's usage object, where the event carries one."""
    has_choices: bool = False
    finished: bool = False
    """Whether a choice ends with it."""
    pieces: int = 0
    """Choices with a piece of output in them: each is one token or more."""


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """Cut an upstream's bytes into events.

    Raises:
        NotAStream: an event that is too large, or whose data is not a chunk or [DONE], or that is none.
    """
    buffer, searched = bytearray(), 0
    async for chunk in chunks:
        buffer += chunk
        while end := _END_OF_EVENT.search(buffer, searched):
            raw = bytes(buffer[: end.end()])
            del buffer[: len(raw)]
            searched = 0
            yield _event(raw)
        searched = max(0, len(buffer) - _LONGEST_END + 1)
        if len(buffer) > _MAX_EVENT_BYTES:
            raise NotAStream("an event is too large")
    if buffer.strip():
        yield _event(bytes(buffer))


def _event(raw: bytes) -> Event:
    data = _data(raw)
    if data is None:  # a comment, such as a keep-alive
        return Event(raw)
    if data.strip() == DONE:
        return Event(raw, done=True)
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise NotAStream("an event's data is not JSON") from None
    if not isinstance(chunk, dict):
        raise NotAStream("an event's data is not an object")
    if chunk.get("error") is not None:
        raise NotAStream(f"it reports an error: {str(chunk['error'])[:200]}")
    choices = chunk.get("choices") or []
    if not isinstance(choices, list):
        raise NotAStream("an event's choices are not a list")
    usage = chunk.get("usage")
    return Event(
        raw,
        usage=usage if isinstance(usage, dict) else None,
        has_choices=bool(choices),
        finished=any(isinstance(choice, Mapping) and choice.get("finish_reason") for choice in choices),
        pieces=sum(_has_output(choice) for choice in choices),
    )


def _data(raw: bytes) -> bytes | None:
    """The data of an event, or None where it has none.

    A line that no event stream has is not passed on as if it were a comment: it may be a whole answer.
    """
    lines = []
    for line in raw.splitlines():
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
        elif name not in _FIELDS_WITHOUT_DATA:
            raise NotAStream("a line is not that of an event stream")
    return b"\n".join(lines) if lines else None


def _has_output(choice: Any) -> bool:
    delta = choice.get("delta") if isinstance(choice, Mapping) else None
    if not isinstance(delta, Mapping):
        return False
    return any(value for name, value in delta.items() if name != "role")
