"""POST /v1/chat/completions.

Source: https://platform.openai.com/docs/api-reference/chat/create
"""

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
_REFUSED = {
    "n_predict": "use max_tokens",
    "num_predict": "use max_tokens",
    "max_new_tokens": "use max_tokens",
    "min_tokens": "it may exceed max_tokens",
    "best_of": "use n",
    "n_cmpl": "use n",
    "use_beam_search": "its output cannot be bounded",
    "prediction": "rejected predictions are billed beyond max_tokens",
    "web_search_options": "hosted tools are not priced",
    "plugins": "hosted tools are not priced",
    "models": "the model that serves a call is the one that is billed",
    "chat_template": "its input cannot be bounded",
    "audio": "audio is not priced",
}
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

    A byte-level tokenizer makes no more tokens than bytes; the template's own tokens and a second rendering of
    the tools are added.

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
        + len(orjson.dumps(fields.get("tools")))
        + _PER_MESSAGE * len(messages)
        + _ONCE,
    )


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
        if message.get("audio") is not None:
            raise _invalid(f"messages[{number}].audio", "is not supported: audio is not priced")
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
