"""The platform's own interface, under /api: accounts, keys, policies, statements, charges, receipts."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from waterfall.errors import InvalidRequest, ReceiptNotFound
from waterfall.gateway.access import Access, authenticate
from waterfall.gateway.calls import Calls, Metered
from waterfall.gateway.models import Models
from waterfall.keccak import keccak
from waterfall.ledger import accounts, keys, views
from waterfall.ledger.journal import Caller
from waterfall.ledger.store import Ledger
from waterfall.ledger.views import AccountRecord, CallRecord
from waterfall.ledger.wallet import Wallet
from waterfall.metering import prices
from waterfall.metering.usage import UsageUnreadable, from_openai_chat
from waterfall.money import MAX_UNITS, Usd, UsdText, between
from waterfall.receipts import bytes_hash, canonical_hash
from waterfall.types import (
    LIMITS,
    ZERO_ADDRESS,
    Address,
    BigInt,
    ChargeId,
    Hash32,
    Policy,
    RateCard,
    SignedReceipt,
    Usage,
)

_LONGEST_SHOWN = 80
"""Of a receipt's id that is asked for: longer than any, so that what is cut off makes none."""
_NOTHING_SENT = "0x" + keccak(b"").hex()

CallStatus = Literal[
    "held", "released", "lost", "free", "queued", "batched", "settled", "final", "rejected", "voided"
]


class Shown(BaseModel):
    """What OpenAPI describes in the words that stand below its fields."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class _Body(Shown):
    model_config = ConfigDict(extra="forbid")


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
    scope: Literal["per_charge", "per_window", "allowance"] | None = None
    """Which limit."""
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

    label: str = Field(min_length=1, max_length=200)
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


class NewKey(_Body):
    """A key to make."""

    name: str = Field(default="", max_length=100)
    expires_at: int | None = Field(default=None, ge=0, lt=2**40, strict=True)
    """Unix seconds; absent: never."""


class KeyView(Shown):
    """A new key: the only time it is shown."""

    id: str
    key: str
    account: Hash32
    name: str
    expires_at: int | None


class NewCharge(_Body):
    """A call that was metered elsewhere: an amount, or a model and the provider's usage object."""

    account: Hash32
    amount: Annotated[UsdText, between(1, MAX_UNITS)] | None = None
    model: str | None = Field(default=None, min_length=1, max_length=200)
    usage: dict[str, Any] | None = None

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
    model: str
    status: CallStatus
    reason: str | None
    held: Usd
    """The provable maximum that was set aside."""
    cost: Usd | None
    """What was charged; null while nothing is."""
    excess: Usd
    """Metered beyond the hold, and so not charged: the platform's loss."""
    transaction: Hash32 | None
    block: int | None
    created_at: int
    captured_at: int | None
    settled_at: int | None
    receipt: SignedReceipt | None


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


_PAYMENT_REQUIRED = 402


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's errors as OpenAPI documents them; whatever else goes wrong has the same format."""
    models = {status: RefusalBody if status == _PAYMENT_REQUIRED else ErrorBody for status in statuses}
    return {status: {"model": model} for status, model in models.items()} | {"default": {"model": ErrorBody}}


IdempotencyKey = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same key never charges twice.",
    ),
]


@dataclass(frozen=True)
class Office:
    """What the routes work with; the application keeps it as `state.office`."""

    ledger: Ledger
    calls: Calls
    models: Models
    label_salt: bytes
    """Keeps account labels unreadable on the chain."""


async def _office(request: Request) -> Office:
    office: Office = request.app.state.office
    return office


Context = Annotated[Office, Depends(_office)]


async def _anyone(request: Request, here: Context) -> Access:
    return authenticate(here.ledger, request)


Anyone = Annotated[Access, Depends(_anyone)]


async def _platform(who: Anyone) -> Access:
    who.require_admin()
    return who


Platform = Annotated[Access, Depends(_platform)]

router = APIRouter(prefix="/api", responses=errors(401))


