import json

import pytest
from making import ACCOUNT

from waterfall.errors import (
    AccountNotFound,
    BodyTooLarge,
    FundsHeld,
    IdempotencyConflict,
    InsufficientFunds,
    InvalidApiKey,
    InvalidRequest,
    PaymentRequired,
    PermissionDenied,
    Unavailable,
    UnsupportedRoute,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaterfallError,
)
from waterfall.gateway.render import charge_facts, charge_headers, error_body, error_response, hold_headers
from waterfall.ledger.books import Hold
from waterfall.ledger.journal import Captured

FACTS = {"required": "1.00", "available": "0.50", "held": "0.25", "account": ACCOUNT}


def test_error_body__refusal__openai_fields_and_our_facts():
    body = error_body(InsufficientFunds(**FACTS))["error"]
    assert (body["code"], body["type"], body["param"]) == ("insufficient_funds", "payment_required", None)
    assert (
        body["message"] == "This call needs at least 1.00 USD, and 0.50 USD is available: top the account up."
    )
    assert {name: body[name] for name in FACTS} == FACTS


@pytest.mark.parametrize(
    ("error", "type_"),
    [
        (InvalidRequest, "invalid_request_error"),
        (InvalidApiKey, "authentication_error"),
        (PaymentRequired, "payment_required"),
        (PermissionDenied, "permission_error"),
        (AccountNotFound, "not_found_error"),
        (IdempotencyConflict, "conflict_error"),
        (BodyTooLarge, "invalid_request_error"),
        (UnsupportedRoute, "not_supported_error"),
        (WaterfallError, "api_error"),
        (UpstreamInvalid, "api_error"),
        (Unavailable, "api_error"),
    ],
)
def test_error_body__any_status__has_the_type_that_clients_know(error, type_):
    facts = dict.fromkeys(("reason", "account", "limit", "method", "path", "upstream"), "x")
    assert error_body(error(**facts))["error"]["type"] == type_


def test_error_body__wrong_field__is_its_param():
    body = error_body(InvalidRequest(reason="n must be a whole number.", param="n"))["error"]
    assert (body["param"], body["message"]) == ("n", "n must be a whole number.")
    assert "reason" not in body


def test_error_body__a_fact_named_like_ours__never_replaces_code_or_message():
    body = error_body(InvalidRequest(reason="no", code="x", message="y", type="z"))["error"]
    assert (body["code"], body["message"], body["type"]) == ("invalid_request", "no", "invalid_request_error")


@pytest.mark.parametrize(
    ("error", "status", "again", "after"),
    [
        (InsufficientFunds(**FACTS), 402, None, None),
        (FundsHeld(**FACTS), 402, None, "1"),
        (Unavailable(reason="late"), 503, None, "1"),
        (UpstreamTimeout(upstream="u", seconds=5), 504, "false", None),
        (UpstreamInvalid(upstream="u", reason="r"), 502, "false", None),
        (UpstreamUnavailable(upstream="u", reason="r"), 502, None, None),
        (WaterfallError(), 500, "false", None),
    ],
    ids=lambda value: getattr(value, "code", None),
)
def test_error_response__any_error__says_when_sending_again_is_wrong(error, status, again, after):
    response = error_response(error, error_body(error))
    assert response.status_code == status
    assert response.headers.get("x-should-retry") == again
    assert response.headers.get("retry-after") == after
    assert json.loads(response.body) == error_body(error)


def test_headers__money__is_exact_text():
    held = Hold(1, 2, "ab" * 16, ACCOUNT, 5, 0)
    assert hold_headers(held, "m\u00fc ll") == {
        "X-Waterfall-Receipt-Id": "ab" * 16,
        "X-Waterfall-Hold": "0.000000000005",
        "X-Waterfall-Model": "m%C3%BC%20ll",
    }
    captured = Captured(1, "ab" * 16, 1, -(10**12))
    assert charge_headers(captured) == {
        "X-Waterfall-Cost": "0.000000000001",
        "X-Waterfall-Balance": "-1.00",
    }
    assert charge_facts(captured) == {
        "receipt_id": "ab" * 16,
        "cost": "0.000000000001",
        "balance": "-1.00",
    }
