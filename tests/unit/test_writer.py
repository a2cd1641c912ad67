"""The writer on both databases: durable before it answers, each failure alone, and nothing that anybody is told twice."""

import asyncio
import gc
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
import uvloop
from making import ACCOUNT, BLOCK_TIME, FUNDED, only_postgres, only_sqlite, sign

from waterfall.errors import HoldNotOpen, InsufficientFunds, InvalidRequest, LedgerError
from waterfall.ledger import journal, schema
from waterfall.ledger import writer as writers
from waterfall.ledger.database import Database
from waterfall.ledger.journal import Caller
from waterfall.ledger.writer import Writer
from waterfall.metering import prices

NOTES = sa.table("notes", sa.column("text"))


@pytest.fixture
def database(url):
    database = Database.open(url)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE notes (text TEXT PRIMARY KEY)")
    yield database
    database.close()


@pytest.fixture
def writer(database):
    writer = Writer(database)
    yield writer
    writer.close()


@pytest.fixture
def notes(database):
    """What another connection would read now."""

    def notes():
        with database.engine.connect() as connection:
            return sorted(connection.execute(sa.select(NOTES)).scalars())

    return notes


def note(text, error=None):
    """An operation that writes a row, then fails if it is told to."""

    def operation(tx):
        tx.run(NOTES.insert().values(text=text))
        if error is not None:
            raise error
        return text

    return operation


class Gate:
    """Keeps the writer busy until everything that shall share a commit is queued."""

    def __init__(self, writer):
        self._writer = writer
        self._open = threading.Event()

    async def __aenter__(self):
        entered = asyncio.Event()
        loop = asyncio.get_running_loop()

        def operation(_):
            loop.call_soon_threadsafe(entered.set)
            self._open.wait(10)

        self._task = asyncio.create_task(self._writer.run(operation))
        await entered.wait()

    async def __aexit__(self, *_):
        await asyncio.sleep(0)  # whoever was started in here has queued by now
        self._open.set()
        await self._task


async def test_run__operation__is_durable_when_it_returns(writer, notes):
    assert await writer.run(note("a")) == "a"
    assert notes() == ["a"]


async def test_run__error_of_ours__is_raised_as_it_is_and_undone(writer, notes):
    error = InvalidRequest(reason="no")
    with pytest.raises(InvalidRequest) as raised:
        await writer.run(note("a", error))
    assert raised.value is error
    assert notes() == []


async def test_run__defect__is_raised_as_it_is_so_that_nobody_tries_it_again(writer, notes):
    with pytest.raises(ValueError, match="boom"):
        await writer.run(note("a", ValueError("boom")))
    assert notes() == []


async def test_run__error_of_the_database__says_why(writer):
    await writer.run(note("a"))
    with pytest.raises(LedgerError, match=r"(?i)unique"):
        await writer.run(note("a"))


async def test_run__error_of_the_database__the_next_is_done(writer, notes):
    async with Gate(writer):
        tasks = [asyncio.create_task(writer.run(note(text))) for text in ("a", "a", "b")]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["str", "LedgerError", "str"]
    assert notes() == ["a", "b"]


async def test_run__commit_fails__nobody_is_told_that_it_held(database, writer, notes):
    failing = [sqlite3.OperationalError("disk I/O error")]

    def fail(_):
        if failing:
            raise failing.pop()

    sa.event.listen(database.engine, "commit", fail)
    with pytest.raises(LedgerError, match="disk I/O error"):
        await writer.run(note("a"))
    assert notes() == []
    assert await writer.run(note("d")) == "d"
    assert notes() == ["d"]


async def test_run__commit_refused_by_the_database__fails_and_the_writer_goes_on(database, writer, notes):
    """SQLite leaves the transaction of a failed COMMIT open."""
    deferred = "CREATE TABLE replies (text TEXT REFERENCES notes (text) DEFERRABLE INITIALLY DEFERRED)"
    with database.engine.begin() as connection:
        connection.exec_driver_sql(deferred)

    def dangling(tx):
        tx.run(sa.text("INSERT INTO replies VALUES ('to nothing')"))

    with pytest.raises(LedgerError, match=r"(?i)foreign key"):
        await writer.run(dangling)
    assert await writer.run(note("d")) == "d"
    assert notes() == ["d"]


