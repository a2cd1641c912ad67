import json
from decimal import Decimal

import pytest
from making import card, held_tokens, served

from waterfall.errors import InvalidRequest, UpstreamInvalid
from waterfall.gateway.surfaces.responses import Responses
from waterfall.gateway.surfaces.streams import NotAStream, events
from waterfall.metering.usage import WEB_SEARCHES
from waterfall.receipts import bytes_hash
from waterfall.types import Usage

API = Responses()
USAGE = {"input_tokens": 12, "output_tokens": 5, "total_tokens": 17}
SEARCH = {"type": "web_search"}


def body(**fields):
    return json.dumps({"model": "small", "input": "Hello", **fields}).encode()


def model(*, searches="0", **known):
    tariff = card(inputs="1", outputs="0").model_copy(update={"usd_per_web_search": Decimal(searches)})
    return served(tariff, **known)


def refusal(**fields):
    with pytest.raises(InvalidRequest) as refused:
        API.read(body(**fields))
    return refused.value.details["param"]


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────


def test_read__text__is_taken_and_sent_with_a_limit():
    request = API.read(body(max_output_tokens=7, temperature=0.5, metadata={"a": "b"}))
    assert (request.models, request.stream, request.max_tokens) == (("small",), False, 7)
    sent = json.loads(API.upstream_body(request, model(), 7))
    assert sent == {
        "model": "provider/small",
        "input": "Hello",
        "max_output_tokens": 7,
        "temperature": 0.5,
        "metadata": {"a": "b"},
    }


def test_read__no_limit__the_models_default_is_sent():
    request = API.read(body(stream=True))
    bound = request.bound(model())
    assert (bound.output_tokens, bound.least_output_tokens) == (4096, 16)
    assert json.loads(API.upstream_body(request, model(), 4096))["max_output_tokens"] == 4096


@pytest.mark.parametrize(
    "items",
    [
        [{"role": "user", "content": "hi"}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}],
        [{"type": "function_call_output", "call_id": "c", "output": "5"}],
        [{"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "abc"}],
        [{"type": "apply_patch_call_output", "call_id": "c", "output": "done"}],
    ],
)
def test_read__items_whose_text_is_in_the_request__pass(items):
    assert API.read(body(input=items)).reads_elsewhere is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["hi"]}, "input[0]"),
        ({"input": [{"type": "image_generation_call"}]}, "input[0]"),
        ({"input": [{"type": ["x"]}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"model": None}, "model"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"provider": {"only": ["dear"]}}, "provider"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"tools": [{"type": "file_search"}]}, "tools"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools"),
        ({"tools": [{"type": "mcp"}]}, "tools"),
        ({"tools": [{"type": "image_generation"}]}, "tools"),
        ({"tools": [SEARCH]}, "max_tool_calls"),
        ({"tools": [SEARCH], "max_tool_calls": 101}, "max_tool_calls"),
    ],
)
def test_read__what_cannot_be_bounded_or_priced__is_refused_by_name(fields, param):
    assert refusal(**fields) == param


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"input": [{"type": "item_reference", "id": "i"}]},
        {"input": [{"id": "msg_1"}]},
        {"input": [{"type": "reasoning", "id": "r", "summary": []}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
    ],
)
def test_bound__input_that_is_not_in_the_request__is_held_at_the_models_context(fields):
    request = API.read(body(**fields))
    assert held_tokens(request, model(context_tokens=400_000)) == 400_000
    with pytest.raises(InvalidRequest, match="context_tokens"):
        request.bound(model())


def test_bound__image__is_held_by_its_number():
    image = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 50_000}
    request = API.read(body(input=[{"role": "user", "content": [image]}], max_output_tokens=1))
    assert 1000 < held_tokens(request, model(image_tokens=1000)) < 2000
    screen = {"type": "computer_screenshot", "image_url": image["image_url"]}
    request = API.read(body(input=[{"type": "computer_call_output", "call_id": "c", "output": screen}]))
    assert 1000 < held_tokens(request, model(image_tokens=1000)) < 2000


