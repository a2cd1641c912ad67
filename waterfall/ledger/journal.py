"""The journal of calls: hold, capture, release; what the chain does not know yet.

Operations of the writer. Each is one atomic step over the hold's row and its account's wallet, and they keep
`held` = Σ open holds and `unsettled` = Σ charges not on the chain. Balances are the projection's.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from waterfall.errors import AccountNotFound, HoldNotOpen, IdempotencyConflict, LedgerError
from waterfall.ledger import schema
from waterfall.ledger.wallet import Wallet, authorise
from waterfall.ledger.writer import Transaction
from waterfall.metering.prices import Bound
from waterfall.types import Allowance, Policy, RateCard, SignedReceipt

SEQUENCE_BITS = 32
QUEUED_AGAIN = {"state": "queued", "reason": None, "block": None, "tx_hash": None, "settled_at": None}
"""A charge whose last attempt no longer says anything."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the account that pays, and the key that was shown (None: the platform itself)."""

    account: str
    api_key: str | None


@dataclass(frozen=True, slots=True)
class Hold:
    """Credit set aside for one call."""

    sequence: int
    charge_id: int
    receipt_id: str
    account: str
    amount: int
    """The provable maximum, credit units."""
    output_tokens: int
    """How much output it pays for."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A charge that was recorded."""

    sequence: int
    receipt_id: str
    amount: int
    balance: int
    """The account's balance once everything captured has settled."""


def now_ms() -> int:
    """Unix milliseconds of the host's clock."""
    return time.time_ns() // 1_000_000


# ── Wallets ──────────────────────────────────────────────────────────────────────────────────────────

_READ_WALLET = """
SELECT balance, pending, held, unsettled, "window", spent,
       max_per_charge, max_per_window, window_seconds, expires_at,
       allowance, allowance_spent, superseded, wanted
FROM wallets WHERE account = ?
"""


def read_wallet(tx: Transaction, account: str) -> Wallet:
    """The account's wallet.

    Raises:
        AccountNotFound
    """
    row = tx.hot(_READ_WALLET, (account,)).fetchone()
    if row is None:
        raise AccountNotFound(account=account)
    return wallet_of(account, *row)


def wallet_of(
    account: str,
    balance: str,
    pending: str,
    held: str,
    unsettled: str,
    window: int,
    spent: str,
    max_per_charge: str | None,
    max_per_window: str | None,
    window_seconds: int | None,
    expires_at: int | None,
    allowance: str | None,
    allowance_spent: str,
    superseded: str | None,
    wanted: str | None,
) -> Wallet:
    """A wallet from its row, as the database holds it."""
    policies = []
    if max_per_charge is not None or max_per_window is not None or expires_at is not None:
        policies.append(
            Policy(
                max_per_charge=None if max_per_charge is None else int(max_per_charge),
                max_per_window=None if max_per_window is None else int(max_per_window),
                window_seconds=window_seconds,
                expires_at=expires_at,
            )
        )
    allowances = [] if allowance is None else [Allowance.model_validate_json(allowance)]
    for entry in [] if superseded is None else json.loads(superseded):
        if "policy" in entry:
            policies.append(Policy.model_validate(entry["policy"]))
        else:
            allowances.append(Allowance.model_validate(entry["allowance"]))
    if wanted is not None:
        policies.append(Policy.model_validate_json(wanted))
    return Wallet(
        account=account,
        balance=int(balance),
        pending=int(pending),
        held=int(held),
        unsettled=int(unsettled),
        window_seconds=window_seconds,
        window=window,
        spent=int(spent),
        policies=tuple(policies),
        allowances=tuple(allowances),
        allowance_spent=int(allowance_spent),
    )


_RESERVE = "UPDATE wallets SET held = ?, unsettled = ? WHERE account = ?"


def _reserve(tx: Transaction, wallet: Wallet, *, held: int = 0, unsettled: int = 0) -> None:
    """Add to what is held and unsettled."""
    tx.hot(_RESERVE, (str(wallet.held + held), str(wallet.unsettled + unsettled), wallet.account))


# ── Hold → capture | release | lose ──────────────────────────────────────────────────────────────────

_INSERT_HOLD = """
INSERT INTO holds (epoch, receipt_id, account, api_key, model, amount, state, created_at, lease_until)
VALUES (?, ?, ?, ?, ?, ?, 'held', ?, ?)
"""


