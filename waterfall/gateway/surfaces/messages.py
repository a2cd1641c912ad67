"""POST /v1/messages, and how many tokens a request to it would be.

Sources: https://platform.claude.com/docs/en/api/messages, https://platform.claude.com/docs/en/api/messages-count-tokens
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import orjson

from waterfall.errors import WaterfallError
from waterfall.gateway.models import Model
from waterfall.gateway.render import error_body
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
    refuse_compaction,
    text_tokens,
    whole,
)
from waterfall.gateway.surfaces.parts import Parts
from waterfall.gateway.surfaces.streams import Event, Seen, StreamMeter
from waterfall.metering.usage import UsageUnreadable, read
from waterfall.types import Usage

_WHY_REFUSED = {
    "use max_tokens": ("max_tokens_to_sample", "max_output_tokens", "max_completion_tokens"),
    "its tools run elsewhere and cannot be bounded": ("mcp_servers", "container"),
    "it is not priced": ("speed", "inference_geo"),
    "what it reads is not in the request": ("thread",),
    "its input cannot be bounded": ("extra_body",),
    "use models": ("fallbacks",),
}
_REFUSED = {name: why for why, names in _WHY_REFUSED.items() for name in names}
_PRICED_TIERS = (None, "auto", "standard_only")
_CALLERS_TOOLS = ("bash_", "text_editor_", "computer_", "memory_")
"""Beginnings of the types of tools that Anthropic describes and callers run."""
_SEARCH, _SEARCHES = "web_search_20250305", "web_search_"
"""Later ones let code of the model's search, as often as it likes, unless they are told not to."""
_MAX_SEARCHES = 100
_TOOLS_ONCE, _PER_TOOL = 1024, 1024
"""Tokens that the provider's own words on tools come to, for the first and for each that it describes itself.

Source: https://platform.claude.com/docs/en/agents-and-tools/tool-use/overview#pricing
"""
_CACHES = b"cache_control"
_STATUSES = {
    "permission_error": "permission_error",
    "payment_required": "billing_error",
    "conflict_error": "invalid_request_error",
    "not_supported_error": "invalid_request_error",
}


class Messages(Api):
    """Anthropic's messages."""

    surface = "messages"
    route = "/v1/messages"
    upstream_path = "/messages"
    passed_on = ("anthropic-version", "anthropic-beta")
    request_schema: ClassVar[dict[str, Any]] = {
        "required": ["model", "messages", "max_tokens"],
        "properties": {
            "model": {"type": "string"},
            "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_OUTPUT_TOKENS},
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
        refuse(fields, _REFUSED)
        refuse_compaction(fields)
        if fields.get("service_tier") not in _PRICED_TIERS:
            raise invalid("service_tier", "is not priced: use standard_only")
        parts = Parts()
        parts.of_messages(fields.get("system"), "system")
        for number, message in enumerate(messages):
            parts.of_messages(message.get("content"), f"messages[{number}].content")
        tools = objects(fields.get("tools"), "tools")
        described, searches = _read_tools(tools)
        text = text_tokens(
            body,
            fields,
            rendered=[
                value for value in (fields.get("tools"), fields.get("output_config")) if value is not None
            ],
            messages=len(messages),
            apart=parts.image_bytes,
        )
        return ModelCall(
            body=body,
            fields=fields,
            models=models(fields),
            text_tokens=text + (_TOOLS_ONCE if tools else 0) + described * _PER_TOOL,
            stream=flag(fields, "stream"),
            max_tokens=whole(fields, "max_tokens", MAX_OUTPUT_TOKENS),
            images=parts.images,
            first_image=parts.first_image,
            reads_elsewhere=parts.elsewhere,
            web_searches=searches,
            cache_writes=_CACHES in body or b"\\u" in body,
        )

    def upstream_fields(self, call: ModelCall, model: Model, output_tokens: int) -> dict[str, Any]:  # noqa: ARG002
        """The limit."""
        return {"max_tokens": call.limit_of_a_choice(output_tokens)}

    def stream_meter(self, call: ModelCall) -> StreamMeter:  # noqa: ARG002
        """Reads one stream."""
        return MessagesMeter()

    def error_body(self, error: WaterfallError, *, to_platform: bool = False) -> dict[str, Any]:
        """An error as Anthropic's clients read it.

        Source: https://platform.claude.com/docs/en/api/errors
        """
        facts = error_body(error, to_platform=to_platform)["error"]
        return {"type": "error", "error": facts | {"type": _STATUSES.get(facts["type"], facts["type"])}}

    def error_event(self, error: WaterfallError) -> bytes:
        """An error event."""
        return b"\n\nevent: error\ndata: " + orjson.dumps(self.error_body(error)) + b"\n\n"


def _read_tools(tools: list[dict[str, Any]]) -> tuple[int, int]:
    """How many tools the provider describes itself, and how many searches it may make."""
    described, searches = 0, 0
    for number, tool in enumerate(tools):
        kind = kind_of(tool)
        if kind == "custom" or tool.get("type") is None:
            continue
        described += 1
        if kind == _SEARCH or (kind.startswith(_SEARCHES) and tool.get("allowed_callers") == ["direct"]):
            most = whole(tool, "max_uses", _MAX_SEARCHES, f"tools[{number}].")
            if most is None:
                raise invalid(
                    f"tools[{number}].max_uses", "must say how many searches there may be: each is billed"
                )
            searches += most
        elif not kind.startswith(_CALLERS_TOOLS):
            raise invalid(f"tools[{number}]", f"is of type {kind[:60]!r}, which is not priced")
    return described, searches


class MessagesMeter(StreamMeter):
    """A stream of message events: its usage comes at the beginning and, whole, at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._began: dict[str, Any] = {}
        self._reported: dict[str, Any] | None = None

    def _see(self, event: Event) -> Seen:
        said = event.object()
        kind = kind_of(said)
        if kind == "message_start":
            message = said.get("message")
            self._began = _usage_of(message) if isinstance(message, Mapping) else {}
        elif kind == "message_delta":
            ended = _usage_of(said)
            if "output_tokens" in ended:
                self._reported = self._began | ended
                return Seen(is_last_word=True)
        elif kind == "message_stop":
            self.done = True
        elif kind == "content_block_delta":
            self.pieces += _has_output(said.get("delta"))
            self._reported = None  # it was no last word: output came after it
            return Seen(is_output=True)
        return Seen(is_output=kind.startswith("content_block"))

    def result(self) -> tuple[Usage | None, dict[str, Any] | None]:
        """The counts of the end, on those of the beginning: they are the sums so far.

        Without the end, the provider's own count of the input and a token a piece.
        """
        try:
            return read("messages", self._reported), self._reported
        except UsageUnreadable:
            pass
        if not self.pieces:
            return None, None
        try:
            began = read("messages", self._began | {"output_tokens": self.pieces})
        except UsageUnreadable:
            return Usage(input_tokens=0, output_tokens=self.pieces), None
        # What cannot be recomputed from a receipt is not charged: without a usage object there is input, and cached input.
        return (
            Usage(
                input_tokens=began.input_tokens,
                cached_input_tokens=began.cached_input_tokens,
                output_tokens=self.pieces,
            ),
            None,
        )


def _usage_of(said: Mapping[str, Any]) -> dict[str, Any]:
    usage = said.get("usage")
    return (
        {name: value for name, value in usage.items() if value is not None} if isinstance(usage, dict) else {}
    )


def _has_output(delta: Any) -> bool:
    if not isinstance(delta, Mapping):
        return False
    return any(delta.get(name) for name in ("text", "partial_json", "thinking"))
