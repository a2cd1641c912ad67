"""Serving chat completions: what happens between the hold and the capture."""

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
    StreamDropped,
    UpstreamInvalid,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaterfallError,
)
from waterfall.gateway.calls import Calls, Metered
from waterfall.gateway.chat import ChatRequest
from waterfall.gateway.models import Model
from waterfall.gateway.render import charge_headers, error_body
from waterfall.gateway.stream import Event, NotAStream, events
from waterfall.keccak import keccak
from waterfall.ledger.books import Hold
from waterfall.metering.usage import UsageUnreadable, from_openai_chat
from waterfall.receipts import bytes_hash
from waterfall.types import Usage

log = structlog.get_logger()

_PATH = "/chat/completions"
_OUR_ACCOUNT = (401, 402, 403)
# What stands between us and a provider gave up waiting for it, or lost it: it may have run the call.
_MAY_HAVE_RUN = {502, 504, *range(520, 528)}
_MAX_ANSWER_BYTES = 64 * 2**20
_SHOWN_OF_A_REFUSAL = 1000
_PASSED_ON_HEADERS = ("retry-after", "retry-after-ms")
_MAX_WAITING_BYTES = 4 * 2**20


class Serving:
    """One call that is held for and on its way to its upstream."""

    def __init__(self, calls: Calls, request: ChatRequest, model: Model, held: Hold) -> None:
        self._calls = calls
        self._request = request
        self._model = model
        self._held = held
        self._request_hash = bytes_hash(request.body)

    @asynccontextmanager
    async def _answer(self) -> AsyncIterator[aiohttp.ClientResponse]:
        body = self._request.upstream_body(self._model, self._held.output_tokens)
        name, metrics, tracing = self._model.upstream.name, self._calls.ledger.metrics, self._calls.tracing
        began, outcome = time.monotonic(), "failed"
        try:
            with tracing.span("upstream", upstream=name) as span:
                async with self._model.upstream.post(_PATH, body, tracing.headers()) as response:
                    seconds, outcome = time.monotonic() - began, str(response.status)
                    metrics.upstream_seconds.labels(name).observe(seconds)
                    span.set_attribute("http.response.status_code", response.status)
                    log.info(
                        "answered",
                        charge=self._held.charge_id,
                        upstream=name,
                        status=response.status,
                        seconds=round(seconds, 6),
                    )
                    yield response
        except (UpstreamUnavailable, UpstreamTimeout, UpstreamInvalid) as error:
            outcome = error.code
            raise
        finally:
            metrics.upstream_requests.labels(name, outcome).inc()

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
                raw = await self._read(response)
                if not _is_answer(response):
                    raise _Refused(self._model, response, raw)
            captured = await self._calls.capture(self._held, self._model, self._meter(raw))
        except _Refused as refusal:
            await self._give_up(refusal)
            return refusal.answer()
        except Exception as error:
            await self._give_up(error)
            raise
        headers = charge_headers(captured.amount, captured.balance)
        return Response(raw, headers=headers, media_type="application/json")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        raw = bytearray()
        async for chunk in response.content.iter_any():
            raw += chunk
            if len(raw) > _MAX_ANSWER_BYTES:
                raise self._invalid(f"it is larger than {_MAX_ANSWER_BYTES} bytes")
        return bytes(raw)

    def _meter(self, raw: bytes) -> Metered:
        try:
            answer = orjson.loads(raw)
            reported = answer["usage"] if isinstance(answer, dict) else None
            usage = from_openai_chat(reported)
        except orjson.JSONDecodeError:
            raise self._invalid("it is not JSON") from None
        except (KeyError, UsageUnreadable) as error:
            reason = error.message if isinstance(error, UsageUnreadable) else "it reports no usage"
            raise self._invalid(reason) from None
        return Metered(usage, reported, self._request_hash, bytes_hash(raw))

    def _invalid(self, reason: str) -> UpstreamInvalid:
        return UpstreamInvalid(upstream=self._model.upstream.name, reason=reason)

    # ── Streams ──────────────────────────────────────────────────────────────────────────────────────

    async def streamed(self) -> Response:
        """Call the upstream; the answer starts when the upstream's has.

        Raises:
            WaterfallError: the upstream did not start to answer; the hold is closed by then.
        """
        relay = _Relay()
        task = self._calls.start(self._pump(relay))
        try:
            await asyncio.wait([task, relay.started], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            relay.leave()  # nobody will read
            raise
        if relay.started.done():
            return StreamAnswer(relay)
        try:
            task.result()
        except _Refused as refusal:
            return refusal.answer()
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
                last = [_error_event(error)]
            else:
                log.error("unexpected", receipt=self._held.receipt_id, exc_info=error)
                last = [_error_event(WaterfallError())]
        relay.end(last)

    async def _relay(self, relay: "_Relay") -> list[bytes]:
        """Pass the stream on and capture; its last bytes, which may leave now."""
        meter = _StreamMeter(include_usage=self._request.include_usage)
        cut: WaterfallError | None = None
        try:
            async with self._answer() as response:
                if not _is_answer(response):
                    raise _Refused(self._model, response, await self._read(response))
                async for event in events(response.content.iter_any()):
                    relay.start()
                    for data in meter.take(event):
                        relay.send(data)
        except (UpstreamInvalid, UpstreamTimeout) as error:
            cut = error
        except NotAStream as error:
            cut = self._invalid(str(error))
        return await self._capture(meter, cut)

    async def _capture(self, meter: "_StreamMeter", cut: WaterfallError | None) -> list[bytes]:
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
        await self._calls.capture(self._held, self._model, metered)
        return meter.tail() if cut is None or reported is not None else [*meter.tail(), _error_event(cut)]


class _StreamMeter:
    """What a stream has shown so far."""

    def __init__(self, *, include_usage: bool) -> None:
        self.done = False
        self._include_usage = include_usage
        self._hash = keccak.new(b"")
        self._pieces = 0
        self._finished = False
        self._reported: dict[str, Any] | None = None
        self._is_last_word = False
        self._tail: list[Event] = []

    def take(self, event: Event) -> list[bytes]:
        """Take an event in; what may go out now. [DONE], and a usage chunk at the end, wait for the capture."""
        self._hash.update(event.raw)
        self._pieces += event.pieces
        self._finished = self._finished or event.finished
        self.done = self.done or event.done
        if event.usage:
            self._reported = event.usage
            self._is_last_word = self._finished and not event.has_choices
        elif event.pieces:
            self._reported = None  # it was a placeholder: output came after it
        self._tail.append(event)
        if self.done or (not event.has_choices and (event.usage is not None or len(self._tail) > 1)):
            return []
        passed = self.tail()
        self._tail.clear()
        return passed

    def result(self) -> tuple[Usage | None, dict[str, Any] | None]:
        """Usage and the provider's object; without one, what was provably put out: a token a piece, no input.

        A usage object is the provider's last word if the stream came to its end, or if it stands alone after
        the end of a choice. None where not even a piece is there.
        """
        reported = self._reported if self.done or self._is_last_word else None
        try:
            return from_openai_chat(reported), reported
        except UsageUnreadable:
            return (Usage(input_tokens=0, output_tokens=self._pieces) if self._pieces else None), None

    def tail(self) -> list[bytes]:
        """What has not gone out yet and may: a usage chunk only to a caller who asked for it."""
        return [
            event.raw
            for event in self._tail
            if self._include_usage or event.usage is None or event.has_choices
        ]

    def response_hash(self) -> str:
        """Hash of everything the upstream sent."""
        return "0x" + self._hash.digest().hex()


def _is_answer(response: aiohttp.ClientResponse) -> bool:
    return 200 <= response.status < 300  # noqa: PLR2004 - success


class _Refused(UpstreamRefused):
    """The upstream {upstream} answered {status}: {reason}."""

    def __init__(self, model: Model, response: aiohttp.ClientResponse, raw: bytes) -> None:
        reason = (
            "it refused this gateway's own key or account" if response.status in _OUR_ACCOUNT else _text(raw)
        )
        super().__init__(upstream=model.upstream.name, status=response.status, reason=reason)
        self.may_have_run = response.status in _MAY_HAVE_RUN
        self._raw = raw
        self._status = response.status
        self._headers = {
            name: response.headers[name] for name in _PASSED_ON_HEADERS if name in response.headers
        }
        if self.may_have_run:
            self._headers["x-should-retry"] = "false"

    def answer(self) -> Response:
        """The upstream's own error, unless it is about us or not one that the caller's client can read."""
        ours = self._status in _OUR_ACCOUNT or self._status < HTTPStatus.BAD_REQUEST
        raw = self._raw if not ours and _is_error(self._raw) else orjson.dumps(error_body(self))
        return Response(raw, self.status if ours else self._status, self._headers, "application/json")


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


def _error_event(error: WaterfallError) -> bytes:
    # The blank line before it ends what the upstream may have left unfinished.
    return b"\n\ndata: " + orjson.dumps(error_body(error)) + b"\n\n"


class _Relay:
    """Between a pump that reads on and a client that may be slow, stall or leave: neither waits for the other.

    Were the upstream read at the client's pace, the client could keep its hold open, and have the stream cut
    before it tells its usage.
    """

    def __init__(self) -> None:
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
            self.leave(_error_event(StreamDropped(bytes=_MAX_WAITING_BYTES)))
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
