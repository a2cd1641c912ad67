import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import card, held_tokens, served

from waterfall.errors import InvalidRequest
from waterfall.gateway.surfaces.chat import Chat
from waterfall.metering import prices
from waterfall.types import Usage

CHAT = Chat()
MESSAGES = [{"role": "user", "content": "Hello"}]


def body(**fields):
    return json.dumps({"model": "small", "messages": MESSAGES, **fields}).encode()


def model(*, tariff=None, **known):
    return served(tariff or card(inputs="1", outputs="1"), **known)


def refusal(data):
    with pytest.raises(InvalidRequest) as refused:
        CHAT.read(data)
    return refused.value.details["param"]


# ── What is read ─────────────────────────────────────────────────────────────────────────────────────


def test_read__plain_request__no_limit_one_choice_no_stream():
    request = CHAT.read(body())
    assert (request.models, request.stream, request.shows_usage) == (("small",), False, False)
    assert (request.choices, request.max_tokens) == (1, None)
    assert request.body == body()


def test_read__everything_set__is_taken():
    request = CHAT.read(body(stream=True, stream_options={"include_usage": True}, n=3, max_tokens=7))
    assert (request.stream, request.shows_usage, request.choices, request.max_tokens) == (True, True, 3, 7)


def test_read__both_limits__the_smaller_binds():
    assert CHAT.read(body(max_tokens=7, max_completion_tokens=5)).max_tokens == 5
    assert CHAT.read(body(max_tokens=5, max_completion_tokens=7)).max_tokens == 5
    assert CHAT.read(body(max_completion_tokens=7)).max_tokens == 7


def test_read__explicit_nulls__are_as_good_as_absent():
    request = CHAT.read(
        body(
            max_tokens=None,
            n=None,
            stream=None,
            stream_options=None,
            tools=None,
            service_tier=None,
            audio=None,
        )
    )
    assert (request.max_tokens, request.choices, request.stream) == (None, 1, False)


def test_read__fields_we_do_not_know__pass():
    assert CHAT.read(body(temperature=0.5, user="u", seed=1, response_format={"type": "json_object"}))


def test_read__parts_of_text__pass():
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    assert CHAT.read(
        body(messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": None}])
    )


@pytest.mark.parametrize("tier", ["auto", "default", "flex"])
def test_read__tier_that_costs_no_more__passes(tier):
    assert CHAT.read(body(service_tier=tier))


# ── What is refused ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b"null", b"[]", b'"x"', b"1", b'{"model": NaN}', b"[" * 5000 + b"]" * 5000]
)
def test_read__not_a_json_object__is_refused(data):
    assert refusal(data) is None


def test_read__nested_deeper_than_it_could_be_sent__is_refused_before_the_hold():
    deep = (
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "x": '
        + b"[" * 900
        + b"]" * 900
        + b"}"
    )
    try:
        request = CHAT.read(deep)
    except InvalidRequest:
        return
    assert CHAT.upstream_body(request, model(), 5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 10_000_001}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": [1]}, "n"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "include_usage"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"service_tier": []}, "service_tier"),
        ({"service_tier": {}}, "service_tier"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"modalities": [{}]}, "modalities"),
        ({"modalities": 5}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"best_of": 2}, "best_of"),
        ({"n_predict": 5}, "n_predict"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"models": ["other"]}, "model"),
        ({"models": []}, "models"),
        ({"models": "other"}, "models"),
        ({"models": ["small", 5]}, "models[1]"),
        ({"models": ["small"] * 9}, "models"),
        ({"plugins": []}, "plugins"),
        ({"provider": {"only": ["dear"]}}, "provider"),
        ({"max_output_tokens": 5}, "max_output_tokens"),
        ({"options": {"num_predict": 5}}, "options"),
        ({"previous_response_id": "r"}, "previous_response_id"),
        ({"extra_body": {"google": {"cached_content": "c"}}}, "extra_body"),
        ({"data_sources": []}, "data_sources"),
        ({"search_parameters": {}}, "search_parameters"),
        ({"enable_search": True}, "enable_search"),
        ({"deferred": True}, "deferred"),
        ({"fallbacks": ["other"]}, "fallbacks"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"tools": {}}, "tools"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{}]}, "tools"),
        ({"tools": [{"type": []}]}, "tools"),
    ],
)
def test_read__field_whose_cost_cannot_be_bounded_or_priced__is_refused_by_name(fields, param):
    assert refusal(body(**fields)) == param


