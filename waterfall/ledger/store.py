"""The open ledger: one database, one writer, and what the process keeps in memory of it."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import sqlalchemy as sa
from filelock import FileLock, Timeout

from waterfall.chain.vault import deposit_address
from waterfall.errors import LedgerError, Unavailable
from waterfall.ledger import journal, keys, projection, schema
from waterfall.ledger.journal import Caller, Captured, Hold
from waterfall.ledger.keys import ApiKey
from waterfall.ledger.projection import Block, Events
from waterfall.ledger.writer import Operation, Transaction, Writer
from waterfall.metering.prices import Bound
from waterfall.types import RateCard, SignedReceipt

T = TypeVar("T")

EPOCH_BITS = 32
_MISMATCH = "mismatch"
_CHARGES = "charges"
"""Whose idempotency keys those of charges are: the platform's, whichever of its API keys it shows."""
LEASE_MS = 5 * 60 * 1000
"""A hold whose call has not renewed it for this long is taken for abandoned."""


@dataclass(frozen=True, slots=True)
class Head:
    """The newest block projected."""

    block: Block
    seen_at: float
    """`time.monotonic()` when a node last showed that it is still the newest or was just applied."""


class Ledger:
    """The ledger of one platform on one vault."""

    def __init__(
        self, engine: sa.Engine, lock: FileLock, *, chain_id: int, vault: str, platform: int
    ) -> None:
        """Use `Ledger.open`."""
        self.chain_id = chain_id
        self.vault = vault
        self.platform = platform
        self._engine = engine
        self._lock = lock
        self._writer = Writer(engine)
        self._price_ids: set[str] = set()
        self._keys: dict[str, ApiKey] = {}
        self.epoch = 0
        self.head: Head | None = None
        self.captured = asyncio.Event()
        """Set whenever there is something new to settle."""
        self.mismatches: list[str] = []
        """What the chain holds against the journal, kept over restarts; not empty: settlement stops."""
        self._finalized: tuple[int, int] | None = None
        self._refusal: str | None = None

    # ── Opening ──────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def open(cls, url: str, *, chain_id: int, vault: str, platform: int) -> Self:
        """Open the ledger at a database URL, or make it.

        Holds that a dead process left open are closed as lost, and all sums are derived anew.

        Raises:
            LedgerError: in use by another process, of another chain, vault or platform, or unreadable.
        """
        engine = _engine(url)
        lock = _lock(engine)
        try:
            identity = {"chain_id": str(chain_id), "vault": vault, "platform": str(platform)}
            with engine.begin() as connection:
                epoch = _open_schema(connection, identity)
            ledger = cls(engine, lock, chain_id=chain_id, vault=vault, platform=platform)
        except sa.exc.DBAPIError as error:
            lock.release()
            raise LedgerError(reason=str(error.orig)) from error
        except LedgerError:
            lock.release()
            raise
        ledger.epoch = epoch
        ledger._recover()
        return ledger

    def _recover(self) -> None:
        reason = "the gateway stopped between the hold and the capture"
        self.lost_at_start = self._writer.run_sync(lambda tx: journal.lose_open_holds(tx, reason))
        self.recounted_at_start = self._writer.run_sync(journal.recount)
        with self._engine.connect() as connection:
            self._keys = keys.all_keys(connection)
            kept = sa.select(schema.meta.c.value).where(schema.meta.c.key == _MISMATCH)
            self.mismatches = list(connection.execute(kept).scalars())
            row = connection.execute(sa.select(schema.blocks).order_by(schema.blocks.c.number.desc())).first()
        if row is not None:
            self.head = Head(Block(row.number, row.hash, row.timestamp), seen_at=float("-inf"))

    def close(self) -> None:
        """Finish what is queued and close."""
        self._writer.close()
        self._engine.dispose()
        self._lock.release()

    # ── Calls ────────────────────────────────────────────────────────────────────────────────────────

    async def hold(
        self, caller: Caller, model: str, bound: Bound, *, block_time: int, expiry_margin: int
    ) -> Hold:
        """Set a call's provable maximum aside; durable when this returns.

        Raises:
            AccountNotFound, PaymentRequired, LedgerError
        """
        return await self._writer.run(
            lambda tx: journal.hold(
                tx,
                epoch=self.epoch,
                caller=caller,
                model=model,
                bound=bound,
                block_time=block_time,
                expiry_margin=expiry_margin,
                lease_ms=LEASE_MS,
            )
        )

    async def capture(self, held: Hold, signed: SignedReceipt, excess: int = 0) -> Captured:
        """Turn a hold into a charge; durable when this returns.

        Raises:
            LedgerError
        """
        captured = await self._writer.run(lambda tx: journal.capture(tx, held, signed, excess))
        self.captured.set()
        return captured

    async def release(self, held: Hold, reason: str) -> None:
        """Give a hold back whose call cost nothing."""
        await self._writer.run(lambda tx: journal.release(tx, held, reason))

    async def lose(self, held: Hold, reason: str) -> None:
        """Give a hold back whose call cannot be metered: listed and counted."""
        await self._writer.run(lambda tx: journal.lose(tx, held, reason))

    async def renew(self, held: Hold) -> None:
        """Say that a call is still running."""
        await self._writer.run(lambda tx: journal.renew(tx, held, LEASE_MS))

    async def keep_rate_card(self, price_id: str, card: RateCard) -> None:
        """Keep a rate card before the first receipt names it."""
        if price_id not in self._price_ids:
            await self._writer.run(lambda tx: journal.keep_rate_card(tx, price_id, card))
            self._price_ids.add(price_id)

    async def charge(
        self,
        caller: Caller,
        model: str,
        bound: Bound,
        sign: Callable[[Hold], SignedReceipt],
        *,
        block_time: int,
        expiry_margin: int,
        idempotency_key: str,
        body_hash: str,
    ) -> str:
        """Hold and capture at once, once per idempotency key; the receipt's id.

        Raises:
            AccountNotFound, PaymentRequired, IdempotencyConflict, LedgerError
        """
        receipt_id = await self._writer.run(
            lambda tx: journal.charge(
                tx,
                idempotency_key=idempotency_key,
                scope=_CHARGES,
                body_hash=body_hash,
                order=lambda tx: journal.hold(
                    tx,
                    epoch=self.epoch,
                    caller=caller,
                    model=model,
                    bound=bound,
                    block_time=block_time,
                    expiry_margin=expiry_margin,
                    lease_ms=LEASE_MS,
                ),
                sign=sign,
            )
        )
        self.captured.set()
        return receipt_id

    async def find_charge(self, *, idempotency_key: str, body_hash: str) -> str | None:
        """The receipt's id of an earlier `charge` under this key, if there is one.

        Raises:
            IdempotencyConflict, LedgerError
        """
        return await self.read(
            lambda c: journal.find_charge(
                c.execute, idempotency_key=idempotency_key, scope=_CHARGES, body_hash=body_hash
            )
        )

    def block_time(self, max_age_seconds: float) -> int:
        """Timestamp of the newest block, for a decision about money.

        Raises:
            Unavailable: the projection is older than `max_age_seconds`, or settlement has stopped or is late.
        """
        if self._refusal is not None:
            raise Unavailable(reason=self._refusal)
        if self.head is None:
            raise Unavailable(reason="the chain has not been read yet")
        age = time.monotonic() - self.head.seen_at
        if age > max_age_seconds:
            shown = "not seen since the start" if age == float("inf") else f"last seen {age:.0f} s ago"
            raise Unavailable(reason=f"the chain's newest block was {shown}")
        return self.head.block.timestamp

    def refuse(self, reason: str | None) -> None:
        """Refuse new calls from now on, with a reason; None: no more."""
        self._refusal = reason

    def deposit_address(self, account: str) -> str:
        """Where tokens sent are credited to an account."""
        return deposit_address(self.vault, account)

    # ── Keys ─────────────────────────────────────────────────────────────────────────────────────────

    def find_key(self, secret: str) -> ApiKey | None:
        """The key with this secret."""
        return self._keys.get(keys.hash_of(secret))

    async def add_key(
        self, secret: str, *, account: str | None, name: str, expires_at: int | None = None
    ) -> ApiKey:
        """Register a key.

        Raises:
            LedgerError
        """
        key = await self._writer.run(
            lambda tx: keys.add_key(tx, secret, account=account, name=name, expires_at=expires_at)
        )
        self._keys[keys.hash_of(secret)] = key
        return key

    async def set_platform_key(self, secret: str, name: str) -> None:
        """Make this the platform's only key of this name.

        Raises:
            LedgerError
        """

        def operation(tx: Transaction) -> None:
            keys.revoke_others(tx, keys.add_key(tx, secret, account=None, name=name, expires_at=None))

        await self._writer.run(operation)
        self._keys = await self.read(keys.all_keys)

    # ── The chain's view ─────────────────────────────────────────────────────────────────────────────

    async def apply(self, blocks: Sequence[tuple[Block, Events]], *, spendable: int, final: int) -> None:
        """Project blocks in ascending order; the last is the new head."""

        def operation(tx: Any) -> list[str]:
            view = projection.Projection(tx, self.platform, spendable)
            for block, events in blocks:
                view.apply(block, events)
            projection.finalize(tx, spendable, final)
            _keep_mismatches(tx, view.mismatches)
            return view.mismatches

        self.mismatches += await self._writer.run(operation)
        self.head = Head(blocks[-1][0], time.monotonic())
        self._finalized = spendable, final

    async def finalize(self, *, spendable: int, final: int) -> None:
        """Let what is final count."""
        if self._finalized != (spendable, final):
            await self._writer.run(lambda tx: projection.finalize(tx, spendable, final))
            self._finalized = spendable, final

    async def note_mismatch(self, mismatch: str) -> None:
        """Keep something that the chain holds against the journal, until a person has seen to it."""
        await self._writer.run(lambda tx: _keep_mismatches(tx, [mismatch]))
        self.mismatches.append(mismatch)

    def saw_head(self) -> None:
        """A node showed that the projected head is its newest block."""
        if self.head is not None:
            self.head = replace(self.head, seen_at=time.monotonic())

    async def rewind(self, to: Block) -> None:
        """Undo every block above `to`."""
        await self._writer.run(lambda tx: projection.rewind(tx, to.number))
        self.head = Head(to, time.monotonic())
        self.captured.set()

    async def rebuild(self) -> None:
        """Forget the projection and begin a new epoch; the next blocks applied start from the vault's first."""

        def operation(tx: Transaction) -> int:
            projection.reset(tx)
            table = schema.meta
            tx.run(table.delete().where(table.c.key == _MISMATCH))
            epoch = secrets.randbits(EPOCH_BITS)
            tx.run(table.update().where(table.c.key == "epoch").values(value=str(epoch)))
            return epoch

        self.epoch = await self._writer.run(operation)
        self.head, self._finalized, self.mismatches = None, None, []

    async def caught_up(self) -> None:
        """The head was reached after older blocks, which may have shown a policy that only later is wanted again."""
        await self._writer.run(projection.want_again)

    async def recent_blocks(self) -> list[Block]:
        """The blocks kept for comparison with the chain, newest first."""

        def query(connection: sa.Connection) -> list[Block]:
            rows = connection.execute(sa.select(schema.blocks).order_by(schema.blocks.c.number.desc()))
            return [Block(row.number, row.hash, row.timestamp) for row in rows]

        return await self.read(query)

    # ── Everything else ──────────────────────────────────────────────────────────────────────────────

    async def write(self, operation: Operation[T]) -> T:
        """Run one operation of this room durably."""
        return await self._writer.run(operation)

    async def read(self, query: Callable[[sa.Connection], T]) -> T:
        """Run one query of this room in a thread, on what is committed."""
        return await asyncio.to_thread(self.read_sync, query)

    def read_sync(self, query: Callable[[sa.Connection], T]) -> T:
        """The same, blocking."""
        with self._engine.connect() as connection:
            return query(connection)


