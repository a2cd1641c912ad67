import json
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from waterfall.money import (
    MAX_UNITS,
    UNITS_PER_USD,
    Usd,
    UsdText,
    between,
    format_usd,
    parse_usd,
    tokens_to_units,
    units_to_tokens,
)

UNITS = st.integers(-(2**100), 2**100)


class Wallet(BaseModel):
    amount: Usd


class Order(BaseModel):
    amount: UsdText


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("0", 0),
        ("-0", 0),
        ("1", UNITS_PER_USD),
        ("12.5", 12_500_000_000_000),
        ("12.50", 12_500_000_000_000),
        ("0.000000000001", 1),
        ("-0.000000000001", -1),
        ("0.1000000000000000", 100_000_000_000),
        ("007", 7 * UNITS_PER_USD),
        ("79228162514264337.593543950335", MAX_UNITS),
    ],
)
def test_parse_usd__plain_decimal__exact_units(text, units):
    assert parse_usd(text) == units


@pytest.mark.parametrize(
    "text",
    [
        *[
            "-",
            ".5",
            "5.",
            "+5",
            "1e3",
            "1_000",
            "1,000",
            "0x10",
            "NaN",
            "inf",
            "--1",
            "1.2.3",
            "١",
            "１",
            "½",
        ],
        "",
        " 1",
        "1 ",
        "1\n",
    ],
)
def test_parse_usd__anything_else__is_refused(text):
    with pytest.raises(ValueError, match="is not a plain decimal amount"):
        parse_usd(text)


def test_parse_usd__thirteen_decimals__is_refused_not_rounded():
    with pytest.raises(ValueError, match="more than 12 decimals"):
        parse_usd("0.0000000000001")


@pytest.mark.parametrize("text", ["1" + 24 * "0", 5000 * "9"])
def test_parse_usd__absurdly_large__is_refused(text):
    with pytest.raises(ValueError, match="is too large"):
        parse_usd(text)


@pytest.mark.parametrize(
    ("units", "text"),
    [
        (0, "0.00"),
        (1, "0.000000000001"),
        (-1, "-0.000000000001"),
        (UNITS_PER_USD, "1.00"),
        (100_000_000_000, "0.10"),
        (120_000_000_000, "0.12"),
        (123_000_000_000, "0.123"),
        (-UNITS_PER_USD // 2, "-0.50"),
        (20_000_000 * UNITS_PER_USD, "20000000.00"),
    ],
)
def test_format_usd__units__at_least_two_decimals(units, text):
    assert format_usd(units) == text


@given(UNITS)
def test_usd__written_and_read__same_units(units):
    assert parse_usd(format_usd(units)) == units


@given(UNITS)
def test_usd__through_json__same_units_as_text(units):
    shown = Wallet(amount=units).model_dump_json()
    assert isinstance(json.loads(shown)["amount"], str)
    assert Wallet.model_validate_json(shown).amount == units


@given(st.integers(0, 2**80))
def test_tokens__to_units_and_back__same_tokens(base_units):
    assert units_to_tokens(tokens_to_units(base_units)) == base_units


@given(UNITS)
def test_units_to_tokens__any_units__exact_or_refused(units):
    if units % 10**6:
        with pytest.raises(ValueError, match="not a whole number"):
            units_to_tokens(units)
    else:
        assert tokens_to_units(units_to_tokens(units)) == units


def test_usd__python_value__stays_units():
    assert Wallet(amount=5).model_dump() == {"amount": 5}


@pytest.mark.parametrize("value", [1.0, True, None, b"1", ["1"], {}])
def test_usd__neither_text_nor_units__is_refused(value):
    with pytest.raises(ValidationError):
        Wallet(amount=value)


@pytest.mark.parametrize("value", [5, 1.0, True, None])
def test_usd_text__bare_number__is_refused_as_ambiguous(value):
    with pytest.raises(ValidationError, match="decimal string"):
        Order(amount=value)


def test_usd_text__text__units():
    assert Order(amount="5").amount == 5 * UNITS_PER_USD


def test_usd__json_schema__is_a_string():
    schema = Wallet.model_json_schema()["properties"]["amount"]
    assert schema["type"] == "string"


class Bounded(BaseModel):
    amount: Annotated[UsdText, between(1, 2 * UNITS_PER_USD)]


@pytest.mark.parametrize("amount", ["0.000000000001", "2"])
def test_between__at_a_bound__is_accepted(amount):
    assert Bounded(amount=amount).amount == parse_usd(amount)


@pytest.mark.parametrize("amount", ["0", "-1", "2.000000000001"])
def test_between__beyond_a_bound__is_told_in_usd(amount):
    with pytest.raises(ValidationError, match=r"must be from 0\.000000000001 to 2\.00 USD"):
        Bounded(amount=amount)
