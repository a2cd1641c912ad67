"""What stands in the content of messages beside text: images, and what the model reads from elsewhere."""

from collections.abc import Mapping
from typing import Any

from waterfall.errors import InvalidRequest
from waterfall.gateway.surfaces.bodies import invalid, kind_of

_TEXT = frozenset({"text", "refusal", "input_text", "output_text", "thinking", "redacted_thinking"})
_DATA_URL = "data:"
_MOST_LEVELS = 4
"""Of results of tools that have contents in them."""


class Parts:
    """Counts the parts of one request."""

    def __init__(self) -> None:
        self.images = 0
        self.first_image: str | None = None
        self.image_bytes = 0
        """Of the body: they are no text."""
        self.elsewhere: str | None = None
        """The first field that names what is not in the request, or whose length in tokens does not show."""

    def of_chat(self, content: Any, param: str) -> None:
        """The content of a message of chat completions.

        Source: https://platform.openai.com/docs/api-reference/chat/create#chat-create-messages
        """
        for part in _parts(content, param):
            kind = kind_of(part)
            if kind == "image_url":
                image = part.get("image_url")
                self._image(image.get("url") if isinstance(image, Mapping) else image, param)
            elif kind == "file":
                self._elsewhere(param)
            elif kind not in _TEXT:
                raise _not_priced(kind, param)

    def of_responses(self, content: Any, param: str) -> None:
        """The content of an item of responses.

        Source: https://platform.openai.com/docs/api-reference/responses/create#responses-create-input
        """
        for part in _parts(content, param):
            kind = kind_of(part)
            if kind in {"input_image", "computer_screenshot"}:
                self._image(part.get("image_url"), param)
            elif kind == "input_file":
                self._elsewhere(param)
            elif kind not in _TEXT:
                raise _not_priced(kind, param)

    def of_messages(self, content: Any, param: str, levels: int = _MOST_LEVELS) -> None:
        """The content of a message of Anthropic's.

        Source: https://platform.claude.com/docs/en/api/messages
        """
        if levels == 0:
            raise invalid(param, "is nested too deeply")
        for part in _parts(content, param):
            kind, source = kind_of(part), part.get("source")
            if kind == "image":
                source = source if isinstance(source, Mapping) else {}
                self._image(source.get("data") if source.get("type") == "base64" else None, param, whole=True)
            elif kind == "document":
                self._document(source, param, levels)
            elif kind in {"tool_result", "search_result"}:
                self.of_messages(part.get("content"), f"{param}.content", levels - 1)
            elif kind not in _TEXT | {"tool_use", "server_tool_use", "web_search_tool_result"}:
                raise _not_priced(kind, param)

    def _document(self, source: Any, param: str, levels: int) -> None:
        kind = kind_of(source) if isinstance(source, Mapping) else ""
        if kind == "content":
            self.of_messages(source.get("content"), f"{param}.source.content", levels - 1)
        elif kind != "text":
            self._elsewhere(param)

    def _image(self, data: Any, param: str, *, whole: bool = False) -> None:
        if data is not None and not isinstance(data, str):
            raise invalid(param, "has an image that is no text")
        self.images += 1
        self.first_image = self.first_image or param
        if data is not None and (whole or data.startswith(_DATA_URL)):
            self.image_bytes += len(data)

    def _elsewhere(self, param: str) -> None:
        self.elsewhere = self.elsewhere or param


def _parts(content: Any, param: str) -> list[Mapping[str, Any]]:
    if content is None or isinstance(content, str):
        return []
    if not isinstance(content, list):
        raise invalid(param, "must be a string or a list of parts")
    for part in content:
        if not isinstance(part, Mapping):
            raise invalid(param, "must be a string or a list of parts that are objects")
    return content


def _not_priced(kind: str, param: str) -> InvalidRequest:
    return invalid(param, f"has a part of type {kind[:60]!r}, which is not priced")
