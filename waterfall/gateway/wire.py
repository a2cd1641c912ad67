"""What the platform's interface takes and shows, field by field, and every error; OpenAPI describes it in these words."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from waterfall.ledger.keys import ApiKey
from waterfall.ledger.views import AccountRecord, CallRecord
from waterfall.money import MAX_UNITS, Usd, UsdText, between
from waterfall.types import (
    LIMITS,
    ZERO_ADDRESS,
    Address,
    Attribution,
    BigInt,
    Hash32,
    KeyLimits,
    Policy,
    RateCard,
    SignedReceipt,
    Surface,
)

_PAYMENT_REQUIRED = 402

CallStatus = Literal[
    "held", "released", "lost", "free", "queued", "batched", "settled", "final", "rejected", "voided"
]


class Shown(BaseModel):
    """What OpenAPI describes in the words that stand below its fields."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class _Body(Shown):
    model_config = ConfigDict(extra="forbid")


Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
"""Text that any database can keep."""


class ErrorFacts(Shown):
    """What went wrong; more facts stand beside these, by code."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(Shown):
    """Every error of every route."""

    error: ErrorFacts


class RefusalFacts(ErrorFacts):
    """Why a wallet refuses a call; amounts in USD."""

    account: Hash32
    """Who was to pay."""
    required: Usd
    """The least that would have let the call run."""
    maximum: Usd
    """The call's provable maximum."""
    available: Usd
    """What the account, or its limit, leaves."""
    balance: Usd
    """The account's balance once everything captured has settled."""
    held: Usd
    """Set aside for the account's running calls."""
    deposit_address: Address | None = None
    """Where to send USDC, if money is short."""
    scope: Literal["per_charge", "per_window", "allowance", "key_per_call", "key_budget"] | None = None
    """Which limit: of the account's policy, of its owner, or of the API key."""
    limit: Usd | None = None
    """What it is."""
    window_seconds: int | None = None
    """Length of its windows."""
    next_window_at: int | None = None
    """When the next one begins, Unix seconds of block time."""
    expires_at: int | None = None
    """Unix second from which the policy, or the owner's allowance, refuses everything."""


class RefusalBody(Shown):
    """A wallet's refusal."""

    error: RefusalFacts


class NewAccount(_Body):
    """An account to open."""

    label: Text = Field(min_length=1, max_length=200)
    """Your name for it: a user, an agent, a team. The chain sees only a salted hash."""
    owner: Address = ZERO_ADDRESS
    """The user's wallet, who may always take unspent credit out; absent: the platform holds the account."""


class ExitView(Shown):
    """A withdrawal under way."""

    amount: Usd
    matures_at: int


class AllowanceView(Shown):
    """The owner's limit on all charges; the gateway keeps to it from the moment it is seen on the chain."""

    cap: Usd
    """The most that may be spent in all, inclusive."""
    spent: Usd
    """Spent of it on the chain so far."""
    expires_at: int
    """Unix second from which nothing may be charged."""


class AccountView(Shown):
    """An account and its money, in USD."""

    id: Hash32
    label: str | None
    owner: Address
    label_hash: Hash32
    deposit_address: Address
    """USDC sent here is credited to the account."""
    balance: Usd
    """On the chain."""
    pending: Usd
    """The part of it whose arrival is not final enough to be spent."""
    unsettled: Usd
    """Charged, and not on the chain yet."""
    held: Usd
    """Set aside for calls that are running."""
    available: Usd
    """balance − pending − unsettled − held."""
    policy: Policy
    """On the chain."""
    wanted_policy: Policy | None
    """Asked for and not on the chain yet: both bind."""
    allowance: AllowanceView | None
    """The owner's own limit, if there is one."""
    exit: ExitView | None
    created_at: int
    """Unix milliseconds."""


