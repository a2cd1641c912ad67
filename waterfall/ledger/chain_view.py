"""The chain as this process sees it: how far the ledger's projection is, and what the chain holds against the journal.

One process reads the chain and moves the projection's head; the others learn of it through the database.
"""

import asyncio
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import sqlalchemy as sa
import structlog

from waterfall.errors import LedgerError, Unavailable
from waterfall.ledger import opening, projection, reconciliation, schema, shared
from waterfall.ledger.database import Database
from waterfall.ledger.projection import Block, Events
from waterfall.ledger.reader import Reader
from waterfall.ledger.shared import Shared
from waterfall.ledger.writer import Operation, Transaction, Writer
from waterfall.metrics import Metrics

log = structlog.get_logger()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Head:
    """The newest block projected."""

    block: Block
    seen_at: float
    """`time.monotonic()` when a node last showed that all there is was read."""


class ChainView:
    """The head of the projection, and what moves it."""

    def __init__(
        self,
        database: Database,
        writer: Writer,
        reader: Reader,
        metrics: Metrics,
        *,
        platform: int,
        epoch: int,
        captured: asyncio.Event,
    ) -> None:
        """The view of nothing yet.

        Args:
            database: where the projection is.
            writer: of it.
            reader: of it.
            metrics: count what becomes of charges.
            platform: whose ledger it is.
            epoch: of the ledger.
            captured: is set when charges wait for settlement again.
        """
        self.head: Head | None = None
        self.mismatches: list[str] = []
        """What the chain holds against the journal, kept over restarts; not empty: settlement stops."""
        self.epoch = epoch
        """Of the charge ids that the ledger gives out; another one after a rebuild."""
        self._database = database
        self._writer = writer
        self._reader = reader
        self._metrics = metrics
        self._platform = platform
        self._captured = captured
        self._moves = -1
        """How many moves of the head are known."""
        self._finalized: tuple[int, int] | None = None
        self._beat: str | None = None
        self._has_beat = False
        self._read_at = float("-inf")
        """`time.monotonic()` before what is known to all was last read: what is new now became known after that."""
        self._changed_at = float("-inf")
        """`time.monotonic()` after this process itself last changed the mismatches or the epoch."""

    # ── What is seen ─────────────────────────────────────────────────────────────────────────────────

    def block_time(self, max_age_seconds: float) -> int:
        """Timestamp of the newest block.

        Raises:
            Unavailable: the projection is older than `max_age_seconds`.
        """
        if self.head is None:
            raise Unavailable(reason="the chain has not been read yet")
        age = time.monotonic() - self.head.seen_at
        if age > max_age_seconds:
            shown = "not seen since the start" if age == float("inf") else f"last seen {age:.0f} s ago"
            raise Unavailable(reason=f"the chain's newest block was {shown}")
        return self.head.block.timestamp

    async def recent_blocks(self) -> list[Block]:
        """The blocks kept for comparison with the chain, newest first.

        Raises:
            LedgerError
        """

        def query(connection: sa.Connection) -> list[Block]:
            rows = connection.execute(sa.select(schema.blocks).order_by(schema.blocks.c.number.desc()))
            return [Block(row.number, row.hash, row.timestamp) for row in rows]

        return await self._reader.read(query)

    # ── Onward ───────────────────────────────────────────────────────────────────────────────────────

    async def apply(
        self,
        blocks: Sequence[tuple[Block, Events]],
        *,
        spendable: int,
        final: int,
        after: Block | None = None,
        seen_at: float | None = None,
    ) -> None:
        """Project blocks in ascending order; the last is the new head.

        Args:
            blocks: with their events.
            spendable: up to this block, raises count.
            final: up to this block, nothing is ever undone.
            after: the head they were read for.
            seen_at: `time.monotonic()` when a node showed that the last is its newest; None: there are newer ones, and
                the view stays as old as it was.

        Raises:
            EventsMissing: these are not all there were, or those before were not; nothing is projected.
            LedgerError: the database cannot do it, or another process has moved the head since.
        """
        moves = self._moves

        def operation(tx: Transaction) -> tuple[projection.Projection, int]:
            shared.move_view(tx, moves, after)
            if seen_at is not None:
                shared.publish(tx, {shared.BEAT: secrets.token_hex(8)})
            projected = projection.Projection(tx, self._platform, spendable=spendable, final=final)
            projected.read(blocks)
            for block, events in blocks:
                projected.apply(block, events)
            projected.write()
            shared.keep_mismatches(tx, projected.mismatches)
            return projected, projection.finalize(tx, spendable, final)

        projected, now_final = await self._move(operation)
        if projected.mismatches:
            self._know_mismatches([*self.mismatches, *projected.mismatches])
        self._tell(projected.moved)
        self._tell_final(final, now_final)
        self._moved(Head(blocks[-1][0], self._seen_at if seen_at is None else seen_at), moves + 1)
        self._finalized = spendable, final

    async def finalize(self, *, spendable: int, final: int) -> None:
        """Let what is final count.

        Args:
            spendable: up to this block, raises count.
            final: up to this block, nothing is ever undone.

        Raises:
            LedgerError: the database cannot do it, or another process has moved the head since.
        """
        if self._finalized != (spendable, final):
            moves = self._moves

            def operation(tx: Transaction) -> int:
                shared.hold_view(tx, moves)
                return projection.finalize(tx, spendable, final)

            self._tell_final(final, await self._move(operation))
            self._finalized = spendable, final

    def saw_head(self) -> None:
        """A node showed that the projected head is its newest block."""
        if self.head is not None:
            self.head = replace(self.head, seen_at=time.monotonic())
            self._has_beat = True

    async def caught_up(self) -> None:
        """The head was reached after older blocks, which may have shown a policy that only later is wanted again."""
        await self._writer.run(projection.want_again)

    # ── Back ─────────────────────────────────────────────────────────────────────────────────────────

    async def rewind(self, to: Block, *, head: Block | None = None) -> None:
        """Undo every block above `to`; `head` is the one from which that was decided.

        Raises:
            LedgerError: the database cannot do it, or another process has moved the head since.
        """
        moves = self._moves

        def operation(tx: Transaction) -> None:
            shared.move_view(tx, moves, head)
            projection.rewind(tx, to.number)

        await self._move(operation)
        self._moved(Head(to, self._seen_at), moves + 1)
        self._captured.set()

    async def rebuild(self) -> None:
        """Forget the projection and begin a new epoch; the next blocks applied start from the vault's first.

        Raises:
            LedgerError: the database cannot do it, or another process works with it.
        """
        moves = self._moves

        def operation(tx: Transaction) -> int:
            tx.check_alone()
            shared.move_view(tx, moves)
            projection.reset(tx)
            shared.publish(tx, {shared.MISMATCH: None})
            return opening.new_epoch(tx)

        self.epoch = await self._writer.run(operation)
        self._know_mismatches([])
        self._moved(None, moves + 1)
        self._finalized = None

    # ── What the chain holds against the journal ─────────────────────────────────────────────────────

    async def note_mismatch(self, mismatch: str) -> None:
        """Keep something that the chain holds against the journal, until a person has seen to it.

        Raises:
            LedgerError
        """
        await self._writer.run(lambda tx: shared.keep_mismatches(tx, [mismatch]))
        self._know_mismatches([*self.mismatches, mismatch])

    async def write_off_conflicts(self) -> int:
        """Write off charges whose ids the chain has for others, and let settlement go on; how many.

        Raises:
            LedgerError
        """

        def operation(tx: Transaction) -> int:
            shared.publish(tx, {shared.MISMATCH: None})
            return reconciliation.write_off_conflicts(tx)

        written_off = await self._writer.run(operation)
        self._know_mismatches([])
        return written_off

    def _know_mismatches(self, mismatches: Sequence[str]) -> None:
        """Know what this process has changed; what was read before it did, is not true any more."""
        self.mismatches = list(dict.fromkeys(mismatches))
        self._changed_at = time.monotonic()

    # ── Other processes ──────────────────────────────────────────────────────────────────────────────

    def take_news(self) -> dict[str, str | None]:
        """What to tell all; once."""
        news: dict[str, str | None] = {shared.BEAT: secrets.token_hex(8)} if self._has_beat else {}
        self._has_beat = False
        return news

    async def look(self) -> None:
        """See where the head is now.

        Raises:
            LedgerError
        """
        self.learn(await self._reader.read(shared.read))

    def learn(self, known: Shared) -> None:
        """Know what is known to all. Of what is new, that it was true when it was last read, is all that is sure.

        Under another epoch it is another ledger: restored from a backup, or built anew. What was read before something
        that is known already says nothing: what will be read next does.
        """
        if known.has_queued:
            self._captured.set()
        if known.read_at < max(self._read_at, self._changed_at):
            return
        if known.epoch != self.epoch:
            log.warning("the ledger was restored or rebuilt", epoch=known.epoch)
            self._database.forget_drawn()
            self.head = None
        seen_at = self._seen_at
        if known.beat != self._beat:
            seen_at = max(seen_at, self._read_at)
        if known.view > self._moves or known.epoch != self.epoch:
            self._moves, self.epoch, self._finalized = known.view, known.epoch, None
            self.head = None if known.head is None else Head(known.head, seen_at)
        elif self.head is not None:
            self.head = replace(self.head, seen_at=seen_at)
        self.mismatches = [] if known.mismatch is None else [known.mismatch]
        self._beat, self._read_at = known.beat, known.read_at

    # ── A move ───────────────────────────────────────────────────────────────────────────────────────

    async def _move(self, operation: Operation[T]) -> T:
        """Move the head. If that fails, look where it is: it may have been moved all the same, or by another process."""
        try:
            return await self._writer.run(operation)
        except LedgerError:
            with suppress(LedgerError):
                await self.look()
            raise

    def _moved(self, head: Head | None, moves: int) -> None:
        """Know the head that this process has moved, which may have been read already."""
        self.head, self._moves = head, moves

    @property
    def _seen_at(self) -> float:
        return float("-inf") if self.head is None else self.head.seen_at

    def _tell(self, moved: Sequence[projection.Moved]) -> None:
        """Count and log what has become of charges: the last steps of what calls' own lines begin."""
        by_transaction: dict[tuple[str, int, str, str | None], list[int]] = {}
        for one in moved:
            key = one.state, one.block, one.tx_hash, one.reason
            by_transaction.setdefault(key, []).append(one.charge)
            if one.state == "settled":
                self._metrics.inclusion_seconds.observe(max(0, one.waited_ms) / 1000)
            elif one.state == "rejected":
                self._metrics.rejected.labels(one.reason).inc()
        for (state, block, transaction, reason), charges in by_transaction.items():
            level = log.info if state == "settled" else log.warning
            level(state, charges=charges, transaction=transaction, block=block, reason=reason)

    def _tell_final(self, block: int, charges: int) -> None:
        if charges:
            self._metrics.finalized.inc(charges)
            log.info("final", up_to_block=block, count=charges)
