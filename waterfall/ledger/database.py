"""The two databases a ledger can be in: a SQLite file for one process, PostgreSQL for many.

What differs between them is here, and nowhere else: how they are opened, who may use them, how they take money, how
rows are locked, and where charge ids come from.
"""

import secrets
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from typing import Any, ClassVar, cast

import orjson
import psycopg
import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql.psycopg import dialect as psycopg_dialect

from waterfall.errors import LedgerError
from waterfall.ledger import schema

_SQLITE_WAIT_SECONDS = 30
_MOST_ROWS = 64
"""Of one insert."""
_WAL_PAGES = 8192
"""Of 4 KiB, before they are copied into the file: a page that changes often is copied once for many changes."""
_CACHE_KIB = 16_384
"""Of each connection: the writer's and those of the readers."""
_IDS_AT_ONCE = 32
_OPENING, _LEADING = 0x57617465, 0x7266616C
"""Name spaces of PostgreSQL's advisory locks, which the whole database shares."""
_OTHERS = sa.text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
    "AND (split_part(application_name, '/', 1) = 'waterfall' AND split_part(application_name, '/', 2) <> :ours "
    "OR application_name = 'waterfall leader' AND pid <> :leader)"
)
_IS_LED = sa.text(
    "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = :space "
    "AND objid = (hashtext(:part)::bigint & 4294967295)::oid AND objsubid = 2 "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
)
_TRY_AGAIN = frozenset({"40001", "40P01", "23505"})
"""SQLSTATEs of what goes through when it is tried again: serialization failure, deadlock, the same key at once."""
_CONNECTION: dict[str, Any] = {
    "connect_timeout": 10,
    # A host that lost its power keeps locks for hours otherwise: both ends ask each other whether they are still there.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 "
    "-c idle_in_transaction_session_timeout=30s -c synchronous_commit=on",
}
_LEADER: dict[str, Any] = {
    "application_name": "waterfall leader",
    # Who leads asks every second whether he still does. A process that stands still keeps its session, and its machine
    # answers for it: without this, nobody would take over.
    "options": f"{_CONNECTION['options']} -c idle_session_timeout=30s",
}
_STOPPED = "57P"
"""SQLSTATEs of a server that is stopped or started."""

DATABASE_ERRORS = (sqlite3.Error, psycopg.Error, sa.exc.DBAPIError)
OUT_OF_ORDER = (sqlite3.OperationalError, psycopg.OperationalError, sa.exc.OperationalError)
"""The database itself cannot do it now, whatever it is asked for."""


