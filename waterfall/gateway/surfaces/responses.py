"""POST /v1/responses.

Source: https://platform.openai.com/docs/api-reference/responses/create
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import orjson

from waterfall.errors import WaterfallError
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
    refuse_compaction,
    text_tokens,
    whole,
)
from waterfall.gateway.surfaces.parts import Parts
from waterfall.gateway.surfaces.streams import Event, Seen, StreamMeter
from waterfall.metering.usage import WEB_SEARCHES, UsageUnreadable, read
from waterfall.types import Usage

_WHY_REFUSED = {
    "use max_output_tokens": ("max_tokens", "max_completion_tokens"),
    "its input cannot be bounded": ("extra_body", "chat_template"),
    "use models": ("fallbacks",),
    "the model that serves a call is the one that is billed": (
        *("route", "preset", "provider", "api_base", "base_url"),
    ),
    "what is in it is not in the request": ("prompt",),
    "rejected predictions are billed beyond max_output_tokens": ("prediction",),
    "hosted tools are not priced": ("plugins", "search_parameters", "web_search_options"),
    "audio is not priced": ("audio",),
}
_REFUSED = {name: why for why, names in _WHY_REFUSED.items() for name in names}
_ELSEWHERE = ("previous_response_id", "conversation")
"""Fields that have the model read what is not in the request."""
_CALLERS_TOOLS = frozenset({"function", "custom", "local_shell", "apply_patch", "computer_use_preview"})
_SEARCHES = ("web_search",)
"""Beginnings of the types of the hosted tool that searches the web: those of earlier dates have longer names."""
_MAX_SEARCHES = 100
_PRICED_TIERS = (None, "auto", "default", "flex")
_CALLS = frozenset(
    {
        *("function_call", "custom_tool_call", "web_search_call", "local_shell_call", "computer_call"),
        "apply_patch_call",
    }
)
_RESULTS = frozenset(
    {
        *("function_call_output", "custom_tool_call_output", "local_shell_call_output"),
        "apply_patch_call_output",
    }
)
_ENDS = frozenset({"response.completed", "response.incomplete", "response.failed"})
_NO_OUTPUT = frozenset({"response.created", "response.in_progress", "response.queued"})


class Responses(Api):
    """OpenAI's responses."""

    surface = "responses"
    route = "/v1/responses"
    upstream_path = "/responses"
    request_schema: ClassVar[dict[str, Any]] = {
        "required": ["model", "input"],
        "properties": {
            "model": {"type": "string"},
            "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
            "max_output_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_OUTPUT_TOKENS},
            "stream": {"type": "boolean"},
        },
    }

    def read(self, body: bytes) -> ModelCall:
        """Check a request as far as its cost depends on it.

        Raises:
            InvalidRequest
        """
        fields = parse(body)
        if flag(fields, "background"):
            raise invalid("background", "is not supported: the answer would come when nobody meters it")
        refuse(fields, _REFUSED)
        refuse_compaction(fields)
        if fields.get("service_tier") not in _PRICED_TIERS:
            raise invalid("service_tier", "is not priced: use default")
        parts, items = Parts(), _items(fields.get("input"))
        for name in _ELSEWHERE:
            if fields.get(name) is not None:
                parts.elsewhere = name
        for number, item in enumerate(items):
            _look_at(item, f"input[{number}]", parts)
        tools = objects(fields.get("tools"), "tools")
        rendered = [value for value in (fields.get("tools"), fields.get("text")) if value is not None]
        rendered += [item for item in items if kind_of(item) in _CALLS]
        return ModelCall(
            body=body,
            fields=fields,
            models=models(fields),
            text_tokens=text_tokens(
                body, fields, rendered=rendered, messages=1 + len(items), apart=parts.image_bytes
            ),
            stream=flag(fields, "stream"),
            max_tokens=whole(fields, "max_output_tokens", MAX_OUTPUT_TOKENS),
            images=parts.images,
            first_image=parts.first_image,
            reads_elsewhere=parts.elsewhere,
            web_searches=_web_searches(fields, tools),
        )

    def upstream_fields(self, call: ModelCall, model: Model, output_tokens: int) -> dict[str, Any]:  # noqa: ARG002
        """The limit."""
        return {"max_output_tokens": call.limit_of_a_choice(output_tokens)}

    def usage_in(self, answer: Mapping[str, Any]) -> Any:
        """The usage object, with the searches that it does not count."""
        return _with_searches(answer)

    def stream_meter(self, call: ModelCall) -> StreamMeter:  # noqa: ARG002
        """Reads one stream."""
        return ResponsesMeter()

    def error_event(self, error: WaterfallError) -> bytes:
        """An error event, with `error` in it as well, by which OpenAI's client knows that it has to raise."""
        facts = self.error_body(error)["error"]
        fields = {name: facts[name] for name in ("code", "message", "param")}
        told = {"type": "error", "sequence_number": 0, **fields, "error": facts}
        return b"\n\nevent: error\ndata: " + orjson.dumps(told) + b"\n\n"