@pytest.mark.parametrize(
    "content",
    [
        5,
        True,
        {"type": "text"},
        ["Hello"],
        [None],
        [{}],
        [{"type": []}],
        [{"type": "input_audio"}],
        [{"type": "text", "text": "a"}, {"type": "video_url"}],
        [{"type": "image_url", "image_url": {"url": 5}}],
    ],
)
def test_read__content_that_is_not_priced__is_refused_by_its_place(content):
    messages = [*MESSAGES, {"role": "user", "content": content}]
    assert refusal(body(messages=messages)) == "messages[1].content"


def test_read__audio_of_an_earlier_answer__is_refused():
    messages = [{"role": "assistant", "audio": {"id": "a"}}]
    assert refusal(body(messages=messages)) == "messages[0].audio"


def test_read__files_that_the_request_only_names__are_refused():
    messages = [{"role": "user", "content": "Read it.", "file_ids": ["f"]}]
    assert refusal(body(messages=messages)) == "messages[0].file_ids"


def test_read__template_told_not_to_think__is_read():
    assert CHAT.read(body(chat_template_kwargs={"enable_thinking": False})).models == ("small",)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        *("model", "messages", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options"),
        *("service_tier", "modalities", "tools", "audio", "models", "functions", "x"),
    ]
)


@given(st.dictionaries(NAMES, JSON, max_size=5), st.booleans())
def test_read__whatever_the_fields__is_read_or_refused_by_name(fields, complete):
    data = json.dumps({"model": "m", "messages": MESSAGES, **fields} if complete else fields).encode()
    try:
        request = CHAT.read(data)
    except InvalidRequest:
        return
    wanted = request.bound(model())
    sent = json.loads(CHAT.upstream_body(request, model(), wanted.output_tokens))
    assert sent["max_tokens"] == wanted.output_tokens // request.choices >= 1


# ── The bound ────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.text(max_size=40), min_size=1, max_size=5), st.lists(st.text(max_size=20), max_size=3))
def test_read__any_text__its_bytes_and_the_templates_tokens_are_within_the_bound(texts, names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    data = body(messages=[{"role": "user", "content": text} for text in texts], tools=tools)
    content = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    most = CHAT.read(data).text_tokens
    assert most >= content + 16 * len(texts)
    assert most >= len(data)


def longest_json(value):
    """A value as the most wasteful of chat templates renders it."""
    text = json.dumps(value, indent=4)
    for character in "<>&'":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@given(JSON)
def test_read__whatever_a_template_renders__its_longest_json_is_within_the_bound(value):
    tools = [{"type": "function", "function": {"name": "f", "parameters": value}}]
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": value}}]
    plain = CHAT.read(body()).text_tokens
    for fields, rendered in (
        ({"tools": tools}, tools),
        ({"functions": [value]}, [value]),
        ({"response_format": {"json_schema": value}}, {"json_schema": value}),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": calls}]}, calls),
    ):
        assert CHAT.read(body(**fields)).text_tokens >= plain + len(longest_json(rendered))


@pytest.mark.parametrize(
    ("text", "form"), [("\U0001d160", "NFC"), ("\ufdfa", "NFKC"), ("\u1e9b\u0323", "NFKD"), ("\u0390", "NFD")]
)
def test_read__text_that_normalisation_lengthens__is_within_the_bound(text, form):
    message = {"role": "user", "content": 1000 * text}
    data = json.dumps({"model": "m", "messages": [message]}, ensure_ascii=False).encode()
    assert CHAT.read(data).text_tokens >= len(unicodedata.normalize(form, message["content"]).encode())


def test_read__text_that_normalisation_lengthens__is_within_the_bound_also_where_it_is_escaped():
    message = {"role": "user", "content": 1000 * "\ufdfa"}
    data = json.dumps({"model": "m", "messages": [message]}).encode()
    assert data.isascii()
    assert CHAT.read(data).text_tokens >= len(unicodedata.normalize("NFKC", message["content"]).encode())


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_read__any_text_in_any_form__is_within_the_bound(text):
    data = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": text}]}, ensure_ascii=False
    ).encode()
    most = CHAT.read(data).text_tokens
    assert all(
        len(unicodedata.normalize(form, text).encode()) <= most for form in ("NFC", "NFD", "NFKC", "NFKD")
    )


def test_read__combining_marks_without_end__take_time_that_grows_with_their_number_only():
    text = "a" + "\u0301\u0323" * 500_000
    data = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": text}]}, ensure_ascii=False
    ).encode()
    assert CHAT.read(data).text_tokens >= len(data)


def test_bound__limit_set__is_held_whole_for_every_choice():
    bound = CHAT.read(body(max_tokens=10, n=3)).bound(model())
    assert (bound.output_tokens, bound.least_output_tokens) == (30, 30)


