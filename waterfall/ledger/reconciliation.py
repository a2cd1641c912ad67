"""A ledger held against itself: every sum against what it sums up, every charge against the events that moved it.

It is read only, within one snapshot, and by other words than those it was written with.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from waterfall.ledger import schema
from waterfall.ledger.journal import charge_id, epoch_of, sequence_of
from waterfall.ledger.projection import Block
from waterfall.ledger.slots import SET_ASIDE
from waterfall.ledger.snapshot import Identity
from waterfall.ledger.writer import Transaction
from waterfall.money import UNITS_PER_TOKEN_BASE_UNIT
from waterfall.receipts import Domain, receipt_digest
from waterfall.types import UsageReceipt

REBUILD = "run `waterfall rebuild`: it derives this anew"
RESTORE = (
    "the database is older than the chain: `waterfall restore` a newer backup, or run `waterfall rebuild`"
)
CONFLICT = (
    "two ledgers used one charge id: keep the database, find the other; "
    "`waterfall rebuild --accept-loss` writes the charge off"
)
DAMAGED = "rows were changed by hand or the disk: keep the database, `waterfall restore` a backup from before"
TAKEN = "its id was used by another charge"
"""Why a charge was written off whose id the chain has for another."""

_ENDS = ("Charged", "ChargeRejected", "ChargeVoided")


@dataclass(frozen=True, slots=True)
class Difference:
    """Two things that should be one."""

    subject: str
    """What it is about: an account, a charge, an event."""
    what: str
    kept: Any
    """What the ledger has."""
    expected: Any
    """What it should have, by what stands behind it."""
    todo: str


@dataclass
class Within:
    """What the comparison of a ledger with itself has found."""

    differences: list[Difference] = field(default_factory=list)
    charges: int = 0
    waiting: int = 0
    """Charges that are owed and not on the chain."""
    waiting_amount: int = 0
    unknown: int = 0
    """Charges on the chain that earlier ledgers of the platform made: their receipts are not here."""
    unknown_amount: int = 0
    earned: int = 0
    """What the events make of the platform's earnings."""


@dataclass(slots=True)
class _Ended:
    """What the newest event of a charge says."""

    name: str
    account: str | None
    amount: int | None
    digest: str | None
    block: int
    tx_hash: str


def head(connection: sa.Connection) -> Block | None:
    """The newest block projected."""
    table = schema.blocks
    row = connection.execute(sa.select(table).order_by(table.c.number.desc()).limit(1)).one_or_none()
    return None if row is None else Block(row.number, row.hash, row.timestamp)


def wallets(connection: sa.Connection) -> dict[str, dict[str, Any]]:
    """Every wallet, by account."""
    rows = connection.execute(sa.select(schema.wallets)).mappings()
    return {row["account"]: dict(row) for row in rows}


def events(connection: sa.Connection, first: int, last: int) -> dict[tuple[int, int], dict[str, Any]]:
    """The events kept of these blocks, by block and log index."""
    table = schema.events
    rows = connection.execute(sa.select(table).where(table.c.block.between(first, last))).mappings()
    return {(row["block"], row["log_index"]): dict(row) for row in rows}


def nonces(connection: sa.Connection) -> dict[str, int]:
    """The highest nonce ever allocated to each key."""
    table = schema.slots
    query = sa.select(table.c.signer, sa.func.max(table.c.nonce)).group_by(table.c.signer)
    return {row[0]: row[1] for row in connection.execute(query)}


def has_calls(connection: sa.Connection) -> bool:
    """Whether this ledger has made a single call."""
    return connection.execute(sa.select(schema.holds.c.sequence).limit(1)).first() is not None


def is_journal_lost(connection: sa.Connection) -> bool:
    """Whether the chain has charges of the platform, and this ledger, which has not made a single call, none of them."""
    any_charge = sa.select(schema.events.c.block).where(schema.events.c.name == "Charged").limit(1)
    return not has_calls(connection) and connection.execute(any_charge).first() is not None


def known_charges(reading: sa.Connection | Transaction) -> dict[int, tuple[str, int, str]]:
    """Every charge of the journal, by id: account, amount, digest of its receipt."""
    table = schema.charges
    query = sa.select(table.c.epoch, table.c.sequence, table.c.account, table.c.amount, table.c.digest)
    return {
        charge_id(row.epoch, row.sequence): (row.account, row.amount, row.digest)
        for row in _execute(reading, query)
    }


def unknown_charges(connection: sa.Connection) -> tuple[int, int]:
    """Charges on the chain of which the journal knows nothing, as earlier ledgers made them: how many, and how much."""
    known = known_charges(connection)
    unknown = [amount for id_, _, amount, _ in _charged(connection) if id_ not in known]
    return len(unknown), sum(unknown)


