"""What providers report, as one `Usage`. Their differences are settled here and nowhere else."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from waterfall.errors import WaterfallError
from waterfall.types import Surface, Usage

WEB_SEARCHES = "waterfall_web_searches"
"""Under this name stands in a usage object, beside the provider's counts, what its answer shows and they leave out."""
_MOST_LEVELS = 32


class UsageUnreadable(WaterfallError):
    """The provider's usage object cannot be read: {reason}."""

    code = "usage_unreadable"


def read(surface: Surface, usage: Any) -> Usage:
    """Read the usage object of an answer.

    An explicit zero stays zero; a missing count is an error, never a zero.

    Raises:
        UsageUnreadable: absent, counts that contradict each other, or nothing that a receipt could carry.
    """
    if not isinstance(usage, Mapping):
        raise UsageUnreadable(reason="it is missing")
    if _is_deeper(usage, _MOST_LEVELS):
        raise UsageUnreadable(reason=f"it has more than {_MOST_LEVELS} levels")
    try:
        return _READERS[surface](usage)
    except KeyError as error:
        raise UsageUnreadable(reason=f"{error.args[0]} is missing") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = "".join(f"{name}: " for name in problem["loc"])
        raise UsageUnreadable(reason=where + problem["msg"].removeprefix("Value error, ")) from None


def _chat(usage: Mapping[str, Any]) -> Usage:
    """`prompt_tokens` includes the cached ones.

    Source: https://platform.openai.com/docs/api-reference/chat/object
    """
    input_, output = usage["prompt_tokens"], _all_output(usage)
    reasoning = _detail(usage, "completion_tokens_details", "reasoning_tokens")
    if _are_counts(input_, output, reasoning) and usage.get("total_tokens") == input_ + output:
        reasoning = min(reasoning, output)  # for people only: the total says that it is part of the output
    return _openai(usage, input_, output, "prompt_tokens_details", reasoning)


def _responses(usage: Mapping[str, Any]) -> Usage:
    """`input_tokens` includes the cached ones. Searches are in no count of it: see `WEB_SEARCHES`.

    Source: https://platform.openai.com/docs/api-reference/responses/object
    """
    reasoning = _detail(usage, "output_tokens_details", "reasoning_tokens")
    return _openai(usage, usage["input_tokens"], usage["output_tokens"], "input_tokens_details", reasoning)


def _openai(usage: Mapping[str, Any], input_: Any, output: Any, details: str, reasoning: Any) -> Usage:
    group = usage.get(details)
    is_told = isinstance(group, Mapping) and group.get("cached_tokens") is not None
    cached = _detail(usage, details, "cached_tokens") if is_told else _cached_elsewhere(usage)
    return _usage(
        input_tokens=input_,
        cached_input_tokens=cached,
        cache_write_tokens=_detail(usage, details, "cache_write_tokens"),
        image_tokens=_detail(usage, details, "image_tokens"),
        output_tokens=output,
        reasoning_tokens=reasoning,
        web_searches=_count(usage, WEB_SEARCHES),
    )


def _cached_elsewhere(usage: Mapping[str, Any]) -> Any:
    """DeepSeek and Moonshot count cached input beside the prompt's tokens, which include it as well.

    Sources: https://api-docs.deepseek.com/api/create-chat-completion, https://platform.moonshot.ai/docs/api/chat
    """
    return _count(usage, "prompt_cache_hit_tokens") or _count(usage, "cached_tokens")


def _embeddings(usage: Mapping[str, Any]) -> Usage:
    """There is input only.

    Source: https://platform.openai.com/docs/api-reference/embeddings/create
    """
    tokens = usage["total_tokens"] if usage.get("prompt_tokens") is None else usage["prompt_tokens"]
    return _usage(input_tokens=tokens, output_tokens=0)


def _messages(usage: Mapping[str, Any]) -> Usage:
    """`input_tokens` leaves out what was read from a cache or written to one.

    Where the provider ran several times for one answer, as when it compacts a conversation, the counts on top are those of
    the last time, and each time is billed.

    Sources: https://platform.claude.com/docs/en/api/messages, https://platform.claude.com/docs/en/build-with-claude/compaction
    """
    times = usage.get("iterations") or [usage]
    if not isinstance(times, list) or not all(isinstance(each, Mapping) for each in times):
        raise UsageUnreadable(reason="iterations is not a list of usage objects")
    counted = [_messages_once(each) for each in times]
    searches = _detail(usage, "server_tool_use", "web_search_requests")
    return _usage(**{name: sum(each[name] for each in counted) for name in counted[0]}, web_searches=searches)


def _messages_once(usage: Mapping[str, Any]) -> dict[str, int]:
    read = _count(usage, "cache_read_input_tokens")
    written = _count(usage, "cache_creation_input_tokens")
    for_an_hour = _detail(usage, "cache_creation", "ephemeral_1h_input_tokens")
    counts = usage["input_tokens"], read, written, for_an_hour, usage["output_tokens"]
    if not all(type(count) is int for count in counts):
        raise UsageUnreadable(reason="a count is not a whole number")
    if for_an_hour > written:
        raise UsageUnreadable(reason="more tokens are cached for an hour than are cached")
    return {
        "input_tokens": usage["input_tokens"] + read + written,
        "cached_input_tokens": read,
        "cache_write_tokens": written - for_an_hour,
        "cache_write_1h_tokens": for_an_hour,
        "output_tokens": usage["output_tokens"],
        "reasoning_tokens": _detail(usage, "output_tokens_details", "thinking_tokens"),
    }


_READERS: dict[Surface, Callable[[Mapping[str, Any]], Usage]] = {
    "chat": _chat,
    "responses": _responses,
    "messages": _messages,
    "embeddings": _embeddings,
}


def _usage(*, image_tokens: Any = 0, **counts: Any) -> Usage:
    """Images that were read from a cache are counted twice by who counts them: they cost what the cache costs."""
    usage = Usage(**counts)
    if not image_tokens:
        return usage
    images = Usage(input_tokens=image_tokens, output_tokens=0).input_tokens
    return Usage(**counts, image_tokens=min(images, usage.plain_input_tokens))


def _all_output(usage: Mapping[str, Any]) -> Any:
    """All output. `completion_tokens` of xAI's and of Gemini's leaves thinking out; their `total_tokens` has it.

    Sources: https://docs.x.ai/docs/guides/reasoning, https://ai.google.dev/gemini-api/docs/openai
    """
    prompt, completion, total = usage["prompt_tokens"], usage["completion_tokens"], usage.get("total_tokens")
    return max(completion, total - prompt) if _are_counts(prompt, completion, total) else completion


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _detail(usage: Mapping[str, Any], group: str, name: str) -> Any:
    """A count that providers may leave out, or send as null, when it is zero."""
    details = usage.get(group)
    return _count(details, name) if isinstance(details, Mapping) else 0


def _count(usage: Mapping[str, Any], name: str) -> Any:
    value = usage.get(name)
    return 0 if value is None else value


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list):
        return False
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in value)
