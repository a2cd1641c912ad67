"""A ledger as one file, and back: of either database, into either.

The file is gzipped JSON Lines: a header, then each table's name and rows in the order of their foreign keys, then
the SHA-256 of every byte before it. It is made from one snapshot beside the running service, read again before it
takes its name, and restored in one transaction. Transactions under way are not in it: what they carried is owed in a
restored ledger, and the vault skips what was settled.
"""

import base64
import gzip
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from waterfall.errors import WaterfallError
from waterfall.ledger import journal, opening, schema, shared
from waterfall.ledger.database import DATABASE_ERRORS, Database, reason_of
from waterfall.ledger.snapshot import Identity, identity, snapshot
from waterfall.ledger.writer import Transaction

FORMAT = 1
_KEPT = [table for table in schema.metadata.sorted_tables if table not in (schema.slots, schema.attempts)]
_AT_ONCE = 1000
_TOLD_ONCE_IN = 10_000
_LEVEL = 6
_OF_PROCESSES = (shared.BEAT, shared.REFUSAL)
_RESTORED = "the ledger was restored from a backup made while it ran"

Tell = Callable[[int, int], None]
"""Told how many rows are done, and of how many."""


class BackupError(WaterfallError):
    """The backup {file}: {reason}."""

    code = "backup_error"


@dataclass(frozen=True, slots=True)
class Header:
    """What a backup says of itself."""

    format: int
    revision: str
    """Of the tables."""
    chain_id: int
    vault: str
    platform: int
    epoch: int
    head: int | None
    """The newest block projected."""
    made_at: int
    """Unix milliseconds."""
    rows: dict[str, int]
    """By table."""

    @property
    def identity(self) -> Identity:
        """What it is the ledger of."""
        return Identity(self.chain_id, self.vault, self.platform)


# ── Making one ───────────────────────────────────────────────────────────────────────────────────────


def backup(url: str, file: Path, *, overwrite: bool = False, tell: Tell = lambda *_: None) -> Header:
    """Write the ledger at a database URL into a file of mode 0600, while it may be in use.

    Args:
        url: the database.
        file: appears only once it is whole, on the disk, and was read again.
        overwrite: replace a file that is there.
        tell: told of the progress.

    Raises:
        LedgerError: the ledger cannot be read.
        BackupError: the file is there already, or cannot be written.
    """
    if file.exists() and not overwrite:
        raise BackupError(file=file, reason="it exists already; --force replaces it")
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        with snapshot(url) as view:
            _write(view.connection, part, tell)
        made = verify(part)
        part.replace(file)
        _keep_names(file.parent)
    except OSError as error:
        raise BackupError(file=file, reason=error.strerror or type(error).__name__) from None
    finally:
        with suppress(OSError):
            part.unlink()
    return made


def _write(connection: sa.Connection, part: Path, tell: Tell) -> None:
    header = _header(connection)
    total, done = sum(header.rows.values()), 0
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as raw:
        with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=_LEVEL, mtime=0, filename="") as packed:
            written = _Hashed(packed)
            written.line({"waterfall": asdict(header)})
            for table in _KEPT:
                written.line({"table": table.name, "columns": [column.name for column in table.c]})
                for row in connection.execute(sa.select(table).execution_options(yield_per=_AT_ONCE)):
                    written.line([_to_json(value) for value in row])
                    done += 1
                    if done % _TOLD_ONCE_IN == 0:
                        tell(done, total)
            packed.write(_packed({"sha256": written.digest()}))
        raw.flush()
        os.fsync(raw.fileno())
    tell(total, total)


def _header(connection: sa.Connection) -> Header:
    count = sa.func.count()
    is_ = identity(connection)
    known = shared.read(connection)
    return Header(
        format=FORMAT,
        revision=schema.REVISION,
        chain_id=is_.chain_id,
        vault=is_.vault,
        platform=is_.platform,
        epoch=known.epoch,
        head=None if known.head is None else known.head.number,
        made_at=journal.now_ms(),
        rows={
            table.name: connection.execute(sa.select(count).select_from(table)).scalar_one()
            for table in _KEPT
        },
    )


class _Hashed:
    """Writes lines and knows their hash."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def line(self, value: Any) -> None:
        packed = _packed(value)
        self._sha256.update(packed)
        self._file.write(packed)

    def digest(self) -> str:
        return self._sha256.hexdigest()


def _packed(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _to_json(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _keep_names(folder: Path) -> None:
    """A file's new name is on the disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ── Reading one ──────────────────────────────────────────────────────────────────────────────────────


def verify(file: Path) -> Header:
    """Read a whole backup and check it against its own hash and counts.

    Raises:
        BackupError: it is not one, or damaged.
    """
    with _Reading(file) as reading:
        for _ in reading.rows():
            pass
        return reading.header


