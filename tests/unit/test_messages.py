import json
from decimal import Decimal

import pytest
from making import card, held_tokens, served

from waterfall.errors import (
    ApiKeyExpired,
    InsufficientFunds,
    InvalidApiKey,
    InvalidRequest,
    UnsupportedRoute,
    UpstreamInvalid,
)
from waterfall.gateway.surfaces.messages import Messages
from waterfall.gateway.surfaces.streams import NotAStream, events
from waterfall.types import Usage

API = Messages()
MESSAGES = [{"role": "user", "content": "Hello"}]
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}


def body(**fields):
    return json.dumps({"model": "small", "messages": MESSAGES, "max_tokens": 10, **fields}).encode()


def model(*, writes="1", searches="0", **known):
    tariff = card(inputs="1", outputs="1")
    rates = tariff.rates[0].model_copy(update={"cache_write_1h_usd_per_mtok": Decimal(writes)})
    tariff = tariff.model_copy(update={"rates": (rates,), "usd_per_web_search": Decimal(searches)})
    return served(tariff, **known)


def refusal(**fields):
    with pytest.raises(InvalidRequest) as refused:
        API.read(body(**fields))
    return refused.value.details["param"]


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────


def test_read__plain_request__is_taken_and_sent_untouched():
    request = API.read(body(system="Be brief.", thinking={"type": "enabled", "budget_tokens": 1024}))
    assert (request.models, request.stream, request.max_tokens) == (("small",), False, 10)
    sent = json.loads(API.upstream_body(request, model(), 10))
    assert sent == {
        "model": "provider/small",
        "messages": MESSAGES,
        "max_tokens": 10,
        "system": "Be brief.",
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "hi"}],
        [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "redacted_thinking", "data": "x"},
        ],
        [{"type": "tool_use", "id": "t", "name": "f", "input": {}}],
        [{"type": "tool_result", "tool_use_id": "t", "content": "5"}],
        [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "5"}]}],
        [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}],
    ],
)
def test_read__content_whose_text_is_in_the_request__passes(content):
    request = API.read(body(messages=[{"role": "user", "content": content}]))
    assert (request.reads_elsewhere, request.images) == (None, 0)


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "f", "input_schema": {}},
        {"type": "custom", "name": "f"},
        {"type": "bash_20250124", "name": "bash"},
    ],
)
def test_read__tools_that_the_caller_runs__pass_and_cost_words_of_the_provider(tool):
    plain = API.read(body()).text_tokens
    assert API.read(body(tools=[tool])).text_tokens >= plain + 1024


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "container_upload"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": 5}]}]}, "messages[0].content"),
        ({"system": [{"type": "video"}]}, "system"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"speed": "fast"}, "speed"),
        ({"inference_geo": "us"}, "inference_geo"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"thread": {"type": "continue", "previous_message_id": "m"}}, "thread"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management"),
        ({"tools": [{**SEARCH, "type": "web_search_20260209"}]}, "tools[0]"),
        ({"container": "c"}, "container"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"tools": [{"type": "code_execution_20250825", "name": "c"}]}, "tools[0]"),
        ({"tools": [{"type": "web_fetch_20250910", "name": "c"}]}, "tools[0]"),
        ({"tools": [{"type": ["x"]}]}, "tools[0]"),
        ({"tools": [{**SEARCH, "max_uses": None}]}, "tools[0].max_uses"),
    ],
)
def test_read__what_cannot_be_bounded_or_priced__is_refused_by_name(fields, param):
    assert refusal(**fields) == param


@pytest.mark.parametrize(
    "fields",
    [
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        {"tools": [{**SEARCH, "type": "web_search_20260209", "allowed_callers": ["direct"]}]},
    ],
)
def test_read__what_can_be_bounded__passes(fields):
    assert API.read(body(**fields))


def test_read__results_nested_without_end__are_refused():
    content = "hi"
    for _ in range(6):
        content = [{"type": "tool_result", "content": content}]
    assert refusal(messages=[{"role": "user", "content": content}]).startswith("messages[0].content")


def test_bound__images__by_their_number_also_within_results():
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 50_000}}
    far = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    content = [image, {"type": "tool_result", "tool_use_id": "t", "content": [far]}]
    request = API.read(body(messages=[{"role": "user", "content": content}]))
    assert request.images == 2
    assert 10_000 < held_tokens(request, model(image_tokens=5000)) < 12_000


@pytest.mark.parametrize("source", [{"type": "base64"}, {"type": "url"}, {"type": "file"}, None])
def test_bound__document_whose_tokens_do_not_show__is_held_at_the_models_context(source):
    request = API.read(body(messages=[{"role": "user", "content": [{"type": "document", "source": source}]}]))
    assert held_tokens(request, model(context_tokens=200_000)) == 200_000 + 10


def test_bound__cache_writes__are_held_only_where_they_may_happen():
    plain, marked = (
        API.read(body()),
        API.read(body(system=[{"type": "text", "text": "x", "cache_control": {}}])),
    )
    assert held_tokens(plain, model(writes="2")) < 1000
    assert held_tokens(marked, model(writes="2")) > 1.5 * held_tokens(marked, model(writes="1"))
    hidden = API.read(body().replace(b'"max_tokens"', b'"cache\\u005fcontrol": {}, "max_tokens"'))
    assert hidden.cache_writes


