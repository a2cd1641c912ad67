"""Traces of calls, for OpenTelemetry: one to a call, with a span to each of its steps. Off, it costs nothing.

Sources: https://www.w3.org/TR/trace-context, https://opentelemetry.io/docs/specs/otel/protocol/exporter
"""

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from waterfall import __version__
from waterfall.errors import SettingsError
from waterfall.gateway.config import TracingSettings

_CLOSE_SECONDS = 5


class Span(Protocol):
    """A step of a call."""

    def set_attribute(self, key: str, value: str | int) -> None:
        """Say something of it."""


class _NoSpan:
    def set_attribute(self, key: str, value: str | int) -> None:
        """Nobody looks."""


class Tracing:
    """No traces."""

    _nothing = nullcontext[Span](_NoSpan())

    def request(self, name: str, headers: Mapping[str, str]) -> AbstractContextManager[Span]:  # noqa: ARG002
        """The span of a whole request, in the trace that its `traceparent` names."""
        return self._nothing

    def span(self, name: str, **attributes: str | int) -> AbstractContextManager[Span]:  # noqa: ARG002
        """The span of a step, within the one it is begun in."""
        return self._nothing

    def headers(self) -> dict[str, str]:
        """What tells an upstream of the trace; nothing of the caller's own but its trace's id."""
        return {}

    async def close(self) -> None:
        """Send what is left."""


def tracing(settings: TracingSettings) -> Tracing:
    """What the settings ask for.

    Raises:
        SettingsError: it is not installed.
    """
    return Tracing() if settings.otlp_endpoint is None else _OpenTelemetry(settings.otlp_endpoint)


class _OpenTelemetry(Tracing):
    """Traces, sent to a collector. What is set by OTEL_… variables, the SDK takes from there."""

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - an extra
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.trace import SpanKind  # noqa: PLC0415
            from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
                TraceContextTextMapPropagator,
            )
        except ImportError:
            raise SettingsError(
                reason="tracing.otlp_endpoint needs OpenTelemetry: pip install 'waterfall-credits[otel]'"
            ) from None
        name = os.environ.get("OTEL_SERVICE_NAME", "waterfall")
        resource = Resource.create({"service.name": name, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_CLOSE_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("waterfall", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._server, self._inside = SpanKind.SERVER, SpanKind.INTERNAL

    def request(self, name: str, headers: Mapping[str, str]) -> AbstractContextManager[Span]:
        caller = self._propagator.extract(headers)
        return self._tracer.start_as_current_span(name, context=caller, kind=self._server)

    @contextmanager
    def span(self, name: str, **attributes: str | int) -> Iterator[Span]:
        with self._tracer.start_as_current_span(name, kind=self._inside, attributes=attributes) as span:
            yield span

    def headers(self) -> dict[str, str]:
        carrier: dict[str, Any] = {}
        self._propagator.inject(carrier)
        return {name: value for name, value in carrier.items() if name == "traceparent"}

    async def close(self) -> None:
        """Send what is left, for a few seconds: a collector that is gone keeps no service from stopping."""
        closing = asyncio.get_running_loop().run_in_executor(None, self._provider.shutdown)
        await asyncio.wait([closing], timeout=_CLOSE_SECONDS)
