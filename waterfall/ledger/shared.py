"""What the processes of one ledger tell each other through it: a few facts by name.

Clocks are not compared: that the chain's head was seen again, a process knows by a beat that it has not seen before.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from waterfall.errors import LedgerError
from waterfall.ledger import schema
from waterfall.ledger.projection import Block
from waterfall.ledger.writer import Transaction

EPOCH, VIEW, BEAT, KEYS, MISMATCH, REFUSAL = "epoch", "view", "beat", "keys", "mismatch", "refusal"
FIRST_BLOCK = "first_block"
FORGOT_SLOTS = "forgot_slots"
PROBE = "probe"
"""Written to see that it can be."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What is known to all."""

    head: Block | None = None
    """The newest block projected."""
    view: int = 0
    """Counts the moves of `head`, forwards and back."""
    beat: str | None = None
    """Changes whenever a node has shown that `head` is still the newest."""
    keys: str | None = None
    """Changes whenever API keys do."""
    mismatch: str | None = None
    refusal: str | None = None
    epoch: int = 0
    first_block: str | None = None
    """Hash of the chain's block 0, which tells another chain of the same id from a node that is behind."""
    has_queued: bool = False
    """Whether charges wait to be settled."""
    read_at: float = float("-inf")
    """`time.monotonic()` before it was read: what was written later, it may not show."""


def read(connection: sa.Connection) -> Shared:
    """What is known now."""
    read_at = time.monotonic()
    meta, blocks, charges = schema.meta, schema.blocks, schema.charges
    facts = {row.key: row.value for row in connection.execute(sa.select(meta))}
    row = connection.execute(sa.select(blocks).order_by(blocks.c.number.desc()).limit(1)).one_or_none()
    queued = sa.select(charges.c.sequence).where(schema.is_unsettled, charges.c.state == "queued").limit(1)
    return Shared(
        head=None if row is None else Block(row.number, row.hash, row.timestamp),
        view=int(facts[VIEW]),
        beat=facts.get(BEAT),
        keys=facts.get(KEYS),
        mismatch=facts.get(MISMATCH),
        refusal=facts.get(REFUSAL),
        epoch=int(facts[EPOCH]),
        first_block=facts.get(FIRST_BLOCK),
        has_queued=connection.execute(queued).scalar() is not None,
        read_at=read_at,
    )


def publish(tx: Transaction, facts: Mapping[str, str | None]) -> None:
    """Tell all; None takes a fact back."""
    table = schema.meta
    for key, value in facts.items():
        its = table.c.key == key
        if value is None:
            tx.run(table.delete().where(its))
        elif tx.run(table.update().where(its).values(value=value)).rowcount == 0:
            tx.insert_new(table, {"key": key, "value": value})


def hold_view(tx: Transaction, known: int | None = None) -> None:
    """Let nobody move the projected head until this transaction ends; its first step, as everybody takes them in order.

    Args:
        tx: the transaction.
        known: how many moves this process knows of; None: any.

    Raises:
        LedgerError: another process has moved it since.
    """
    table = schema.meta
    view = tx.run(sa.select(table.c.value).where(table.c.key == VIEW).with_for_update()).scalar_one()
    if known is not None and int(view) != known:
        raise LedgerError(reason="another process has moved the projection's head")


def move_view(tx: Transaction, known: int, head: Block | None = None) -> None:
    """Count a move of the projected head, as the first step of it: two processes never both make the same one.

    Args:
        tx: the transaction.
        known: how many moves this process knows of.
        head: from which block the move was planned, where that was some time before; None: not checked.

    Raises:
        LedgerError: another process has moved it since.
    """
    hold_view(tx, known)
    publish(tx, {VIEW: str(known + 1)})
    blocks = schema.blocks
    newest = tx.run(sa.select(blocks.c.hash).order_by(blocks.c.number.desc()).limit(1)).scalar()
    if head is not None and newest != head.hash:
        raise LedgerError(
            reason="another process has moved the projection's head while this move was planned"
        )


def is_projected(tx: Transaction, number: int, hash_: str) -> bool:
    """Whether this block is part of the projection; if so, it stays that until the transaction ends."""
    hold_view(tx)
    blocks = schema.blocks
    known = tx.run(sa.select(blocks.c.hash).where(blocks.c.number == number)).scalar()
    if known is not None:
        return bool(known == hash_)
    oldest = tx.run(sa.select(sa.func.min(blocks.c.number))).scalar()
    return oldest is not None and number < oldest  # final: no hash is kept of it


def keep_mismatches(tx: Transaction, mismatches: Sequence[str]) -> None:
    """Keep the first, which is what a person has to look at first."""
    for mismatch in mismatches[:1]:
        tx.insert_new(schema.meta, {"key": MISMATCH, "value": mismatch})
