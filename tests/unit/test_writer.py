import asyncio
import gc
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from waterfall.errors import InvalidRequest, LedgerError
from waterfall.ledger import store
from waterfall.ledger.writer import Writer


@pytest.fixture
def engine(url):
    engine = store._engine(url)  # noqa: SLF001 - with the ledger's own pragmas
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE notes (text TEXT PRIMARY KEY) STRICT")
    yield engine
    engine.dispose()


@pytest.fixture
def writer(engine):
    writer = Writer(engine)
    yield writer
    writer.close()


@pytest.fixture
def commits(engine):
    """The commits so far, one item each."""
    commits = []
    sa.event.listen(engine, "commit", commits.append)
    return commits


@pytest.fixture
def notes(tmp_path):
    """What another process would read now."""

    def notes():
        with sqlite3.connect(tmp_path / "waterfall.db") as connection:
            rows = connection.execute("SELECT text FROM notes ORDER BY rowid").fetchall()
        connection.close()
        return [text for (text,) in rows]

    return notes


def note(text, error=None):
    """An operation that writes a row, then fails if it is told to."""

    def operation(tx):
        tx.hot("INSERT INTO notes VALUES (?)", (text,))
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
    with pytest.raises(LedgerError, match="UNIQUE constraint failed"):
        await writer.run(note("a"))


async def test_run__many_waiters__share_one_commit_in_their_order(writer, commits, notes):
    async with Gate(writer):
        tasks = [asyncio.create_task(writer.run(note(f"{n:03}"))) for n in range(100)]
    assert await asyncio.gather(*tasks) == [f"{n:03}" for n in range(100)]
    assert len(commits) == 2, "the gate's and theirs"
    assert notes() == [f"{n:03}" for n in range(100)]


async def test_run__more_waiters_than_a_commit_takes__all_answered(writer, commits):
    async with Gate(writer):
        tasks = [asyncio.create_task(writer.run(note(str(n)))) for n in range(600)]
    await asyncio.gather(*tasks)
    assert len(commits) == 1 + 3


async def test_run__one_of_a_group_fails__is_undone_alone(writer, commits, notes):
    async with Gate(writer):
        tasks = [
            asyncio.create_task(writer.run(note(text, error)))
            for text, error in [("a", None), ("b", InvalidRequest(reason="no")), ("c", None), ("c", None)]
        ]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["str", "InvalidRequest", "str", "LedgerError"]
    assert notes() == ["a", "c"]
    assert len(commits) == 2


async def test_run__commit_fails__nobody_is_told_that_it_held(writer, engine, notes):
    turns = ["the gate's", "theirs"]

    def fail(_):
        if turns and turns.pop(0) == "theirs":
            raise sqlite3.OperationalError("disk I/O error")

    sa.event.listen(engine, "commit", fail)
    async with Gate(writer):
        tasks = [asyncio.create_task(writer.run(note(text))) for text in "ab"]
        tasks.append(asyncio.create_task(writer.run(note("c", InvalidRequest(reason="no")))))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [LedgerError] * 3
    assert notes() == []
    assert await writer.run(note("d")) == "d"
    assert notes() == ["d"]


async def test_run__commit_refused_by_the_database__fails_and_the_writer_goes_on(writer, notes):
    """SQLite leaves the transaction of a failed COMMIT open."""
    await writer.run(lambda tx: tx.hot("CREATE TABLE replies (text TEXT REFERENCES notes (text)) STRICT"))

    def dangling(tx):
        tx.hot("PRAGMA defer_foreign_keys=ON")
        tx.hot("INSERT INTO replies VALUES ('to nothing')")

    async with Gate(writer):
        tasks = [asyncio.create_task(writer.run(operation)) for operation in (note("a"), dangling)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [LedgerError] * 2
    assert "FOREIGN KEY" in results[0].message
    assert await writer.run(note("d")) == "d"
    assert notes() == ["d"]


async def test_run__database_is_locked__fails_and_recovers(tmp_path, notes):
    engine = sa.create_engine(f"sqlite:///{tmp_path}/waterfall.db", connect_args={"timeout": 0})
    sa.event.listen(engine, "connect", store._configure)  # noqa: SLF001
    sa.event.listen(engine, "begin", store._begin)  # noqa: SLF001
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE notes (text TEXT PRIMARY KEY) STRICT")
    writer = Writer(engine)
    other = sqlite3.connect(tmp_path / "waterfall.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="locked"):
        await writer.run(note("a"))
    other.execute("ROLLBACK")
    other.close()
    assert await writer.run(note("b")) == "b"
    assert notes() == ["b"]
    writer.close()
    engine.dispose()


async def test_run__transaction_ended_by_the_database__fails_the_whole_group(writer, notes):
    """A full disk makes SQLite roll back by itself: the savepoint is gone with everything before it."""

    def rolled_back(tx):
        tx.hot("ROLLBACK")
        raise sqlite3.OperationalError("database or disk is full")

    async with Gate(writer):
        tasks = [
            asyncio.create_task(writer.run(operation)) for operation in (note("a"), rolled_back, note("c"))
        ]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [LedgerError] * 3
    assert notes() == []
    assert await writer.run(note("d")) == "d"


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


async def test_run__read_then_write__nobody_comes_between(writer, engine):
    """The check and the change of one operation are one step, however many ask at once."""

    def increase(tx):
        count = len(tx.hot("SELECT text FROM notes").fetchall())
        tx.hot("INSERT INTO notes VALUES (?)", (str(count),))
        return count

    counts = await asyncio.gather(*(writer.run(increase) for _ in range(200)))
    assert sorted(counts) == list(range(200))


async def test_close__queued_operations__are_finished_first(engine, notes):
    writer = Writer(engine)
    async with Gate(writer):
        tasks = [asyncio.create_task(writer.run(note(str(n)))) for n in range(10)]
    writer.close()
    assert await asyncio.gather(*tasks) == [str(n) for n in range(10)]
    assert len(notes()) == 10


async def test_run__after_close__is_refused(engine):
    writer = Writer(engine)
    writer.close()
    with pytest.raises(LedgerError, match="closed"):
        await writer.run(note("a"))
    with pytest.raises(LedgerError, match="closed"):
        writer.run_sync(note("a"))


def test_engine__pragmas__durable_and_strict_about_references(engine):
    with engine.connect() as connection:
        read = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert read == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
