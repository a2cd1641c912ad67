"""One consistent view of a ledger, to read beside the process that writes to it."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from waterfall.errors import LedgerError
from waterfall.ledger import schema
from waterfall.ledger.database import DATABASE_ERRORS, reason_of
from waterfall.ledger.migrations import revision

T = TypeVar("T")

READER = "waterfall reader"
"""How such a session is named on a server."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a ledger is the ledger of."""

    chain_id: int
    vault: str
    platform: int

    def __str__(self) -> str:
        return f"platform {self.platform} of vault {self.vault} on chain {self.chain_id}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A ledger as it was at one moment."""

    connection: sa.Connection

    async def read(self, query: Callable[[sa.Connection], T]) -> T:
        """Run one query of this room in a thread; one after another.

        Raises:
            LedgerError
        """
        try:
            return await asyncio.to_thread(query, self.connection)
        except DATABASE_ERRORS as error:
            raise LedgerError(reason=reason_of(error)) from error


@contextmanager
def snapshot(url: str) -> Iterator[Snapshot]:
    """The ledger at a database URL as one commit left it, whatever is written meanwhile.

    Nothing is locked and nothing can be written with it.

    Raises:
        LedgerError: there is none, its tables are not this version's, or it cannot be read.
    """
    try:
        engine = _engine(url)
        try:
            with engine.connect() as connection, connection.begin():
                found = revision(connection)
                if found != schema.REVISION:
                    shown = "no tables" if found is None else f"schema {found}"
                    raise LedgerError(reason=f"it has {shown}, this version reads schema {schema.REVISION}")
                yield Snapshot(connection)
        finally:
            engine.dispose()
    except DATABASE_ERRORS as error:
        raise LedgerError(reason=reason_of(error)) from error


def identity(connection: sa.Connection) -> Identity:
    """What this ledger is of."""
    table = schema.meta
    facts = {row.key: row.value for row in connection.execute(sa.select(table))}
    return Identity(int(facts["chain_id"]), facts["vault"], int(facts["platform"]))


def _engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.drivername == "sqlite":
        file = Path(str(parsed.database))
        if not file.is_file():
            raise LedgerError(reason=f"there is no {file}")
        # "rw": a reader of a write-ahead log takes part in it, yet makes no file that is not there.
        where = f"{file.resolve().as_uri()}?mode=rw"
        engine = sa.create_engine(
            "sqlite://",
            creator=lambda: sqlite3.connect(where, uri=True, check_same_thread=False),
            poolclass=sa.NullPool,
        )
        sa.event.listen(engine, "connect", _only_read)
        sa.event.listen(engine, "begin", _begin)
        return engine
    return sa.create_engine(
        parsed.set(drivername="postgresql+psycopg"),
        poolclass=sa.NullPool,
        isolation_level="REPEATABLE READ",
        connect_args={
            "connect_timeout": 10,
            "application_name": READER,
            "options": "-c default_transaction_read_only=on",
        },
    )


def _only_read(connection: Any, _: Any) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA query_only=ON")


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN")