async def _shown(here: Office, account: str) -> AccountView:
    return account_view(await here.ledger.read(lambda c: views.account(c, account)))


async def _receipt(here: Office, receipt_id: str) -> CallRecord:
    return await here.ledger.read(
        lambda c: views.call(c, receipt_id, here.ledger.chain_id, here.ledger.vault)
    )


@router.get("/platform")
async def get_platform(here: Context, _: Anyone) -> PlatformView:
    """Which platform this gateway serves."""
    head = here.ledger.head.block if here.ledger.head is not None else None
    return PlatformView(
        platform=here.ledger.platform,
        chain_id=here.ledger.chain_id,
        vault=here.ledger.vault,
        meter=here.calls.meter_address,
        epoch=here.ledger.epoch,
        head=head.number if head else None,
        head_timestamp=head.timestamp if head else None,
    )


@router.get("/totals", responses=errors(403))
async def get_totals(here: Context, _: Platform) -> TotalsView:
    """Sums over all accounts."""
    totals = await here.ledger.read(views.totals)
    return TotalsView.model_validate(asdict(totals))


@router.post("/accounts", status_code=201, responses=errors(400, 403, 409, 413, 503))
async def open_account(here: Context, _: Platform, body: NewAccount) -> AccountView:
    """Open an account; nothing is sent to the chain."""
    id_ = await here.ledger.write(
        lambda tx: accounts.create_account(tx, here.ledger.platform, body.owner, here.label_salt, body.label)
    )
    return await _shown(here, id_)


@router.get("/accounts", responses=errors(403))
async def list_accounts(here: Context, _: Platform) -> list[AccountView]:
    """All accounts, oldest first."""
    return [account_view(record) for record in await here.ledger.read(views.accounts)]


@router.get("/accounts/{account}", responses=errors(400, 403, 404))
async def get_account(here: Context, who: Anyone, account: Hash32) -> AccountView:
    """One account and its money."""
    who.require_account(account)
    return await _shown(here, account)


@router.post("/accounts/{account}/keys", status_code=201, responses=errors(400, 403, 404, 413, 503))
async def make_key(here: Context, _: Platform, account: Hash32, body: NewKey) -> KeyView:
    """Make an API key of an account."""
    await _shown(here, account)
    secret = keys.new_secret()
    expires_at = None if body.expires_at is None else body.expires_at * 1000
    key = await here.ledger.add_key(secret, account=account, name=body.name, expires_at=expires_at)
    return KeyView(id=key.id, key=secret, account=account, name=key.name, expires_at=body.expires_at)


@router.put("/accounts/{account}/policy", status_code=202, responses=errors(400, 403, 404, 413, 503))
async def put_policy(here: Context, _: Platform, account: Hash32, body: PolicyBody) -> AccountView:
    """Set an account's limits: here at once, on the chain once earlier calls have settled."""
    policy = Policy(**body.model_dump())
    await here.ledger.write(lambda tx: accounts.order_policy(tx, account, policy))
    here.ledger.captured.set()
    return await _shown(here, account)


