"""The platform's own interface, under /api: accounts, keys, policies, statements, charges, receipts."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request

from waterfall.errors import InvalidRequest, ReceiptNotFound
from waterfall.gateway.access import Access, authenticate
from waterfall.gateway.calls import Calls, Metered
from waterfall.gateway.models import Model, Models
from waterfall.gateway.surfaces import API_OF
from waterfall.gateway.wire import (
    AccountView,
    CallStatus,
    EstimateBody,
    EstimateView,
    ForgottenView,
    KeyFacts,
    KeyView,
    NewAccount,
    NewCharge,
    NewKey,
    PlatformView,
    PolicyBody,
    ReceiptView,
    Rotation,
    StatementLineView,
    StatementView,
    TotalsView,
    account_view,
    errors,
    key_facts,
    receipt_view,
)
from waterfall.keccak import keccak
from waterfall.ledger import accounts, keys, views
from waterfall.ledger.journal import Caller, now_ms
from waterfall.ledger.keys import ApiKey
from waterfall.ledger.store import Ledger
from waterfall.ledger.views import CallRecord
from waterfall.metering import prices
from waterfall.metering.usage import UsageUnreadable, read
from waterfall.receipts import bytes_hash, canonical_hash
from waterfall.types import (
    Attribution,
    ChargeId,
    Hash32,
    KeyLimits,
    Name,
    Policy,
    RateCard,
    Tag,
    Usage,
)

_LONGEST_SHOWN = 80
"""Of a receipt's id that is asked for: longer than any, so that what is cut off makes none."""
_NOTHING_SENT = "0x" + keccak(b"").hex()

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
    return authenticate(here.ledger.keys, request.headers)


Anyone = Annotated[Access, Depends(_anyone)]


async def _platform(who: Anyone) -> Access:
    who.require_admin()
    return who


Platform = Annotated[Access, Depends(_platform)]

router = APIRouter(prefix="/api", responses=errors(401))
public = APIRouter(prefix="/api")
"""Routes without a key."""


async def _shown(here: Office, account: str) -> AccountView:
    return account_view(await here.ledger.read(lambda c: views.account(c, account)))


async def _receipt(here: Office, receipt_id: str) -> CallRecord:
    return await here.ledger.read(
        lambda c: views.call(c, receipt_id, here.ledger.chain_id, here.ledger.vault)
    )


@router.get("/platform")
async def get_platform(here: Context, _: Anyone) -> PlatformView:
    """Which platform this gateway serves."""
    head = here.ledger.view.head.block if here.ledger.view.head is not None else None
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
    limits = KeyLimits(**body.limits.model_dump())
    key = await here.ledger.keys.add(
        secret,
        account=account,
        name=body.name,
        expires_at=expires_at,
        limits=None if limits == KeyLimits() else limits,
    )
    return _fresh(key, secret)


@router.get("/accounts/{account}/keys", responses=errors(400, 403, 404))
async def list_keys(here: Context, _: Platform, account: Hash32) -> list[KeyFacts]:
    """An account's API keys, oldest first; what ended is among them."""
    await _shown(here, account)
    return await _key_facts(here, here.ledger.keys.of(account))


@router.delete("/keys/{key_id}", responses=errors(403, 404, 503))
async def revoke_key(here: Context, _: Platform, key_id: str) -> KeyFacts:
    """Revoke an account's API key: it opens nothing any more, at once here and within a second in other gateways."""
    (shown,) = await _key_facts(here, [await here.ledger.keys.revoke(key_id[:_LONGEST_SHOWN])])
    return shown


@router.post("/keys/{key_id}/rotate", status_code=201, responses=errors(400, 403, 404, 413, 503))
async def rotate_key(here: Context, _: Platform, key_id: str, body: Rotation) -> KeyView:
    """Put a fresh key in the place of one; the secret is shown only now."""
    secret = keys.new_secret()
    grace_ms = 1000 * body.grace_seconds
    key = await here.ledger.keys.rotate(key_id[:_LONGEST_SHOWN], secret, grace_ms=grace_ms)
    return _fresh(key, secret)


def _fresh(key: ApiKey, secret: str) -> KeyView:
    return KeyView(
        id=key.id,
        key=secret,
        account=str(key.account),
        name=key.name,
        expires_at=None if key.expires_at is None else key.expires_at // 1000,
        limits=key.limits or KeyLimits(),
    )


async def _key_facts(here: Office, its: list[ApiKey]) -> list[KeyFacts]:
    now = now_ms()
    return await here.ledger.read(lambda c: [key_facts(key, keys.spent(c, key, now)) for key in its])


@router.delete("/accounts/{account}/data", responses=errors(400, 403, 404, 409, 503))
async def forget_account(here: Context, _: Platform, account: Hash32) -> ForgottenView:
    """Erase all that only this platform knows of an account; once done, it may be done again.

    Its label, its API keys, the usage objects, keys and words of its calls. Amounts, receipts and the chain stay.
    """
    return ForgottenView(account=account, **asdict(await here.ledger.forget(account)))


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
        unsettled=[receipt_view(call, to_platform=who.is_admin) for call in unsettled],
    )


