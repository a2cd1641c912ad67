import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import card, served

from waterfall.errors import InvalidRequest
from waterfall.gateway.surfaces.embeddings import Embeddings

API = Embeddings()
MODEL = served(card(inputs="1", outputs="0"))


def body(**fields):
    return json.dumps({"model": "small", "input": "Hello", **fields}).encode()


def held(data):
    bound = API.read(data).bound(MODEL)
    assert (bound.output_tokens, bound.least_output_tokens) == (0, 0)
    return bound.amount(0) // 10**6


@pytest.mark.parametrize("value", ["hi", ["hi", "there"], [1, 2, 3], [[1, 2], [3]], ["hi", [1]]])
def test_read__texts_or_tokens__pass_untouched(value):
    data = body(input=value, dimensions=256, encoding_format="base64")
    sent = json.loads(API.upstream_body(API.read(data), MODEL, 0))
    assert sent == {**json.loads(data), "model": "provider/small"}


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_bound__texts__their_bytes_are_held(texts):
    assert held(body(input=texts)) >= sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_bound__tokens__their_number_is_held(tokens):
    assert held(body(input=tokens)) >= len(tokens)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [True]}, "input"),
        ({"input": [{"type": "image"}]}, "input"),
        ({"input": [[1, "a"]]}, "input"),
        ({"model": ""}, "model"),
        ({"stream": True}, "stream"),
        ({"messages": []}, "messages"),
        ({"image": "x"}, "image"),
    ],
)
def test_read__what_cannot_be_bounded__is_refused_by_name(fields, param):
    with pytest.raises(InvalidRequest) as refused:
        API.read(body(**fields))
    assert refused.value.details["param"] == param
