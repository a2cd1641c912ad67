"""A provider that speaks OpenAI's chat completions, fails on demand, and remembers what it was asked.

Every call has a number in its first message; what it uses follows from the number, so that anybody can say what each
call must cost.
"""

import asyncio
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

_NUMBER = re.compile(r"call (\d+)")
_STEPS = 4
_FAILS = 0.7
"""Which part of the calls a fault hits: the others show that it is the call's own fate."""
_STALL_SECONDS = 8.0


def content(number: int) -> str:
    """The message of a call."""
    return f"call {number}: say something"


def usage(number: int, most: int) -> tuple[int, int]:
    """Input and output tokens of a call that may put out so many."""
    dice = random.Random(number)  # noqa: S311
    return dice.randint(3, 60), dice.randint(1, most)


@dataclass
class Upstream:
    """Serves on a free port of 127.0.0.1."""

    mode: str | None = None
    """The fault that is on: 429, 500, cut, stalled or slow."""
    started: Counter[int] = field(default_factory=Counter, init=False)
    """How often each call came."""
    refused: set[int] = field(default_factory=set, init=False)
    """Calls that cost nothing."""
    whole: set[int] = field(default_factory=set, init=False)
    """Calls answered to the last byte, usage and all, to somebody who still listened."""
    outcomes: Counter[str] = field(default_factory=Counter, init=False)
    base_url: str = field(default="", init=False)
    _healed: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.base_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        found = _NUMBER.match(body["messages"][0]["content"])
        number = int(found[1]) if found else 0
        self.started[number] += 1
        mode = self.mode if random.random() < _FAILS else None  # noqa: S311
        self.outcomes[mode or "healthy"] += 1
        await asyncio.sleep(random.uniform(0.2, 2) if mode == "slow" else random.uniform(0.002, 0.1))  # noqa: S311
        if mode in {"429", "500"}:
            self.refused.add(number)
            error = {"message": f"the scripted provider answers {mode}", "type": "error", "code": mode}
            return web.json_response({"error": error}, status=int(mode))
        answer = self._stream if body.get("stream") else self._whole
        try:
            return await answer(request, body, number, mode)
        except ConnectionError:  # whoever asked has died
            return web.Response()

    async def _whole(
        self, request: web.Request, body: dict[str, Any], number: int, mode: str | None
    ) -> web.StreamResponse:
        choice = {"index": 0, "message": {"role": "assistant", "content": "done"}, "finish_reason": "stop"}
        raw = json.dumps(_base(body, "chat.completion") | {"choices": [choice], "usage": _used(body, number)})
        data = raw.encode()
        response = web.StreamResponse(
            headers={"Content-Type": "application/json", "Content-Length": str(len(data))}
        )
        await response.prepare(request)
        if mode in {"cut", "stalled"}:
            await response.write(data[: len(data) // 2])
            return await self._break_off(request, response, mode)
        await response.write(data)
        self._note_whole(request, number)
        return response

    async def _stream(
        self, request: web.Request, body: dict[str, Any], number: int, mode: str | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        breaks = random.randint(0, _STEPS) if mode in {"cut", "stalled"} else None  # noqa: S311
        pause = 0.3 if mode == "slow" else 0.02
        for step in range(_STEPS):
            if step == breaks:
                return await self._break_off(request, response, mode)
            delta = {"index": 0, "delta": {"content": f"piece {step} "}, "finish_reason": None}
            await response.write(_event(_base(body, "chat.completion.chunk") | {"choices": [delta]}))
            await asyncio.sleep(pause)
        end = {"index": 0, "delta": {}, "finish_reason": "stop"}
        await response.write(_event(_base(body, "chat.completion.chunk") | {"choices": [end]}))
        if breaks is not None:
            return await self._break_off(request, response, mode)
        last = {"choices": [], "usage": _used(body, number)}
        await response.write(_event(_base(body, "chat.completion.chunk") | last))
        await response.write(b"data: [DONE]\n\n")
        self._note_whole(request, number)
        return response

    def _note_whole(self, request: web.Request, number: int) -> None:
        if request.transport is not None and not request.transport.is_closing():
            self.whole.add(number)

    async def _break_off(
        self, request: web.Request, response: web.StreamResponse, mode: str | None
    ) -> web.StreamResponse:
        if mode == "stalled":
            await asyncio.sleep(_STALL_SECONDS)
        if request.transport is not None:
            request.transport.abort()
        return response


def _base(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-torture", "object": kind, "created": 1, "model": body["model"]}


def _used(body: dict[str, Any], number: int) -> dict[str, int]:
    given, put_out = usage(number, body["max_tokens"])
    return {"prompt_tokens": given, "completion_tokens": put_out, "total_tokens": given + put_out}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"
