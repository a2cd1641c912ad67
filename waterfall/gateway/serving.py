"""Serving a call, whatever its surface: what happens between the hold and the capture."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import aiohttp
import orjson
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from waterfall.errors import (
    AlreadyCharged,
    CallLost,
    CallRepeated,
    StreamDropped,
    UpstreamInvalid,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaterfallError,
)
from waterfall.gateway.calls import Calls, Metered
from waterfall.gateway.models import Model
from waterfall.gateway.render import (
    charge_facts,
    charge_headers,
    error_response,
    hold_headers,
    replay_headers,
)
from waterfall.gateway.surfaces.api import Api, ModelCall
from waterfall.gateway.surfaces.streams import NotAStream, StreamMeter, events
from waterfall.gateway.terms import Terms
from waterfall.ledger.books import Hold, Once
from waterfall.ledger.journal import Answer, Caller, Captured
from waterfall.ledger.views import CallRecord
from waterfall.metering.usage import UsageUnreadable, read
from waterfall.receipts import bytes_hash

log = structlog.get_logger()

_OUR_ACCOUNT = (401, 402, 403)
# What stands between us and a provider gave up waiting for it, or lost it: it may have run the call.
_MAY_HAVE_RUN = {502, 504, *range(520, 528)}
# Another model may do better: too many calls, or something broken there.
_TOO_BUSY = (408, 429)
_MAX_ANSWER_BYTES = 64 * 2**20
_SHOWN_OF_A_REFUSAL = 1000
_PASSED_ON_HEADERS = ("retry-after", "retry-after-ms")
_MAX_WAITING_BYTES = 4 * 2**20
_MAX_KEPT_BYTES = 4 * 2**20
"""Of an answer that a repeat of the call may be given."""
_NEXT_ATTEMPT_SECONDS = 1.0
"""Within which an attempt by another model follows one that was lost."""
_SCOPE = "calls of "
"""Whose idempotency keys those of calls are: each account's own."""


async def serve(
    calls: Calls, api: Api, call: ModelCall, models: list[Model], caller: Caller, headers: Mapping[str, str]
) -> Response:
    """Hold, call, capture and answer, by the first of these models that serves the call.

    Each attempt has a hold and a price of its own. One that failed is given back, or listed as lost, before the next
    begins: whatever happens, the caller pays for one answer. Under an idempotency key, what was answered before is
    answered again, and what is running is waited for.

    Raises:
        PaymentRequired, InvalidRequest, Unavailable, LedgerError: before anything was sent.
        IdempotencyConflict, AlreadyCharged, CallLost: by the idempotency key.
    """
    return await _Asked(calls, api, call, models, caller, headers).answer()


class _Asked:
    """What one request asks for."""

    def __init__(
        self,
        calls: Calls,
        api: Api,
        call: ModelCall,
        models: list[Model],
        caller: Caller,
        headers: Mapping[str, str],
    ) -> None:
        self._calls = calls
        self._api = api
        self._call = call
        self._caller = caller
        self._terms = Terms.read(headers)
        self._bounded = [(model, call.bound(model)) for model in models]  # all, before the first is tried
        self._passed_on = {name: headers[name] for name in api.passed_on if name in headers}
        self._once = self._key()

    def _key(self) -> Once | None:
        key = self._terms.idempotency_key
        if key is None:
            return None
        asked = b"\n".join((self._api.surface.encode(), repr(self._passed_on).encode(), self._call.body))
        return Once(_SCOPE + self._caller.account, key, bytes_hash(asked))

    async def answer(self) -> Response:
        """Answer it, now or as it was answered before."""
        known = ""
        while True:
            try:
                return await self._try_models()
            except CallRepeated as repeated:
                longest = sum(model.upstream.settings.max_call_seconds for model, _ in self._bounded)
                earlier = await self._calls.ended(str(repeated.details["receipt"]), longest)
                state = earlier.settlement.state
                if state == "lost" and known != earlier.receipt_id:
                    known = earlier.receipt_id  # the next of its models may be about to serve
                    await asyncio.sleep(_NEXT_ATTEMPT_SECONDS)
                elif state != "released":  # else nothing has come of it: it may be made now
                    return await self._answer_again(earlier)

    async def _answer_again(self, earlier: CallRecord) -> Response:
        assert self._once is not None  # noqa: S101 - it was repeated under it
        if earlier.receipt is None:
            raise CallLost(receipt=earlier.receipt_id)
        answer = await self._calls.ledger.find_answer(self._once)
        if answer is None:
            raise AlreadyCharged(receipt=earlier.receipt_id)
        return Response(answer.body, headers=replay_headers(earlier), media_type=answer.media_type)

    async def _try_models(self) -> Response:
        calls, call, terms = self._calls, self._call, self._terms
        before: int | None = None
        for number, (model, bound) in enumerate(self._bounded, 1):
            held = await calls.hold(
                self._caller,
                self._api.surface,
                model,
                bound,
                wait_seconds=terms.wait_seconds,
                once=self._once,
                after=before,
            )
            before = held.sequence
            serving = Serving(
                calls, self._api, call, model, held, self._passed_on, once=self._once, settled=terms.settled
            )
            try:
                response = await (
                    serving.streamed() if call.stream else asyncio.shield(calls.start(serving.whole()))
                )
            except WaterfallError as error:
                if number < len(self._bounded) and _another_may_serve(error):
                    log.info("tried another model", failed=model.name, reason=error.message)
                    continue
                response = refused(self._api, error)
            response.headers.update(hold_headers(held, model.name))
            return response
        raise AssertionError("there is always a last model")