class Database(ABC):
    """An open database."""

    is_shared: ClassVar[bool]
    """Whether other processes may use it at the same time."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @staticmethod
    def open(url: str) -> "Database":
        """The database at a URL.

        Raises:
            LedgerError: no such kind of database, or it is in use.
        """
        try:
            parsed = sa.make_url(url)
        except sa.exc.ArgumentError:
            parsed = sa.URL.create("")
        if parsed.drivername == "sqlite":
            return Sqlite(parsed)
        if parsed.drivername in {"postgresql", "postgres"}:
            return Postgres(parsed)
        raise LedgerError(
            reason="the database must be sqlite:///path/to/waterfall.db or postgresql://user@host/name"
        )

    @abstractmethod
    def prepare(self, connection: sa.Connection) -> None:
        """Be the only one that makes or changes the schema, until this transaction ends."""

    @abstractmethod
    def start(self, connection: sa.Connection) -> None:
        """Told once the schema is there."""

    @abstractmethod
    def check_alone(self, connection: sa.Connection) -> None:
        """See that no other process works with it: none can begin to before this transaction of `prepare` ends.

        Raises:
            LedgerError: somebody does.
        """

    @abstractmethod
    def go_on_after(self, connection: sa.Connection) -> None:
        """Told that rows were written whose numbers were not drawn here: the next ones come after them."""

    def close(self) -> None:
        """Let go of it."""
        self.engine.dispose()

    # ── Statements ───────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def compiled(self, statement: sa.Executable, *names: str) -> str:
        """A statement as the driver takes it, with its parameters in this order.

        SQLAlchemy costs twenty times as much as the driver on the path of a call.
        """

    @abstractmethod
    def money(self, units: int) -> Any:
        """Credit units as the driver takes them."""

    @abstractmethod
    def keys(self, keys: Collection[Any]) -> Any:
        """The parameter `keys` of a statement of `one_of`, as the driver takes it."""

    @abstractmethod
    def insert(self, cursor: Any, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Execute an insert of one row for all of these."""

    @abstractmethod
    def at_once(self, raw: Any) -> AbstractContextManager[Any]:
        """Statements within, each by a cursor of its own, wait for one answer together, and not for one each."""

    @abstractmethod
    def one_of(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """The condition that the column is one of the parameter `keys`."""

    @abstractmethod
    def insert_new(self, table: sa.Table) -> sa.Insert:
        """An insert that leaves rows alone whose key is there already."""

    # ── Charge ids ───────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def draw(self) -> int:
        """The next sequence of a charge id: drawn once, dense but for what was drawn and not used."""

    @abstractmethod
    def forget_drawn(self) -> None:
        """Draw anew: what this process has drawn in advance may be drawn by another."""

    # ── Who else is here ─────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def leads(self, part: str) -> bool:
        """Whether this process is the one that does a part of the relayer's work."""

    @abstractmethod
    def is_led(self, connection: sa.Connection, part: str) -> bool:
        """Whether any process does a part of the relayer's work."""

    def goes_through_again(self, error: Exception) -> bool:  # noqa: ARG002
        """Whether the same transaction, which was not committed, may go through when it is run again."""
        return False


def reason_of(error: Exception) -> str:
    """What a database says, in one line and without the statement."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig is not None else error
    return str(cause).strip().split("\n")[0] or type(cause).__name__


def as_text(text: str) -> str:
    """Text that every database takes: PostgreSQL has none with zero bytes or halves of characters."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


class Sqlite(Database):
    """A file of this process alone."""

    is_shared = False

    def __init__(self, url: sa.URL) -> None:
        if url.database in {None, "", ":memory:"}:
            raise LedgerError(reason="the database must be a file: sqlite:///path/to/waterfall.db")
        file = Path(str(url.database))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(reason=f"the folder {file.parent} cannot be made: {error.strerror}") from None
        self._lock = FileLock(f"{file}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise LedgerError(reason=f"{file} is in use by another process") from None
        engine = sa.create_engine(
            url, connect_args={"check_same_thread": False, "timeout": _SQLITE_WAIT_SECONDS}
        )
        sa.event.listen(engine, "connect", _configure)
        sa.event.listen(engine, "begin", _begin)
        super().__init__(engine)
        self._ids = count(1)

    def prepare(self, connection: sa.Connection) -> None:
        """Nobody else can be here."""

    def start(self, connection: sa.Connection) -> None:
        """Go on with the ids."""
        last = connection.execute(sa.select(sa.func.max(schema.holds.c.sequence))).scalar()
        self._ids = count((last or 0) + 1)

    def check_alone(self, connection: sa.Connection) -> None:
        """Nobody else can be here."""

    def go_on_after(self, connection: sa.Connection) -> None:
        """It looks itself."""

    def close(self) -> None:
        """Let go of it."""
        super().close()
        self._lock.release()

    def compiled(self, statement: sa.Executable, *names: str) -> str:
        """A statement as sqlite3 takes it."""
        return _compiled(statement, sqlite.dialect(), names)

    def money(self, units: int) -> str:
        """Text: a 64-bit integer holds only 9.2 million USD."""
        return str(units)

    def keys(self, keys: Collection[Any]) -> str:
        """An array in JSON."""
        return orjson.dumps(list(keys)).decode()

    def insert(self, cursor: Any, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Many in one statement.

        With each statement that it steps through, sqlite3 lets go of the interpreter and takes it back, which costs more
        than the row where other threads want it too.
        """
        done = 0
        while done < len(rows):
            many = min(1 << (len(rows) - done).bit_length() - 1, _MOST_ROWS)  # few statements to be prepared
            cursor.execute(_of_many(sql, many), tuple(chain.from_iterable(rows[done : done + many])))
            done += many

    def at_once(self, raw: Any) -> AbstractContextManager[Any]:  # noqa: ARG002
        """There is nobody to wait for."""
        return nullcontext()

    def one_of(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """IN the elements of an array in JSON."""
        elements = sa.func.json_each(sa.bindparam("keys")).table_valued("value")
        return column.in_(sa.select(elements.c.value))

    def insert_new(self, table: sa.Table) -> sa.Insert:
        """INSERT … ON CONFLICT DO NOTHING."""
        return sqlite.insert(table).on_conflict_do_nothing()

    def forget_drawn(self) -> None:
        """Nothing is drawn in advance."""

    def draw(self) -> int:
        """The next number."""
        return next(self._ids)

    def leads(self, part: str) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def is_led(self, connection: sa.Connection, part: str) -> bool:  # noqa: ARG002
        """By this process."""
        return True


def _configure(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say, see _begin
    with closing(connection.cursor()) as cursor:
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            f"wal_autocheckpoint={_WAL_PAGES}",
            f"cache_size=-{_CACHE_KIB}",
        ):
            cursor.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    raw: Any = connection.connection.driver_connection
    raw.execute("BEGIN")  # by SQLAlchemy it takes as long as ten inserts


class Postgres(Database):
    """A server that many processes use: gateways, relayers."""

    is_shared = True

    def __init__(self, url: sa.URL) -> None:
        ours = secrets.token_hex(4)
        engine = sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            pool_size=8,
            connect_args={**_CONNECTION, "application_name": f"waterfall/{ours}"},
        )
        super().__init__(engine)
        self._ours = ours
        """Ends the names of our sessions, so that another thread's is known as ours from its first moment."""
        self._ids: deque[int] = deque()
        self._drawing = threading.Lock()
        self._session: psycopg.Connection[Any] | None = None
        self._leading: set[str] = set()
        self._electing = threading.Lock()

    def prepare(self, connection: sa.Connection) -> None:
        """Wait for others that are at it."""
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_OPENING, 0)))

    def start(self, connection: sa.Connection) -> None:
        """The ids are the server's."""

    def check_alone(self, connection: sa.Connection) -> None:
        """By the names that our sessions give themselves."""
        with self._electing:
            leader = 0 if self._session is None else self._session.info.backend_pid
            others = connection.execute(_OTHERS, {"ours": self._ours, "leader": leader}).scalar_one()
        if others:
            raise LedgerError(reason=f"{others} sessions of Waterfall use it: stop every gateway and relayer")

    def go_on_after(self, connection: sa.Connection) -> None:
        """Move the sequences."""
        charge_ids, order_ids = schema.charge_sequence.name, "policy_orders_id_seq"
        for sequence, column in (
            (charge_ids, schema.holds.c.sequence),
            (order_ids, schema.policy_orders.c.id),
        ):
            last = connection.execute(sa.select(sa.func.max(column))).scalar()
            connection.execute(sa.select(sa.func.setval(sequence, last or 1, last is not None)))

    def close(self) -> None:
        """Let go of it, and of what it leads."""
        with self._electing:
            self._resign()
        super().close()

    def compiled(self, statement: sa.Executable, *names: str) -> str:
        """A statement as psycopg takes it."""
        return _compiled(statement, psycopg_dialect(paramstyle="format"), names)  # type: ignore[no-untyped-call]

    def money(self, units: int) -> int:
        """NUMERIC holds any."""
        return units

    def keys(self, keys: Collection[Any]) -> list[Any]:
        """An array."""
        return list(keys)

    def insert(self, cursor: Any, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """All in one pipeline."""
        cursor.executemany(sql, rows)

    def at_once(self, raw: psycopg.Connection[Any]) -> AbstractContextManager[Any]:
        """The server's pipeline: accounts are locked for one way there and back."""
        return raw.pipeline()

    def one_of(self, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
        """= ANY of an array."""
        return column == sa.any_(sa.bindparam("keys", type_=postgresql.ARRAY(column.type)))

    def insert_new(self, table: sa.Table) -> sa.Insert:
        """INSERT … ON CONFLICT DO NOTHING."""
        return postgresql.insert(table).on_conflict_do_nothing()

    def draw(self) -> int:
        """From a few that this process has taken from the sequence."""
        with self._drawing:
            if not self._ids:
                next_ = sa.select(schema.charge_sequence.next_value()).select_from(
                    sa.func.generate_series(1, _IDS_AT_ONCE)
                )
                with self.engine.begin() as connection:
                    self._ids.extend(connection.execute(next_).scalars())
            return self._ids.popleft()

    def forget_drawn(self) -> None:
        """Restoring a backup sets the sequence back."""
        with self._drawing:
            self._ids.clear()

    def leads(self, part: str) -> bool:
        """By an advisory lock of a session of its own: whoever dies, or loses the server, leads no more.

        That the session still lives is asked of the server every time.
        """
        with self._electing:
            try:
                if self._session is None:
                    url = self.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
                    self._session = psycopg.connect(url, autocommit=True, **{**_CONNECTION, **_LEADER})
                if part in self._leading:
                    self._session.execute("SELECT 1")
                    return True
                locked = self._session.execute(
                    "SELECT pg_try_advisory_lock(%s, hashtext(%s))", (_LEADING, part)
                ).fetchone()
            except psycopg.Error as error:
                self._resign()
                raise LedgerError(reason=reason_of(error)) from error
            if locked is not None and locked[0]:
                self._leading.add(part)
            return part in self._leading

    def is_led(self, connection: sa.Connection, part: str) -> bool:
        """By the lock that its leader holds."""
        return connection.execute(_IS_LED, {"space": _LEADING, "part": part}).scalar_one() is True

    def _resign(self) -> None:
        self._leading.clear()
        if self._session is not None:
            with suppress(psycopg.Error):
                self._session.close()
        self._session = None

    def goes_through_again(self, error: Exception) -> bool:
        """After a deadlock, a serialization failure, a key that another process wrote at once, a lost connection."""
        cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        if not isinstance(cause, psycopg.Error):
            return False
        if cause.sqlstate is None:
            return isinstance(cause, psycopg.OperationalError)  # the connection's, not the server's answer
        return cause.sqlstate in _TRY_AGAIN or cause.sqlstate.startswith(_STOPPED)


@lru_cache
def _of_many(insert: str, rows: int) -> str:
    """An insert of one row as one of many."""
    head, word, row = insert.partition(" VALUES ")
    return head + word + ", ".join([row] * rows)


def _compiled(statement: sa.Executable, dialect: sa.Dialect, names: Sequence[str]) -> str:
    compiled: Any = cast("sa.ClauseElement", statement).compile(dialect=dialect)
    if tuple(compiled.positiontup or ()) != names:
        raise ValueError(f"{compiled} takes {compiled.positiontup}, not {names}")
    return str(compiled)
