"""An OpenAI-compatible upstream that does what a test tells it to, for faults a real model will not produce."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Self

from aiohttp import web

Behaviour = Callable[["ScriptedUpstream", web.Request, dict], Awaitable[web.StreamResponse]]
End = Literal["whole", "closed", "reset", "stalled"]
"""How an answer ends: as it should, its connection closed or reset in the middle, or never."""

DONE = b"data: [DONE]\n\n"


def usage(prompt: int = 12, completion: int = 5) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def completion(body: dict, *, used: dict | None = None, text: str = "Hello there") -> dict:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": usage() if used is None else used,
    }


def chunk(body: dict, **fields: object) -> bytes:
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    return b"data: " + json.dumps(base | fields).encode() + b"\n\n"


def delta(content: dict, reason: str | None = None, index: int = 0) -> dict:
    return {"index": index, "delta": content, "finish_reason": reason}


def stream_chunks(body: dict, pieces: Iterable[str] = ("Hel", "lo", " there")) -> list[bytes]:
    """A whole stream as OpenAI sends it: role, pieces, reason, usage where it was asked for, [DONE]."""
    chunks = [chunk(body, choices=[delta({"role": "assistant", "content": ""})])]
    chunks += [chunk(body, choices=[delta({"content": piece})]) for piece in pieces]
    chunks.append(chunk(body, choices=[delta({}, "stop")]))
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append(chunk(body, choices=[], usage=usage()))
    return [*chunks, DONE]


# ── Behaviours ───────────────────────────────────────────────────────────────────────────────────────


async def answer(upstream: "ScriptedUpstream", request: web.Request, body: dict) -> web.StreamResponse:
    """What a healthy upstream does."""
    await asyncio.sleep(upstream.delay)
    if not body.get("stream"):
        await upstream.permit()
        return web.json_response(completion(body))
    return await _stream(upstream, request, stream_chunks(body), "whole")


def answers(
    content: object,
    *,
    status: int = 200,
    content_type: str = "application/json",
    headers: dict | None = None,
    end: End = "whole",
) -> Behaviour:
    """Answers with these bytes, or this object as JSON; cut short, it has announced more than it sends."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()

    async def behaviour(upstream: "ScriptedUpstream", request: web.Request, body: dict) -> web.StreamResponse:
        if end == "whole":
            return web.Response(body=raw, status=status, content_type=content_type, headers=headers)
        length = {"Content-Length": str(len(raw) + 100), "Content-Type": content_type}
        response = web.StreamResponse(status=status, headers=length | (headers or {}))
        await response.prepare(request)
        await response.write(raw)
        return await _end(upstream, request, response, end)

    return behaviour


def uses(used: object) -> Behaviour:
    """Answers whole, with this usage object."""

    async def behaviour(upstream: "ScriptedUpstream", request: web.Request, body: dict) -> web.StreamResponse:
        return web.json_response({**completion(body), "usage": used})

    return behaviour


def streams(make: Callable[[dict], Iterable[bytes]] = stream_chunks, end: End = "whole") -> Behaviour:
    """Streams these writes."""

    async def behaviour(upstream: "ScriptedUpstream", request: web.Request, body: dict) -> web.StreamResponse:
        return await _stream(upstream, request, make(body), end)

    return behaviour


def writes(raw: bytes) -> Behaviour:
    """Writes these bytes where HTTP is expected, and closes the connection."""

    async def behaviour(upstream: "ScriptedUpstream", request: web.Request, body: dict) -> web.StreamResponse:
        request.transport.write(raw)
        request.transport.close()
        return web.Response()

    return behaviour


async def stalls(upstream: "ScriptedUpstream", request: web.Request, body: dict) -> web.StreamResponse:
    """Takes the request and never answers."""
    await asyncio.Event().wait()
    raise AssertionError


async def _stream(
    upstream: "ScriptedUpstream", request: web.Request, chunks: Iterable[bytes], end: End
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for data in chunks:
        await upstream.permit()
        await response.write(data)
        upstream.counts["chunks"] += 1
        await asyncio.sleep(upstream.pause)
    return await _end(upstream, request, response, end)


async def _end(
    upstream: "ScriptedUpstream", request: web.Request, response: web.StreamResponse, end: End
) -> web.StreamResponse:
    if end == "stalled":
        await asyncio.Event().wait()
    if end == "closed":
        request.transport.close()
    if end == "reset":
        request.transport.abort()
    return response


# ── The server ───────────────────────────────────────────────────────────────────────────────────────


@dataclass
class ScriptedUpstream:
    """Serves on a free port of 127.0.0.1; `behaviour` may be changed while it runs."""

    behaviour: Behaviour = answer
    delay: float = 0
    """Seconds before an answer."""
    pause: float = 0
    """Seconds between the chunks of a stream."""
    permits: asyncio.Semaphore | None = None
    """Where it is there, every answer and every chunk of a stream takes one first."""
    keepalive_seconds: float = 75
    """How long it keeps an idle connection."""
    bodies: list[dict] = field(default_factory=list)
    """What was asked, in order."""
    headers: list[dict] = field(default_factory=list)
    """What it was asked with, in order."""
    counts: Counter[str] = field(default_factory=Counter)
    """Calls started and answered, and chunks written."""
    base_url: str = ""

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**26)
        for path in ("chat/completions", "responses", "messages", "messages/count_tokens", "embeddings"):
            app.router.add_post(f"/v1/{path}", self._serve)
        self._runner = web.AppRunner(
            app, shutdown_timeout=0.1, keepalive_timeout=self.keepalive_seconds, access_log=None
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def reset(self) -> Self:
        """Healthy again, and as if nothing had been asked."""
        self.behaviour, self.delay, self.pause, self.permits = answer, 0, 0, None
        self.bodies, self.headers, self.counts = [], [], Counter()
        return self

    async def permit(self) -> None:
        if self.permits is not None:
            await self.permits.acquire()

    async def until(self, count: str, reached: int) -> None:
        """Wait until so many were counted."""
        async with asyncio.timeout(20):
            while self.counts[count] < reached:
                await asyncio.sleep(0.005)

    async def until_disconnected(self) -> None:
        """Wait until no connection to it is open."""
        async with asyncio.timeout(20):
            while self._runner.server.connections:
                await asyncio.sleep(0.005)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.counts["started"] += 1
        response = await self.behaviour(self, request, body)
        self.counts["answered"] += 1
        return response


@contextlib.asynccontextmanager
async def deaf_server() -> AsyncIterator[str]:
    """The base URL of a server that takes connections and never reads from them."""
    connected: list[asyncio.StreamWriter] = []

    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()
        connected.append(writer)

    server = await asyncio.start_server(ignore, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        for writer in connected:
            writer.transport.abort()
        server.close()
        await server.wait_closed()
