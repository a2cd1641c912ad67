"""POST /v1/chat/completions.

Source: https://platform.openai.com/docs/api-reference/chat/create
"""

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from waterfall.errors import InvalidRequest
from waterfall.gateway.models import Model
from waterfall.metering import prices
from waterfall.metering.prices import Bound

MAX_OUTPUT_TOKENS = 10_000_000
MAX_CHOICES = 128
_LEAST_OUTPUT_TOKENS = 16

# Other servers' names for an output limit, and requests whose cost cannot be bounded or priced: refused, as
# passing them on would break the provable maximum.
_WHY_REFUSED = {
    "use max_tokens": (
        *("n_predict", "num_predict", "max_new_tokens", "max_output_tokens", "max_length", "max_gen_len"),
        *("max_tokens_to_sample", "options", "generation_config", "generationConfig", "parameters"),
    ),
    "it may exceed max_tokens": ("min_tokens", "min_new_tokens"),
    "use n": ("best_of", "n_cmpl"),
    "its output cannot be bounded": ("use_beam_search",),
    "its input cannot be bounded": ("chat_template", "extra_body"),
    "its input is not in the request": (
        *("previous_response_id", "conversation", "prompt", "cached_content", "file_ids", "data_sources"),
        *("assistant_id", "agent_id", "thread_id"),
    ),
    "its answer reports no usage": ("deferred",),
    "rejected predictions are billed beyond max_tokens": ("prediction",),
    "hosted tools are not priced": (
        *(
            "web_search_options",
            "web_search",
            "enable_search",
            "search_options",
            "search_parameters",
            "plugins",
        ),
        *("tool_resources", "compound_custom"),
    ),
    "the model that serves a call is the one that is billed": (
        *("models", "fallbacks", "route", "preset", "api_base", "base_url", "mock_response"),
    ),
    "audio is not priced": ("audio",),
}
_REFUSED = {name: why for why, names in _WHY_REFUSED.items() for name in names}
_REFUSED_IN_MESSAGES = {name: _REFUSED[name] for name in ("audio", "file_ids")}
_TEMPLATES_OWN = ("chat_template", "messages", "tools", "documents")
"""Keys of `chat_template_kwargs` that would put another input in the place of the one that was bounded."""
_RENDERED = ("tools", "functions", "response_format", "documents", "chat_template_kwargs")
_TEXT_PARTS = ("text", "refusal")
_CALLERS_TOOLS = ("function", "custom")
_PRICED_TIERS = (None, "auto", "default", "flex")
_PRICED_MODALITIES: tuple[list[str] | None, ...] = (None, [], ["text"])
# What a chat template adds around each message and once, in tokens, beyond the bytes of the JSON it replaces.
_PER_MESSAGE, _ONCE = 16, 256


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request that can be bounded."""

    body: bytes
    fields: dict[str, Any]
    model: str
    stream: bool
    include_usage: bool
    """Whether the caller asked for the usage chunk of a stream."""
    choices: int
    max_tokens: int | None
    """Per choice; None: the caller set no limit."""
    input_tokens: int
    """At most; see `read`."""

    def bound(self, model: Model) -> Bound:
        """What the call may cost at most.

        Raises:
            InvalidRequest: more choices than the upstream can meter.
        """
        most = model.upstream.settings.max_choices
        if self.choices > most:
            raise _invalid("n", f"must be at most {most} for this model")
        per_choice = self.max_tokens or model.default_max_output_tokens
        least = per_choice if self.max_tokens else min(_LEAST_OUTPUT_TOKENS, per_choice)
        return prices.bound(model.card, self.input_tokens, per_choice * self.choices, least * self.choices)

    def upstream_body(self, model: Model, output_tokens: int) -> bytes:
        """The request as the upstream gets it: untouched but for the model's name, the limit and the usage."""
        limit = model.upstream.settings.output_limit_field
        changed: dict[str, Any] = {"model": model.upstream_model, limit: output_tokens // self.choices}
        if self.stream:
            changed["stream_options"] = {**(self.fields.get("stream_options") or {}), "include_usage": True}
        fields = {
            name: value
            for name, value in self.fields.items()
            if name == limit or name not in {"max_tokens", "max_completion_tokens"}
        }
        return orjson.dumps({**fields, **changed})


def read(body: bytes) -> ChatRequest:
    """Check a request as far as its cost depends on it.

    A byte-level tokenizer makes no more tokens than bytes; what a template adds to messages, its rendering of
    what is not text, and what normalisation lengthens are added.

    Raises:
        InvalidRequest: what is wrong with which field.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(reason=f"The body is not JSON: {error}.", param=None) from None
    if not isinstance(fields, dict):
        raise InvalidRequest(reason="The body must be a JSON object.", param=None)
    _check_depth(fields)
    messages = _messages(fields)
    for name, why in _REFUSED.items():
        if fields.get(name) is not None:
            raise _invalid(name, f"is not supported: {why}")
    if fields.get("service_tier") not in _PRICED_TIERS:
        raise _invalid("service_tier", "is not priced: use default")
    if fields.get("modalities") not in _PRICED_MODALITIES:
        raise _invalid("modalities", "other than text are not priced")
    template = fields.get("chat_template_kwargs")
    if template is not None and (
        not isinstance(template, dict) or not template.keys().isdisjoint(_TEMPLATES_OWN)
    ):
        raise _invalid("chat_template_kwargs", f"must be an object without {', '.join(_TEMPLATES_OWN)}")
    _check_tools(fields.get("tools"))
    limits = [_whole(fields, name, MAX_OUTPUT_TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, Mapping):
        raise _invalid("stream_options", "must be an object")
    return ChatRequest(
        body=body,
        fields=fields,
        model=_model(fields),
        stream=_flag(fields, "stream"),
        include_usage=_flag(options or {}, "include_usage"),
        choices=_whole(fields, "n", MAX_CHOICES) or 1,
        max_tokens=min((limit for limit in limits if limit is not None), default=None),
        input_tokens=len(body)
        + _normalisation(body)
        + sum(_rendering(fields[name]) for name in _RENDERED if fields.get(name) is not None)
        + sum(
            _rendering(message["tool_calls"]) for message in messages if message.get("tool_calls") is not None
        )
        + _PER_MESSAGE * len(messages)
        + _ONCE,
    )


def _rendering(value: Any) -> int:
    """Bytes of the longest JSON that a chat template may make of a value: indented by 4, everything escaped.

    Sources: `tojson` of Jinja escapes for HTML, that of transformers and vLLM indents.
    """
    text = json.dumps(value)
    escaped = sum(text.count(character) for character in "<>&'")
    return len(text) + len("\\u003") * escaped + _indentation(value, 1)


def _indentation(value: Any, depth: int) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not items:
        return 0
    lines = len(items) * (1 + 4 * depth) + 1 + 4 * (depth - 1)
    return lines + sum(_indentation(item, depth + 1) for item in items)


def _normalisation(body: bytes) -> int:
    """Bytes by which a tokenizer's Unicode normalisation may lengthen the text before it is cut into tokens.

    Source: https://huggingface.co/docs/tokenizers/api/normalizers
    """
    if body.isascii():
        return 0
    text = body.decode()
    longest = max(len(unicodedata.normalize(form, text).encode()) for form in ("NFC", "NFD", "NFKC", "NFKD"))
    return max(0, longest - len(body))


def _invalid(param: str, problem: str) -> InvalidRequest:
    return InvalidRequest(reason=f"{param} {problem}.", param=param)


def _model(fields: Mapping[str, Any]) -> str:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise _invalid("model", "must be the name of a model")
    return model


def _messages(fields: Mapping[str, Any]) -> list[Any]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages", "must be a list with at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _invalid(f"messages[{number}]", "must be an object")
        _check_content(message.get("content"), f"messages[{number}].content")
        for name, why in _REFUSED_IN_MESSAGES.items():
            if message.get(name) is not None:
                raise _invalid(f"messages[{number}].{name}", f"is not supported: {why}")
    return messages


def _check_content(content: Any, param: str) -> None:
    if content is not None and not isinstance(content, str | list):
        raise _invalid(param, "must be a string or a list of text parts")
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
            raise _invalid(param, "may have text parts only: others are not priced")


def _check_tools(tools: Any) -> None:
    if tools is not None and not isinstance(tools, list):
        raise _invalid("tools", "must be a list")
    for tool in tools or ():
        if not isinstance(tool, dict) or tool.get("type") not in _CALLERS_TOOLS:
            raise _invalid("tools", "may be functions and custom tools only: hosted tools are not priced")


def _check_depth(fields: dict[str, Any]) -> None:
    """Orjson reads deeper nesting than it writes: what the upstream cannot be sent is refused before the hold."""
    try:
        orjson.dumps(fields)
    except TypeError:
        raise InvalidRequest(reason="The body is nested too deeply.", param=None) from None


def _whole(fields: Mapping[str, Any], name: str, most: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= most:
        raise _invalid(name, f"must be a whole number from 1 to {most}")
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and type(value) is not bool:
        raise _invalid(name, "must be true or false")
    return bool(value)
