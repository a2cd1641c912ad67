"""What the ledger shows of itself: accounts, statements, receipts, calls."""

import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from waterfall.chain.vault import deposit_address
from waterfall.errors import AccountNotFound, PriceNotFound, ReceiptNotFound
from waterfall.ledger import schema
from waterfall.ledger.database import as_text
from waterfall.ledger.journal import charge_id, sequence_of, usage_of
from waterfall.ledger.wallet import Wallet, wallet_of
from waterfall.receipts import NO_USAGE
from waterfall.types import Allowance, Attribution, Policy, RateCard, SignedReceipt, Surface, UsageReceipt


@dataclass(frozen=True, slots=True)
class AccountRecord:
    """An account: who it is, its wallet, and the policy that is asked for but not on the chain yet."""

    id: str
    owner: str
    label_hash: str
    label: str | None
    created_at: int
    wallet: Wallet
    entries: int
    """Lines in its statement on the chain."""
    policy: Policy
    wanted: Policy | None
    allowance: Allowance | None
    exit_amount: int
    exit_matures_at: int
    deposit_address: str


@dataclass(frozen=True, slots=True)
class Settlement:
    """Where a charge stands."""

    state: str
    """held, released, lost, free, queued, batched, settled, final or rejected."""
    reason: str | None
    transaction: str | None
    block: int | None
    captured_at: int | None
    settled_at: int | None


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call: its hold, and its receipt once it was captured."""

    receipt_id: str
    charge_id: int
    account: str
    surface: Surface | None
    model: str
    attribution: Attribution
    held: int
    excess: int
    """Metered beyond the hold: the platform's loss."""
    vendor_cost: int | None
    """What the call cost the platform; None: not known, or nothing is charged."""
    created_at: int
    settlement: Settlement
    receipt: SignedReceipt | None


@dataclass(frozen=True, slots=True)
class StatementLine:
    """One chain event of an account."""

    entry: int
    event: str
    amount: int | None
    charge_id: str | None
    receipt_id: str | None
    transaction: str
    block: int
    timestamp: int
    """Block time."""


def account(connection: sa.Connection, id_: str) -> AccountRecord:
    """One account.

    Raises:
        AccountNotFound
    """
    found = accounts(connection, schema.accounts.c.id == as_text(id_))
    if not found:
        raise AccountNotFound(account=id_)
    return found[0]


