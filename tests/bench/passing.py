"""A bare gateway in the same libraries, which passes everything through and bills nothing."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse


def pass_through(port: int, upstream: str) -> None:
    """Serve, until stopped."""
    uvicorn.run(_app(upstream), host="127.0.0.1", port=port, log_level="critical", access_log=False)


def _app(upstream: str) -> FastAPI:
    session: list[aiohttp.ClientSession] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as opened:
            session.append(opened)
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def _(request: Request) -> Any:
        body = await request.body()
        headers = {"Content-Type": "application/json"}
        response = await session[0].post(f"{upstream}/chat/completions", data=body, headers=headers)
        if b'"stream": true' not in body:
            return Response(await response.read(), media_type="application/json")
        return StreamingResponse(response.content.iter_any(), media_type="text/event-stream")

    return app