def test_bound__no_limit__the_models_default_down_to_a_few_tokens():
    bound = CHAT.read(body(n=2)).bound(model(default=100))
    assert (bound.output_tokens, bound.least_output_tokens) == (200, 32)
    bound = CHAT.read(body()).bound(model(default=5))
    assert (bound.output_tokens, bound.least_output_tokens) == (5, 5)


def test_bound__more_choices_than_the_upstream_meters__is_refused():
    with pytest.raises(InvalidRequest, match="at most 1"):
        CHAT.read(body(n=2)).bound(model(most_choices=1))
    assert CHAT.read(body(n=1)).bound(model(most_choices=1))


@given(st.integers(1, 5), st.none() | st.integers(1, 50), st.integers(1, 100), st.data())
def test_bound__whatever_the_call_uses_within_it__costs_no_more_than_is_held(choices, limit, default, data):
    fields = {} if limit is None else {"max_tokens": limit}
    request = CHAT.read(body(n=choices, **fields))
    its = model(default=default, tariff=card(inputs="3", outputs="7", cached="2"))
    bound = request.bound(its)
    tokens = bound.affordable_output_tokens(data.draw(st.integers(0, 2 * bound.amount(bound.output_tokens))))
    if tokens is None:
        return
    per_choice = json.loads(CHAT.upstream_body(request, its, tokens))["max_tokens"]
    assert per_choice >= 1
    assert limit is None or per_choice == limit
    most = Usage(input_tokens=request.text_tokens, output_tokens=per_choice * choices)
    assert prices.amount(most, its.card) <= bound.amount(tokens)


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
FILE = {"type": "file", "file": {"file_id": "f"}}


def asking(*parts):
    return CHAT.read(body(messages=[{"role": "user", "content": list(parts)}], max_tokens=1))


def input_of(request, **of_model):
    """Tokens of input that are held for."""
    return held_tokens(request, model(tariff=card(inputs="1", outputs="0"), **of_model))


def test_bound__images__by_their_number_and_not_by_their_bytes():
    one = input_of(asking(IMAGE), image_tokens=1000)
    assert 1000 < one < 2000
    assert input_of(asking(IMAGE, IMAGE), image_tokens=1000) - one > 1000


def test_bound__image_at_an_address__is_held_like_one_in_the_request():
    far = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    assert input_of(asking(far), image_tokens=1000) > 1000


def test_bound__images_for_a_model_of_unknown_ones__are_refused():
    with pytest.raises(InvalidRequest, match="image_tokens"):
        asking(IMAGE).bound(model())


def test_bound__what_is_not_in_the_request__is_held_at_the_models_context():
    assert input_of(asking(FILE), context_tokens=128_000) == 128_000
    with pytest.raises(InvalidRequest, match="context_tokens"):
        asking(FILE).bound(model())


def test_read__several_models__are_tried_in_their_order_and_the_upstream_sees_one():
    request = CHAT.read(body(model=None, models=["a", "b"]))
    assert request.models == ("a", "b")
    assert "models" not in json.loads(CHAT.upstream_body(request, model(), 10))


# ── What the upstream gets ───────────────────────────────────────────────────────────────────────────


def sent(fields, output_tokens=10, **of_model):
    return json.loads(CHAT.upstream_body(CHAT.read(body(**fields)), model(**of_model), output_tokens))


def test_upstream_body__plain__its_own_name_for_the_model_and_the_limit():
    fields = sent({"temperature": 0.5, "user": "u"})
    assert fields == {
        "model": "provider/small",
        "messages": MESSAGES,
        "temperature": 0.5,
        "user": "u",
        "max_tokens": 10,
    }


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_upstream_body__limits__one_in_the_field_that_it_reads(field):
    fields = sent({"max_tokens": 20, "max_completion_tokens": 30}, field=field)
    assert fields[field] == 10
    assert len({"max_tokens", "max_completion_tokens"} & fields.keys()) == 1


def test_upstream_body__choices__share_the_output():
    assert sent({"n": 3}, output_tokens=32)["max_tokens"] == 10


def test_upstream_body__stream__always_asks_for_the_usage():
    assert sent({"stream": True})["stream_options"] == {"include_usage": True}
    options = {"include_usage": False, "other": 1}
    assert sent({"stream": True, "stream_options": options})["stream_options"] == {
        "include_usage": True,
        "other": 1,
    }
    assert "stream_options" not in sent({})


def test_upstream_body__text_beyond_ascii__arrives_as_it_was():
    messages = [{"role": "user", "content": "模型 🌊 \u2028 ü"}]
    assert sent({"messages": messages})["messages"] == messages
