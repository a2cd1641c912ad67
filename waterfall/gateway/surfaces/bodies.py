"""Reading requests: what may be in them, and how many tokens a model can make of it.

A byte-level tokenizer makes no more tokens than bytes; what a template adds to messages, its rendering of what is not
text, and what normalisation lengthens are added.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import orjson

from waterfall.errors import InvalidRequest

MAX_OUTPUT_TOKENS = 10_000_000
MAX_MODELS = 8
_FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
# What a chat template adds around each message and once, in tokens, beyond the bytes of the JSON it replaces.
PER_MESSAGE, ONCE = 16, 256


def invalid(param: str | None, problem: str) -> InvalidRequest:
    """The error that names a field."""
    return InvalidRequest(reason=f"{param} {problem}.", param=param)


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        InvalidRequest
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(reason=f"The body is not JSON: {error}.", param=None) from None
    if not isinstance(fields, dict):
        raise InvalidRequest(reason="The body must be a JSON object.", param=None)
    try:
        # Orjson reads deeper nesting than it writes: what the upstream cannot be sent is refused before the hold.
        orjson.dumps(fields)
    except TypeError:
        raise InvalidRequest(reason="The body is nested too deeply.", param=None) from None
    return fields


def refuse(fields: Mapping[str, Any], refused: Mapping[str, str], within: str = "") -> None:
    """Refuse a request that has one of these fields, for the reason beside it.

    Raises:
        InvalidRequest
    """
    for name in fields.keys() & refused.keys():
        if fields[name] is not None:
            raise invalid(within + name, f"is not supported: {refused[name]}")


def refuse_compaction(fields: Mapping[str, Any]) -> None:
    """Refuse a request that lets the provider shorten the conversation, as it bills that as a call of its own.

    Raises:
        InvalidRequest
    """
    management = fields.get("context_management")
    edits = management.get("edits") if isinstance(management, Mapping) else management
    for edit in edits if isinstance(edits, list) else []:
        if not isinstance(edit, Mapping) or kind_of(edit).startswith("compact"):
            raise invalid("context_management", "may have no compaction: it is billed as a call of its own")


def models(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The models that may serve a request: `model`, or those of `models` in their order."""
    listed = fields.get("models")
    if listed is None:
        return (_model(fields.get("model"), "model"),)
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_MODELS:
        raise invalid("models", f"must be a list of 1 to {MAX_MODELS} names of models")
    names = tuple(_model(name, f"models[{number}]") for number, name in enumerate(listed))
    if fields.get("model") not in {None, names[0]}:
        raise invalid("model", "must be absent, or the first of models")
    return names


def _model(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise invalid(param, "must be the name of a model")
    return value


def whole(fields: Mapping[str, Any], name: str, most: int, within: str = "") -> int | None:
    """A whole number from 1, if it is there."""
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= most:
        raise invalid(within + name, f"must be a whole number from 1 to {most}")
    return value


def flag(fields: Mapping[str, Any], name: str) -> bool:
    """True or false; absent is false."""
    value = fields.get(name)
    if value is not None and type(value) is not bool:
        raise invalid(name, "must be true or false")
    return bool(value)


def kind_of(value: Mapping[str, Any]) -> str:
    """The `type` of an object; empty where it has none, or one that is no text."""
    kind = value.get("type")
    return kind if isinstance(kind, str) else ""


def objects(value: Any, name: str, *, empty: bool = True) -> list[dict[str, Any]]:
    """A list of objects; absent is an empty one, if that may be."""
    if value is None and empty:
        return []
    if not isinstance(value, list) or not (value or empty):
        raise invalid(name, "must be a list" if empty else "must be a list with at least one message")
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise invalid(f"{name}[{number}]", "must be an object")
    return value


def text_tokens(
    body: bytes, fields: Mapping[str, Any], *, rendered: list[Any], messages: int, apart: int = 0
) -> int:
    """Tokens of a request's text at most.

    Args:
        body: as received.
        fields: what is in it.
        rendered: the parts of it that a template may write out as JSON of its own.
        messages: how many there are.
        apart: bytes of it that are no text, such as images.
    """
    normal = len(body) - apart + normalisation(body, fields)
    return normal + sum(rendering(value) for value in rendered) + PER_MESSAGE * messages + ONCE


def rendering(value: Any) -> int:
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


def normalisation(body: bytes, fields: Mapping[str, Any]) -> int:
    """Bytes by which a tokenizer's Unicode normalisation may lengthen the text before it is cut into tokens.

    Character by character: to normalise a text as a whole takes time that grows with the square of its combining marks.

    Source: https://huggingface.co/docs/tokenizers/api/normalizers
    """
    if body.isascii() and b"\\u" not in body:
        return 0
    characters = Counter(orjson.dumps(fields).decode())
    return sum(times * _lengthened(character) for character, times in characters.items())


@lru_cache(maxsize=2**16)
def _lengthened(character: str) -> int:
    longest = max(len(unicodedata.normalize(form, character).encode()) for form in _FORMS)
    return max(0, longest - len(character.encode()))
