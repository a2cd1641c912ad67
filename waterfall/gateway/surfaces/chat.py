"""POST /v1/chat/completions.

Source: https://platform.openai.com/docs/api-reference/chat/create
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from waterfall.gateway.models import Model
from waterfall.gateway.surfaces.api import Api, ModelCall
from waterfall.gateway.surfaces.bodies import (
    MAX_OUTPUT_TOKENS,
    flag,
    invalid,
    kind_of,
    models,
    objects,
    parse,
    refuse,
    text_tokens,
    whole,
)
from waterfall.gateway.surfaces.parts import Parts
from waterfall.gateway.surfaces.streams import Event, NotAStream, Seen, StreamMeter
from waterfall.metering.usage import UsageUnreadable, read
from waterfall.types import Usage

MAX_CHOICES = 128
_DONE = b"[DONE]"

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
        *("web_search_options", "web_search", "enable_search", "search_options", "search_parameters"),
        *("plugins", "tool_resources", "compound_custom"),
    ),
    "use models": ("fallbacks",),
    "the model that serves a call is the one that is billed": (
        *("route", "preset", "provider", "api_base", "base_url", "mock_response"),
    ),
    "audio is not priced": ("audio",),
}
_REFUSED = {name: why for why, names in _WHY_REFUSED.items() for name in names}
_REFUSED_IN_MESSAGES = {name: _REFUSED[name] for name in ("audio", "file_ids")}
_TEMPLATES_OWN = ("chat_template", "messages", "tools", "documents")
"""Keys of `chat_template_kwargs` that would put another input in the place of the one that was bounded."""
_RENDERED = ("tools", "functions", "response_format", "documents", "chat_template_kwargs")
_CALLERS_TOOLS = ("function", "custom")
_PRICED_TIERS = (None, "auto", "default", "flex")
_PRICED_MODALITIES: tuple[list[str] | None, ...] = (None, [], ["text"])
_LIMITS = ("max_completion_tokens", "max_tokens")


class Chat(Api):
    """OpenAI's chat completions."""

    surface = "chat"
    route = "/v1/chat/completions"
    upstream_path = "/chat/completions"
    request_schema: ClassVar[dict[str, Any]] = {
        "required": ["model", "messages"],
        "properties": {
            "model": {"type": "string"},
            "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_OUTPUT_TOKENS},
            "n": {"type": "integer", "minimum": 1, "maximum": MAX_CHOICES},
            "stream": {"type": "boolean"},
        },
    }

    def read(self, body: bytes) -> ModelCall:
        """Check a request as far as its cost depends on it.

        Raises:
            InvalidRequest
        """
        fields = parse(body)
        messages = objects(fields.get("messages"), "messages", empty=False)
        parts = Parts()
        for number, message in enumerate(messages):
            parts.of_chat(message.get("content"), f"messages[{number}].content")
            refuse(message, _REFUSED_IN_MESSAGES, f"messages[{number}].")
        refuse(fields, _REFUSED)
        if fields.get("service_tier") not in _PRICED_TIERS:
            raise invalid("service_tier", "is not priced: use default")
        if fields.get("modalities") not in _PRICED_MODALITIES:
            raise invalid("modalities", "other than text are not priced")
        template = fields.get("chat_template_kwargs")
        if template is not None and (
            not isinstance(template, dict) or not template.keys().isdisjoint(_TEMPLATES_OWN)
        ):
            raise invalid("chat_template_kwargs", f"must be an object without {', '.join(_TEMPLATES_OWN)}")
        for tool in objects(fields.get("tools"), "tools"):
            if kind_of(tool) not in _CALLERS_TOOLS:
                raise invalid("tools", "may be functions and custom tools only: hosted tools are not priced")
        limits = [whole(fields, name, MAX_OUTPUT_TOKENS) for name in _LIMITS]
        options = fields.get("stream_options")
        if options is not None and not isinstance(options, Mapping):
            raise invalid("stream_options", "must be an object")
        rendered = [fields[name] for name in _RENDERED if fields.get(name) is not None]
        rendered += [m["tool_calls"] for m in messages if m.get("tool_calls") is not None]
        return ModelCall(
            body=body,
            fields=fields,
            models=models(fields),
            text_tokens=text_tokens(
                body, fields, rendered=rendered, messages=len(messages), apart=parts.image_bytes
            ),
            stream=flag(fields, "stream"),
            shows_usage=flag(options or {}, "include_usage"),
            choices=whole(fields, "n", MAX_CHOICES) or 1,
            max_tokens=min((limit for limit in limits if limit is not None), default=None),
            images=parts.images,
            first_image=parts.first_image,
            reads_elsewhere=parts.elsewhere,
        )

    def upstream_fields(self, call: ModelCall, model: Model, output_tokens: int) -> dict[str, Any]:
        """The limit under the upstream's name for it, and its usage at the end of a stream."""
        changed: dict[str, Any] = dict.fromkeys(_LIMITS)
        changed[model.upstream.settings.output_limit_field] = call.limit_of_a_choice(output_tokens)
        if call.stream:
            changed["stream_options"] = {**(call.fields.get("stream_options") or {}), "include_usage": True}
        return changed

    def stream_meter(self, call: ModelCall) -> StreamMeter:
        """Reads one stream."""
        return ChatMeter(shows_usage=call.shows_usage)


class ChatMeter(StreamMeter):
    """A stream of chat completion chunks that ends with [DONE]."""

    def __init__(self, *, shows_usage: bool) -> None:
        super().__init__()
        self._shows_usage = shows_usage
        self._finished = False
        self._reported: dict[str, Any] | None = None
        self._is_last_word = False

    def _see(self, event: Event) -> Seen:
        if (event.data or b"").strip() == _DONE:
            self.done = True
            return Seen()
        chunk = event.object()
        choices = chunk.get("choices") or []
        if not isinstance(choices, list):
            raise NotAStream("an event's choices are not a list")
        pieces = sum(_has_output(choice) for choice in choices)
        self.pieces += pieces
        self._finished = self._finished or any(
            isinstance(choice, Mapping) and choice.get("finish_reason") for choice in choices
        )
        usage = chunk.get("usage")
        usage = usage if isinstance(usage, dict) else None
        if usage:
            self._reported = usage
            self._is_last_word = self._finished and not choices
        elif pieces:
            self._reported = None  # it was a placeholder: output came after it
        is_usage_chunk = usage is not None and not choices
        return Seen(
            is_output=bool(choices),
            is_last_word=is_usage_chunk,
            hidden=is_usage_chunk and not self._shows_usage,
        )

    def result(self) -> tuple[Usage | None, dict[str, Any] | None]:
        """The usage: the provider's last word if the stream came to its end, or if it stands alone after a choice's."""
        reported = self._reported if self.done or self._is_last_word else None
        try:
            return read("chat", reported), reported
        except UsageUnreadable:
            return (Usage(input_tokens=0, output_tokens=self.pieces) if self.pieces else None), None


def _has_output(choice: Any) -> bool:
    delta = choice.get("delta") if isinstance(choice, Mapping) else None
    if not isinstance(delta, Mapping):
        return False
    return any(value for name, value in delta.items() if name != "role")