def write_off_conflicts(tx: Transaction) -> int:
    """Take charges for lost whose ids the chain has for others; how many."""
    table = schema.charges
    kept = known_charges(tx)
    lost = [
        {"its_sequence": sequence_of(id_)}
        for id_, *there in _charged(tx)
        if id_ in kept and kept[id_] != tuple(there)
    ]
    its = table.c.sequence == sa.bindparam("its_sequence")
    if lost:
        tx.run(table.update().where(its).values(state="voided", reason=TAKEN), lost)
    return len(lost)


def _charged(reading: sa.Connection | Transaction) -> Iterator[tuple[int, str, int, str]]:
    """Every charge on the chain: id, account, amount, digest of its receipt."""
    table = schema.events
    query = sa.select(table.c.charge_id, table.c.account, table.c.amount, table.c.data)
    for row in _execute(reading, query.where(table.c.name == "Charged")):
        yield int(row.charge_id), row.account, row.amount, json.loads(row.data)["receipt_hash"]


def _execute(reading: sa.Connection | Transaction, query: sa.Select[Any]) -> sa.CursorResult[Any]:
    return reading.run(query) if isinstance(reading, Transaction) else reading.execute(query)


def compare_within(connection: sa.Connection, of: Identity, epoch: int) -> Within:
    """Hold a ledger against itself.

    Args:
        connection: of one snapshot.
        of: what it is the ledger of.
        epoch: its charge ids'.
    """
    found = Within()
    newest = head(connection)
    ends = _compare_events(connection, found)
    owed = _compare_charges(connection, found, of, ends, -1 if newest is None else newest.number)
    for id_, end in ends.items():  # those of our charges were taken out
        if end.name == "Charged":
            if epoch_of(id_) == epoch:
                _differ(found, f"charge {id_}", "in the journal", None, end.amount, RESTORE)
            else:
                found.unknown += 1
                found.unknown_amount += end.amount or 0
    _compare_holds(connection, found, owed)
    return found


def _differ(found: Within, subject: str, what: str, kept: Any, expected: Any, todo: str = REBUILD) -> None:
    if kept != expected:
        found.differences.append(Difference(subject, what, kept, expected, todo))


# ── Events → wallets ─────────────────────────────────────────────────────────────────────────────────


def _compare_events(connection: sa.Connection, found: Within) -> dict[int, _Ended]:
    """Add up every account's events; the newest event of each charge."""
    table = schema.events
    balances: dict[str, int] = defaultdict(int)
    entries: dict[str, int] = defaultdict(int)
    ends: dict[int, _Ended] = {}
    query = sa.select(table).order_by(table.c.block, table.c.log_index)
    for row in connection.execute(query.execution_options(yield_per=5000)):
        data = json.loads(row.data)
        if row.account is not None:
            balances[row.account] += _moves(row.name, row.amount or 0, data)
            entries[row.account] = row.entry or entries[row.account]
        if row.source is not None:
            balances[row.source] -= row.amount or 0
            entries[row.source] = row.source_entry
        found.earned += _earns(row.name, row.amount or 0, data)
        if row.name in _ENDS:
            ends[int(row.charge_id)] = _Ended(
                row.name, row.account, row.amount, data.get("receipt_hash"), row.block, row.tx_hash
            )
    raises = schema.raises
    pending: dict[str, int] = defaultdict(int)
    for row in connection.execute(sa.select(raises.c.account, raises.c.amount)):
        pending[row.account] += row.amount
    for account, wallet in wallets(connection).items():
        _differ(found, f"account {account}", "balance", wallet["balance"], balances.pop(account, 0))
        _differ(found, f"account {account}", "entries", wallet["entries"], entries.get(account, 0))
        _differ(found, f"account {account}", "pending", wallet["pending"], pending.get(account, 0))
    for account, balance in balances.items():
        _differ(found, f"account {account}", "balance", None, balance)
    return ends


def _moves(name: str, amount: int, data: dict[str, str]) -> int:
    """By how much an event changes its account's balance."""
    match name:
        case "Deposited" | "Refunded" | "Allocated" | "ExitDrawn" | "ExitCancelled":
            return amount
        case "Charged" | "ExitRequested":
            return -amount
        case "ExitFinalized":
            return int(data["remainder"])
        case "ExitedWithConsent":
            return -int(data["tokens"]) * UNITS_PER_TOKEN_BASE_UNIT
        case _:
            return 0


def _earns(name: str, amount: int, data: dict[str, str]) -> int:
    """By how much an event changes the platform's earnings."""
    match name:
        case "Charged":
            return amount
        case "Refunded":
            return -amount
        case "EarningsWithdrawn":
            return -int(data["tokens"]) * UNITS_PER_TOKEN_BASE_UNIT
        case _:
            return 0


# ── Charges ──────────────────────────────────────────────────────────────────────────────────────────


