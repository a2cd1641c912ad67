"""The gateway as an ASGI application."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from waterfall import __version__
from waterfall.errors import BodyTooLarge, InvalidRequest, UnsupportedRoute, Unsure, WaterfallError
from waterfall.gateway import admin, wire
from waterfall.gateway.access import authenticate, payer, permit
from waterfall.gateway.calls import Calls
from waterfall.gateway.config import GatewaySettings, ModelSettings, Tariffs, UpstreamSettings
from waterfall.gateway.following import Following
from waterfall.gateway.models import Models
from waterfall.gateway.render import error_body, error_response
from waterfall.gateway.serving import ask_for_free, refused, serve
from waterfall.gateway.surfaces import API_OF, APIS, bodies
from waterfall.gateway.surfaces.api import Api, ModelCall
from waterfall.gateway.terms import TERMS
from waterfall.gateway.tracing import Tracing
from waterfall.gateway.upstreams import Upstream
from waterfall.gateway.watch import Health, Readiness, Watch
from waterfall.ledger.store import Ledger
from waterfall.signers import Signer
from waterfall.types import Hash32, RateCard

log = structlog.get_logger()

_NOT_FOUND, _NOT_ALLOWED = 404, 405
_CUT_SECONDS = 2
_LARGE_BODY = 2**18
_NOT_JSON = "The body is not JSON."


class ModelFacts(wire.Shown):
    """A model as OpenAI's and Anthropic's clients read it, with what it costs."""

    id: str
    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    created: int = 0
    created_at: str = "1970-01-01T00:00:00Z"
    display_name: str
    owned_by: str
    """The upstream that serves it."""
    price_id: Hash32
    """Hash of `prices`, as receipts name it."""
    prices: RateCard


class ModelList(wire.Shown):
    """All models that may be called."""

    object: Literal["list"] = "list"
    data: list[ModelFacts]
    has_more: bool = False
    first_id: str | None
    last_id: str | None


class Gateway:
    """The HTTP surfaces of one platform over one ledger."""

    def __init__(
        self,
        settings: GatewaySettings,
        upstreams: Mapping[str, UpstreamSettings],
        models: Mapping[str, ModelSettings],
        ledger: Ledger,
        meter: Signer,
        label_salt: bytes,
        watch: Watch,
        tracing: Tracing | None = None,
        tariffs: Tariffs | None = None,
        *,
        keeps_answers: bool = True,
    ) -> None:
        """A gateway.

        Args:
            settings: how it serves.
            upstreams: by name.
            models: by the names callers use.
            ledger: where the money is.
            meter: signs receipts.
            label_salt: keeps account labels unreadable on the chain.
            watch: looks at this service.
            tracing: takes traces.
            tariffs: what the platform adds to prices.
            keeps_answers: whether a repeat under an idempotency key is given the answer of the first.
        """
        self._settings = settings
        self._ledger = ledger
        self._watch = watch
        self._tracing = tracing or Tracing()
        self._drained_by: float | None = None
        self._upstreams = {name: Upstream(name, upstream) for name, upstream in upstreams.items()}
        self.models = Models(models, self._upstreams, settings, tariffs)
        self.calls = Calls(
            ledger,
            meter,
            max_projection_age_seconds=settings.max_projection_age_seconds,
            longest_call_seconds=max((u.max_call_seconds for u in upstreams.values()), default=0),
            keeps_answers=keeps_answers,
            tracing=self._tracing,
        )
        self.app = self._app(label_salt)

    def _app(self, label_salt: bytes) -> FastAPI:
        app = _Documented(
            title="Waterfall",
            version=__version__,
            summary="LLM calls, each checked against an on-chain wallet, metered, priced and settled.",
            lifespan=self._lifespan,
            redirect_slashes=False,
            around=self._around,
        )
        app.add_exception_handler(WaterfallError, self._on_waterfall_error)
        app.add_exception_handler(RequestValidationError, _on_invalid_request)
        app.add_exception_handler(HTTPException, _on_http_exception)
        app.add_exception_handler(Exception, _on_failure)
        for api in APIS:
            app.add_api_route(
                api.route,
                self._model_call(api),
                name=api.surface,
                summary=api.__doc__,
                methods=["POST"],
                response_class=Response,
                responses=_MODEL_ANSWERS
                | wire.errors(400, 401, 402, 403, 404, 409, 413, 429, 502, 503, 504)
                | _PASSED_ON,
                openapi_extra=_of_a_call(api),
            )
        app.add_api_route(
            "/v1/messages/count_tokens",
            self._count_tokens,
            methods=["POST"],
            response_class=Response,
            responses=_COUNTED | wire.errors(400, 401, 403, 404, 413, 502, 504) | _PASSED_ON,
            openapi_extra=_of_a_call(API_OF["messages"]),
        )
        app.add_api_route("/v1/models", self._list_models, methods=["GET"], responses=wire.errors(401))
        app.add_api_route(
            "/healthz",
            self._health,
            methods=["GET"],
            response_model=Health,
            responses={503: {"model": Health, "description": "Nothing is settled: it needs a person."}},
            openapi_extra={"security": []},
        )
        app.add_api_route(
            "/readyz",
            self._readiness,
            methods=["GET"],
            response_model=Readiness,
            responses={503: {"model": Readiness, "description": "New calls are refused."}},
            openapi_extra={"security": []},
        )
        app.add_api_route(
            "/metrics",
            self._metrics,
            methods=["GET"],
            response_class=Response,
            responses=_METRICS_ANSWER | wire.errors(401, 403),
        )
        app.include_router(admin.router)
        app.include_router(admin.public)
        app.state.office = admin.Office(self._ledger, self.calls, self.models, label_salt)
        return app

    def _around(self, app: ASGIApp) -> ASGIApp:
        """The framework's own application, in what every request passes before it."""
        fast = _FastLane(app, self.app.routes, on_refusal=self._on_waterfall_error)
        limited = _BodyLimit(fast, self._settings.max_body_bytes)
        return Following(limited, self._ledger.metrics, self._tracing)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        for model in self.models.unpriced:
            log.warning("no price is known: calls are refused", model=model)
        for name, upstream in self._upstreams.items():
            if upstream.settings.api_key_env and not upstream.settings.api_key():
                log.warning("called without a key", upstream=name, not_set=upstream.settings.api_key_env)
        leases = asyncio.create_task(self.calls.renew_leases())
        yield
        self.stop()
        await self.drain()
        await self.cut()
        for upstream in self._upstreams.values():
            await upstream.close()
        leases.cancel()
        with suppress(asyncio.CancelledError):
            await leases

    def stop(self) -> None:
        """Take no new calls from now on, and say so to whoever asks for readiness."""
        self._watch.is_stopping = self.calls.is_stopping = True
        if self._drained_by is None:
            self._drained_by = time.monotonic() + self._settings.drain_seconds

    async def drain(self) -> None:
        """Let running calls end, until `drain_seconds` after the stop."""
        await self.calls.drain(max(0.0, (self._drained_by or 0) - time.monotonic()))

    async def cut(self) -> None:
        """End running calls now, as if their upstreams had broken off."""
        for upstream in self._upstreams.values():
            upstream.cut()
        await self.calls.drain(_CUT_SECONDS)

    # ── Routes ───────────────────────────────────────────────────────────────────────────────────────

    def _model_call(self, api: Api) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            headers = dict(reversed(request.headers.items()))  # of several of a name, the first
            with self._tracing.span("authenticate"):
                caller = payer(self._ledger.keys, headers)
            call = await _read(api, await request.body())
            for name in call.models:
                permit(caller, api.surface, name)
            models = [self.models.serving(name, api.surface, caller.account) for name in call.models]
            return await serve(self.calls, api, call, models, caller, headers)

        return answer

    async def _count_tokens(self, request: Request) -> Response:
        """How many tokens of input a message would be, by its provider's count; nobody is billed for that."""
        caller, api = payer(self._ledger.keys, request.headers), API_OF["messages"]
        fields = bodies.parse(await request.body())
        (name, *_) = bodies.models(fields)
        permit(caller, api.surface, name)
        model = self.models.serving(name, api.surface, caller.account)
        return await ask_for_free(api, f"{api.upstream_path}/count_tokens", fields, model, request.headers)

    async def _list_models(self, request: Request) -> ModelList:
        """The models that may be called."""
        access = authenticate(self._ledger.keys, request.headers)
        limits = access.key.limits
        permitted = None if limits is None else limits.models
        models = [
            model
            for model in self.models.all(access.key.account)
            if permitted is None or model.name in permitted
        ]
        return ModelList(
            data=[
                ModelFacts(
                    id=model.name,
                    display_name=model.name,
                    owned_by=model.upstream.name,
                    price_id=model.price_id,
                    prices=model.card,
                )
                for model in models
            ],
            first_id=models[0].name if models else None,
            last_id=models[-1].name if models else None,
        )

    async def _health(self, request: Request) -> Response:
        """Whether anything needs a person, and why if the platform's key is shown."""
        return await self._watch.health(with_reasons=self._is_platform(request))

    async def _readiness(self, request: Request) -> Response:
        """Whether new calls are accepted now, and why not if the platform's key is shown."""
        return await self._watch.readiness(with_reasons=self._is_platform(request))

    def _is_platform(self, request: Request) -> bool:
        try:
            return authenticate(self._ledger.keys, request.headers).is_admin
        except WaterfallError:
            return False

    async def _on_waterfall_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, WaterfallError)  # noqa: S101 - what it is registered for
        if isinstance(error, Unsure):
            log.warning("refused", code=error.code, reason=error.message)
        return _refusal(request.url.path, error, to_platform=self._is_platform(request))

    async def _metrics(self, request: Request) -> Response:
        """What this process counts and sees, for Prometheus: the platform's figures, so with its key."""
        authenticate(self._ledger.keys, request.headers).require_admin()
        return await self._watch.metrics()


