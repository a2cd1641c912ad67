"""One thread writes; whatever is waiting when it turns shares one durable transaction (group commit)."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa

from waterfall.errors import LedgerError
from waterfall.ledger.books import Books, HoldsChanged, Statements
from waterfall.ledger.database import DATABASE_ERRORS, OUT_OF_ORDER, Database, reason_of
from waterfall.metrics import Metrics

T = TypeVar("T")
_MOST_PER_COMMIT = 256
_MOST_TRIES = 5
_TURN_SECONDS = 0.001
"""How long the next commit waits at most for those whom this one has answered."""


class Transaction:
    """What an operation writes with that has a commit for itself."""

    def __init__(self, connection: sa.Connection, database: Database) -> None:
        self._connection = connection
        self._database = database

    def run(self, statement: sa.Executable, parameters: Any = None) -> sa.CursorResult[Any]:
        """Execute a SQLAlchemy statement, once or for each of a list of parameters, which is not empty."""
        return self._connection.execute(statement, parameters)

    def insert_new(self, table: sa.Table, row: dict[str, Any]) -> None:
        """Insert a row unless there is one with its key."""
        self._connection.execute(self._database.insert_new(table), row)

    def check_alone(self) -> None:
        """See that no other process works with the database, nor begins to before this transaction ends.

        Raises:
            LedgerError: one does.
        """
        self._database.prepare(self._connection)
        self._database.check_alone(self._connection)


Operation = Callable[[Transaction], T]
Entry = Callable[[Books], T]
"""An operation on the path of a call."""


@dataclass(slots=True)
class _Waiting:
    operation: Callable[[Any], Any]
    accounts: Collection[str] | None
    """Of an entry in the books: whose wallets it is about. None: it has a transaction for itself."""
    future: Future[Any] | asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop | None
    result: Any = None
    error: BaseException | None = None

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
    every operation in it fails with `LedgerError`: nothing is ever answered that is not durable. Whether something
    is durable that was answered so, nobody knows: it may be asked for again.
    """

    def __init__(self, database: Database, metrics: Metrics | None = None) -> None:
        """Start it; `metrics` counts its commits."""
        self._metrics = metrics or Metrics()
        self._database = database
        self._statements = Statements(database)
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._closed = False
        self._turned = threading.Event()
        self._connection: sa.Connection | None = None
        self._thread = threading.Thread(target=self._loop, name="ledger-writer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many operations have not had their turn yet."""
        return self._queue.qsize()

    async def enter(self, entry: Entry[T], accounts: Collection[str]) -> T:
        """Make an entry in the books and wait for it to be durable. Cancelling the waiter does not undo it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._put(_Waiting(entry, accounts, future, loop))
        return await future

    async def run(self, operation: Operation[T]) -> T:
        """Run an operation in a transaction for itself and wait for it to be durable."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._put(_Waiting(operation, None, future, loop))
        return await future

    def run_sync(self, operation: Operation[T]) -> T:
        """The same for code without an event loop."""
        future: Future[T] = Future()
        self._put(_Waiting(operation, None, future, None))
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
        open_ = True
        while open_:
            group: list[_Waiting] = []
            item = self._queue.get()
            while item is not None:
                group.append(item)
                if item.accounts is None or len(group) == _MOST_PER_COMMIT or self._queue.empty():
                    break
                item = self._queue.get_nowait()
            open_ = item is not None
            alone = [group.pop()] if group and group[-1].accounts is None else []
            for members in (group, alone):
                if members:
                    self._commit(members)
                    self._answer(members)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _answer(self, group: list[_Waiting]) -> None:
        """Wake each event loop once, however many of its waiters are answered.

        Where others wait for a commit already, it waits in turn until the loop has dealt with these answers: what they
        lead to shares the next commit. At 16 waiters that halves the commits, and the two threads take turns at the
        interpreter's lock instead of fighting for it.
        """
        answers: dict[asyncio.AbstractEventLoop | None, list[Callable[[], None]]] = {}
        for waiting in group:
            answers.setdefault(waiting.loop, []).append(waiting.answer)
        self._turned.clear()
        awaited = False
        for loop, its in answers.items():
            if loop is None:
                _call_all(its)
                continue
            with suppress(RuntimeError):  # the loop is closed: what they asked for is durable all the same
                # Those who are answered go on in the loop's next turn, so this comes after them.
                its.append(lambda loop=loop: loop.call_soon(self._turned.set))  # type: ignore[misc]
                loop.call_soon_threadsafe(_call_all, its)
                awaited = True
        if awaited and not self._queue.empty():
            self._turned.wait(_TURN_SECONDS)

    def _commit(self, group: list[_Waiting], tries: int = _MOST_TRIES) -> None:
        """Commit a group. One that cannot go through as a whole is done again one by one, so that each fails alone."""
        commits, began = False, time.monotonic()
        try:
            connection = self._connected()
            with connection.begin() as transaction:
                self._execute(connection, group)
                commits = True
                transaction.commit()
            self._metrics.commit_seconds.observe(time.monotonic() - began)
            self._metrics.commit_operations.observe(len(group))
        except _Undone:
            return
        except Exception as error:  # noqa: BLE001 - whatever broke the commit, nobody may be told that it held
            if not isinstance(error, HoldsChanged):
                self._disconnect()
            if not commits and len(group) > 1 and not isinstance(error, OUT_OF_ORDER):
                for waiting in group:
                    self._commit([waiting])
            elif not commits and tries > 1 and self._database.goes_through_again(error):
                self._commit(group, tries - 1)
            else:
                self._metrics.commit_failures.inc()
                for waiting in group:
                    waiting.result, waiting.error = None, _as_ledger_error(error)

    def _connected(self) -> sa.Connection:
        if self._connection is None:
            self._connection = self._database.engine.connect()
        return self._connection

    def _disconnect(self) -> None:
        """What failed may have left its transaction open, or the connection dead."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):  # a dead connection may fail at that too; the writer never does
                connection.invalidate()
                connection.close()

    def _execute(self, connection: sa.Connection, group: list[_Waiting]) -> None:
        if group[0].accounts is None:
            _attempt(group[0], lambda operation: operation(Transaction(connection, self._database)))
        else:
            books = Books(connection, self._database, self._statements, time.time_ns() // 1_000_000)
            books.read({account for waiting in group for account in waiting.accounts or ()})
            for waiting in group:
                _attempt(waiting, books.attempt)
            try:
                books.write()
            except HoldsChanged:
                if len(group) > 1:
                    raise
                group[0].error = books.not_open()
        if len(group) == 1 and group[0].error is not None:
            raise _Undone


class _Undone(Exception):
    """The only operation of a transaction has failed, and was told."""


def _attempt(waiting: _Waiting, run: Callable[[Callable[[Any], Any]], Any]) -> None:
    """Let an operation do its work; what is wrong with it, it is told. What the database says, concerns all."""
    waiting.error = None
    try:
        waiting.result = run(waiting.operation)
    except DATABASE_ERRORS:
        raise
    except Exception as error:  # noqa: BLE001 - it belongs to the caller
        waiting.error = error


def _as_ledger_error(error: Exception) -> LedgerError:
    ledger_error = LedgerError(reason=reason_of(error))
    ledger_error.__cause__ = error
    return ledger_error


def _call_all(answers: list[Callable[[], None]]) -> None:
    for answer in answers:
        answer()