@router.post("/charges", status_code=202, responses=errors(400, 402, 403, 404, 409, 413, 503))
async def make_charge(
    here: Context, who: Platform, request: Request, body: NewCharge, idempotency_key: IdempotencyKey
) -> ReceiptView:
    """Charge a call that was metered elsewhere. A repeat is answered whatever has changed since."""
    body_hash = bytes_hash(await request.body())
    receipt_id = await here.ledger.find_charge(idempotency_key=idempotency_key, body_hash=body_hash)
    if receipt_id is None:
        usage, model, amount = _priced(body, here.models)
        receipt_id = await here.calls.charge(
            Caller(body.account, who.key.id, attribution=body.attribution),
            surface=None if model is None else body.surface,
            model=body.model or "",
            card=None if model is None else model.card,
            amount=amount,
            metered=Metered(usage, body.usage, body_hash, _NOTHING_SENT),
            idempotency_key=idempotency_key,
            vendor_cost=None if model is None else prices.amount(usage, model.vendor_card),
        )
    return receipt_view(await _receipt(here, receipt_id), to_platform=True)


@public.get("/prices/{price_id}", responses=errors(400, 404), openapi_extra={"security": []})
async def get_prices(here: Context, price_id: Hash32) -> RateCard:
    """The rate card that a receipt's `price_id` is the hash of: public, so that anyone can recompute the amount."""
    for model in here.models.all():
        if model.price_id == price_id:
            return model.card
    return await here.ledger.read(lambda c: views.rate_card(c, price_id))


@router.post("/estimate", responses=errors(400, 403, 404, 413))
async def estimate(here: Context, who: Anyone, body: EstimateBody) -> list[EstimateView]:
    """What a request may cost at most, of each of the models that may serve it. Nothing is sent and nothing is held."""
    account = body.account or who.key.account
    if account is not None:
        who.require_account(account)
    call = API_OF[body.surface].read(json.dumps(body.request, ensure_ascii=False).encode(errors="replace"))
    shown = []
    for name in call.models:
        model = here.models.serving(name, body.surface, account)
        bound = call.bound(model)
        shown.append(
            EstimateView(
                model=name,
                price_id=model.price_id,
                prices=model.card,
                maximum=bound.amount(bound.output_tokens),
                least=bound.amount(bound.least_output_tokens),
                max_output_tokens=bound.output_tokens,
            )
        )
    return shown


@router.get("/receipts/{receipt_id}", responses=errors(404))
async def get_receipt(here: Context, who: Anyone, receipt_id: str) -> ReceiptView:
    """One call: its signed receipt and where its charge stands."""
    record = await _receipt(here, receipt_id[:_LONGEST_SHOWN])
    if not who.is_admin and record.account != who.key.account:
        raise ReceiptNotFound(receipt=receipt_id[:_LONGEST_SHOWN])
    return receipt_view(record, to_platform=who.is_admin)


@router.get("/calls", responses=errors(400, 403))
async def list_calls(
    here: Context,
    who: Anyone,
    account: Hash32 | None = None,
    status: CallStatus | None = None,
    complete: bool | None = None,
    user: Name | None = None,
    agent: Name | None = None,
    team: Name | None = None,
    session: Name | None = None,
    tag: Annotated[list[Tag] | None, Query(max_length=20)] = None,
    before: ChargeId | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[ReceiptView]:
    """Calls, newest first; `status=lost` lists those that could not be metered.

    `complete=false` lists those charged for what was put out, as the provider's usage never came. With `user`, `agent`,
    `team`, `session` or `tag` come those that were made for all of these.
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
            attribution=Attribution(
                user=user, agent=agent, team=team, session=session, tags=tuple(tag or ())
            ),
            before=before,
            limit=limit,
        )
    )
    return [receipt_view(call, to_platform=who.is_admin) for call in found]


def _priced(body: NewCharge, models: Models) -> tuple[Usage, Model | None, int]:
    if body.usage is None or body.model is None:
        return Usage(input_tokens=0, output_tokens=0), None, body.amount or 0
    try:
        usage = read(body.surface, body.usage)
        canonical_hash(body.usage)
    except UsageUnreadable as error:
        raise InvalidRequest(reason=f"usage: {error.details['reason']}.", param="usage") from None
    except (ValueError, OverflowError):  # Python reads NaN, 1e999 and half surrogates
        raise InvalidRequest(reason="usage: it has values that are not JSON.", param="usage") from None
    model = models.serving(body.model, body.surface, body.account)
    amount = prices.amount(usage, model.card)
    if amount == 0:
        raise InvalidRequest(reason="This usage costs nothing: there is nothing to charge.", param="usage")
    return usage, model, amount
