"""Slots and attempts: the journal of what a lane sends. A slot's row is the allocation of its nonce."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from waterfall.chain.transactions import Broadcast, Fees, Signed
from waterfall.ledger import schema
from waterfall.ledger.journal import charge_id, now_ms, sequence_of
from waterfall.ledger.writer import Transaction
from waterfall.types import Charge, Policy


@dataclass(frozen=True, slots=True)
class Attempt:
    """One signed transaction for a slot."""

    signed: Signed
    fees: Fees
    state: str
    created_at: int


@dataclass(frozen=True, slots=True)
class Slot:
    """One nonce of one key, and what is sent under it."""

    signer: str
    nonce: int
    purpose: str
    reference: str | None
    target: str
    calldata: bytes
    gas: int
    deadline: int
    attempts: tuple[Attempt, ...] = ()


# ── Choosing work ────────────────────────────────────────────────────────────────────────────────────


def queued_charges(connection: sa.Connection, limit: int) -> list[Charge]:
    """The oldest charges waiting for a batch; those of accounts with a pending exit first."""
    table, wallets = schema.charges, schema.wallets
    query = (
        sa.select(table.c.epoch, table.c.sequence, table.c.account, table.c.amount, table.c.digest)
        .join(wallets, wallets.c.account == table.c.account)
        .where(table.c.state == "queued")
        .order_by(sa.case((wallets.c.exit_amount != 0, 0), else_=1), table.c.sequence)
        .limit(limit)
    )
    return [_charge(row) for row in connection.execute(query)]


def due_policy(connection: sa.Connection) -> tuple[int, str, Policy] | None:
    """The oldest policy order with nothing under way before it: id, account, policy."""
    orders, holds, charges = schema.policy_orders, schema.holds, schema.charges
    open_holds = sa.exists().where(
        holds.c.account == orders.c.account,
        holds.c.sequence <= orders.c.after_sequence,
        holds.c.state == "held",
    )
    open_charges = sa.exists().where(
        charges.c.account == orders.c.account,
        charges.c.sequence <= orders.c.after_sequence,
        charges.c.state.in_(("queued", "batched")),
    )
    query = (
        sa.select(orders).where(orders.c.state == "waiting", ~open_holds, ~open_charges).order_by(orders.c.id)
    )
    row = connection.execute(query.limit(1)).one_or_none()
    return None if row is None else (row.id, row.account, Policy.model_validate_json(row.policy))


# ── The journal ──────────────────────────────────────────────────────────────────────────────────────


def open_slot(tx: Transaction, slot: Slot, attempt: Attempt, charges: Sequence[Charge] = ()) -> None:
    """Journal a slot with its first attempt, and what it carries, before anything is broadcast."""
    tx.run(
        schema.slots.insert(),
        {
            "signer": slot.signer,
            "nonce": slot.nonce,
            "purpose": slot.purpose,
            "reference": slot.reference,
            "target": slot.target,
            "calldata": slot.calldata,
            "gas": slot.gas,
            "deadline": slot.deadline,
            "state": "open",
            "created_at": now_ms(),
        },
    )
    _add_attempt(tx, slot, attempt)
    if charges:
        table = schema.charges
        tx.run(
            table.update()
            .where(
                table.c.sequence == sa.bindparam("its_sequence"),
                table.c.state == "queued",
            )
            .values(state="batched", signer=slot.signer, nonce=slot.nonce),
            [{"its_sequence": sequence_of(charge.id)} for charge in charges],
        )
    if slot.purpose == "policy":
        orders = schema.policy_orders
        tx.run(orders.update().where(orders.c.id == int(slot.reference or 0)).values(state="sent"))


def renew_slot(tx: Transaction, slot: Slot, attempt: Attempt) -> None:
    """Journal a replacement before it is broadcast; from now on the slot stands for what that one carries."""
    table = schema.slots
    tx.run(
        table.update()
        .where(table.c.signer == slot.signer, table.c.nonce == slot.nonce)
        .values(calldata=slot.calldata, gas=slot.gas, deadline=slot.deadline)
    )
    _add_attempt(tx, slot, attempt)


def _add_attempt(tx: Transaction, slot: Slot, attempt: Attempt) -> None:
    tx.run(
        schema.attempts.insert(),
        {
            "tx_hash": attempt.signed.tx_hash,
            "signer": slot.signer,
            "nonce": slot.nonce,
            "raw": attempt.signed.raw,
            "max_fee": attempt.fees.max_fee,
            "priority_fee": attempt.fees.priority_fee,
            "state": attempt.state,
            "created_at": attempt.created_at,
        },
    )


def note_broadcast(tx: Transaction, attempt: Attempt, outcome: Broadcast, detail: str) -> None:
    """Keep what the nodes said. An attempt once accepted stays so."""
    table = schema.attempts
    tx.run(
        table.update()
        .where(table.c.tx_hash == attempt.signed.tx_hash, table.c.state != "accepted")
        .values(state=outcome.value, detail=detail or None)
    )


def close_slot(tx: Transaction, slot: Slot, *, tx_hash: str, block: int, succeeded: bool) -> int:
    """A slot's transaction was mined and its block is projected. How many of its charges go back to the queue.

    Whatever the block did not settle or reject is free for another batch: after a revert, all of it.
    """
    table, charges, orders = schema.slots, schema.charges, schema.policy_orders
    tx.run(
        table.update()
        .where(table.c.signer == slot.signer, table.c.nonce == slot.nonce)
        .values(state="mined" if succeeded else "reverted", tx_hash=tx_hash, block=block)
    )
    if slot.purpose == "policy":
        state = "done" if succeeded else "waiting"
        tx.run(orders.update().where(orders.c.id == int(slot.reference or 0)).values(state=state))
    return tx.run(
        charges.update()
        .where(charges.c.signer == slot.signer, charges.c.nonce == slot.nonce, charges.c.state == "batched")
        .values(state="queued")
    ).rowcount


# ── Reading it ───────────────────────────────────────────────────────────────────────────────────────


def first_open_slot(connection: sa.Connection, signer: str) -> Slot | None:
    """The slot in flight: the lowest open nonce of a key, with its attempts, newest first."""
    table, attempts = schema.slots, schema.attempts
    row = connection.execute(
        sa.select(table)
        .where(table.c.signer == signer, table.c.state == "open")
        .order_by(table.c.nonce)
        .limit(1)
    ).one_or_none()
    if row is None:
        return None
    sent = connection.execute(
        sa.select(attempts).where(attempts.c.signer == signer, attempts.c.nonce == row.nonce)
    ).all()
    return Slot(
        signer=row.signer,
        nonce=row.nonce,
        purpose=row.purpose,
        reference=row.reference,
        target=row.target,
        calldata=row.calldata,
        gas=row.gas,
        deadline=row.deadline,
        attempts=tuple(
            sorted(
                (
                    Attempt(Signed(a.raw, a.tx_hash), Fees(a.max_fee, a.priority_fee), a.state, a.created_at)
                    for a in sent
                ),
                key=lambda attempt: attempt.fees.max_fee,
                reverse=True,
            )
        ),
    )


def last_nonce(connection: sa.Connection, signer: str) -> int | None:
    """The highest nonce ever allocated to a key."""
    table = schema.slots
    return connection.execute(sa.select(sa.func.max(table.c.nonce)).where(table.c.signer == signer)).scalar()


def batched_charges(connection: sa.Connection, slot: Slot) -> list[Charge]:
    """The charges a slot carries that are not settled yet."""
    table = schema.charges
    query = sa.select(table).where(
        table.c.signer == slot.signer, table.c.nonce == slot.nonce, table.c.state == "batched"
    )
    return [_charge(row) for row in connection.execute(query.order_by(table.c.sequence))]


def _charge(row: Any) -> Charge:
    return Charge(
        account=row.account,
        id=charge_id(row.epoch, row.sequence),
        amount=row.amount,
        receipt_hash=row.digest,
    )
