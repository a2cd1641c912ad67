"""POST /v1/embeddings.

Source: https://platform.openai.com/docs/api-reference/embeddings/create
"""

from typing import Any, ClassVar

from waterfall.gateway.models import Model
from waterfall.gateway.surfaces.api import Api, ModelCall
from waterfall.gateway.surfaces.bodies import invalid, models, parse, refuse, text_tokens
from waterfall.gateway.surfaces.streams import StreamMeter

_REFUSED = {"messages": "use input", "input_type": "it changes the input", "prompt": "use input"}
_IMAGES = ("image", "images", "image_url")


class Embeddings(Api):
    """OpenAI's embeddings."""

    surface = "embeddings"
    route = "/v1/embeddings"
    upstream_path = "/embeddings"
    request_schema: ClassVar[dict[str, Any]] = {
        "required": ["model", "input"],
        "properties": {
            "model": {"type": "string"},
            "input": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}, "minItems": 1},
                    {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                    {
                        "type": "array",
                        "items": {"type": "array", "items": {"type": "integer"}},
                        "minItems": 1,
                    },
                ]
            },
        },
    }

    def read(self, body: bytes) -> ModelCall:
        """Check a request as far as its cost depends on it.

        Raises:
            InvalidRequest
        """
        fields = parse(body)
        refuse(fields, _REFUSED | dict.fromkeys(_IMAGES, "images are not priced here"))
        if fields.get("stream"):
            raise invalid("stream", "is not supported: there is nothing to stream")
        return ModelCall(
            body=body,
            fields=fields,
            models=models(fields),
            text_tokens=text_tokens(body, fields, rendered=[], messages=_texts(fields.get("input"))),
            has_output=False,
            cache_writes=False,
        )

    def upstream_fields(self, call: ModelCall, model: Model, output_tokens: int) -> dict[str, Any]:  # noqa: ARG002
        """Nothing is changed."""
        return {}

    def stream_meter(self, call: ModelCall) -> StreamMeter:
        """There are none."""
        raise AssertionError(call)


def _texts(value: Any) -> int:
    """How many texts there are to embed; each may also be a list of tokens, which are fewer than their digits."""
    if isinstance(value, str):
        return 1
    if not isinstance(value, list) or not value:
        raise invalid("input", "must be a text, tokens, or a list of either")
    if all(type(item) is int for item in value):
        return 1
    for item in value:
        is_tokens = isinstance(item, list) and all(type(token) is int for token in item)
        if not isinstance(item, str) and not is_tokens:
            raise invalid("input", "must be a text, tokens, or a list of either")
    return len(value)
