"""Server-sent events: passed on as they come, metered on a copy.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from waterfall.keccak import keccak
from waterfall.types import Usage

_MAX_EVENT_BYTES = 16 * 2**20
_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
_END_OF_EVENT = re.compile(b"|".join(_ENDS))
_LONGEST_END = max(map(len, _ENDS))
_FIELDS_WITHOUT_DATA = {b"", b"event", b"id", b"retry"}  # "" also begins a comment


class NotAStream(ValueError):
    """The upstream's bytes are not the event stream of this surface."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its bytes as they came, with the blank line, and its data."""

    raw: bytes
    data: bytes | None
    """None: it has none, as a comment that keeps a connection alive."""

    def object(self) -> dict[str, Any]:
        """Its data as the JSON object that it must be.

        Raises:
            NotAStream: it is none, or reports an error.
        """
        try:
            value = orjson.loads(self.data or b"")
        except orjson.JSONDecodeError:
            raise NotAStream("an event's data is not JSON") from None
        if not isinstance(value, dict):
            raise NotAStream("an event's data is not an object")
        if value.get("error") is not None:
            raise NotAStream(f"it reports an error: {str(value['error'])[:200]}")
        return value


@dataclass(frozen=True, slots=True)
class Seen:
    """What an event is to whoever passes it on."""

    is_output: bool = False
    """Whether output, and not only the end of the stream, comes with it or after it."""
    is_last_word: bool = False
    """Whether it tells the usage, so that it leaves only once the call is captured."""
    hidden: bool = False
    """Whether the caller did not ask for it."""


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """Cut an upstream's bytes into events.

    Raises:
        NotAStream: an event that is too large, or that is none.
    """
    buffer, searched = bytearray(), 0
    async for chunk in chunks:
        buffer += chunk
        while end := _END_OF_EVENT.search(buffer, searched):
            raw = bytes(buffer[: end.end()])
            del buffer[: len(raw)]
            searched = 0
            yield Event(raw, _data(raw))
        searched = max(0, len(buffer) - _LONGEST_END + 1)
        if len(buffer) > _MAX_EVENT_BYTES:
            raise NotAStream("an event is too large")
    if buffer.strip():
        yield Event(bytes(buffer), _data(bytes(buffer)))


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


class StreamMeter(ABC):
    """What a stream has shown so far."""

    def __init__(self) -> None:
        self.done = False
        """Whether it came to the end that the surface says it has."""
        self.pieces = 0
        """Pieces of output: each is one token or more."""
        self._hash = keccak.new(b"")
        self._passed_whole = True
        """Whether what has gone out ends with a blank line: the last event of a stream that was cut may not."""
        self._tail: list[tuple[bytes, Seen]] = []

    def take(self, event: Event) -> list[bytes]:
        """Take an event in; what may go out now. The end of a stream waits for the capture.

        Raises:
            NotAStream: the event is none of this surface.
        """
        self._hash.update(event.raw)
        seen = Seen() if event.data is None else self._see(event)
        self._tail.append((event.raw, seen))
        if self.done or seen.is_last_word or (len(self._tail) > 1 and not seen.is_output):
            return []
        passed = self.tail()
        self._tail.clear()
        self._passed_whole = event.raw.endswith(_ENDS)
        return passed

    @abstractmethod
    def _see(self, event: Event) -> Seen:
        """Note what an event with data says."""

    @abstractmethod
    def result(self) -> tuple[Usage | None, dict[str, Any] | None]:
        """Usage and the provider's object; without one, what was provably put out, a token a piece.

        None where not even a piece is there.
        """

    def tail(self, billed: Mapping[str, Any] | None = None) -> list[bytes]:
        """What has not gone out yet and may: a usage chunk only to a caller who asked for it.

        Args:
            billed: what the call cost; told beside the usage, and in a comment, which every client skips.
        """
        shown = [(raw, seen) for raw, seen in self._tail if not seen.hidden]
        if billed is None:
            return [raw for raw, _ in shown]
        facts = orjson.dumps(billed)
        first, *others = [_with(raw, facts) if seen.is_last_word else raw for raw, seen in shown] or [b"\n"]
        # A comment of its own, with a blank line, is an event without data to some clients.
        before = b"" if self._passed_whole else b"\n\n"
        return [before + b": waterfall " + facts + b"\n" + first, *others]

    def response_hash(self) -> str:
        """Hash of everything the upstream sent."""
        return "0x" + self._hash.digest().hex()


def _with(raw: bytes, facts: bytes) -> bytes:
    """An event with a field more in its object, and not a byte of the rest changed."""
    lines = raw.splitlines(keepends=True)
    of_data = [number for number, line in enumerate(lines) if line.startswith(b"data:")]
    if len(of_data) != 1:
        return raw
    line = lines[of_data[0]]
    at = line.rindex(b"}")
    lines[of_data[0]] = line[:at] + b',"waterfall":' + facts + line[at:]
    return b"".join(lines)
