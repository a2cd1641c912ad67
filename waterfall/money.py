"""Money is an integer of *credit units*: 1 USD = 10**12 units. Humans and JSON see exact decimal strings.

One token of a cheap model costs less than a micro-dollar; twelve decimals keep its price exact.
One USDC base unit (6 decimals) is 10**6 units.
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

UNITS_PER_USD = 10**12
UNITS_PER_TOKEN_BASE_UNIT = 10**6
MAX_UNITS = 2**96 - 1
"""Largest amount the vault can store (uint96): about 79 quadrillion USD."""

_DECIMALS = 12
_USD = re.compile(r"(-?)(\d+)(?:\.(\d+))?")


def parse_usd(text: str) -> int:
    """Read a plain decimal string of USD ("12.5", "0.000000000001") as credit units, exactly.

    Raises:
        ValueError: not a plain decimal, or more than twelve decimals.
    """
    match = _USD.fullmatch(text) if text.isascii() else None
    if match is None:
        raise ValueError(f"{text[:40]!r} is not a plain decimal amount of USD such as 12.50")
    sign, whole, fraction = match.group(1), match.group(2), match.group(3) or ""
    fraction = fraction.rstrip("0")
    if len(fraction) > _DECIMALS:
        raise ValueError(f"{text[:40]!r} has more than {_DECIMALS} decimals")
    if len(whole) > 2 * _DECIMALS:
        raise ValueError(f"{text[:40]!r} is too large")
    units = int(whole) * UNITS_PER_USD + int(fraction.ljust(_DECIMALS, "0"))
    return -units if sign else units


def format_usd(units: int) -> str:
    """Write credit units as an exact decimal string of USD, with at least two decimals."""
    whole, fraction = divmod(abs(units), UNITS_PER_USD)
    decimals = f"{fraction:012d}".rstrip("0").ljust(2, "0")
    return f"{'-' if units < 0 else ''}{whole}.{decimals}"


def tokens_to_units(base_units: int) -> int:
    """Credit units of an amount of the 6-decimal token, exactly."""
    return base_units * UNITS_PER_TOKEN_BASE_UNIT


def units_to_tokens(units: int) -> int:
    """Token base units of an amount of credit.

    Raises:
        ValueError: the amount is not a whole number of token base units (0.000001 USD).
    """
    base_units, remainder = divmod(units, UNITS_PER_TOKEN_BASE_UNIT)
    if remainder:
        raise ValueError(
            f"{format_usd(units)} USD is not a whole number of 0.000001 USD, the token's smallest unit"
        )
    return base_units


def _from_text(value: Any) -> Any:
    if isinstance(value, str):
        return parse_usd(value)
    raise ValueError('write USD as a decimal string such as "12.50"')


def _from_text_or_units(value: Any) -> Any:
    return value if type(value) is int else _from_text(value)


_AS_TEXT = PlainSerializer(format_usd, return_type=str, when_used="json")


def _schema(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": ["12.50"], "title": "USD"})


Usd = Annotated[int, BeforeValidator(_from_text_or_units), _AS_TEXT, _schema(r"^-?\d+(\.\d+)?$")]
"""A pydantic field of our own models: units in Python, a decimal string of USD in JSON."""

UsdText = Annotated[int, BeforeValidator(_from_text), _AS_TEXT, _schema(r"^\d+(\.\d+)?$")]
"""The same for bodies and files that people write: a bare number is refused, as it could mean either."""


def between(least: int, most: int) -> AfterValidator:
    """Inclusive bounds of such a field. Who breaks them is told in USD: credit units would tell nobody anything."""

    def check(value: int) -> int:
        if not least <= value <= most:
            raise ValueError(f"must be from {format_usd(least)} to {format_usd(most)} USD")
        return value

    return AfterValidator(check)