class _Documented(FastAPI):
    """The application with its keys in the OpenAPI document, within something of ours."""

    def __init__(self, *, around: Callable[[ASGIApp], ASGIApp], **options: Any) -> None:
        super().__init__(**options)
        self._around = around

    def build_middleware_stack(self) -> ASGIApp:
        """All of it, outside of what answers failures."""
        return self._around(super().build_middleware_stack())

    def openapi(self) -> dict[str, Any]:
        """The document."""
        document = super().openapi()
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        return document


def _money_header(description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}


_MODEL_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The upstream's answer, untouched; with `stream`, its server-sent events.",
        "headers": {
            "X-Waterfall-Receipt-Id": _money_header("Names the call: see GET /api/receipts/{receipt_id}."),
            "X-Waterfall-Hold": _money_header("The provable maximum that was set aside, in USD."),
            "X-Waterfall-Cost": _money_header("What was charged, in USD. Not on a stream."),
            "X-Waterfall-Balance": _money_header("The balance afterwards, in USD. Not on a stream."),
        },
        "content": {
            "application/json": {"schema": {"type": "object", "additionalProperties": True}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}
_COUNTED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The upstream's answer.",
        "content": {"application/json": {"schema": {"type": "object", "additionalProperties": True}}},
    }
}
_METRICS_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Prometheus's text format.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}
_PASSED_ON: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "An error; an upstream's own is passed on as it came.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {"error": {"type": "object", "additionalProperties": True}},
                }
            }
        },
    }
}


