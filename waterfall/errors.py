"""Every error Waterfall raises on purpose. The docstring is the message; `code` and `status` are the API's.

Messages name what was refused and what to do; `details` are the same facts for machines. No detail is ever a
secret. Surfaces render these in the caller's own API format.
"""

from inspect import cleandoc
from typing import ClassVar


class WaterfallError(Exception):
    """Waterfall could not do this."""

    code: ClassVar[str] = "internal_error"
    """Stable machine code."""
    status: ClassVar[int] = 500
    """HTTP status."""

    def __init__(self, **details: object) -> None:
        self.details = details
        super().__init__(cleandoc(type(self).__doc__ or "").replace("\n", " ").format(**details))

    @property
    def message(self) -> str:
        """What happened and what to do, in one line."""
        return str(self)


# ── The request is wrong ─────────────────────────────────────────────────────────────────────────────


class InvalidRequest(WaterfallError):
    """{reason}"""

    code = "invalid_request"
    status = 400


class BodyTooLarge(WaterfallError):
    """The body is larger than the {limit} bytes this gateway accepts."""

    code = "body_too_large"
    status = 413


class InvalidApiKey(WaterfallError):
    """No valid API key: send 'Authorization: Bearer <key>', or 'x-api-key: <key>'."""

    code = "invalid_api_key"
    status = 401


class ApiKeyExpired(WaterfallError):
    """This API key expired at {expired_at}: ask for a new one."""

    code = "api_key_expired"
    status = 401


class PermissionDenied(WaterfallError):
    """{reason}"""

    code = "permission_denied"
    status = 403


class AccountNotFound(WaterfallError):
    """There is no account {account} on this platform."""

    code = "account_not_found"
    status = 404


class KeyNotFound(WaterfallError):
    """There is no API key {key} of an account that is still valid."""

    code = "key_not_found"
    status = 404


class ReceiptNotFound(WaterfallError):
    """There is no receipt {receipt} that this key may read."""

    code = "receipt_not_found"
    status = 404


class PriceNotFound(WaterfallError):
    """No call was ever priced by {price_id} here."""

    code = "price_not_found"
    status = 404


class ModelNotFound(WaterfallError):
    """There is no model {model} here: see GET /v1/models."""

    code = "model_not_found"
    status = 404


class ModelNotPriced(WaterfallError):
    """The model {model} has no price, so no call of it can be billed: add one to waterfall.toml."""

    code = "model_not_priced"
    status = 400


class AccountExists(WaterfallError):
    """An account with this owner and label exists already: {account}."""

    code = "account_exists"
    status = 409


class AccountBusy(WaterfallError):
    """Account {account} has calls that are running, or charges that are not settled: try again when it has none."""

    code = "account_busy"
    status = 409


class IdempotencyConflict(WaterfallError):
    """This Idempotency-Key was used with another body: use a new key for a new request."""

    code = "idempotency_conflict"
    status = 409


class CallRepeated(WaterfallError):
    """This Idempotency-Key stands for the call {receipt} already."""

    code = "call_repeated"
    status = 409


class AlreadyCharged(WaterfallError):
    """The call under this Idempotency-Key was made and charged, see its receipt {receipt}, and its answer is kept no more:
    use a new key for a new call."""

    code = "already_charged"
    status = 409


class CallLost(WaterfallError):
    """The call under this Idempotency-Key may have run, but its answer was lost, and nothing was charged; its receipt id is
    {receipt}: use a new key for a new call."""

    code = "call_lost"
    status = 409


class NotPermitted(WaterfallError):
    """This API key may not call {what}: it is limited to {permitted}."""

    code = "not_permitted"
    status = 403


class RateLimited(WaterfallError):
    """This API key may call {limit} times a minute: try again in {retry_after_ms} ms."""

    code = "rate_limited"
    status = 429


class HoldNotOpen(WaterfallError):
    """The hold {receipt} is not open any more."""

    code = "hold_not_open"
    status = 409


