"""Follows every request: its id in its answer and in all lines that are logged for it, its count, its time, its trace."""

import itertools
import re
import secrets
import time

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from waterfall.gateway.tracing import Tracing
from waterfall.metrics import Metrics

REQUEST_ID = "x-request-id"
_REQUEST_ID = REQUEST_ID.encode()

_SANE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER = "other"
_LEFT = "none"
"""The status of a request whose caller left before any."""


class Following:
    """Wraps the whole application, so that no answer goes without."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._process = secrets.token_hex(8)
        self._numbers = itertools.count(1)

    def _new_id(self) -> str:
        """Unlike any other; nothing depends on whether it can be guessed."""
        return f"{self._process}{next(self._numbers):016x}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, began, status, route = Headers(scope=scope), time.monotonic(), _LEFT, _OTHER
        given = headers.get(REQUEST_ID, "")
        request_id = given if _SANE.fullmatch(given) else self._new_id()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                message["headers"] = [*message.get("headers", ()), (_REQUEST_ID, request_id.encode())]
            await send(message)

        method = scope["method"] if scope["method"] in _METHODS else _OTHER
        try:
            with (
                structlog.contextvars.bound_contextvars(request_id=request_id),
                self._tracing.request(method, headers) as span,
            ):
                span.set_attribute("waterfall.request_id", request_id)
                try:
                    await self._app(scope, receive, answer)
                finally:
                    route = getattr(scope.get("route"), "path", _OTHER)
                    span.set_attribute("http.route", route)
                    span.set_attribute("http.response.status_code", status)
        finally:
            self._metrics.http_requests.labels(route, method, status).inc()
            self._metrics.http_seconds.labels(route).observe(time.monotonic() - began)
