"""What a caller asks of the gateway itself, by headers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import ValidationError

from waterfall.errors import InvalidRequest
from waterfall.types import Attribution

_WAIT, _SETTLE, _ONCE = "X-Waterfall-Wait", "X-Waterfall-Settle", "Idempotency-Key"
_ATTRIBUTION = {
    name: f"X-Waterfall-{name.capitalize()}" for name in ("user", "agent", "team", "session", "tags")
}
_LONGEST_KEY = 255
_MOST_SECONDS = 60
_MODES = ("async", "included")
_ATTRIBUTION_LOW = {name: header.lower() for name, header in _ATTRIBUTION.items()}

TERMS: list[dict[str, Any]] = [
    {
        "name": "X-Waterfall-Account",
        "in": "header",
        "required": False,
        "description": "With a platform key: the account that pays.",
        "schema": {"type": "string"},
    },
    *(
        {
            "name": header,
            "in": "header",
            "required": False,
            "description": "Kept beside the call, to find it by: "
            + ("up to 20 words, with commas between." if name == "tags" else f"whose {name} it is."),
            "schema": {"type": "string", "minLength": 1, "pattern": "^[ -~]+$"}
            | ({} if name == "tags" else {"maxLength": 200}),
        }
        for name, header in _ATTRIBUTION.items()
    ),
    {
        "name": _WAIT,
        "in": "header",
        "required": False,
        "description": "Seconds to wait for the account's running calls to end, where what they hold is all that is missing.",
        "schema": {"type": "integer", "minimum": 0, "maximum": _MOST_SECONDS},
    },
    {
        "name": _SETTLE,
        "in": "header",
        "required": False,
        "description": "`included`: the answer, or the end of a stream, leaves once its charge is on the chain, and tells its "
        "transaction. `async`, the default: it leaves at once.",
        "schema": {"type": "string", "enum": list(_MODES)},
    },
    {
        "name": _ONCE,
        "in": "header",
        "required": False,
        "description": "The same key with the same body is one call: a repeat is given the first answer, and waits for it if it "
        "has to.",
        "schema": {"type": "string", "minLength": 1, "maxLength": _LONGEST_KEY},
    },
]
"""As OpenAPI describes them."""


def attribution_of(headers: Mapping[str, str]) -> Attribution | None:
    """Whom and what a request is for, by its headers in lower case; None where it says nothing of it.

    Raises:
        InvalidRequest
    """
    given = {name: headers[low] for name, low in _ATTRIBUTION_LOW.items() if low in headers}
    if not given:
        return None
    tags = given.pop("tags", "")
    words = tuple(word.strip() for word in tags.split(",")) if tags else ()
    try:
        return Attribution(**given, tags=words)
    except ValidationError as error:
        problem = error.errors()[0]
        header = _ATTRIBUTION[str(problem["loc"][0])]
        raise InvalidRequest(reason=f"{header}: {problem['msg']}.", param=header) from None


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a call is served."""

    wait_seconds: int = 0
    """How long it may wait for the account's own running calls to end."""
    settled: bool = False
    """Whether it ends only once its charge is on the chain."""
    idempotency_key: str | None = None
    """Under which it is made once."""

    @classmethod
    def read(cls, headers: Mapping[str, str]) -> Self:
        """Those of a request, by its headers in lower case.

        Raises:
            InvalidRequest
        """
        wait, settle = headers.get(_WAIT.lower(), "0"), headers.get(_SETTLE.lower(), _MODES[0])
        if not (
            wait.isascii()
            and wait.isdecimal()
            and len(wait) <= len(str(_MOST_SECONDS))
            and int(wait) <= _MOST_SECONDS
        ):
            raise InvalidRequest(
                reason=f"{_WAIT} must be a whole number of seconds from 0 to {_MOST_SECONDS}.", param=_WAIT
            )
        if settle not in _MODES:
            raise InvalidRequest(reason=f"{_SETTLE} must be one of {', '.join(_MODES)}.", param=_SETTLE)
        once = headers.get(_ONCE.lower())
        if once is not None and not 1 <= len(once) <= _LONGEST_KEY:
            raise InvalidRequest(reason=f"{_ONCE} must have 1 to {_LONGEST_KEY} characters.", param=_ONCE)
        return cls(int(wait), settle == _MODES[1], once)
