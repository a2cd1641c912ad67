"""The journal of calls: hold, capture, release; what the chain does not know yet.

Entries of the books. Each is one atomic step over the hold's row and its account's wallet, and they keep
`held` = Σ open holds and `unsettled` = Σ charges not on the chain. Balances are the projection's.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa

from waterfall.errors import CallRepeated, HoldNotOpen, IdempotencyConflict, LedgerError, PaymentRequired
from waterfall.ledger import schema
from waterfall.ledger.books import SEQUENCE_BITS, Books, Hold, Once
from waterfall.ledger.budgets import Draw
from waterfall.ledger.database import as_text
from waterfall.ledger.wallet import authorise, key_limits
from waterfall.ledger.writer import Transaction
from waterfall.metering import prices
from waterfall.metering.prices import Bound
from waterfall.types import Attribution, KeyLimits, RateCard, SignedReceipt, Surface, Usage, UsageReceipt

Execute = Callable[[sa.Executable], sa.CursorResult[Any]]
QUEUED_AGAIN = {"state": "queued", "reason": None, "block": None, "tx_hash": None, "settled_at": None}
"""A charge whose last attempt no longer says anything."""
_ABANDONED = "its call was abandoned"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the account that pays, and the key that was shown (None: the platform itself)."""

    account: str
    api_key: str | None
    limits: KeyLimits | None = None
    """The key's own."""
    budget: str | None = None
    """What its calls are counted by, where they are."""
    attribution: Attribution | None = None
    """Whom and what it asks for."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A charge that was recorded."""

    sequence: int
    receipt_id: str
    amount: int
    balance: int
    """The account's balance once everything captured has settled."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a repeat under an idempotency key is given."""

    once: Once
    media_type: str
    body: bytes


def now_ms() -> int:
    """Unix milliseconds of the host's clock."""
    return time.time_ns() // 1_000_000


# ── Hold → capture | release | lose ──────────────────────────────────────────────────────────────────


def hold(
    books: Books,
    *,
    epoch: int,
    caller: Caller,
    surface: Surface | None,
    model: str,
    bound: Bound,
    block_time: int,
    expiry_margin: int,
    lease_ms: int,
    receipt_id: str,
    sequence: int | None = None,
    once: Once | None = None,
    after: int | None = None,
) -> Hold:
    """Check the wallet and set the call's provable maximum aside: one atomic step.

    Args:
        books: where.
        epoch: the ledger's.
        caller: who asks.
        surface: in whose words the model is called.
        model: for people.
        bound: the provable maximum.
        block_time: timestamp of the newest block known.
        expiry_margin: seconds before a limit's expiry in which it counts as expired.
        lease_ms: after how long without a renewal the hold is taken for abandoned.
        receipt_id: random.
        sequence: drawn before; None: drawn here.
        once: the caller's idempotency key; a call under it that cost nothing may be made again.
        after: the sequence of the attempt for the same call that this one follows.

    Raises:
        AccountNotFound, PaymentRequired
        RateLimited, InvalidApiKey: by the key that was shown.
        CallRepeated: there is a call under the key.
        IdempotencyConflict: the key was used with another body.
    """
    seen = None if once is None else _seen_by_now(books, once)
    if seen is not None and seen.state != "released" and seen.sequence != after:
        raise CallRepeated(receipt=seen.receipt_id)
    wallet, limits = books.wallet(caller.account), caller.limits
    draw, key_left = None, None
    if limits is not None and caller.budget is not None:
        draw, used = books.turn(caller.budget, limits, counts_call=after is None)
        key_left = None if limits.budget is None else max(0, limits.budget - used)
    output_tokens, amount = authorise(
        wallet, bound, block_time, expiry_margin, key=key_limits(limits, key_left, books.now)
    )
    sequence = books.draw() if sequence is None else sequence
    held = Hold(sequence, charge_id(epoch, sequence), receipt_id, caller.account, amount, output_tokens, draw)
    books.open(
        held,
        epoch=epoch,
        api_key=caller.api_key,
        attribution=caller.attribution,
        surface=surface,
        model=model,
        lease_ms=lease_ms,
    )
    if once is not None:
        books.remember(once, held, again=seen is not None)
    return held


def _seen_by_now(books: Books, once: Once) -> sa.Row[Any] | None:
    """The hold that a key stands for, unless it is one of this commit's own.

    Raises:
        CallRepeated: it is.
        IdempotencyConflict
    """
    own = books.asked_under(once)
    if own is None:
        return _find(books.run, once)
    earlier, held = own
    if earlier.body_hash != once.body_hash:
        raise IdempotencyConflict
    raise CallRepeated(receipt=held.receipt_id)