def _of_a_call(api: Api) -> dict[str, Any]:
    """What OpenAPI says of a surface's requests."""
    schema = {"type": "object", "additionalProperties": True, **api.request_schema}
    return {
        "parameters": TERMS,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
    }


async def _read(api: Api, body: bytes) -> ModelCall:
    """The request; a large one is checked aside, as that takes up to seconds."""
    return api.read(body) if len(body) < _LARGE_BODY else await asyncio.to_thread(api.read, body)


def _refusal(path: str, error: WaterfallError, *, to_platform: bool = False) -> Response:
    """An error as the clients of this path read it."""
    for api in APIS:
        if path == api.route or path.startswith(f"{api.route}/"):
            return refused(api, error, to_platform=to_platform)
    return error_response(error, error_body(error, to_platform=to_platform))


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        reason, where = _NOT_JSON, None
    elif problem["type"] == "missing" and problem["loc"][0] == "header":
        where = str(problem["loc"][1])
        reason = f"The header {where} is required."
    else:
        where = ".".join(str(part) for part in problem["loc"][1:]) or None
        reason = f"{where or 'The body'}: {str(problem['msg']).removeprefix('Value error, ')}."
    return _refusal(request.url.path, InvalidRequest(reason=reason, param=where))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    path = request.url.path
    if error.status_code in {_NOT_FOUND, _NOT_ALLOWED}:
        return _refusal(path, UnsupportedRoute(method=request.method, path=path[:200]))
    return _refusal(path, InvalidRequest(reason=_NOT_JSON, param=None))  # a body in no known encoding


async def _on_failure(request: Request, error: Exception) -> Response:
    log.error("unexpected", path=request.url.path, exc_info=error)
    return _refusal(request.url.path, WaterfallError())


class _FastLane:
    """Serves calls of models ahead of the framework's layers, which take longer than what is done for a call.

    Errors are answered as they are there.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Iterable[BaseRoute],
        *,
        on_refusal: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._routes = {
            route.path: route for route in routes if isinstance(route, APIRoute) and route.name in API_OF
        }
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        route = self._routes.get(scope["path"]) if is_post else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive)
        try:
            response = await route.endpoint(request)
        except WaterfallError as error:
            response = await self._on_refusal(request, error)
        except Exception as error:  # noqa: BLE001 - one nobody foresaw is answered, too
            response = await _on_failure(request, error)
        await response(scope, receive, send)


class _BodyLimit:
    """Reads a body whole before anything else sees it, and refuses one that is too large.

    The rest of it is read and dropped first, so that the client can finish sending and read the answer.
    """

    _PATIENCE = 8

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in {"GET", "HEAD"}:
            await self._app(scope, receive, send)
            return
        chunks: list[bytes] = []
        size, more = 0, True
        while more and size <= self._PATIENCE * self._limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= self._limit:
                chunks.append(chunk)
            else:
                chunks.clear()
        if size > self._limit:
            await _refusal(scope["path"], BodyTooLarge(limit=self._limit))(scope, receive, send)
            return
        body: Message | None = {"type": "http.request", "body": b"".join(chunks), "more_body": False}

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message, body = body, None
            return message

        await self._app(scope, replay, send)