async def ask_for_free(
    api: Api, path: str, fields: Mapping[str, Any], model: Model, headers: Mapping[str, str]
) -> Response:
    """Ask an upstream what it bills nobody for, such as how many tokens a request would be.

    Args:
        api: the surface that it belongs to.
        path: below the upstream's base URL.
        fields: the request.
        model: whose upstream is asked.
        headers: the caller's.

    Raises:
        UpstreamUnavailable, UpstreamTimeout, UpstreamInvalid
    """
    passed_on = {name: headers[name] for name in api.passed_on if name in headers}
    body = orjson.dumps({**fields, "model": model.upstream_model})
    async with model.upstream.post(path, body, passed_on) as response:
        raw = await _read(response, model)
        if not _is_answer(response):
            return _Refused(model, response, raw).answer(api)
    try:
        orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise UpstreamInvalid(upstream=model.upstream.name, reason="it is not JSON") from None
    return Response(raw, media_type="application/json")


def _another_may_serve(error: WaterfallError) -> bool:
    if isinstance(error, _Refused):
        return error.is_theirs
    return isinstance(error, UpstreamUnavailable | UpstreamTimeout | UpstreamInvalid)


class Serving:
    """One call that is held for and on its way to its upstream."""

    def __init__(
        self,
        calls: Calls,
        api: Api,
        call: ModelCall,
        model: Model,
        held: Hold,
        headers: Mapping[str, str],
        *,
        once: Once | None = None,
        settled: bool = False,
    ) -> None:
        self._calls = calls
        self._api = api
        self._call = call
        self._headers = headers
        self._settled = settled
        self._once = once if calls.keeps_answers else None
        self._shown = bytearray()
        """What the caller is shown of a stream, where it is kept."""
        self._model = model
        self._held = held
        self._request_hash = bytes_hash(call.body)

    @asynccontextmanager
    async def _answer(self) -> AsyncIterator[aiohttp.ClientResponse]:
        body = self._api.upstream_body(self._call, self._model, self._held.output_tokens)
        name, metrics, tracing = self._model.upstream.name, self._calls.ledger.metrics, self._calls.tracing
        began, outcome = time.monotonic(), "failed"
        try:
            with tracing.span("upstream", upstream=name) as span:
                async with self._model.upstream.post(
                    self._api.upstream_path, body, {**self._headers, **tracing.headers()}
                ) as response:
                    seconds, outcome = time.monotonic() - began, str(response.status)
                    metrics.upstream_seconds.labels(name).observe(seconds)
                    span.set_attribute("http.response.status_code", response.status)
                    yield response
        except (UpstreamUnavailable, UpstreamTimeout, UpstreamInvalid) as error:
            outcome = error.code
            raise
        finally:
            metrics.upstream_requests.labels(name, outcome).inc()

    async def _capture(self, metered: Metered, media_type: str, shown: bytes) -> Captured:
        """Charge for what was metered, and keep what was shown for whoever repeats the call."""
        answer = None
        if self._once is not None and len(shown) <= _MAX_KEPT_BYTES:
            answer = Answer(self._once, media_type, shown)
        return await self._calls.capture(self._held, self._api.surface, self._model, metered, answer)

    async def _transaction(self, captured: Captured) -> str | None:
        """Where the charge is on the chain, for a caller who waits for that."""
        return await self._calls.settled(captured) if self._settled else None

    async def _give_up(self, error: BaseException) -> None:
        """End the hold of a call that failed: free where it cannot have cost anything, else listed as lost."""
        if isinstance(error, UpstreamUnavailable) or (isinstance(error, _Refused) and not error.may_have_run):
            await self._calls.release(self._held, str(error))
        else:
            await self._calls.lose(self._held, str(error) or type(error).__name__)

    # ── Whole answers ────────────────────────────────────────────────────────────────────────────────

    async def whole(self) -> Response:
        """Call the upstream, capture, answer.

        Raises:
            WaterfallError: the hold is closed by then.
        """
        try:
            async with self._answer() as response:
                raw = await _read(response, self._model)
                if not _is_answer(response):
                    raise _Refused(self._model, response, raw)
            captured = await self._capture(self._meter(raw), "application/json", raw)
        except Exception as error:
            await self._give_up(error)
            raise
        headers = charge_headers(captured, await self._transaction(captured))
        return Response(raw, headers=headers, media_type="application/json")

    def _meter(self, raw: bytes) -> Metered:
        try:
            answer = orjson.loads(raw)
            reported = self._api.usage_in(answer) if isinstance(answer, dict) else None
            usage = read(self._api.surface, reported)
        except orjson.JSONDecodeError:
            raise self._invalid("it is not JSON") from None
        except UsageUnreadable as error:
            raise self._invalid("it reports no usage" if reported is None else error.message) from None
        return Metered(usage, reported, self._request_hash, bytes_hash(raw))

    def _invalid(self, reason: str) -> UpstreamInvalid:
        return UpstreamInvalid(upstream=self._model.upstream.name, reason=reason)

    # ── Streams ──────────────────────────────────────────────────────────────────────────────────────

    async def streamed(self) -> Response:
        """Call the upstream; the answer starts when the upstream's has.

        Raises:
            WaterfallError: the upstream did not start to answer; the hold is closed by then.
        """
        relay = _Relay(self._api)
        task = self._calls.start(self._pump(relay))
        try:
            await asyncio.wait([task, relay.started], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            relay.leave()  # nobody will read
            raise
        if relay.started.done():
            return StreamAnswer(relay)
        task.result()
        raise AssertionError("a pump that ends without starting has failed")

    async def _pump(self, relay: "_Relay") -> None:
        """Serve a stream to its end, whatever the client does.

        Raises:
            WaterfallError: the upstream did not start to answer. What fails later is told in the stream.
        """
        try:
            last = await self._relay(relay)
        except Exception as error:
            await self._give_up(error)
            if not relay.started.done():
                raise
            if isinstance(error, WaterfallError):
                last = [self._api.error_event(error)]
            else:
                log.error("unexpected", receipt=self._held.receipt_id, exc_info=error)
                last = [self._api.error_event(WaterfallError())]
        relay.end(last)

    async def _relay(self, relay: "_Relay") -> list[bytes]:
        """Pass the stream on and capture; its last bytes, which may leave now."""
        meter = self._api.stream_meter(self._call)
        cut: WaterfallError | None = None
        try:
            async with self._answer() as response:
                if not _is_answer(response):
                    raise _Refused(self._model, response, await _read(response, self._model))
                async for event in events(response.content.iter_any()):
                    passed = meter.take(event)
                    relay.start()
                    for data in passed:
                        relay.send(data)
                        self._keep(data)
        except (UpstreamInvalid, UpstreamTimeout) as error:
            cut = error
        except NotAStream as error:
            cut = self._invalid(str(error))
        return await self._end(meter, cut)

    def _keep(self, data: bytes) -> None:
        if self._once is not None and len(self._shown) <= _MAX_KEPT_BYTES:
            self._shown += data

    async def _end(self, meter: StreamMeter, cut: WaterfallError | None) -> list[bytes]:
        if cut is None and not meter.done:
            cut = self._invalid("it was cut before its end")
        usage, reported = meter.result()
        if usage is None:
            raise cut or self._invalid("it reports no usage")
        if reported is None:
            reason = str(cut or "it reports no usage")
            log.warning(
                "incomplete", receipt=self._held.receipt_id, pieces=usage.output_tokens, reason=reason
            )
        metered = Metered(usage, reported, self._request_hash, meter.response_hash())
        broken = [] if cut is None or reported is not None else [self._api.error_event(cut)]
        for data in (*meter.tail(), *broken):
            self._keep(data)
        captured = await self._capture(metered, StreamAnswer.media_type, bytes(self._shown))
        return [*meter.tail(charge_facts(captured, await self._transaction(captured))), *broken]


async def _read(response: aiohttp.ClientResponse, model: Model) -> bytes:
    raw = bytearray()
    async for chunk in response.content.iter_any():
        raw += chunk
        if len(raw) > _MAX_ANSWER_BYTES:
            reason = f"it is larger than {_MAX_ANSWER_BYTES} bytes"
            raise UpstreamInvalid(upstream=model.upstream.name, reason=reason)
    return bytes(raw)


def _is_answer(response: aiohttp.ClientResponse) -> bool:
    return 200 <= response.status < 300  # noqa: PLR2004 - success


class _Refused(UpstreamRefused):
    """The upstream {upstream} answered {status}: {reason}."""

    def __init__(self, model: Model, response: aiohttp.ClientResponse, raw: bytes) -> None:
        status = response.status
        self._is_ours = status in _OUR_ACCOUNT or status < HTTPStatus.BAD_REQUEST
        reason = "it refused this gateway's own key or account" if status in _OUR_ACCOUNT else _text(raw)
        super().__init__(upstream=model.upstream.name, status=status, reason=reason)
        self.may_have_run = status in _MAY_HAVE_RUN
        self.is_theirs = self._is_ours or status in _TOO_BUSY or status >= HTTPStatus.INTERNAL_SERVER_ERROR
        """Whether the provider refuses, and not the request is wrong: another model may serve it."""
        self._raw = raw
        self._status = status
        self._headers = {
            name: response.headers[name] for name in _PASSED_ON_HEADERS if name in response.headers
        }
        if self.may_have_run:
            self._headers["x-should-retry"] = "false"

    def answer(self, api: Api) -> Response:
        """The upstream's own error, unless it is about us or not one that the caller's client can read."""
        raw = self._raw if not self._is_ours and _is_error(self._raw) else orjson.dumps(api.error_body(self))
        status = self.status if self._is_ours else self._status
        return Response(raw, status, self._headers, "application/json")


def refused(api: Api, error: WaterfallError, *, to_platform: bool = False) -> Response:
    """The answer to a call that failed, as its surface's clients read it."""
    if isinstance(error, _Refused):
        return error.answer(api)
    return error_response(error, api.error_body(error, to_platform=to_platform))


def _text(raw: bytes) -> str:
    """What a refusal says, for people: not a page of HTML."""
    text = raw.decode(errors="replace").strip()
    return (
        "it gives no reason" if not text or text.startswith("<") else text[:_SHOWN_OF_A_REFUSAL].rstrip(".")
    )


def _is_error(raw: bytes) -> bool:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return False
    return isinstance(body, dict) and isinstance(body.get("error"), Mapping)


class _Relay:
    """Between a pump that reads on and a client that may be slow, stall or leave: neither waits for the other.

    Were the upstream read at the client's pace, the client could keep its hold open, and have the stream cut
    before it tells its usage.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._waiting_bytes = 0
        self._left = False

    def start(self) -> None:
        """The upstream has begun to answer."""
        if not self.started.done():
            self.started.set_result(None)

    def send(self, data: bytes) -> None:
        """Keep bytes for the client; drop them once it has left, or takes too little."""
        if self._left:
            return
        self._waiting_bytes += len(data)
        if self._waiting_bytes > _MAX_WAITING_BYTES:
            self.leave(self._api.error_event(StreamDropped(bytes=_MAX_WAITING_BYTES)))
        else:
            self._queue.put_nowait(data)

    def end(self, last: list[bytes]) -> None:
        """Keep the last bytes, and the end of the answer."""
        for data in last:
            self.send(data)
        if not self._left:
            self._queue.put_nowait(None)

    async def next(self) -> bytes | None:
        """The next bytes for the client; None: no more."""
        data = await self._queue.get()
        self._waiting_bytes -= len(data or b"")
        return data

    def leave(self, *last: bytes) -> None:
        """The client has gone, or has everything; or it gets only this any more."""
        if self._left:
            return
        self._left = True
        while not self._queue.empty():
            self._queue.get_nowait()
        for data in (*last, None):
            self._queue.put_nowait(data)


class StreamAnswer(Response):
    """An event stream that never buffers and notices its client leaving."""

    media_type = "text/event-stream"

    def __init__(self, relay: _Relay) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._relay = relay

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI
        """Answer."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            while (data := await self._relay.next()) is not None:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watcher.cancel()
            self._relay.leave()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._relay.leave()
