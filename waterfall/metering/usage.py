"""What providers report, as one `Usage`. Their differences are settled here and nowhere else."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from waterfall.errors import WaterfallError
from waterfall.types import Usage

_MOST_LEVELS = 32


class UsageUnreadable(WaterfallError):
    """The provider's usage object cannot be read: {reason}."""

    code = "usage_unreadable"


def from_openai_chat(usage: Any) -> Usage:
    """Read `usage` of a chat completion: `prompt_tokens` includes the cached ones.

    An explicit zero stays zero; a missing count is an error, never a zero.

    Source: https://platform.openai.com/docs/api-reference/chat/object

    Raises:
        UsageUnreadable: absent, counts that contradict each other, or nothing that a receipt could carry.
    """
    if not isinstance(usage, Mapping):
        raise UsageUnreadable(reason="it is missing")
    if _is_deeper(usage, _MOST_LEVELS):
        raise UsageUnreadable(reason=f"it has more than {_MOST_LEVELS} levels")
    try:
        output = usage["completion_tokens"]
        reasoning = _detail(usage, "completion_tokens_details", "reasoning_tokens")
        return Usage(
            input_tokens=usage["prompt_tokens"],
            cached_input_tokens=_detail(usage, "prompt_tokens_details", "cached_tokens"),
            output_tokens=output + reasoning if _is_apart(usage, reasoning) else output,
            reasoning_tokens=reasoning,
        )
    except KeyError as error:
        raise UsageUnreadable(reason=f"{error.args[0]} is missing") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = "".join(f"{name}: " for name in problem["loc"])
        raise UsageUnreadable(reason=where + problem["msg"].removeprefix("Value error, ")) from None


def _is_apart(usage: Mapping[str, Any], reasoning: Any) -> bool:
    """Whether `completion_tokens` leaves reasoning out, as xAI's does: its `total_tokens` then has all three.

    Source: https://docs.x.ai/docs/guides/reasoning
    """
    counts = usage["prompt_tokens"], usage["completion_tokens"], reasoning, usage.get("total_tokens")
    if not all(type(count) is int for count in counts):
        return False
    prompt, completion, apart, total = counts
    return bool(apart > 0 and total == prompt + completion + apart)


def _detail(usage: Mapping[str, Any], group: str, name: str) -> Any:
    """A count that providers may leave out, or send as null, when it is zero."""
    details = usage.get(group)
    value = details.get(name) if isinstance(details, Mapping) else None
    return 0 if value is None else value


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list):
        return False
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in value)