class UnsupportedRoute(WaterfallError):
    """{method} {path} is not served: nothing passes through unbilled."""

    code = "unsupported_route"
    status = 501


# ── The wallet says no ───────────────────────────────────────────────────────────────────────────────


class PaymentRequired(WaterfallError):
    """The call cannot be paid for."""

    code = "payment_required"
    status = 402


class InsufficientFunds(PaymentRequired):
    """This call needs at least {required} USD, and {available} USD is available: top the account up."""

    code = "insufficient_funds"


class FundsHeld(PaymentRequired):
    """This call needs at least {required} USD, and {available} USD is available while calls of this account that
    are still running hold {held} USD: try again when they have ended."""

    code = "funds_held"


class LimitExceeded(PaymentRequired):
    """This call needs at least {required} USD, and the {scope} limit of {limit} USD leaves {available} USD:
    ask for less output, or for a higher limit."""

    code = "limit_exceeded"


class PolicyExpired(PaymentRequired):
    """The account's spend policy expires at Unix second {expires_at}, too soon for this call to be charged by then:
    ask for a later one."""

    code = "policy_expired"


class AllowanceExpired(PaymentRequired):
    """The allowance of the account's owner expires at Unix second {expires_at}, too soon for this call to be charged by
    then: ask the owner for a later one."""

    code = "allowance_expired"


# ── The upstream failed ──────────────────────────────────────────────────────────────────────────────


class UpstreamUnavailable(WaterfallError):
    """The upstream {upstream} cannot be reached: {reason}. Nothing was charged."""

    code = "upstream_unavailable"
    status = 502


class UpstreamRefused(WaterfallError):
    """The upstream {upstream} answered {status}: {reason}."""

    code = "upstream_refused"
    status = 502


class UpstreamInvalid(WaterfallError):
    """The upstream {upstream} sent an answer that cannot be metered: {reason}."""

    code = "upstream_invalid"
    status = 502


class UpstreamTimeout(WaterfallError):
    """The upstream {upstream} did not answer within {seconds} seconds."""

    code = "upstream_timeout"
    status = 504


class StreamDropped(WaterfallError):
    """The rest of this stream was dropped, as more than {bytes} bytes of it had not been taken. All of it is charged."""

    code = "stream_dropped"
    status = 408


# ── Waterfall cannot be sure, so it refuses ──────────────────────────────────────────────────────────


class Unsure(WaterfallError):
    """Waterfall cannot be sure, so it refuses: {reason}."""

    code = "unsure"
    status = 503
    told: ClassVar[str] = "Waterfall cannot do this now: try again in a moment."
    """The message for whoever is not the platform: its machines' words are for nobody else."""


class Unavailable(Unsure):
    """No call can be authorised now: {reason}."""

    code = "unavailable"


class LedgerError(Unsure):
    """The ledger cannot be used: {reason}."""

    code = "ledger_error"


class LossNotAccepted(WaterfallError):
    """{what}. Unsettled charges, open holds, API keys, labels, usage and idempotency keys are not on the chain:
    `waterfall restore` brings them back from a backup, `waterfall rebuild --accept-loss` goes on without them."""

    code = "loss_not_accepted"


class ChainError(Unsure):
    """The chain cannot be used: {reason}."""

    code = "chain_error"


class EventsMissing(ChainError):
    """{what}: a node has left events out, so blocks after {after} are read again. If this does not end, run
    `waterfall rebuild`."""

    code = "events_missing"


class SignerUnavailable(Unsure):
    """What holds the signing key gave no signature: {reason}. The same may be tried again."""

    code = "signer_unavailable"


class LaneHalted(Unsure):
    """Settlement has stopped and needs a person: {reason}."""

    code = "lane_halted"


class SettingsError(WaterfallError):
    """{reason}"""

    code = "settings_error"


class VerificationFailed(WaterfallError):
    """The receipt does not hold: {reason}."""

    code = "verification_failed"
