"""Slots and attempts: the journal of what a lane sends. A slot's row is the allocation of its nonce."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from waterfall.chain.transactions import Broadcast, Fees, Signed
from waterfall.errors import EventsMissing, LedgerError
from waterfall.ledger import schema, shared
from waterfall.ledger.journal import charge_id, now_ms, sequence_of
from waterfall.ledger.writer import Transaction
from waterfall.types import Charge, Policy

SET_ASIDE = "reverted: "
"""How the reason begins of a charge that `set_aside` rejected; the vault's own reasons are other words."""


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


class WorkTaken(LedgerError):
    """Another lane was faster: {reason}."""

    code = "work_taken"


def _unsettled(*states: str) -> sa.ColumnElement[bool]:
    """Charges in these of the unsettled states."""
    return sa.and_(schema.is_unsettled, schema.charges.c.state.in_(states))


# ── Choosing work ────────────────────────────────────────────────────────────────────────────────────


def queued_charges(connection: sa.Connection, limit: int) -> list[Charge]:
    """The oldest charges waiting for a batch; those of accounts with a pending exit first."""
    table, wallets = schema.charges, schema.wallets
    columns = table.c.epoch, table.c.sequence, table.c.account, table.c.amount, table.c.digest
    oldest = sa.select(*columns).where(_unsettled("queued")).order_by(table.c.sequence).limit(limit)
    leaving = oldest.join(wallets, wallets.c.account == table.c.account).where(wallets.c.exit_amount != 0)
    chosen = {row.sequence: row for row in connection.execute(leaving)}
    if len(chosen) < limit:
        for row in connection.execute(oldest):
            chosen.setdefault(row.sequence, row)
    return [_charge(row) for row in list(chosen.values())[:limit]]


def count_queued(connection: sa.Connection, limit: int) -> int:
    """How many charges wait for a batch, no further than `limit`."""
    some = sa.select(schema.charges.c.sequence).where(_unsettled("queued")).limit(limit)
    return connection.execute(sa.select(sa.func.count()).select_from(some.subquery())).scalar_one()


@dataclass(frozen=True, slots=True)
class Backlog:
    """What settlement still has to bring to the chain. Rejected charges wait for their account."""

    count: int
    oldest: int | None
    """Sequence of the oldest."""
    captured_at: int | None
    """When that was captured, Unix milliseconds of the host's clock."""


def backlog(connection: sa.Connection) -> Backlog:
    """How much waits for the chain, and since when."""
    table = schema.charges
    waiting = _unsettled("queued", "batched")
    count = connection.execute(sa.select(sa.func.count()).select_from(table).where(waiting)).scalar_one()
    query = sa.select(table.c.sequence, table.c.captured_at).where(waiting)
    row = connection.execute(query.order_by(table.c.sequence).limit(1)).one_or_none()
    return Backlog(count, *((None, None) if row is None else row))


def due_policy(connection: sa.Connection, settled_by: int) -> tuple[int, str, Policy] | None:
    """The oldest policy order with nothing under way before it: id, account, policy.

    Args:
        connection: to read with.
        settled_by: calls made under the old policy count as settled if they were by this block.
    """
    orders, holds, charges = schema.policy_orders, schema.holds, schema.charges
    open_holds = sa.exists().where(
        holds.c.account == orders.c.account,
        holds.c.sequence <= orders.c.after_sequence,
        holds.c.state == "held",
    )
    open_charges = sa.exists().where(
        charges.c.account == orders.c.account,
        charges.c.sequence <= orders.c.after_sequence,
        sa.or_(
            charges.c.state.in_(("queued", "batched")),
            sa.and_(charges.c.state == "settled", charges.c.block > settled_by),
        ),
    )
    query = (
        sa.select(orders).where(orders.c.state == "waiting", ~open_holds, ~open_charges).order_by(orders.c.id)
    )
    row = connection.execute(query.limit(1)).one_or_none()
    return None if row is None else (row.id, row.account, Policy.model_validate_json(row.policy))


def waits_for_policy(connection: sa.Connection) -> bool:
    """Whether any policy order was not sent yet."""
    orders = schema.policy_orders
    return (
        connection.execute(sa.select(orders.c.id).where(orders.c.state == "waiting").limit(1)).first()
        is not None
    )


