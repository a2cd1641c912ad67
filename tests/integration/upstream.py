"""An OpenAI-compatible upstream that does what a test tells it to, for faults a real model will not produce."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Self

from aiohttp import web

Behaviour = Callable[["ScriptedUpstream", web.Request, dict], Awaitable[web.StreamResponse]]


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


def stream_chunks(body: dict, pieces: tuple[str, ...] = ("Hel", "lo", " there")) -> list[bytes]:
    def delta(content: dict, reason: str | None = None) -> dict:
        return {"index": 0, "delta": content, "finish_reason": reason}

    chunks = [chunk(body, choices=[delta({"role": "assistant", "content": ""})])]
    chunks += [chunk(body, choices=[delta({"content": piece})]) for piece in pieces]
    chunks.append(chunk(body, choices=[delta({}, "stop")]))
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append(chunk(body, choices=[], usage=usage()))
    return [*chunks, b"data: [DONE]\n\n"]


async def answer(upstream: "ScriptedUpstream", request: web.Request, body: dict) -> web.StreamResponse:
    await asyncio.sleep(upstream.delay)
    if not body.get("stream"):
        return web.json_response(completion(body))
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for data in stream_chunks(body):
        await response.write(data)
        await asyncio.sleep(upstream.pause)
    return response


@dataclass
class ScriptedUpstream:
    """Serves on a free port of 127.0.0.1; `behaviour` may be changed while it runs."""

    behaviour: Behaviour = answer
    delay: float = 0
    """Seconds before an answer."""
    pause: float = 0
    """Seconds between the chunks of a stream."""
    bodies: list[dict] = field(default_factory=list)
    """What was asked, in order."""
    counts: Counter[str] = field(default_factory=Counter)
    base_url: str = ""

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/chat/completions", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.counts["started"] += 1
        response = await self.behaviour(self, request, body)
        self.counts["answered"] += 1
        return response
