"""One thread writes; whatever is waiting when it turns shares one durable transaction (group commit)."""

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import sqlalchemy as sa

from waterfall.errors import LedgerError

T = TypeVar("T")
_MOST_PER_COMMIT = 256


class Transaction:
    """What an operation writes with. It is part of a larger commit, but fails alone."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        raw = connection.connection.driver_connection
        if raw is None:
            raise LedgerError(reason="the database connection is closed")
        self.hot: Callable[..., Any] = raw.cursor().execute
        """Execute driver SQL: for the few statements on the path of a call, where SQLAlchemy costs 20 times more."""

    def run(self, statement: sa.Executable, parameters: Any = None) -> sa.CursorResult[Any]:
        """Execute a SQLAlchemy statement."""
        return self._connection.execute(statement, parameters)


Operation = Callable[[Transaction], T]


@dataclass(slots=True)
class _Waiting:
    operation: Operation[Any]
    future: Future[Any] | asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop | None
    result: Any = None
    error: Exception | None = None

    def answer(self) -> None:
        if self.future.done():  # the waiter was cancelled; what it asked for is durable all the same
            return
        if self.error is not None:
            self.future.set_exception(self.error)
            self.future.exception()  # a waiter that was cancelled never asks for it, and asyncio would complain
        else:
            self.future.set_result(self.result)


class Writer:
    """Runs operations one after another and answers each after the commit that made it durable.

    An operation that raises is undone alone; an error of the database becomes a `LedgerError`. If the commit fails,
    every operation in it fails with `LedgerError`: nothing is ever answered that is not durable.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="ledger-writer", daemon=True)
        self._thread.start()

    async def run(self, operation: Operation[T]) -> T:
        """Run an operation and wait for it to be durable. Cancelling the waiter does not undo it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._put(_Waiting(operation, future, loop))
        return await asyncio.shield(future)

    def run_sync(self, operation: Operation[T]) -> T:
        """The same for code without an event loop."""
        future: Future[T] = Future()
        self._put(_Waiting(operation, future, None))
        return future.result()

    def _put(self, waiting: _Waiting) -> None:
        if self._closed:
            raise LedgerError(reason="it is closed")
        self._queue.put(waiting)

    def close(self) -> None:
        """Finish what is queued and stop."""
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        with self._engine.connect() as connection:
            open_ = True
            while open_:
                group: list[_Waiting] = []
                item = self._queue.get()
                while item is not None:
                    group.append(item)
                    if len(group) == _MOST_PER_COMMIT or self._queue.empty():
                        break
                    item = self._queue.get_nowait()
                open_ = item is not None
                if group:
                    self._commit(connection, group)
                    _answer(group)

    def _commit(self, connection: sa.Connection, group: list[_Waiting]) -> None:
        try:
            with connection.begin():
                transaction = Transaction(connection)
                for waiting in group:
                    _execute(transaction, waiting)
        except Exception as error:  # noqa: BLE001 - whatever broke the commit, nobody may be told that it held
            connection.invalidate()  # a commit that failed may have left its transaction open
            for waiting in group:
                waiting.result, waiting.error = None, _as_ledger_error(error)


def _execute(transaction: Transaction, waiting: _Waiting) -> None:
    transaction.hot("SAVEPOINT operation")
    try:
        waiting.result = waiting.operation(transaction)
    except Exception as error:  # noqa: BLE001 - it belongs to the caller
        is_database = isinstance(error, sqlite3.Error | sa.exc.DBAPIError)
        waiting.error = _as_ledger_error(error) if is_database else error
        transaction.hot("ROLLBACK TO operation")
    transaction.hot("RELEASE operation")


def _as_ledger_error(error: Exception) -> LedgerError:
    reason = str(error.orig) if isinstance(error, sa.exc.DBAPIError) else repr(error)
    ledger_error = LedgerError(reason=reason)
    ledger_error.__cause__ = error
    return ledger_error


def _answer(group: list[_Waiting]) -> None:
    """Wake each event loop once, however many of its waiters are answered."""
    for loop, members in groupby(sorted(group, key=lambda w: id(w.loop)), key=lambda w: w.loop):
        answers = [waiting.answer for waiting in members]
        if loop is None:
            _call_all(answers)
        else:
            with suppress(RuntimeError):  # the loop is closed: what they asked for is durable all the same
                loop.call_soon_threadsafe(_call_all, answers)


def _call_all(answers: list[Callable[[], None]]) -> None:
    for answer in answers:
        answer()