def _items(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return []
    return objects(value, "input", empty=False)


def _look_at(item: dict[str, Any], param: str, parts: Parts) -> None:
    kind = kind_of(item)
    if kind == "message" or (item.get("type") is None and "content" in item):
        parts.of_responses(item.get("content"), f"{param}.content")
    elif kind == "reasoning" and item.get("encrypted_content"):
        pass
    elif kind in _RESULTS:
        parts.of_responses(item.get("output"), f"{param}.output")
    elif kind == "computer_call_output":
        parts.of_responses([item.get("output")], f"{param}.output")
    elif kind in {"item_reference", "compaction", "reasoning"} or item.get("type") is None:
        # Named only, by its id.
        parts.elsewhere = parts.elsewhere or param
    elif kind not in _CALLS:
        raise invalid(param, f"is of type {kind[:60]!r}, which is not priced")


def _web_searches(fields: Mapping[str, Any], tools: list[dict[str, Any]]) -> int:
    """How many searches there may be; each is another round in which the model reads all."""
    searches = False
    for tool in tools:
        kind = kind_of(tool)
        if kind.startswith(_SEARCHES):
            searches = True
        elif kind not in _CALLERS_TOOLS:
            raise invalid(
                "tools", "may be functions, custom tools and web searches only: others are not priced"
            )
    if not searches:
        return 0
    most = whole(fields, "max_tool_calls", _MAX_SEARCHES)
    if most is None:
        raise invalid("max_tool_calls", "must say how many web searches there may be: each is billed")
    return most


def _with_searches(response: Mapping[str, Any]) -> Any:
    usage, output = response.get("usage"), response.get("output")
    if not isinstance(usage, dict) or not isinstance(output, list):
        return usage
    calls = sum(_is_search(item) for item in output)
    return {**usage, WEB_SEARCHES: calls} if calls else usage


def _is_search(item: Any) -> bool:
    """Whether an item of output is a search, which is billed, and not a look at a page that one has found.

    Source: https://platform.openai.com/docs/guides/tools-web-search
    """
    if not isinstance(item, Mapping) or item.get("type") != "web_search_call":
        return False
    action = item.get("action")
    return not isinstance(action, Mapping) or action.get("type") in {None, "search"}


class ResponsesMeter(StreamMeter):
    """A stream of response events; the last one carries the whole response."""

    def __init__(self) -> None:
        super().__init__()
        self._reported: Any = None

    def _see(self, event: Event) -> Seen:
        said = event.object()
        kind = kind_of(said)
        if kind not in _ENDS:
            self.pieces += kind.endswith(".delta") and bool(said.get("delta"))
            return Seen(is_output=kind not in _NO_OUTPUT)
        self.done = True
        response = said.get("response")
        self._reported = _with_searches(response) if isinstance(response, Mapping) else None
        return Seen(is_last_word=True)

    def result(self) -> tuple[Usage | None, dict[str, Any] | None]:
        """The last event's usage."""
        try:
            return read("responses", self._reported), self._reported
        except UsageUnreadable:
            return (Usage(input_tokens=0, output_tokens=self.pieces) if self.pieces else None), None