def _compare_charges(
    connection: sa.Connection, found: Within, of: Identity, ends: dict[int, _Ended], newest: int
) -> dict[str, int]:
    """Hold every charge against its receipt, its hold and its events, and take those out; what accounts owe."""
    charges, holds, slots = schema.charges, schema.holds, schema.slots
    query = (
        sa.select(
            charges,
            holds.c.state.label("hold_state"),
            holds.c.account.label("hold_account"),
            holds.c.amount.label("held"),
            holds.c.epoch.label("hold_epoch"),
            slots.c.state.label("slot_state"),
        )
        .select_from(charges)
        .outerjoin(holds, holds.c.sequence == charges.c.sequence)
        .outerjoin(slots, sa.and_(slots.c.signer == charges.c.signer, slots.c.nonce == charges.c.nonce))
    )
    domain = Domain(of.chain_id, of.vault)
    owed: dict[str, int] = defaultdict(int)
    for row in connection.execute(query.execution_options(yield_per=5000)):
        id_ = charge_id(row.epoch, row.sequence)
        found.charges += 1
        if row.state in schema.UNSETTLED:
            owed[row.account] += row.amount
            found.waiting += 1
            found.waiting_amount += row.amount
        _compare_with_receipt(found, id_, row, domain, of)
        _compare_with_events(found, id_, row, ends.pop(id_, None), newest)
    return owed


def _compare_with_receipt(found: Within, id_: int, row: Any, domain: Domain, of: Identity) -> None:
    subject = f"charge {id_}"
    hold = row.hold_state, row.hold_account, row.hold_epoch
    _differ(found, subject, "its hold", hold, ("captured", row.account, row.epoch), DAMAGED)
    if row.held is not None and row.amount > row.held:
        _differ(found, subject, "amount within its hold", row.amount, row.held, DAMAGED)
    try:
        receipt = UsageReceipt.model_validate_json(row.receipt)
    except ValidationError:
        _differ(found, subject, "receipt", "unreadable", "a receipt", DAMAGED)
        return
    signed = receipt.platform, receipt.account, receipt.charge_id, receipt.amount, receipt.price_id
    kept = of.platform, row.account, id_, row.amount, row.price_id
    _differ(found, subject, "what its receipt says", kept, signed, DAMAGED)
    digest = "0x" + receipt_digest(domain, receipt).hex()
    _differ(found, subject, "digest of its receipt", row.digest, digest, DAMAGED)


def _compare_with_events(found: Within, id_: int, row: Any, end: _Ended | None, newest: int) -> None:
    subject = f"charge {id_}"
    name = "none" if end is None else end.name
    is_set_aside = row.state == "rejected" and (row.reason or "").startswith(SET_ASIDE)
    state = "queued" if is_set_aside else row.state  # of the chain, it is as one that waits
    expected: tuple[str, ...]
    match name:
        case "Charged":
            expected = ("settled", "final")
        case "ChargeVoided":
            expected = ("voided",)
        case "ChargeRejected":
            expected = ("rejected", "queued", "batched")
        case _:
            expected = ("queued", "batched") if row.amount else ("free",)
    if end is not None and end.name == "Charged":
        kept, there = (row.account, row.amount, row.digest), (end.account, end.amount, end.digest)
        if kept != there and (row.state, row.reason) == ("voided", TAKEN):
            return
        _differ(found, subject, "account, amount and receipt", kept, there, CONFLICT)
    if state not in expected:
        _differ(found, subject, f"state after {name}", row.state, " or ".join(expected))
    elif state in {"settled", "final", "voided", "rejected"} and end is not None:
        _differ(found, subject, "transaction", (row.block, row.tx_hash), (end.block, end.tx_hash))
        if row.block is not None and row.block > newest:
            _differ(found, subject, "block", row.block, f"at most {newest}")
    if row.state == "batched":
        _differ(found, subject, "slot that carries it", row.slot_state, "open")


# ── Holds and sums ───────────────────────────────────────────────────────────────────────────────────


def _compare_holds(connection: sa.Connection, found: Within, owed: dict[str, int]) -> None:
    holds, charges = schema.holds, schema.charges
    held: dict[str, int] = defaultdict(int)
    is_open = schema.is_(holds.c.state, "held")
    for row in connection.execute(sa.select(holds.c.account, holds.c.amount).where(is_open)):
        held[row.account] += row.amount
    for account, wallet in wallets(connection).items():
        _differ(found, f"account {account}", "held", wallet["held"], held.get(account, 0))
        _differ(found, f"account {account}", "unsettled", wallet["unsettled"], owed.get(account, 0))
    for id_ in _captured_without_charge(connection, holds, charges):
        _differ(found, f"charge {id_}", "in the journal", None, "captured", DAMAGED)


def _captured_without_charge(connection: sa.Connection, holds: sa.Table, charges: sa.Table) -> Iterator[int]:
    query = (
        sa.select(holds.c.epoch, holds.c.sequence)
        .outerjoin(charges, charges.c.sequence == holds.c.sequence)
        .where(holds.c.state == "captured", charges.c.sequence.is_(None))
    )
    for row in connection.execute(query):
        yield charge_id(row.epoch, row.sequence)