@dataclass(frozen=True, slots=True)
class Sweepable:
    """An account whose deposit address can be swept, as its owner and label are known."""

    account: str
    owner: str
    label_hash: str


def count_accounts(connection: sa.Connection, unknown_label: str) -> int:
    """How many accounts are known by owner and label; `unknown_label` stands for a label that is not."""
    table = schema.accounts
    query = sa.select(sa.func.count()).select_from(table).where(table.c.label_hash != unknown_label)
    return connection.execute(query).scalar_one()


def sweepable_accounts(connection: sa.Connection, unknown_label: str) -> list[Sweepable]:
    """Every account known by owner and label."""
    table = schema.accounts
    query = sa.select(table.c.id, table.c.owner, table.c.label_hash).where(
        table.c.label_hash != unknown_label
    )
    return [Sweepable(*row) for row in connection.execute(query)]


def in_flight(connection: sa.Connection, purpose: str) -> set[str]:
    """The references of all open slots of a purpose, whichever key they are of."""
    table = schema.slots
    query = sa.select(table.c.reference).where(table.c.state == "open", table.c.purpose == purpose)
    return {reference for reference in connection.execute(query).scalars() if reference is not None}


# ── The journal ──────────────────────────────────────────────────────────────────────────────────────


def open_slot(tx: Transaction, slot: Slot, attempt: Attempt, charges: Sequence[Charge] = ()) -> None:
    """Journal a slot with its first attempt, and take what it carries, before anything is broadcast.

    Raises:
        WorkTaken: some of it is not free any more; nothing is journalled.
    """
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
        wanted = schema.among(table.c.sequence, [sequence_of(charge.id) for charge in charges])
        taken = tx.run(
            table.update()
            .where(wanted, table.c.state == "queued")
            .values(state="batched", signer=slot.signer, nonce=slot.nonce)
        ).rowcount
        if taken != len(charges):
            raise WorkTaken(reason=f"{len(charges) - taken} of {len(charges)} charges are not queued")
    if slot.purpose == "policy":
        orders = schema.policy_orders
        order = orders.c.id == int(slot.reference or 0), orders.c.state == "waiting"
        if tx.run(orders.update().where(*order).values(state="sent")).rowcount != 1:
            raise WorkTaken(reason=f"policy order {slot.reference} does not wait")
    if slot.purpose == "sweep":
        table = schema.slots
        same = table.c.state == "open", table.c.purpose == "sweep", table.c.reference == slot.reference
        if tx.run(sa.select(sa.func.count()).select_from(table).where(*same)).scalar_one() != 1:
            raise WorkTaken(reason=f"a sweep of {slot.reference} is in flight")


def renew_slot(tx: Transaction, slot: Slot, attempt: Attempt, carried: Sequence[Charge] = ()) -> None:
    """Journal a replacement before it is broadcast; from now on the slot stands for what that one carries.

    What it does not carry any more is free for another batch: should an earlier attempt be mined after all, the vault
    skips what is settled by then.
    """
    table, charges = schema.slots, schema.charges
    tx.run(
        table.update()
        .where(table.c.signer == slot.signer, table.c.nonce == slot.nonce)
        .values(calldata=slot.calldata, gas=slot.gas, deadline=slot.deadline)
    )
    _add_attempt(tx, slot, attempt)
    others = ~schema.among(charges.c.sequence, [sequence_of(charge.id) for charge in carried])
    _give_back(tx, charges.c.signer == slot.signer, charges.c.nonce == slot.nonce, others)


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


@dataclass(frozen=True, slots=True)
class Mined:
    """Where a slot's transaction was mined."""

    tx_hash: str
    block: int
    block_hash: str
    succeeded: bool
    decided: frozenset[int] = frozenset()
    """Ids of the charges that it settled, or that were rejected in it, as its receipt's own logs say."""