def charge_id(epoch: int, sequence: int) -> int:
    """The vault's id of a charge: epoch ‖ sequence.

    Raises:
        LedgerError: the epoch has no more.
    """
    if sequence >> SEQUENCE_BITS:
        raise LedgerError(
            reason="this epoch's charge ids are used up: start a new epoch with `waterfall rebuild`"
        )
    return epoch << SEQUENCE_BITS | sequence


def sequence_of(id_: int) -> int:
    """The sequence of a charge id."""
    return id_ & (1 << SEQUENCE_BITS) - 1


def epoch_of(id_: int) -> int:
    """The epoch of a charge id: which ledger made it."""
    return id_ >> SEQUENCE_BITS


def capture(
    books: Books,
    held: Hold,
    signed: SignedReceipt,
    excess: int = 0,
    vendor_cost: int | None = None,
    answer: Answer | None = None,
) -> Captured:
    """Turn a hold into a charge of what was metered; the rest of the hold is free again.

    An amount of zero is recorded and never goes to the chain (state `free`).

    Args:
        books: where.
        held: the open hold.
        signed: the receipt of the call; its amount is within the hold.
        excess: credit units metered beyond the hold, which the platform bears.
        vendor_cost: credit units that the call cost the platform; None: nobody knows.
        answer: what a repeat of the call is given.

    Raises:
        HoldNotOpen
        ValueError: the amount exceeds the hold.
    """
    amount = signed.receipt.amount
    if amount > held.amount:
        raise ValueError(f"charge {held.charge_id} is larger than its hold")
    books.end(held, "captured", None)
    books.charge(held, amount, excess, vendor_cost, *_of_receipt(signed))
    if answer is not None:
        books.keep_answer(answer.once, answer.media_type, answer.body)
    return Captured(held.sequence, held.receipt_id, amount, books.wallet(held.account).after_charges)


def _of_receipt(signed: SignedReceipt) -> tuple[Any, ...]:
    return (
        signed.digest,
        signed.receipt.model_dump_json(),
        signed.meter,
        signed.signature,
        parts_of(signed.metered),
        None if signed.usage is None else _as_json(signed.usage),
        signed.receipt.price_id,
        int(signed.receipt.complete),
    )


_IN_RECEIPTS = frozenset({"input_tokens", "cached_input_tokens", "output_tokens", "reasoning_tokens"})


def parts_of(usage: Usage) -> str | None:
    """What was used and a receipt has no field for, as JSON; None: nothing."""
    parts = {name: value for name, value in usage.model_dump().items() if value and name not in _IN_RECEIPTS}
    return orjson.dumps(parts).decode() if parts else None


def usage_of(receipt: UsageReceipt, parts: str | None) -> Usage:
    """What was used, of a receipt and the parts beside it."""
    counts = {name: getattr(receipt, name) for name in _IN_RECEIPTS}
    return Usage(**counts, **({} if parts is None else orjson.loads(parts)))


def _as_json(usage: dict[str, Any]) -> str:
    try:
        return orjson.dumps(usage).decode()
    except TypeError:  # numbers beyond 64 bits, halves of characters: whatever the provider sent is kept
        return json.dumps(usage)


def release(books: Books, held: Hold, reason: str) -> None:
    """Give a whole hold back: the upstream was not reached, or answered without cost.

    Raises:
        HoldNotOpen
    """
    books.end(held, "released", as_text(reason))


def lose(books: Books, held: Hold, reason: str) -> None:
    """Give a hold back whose call may have cost something that nobody can meter: listed and counted.

    Raises:
        HoldNotOpen
    """
    books.end(held, "lost", as_text(reason))