@only_sqlite
async def test_run__database_is_locked__fails_and_recovers(database, writer, notes, tmp_path, monkeypatch):
    monkeypatch.setattr("waterfall.ledger.database._SQLITE_WAIT_SECONDS", 0)
    await writer.run(lambda tx: tx.run(sa.text("PRAGMA busy_timeout=0")))
    other = sqlite3.connect(tmp_path / "waterfall.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="locked"):
        await writer.run(note("a"))
    other.execute("ROLLBACK")
    other.close()
    assert await writer.run(note("b")) == "b"
    assert notes() == ["b"]


@only_postgres
async def test_run__connection_lost_before_the_commit__is_done_on_another(database, writer, notes):
    await writer.run(note("a"))
    with database.engine.connect() as connection:
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
        connection.exec_driver_sql(others)
    assert await writer.run(note("b")) == "b"
    assert notes() == ["a", "b"]


@only_postgres
async def test_run__connection_lost_in_the_commit__is_an_error_as_nobody_knows(database, writer, notes):
    """What was asked for may be durable: whoever asks again has to be able to tell."""

    def lose(connection):
        pid = connection.connection.driver_connection.info.backend_pid
        with database.engine.connect() as other:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 1000)")

    sa.event.listen(database.engine, "commit", lose, once=True)
    with pytest.raises(LedgerError):
        await writer.run(note("a"))
    assert await writer.run(note("b")) == "b"


async def test_run__waiter_cancelled__its_operation_is_durable_all_the_same(writer, notes):
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with Gate(writer):
        task = asyncio.create_task(writer.run(note("a")))
        failing = asyncio.create_task(writer.run(note("b", ValueError("unseen"))))
        await asyncio.sleep(0)
        task.cancel()
        failing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await writer.run(note("z"))
    assert notes() == ["a", "z"]
    del task, failing
    gc.collect()
    assert complaints == []


async def test_run__event_loop_of_a_waiter_is_gone__the_writer_goes_on(writer, notes):
    async with Gate(writer):

        async def leave():
            task = asyncio.create_task(writer.run(note("a")))
            await asyncio.sleep(0)
            task.cancel()

        with ThreadPoolExecutor() as threads:
            threads.submit(asyncio.run, leave()).result()
    assert await writer.run(note("b")) == "b"
    assert notes() == ["a", "b"]


def test_run_sync__operation__is_durable_when_it_returns(writer, notes):
    assert writer.run_sync(note("a")) == "a"
    with pytest.raises(InvalidRequest):
        writer.run_sync(note("b", InvalidRequest(reason="no")))
    assert notes() == ["a"]


async def test_run__threads_and_tasks_at_once__all_answered(writer, notes):
    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(writer.run_sync, note(f"t{n}")) for n in range(50)]
        await asyncio.gather(*(writer.run(note(f"a{n}")) for n in range(50)))
        assert {future.result() for future in futures} == {f"t{n}" for n in range(50)}
    assert len(notes()) == 100


async def test_run__read_then_write__nobody_comes_between(writer):
    """The check and the change of one operation are one step, however many ask at once."""

    def increase(tx):
        count = len(tx.run(sa.select(NOTES)).all())
        tx.run(NOTES.insert().values(text=str(count)))
        return count

    counts = await asyncio.gather(*(writer.run(increase) for _ in range(50)))
    assert sorted(counts) == list(range(50))


async def test_close__queued_operations__are_finished_first(database, notes):
    writer = Writer(database)
    async with Gate(writer):
        tasks = [asyncio.create_task(writer.run(note(str(n)))) for n in range(10)]
    writer.close()
    assert await asyncio.gather(*tasks) == [str(n) for n in range(10)]
    assert len(notes()) == 10


async def test_run__after_close__is_refused(database):
    writer = Writer(database)
    writer.close()
    with pytest.raises(LedgerError, match="closed"):
        await writer.run(note("a"))
    with pytest.raises(LedgerError, match="closed"):
        writer.run_sync(note("a"))


@only_sqlite
def test_engine__pragmas__durable_and_strict_about_references(database):
    with database.engine.connect() as connection:
        read = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert read == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


# ── Entries in the books ─────────────────────────────────────────────────────────────────────────────


def hold(amount, account=ACCOUNT, receipt_id=None):
    """An entry that sets money aside."""
    return lambda books: journal.hold(
        books,
        epoch=1,
        caller=Caller(account, None),
        surface="chat",
        model="small",
        bound=prices.fixed(amount),
        block_time=BLOCK_TIME,
        expiry_margin=0,
        lease_ms=60_000,
        receipt_id=receipt_id or f"{next(_receipts):032x}",
    )


_receipts = iter(range(1, 10**6))


@pytest.fixture
def commits(desk):
    """The commits so far, one item each."""
    commits = []
    sa.event.listen(desk.ledger._database.engine, "commit", commits.append)  # noqa: SLF001
    return commits


@pytest.fixture
def enter(desk):
    """Makes entries that share a commit; what each gave or raised."""

    async def enter(*entries):
        writer = desk.ledger._writer  # noqa: SLF001
        async with Gate(writer):
            tasks = [asyncio.create_task(writer.enter(entry, (ACCOUNT,))) for entry in entries]
        return await asyncio.gather(*tasks, return_exceptions=True)

    return enter


async def held(desk):
    return (await desk.wallet()).held


