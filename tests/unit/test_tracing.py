"""Traces as a collector gets them: a real receiver of OTLP over HTTP on this machine."""

import sys

import pytest
from collector import collector

from waterfall.errors import SettingsError
from waterfall.gateway.config import TracingSettings
from waterfall.gateway.tracing import Tracing, tracing
from waterfall.settings import Settings

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


async def test_tracing__spans_within_spans__arrive_as_one_trace_of_the_caller():
    async with collector() as (kept, url):
        traces = tracing(TracingSettings(otlp_endpoint=url))
        with (
            traces.request("POST", {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=secret"}),
            traces.span("upstream", upstream="local") as span,
        ):
            span.set_attribute("http.response.status_code", 200)
            headers = traces.headers()
        await traces.close()
    spans = kept.by_name()
    assert {span.trace_id.hex() for span in kept.spans} == {TRACE}
    assert spans["POST"].parent_span_id.hex() == PARENT
    assert spans["upstream"].parent_span_id == spans["POST"].span_id
    assert headers == {"traceparent": f"00-{TRACE}-{spans['upstream'].span_id.hex()}-01"}
    attributes = {a.key: a.value for a in spans["upstream"].attributes}
    assert attributes["upstream"].string_value == "local"
    assert attributes["http.response.status_code"].int_value == 200
    assert kept.service["service.name"] == "waterfall"


async def test_tracing__no_sane_traceparent__begins_a_trace(monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    async with collector() as (kept, url):
        traces = tracing(TracingSettings(otlp_endpoint=url + "/"))
        for given in ({}, {"traceparent": "nonsense"}):
            with traces.request("POST", given):
                pass
        await traces.close()
    assert len({span.trace_id for span in kept.spans}) == 2
    assert kept.service["service.name"] == "ours"


async def test_tracing__collector_gone__keeps_nobody_from_stopping(monkeypatch):
    monkeypatch.setattr("waterfall.gateway.tracing._CLOSE_SECONDS", 0.01)
    traces = tracing(TracingSettings(otlp_endpoint="http://127.0.0.1:9"))
    with traces.request("POST", {}):
        pass
    await traces.close()


def test_tracing__not_asked_for__is_nothing_and_imports_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    traces = tracing(TracingSettings())
    assert type(traces) is Tracing
    with traces.request("POST", {"traceparent": f"00-{TRACE}-{PARENT}-01"}) as span, traces.span("hold"):
        span.set_attribute("a", 1)
    assert traces.headers() == {}


def test_tracing__asked_for_and_not_installed__says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"tracing\.otlp_endpoint .*waterfall-credits\[otel\]"):
        tracing(TracingSettings(otlp_endpoint="http://127.0.0.1:4318"))


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "ftp://collector", "http://user:secret@collector:4318"])
def test_settings__no_collectors_url__are_refused_without_showing_it(url):
    with pytest.raises(ValueError, match=r"must be such as http://127\.0\.0\.1:4318") as refusal:
        Settings.model_validate({"tracing": {"otlp_endpoint": url}})
    assert "secret" not in str(refusal.value)
