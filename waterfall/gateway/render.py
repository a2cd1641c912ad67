"""Errors and receipts as headers and bodies."""

from typing import Any
from urllib.parse import quote

from starlette.responses import JSONResponse, Response

from waterfall.errors import FundsHeld, RateLimited, Unavailable, Unsure, WaterfallError
from waterfall.gateway.upstreams import may_be_retried
from waterfall.ledger.books import Hold
from waterfall.ledger.journal import Captured
from waterfall.ledger.views import CallRecord
from waterfall.money import format_usd

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "payment_required",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_supported_error",
}
_RETRY_SECONDS = 1


def error_body(error: WaterfallError, *, to_platform: bool = False) -> dict[str, Any]:
    """An error as OpenAI's clients read it, with our facts beside: amounts in USD, codes that stay.

    Args:
        error: what happened.
        to_platform: whether the platform reads it, who alone is told what its database and its nodes say.

    Source: https://platform.openai.com/docs/guides/error-codes
    """
    facts = {name: value for name, value in error.details.items() if name != "reason"}
    return {
        "error": {
            "param": None,
            **facts,
            "message": error.told if isinstance(error, Unsure) and not to_platform else error.message,
            "type": _TYPES.get(error.status, "api_error"),
            "code": error.code,
        }
    }


def error_response(error: WaterfallError, body: dict[str, Any]) -> Response:
    """An error as an HTTP answer that says when it must not be sent again; `body` as its surface's clients read it."""
    response = JSONResponse(body, status_code=error.status)
    if not may_be_retried(error):
        response.headers["x-should-retry"] = "false"
    if isinstance(error, RateLimited):
        milliseconds = int(str(error.details["retry_after_ms"]))
        response.headers["retry-after-ms"] = str(milliseconds)
        response.headers["retry-after"] = str(-(-milliseconds // 1000))
    elif isinstance(error, FundsHeld | Unavailable):
        response.headers["retry-after"] = str(_RETRY_SECONDS)
    return response


def hold_headers(held: Hold, model: str) -> dict[str, str]:
    """What is known of a call before it is served."""
    return {
        "X-Waterfall-Receipt-Id": held.receipt_id,
        "X-Waterfall-Hold": format_usd(held.amount),
        "X-Waterfall-Model": quote(model),
    }


def replay_headers(call: CallRecord) -> dict[str, str]:
    """What is known of a call's money, for a repeat of it."""
    receipt = call.receipt
    cost = {} if receipt is None else {"X-Waterfall-Cost": format_usd(receipt.receipt.amount)}
    return {
        "X-Waterfall-Receipt-Id": call.receipt_id,
        "X-Waterfall-Hold": format_usd(call.held),
        "X-Waterfall-Model": quote(call.model),
        **cost,
        "X-Waterfall-Replayed": "true",
    }


def charge_headers(captured: Captured, transaction: str | None = None) -> dict[str, str]:
    """What is known of a call's money afterwards, and in which transaction its charge is on the chain."""
    headers = {
        "X-Waterfall-Cost": format_usd(captured.amount),
        "X-Waterfall-Balance": format_usd(captured.balance),
    }
    return headers if transaction is None else headers | {"X-Waterfall-Transaction": transaction}


def charge_facts(captured: Captured, transaction: str | None = None) -> dict[str, str]:
    """The same for the end of a stream."""
    facts = {
        "receipt_id": captured.receipt_id,
        "cost": format_usd(captured.amount),
        "balance": format_usd(captured.balance),
    }
    return facts if transaction is None else facts | {"transaction": transaction}
