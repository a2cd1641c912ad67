"""A provider and its callers, as light as Python allows: what is measured is what stands between them."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

PIECES = 20
"""Of a streamed answer."""
_USAGE = {"prompt_tokens": 12, "completion_tokens": 20, "total_tokens": 32}
_WHOLE = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "micro",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * 20},
                "finish_reason": "stop",
            }
        ],
        "usage": _USAGE,
    }
).encode()


def _event(**fields: Any) -> bytes:
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "micro", **fields}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


_STREAM = b"".join(
    (
        *(
            _event(choices=[{"index": 0, "delta": {"content": "word "}, "finish_reason": None}])
            for _ in range(PIECES)
        ),
        _event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
        _event(choices=[], usage=_USAGE),
        b"data: [DONE]\n\n",
    )
)


def _answer(body: bytes, kind: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (kind, len(body), body)


_ANSWERS = _answer(_WHOLE, b"application/json"), _answer(_STREAM, b"text/event-stream")


class Provider(asyncio.Protocol):
    """Answers every request at once, with a stream where one is asked for."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._seen = b""

    def data_received(self, data: bytes) -> None:
        self._seen += data
        head, found, body = self._seen.partition(b"\r\n\r\n")
        while found:
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            if len(body) < length:
                return
            self._transport.write(_ANSWERS[b'"stream":true' in body[:length].replace(b" ", b"")])
            self._seen = body[length:]
            head, found, body = self._seen.partition(b"\r\n\r\n")


@dataclass
class Load:
    """What callers saw, in seconds."""

    seconds: float = 0
    times: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Until the first byte of an answer's body."""

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.times) / self.seconds

    def time(self, share: float) -> float:
        """The time within which this share was answered, milliseconds."""
        return 1000 * sorted(self.times)[int(share * (len(self.times) - 1))]

    def first_byte(self, share: float) -> float:
        """The same of the first byte."""
        return 1000 * sorted(self.first)[int(share * (len(self.first) - 1))]


class _Caller(asyncio.Protocol):
    """Sends one request after another over one connection."""

    def __init__(self, request: bytes, load: Load, until: float) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request, self._load, self._until = request, load, until

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._ask()

    def _ask(self) -> None:
        self._began = time.perf_counter()
        if self._began >= self._until:
            self._transport.close()
            self.ended.set_result(None)
            return
        self._seen, self._end, self._is_first = bytearray(), 0, True
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        if not self._end:
            at = self._seen.find(b"\r\n\r\n")
            if at < 0:
                return
            head = bytes(self._seen[:at]).lower()
            if not head.startswith(b"http/1.1 200"):
                self.ended.set_exception(AssertionError(bytes(self._seen)))
                self._transport.close()
                return
            _, is_whole, length = head.partition(b"content-length:")
            self._end = at + 4 + int(length.split(b"\r\n")[0]) if is_whole else -1
        if self._is_first:
            self._is_first = False
            self._load.first.append(time.perf_counter() - self._began)
        if len(self._seen) == self._end or (self._end < 0 and self._seen.endswith(b"0\r\n\r\n")):
            self._load.times.append(time.perf_counter() - self._began)
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("it was closed"))


async def load(port: int, *, path: str, key: str, callers: int, seconds: float, stream: bool) -> Load:
    """So many callers at once, each asking again as soon as it is answered."""
    body = json.dumps(
        {
            "model": "micro",
            "messages": [{"role": "user", "content": "Say twenty words."}],
            "max_tokens": 64,
            **({"stream": True} if stream else {}),
        }
    ).encode()
    request = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    seen, loop, began = Load(), asyncio.get_running_loop(), time.perf_counter()
    protocols = [_Caller(request, seen, began + seconds) for _ in range(callers)]
    for protocol in protocols:
        await loop.create_connection(lambda protocol=protocol: protocol, "127.0.0.1", port)
    await asyncio.gather(*(protocol.ended for protocol in protocols))
    seen.seconds = time.perf_counter() - began
    return seen


async def provide(port_known: Any) -> None:
    """Be the provider, until stopped."""
    server = await asyncio.get_running_loop().create_server(Provider, "127.0.0.1", 0)
    port_known.put(server.sockets[0].getsockname()[1])
    await server.serve_forever()