def accounts(connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> list[AccountRecord]:
    """All accounts that meet the conditions, oldest first."""
    table, wallets = schema.accounts, schema.wallets
    vault = connection.execute(
        sa.select(schema.meta.c.value).where(schema.meta.c.key == "vault")
    ).scalar_one()
    query = (
        sa.select(table, wallets).join(wallets).where(*conditions).order_by(table.c.created_at, table.c.id)
    )
    return [
        AccountRecord(
            id=row["id"],
            owner=row["owner"],
            label_hash=row["label_hash"],
            label=row["label"],
            created_at=row["created_at"],
            wallet=wallet_of(row["id"], *(row[name] for name in Wallet.COLUMNS)),
            entries=row["entries"],
            policy=Policy(**{name: row[name] for name in Policy.model_fields}),
            wanted=None if row["wanted"] is None else Policy.model_validate_json(row["wanted"]),
            allowance=None if row["allowance"] is None else Allowance.model_validate_json(row["allowance"]),
            exit_amount=row["exit_amount"],
            exit_matures_at=row["exit_matures_at"],
            deposit_address=deposit_address(vault, row["id"]),
        )
        for row in connection.execute(query).mappings()
    ]


_CALLS = (
    sa.select(
        schema.holds.c.sequence,
        schema.holds.c.epoch,
        schema.holds.c.receipt_id,
        schema.holds.c.account,
        schema.holds.c.surface,
        schema.holds.c.model,
        schema.holds.c.attribution,
        schema.holds.c.amount.label("held"),
        schema.holds.c.state.label("hold_state"),
        schema.holds.c.reason.label("hold_reason"),
        schema.holds.c.created_at,
        schema.charges.c.excess,
        schema.charges.c.vendor_cost,
        schema.charges.c.digest,
        schema.charges.c.receipt,
        schema.charges.c.meter,
        schema.charges.c.signature,
        schema.charges.c.parts,
        schema.charges.c.usage,
        schema.charges.c.state,
        schema.charges.c.reason,
        schema.charges.c.block,
        schema.charges.c.tx_hash,
        schema.charges.c.captured_at,
        schema.charges.c.settled_at,
        schema.rate_cards.c.card,
    )
    .select_from(schema.holds)
    .outerjoin(schema.charges, schema.charges.c.sequence == schema.holds.c.sequence)
    .outerjoin(schema.rate_cards, schema.rate_cards.c.price_id == schema.charges.c.price_id)
)


def call(connection: sa.Connection, receipt_id: str, chain_id: int, vault: str) -> CallRecord:
    """One call by its receipt's id.

    Raises:
        ReceiptNotFound
    """
    row = connection.execute(_CALLS.where(schema.holds.c.receipt_id == as_text(receipt_id))).one_or_none()
    if row is None:
        raise ReceiptNotFound(receipt=receipt_id)
    return _call(row, chain_id, vault)


def settlement(connection: sa.Connection, sequence: int) -> tuple[str, str | None]:
    """Where a charge stands, and the transaction that brought it there."""
    charges = schema.charges
    query = sa.select(charges.c.state, charges.c.tx_hash).where(charges.c.sequence == sequence)
    row = connection.execute(query).one()
    return row.state, row.tx_hash


def rate_card(connection: sa.Connection, price_id: str) -> RateCard:
    """The prices behind a receipt's price id.

    Raises:
        PriceNotFound
    """
    cards = schema.rate_cards
    card = connection.execute(sa.select(cards.c.card).where(cards.c.price_id == price_id)).scalar()
    if card is None:
        raise PriceNotFound(price_id=price_id)
    return RateCard.model_validate_json(card)


def calls(
    connection: sa.Connection,
    chain_id: int,
    vault: str,
    *,
    account: str | None = None,
    state: str | None = None,
    complete: bool | None = None,
    attribution: Attribution = Attribution(),  # noqa: B008 - it is frozen
    before: int | None = None,
    limit: int = 100,
) -> list[CallRecord]:
    """Calls, newest first.

    Args:
        connection: to read with.
        chain_id: of the ledger.
        vault: of the ledger.
        account: whose.
        state: where they stand.
        complete: whether their usage came.
        attribution: whom and what they are for, all of it.
        before: made before the one with this charge id.
        limit: how many.
    """
    query = _CALLS.order_by(schema.holds.c.sequence.desc()).limit(limit)
    if account is not None:
        query = query.where(schema.holds.c.account == as_text(account))
    if state in {"held", "released", "lost"}:
        query = query.where(schema.holds.c.state == state)
    elif state is not None:
        query = query.where(schema.charges.c.state == state)
    if complete is not None:
        query = query.where(schema.charges.c.complete == int(complete))
    for pair in attribution.pairs:
        its = schema.attributed.c
        found = sa.select(its.sequence).where(its.name == pair[0], its.value == pair[1])
        query = query.where(schema.holds.c.sequence.in_(found))
    if before is not None:
        query = query.where(schema.holds.c.sequence < sequence_of(before))
    return [_call(row, chain_id, vault) for row in connection.execute(query)]


def unsettled(connection: sa.Connection, chain_id: int, vault: str, account: str) -> list[CallRecord]:
    """An account's charges that are not on the chain yet, newest first."""
    waiting = (
        schema.charges.c.account == account,
        schema.is_unsettled,
    )
    query = _CALLS.where(*waiting).order_by(schema.holds.c.sequence.desc())
    return [_call(row, chain_id, vault) for row in connection.execute(query)]


def _call(row: Any, chain_id: int, vault: str) -> CallRecord:
    receipt = None
    if row.receipt is not None:
        of = UsageReceipt.model_validate_json(row.receipt)
        receipt = SignedReceipt(
            id=row.receipt_id,
            chain_id=chain_id,
            vault=vault,
            receipt=of,
            digest=row.digest,
            meter=row.meter,
            signature=row.signature,
            surface=row.surface,
            metered=usage_of(of, row.parts),
            usage=None if row.usage is None else json.loads(row.usage),
            usage_removed=row.usage is None and of.usage_hash != NO_USAGE,
            rate_card=None if row.card is None else RateCard.model_validate_json(row.card),
        )
    return CallRecord(
        receipt_id=row.receipt_id,
        charge_id=charge_id(row.epoch, row.sequence),
        account=row.account,
        surface=row.surface,
        model=row.model,
        attribution=Attribution.model_validate_json(row.attribution or "{}"),
        held=row.held,
        excess=row.excess or 0,
        vendor_cost=row.vendor_cost,
        created_at=row.created_at,
        settlement=Settlement(
            state=row.state or row.hold_state,
            reason=row.reason or row.hold_reason,
            transaction=row.tx_hash,
            block=row.block,
            captured_at=row.captured_at,
            settled_at=row.settled_at,
        ),
        receipt=receipt,
    )


def statement(connection: sa.Connection, account_: str, after: int, limit: int) -> list[StatementLine]:
    """The account's lines on the chain, from line number `after` + 1 on, in order."""
    events = schema.events
    query = (
        sa.select(events)
        .where(
            sa.or_(
                sa.and_(events.c.account == account_, events.c.entry > after),
                sa.and_(events.c.source == account_, events.c.source_entry > after),
            )
        )
        .order_by(events.c.block, events.c.log_index)
        .limit(limit)
    )
    rows = connection.execute(query).all()
    receipts = _receipt_ids(connection, [int(row.charge_id) for row in rows if row.charge_id is not None])
    return [
        StatementLine(
            entry=row.source_entry if row.source == account_ else row.entry,
            event="AllocatedAway" if row.source == account_ else row.name,
            amount=row.amount,
            charge_id=row.charge_id,
            receipt_id=receipts.get(int(row.charge_id)) if row.charge_id is not None else None,
            transaction=row.tx_hash,
            block=row.block,
            timestamp=row.timestamp,
        )
        for row in rows
    ]


def _receipt_ids(connection: sa.Connection, charge_ids: list[int]) -> dict[int, str]:
    holds = schema.holds
    sequences = [sequence_of(id_) for id_ in charge_ids]
    query = sa.select(holds.c.epoch, holds.c.sequence, holds.c.receipt_id).where(
        schema.among(holds.c.sequence, sequences)
    )
    return {charge_id(row.epoch, row.sequence): row.receipt_id for row in connection.execute(query)}


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the whole ledger, in credit units, and counts by state."""

    balance: int
    held: int
    unsettled: int
    excess: int
    """Metered beyond holds: the platform's loss."""
    incomplete: int
    """Charges without the provider's usage."""
    calls: dict[str, int]


def totals(connection: sa.Connection) -> Totals:
    """What the ledger holds in all."""
    wallets, holds, charges = schema.wallets, schema.holds, schema.charges
    rows = connection.execute(sa.select(wallets.c.balance, wallets.c.held, wallets.c.unsettled)).all()
    counts: dict[str, int] = {}
    for table in (holds, charges):
        query = sa.select(table.c.state, sa.func.count()).group_by(table.c.state)
        counts |= {state: count for state, count in connection.execute(query) if state != "captured"}
    excess = connection.execute(sa.select(charges.c.excess).where(schema.is_beyond_hold)).scalars()
    incomplete = sa.select(sa.func.count()).select_from(charges).where(charges.c.complete == 0)
    return Totals(
        balance=sum(r.balance for r in rows),
        held=sum(r.held for r in rows),
        unsettled=sum(r.unsettled for r in rows),
        excess=sum(excess),
        incomplete=connection.execute(incomplete).scalar_one(),
        calls=counts,
    )


def transactions(connection: sa.Connection) -> dict[str, int]:
    """How many transactions the lanes have sent, by what became of each, and in how many attempts."""
    slots, attempts = schema.slots, schema.attempts
    query = sa.select(slots.c.state, sa.func.count()).group_by(slots.c.state)
    counts = {state: count for state, count in connection.execute(query)}  # noqa: C416 - rows, not tuples
    tries = connection.execute(sa.select(sa.func.count()).select_from(attempts)).scalar_one()
    return {**counts, "attempts": tries}