@router.get("/accounts/{account}/statement", responses=errors(400, 403, 404))
async def get_statement(
    here: Context,
    who: Anyone,
    account: Hash32,
    after: Annotated[int, Query(ge=0, lt=2**40)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> StatementView:
    """What happened to an account on the chain, and what waits to."""
    who.require_account(account)
    await _shown(here, account)
    lines = await here.ledger.read(lambda c: views.statement(c, account, after, limit))
    unsettled = await here.ledger.read(
        lambda c: views.unsettled(c, here.ledger.chain_id, here.ledger.vault, account)
    )
    return StatementView(
        account=account,
        lines=[
            StatementLineView(
                entry=line.entry,
                event=line.event,
                amount=line.amount,
                charge_id=line.charge_id,
                receipt_id=line.receipt_id,
                transaction=line.transaction,
                block=line.block,
                timestamp=line.timestamp,
            )
            for line in lines
        ],
        unsettled=[receipt_view(call) for call in unsettled],
    )


@router.post("/charges", status_code=202, responses=errors(400, 402, 403, 404, 409, 413, 503))
async def make_charge(
    here: Context, who: Platform, request: Request, body: NewCharge, idempotency_key: IdempotencyKey
) -> ReceiptView:
    """Charge a call that was metered elsewhere. A repeat is answered whatever has changed since."""
    body_hash = bytes_hash(await request.body())
    receipt_id = await here.ledger.find_charge(idempotency_key=idempotency_key, body_hash=body_hash)
    if receipt_id is None:
        usage, card, amount = _priced(body, here.models)
        receipt_id = await here.calls.charge(
            Caller(body.account, who.key.id),
            model=body.model or "",
            card=card,
            amount=amount,
            metered=Metered(usage, body.usage, body_hash, _NOTHING_SENT),
            idempotency_key=idempotency_key,
        )
    return receipt_view(await _receipt(here, receipt_id))


@router.get("/receipts/{receipt_id}", responses=errors(404))
async def get_receipt(here: Context, who: Anyone, receipt_id: str) -> ReceiptView:
    """One call: its signed receipt and where its charge stands."""
    record = await _receipt(here, receipt_id[:_LONGEST_SHOWN])
    if not who.is_admin and record.account != who.key.account:
        raise ReceiptNotFound(receipt=receipt_id[:_LONGEST_SHOWN])
    return receipt_view(record)


@router.get("/calls", responses=errors(400, 403))
async def list_calls(
    here: Context,
    who: Anyone,
    account: Hash32 | None = None,
    status: CallStatus | None = None,
    complete: bool | None = None,
    before: ChargeId | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[ReceiptView]:
    """Calls, newest first; `status=lost` lists those that could not be metered.

    `complete=false` lists those charged for what was put out, as the provider's usage never came.
    With `before` = the last call's charge id comes the next page.
    """
    if not who.is_admin:
        who.require_account(account or str(who.key.account))
        account = who.key.account
    found = await here.ledger.read(
        lambda c: views.calls(
            c,
            here.ledger.chain_id,
            here.ledger.vault,
            account=account,
            state=status,
            complete=complete,
            before=before,
            limit=limit,
        )
    )
    return [receipt_view(call) for call in found]


def _priced(body: NewCharge, models: Models) -> tuple[Usage, RateCard | None, int]:
    if body.usage is None or body.model is None:
        return Usage(input_tokens=0, output_tokens=0), None, body.amount or 0
    try:
        usage = from_openai_chat(body.usage)
        canonical_hash(body.usage)
    except UsageUnreadable as error:
        raise InvalidRequest(reason=f"usage: {error.details['reason']}.", param="usage") from None
    except (ValueError, OverflowError):  # Python reads NaN, 1e999 and half surrogates
        raise InvalidRequest(reason="usage: it has values that are not JSON.", param="usage") from None
    card = models.find(body.model).card
    amount = prices.amount(usage, card)
    if amount == 0:
        raise InvalidRequest(reason="This usage costs nothing: there is nothing to charge.", param="usage")
    return usage, card, amount


def account_view(record: AccountRecord) -> AccountView:
    """An account as the interface shows it."""
    wallet: Wallet = record.wallet
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


def receipt_view(call: CallRecord) -> ReceiptView:
    """A call as the interface shows it."""
    at = call.settlement
    return ReceiptView(
        id=call.receipt_id,
        charge_id=call.charge_id,
        account=call.account,
        model=call.model,
        status=at.state,
        reason=at.reason,
        held=call.held,
        cost=None if call.receipt is None else call.receipt.receipt.amount,
        excess=call.excess,
        transaction=at.transaction,
        block=at.block,
        created_at=call.created_at,
        captured_at=at.captured_at,
        settled_at=at.settled_at,
        receipt=call.receipt,
    )
