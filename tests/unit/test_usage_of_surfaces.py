"""Golden usage objects of other surfaces, as their providers document them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterfall.metering.usage import WEB_SEARCHES, UsageUnreadable, read
from waterfall.types import Usage

# https://platform.openai.com/docs/api-reference/responses/object
RESPONSES = {
    "input_tokens": 328,
    "input_tokens_details": {"cached_tokens": 256},
    "output_tokens": 52,
    "output_tokens_details": {"reasoning_tokens": 32},
    "total_tokens": 380,
}
# https://platform.claude.com/docs/en/build-with-claude/prompt-caching
ANTHROPIC = {"input_tokens": 2095, "output_tokens": 503}
ANTHROPIC_CACHED = {
    "input_tokens": 50,
    "cache_read_input_tokens": 100_000,
    "cache_creation_input_tokens": 556,
    "cache_creation": {"ephemeral_5m_input_tokens": 456, "ephemeral_1h_input_tokens": 100},
    "output_tokens": 503,
    "service_tier": "standard",
}
ANTHROPIC_SEARCH = {
    "input_tokens": 6039,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "output_tokens": 931,
    "server_tool_use": {"web_search_requests": 1},
}
# https://platform.claude.com/docs/en/build-with-claude/compaction
ANTHROPIC_COMPACTED = {
    "input_tokens": 23_000,
    "output_tokens": 1_000,
    "iterations": [
        {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3_500},
        {"type": "message", "input_tokens": 23_000, "output_tokens": 1_000},
    ],
}
# https://platform.openai.com/docs/api-reference/embeddings/create
EMBEDDINGS = {"prompt_tokens": 8, "total_tokens": 8}
# https://api-docs.deepseek.com/api/create-chat-completion
DEEPSEEK = {
    "prompt_tokens": 20,
    "completion_tokens": 4,
    "total_tokens": 24,
    "prompt_cache_hit_tokens": 15,
    "prompt_cache_miss_tokens": 5,
}
# https://platform.moonshot.ai/docs/api/chat
MOONSHOT = {"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24, "cached_tokens": 15}
# https://openrouter.ai/docs/use-cases/usage-accounting
OPENROUTER = {
    "prompt_tokens": 194,
    "prompt_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 100, "audio_tokens": 0},
    "completion_tokens": 2,
    "completion_tokens_details": {"reasoning_tokens": 0},
    "cost": 0.95,
    "total_tokens": 196,
}
IMAGES = {
    "prompt_tokens": 1000,
    "prompt_tokens_details": {"cached_tokens": 700, "image_tokens": 600, "text_tokens": 400},
    "completion_tokens": 1,
}

# https://ai.google.dev/gemini-api/docs/openai: thinking is in the total alone
GEMINI = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 103}
# Reasoning that is said to be more than the output it is part of.
CLAMPED = {
    "prompt_tokens": 9,
    "completion_tokens": 5,
    "total_tokens": 14,
    "completion_tokens_details": {"reasoning_tokens": 7},
}

GOLDEN = {
    "gemini": ("chat", GEMINI, Usage(input_tokens=9, output_tokens=94)),
    "reasoning beyond output": ("chat", CLAMPED, Usage(input_tokens=9, output_tokens=5, reasoning_tokens=5)),
    "embeddings in total only": ("embeddings", {"total_tokens": 10}, Usage(input_tokens=10, output_tokens=0)),
    "responses": (
        "responses",
        RESPONSES,
        Usage(input_tokens=328, cached_input_tokens=256, output_tokens=52, reasoning_tokens=32),
    ),
    "responses searching": (
        "responses",
        {**RESPONSES, WEB_SEARCHES: 3},
        Usage(
            input_tokens=328, cached_input_tokens=256, output_tokens=52, reasoning_tokens=32, web_searches=3
        ),
    ),
    "anthropic": ("messages", ANTHROPIC, Usage(input_tokens=2095, output_tokens=503)),
    "anthropic cached": (
        "messages",
        ANTHROPIC_CACHED,
        Usage(
            input_tokens=100_606,
            cached_input_tokens=100_000,
            cache_write_tokens=456,
            cache_write_1h_tokens=100,
            output_tokens=503,
        ),
    ),
    "anthropic searching": (
        "messages",
        ANTHROPIC_SEARCH,
        Usage(input_tokens=6039, output_tokens=931, web_searches=1),
    ),
    "anthropic compacted": (
        "messages",
        ANTHROPIC_COMPACTED,
        Usage(input_tokens=203_000, output_tokens=4_500),
    ),
    "embeddings": ("embeddings", EMBEDDINGS, Usage(input_tokens=8, output_tokens=0)),
    "deepseek": ("chat", DEEPSEEK, Usage(input_tokens=20, cached_input_tokens=15, output_tokens=4)),
    "moonshot": ("chat", MOONSHOT, Usage(input_tokens=20, cached_input_tokens=15, output_tokens=4)),
    "openrouter": (
        "chat",
        OPENROUTER,
        Usage(input_tokens=194, cached_input_tokens=10, cache_write_tokens=100, output_tokens=2),
    ),
    "cached images": (
        "chat",
        IMAGES,
        Usage(input_tokens=1000, cached_input_tokens=700, image_tokens=300, output_tokens=1),
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_read__golden_usage__as_documented(case):
    surface, reported, usage = GOLDEN[case]
    assert read(surface, reported) == usage


def test_read__cached_tokens__are_part_of_openais_input_and_not_of_anthropics():
    openai = {"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 90}}
    anthropic = {"input_tokens": 10, "cache_read_input_tokens": 90, "output_tokens": 1}
    assert read("chat", openai) == read("messages", anthropic)


def test_read__explicit_zero_of_cached_tokens__is_not_replaced_by_another_count():
    reported = {**DEEPSEEK, "prompt_tokens_details": {"cached_tokens": 0}}
    assert read("chat", reported).cached_input_tokens == 0


@pytest.mark.parametrize(
    ("surface", "reported", "reason"),
    [
        ("responses", {"input_tokens": 1}, "output_tokens is missing"),
        ("responses", {"prompt_tokens": 1, "completion_tokens": 1}, "input_tokens is missing"),
        ("messages", {"output_tokens": 1}, "input_tokens is missing"),
        ("messages", {"input_tokens": 1}, "output_tokens is missing"),
        ("messages", {"input_tokens": 1.0, "output_tokens": 1}, "not a whole number"),
        ("messages", {"input_tokens": True, "output_tokens": 1}, "not a whole number"),
        ("messages", {"input_tokens": -1, "output_tokens": 1}, "input_tokens"),
        (
            "messages",
            {**ANTHROPIC_CACHED, "cache_creation": {"ephemeral_1h_input_tokens": 557}},
            "for an hour",
        ),
        ("messages", {**ANTHROPIC, "iterations": [5]}, "iterations"),
        ("messages", {**ANTHROPIC, "iterations": 5}, "iterations"),
        ("messages", {**ANTHROPIC, "server_tool_use": {"web_search_requests": "1"}}, "web_searches"),
        ("embeddings", {}, "total_tokens is missing"),
        ("chat", {**IMAGES, "prompt_tokens_details": {"image_tokens": "5"}}, "input_tokens"),
        ("chat", {**OPENROUTER, "prompt_tokens_details": {"cache_write_tokens": 195}}, "than input tokens"),
    ],
)
def test_read__usage_that_cannot_be_trusted__is_refused_and_never_guessed(surface, reported, reason):
    with pytest.raises(UsageUnreadable, match=reason):
        read(surface, reported)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**64) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = st.sampled_from(
    [
        *(
            "input_tokens",
            "output_tokens",
            "prompt_tokens",
            "completion_tokens",
            "iterations",
            "server_tool_use",
        ),
        *("cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation", "input_tokens_details"),
        *("prompt_tokens_details", "completion_tokens_details", "cached_tokens", "total_tokens"),
    ]
)


@given(st.sampled_from(["chat", "responses", "messages", "embeddings"]), st.dictionaries(FIELDS, JSON))
def test_read__whatever_a_provider_sends__is_usage_or_refused(surface, reported):
    try:
        usage = read(surface, reported)
    except UsageUnreadable:
        return
    assert usage.plain_input_tokens >= 0