def capture_again(
    books: Books,
    held: Hold,
    signed: SignedReceipt,
    excess: int = 0,
    vendor_cost: int | None = None,
    *,
    block_time: int | None,
    expiry_margin: int,
) -> Captured:
    """Capture what could not be captured as its hold was not open: charged before, or closed as abandoned.

    A capture that was answered by an error may have been durable all the same. And a hold is closed while its call
    runs on where the process stood still for longer than the lease: what was delivered is charged then too, if its
    account could have a hold of that amount now. Nothing keeps room for it any more, and what the vault would reject
    is a debt that blocks the account.

    Args:
        books: where.
        held: the hold that is not open.
        signed: the receipt of the call.
        excess: credit units metered beyond the hold, which the platform bears.
        vendor_cost: credit units that the call cost the platform; None: nobody knows.
        block_time: timestamp of the newest block known; None: none is.
        expiry_margin: seconds before a limit's expiry in which it counts as expired.

    Raises:
        HoldNotOpen: it was closed by its own call, or cannot be paid for any more.
        LedgerError: whether it can be, nobody knows while the chain has not been read.
    """
    holds, charges = schema.holds, schema.charges
    wallet = books.wallet(held.account)
    amount = signed.receipt.amount
    known = books.run(sa.select(charges.c.digest).where(charges.c.sequence == held.sequence)).scalar()
    if known == signed.digest:
        return Captured(held.sequence, held.receipt_id, amount, wallet.after_charges)
    its = holds.c.sequence == held.sequence, holds.c.state == "lost", holds.c.reason == _ABANDONED
    if known is not None or books.run(sa.select(holds.c.sequence).where(*its)).scalar() is None:
        raise HoldNotOpen(receipt=held.receipt_id)
    if block_time is None:
        raise LedgerError(reason="the chain has not been read yet")
    try:
        authorise(wallet, prices.fixed(amount), block_time, expiry_margin)
    except PaymentRequired:
        raise HoldNotOpen(receipt=held.receipt_id) from None
    columns = _of_receipt(signed)
    books.run(holds.update().where(*its).values(state="captured", reason=None, ended_at=books.now))
    books.charge(held, amount, excess, vendor_cost, *columns)
    return Captured(held.sequence, held.receipt_id, amount, wallet.after_charges)


def release_unanswered(books: Books, receipt_id: str, account: str, reason: str) -> None:
    """Release the hold of this receipt, if there is one: whoever asked for it was answered by an error, or is gone."""
    held = books.opened(receipt_id)
    if held is not None:
        release(books, held, reason)
        return
    holds = schema.holds
    its = holds.c.receipt_id == receipt_id, holds.c.state == "held"
    row = books.run(sa.select(holds).where(*its)).one_or_none()
    if row is not None:
        draw = None if row.budget is None else Draw(row.budget, row.budget_window)
        release(books, Hold(row.sequence, 0, receipt_id, account, row.amount, 0, draw), reason)


def renew(tx: Transaction, sequences: Sequence[int], lease_ms: int) -> None:
    """Keep the holds of running calls from being taken for abandoned."""
    table = schema.holds
    tx.run(
        table.update()
        .where(schema.among(table.c.sequence, sequences), schema.is_(table.c.state, "held"))
        .values(lease_until=schema.now_ms() + lease_ms)
    )


def keep_rate_card(tx: Transaction, price_id: str, card: RateCard) -> None:
    """Keep a rate card for as long as receipts name it."""
    tx.insert_new(schema.rate_cards, {"price_id": price_id, "card": card.model_dump_json()})


# ── Charges metered elsewhere ────────────────────────────────────────────────────────────────────────


def charge(
    books: Books,
    *,
    once: Once,
    order: Callable[[Books], Hold],
    signed: SignedReceipt,
    vendor_cost: int | None = None,
) -> str:
    """Hold and capture in one step, once per idempotency key; the receipt's id.

    Args:
        books: where.
        once: the caller's idempotency key.
        order: makes the hold.
        signed: the receipt for it.
        vendor_cost: credit units that the call cost the platform; None: nobody knows.

    Raises:
        IdempotencyConflict: the key was used with another body.
        AccountNotFound, PaymentRequired
    """
    seen = find_charge(books.run, once)
    if seen is not None:
        return seen
    held = order(books)
    capture(books, held, signed, vendor_cost=vendor_cost)
    books.remember(once, held)
    return held.receipt_id


def find_charge(execute: Execute, once: Once) -> str | None:
    """The receipt's id of the charge that was made under this key, if there is one.

    Raises:
        IdempotencyConflict: the key was used with another body.
    """
    seen = _find(execute, once)
    return None if seen is None else str(seen.receipt_id)


def _find(execute: Execute, once: Once) -> sa.Row[Any] | None:
    """The hold that a key stands for."""
    table, holds = schema.idempotency, schema.holds
    query = (
        sa.select(table.c.body_hash, holds.c.receipt_id, holds.c.sequence, holds.c.state)
        .join_from(table, holds)
        .where(table.c.scope == once.scope, table.c.key == once.key)
    )
    seen = execute(query).one_or_none()
    if seen is not None and seen.body_hash != once.body_hash:
        raise IdempotencyConflict
    return seen


def find_answer(execute: Execute, once: Once) -> Answer | None:
    """What a repeat under this key is given, if it is kept."""
    table = schema.idempotency
    its = table.c.scope == once.scope, table.c.key == once.key
    row = execute(sa.select(table.c.media_type, table.c.answer).where(*its, schema.has_answer)).one_or_none()
    return None if row is None else Answer(once, row.media_type, bytes(row.answer))


# ── Recovery ─────────────────────────────────────────────────────────────────────────────────────────