def hold(
    tx: Transaction,
    *,
    epoch: int,
    caller: Caller,
    model: str,
    bound: Bound,
    block_time: int,
    expiry_margin: int,
    lease_ms: int,
) -> Hold:
    """Check the wallet and set the call's provable maximum aside: one atomic step.

    Raises:
        AccountNotFound, PaymentRequired
    """
    wallet = read_wallet(tx, caller.account)
    output_tokens, amount = authorise(wallet, bound, block_time, expiry_margin)
    now = now_ms()
    receipt_id = secrets.token_hex(16)
    row = (epoch, receipt_id, caller.account, caller.api_key, model, str(amount), now, now + lease_ms)
    sequence = tx.hot(_INSERT_HOLD, row).lastrowid
    if sequence >> SEQUENCE_BITS:
        raise LedgerError(
            reason="this epoch's charge ids are used up: start a new epoch with `waterfall rebuild`"
        )
    _reserve(tx, wallet, held=amount)
    return Hold(sequence, charge_id(epoch, sequence), receipt_id, caller.account, amount, output_tokens)


def charge_id(epoch: int, sequence: int) -> int:
    """The vault's id of a charge: epoch ‖ sequence."""
    return epoch << SEQUENCE_BITS | sequence


def sequence_of(id_: int) -> int:
    """The sequence of a charge id."""
    return id_ & (1 << SEQUENCE_BITS) - 1


def epoch_of(id_: int) -> int:
    """The epoch of a charge id: which ledger made it."""
    return id_ >> SEQUENCE_BITS


_END_HOLD = "UPDATE holds SET state = ?, reason = ?, ended_at = ? WHERE sequence = ? AND state = 'held'"
_INSERT_CHARGE = """
INSERT INTO charges (sequence, epoch, account, amount, excess, digest, receipt, meter, signature, usage, price_id,
                     complete, state, captured_at)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


def capture(tx: Transaction, held: Hold, signed: SignedReceipt, excess: int = 0) -> Captured:
    """Turn a hold into a charge of what was metered; the rest of the hold is free again.

    An amount of zero is recorded and never goes to the chain (state `free`).

    Args:
        tx: the transaction.
        held: the open hold.
        signed: the receipt of the call; its amount is within the hold.
        excess: credit units metered beyond the hold, which the platform bears.

    Raises:
        HoldNotOpen
        ValueError: the amount exceeds the hold.
    """
    amount, now = signed.receipt.amount, now_ms()
    if amount > held.amount:
        raise ValueError(f"charge {held.charge_id} is larger than its hold")
    _end(tx, held, "captured", None, now)
    row = (
        held.sequence,
        epoch_of(signed.receipt.charge_id),
        held.account,
        str(amount),
        str(excess),
        signed.digest,
        signed.receipt.model_dump_json(),
        signed.meter,
        signed.signature,
        None if signed.usage is None else json.dumps(signed.usage),
        signed.receipt.price_id,
        signed.receipt.complete,
        "queued" if amount else "free",
        now,
    )
    tx.hot(_INSERT_CHARGE, row)
    wallet = read_wallet(tx, held.account)
    _reserve(tx, wallet, held=-held.amount, unsettled=amount)
    return Captured(held.sequence, held.receipt_id, amount, wallet.after_charges - amount)


def release(tx: Transaction, held: Hold, reason: str) -> None:
    """Give a whole hold back: the upstream was not reached, or answered without cost.

    Raises:
        HoldNotOpen
    """
    _give_back(tx, held, "released", reason)


def lose(tx: Transaction, held: Hold, reason: str) -> None:
    """Give a hold back whose call may have cost something that nobody can meter: listed and counted.

    Raises:
        HoldNotOpen
    """
    _give_back(tx, held, "lost", reason)


def _give_back(tx: Transaction, held: Hold, state: str, reason: str) -> None:
    _end(tx, held, state, reason, now_ms())
    _reserve(tx, read_wallet(tx, held.account), held=-held.amount)


def _end(tx: Transaction, held: Hold, state: str, reason: str | None, now: int) -> None:
    if tx.hot(_END_HOLD, (state, reason, now, held.sequence)).rowcount != 1:
        raise HoldNotOpen(receipt=held.receipt_id)


def renew(tx: Transaction, held: Hold, lease_ms: int) -> None:
    """Keep a running call's hold from being taken for abandoned."""
    tx.hot("UPDATE holds SET lease_until = ? WHERE sequence = ?", (now_ms() + lease_ms, held.sequence))


def keep_rate_card(tx: Transaction, price_id: str, card: RateCard) -> None:
    """Keep a rate card for as long as receipts name it."""
    tx.run(
        insert(schema.rate_cards)
        .values(price_id=price_id, card=card.model_dump_json())
        .on_conflict_do_nothing()
    )


# ── Charges metered elsewhere ────────────────────────────────────────────────────────────────────────