@only_sqlite
async def test_enter__many_waiters__share_one_commit_in_their_order(desk, enter, commits):
    results = await enter(*(hold(1) for _ in range(100)))
    sequences = [result.sequence for result in results]
    assert sequences == sorted(set(sequences))
    assert len(commits) == 2, "the gate's and theirs"
    assert await held(desk) == 100


@only_sqlite
async def test_enter__waiters_that_ask_again_and_again__all_share_each_commit(desk, commits, monkeypatch):
    """Not half of them while the other half is being answered. On the gateway's event loop."""
    monkeypatch.setattr(writers, "_TURN_SECONDS", 10)
    writer = desk.ledger._writer  # noqa: SLF001

    async def ask():
        for _ in range(20):
            await writer.enter(hold(1), (ACCOUNT,))

    async def ask_at_two_times():
        loop, late_are_in, late = asyncio.get_running_loop(), threading.Event(), []

        def begin_late():
            late.extend(asyncio.create_task(ask()) for _ in range(8))
            loop.call_soon(late_are_in.set)

        @sa.event.listens_for(desk.ledger._database.engine, "commit", once=True)  # noqa: SLF001
        def others_come_meanwhile(_):
            loop.call_soon_threadsafe(begin_late)
            late_are_in.wait()

        await asyncio.gather(*(ask() for _ in range(8)))
        await asyncio.gather(*late)

    await asyncio.to_thread(uvloop.run, ask_at_two_times())
    assert len(commits) <= 20 + 3


@only_sqlite
async def test_enter__more_waiters_than_a_commit_takes__all_answered(desk, enter, commits):
    await enter(*(hold(1) for _ in range(600)))
    assert len(commits) == 1 + 3
    assert await held(desk) == 600


async def test_enter__one_of_a_group_cannot_pay__fails_alone(desk, enter):
    results = await enter(hold(1), hold(FUNDED + 1), hold(FUNDED - 1), hold(1))
    assert [type(r).__name__ for r in results] == ["Hold", "InsufficientFunds", "Hold", "FundsHeld"]
    assert await held(desk) == FUNDED
    assert isinstance(results[1], InsufficientFunds)


async def test_enter__fails_after_it_changed_the_books__leaves_nothing_in_them(desk, enter):
    def fails(books):
        hold(5)(books)
        raise InvalidRequest(reason="no")

    results = await enter(hold(1), fails, hold(2))
    assert [type(r).__name__ for r in results] == ["Hold", "InvalidRequest", "Hold"]
    assert await held(desk) == 3


async def test_enter__one_of_a_group_ends_a_hold_that_is_not_open__fails_alone(desk, enter):
    gone = await desk.hold(3)
    await desk.ledger.release(gone, "first")
    results = await enter(hold(1), lambda books: journal.release(books, gone, "again"), hold(2))
    assert [type(r).__name__ for r in results] == ["Hold", "HoldNotOpen", "Hold"]
    assert await held(desk) == 3


async def test_enter__two_of_a_group_end_the_same_hold__the_first_does(desk, enter):
    open_ = await desk.hold(3)
    results = await enter(
        lambda books: journal.capture(books, open_, sign(open_, 2)),
        lambda books: journal.release(books, open_, "too late"),
    )
    assert [type(r).__name__ for r in results] == ["Captured", "HoldNotOpen"]
    assert isinstance(results[1], HoldNotOpen)
    wallet = await desk.wallet()
    assert (wallet.held, wallet.unsettled) == (0, 2)


async def test_enter__one_of_a_group_breaks_the_database__fails_alone(desk, enter):
    results = await enter(hold(1, receipt_id="same"), hold(2, receipt_id="same"), hold(4))
    assert [type(r).__name__ for r in results] == ["Hold", "LedgerError", "Hold"]
    assert await held(desk) == 5


async def test_enter__database_out_of_order__nobody_is_told_that_it_held(desk, enter):
    turns = ["the gate's", "theirs"]

    def fail(_):
        if turns and turns.pop(0) == "theirs":
            raise sqlite3.OperationalError("disk I/O error")

    sa.event.listen(desk.ledger._database.engine, "commit", fail)  # noqa: SLF001
    results = await enter(hold(1), hold(FUNDED + 1), hold(2))
    assert [type(result) for result in results] == [LedgerError] * 3
    assert await held(desk) == 0
    assert (await desk.hold(7)).amount == 7
    assert await held(desk) == 7


async def test_enter__another_kind_of_operation_between__keeps_the_order(desk):
    writer, seen = desk.ledger._writer, []  # noqa: SLF001

    def look(tx):
        seen.append(tx.run(sa.select(schema.wallets.c.held)).scalar())

    async with Gate(writer):
        tasks = [
            asyncio.create_task(writer.enter(hold(1), (ACCOUNT,))),
            asyncio.create_task(writer.run(look)),
            asyncio.create_task(writer.enter(hold(2), (ACCOUNT,))),
            asyncio.create_task(writer.run(look)),
        ]
    await asyncio.gather(*tasks)
    assert seen == [1, 3]
