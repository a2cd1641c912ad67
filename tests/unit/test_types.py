import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import ACCOUNT, card, sign, word
from pydantic import TypeAdapter, ValidationError

from waterfall.ledger.books import Hold
from waterfall.types import (
    Address,
    BigInt,
    Charge,
    Hash32,
    Policy,
    Price,
    RateCard,
    SignedReceipt,
    Usage,
    UsageReceipt,
)

PRICE = TypeAdapter(Price)
BIG = TypeAdapter(BigInt)
HELD = Hold(1, 2**32 + 1, "ab" * 16, ACCOUNT, 10, 0)


# ── Hex and integers ─────────────────────────────────────────────────────────────────────────────────


def test_address__mixed_case__lower_case_is_kept():
    assert TypeAdapter(Address).validate_python("0x" + "aB" * 20) == "0x" + "ab" * 20


@pytest.mark.parametrize("text", ["", "0x", "ab" * 20, "0x" + "ab" * 19, "0x" + "ab" * 21, "0x" + "zz" * 20])
def test_address__anything_else__is_refused(text):
    with pytest.raises(ValidationError):
        TypeAdapter(Address).validate_python(text)


@pytest.mark.parametrize("text", ["0x" + "AB" * 32, "0x" + "ab" * 31, "ab" * 32, "0x" + "ab" * 32 + "\n"])
def test_hash32__not_lower_case_hex__is_refused(text):
    with pytest.raises(ValidationError):
        TypeAdapter(Hash32).validate_python(text)


@given(st.integers(0, 2**128 - 1))
def test_big_int__through_json__exact_as_text(value):
    shown = BIG.dump_json(value)
    assert json.loads(shown) == str(value)
    assert BIG.validate_json(shown) == value


@pytest.mark.parametrize("text", ['"1e3"', '"0x10"', '" 1"', '"١"', '"-1"', '""'])
def test_big_int__text_that_is_not_digits__is_refused(text):
    with pytest.raises(ValidationError):
        BIG.validate_json(text)


# ── Prices ───────────────────────────────────────────────────────────────────────────────────────────


@given(st.decimals(min_value=0, max_value=10**9, places=12))
def test_price__through_json__same_price(price):
    shown = PRICE.dump_json(price)
    assert PRICE.validate_json(shown) == price
    assert "e" not in shown.decode().lower()


@pytest.mark.parametrize("price", [0.15, 1, True, None])
def test_price__not_text__is_refused(price):
    with pytest.raises(ValidationError, match="decimal string"):
        PRICE.validate_python(price)


@pytest.mark.parametrize(
    "text", ["abc", "", "1e3", "1E-3", " 1 ", "1_0", "-1", "-0", "+1", ".5", "5.", "NaN", "Infinity", "١"]
)
def test_price__not_a_plain_decimal__is_refused(text):
    with pytest.raises(ValidationError):
        PRICE.validate_python(text)


@pytest.mark.parametrize("text", ["0.0000000000001", "1" + 24 * "0"])
def test_price__beyond_its_precision__is_refused(text):
    with pytest.raises(ValidationError):
        PRICE.validate_python(text)


def test_price__trailing_zeros__one_form_in_json():
    assert PRICE.dump_json(Decimal("0.150")) == PRICE.dump_json(Decimal("0.15")) == b'"0.15"'
    assert PRICE.dump_json(Decimal("1E+3")) == b'"1000"'


# ── Usage and rate cards ─────────────────────────────────────────────────────────────────────────────


def test_usage__more_cached_than_input__is_refused():
    with pytest.raises(ValidationError, match="more cached than input"):
        Usage(input_tokens=1, cached_input_tokens=2, output_tokens=0)


def test_usage__more_reasoning_than_output__is_refused():
    with pytest.raises(ValidationError, match="more reasoning than output"):
        Usage(input_tokens=1, output_tokens=1, reasoning_tokens=2)


@pytest.mark.parametrize("count", [-1, 1.0, "1", True, None, 2**63])
def test_usage__count_that_is_not_one__is_refused(count):
    with pytest.raises(ValidationError):
        Usage(input_tokens=count, output_tokens=0)


def test_usage__missing_output__is_never_taken_for_zero():
    with pytest.raises(ValidationError):
        Usage(input_tokens=1)


@pytest.mark.parametrize("steps", [(), (1,), (0, 0), (0, 2, 1)])
def test_rate_card__steps_that_do_not_ascend_from_zero__is_refused(steps):
    rates = [card().rates[0].model_copy(update={"above_input_tokens": step}) for step in steps]
    with pytest.raises(ValidationError):
        RateCard(model="m", source="s", rates=rates)


def test_rate_card__through_json__is_equal():
    assert RateCard.model_validate_json(card("m", "0.150", "2", "0.000000000001").model_dump_json()) == card(
        "m", "0.15", "2", "0.000000000001"
    )


# ── Receipts, charges, policies ──────────────────────────────────────────────────────────────────────


def test_signed_receipt__through_json__is_equal():
    signed = sign(HELD, 5, usage={"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.1})
    assert SignedReceipt.model_validate_json(signed.model_dump_json()) == signed


def test_signed_receipt__in_json__big_ids_and_money_are_text():
    shown = json.loads(sign(HELD, 5).model_dump_json())
    assert shown["receipt"]["charge_id"] == str(2**32 + 1)
    assert shown["receipt"]["amount"] == "0.000000000005"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("platform", -1),
        ("platform", 2**128),
        ("charge_id", -1),
        ("charge_id", 2**64),
        ("amount", -1),
        ("amount", 2**96),
        ("issued_at", -1),
        ("issued_at", 2**40),
    ],
)
def test_usage_receipt__number_that_the_vault_has_no_room_for__is_refused(name, value):
    fields = sign(HELD, 5).receipt.model_dump()
    with pytest.raises(ValidationError):
        UsageReceipt(**{**fields, name: value})


@pytest.mark.parametrize(("name", "value"), [("id", 2**64), ("id", -1), ("amount", 2**96), ("amount", -1)])
def test_charge__number_that_the_vault_has_no_room_for__is_refused(name, value):
    fields = {"account": ACCOUNT, "id": 1, "amount": 1, "receipt_hash": word("r")}
    with pytest.raises(ValidationError):
        Charge(**{**fields, name: value})


def test_model__once_made__cannot_be_changed():
    with pytest.raises(ValidationError):
        Policy().max_per_charge = 1


def test_model__unknown_field__is_refused():
    with pytest.raises(ValidationError):
        Policy(max_per_day=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_per_window": 1},
        {"window_seconds": 60},
        {"max_per_window": 1, "window_seconds": 59},
        {"max_per_charge": 2**80},
        {"max_per_charge": -1},
        {"expires_at": 2**40},
    ],
)
def test_policy__that_the_vault_would_not_take__is_refused(fields):
    with pytest.raises(ValidationError):
        Policy(**fields)


def test_policy__limit_of_zero__is_a_limit():
    assert Policy(max_per_charge=0).max_per_charge == 0
    assert Policy().max_per_charge is None
