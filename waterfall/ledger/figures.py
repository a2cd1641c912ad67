"""The ledger at a glance: what is under way and what was lost, read from the indices of exactly that.

Nothing here grows with the number of calls ever made. Amounts are summed as floats: a picture of money for people, by
which nothing is decided.
"""

from dataclasses import dataclass

import sqlalchemy as sa

from waterfall.ledger import schema
from waterfall.ledger.projection import Block


@dataclass(frozen=True, slots=True)
class Count:
    """How many, and how much they are together, in credit units."""

    number: int = 0
    amount: float = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """What is under way, and what was lost."""

    charges: dict[str, Count]
    """Those that are owed and not on the chain, by state."""
    settled: int
    """Charges that are on the chain and not final yet."""
    oldest: int | None
    """When the oldest charge was captured that settlement still has to bring to the chain, Unix milliseconds."""
    holds: Count
    """Open."""
    lost: Count
    """Calls that could not be metered, and what they may have cost at most."""
    excess: Count
    """Charges that were metered beyond their holds, and how far."""
    voided: Count
    """Charges that were written off."""
    final: Block | None
    """The newest block that is never undone."""


def read(connection: sa.Connection) -> Figures:
    """The figures."""
    holds, charges, blocks = schema.holds, schema.charges, schema.blocks
    state, amount = charges.c.state, charges.c.amount
    by_state = sa.select(state, *_count(amount)).where(schema.is_unsettled).group_by(state)
    oldest = (
        sa.select(charges.c.captured_at)
        .where(schema.is_unsettled, state != "rejected")
        .order_by(charges.c.sequence)
        .limit(1)
    )
    settled = sa.select(sa.func.count()).where(schema.is_(state, "settled"))
    final = connection.execute(sa.select(blocks).order_by(blocks.c.number).limit(1)).one_or_none()

    def count(units: sa.Column[int], condition: sa.ColumnElement[bool]) -> Count:
        return Count(*connection.execute(sa.select(*_count(units)).where(condition)).one())

    return Figures(
        charges={row[0]: Count(row[1], row[2]) for row in connection.execute(by_state)},
        settled=connection.execute(settled).scalar_one(),
        oldest=connection.execute(oldest).scalar(),
        holds=count(holds.c.amount, schema.is_(holds.c.state, "held")),
        lost=count(holds.c.amount, schema.is_(holds.c.state, "lost")),
        excess=count(charges.c.excess, schema.is_beyond_hold),
        voided=count(amount, schema.is_voided),
        final=None if final is None else Block(final.number, final.hash, final.timestamp),
    )


def _count(units: sa.Column[int]) -> tuple[sa.ColumnElement[int], sa.ColumnElement[float]]:
    return sa.func.count(), sa.func.coalesce(sa.func.sum(sa.cast(units, sa.Float(53))), 0.0)