def test_bound__web_searches__each_is_held_with_another_reading_of_the_context():
    request = API.read(body(tools=[SEARCH], max_tool_calls=2, max_output_tokens=10))
    assert held_tokens(request, model(searches="0.01", context_tokens=1000)) == 3 * 1000 + 2 * 0.01 * 10**6
    with pytest.raises(InvalidRequest, match="not priced"):
        request.bound(model(context_tokens=1000))


def test_usage_in__answer_that_searched__counts_the_searches():
    looks = [{"type": "web_search_call", "action": {"type": kind}} for kind in ("open_page", "find_in_page")]
    searches = [{"type": "web_search_call", "action": {"type": "search"}}, {"type": "web_search_call"}]
    output = [{"type": "message"}, *searches, *looks]
    assert API.usage_in({"usage": USAGE, "output": output}) == {**USAGE, WEB_SEARCHES: 2}
    assert API.usage_in({"usage": USAGE, "output": [{"type": "message"}]}) == USAGE
    assert API.usage_in({"output": output}) is None


# ── Streams ──────────────────────────────────────────────────────────────────────────────────────────


def sse(kind, **fields):
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


BEGIN = [sse("response.created", response={"usage": None}), sse("response.in_progress")]
PIECES = [sse("response.output_text.delta", delta=text) for text in ("Hel", "lo", "")]
END = sse("response.completed", response={"usage": USAGE, "output": []})
WHOLE = [*BEGIN, *PIECES, sse("response.output_text.done", text="Hello"), END]


async def metered(*data):
    async def upstream():
        for chunk in data:
            yield chunk

    meter = API.stream_meter(API.read(body(stream=True)))
    now = [raw async for event in events(upstream()) for raw in meter.take(event)]
    return now, meter


async def test_meter__whole_stream__is_charged_as_reported_and_its_end_waits():
    now, meter = await metered(*WHOLE)
    assert now == WHOLE[:-1]
    assert meter.tail() == [END]
    assert meter.done
    assert meter.result() == (Usage(input_tokens=12, output_tokens=5), USAGE)
    assert meter.response_hash() == bytes_hash(b"".join(WHOLE))


async def test_meter__cost__is_told_in_the_last_event():
    _, meter = await metered(*WHOLE)
    (last,) = meter.tail({"cost": "0.01"})
    assert last.startswith(b': waterfall {"cost":"0.01"}\nevent: response.completed\n')
    told = json.loads(last.split(b"data: ")[1])
    assert told["waterfall"] == {"cost": "0.01"}
    assert told["response"]["usage"] == USAGE


@pytest.mark.parametrize("kind", ["response.incomplete", "response.failed"])
async def test_meter__response_that_did_not_complete__is_charged_as_reported(kind):
    _, meter = await metered(*WHOLE[:-1], sse(kind, response={"usage": USAGE}))
    assert meter.result()[1] == USAGE


async def test_meter__cut__counts_its_pieces():
    _, meter = await metered(*WHOLE[:4])
    assert not meter.done
    assert meter.result() == (Usage(input_tokens=0, output_tokens=2), None)


async def test_meter__failed_without_usage_or_output__is_nothing_to_charge():
    _, meter = await metered(*BEGIN, sse("response.failed", response={"usage": None}))
    assert meter.result() == (None, None)


async def test_meter__error_event__breaks_the_stream():
    with pytest.raises(NotAStream):
        await metered(*BEGIN, sse("error", error={"message": "overloaded"}))


def test_error_event__is_one_that_openais_client_raises():
    raw = API.error_event(UpstreamInvalid(upstream="u", reason="cut"))
    assert raw.startswith(b"\n\nevent: error\ndata: ")
    told = json.loads(raw.split(b"data: ")[1])
    assert (told["type"], told["code"], told["error"]["code"]) == ("error", *["upstream_invalid"] * 2)