class _Reading:
    """Reads a backup from its header to its hash.

    Raises:
        BackupError
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> Self:
        try:
            self._packed = gzip.open(self._file, "rb")
            self._lines = self._read()
            self.header = self._header()
        except OSError as error:
            raise BackupError(file=self._file, reason=error.strerror or "it is no backup") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._packed.close()

    def _read(self) -> Iterator[Any]:
        """Values of the lines; whatever is wrong with a line is the file's fault."""
        try:
            for line in self._packed:
                value = json.loads(line)
                if not (isinstance(value, dict) and "sha256" in value):
                    self._sha256.update(line)
                yield value
        except (OSError, EOFError, ValueError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
            raise self.damaged(f"it is damaged: {error}") from None

    def _header(self) -> Header:
        first = next(self._lines, None)
        facts = first.get("waterfall") if isinstance(first, dict) else None
        if not isinstance(facts, dict):
            raise self.damaged("it is no backup of a Waterfall ledger")
        if facts.get("format") != FORMAT or facts.get("revision") != schema.REVISION:
            raise self.damaged(
                f"it has format {facts.get('format')} and schema {facts.get('revision')}, this version reads format "
                f"{FORMAT} and schema {schema.REVISION}: restore it with the version that made it, then upgrade that"
            )
        try:
            return Header(**facts)
        except TypeError:
            raise self.damaged("its header is not whole") from None

    def rows(self) -> Iterator[tuple[sa.Table, list[Any]]]:
        """Every row with its table; at the end, everything was checked."""
        counts = dict.fromkeys(self.header.rows, 0)
        table: sa.Table | None = None
        for value in self._lines:
            if isinstance(value, list):
                if table is None or len(value) != len(table.c):
                    raise self.damaged("it has a row that belongs to no table")
                counts[table.name] += 1
                yield table, value
            elif "sha256" in value:
                if value["sha256"] != self._sha256.hexdigest():
                    raise self.damaged("it is damaged: its hash is another")
                if counts != self.header.rows:
                    raise self.damaged("it is damaged: rows are missing")
                if next(self._lines, None) is not None:
                    raise self.damaged("it is damaged: there is something after its end")
                return
            else:
                table = schema.metadata.tables.get(value.get("table"))
                if table is None or value.get("columns") != [column.name for column in table.c]:
                    raise self.damaged("it has a table that this version does not know")
                counts.setdefault(table.name, 0)
        raise self.damaged("it is damaged: its end is missing")

    def damaged(self, reason: str) -> BackupError:
        """What is wrong with the file."""
        return BackupError(file=self._file, reason=reason)


# ── Restoring one ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restored ledger has to know of itself."""

    header: Header
    epoch: int
    """Of the ledger from now on: ids that were drawn after the backup are never drawn again."""
    lost_holds: int
    """Calls that ran when the backup was made: whether they cost something, nobody knows."""
    unsettled: int
    """Charges that are owed: those that were settled since, the next start will see on the chain."""
    open_policies: tuple[str, ...]
    """Accounts with a policy that was asked for and not on the chain: it will be sent."""
    replaced_calls: int
    """Calls of the ledger that was there and is not any more."""


def restore(
    url: str, file: Path, of: Identity, *, overwrite: bool = False, tell: Tell = lambda *_: None
) -> Restored:
    """Put a backup in the place of the ledger at a database URL, all of it or nothing.

    Args:
        url: the database, which nobody uses.
        file: the backup.
        of: what it has to be the ledger of.
        overwrite: even if there is a ledger with accounts or calls.
        tell: told of the progress.

    Raises:
        LedgerError: the database is in use, or has a ledger.
        BackupError: the file is damaged, or of another ledger.
    """
    with _Reading(file) as reading:
        if reading.header.identity != of:
            raise reading.damaged(f"it is of {reading.header.identity}, the settings name {of}")
        database = Database.open(url)
        try:
            with database.engine.begin() as connection:
                opening.make_tables(database, connection)
                database.check_alone(connection)
                tx = Transaction(connection, database)
                replaced = _clear(tx, file, overwrite=overwrite)
                _fill(tx, reading, tell)
                restored = _begin_anew(tx, reading.header, replaced)
                database.go_on_after(connection)
                return restored
        except DATABASE_ERRORS as error:
            raise BackupError(file=file, reason=f"it cannot be restored: {reason_of(error)}") from error
        finally:
            database.close()


def _clear(tx: Transaction, file: Path, *, overwrite: bool) -> int:
    """Empty every table; how many calls there were."""
    count = sa.func.count()
    calls, accounts = (
        tx.run(sa.select(count).select_from(table)).scalar_one() for table in (schema.holds, schema.accounts)
    )
    if (calls or accounts) and not overwrite:
        raise BackupError(
            file=file,
            reason=f"the database has a ledger with {accounts} accounts and {calls} calls: back it up, then give "
            "--force to put this one in its place",
        )
    for table in reversed(schema.metadata.sorted_tables):
        tx.run(table.delete())
    return int(calls)


def _fill(tx: Transaction, reading: _Reading, tell: Tell) -> None:
    total, done = sum(reading.header.rows.values()), 0
    rows = reading.rows()
    while some := list(islice(rows, _AT_ONCE)):
        tables = {id(table): table for table, _ in some}
        for table in tables.values():
            names = [column.name for column in table.c]
            binary = [isinstance(column.type, sa.LargeBinary) for column in table.c]
            tx.run(
                table.insert(),
                [
                    {
                        name: base64.b64decode(value) if bytes_ and value is not None else value
                        for name, value, bytes_ in zip(names, row, binary, strict=True)
                    }
                    for its, row in some
                    if its is table
                ],
            )
        done += len(some)
        tell(done, total)


def _begin_anew(tx: Transaction, header: Header, replaced: int) -> Restored:
    """What the time between the backup and now may have changed is taken for changed."""
    charges, orders = schema.charges, schema.policy_orders
    lost = journal.lose_open_holds(tx, _RESTORED)
    shared.publish(tx, {**dict.fromkeys(_OF_PROCESSES), shared.KEYS: secrets.token_hex(8)})
    epoch = opening.new_epoch(tx)
    count = sa.select(sa.func.count()).select_from(charges)
    owed = tx.run(count.where(schema.is_unsettled)).scalar_one()
    waiting = sa.select(orders.c.account).where(orders.c.state == "waiting").distinct()
    return Restored(
        header=header,
        epoch=epoch,
        lost_holds=lost,
        unsettled=owed,
        open_policies=tuple(sorted(tx.run(waiting).scalars())),
        replaced_calls=replaced,
    )