class PolicyBody(_Body):
    """Limits; an absent one does not exist, one of 0 refuses everything."""

    max_per_charge: Annotated[UsdText, LIMITS] | None = None
    """USD, inclusive."""
    max_per_window: Annotated[UsdText, LIMITS] | None = None
    """USD in one window, inclusive."""
    window_seconds: int | None = Field(default=None, ge=60, lt=2**32, strict=True, validate_default=True)
    """Length of the fixed windows of block time that `max_per_window` counts in."""
    expires_at: int | None = Field(default=None, ge=0, lt=2**40, strict=True)
    """Unix second from which nothing may be charged."""

    @field_validator("window_seconds")
    @classmethod
    def _belongs_to_a_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if "max_per_window" in info.data and (info.data["max_per_window"] is None) != (value is None):
            raise ValueError("must be given if, and only if, max_per_window is")
        return value


class KeyLimitsBody(KeyLimits):
    """A key's limits, as they are asked for: amounts as text."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    max_per_call: Annotated[UsdText, LIMITS] | None = None
    """What one call may cost at most, inclusive."""
    budget: Annotated[UsdText, LIMITS] | None = None
    """What its calls may cost in each of its windows, or for ever, inclusive."""


class NewKey(_Body):
    """A key to make."""

    name: Text = Field(default="", max_length=100)
    expires_at: int | None = Field(default=None, ge=0, lt=2**40, strict=True)
    """Unix seconds; absent: never."""
    limits: KeyLimitsBody = Field(default_factory=KeyLimitsBody)
    """What it may do, of what its account may."""


class KeyView(Shown):
    """A new key: the only time it is shown."""

    id: str
    key: str
    account: Hash32
    name: str
    expires_at: int | None
    limits: KeyLimits


class Rotation(_Body):
    """How a key's place is taken."""

    grace_seconds: int = Field(default=0, ge=0, le=30 * 86_400, strict=True)
    """For how long the old key stays valid beside the new one."""


class KeyFacts(Shown):
    """A key, without its secret."""

    id: str
    account: Hash32
    name: str
    created_at: int
    """Unix milliseconds."""
    expires_at: int | None
    """Unix seconds; null: never."""
    revoked_at: int | None
    """Unix milliseconds; null: it is not."""
    limits: KeyLimits
    spent: Usd | None
    """Of its budget, in the window of now: charged, and held for running calls. Null where it has none."""


class ForgottenView(Shown):
    """What was erased of an account."""

    account: Hash32
    label: bool
    """Whether there was one."""
    keys: int
    """API keys: they open nothing any more."""
    usage: int
    """Calls whose usage object, as the provider sent it, is gone; the receipts keep its hash."""
    details: int
    """Calls of which it is not known any more which API key made them, or in which words they failed."""
    idempotency: int
    """Idempotency keys: a repeat under one would be a new charge."""


class NewCharge(_Body):
    """A call that was metered elsewhere: an amount, or a model and the provider's usage object."""

    account: Hash32
    amount: Annotated[UsdText, between(1, MAX_UNITS)] | None = None
    model: Text | None = Field(default=None, min_length=1, max_length=200)
    usage: dict[str, Any] | None = None
    surface: Surface = "chat"
    """In whose words the usage object is."""
    attribution: Attribution = Attribution()
    """Whom and what the call was for."""

    @model_validator(mode="after")
    def _one_way(self) -> "NewCharge":
        if (self.amount is None) == (self.usage is None) or (self.usage is not None and self.model is None):
            raise ValueError("give either an amount, or a model and its usage")
        return self


class ReceiptView(Shown):
    """One call and where it stands."""

    id: str
    charge_id: BigInt
    account: Hash32
    surface: Surface | None
    """In whose words the model was called; null where an amount was charged."""
    model: str
    attribution: Attribution = Attribution()
    """Whom and what it was for, as the platform said."""
    status: CallStatus
    reason: str | None
    held: Usd
    """The provable maximum that was set aside."""
    cost: Usd | None
    """What was charged; null while nothing is."""
    excess: Usd
    """Metered beyond the hold, and so not charged: the platform's loss."""
    vendor_cost: Usd | None = None
    """What the call cost the platform, which alone is told; null where nobody knows."""
    margin: Usd | None = None
    """What the platform keeps of the cost."""
    transaction: Hash32 | None
    block: int | None
    created_at: int
    captured_at: int | None
    settled_at: int | None
    receipt: SignedReceipt | None