def lose_open_holds(tx: Transaction, reason: str) -> int:
    """Close every open hold; how many.

    For the start of a process that has the ledger for itself: their processes have died, and their calls may have
    reached the upstream, so they are lost, never guessed.
    """
    return _lose(tx, reason)


def lose_abandoned_holds(tx: Transaction) -> int:
    """Close the holds whose leases have run out; how many."""
    return _lose(tx, _ABANDONED, schema.holds.c.lease_until < schema.now_ms())


def _lose(tx: Transaction, reason: str, *conditions: sa.ColumnElement[bool]) -> int:
    table, wallets = schema.holds, schema.wallets
    open_ = (schema.is_(table.c.state, "held"), *conditions)
    accounts = tx.run(sa.select(table.c.account).where(*open_).distinct()).scalars().all()
    held = {row.account: row.held for row in lock_wallets(tx, accounts)} if accounts else {}
    query = sa.select(
        table.c.sequence, table.c.account, table.c.amount, table.c.budget, table.c.budget_window
    )
    query = query.where(*open_, schema.among(table.c.account, held)).with_for_update()
    rows = tx.run(query).all()  # a call may have renewed or ended its own meanwhile
    if not rows:
        return 0
    for row in rows:
        held[row.account] -= row.amount
    tx.run(
        table.update()
        .where(schema.among(table.c.sequence, [row.sequence for row in rows]))
        .values(state="lost", reason=reason, ended_at=now_ms())
    )
    tx.run(
        wallets.update()
        .where(wallets.c.account == sa.bindparam("its_account"))
        .values(held=sa.bindparam("its_held")),
        [{"its_account": account, "its_held": amount} for account, amount in held.items()],
    )
    _give_back(tx, rows)
    return len(rows)


def _give_back(tx: Transaction, holds: Sequence[sa.Row[Any]]) -> None:
    """Count holds no more against their keys' budgets, if their windows still are."""
    table, given = schema.key_budgets, Counter[Draw]()
    for row in holds:
        if row.budget is not None:
            given[Draw(row.budget, row.budget_window)] += row.amount
    for draw, amount in given.items():
        its = table.c.id == draw.budget, table.c.window == draw.window
        used = tx.run(sa.select(table.c.used).where(*its)).scalar()
        if used is not None:
            tx.run(table.update().where(*its).values(used=used - amount))


def lock_wallets(tx: Transaction, accounts: Collection[str] | None = None) -> Sequence[Any]:
    """The rows of these wallets, or of all, which nobody else may change until this transaction ends.

    Everybody locks them in the order of their accounts.
    """
    table = schema.wallets
    query = sa.select(table).order_by(table.c.account).with_for_update()
    return tx.run(query if accounts is None else query.where(schema.among(table.c.account, accounts))).all()


def retry_rejected(tx: Transaction, block_time: int) -> None:
    """Queue charges again that a window limit rejected and whose window has turned since.

    Those that another limit or the balance rejected are queued again when that changes, see `projection`.
    """
    table, wallets = schema.charges, schema.wallets
    query = (
        sa.select(
            table.c.sequence,
            table.c.amount,
            wallets.c.window_seconds,
            wallets.c.window,
            wallets.c.max_per_window,
        )
        .join(wallets, wallets.c.account == table.c.account)
        .where(
            schema.is_unsettled,
            table.c.state == "rejected",
            table.c.reason == "max_per_window",
        )
    )
    turned = [
        {"its_sequence": row.sequence}
        for row in tx.run(query)
        if row.window_seconds is None
        or (block_time // row.window_seconds > row.window and row.amount <= row.max_per_window)
    ]
    if turned:
        its = table.c.sequence == sa.bindparam("its_sequence"), table.c.state == "rejected"
        tx.run(table.update().where(*its).values(**QUEUED_AGAIN), turned)


def recount(tx: Transaction) -> list[str]:
    """Derive every wallet's `held` and `unsettled` from the rows they sum up; accounts that differed.

    A difference is a defect: the caller reports it.
    """
    wallets = lock_wallets(tx)
    held = _sums(tx, schema.holds, schema.is_(schema.holds.c.state, "held"))
    unsettled = _sums(tx, schema.charges, schema.is_unsettled)
    table = schema.wallets
    differing = []
    for row in wallets:
        sums = held.get(row.account, 0), unsettled.get(row.account, 0)
        if sums != (row.held, row.unsettled):
            differing.append(row.account)
            tx.run(
                table.update().where(table.c.account == row.account).values(held=sums[0], unsettled=sums[1])
            )
    return differing


def _sums(tx: Transaction, table: sa.Table, condition: sa.ColumnElement[bool]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for row in tx.run(sa.select(table.c.account, table.c.amount).where(condition)):
        sums[row.account] = sums.get(row.account, 0) + row.amount
    return sums
