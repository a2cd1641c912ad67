"""A few threads read what is committed; the writer is not waited for."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import sqlalchemy as sa

from waterfall.errors import LedgerError
from waterfall.ledger.database import DATABASE_ERRORS, Database, reason_of

T = TypeVar("T")
Query = Callable[[sa.Connection], T]

_THREADS = 6


class Reader:
    """Runs queries; an error of the database becomes a `LedgerError`."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="ledger-reader")

    async def read(self, query: Query[T]) -> T:
        """Run a query in a thread.

        Raises:
            LedgerError
        """
        return await self.run(lambda: self.read_sync(query))

    def read_sync(self, query: Query[T]) -> T:
        """The same, blocking."""
        try:
            with self._engine.connect() as connection:
                return query(connection)
        except DATABASE_ERRORS as error:
            raise LedgerError(reason=reason_of(error)) from error

    async def run(self, work: Callable[[], T]) -> T:
        """Have something else done in a thread that waits for the database.

        Raises:
            LedgerError
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except DATABASE_ERRORS as error:
            raise LedgerError(reason=reason_of(error)) from error

    def close(self) -> None:
        """Finish what is being read, and stop."""
        self._threads.shutdown()