def test_bound__searches__each_with_another_reading_of_the_context_and_its_output():
    request = API.read(body(tools=[SEARCH]))
    most = 4 * (1000 + 10) + 3 * 0.01 * 10**6
    assert held_tokens(request, model(searches="0.01", context_tokens=1000)) == most
    assert json.loads(API.upstream_body(request, model(), 40))["max_tokens"] == 10


# ── Streams ──────────────────────────────────────────────────────────────────────────────────────────


def sse(kind, **fields):
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


START = sse(
    "message_start",
    message={"usage": {"input_tokens": 12, "cache_read_input_tokens": 30, "output_tokens": 1}},
)
PIECES = [sse("content_block_delta", index=0, delta={"type": "text_delta", "text": t}) for t in ("Hel", "lo")]
LAST = sse("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 5})
STOP = sse("message_stop")
BLOCK = sse("content_block_start", index=0, content_block={"type": "text", "text": ""})
WHOLE = [START, BLOCK, sse("ping"), *PIECES, sse("content_block_stop", index=0), LAST, STOP]
REPORTED = {"input_tokens": 12, "cache_read_input_tokens": 30, "output_tokens": 5}


async def metered(*data):
    async def upstream():
        for chunk in data:
            yield chunk

    meter = API.stream_meter(API.read(body(stream=True)))
    now = [raw async for event in events(upstream()) for raw in meter.take(event)]
    return now, meter


async def test_meter__whole_stream__is_charged_as_reported_and_its_end_waits():
    now, meter = await metered(*WHOLE)
    assert now == WHOLE[:-2]
    assert meter.tail() == [LAST, STOP]
    assert meter.done
    assert meter.result() == (Usage(input_tokens=42, cached_input_tokens=30, output_tokens=5), REPORTED)


async def test_meter__cost__is_told_beside_the_usage():
    _, meter = await metered(*WHOLE)
    last, stop = meter.tail({"cost": "0.01"})
    assert last.startswith(b': waterfall {"cost":"0.01"}\nevent: message_delta\n')
    assert json.loads(last.split(b"data: ")[1])["waterfall"] == {"cost": "0.01"}
    assert stop == STOP


async def test_meter__end_counts_the_input_again__the_end_is_the_last_word():
    last = sse("message_delta", delta={}, usage={"input_tokens": 500, "output_tokens": 5})
    _, meter = await metered(*WHOLE[:-2], last, STOP)
    assert meter.result()[0].input_tokens == 530


async def test_meter__cut__input_as_reported_and_a_token_a_piece():
    _, meter = await metered(*WHOLE[:5])
    assert not meter.done
    assert meter.result() == (Usage(input_tokens=42, cached_input_tokens=30, output_tokens=2), None)


async def test_meter__placeholder_of_the_start__is_never_the_last_word():
    _, meter = await metered(START)
    assert meter.result() == (None, None)


async def test_meter__usage_with_output_after_it__is_not_the_last_word():
    _, meter = await metered(START, LAST, *PIECES)
    assert meter.result()[1] is None


async def test_meter__cut_between_the_usage_and_the_stop__is_charged_as_reported():
    _, meter = await metered(*WHOLE[:-1])
    assert meter.result()[1] == REPORTED


@pytest.mark.parametrize(
    ("delta", "pieces"),
    [
        ({"type": "text_delta", "text": "a"}, 1),
        ({"type": "text_delta", "text": ""}, 0),
        ({"type": "thinking_delta", "thinking": "hm"}, 1),
        ({"type": "input_json_delta", "partial_json": "{"}, 1),
        ({"type": "signature_delta", "signature": "s"}, 0),
        (None, 0),
    ],
)
async def test_meter__delta__is_a_piece_if_there_is_output_in_it(delta, pieces):
    _, meter = await metered(sse("content_block_delta", index=0, delta=delta))
    assert meter.pieces == pieces


async def test_meter__error_event__breaks_the_stream():
    with pytest.raises(NotAStream, match="overloaded"):
        await metered(START, sse("error", error={"type": "overloaded_error", "message": "overloaded"}))


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "type_"),
    [
        (InvalidRequest(reason="x", param="model"), "invalid_request_error"),
        (InvalidApiKey(), "authentication_error"),
        (ApiKeyExpired(expired_at="2026"), "authentication_error"),
        (InsufficientFunds(required="1", available="0"), "billing_error"),
        (UnsupportedRoute(method="GET", path="/"), "invalid_request_error"),
        (UpstreamInvalid(upstream="u", reason="cut"), "api_error"),
    ],
)
def test_error_body__any__is_one_that_anthropics_client_reads(error, type_):
    told = API.error_body(error)
    assert told["type"] == "error"
    assert (told["error"]["type"], told["error"]["code"]) == (type_, error.code)
    assert told["error"]["message"] == error.message


def test_error_event__is_one_that_anthropics_client_raises():
    raw = API.error_event(UpstreamInvalid(upstream="u", reason="cut"))
    assert raw.startswith(b"\n\nevent: error\ndata: ")
    assert json.loads(raw.split(b"data: ")[1])["type"] == "error"