class EstimateBody(_Body):
    """A request to a surface, to be priced and not sent."""

    surface: Surface = "chat"
    """In whose words it is."""
    request: dict[str, Any]
    """As it would be sent to that surface."""
    account: Hash32 | None = None
    """Who would pay; absent: the key's account, or anybody."""


class EstimateView(Shown):
    """What a request may cost, of one of the models that may serve it; in USD."""

    model: str
    price_id: Hash32
    prices: RateCard
    maximum: Usd
    """The provable maximum, which would be set aside."""
    least: Usd
    """With how much at least the call would run, with its output cut: the same where the request sets its limit."""
    max_output_tokens: int
    """The most output, over all choices."""


class StatementLineView(Shown):
    """One line of an account's statement on the chain."""

    entry: int
    event: str
    amount: Usd | None
    charge_id: BigInt | None
    receipt_id: str | None
    transaction: Hash32
    block: int
    timestamp: int


class StatementView(Shown):
    """An account's lines in order; with `after` = the last line's entry comes the next page."""

    account: Hash32
    lines: list[StatementLineView]
    unsettled: list[ReceiptView]
    """Charges that are not on the chain yet, newest first."""


class TotalsView(Shown):
    """Sums over all accounts, and how many calls stand where."""

    balance: Usd
    held: Usd
    unsettled: Usd
    excess: Usd
    """Metered beyond holds: the platform's loss."""
    incomplete: int
    """Charges of answers whose usage never came."""
    calls: dict[str, int]


class PlatformView(Shown):
    """Which platform this gateway serves, on which vault, and how far it has read the chain."""

    platform: BigInt
    chain_id: int
    vault: Address
    meter: Address
    epoch: int
    head: int | None
    head_timestamp: int | None


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's errors as OpenAPI documents them; whatever else goes wrong has the same format."""
    models = {status: RefusalBody if status == _PAYMENT_REQUIRED else ErrorBody for status in statuses}
    return {status: {"model": model} for status, model in models.items()} | {"default": {"model": ErrorBody}}


def key_facts(key: ApiKey, spent: int | None) -> KeyFacts:
    """A key of an account as the interface shows it."""
    return KeyFacts(
        id=key.id,
        account=str(key.account),
        name=key.name,
        created_at=key.created_at,
        expires_at=None if key.expires_at is None else key.expires_at // 1000,
        revoked_at=key.revoked_at,
        limits=key.limits or KeyLimits(),
        spent=spent,
    )


def account_view(record: AccountRecord) -> AccountView:
    """An account as the interface shows it."""
    wallet = record.wallet
    return AccountView(
        id=record.id,
        label=record.label,
        owner=record.owner,
        label_hash=record.label_hash,
        deposit_address=record.deposit_address,
        balance=wallet.balance,
        pending=wallet.pending,
        unsettled=wallet.unsettled,
        held=wallet.held,
        available=wallet.available,
        policy=record.policy,
        wanted_policy=record.wanted,
        allowance=None
        if record.allowance is None
        else AllowanceView(
            cap=record.allowance.cap, spent=wallet.allowance_spent, expires_at=record.allowance.expires_at
        ),
        exit=ExitView(amount=record.exit_amount, matures_at=record.exit_matures_at)
        if record.exit_amount
        else None,
        created_at=record.created_at,
    )


def receipt_view(call: CallRecord, *, to_platform: bool) -> ReceiptView:
    """A call as the interface shows it; what it costs the platform, to the platform."""
    at = call.settlement
    cost = None if call.receipt is None else call.receipt.receipt.amount
    vendor_cost = call.vendor_cost if to_platform else None
    return ReceiptView(
        id=call.receipt_id,
        charge_id=call.charge_id,
        account=call.account,
        surface=call.surface,
        model=call.model,
        attribution=call.attribution,
        status=at.state,
        reason=at.reason,
        held=call.held,
        cost=cost,
        excess=call.excess,
        vendor_cost=vendor_cost,
        margin=None if cost is None or vendor_cost is None else cost - vendor_cost,
        transaction=at.transaction,
        block=at.block,
        created_at=call.created_at,
        captured_at=at.captured_at,
        settled_at=at.settled_at,
        receipt=call.receipt,
    )