def close_slot(tx: Transaction, slot: Slot, mined: Mined) -> int | None:
    """Close a slot whose transaction was mined. How many of its charges go back to the queue; None: not projected yet.

    Whatever the block did not settle or reject is free for another batch: after a revert, all of it. Until the
    projection has that very block, nobody knows what it did.

    Raises:
        EventsMissing: the projection has the block, and not all that the transaction did in it.
    """
    if not shared.is_projected(tx, mined.block, mined.block_hash):
        return None
    missing = [charge.id for charge in batched_charges(tx.run, slot) if charge.id in mined.decided]
    if missing:
        what = f"{mined.tx_hash} took charges {missing} in block {mined.block}, where no event told so"
        raise EventsMissing(what=what, after=mined.block - 1)
    table, charges, orders = schema.slots, schema.charges, schema.policy_orders
    tx.run(
        table.update()
        .where(table.c.signer == slot.signer, table.c.nonce == slot.nonce)
        .values(state="mined" if mined.succeeded else "reverted", tx_hash=mined.tx_hash, block=mined.block)
    )
    if slot.purpose == "policy":
        state = "done" if mined.succeeded else "waiting"
        tx.run(orders.update().where(orders.c.id == int(slot.reference or 0)).values(state=state))
    return _give_back(tx, charges.c.signer == slot.signer, charges.c.nonce == slot.nonce)


def forget_first(tx: Transaction, slot: Slot) -> bool:
    """Forget a slot whose nonce another transaction has taken, if that may be one that this ledger sent and forgot.

    A ledger that was restored or rebuilt has forgotten what it had under way (see `projection.forget_slots`), so the
    first nonces that it gives a key may be taken; once a slot of the key is closed, none of those can be left.
    """
    slots_, attempts, facts = schema.slots, schema.attempts, schema.meta
    forgot = tx.run(sa.select(facts.c.value).where(facts.c.key == shared.FORGOT_SLOTS)).scalar()
    closed = slots_.c.signer == slot.signer, slots_.c.state != "open"
    if forgot is None or tx.run(sa.select(slots_.c.nonce).where(*closed).limit(1)).first() is not None:
        return False
    for table in (attempts, slots_):
        tx.run(table.delete().where(table.c.signer == slot.signer, table.c.nonce == slot.nonce))
    if slot.purpose == "policy":
        orders = schema.policy_orders
        tx.run(orders.update().where(orders.c.id == int(slot.reference or 0)).values(state="waiting"))
    charges = schema.charges
    _give_back(tx, charges.c.signer == slot.signer, charges.c.nonce == slot.nonce)
    return True


def give_back(tx: Transaction, signer: str) -> int:
    """Let other keys settle what a key has in flight and will not see through; how many charges.

    Its slots stay open: should one of them be mined after all, the vault skips what is settled by then.
    """
    return _give_back(tx, schema.charges.c.signer == signer)


def give_back_others(tx: Transaction, signers: Sequence[str], opened_before: int) -> int:
    """The same for what keys have in flight that are none of these, since before a time (Unix milliseconds)."""
    charges, table = schema.charges, schema.slots
    forgotten = sa.exists().where(
        table.c.signer == charges.c.signer,
        table.c.nonce == charges.c.nonce,
        table.c.created_at < opened_before,
    )
    return _give_back(tx, charges.c.signer.not_in(signers), forgotten)


def _give_back(tx: Transaction, *conditions: sa.ColumnElement[bool]) -> int:
    table = schema.charges
    free = {"state": "queued", "signer": None, "nonce": None}  # a reorg must not give them back to the slot
    return tx.run(table.update().where(_unsettled("batched"), *conditions).values(**free)).rowcount


def set_aside(tx: Transaction, charge: Charge, reason: str) -> None:
    """A charge that no transaction carries, not even alone: it stays a debt until something of its account changes.

    The chain knows nothing of it, where it knows each charge that the vault rejected.
    """
    table = schema.charges
    tx.run(
        table.update()
        .where(table.c.sequence == sequence_of(charge.id), table.c.state == "queued")
        .values(state="rejected", reason=SET_ASIDE + reason)
    )


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


def batched_charges(execute: Callable[[sa.Executable], sa.CursorResult[Any]], slot: Slot) -> list[Charge]:
    """The charges a slot carries that are not settled yet."""
    table = schema.charges
    query = sa.select(table).where(
        _unsettled("batched"), table.c.signer == slot.signer, table.c.nonce == slot.nonce
    )
    return [_charge(row) for row in execute(query.order_by(table.c.sequence))]


def _charge(row: Any) -> Charge:
    return Charge(
        account=row.account,
        id=charge_id(row.epoch, row.sequence),
        amount=row.amount,
        receipt_hash=row.digest,
    )