def charge(
    tx: Transaction,
    *,
    idempotency_key: str,
    scope: str,
    body_hash: str,
    order: Callable[[Transaction], Hold],
    sign: Callable[[Hold], SignedReceipt],
) -> str:
    """Hold and capture in one step, once per idempotency key; the receipt's id.

    Args:
        tx: the transaction.
        idempotency_key: the caller's.
        scope: whose keys these are.
        body_hash: hash of the request, so that a reused key is told apart from a repeat.
        order: makes the hold.
        sign: makes the receipt for it.

    Raises:
        IdempotencyConflict: the key was used with another body.
        AccountNotFound, PaymentRequired
    """
    seen = find_charge(tx.run, idempotency_key=idempotency_key, scope=scope, body_hash=body_hash)
    if seen is not None:
        return seen
    held = order(tx)
    capture(tx, held, sign(held))
    row: dict[str, Any] = {
        "scope": scope,
        "key": idempotency_key,
        "body_hash": body_hash,
        "sequence": held.sequence,
        "created_at": now_ms(),
    }
    tx.run(schema.idempotency.insert(), row)
    return held.receipt_id


def find_charge(
    execute: Callable[[sa.Executable], sa.CursorResult[Any]],
    *,
    idempotency_key: str,
    scope: str,
    body_hash: str,
) -> str | None:
    """The receipt's id of the charge that was made under this key, if there is one.

    Raises:
        IdempotencyConflict: the key was used with another body.
    """
    table = schema.idempotency
    query = (
        sa.select(table.c.body_hash, schema.holds.c.receipt_id)
        .join_from(table, schema.holds)
        .where(table.c.scope == scope, table.c.key == idempotency_key)
    )
    seen = execute(query).one_or_none()
    if seen is None:
        return None
    if seen.body_hash != body_hash:
        raise IdempotencyConflict
    return str(seen.receipt_id)


# ── Recovery ─────────────────────────────────────────────────────────────────────────────────────────


def lose_open_holds(tx: Transaction, reason: str, *, lease_before: int | None = None) -> int:
    """Close holds nobody works on any more; how many.

    At start every open hold is one whose process died: its call may have reached the upstream, so it is lost,
    never guessed. Later, those whose lease ran out before `lease_before` (Unix milliseconds).
    """
    table = schema.holds
    query = sa.select(table).where(table.c.state == "held")
    if lease_before is not None:
        query = query.where(table.c.lease_until < lease_before)
    rows = tx.run(query).all()
    for row in rows:
        lose(tx, Hold(row.sequence, 0, row.receipt_id, row.account, row.amount, 0), reason)
    return len(rows)


def retry_rejected(tx: Transaction, block_time: int) -> None:
    """Queue charges again that a window limit rejected and whose window has turned since.

    Those that another limit or the balance rejected are queued again when that changes, see `projection`.
    """
    table, wallets = schema.charges, schema.wallets
    query = (
        sa.select(table.c.sequence, table.c.amount, wallets)
        .join(wallets, wallets.c.account == table.c.account)
        .where(table.c.state == "rejected", table.c.reason == "max_per_window")
    )
    turned = [
        {"its_sequence": row.sequence}
        for row in tx.run(query)
        if row.window_seconds is None
        or (block_time // row.window_seconds > row.window and row.amount <= row.max_per_window)
    ]
    if turned:
        its = table.c.sequence == sa.bindparam("its_sequence")
        tx.run(table.update().where(its).values(**QUEUED_AGAIN), turned)


def recount(tx: Transaction) -> list[str]:
    """Derive every wallet's `held` and `unsettled` from the rows they sum up; accounts that differed.

    A difference is a defect: the caller reports it.
    """
    held = _sums(tx, schema.holds, schema.holds.c.state == "held")
    unsettled = _sums(tx, schema.charges, schema.charges.c.state.in_(schema.UNSETTLED))
    wallets = schema.wallets
    differing = []
    for row in tx.run(sa.select(wallets.c.account, wallets.c.held, wallets.c.unsettled)).all():
        sums = held.get(row.account, 0), unsettled.get(row.account, 0)
        if sums != (row.held, row.unsettled):
            differing.append(row.account)
            tx.run(
                wallets.update()
                .where(wallets.c.account == row.account)
                .values(held=sums[0], unsettled=sums[1])
            )
    return differing


def _sums(tx: Transaction, table: sa.Table, condition: sa.ColumnElement[bool]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for row in tx.run(sa.select(table.c.account, table.c.amount).where(condition)):
        sums[row.account] = sums.get(row.account, 0) + row.amount
    return sums