def _keep_mismatches(tx: Transaction, mismatches: Sequence[str]) -> None:
    """Keep the first, which is what a person has to look at first."""
    for mismatch in mismatches[:1]:
        tx.run(schema.meta.insert().prefix_with("OR IGNORE"), {"key": _MISMATCH, "value": mismatch})


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise LedgerError(reason=f"{url!r} is not a database URL such as sqlite:///waterfall.db") from None
    if parsed.drivername != "sqlite" or parsed.database in {None, "", ":memory:"}:
        raise LedgerError(reason="the database must be a file: sqlite:///path/to/waterfall.db")
    folder = Path(str(parsed.database)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerError(reason=f"the folder {folder} cannot be made: {error.strerror}") from None
    engine = sa.create_engine(parsed, connect_args={"check_same_thread": False, "timeout": 30})
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say, see _begin
    with closing(connection.cursor()) as cursor:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _lock(engine: sa.Engine) -> FileLock:
    lock = FileLock(f"{engine.url.database}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LedgerError(reason=f"{engine.url.database} is in use by another process") from None
    return lock


def _open_schema(connection: sa.Connection, identity: dict[str, str]) -> int:
    """Make or check the schema; the epoch."""
    schema.metadata.create_all(connection)
    table = schema.meta
    known = {row.key: row.value for row in connection.execute(sa.select(table))}
    if not known:
        known = {**identity, "schema": schema.VERSION, "epoch": str(secrets.randbits(EPOCH_BITS))}
        connection.execute(table.insert(), [{"key": key, "value": value} for key, value in known.items()])
    if known["schema"] != schema.VERSION:
        raise LedgerError(
            reason=f"it has schema {known['schema']}, this version of Waterfall needs {schema.VERSION}"
        )
    for key, value in identity.items():
        if known[key] != value:
            raise LedgerError(reason=f"it belongs to {key} {known[key]}, not {value}: name another database")
    return int(known["epoch"])
