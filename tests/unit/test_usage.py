import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterfall.metering.usage import UsageUnreadable, read
from waterfall.types import Usage

# What providers with OpenAI's interface really send.
OPENAI = {
    "prompt_tokens": 2006,
    "completion_tokens": 300,
    "total_tokens": 2306,
    "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 256,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}
LLAMA_CPP = {"completion_tokens": 3, "prompt_tokens": 12, "total_tokens": 15}
LLAMA_CPP_CACHED = {**LLAMA_CPP, "prompt_tokens_details": {"cached_tokens": 11}}
VLLM = {
    "prompt_tokens": 7,
    "total_tokens": 17,
    "completion_tokens": 10,
    "prompt_tokens_details": None,
}
XAI = {
    "prompt_tokens": 32,
    "completion_tokens": 9,
    "total_tokens": 135,
    "prompt_tokens_details": {"text_tokens": 32, "audio_tokens": 0, "image_tokens": 0, "cached_tokens": 6},
    "completion_tokens_details": {"reasoning_tokens": 94, "audio_tokens": 0},
}
NULLS = {
    "prompt_tokens": 7,
    "completion_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": None},
    "completion_tokens_details": {"reasoning_tokens": None},
}


@pytest.mark.parametrize(
    ("reported", "usage"),
    [
        (OPENAI, Usage(input_tokens=2006, cached_input_tokens=1920, output_tokens=300, reasoning_tokens=256)),
        (LLAMA_CPP, Usage(input_tokens=12, output_tokens=3)),
        (LLAMA_CPP_CACHED, Usage(input_tokens=12, cached_input_tokens=11, output_tokens=3)),
        (VLLM, Usage(input_tokens=7, output_tokens=10)),
        (XAI, Usage(input_tokens=32, cached_input_tokens=6, output_tokens=103, reasoning_tokens=94)),
        (NULLS, Usage(input_tokens=7, output_tokens=10)),
    ],
    ids=["openai", "llama.cpp", "llama.cpp cached", "vllm", "xai", "nulls"],
)
def test_read_chat__golden_answer__usage(reported, usage):
    assert read("chat", reported) == usage


def test_read_chat__cached_tokens__are_part_of_the_input():
    usage = read("chat", OPENAI)
    assert usage.input_tokens == OPENAI["prompt_tokens"]


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.data())
def test_read_chat__any_counts__are_taken_as_they_are(prompt, completion, data):
    cached, reasoning = data.draw(st.integers(0, prompt)), data.draw(st.integers(0, completion))
    usage = read(
        "chat",
        {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        },
    )
    assert (usage.input_tokens, usage.cached_input_tokens) == (prompt, cached)
    assert (usage.output_tokens, usage.reasoning_tokens) == (completion, reasoning)


def test_read_chat__explicit_zero__stays_zero():
    usage = read("chat", {"prompt_tokens": 5, "completion_tokens": 0})
    assert usage.output_tokens == 0


@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens"])
def test_read_chat__missing_count__is_never_zero(name):
    reported = {**LLAMA_CPP}
    del reported[name]
    with pytest.raises(UsageUnreadable, match=f"{name} is missing"):
        read("chat", reported)


@pytest.mark.parametrize("reported", [None, [], "usage", 1])
def test_read_chat__no_object__is_missing(reported):
    with pytest.raises(UsageUnreadable, match="it is missing"):
        read("chat", reported)


@pytest.mark.parametrize("count", [None, "12", 1.5, 12.0, -1, True, 2**63, {}])
@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens"])
def test_read_chat__count_that_is_not_one__is_refused(name, count):
    with pytest.raises(UsageUnreadable):
        read("chat", {**LLAMA_CPP, name: count})


@pytest.mark.parametrize(
    "contradiction",
    [
        {"prompt_tokens_details": {"cached_tokens": 13}},
        {"completion_tokens_details": {"reasoning_tokens": 4}, "total_tokens": None},
        {"prompt_tokens_details": {"cached_tokens": -1}},
        {"prompt_tokens_details": {"cached_tokens": "1"}},
        {"prompt_tokens_details": {"cached_tokens": ""}},
        {"prompt_tokens_details": {"cached_tokens": False}},
    ],
)
def test_read_chat__contradiction__is_refused(contradiction):
    with pytest.raises(UsageUnreadable):
        read("chat", {**LLAMA_CPP, **contradiction})
