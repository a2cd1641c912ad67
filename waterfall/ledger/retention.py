"""What is kept of calls for how long, and how all that only this ledger knows of an account is erased.

Amounts, receipts, their digests and what stands on the chain stay for ever: they are what can be proven.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from pydantic import Field

from waterfall.errors import AccountBusy, AccountNotFound
from waterfall.ledger import schema, shared
from waterfall.ledger.journal import lock_wallets
from waterfall.ledger.writer import Transaction
from waterfall.types import Frozen

_AT_ONCE = 1000
_HOUR_MS = 60 * 60 * 1000
_DAY_MS = 24 * _HOUR_MS
_SWEPT = "swept"
"""Fact of the ledger: the sequence up to which the round under way has come."""
_DONE = ("free", "final", "voided")
"""States of charges that nothing moves any more."""


class RetentionSettings(Frozen):
    """`[retention]`: for how many days what is kept; left out: for ever."""

    usage_days: int | None = Field(default=None, ge=1, strict=True)
    """The providers' usage objects of calls that are settled for good."""
    details_days: int | None = Field(default=None, ge=1, strict=True)
    """Which API key made a call, and the words in which one failed."""
    idempotency_days: int | None = Field(default=None, ge=1, strict=True)
    """The keys under which calls and charges were asked for: afterwards, a repeat is a new one."""
    answer_hours: int = Field(default=24, ge=0, strict=True)
    """For how many hours the answer to a call with an Idempotency-Key is kept, for its repeats; 0: none is."""


_DETAILS = ("api_key", "attribution", "reason")
_NO_DETAILS = dict.fromkeys((*_DETAILS, "budget", "budget_window"))


@dataclass(frozen=True, slots=True)
class Removed:
    """How much one sweep has removed."""

    usage: int = 0
    details: int = 0
    idempotency: int = 0
    answers: int = 0


def sweep(tx: Transaction, settings: RetentionSettings, now_ms: int) -> Removed:
    """Remove what is older than it is kept: a bounded part of it, and the next part at the next sweep.

    Args:
        tx: the transaction.
        settings: how long what is kept.
        now_ms: Unix milliseconds of the host's clock.
    """
    usage = details = 0
    if settings.usage_days is not None or settings.details_days is not None:
        usage, details = _sweep_calls(
            tx, _before(now_ms, settings.usage_days), _before(now_ms, settings.details_days)
        )
    idempotency = _sweep_keys(tx, _before(now_ms, settings.idempotency_days))
    answers = _sweep_answers(tx, now_ms - settings.answer_hours * _HOUR_MS)
    return Removed(usage, details, idempotency, answers)


def _before(now_ms: int, days: int | None) -> int:
    return 0 if days is None else now_ms - days * _DAY_MS


def _sweep_calls(tx: Transaction, usage_before: int, details_before: int) -> tuple[int, int]:
    """Go on with the round over all calls, oldest first, where the last sweep has ended; at its end, from the start."""
    holds, charges, meta = schema.holds, schema.charges, schema.meta
    after = tx.run(sa.select(meta.c.value).where(meta.c.key == _SWEPT)).scalar()
    query = (
        sa.select(
            holds.c.sequence,
            holds.c.created_at,
            holds.c.state,
            sa.or_(*(holds.c[name].is_not(None) for name in _DETAILS)).label("has_details"),
            charges.c.state.label("charge"),
            charges.c.usage.is_not(None).label("has_usage"),
        )
        .outerjoin(charges, charges.c.sequence == holds.c.sequence)
        .where(holds.c.sequence > int(after or 0))
        .order_by(holds.c.sequence)
        .limit(_AT_ONCE)
    )
    usage: list[int] = []
    details: list[int] = []
    rows = tx.run(query).all()
    for row in rows:
        if row.state == "held" or (row.charge is not None and row.charge not in _DONE):
            continue
        if row.has_usage and row.created_at < usage_before:
            usage.append(row.sequence)
        if row.has_details and row.created_at < details_before:
            details.append(row.sequence)
    _remove_usage(tx, usage)
    _remove_details(tx, details)
    newest = max(usage_before, details_before)
    at_the_end = len(rows) < _AT_ONCE or rows[-1].created_at >= newest
    reached = None if at_the_end else str(rows[-1].sequence)
    if reached != after:
        shared.publish(tx, {_SWEPT: reached})
    return len(usage), len(details)


def _remove_usage(tx: Transaction, sequences: Sequence[int]) -> None:
    table = schema.charges
    tx.run(table.update().where(schema.among(table.c.sequence, sequences)).values(usage=None))


def _remove_details(tx: Transaction, sequences: Sequence[int]) -> None:
    table = schema.holds
    tx.run(table.update().where(schema.among(table.c.sequence, sequences)).values(**_NO_DETAILS))
    attributed = schema.attributed
    tx.run(attributed.delete().where(schema.among(attributed.c.sequence, sequences)))


def _sweep_keys(tx: Transaction, before: int) -> int:
    table = schema.idempotency
    old = sa.select(table.c.scope, table.c.key).where(table.c.created_at < before).limit(_AT_ONCE)
    return (
        tx.run(table.delete().where(sa.tuple_(table.c.scope, table.c.key).in_(old))).rowcount if before else 0
    )


def _sweep_answers(tx: Transaction, before: int) -> int:
    table = schema.idempotency
    old = sa.select(table.c.scope, table.c.key).where(schema.has_answer, table.c.created_at < before)
    its = sa.tuple_(table.c.scope, table.c.key).in_(old.limit(_AT_ONCE))
    return tx.run(table.update().where(its).values(answer=None)).rowcount


# ── One account ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was erased of an account."""

    label: bool
    keys: int
    usage: int
    """Calls whose usage object there was."""
    details: int
    """Calls whose API key, or words, there were."""
    idempotency: int


def forget(tx: Transaction, account: str) -> Forgotten:
    """Erase all that only this ledger knows of an account: its label, API keys, usage objects, keys and words of calls.

    Raises:
        AccountNotFound
        AccountBusy: calls of it are running, or charges not settled.
    """
    wallets = lock_wallets(tx, [account])
    if not wallets:
        raise AccountNotFound(account=account)
    if wallets[0].held or wallets[0].unsettled:
        raise AccountBusy(account=account)
    accounts, keys, holds = schema.accounts, schema.api_keys, schema.holds
    charges, idempotency = schema.charges, schema.idempotency
    its_label = accounts.c.id == account, accounts.c.label.is_not(None)
    has_details = sa.or_(*(holds.c[name].is_not(None) for name in _DETAILS))
    its_calls = sa.select(holds.c.sequence).where(holds.c.account == account)
    its_usage = charges.c.sequence.in_(its_calls), charges.c.usage.is_not(None)
    attributed = schema.attributed
    tx.run(attributed.delete().where(attributed.c.sequence.in_(its_calls)))
    tx.run(schema.key_budgets.delete().where(schema.key_budgets.c.account == account))
    return Forgotten(
        label=tx.run(accounts.update().where(*its_label).values(label=None)).rowcount > 0,
        keys=tx.run(keys.delete().where(keys.c.account == account)).rowcount,
        usage=tx.run(charges.update().where(*its_usage).values(usage=None)).rowcount,
        details=tx.run(
            holds.update().where(holds.c.account == account, has_details).values(**_NO_DETAILS)
        ).rowcount,
        idempotency=tx.run(idempotency.delete().where(idempotency.c.sequence.in_(its_calls))).rowcount,
    )
