import asyncio
import contextlib
import itertools
import multiprocessing
import re
import sqlite3
import time

import pytest
import sqlalchemy as sa
from making import (
    ACCOUNT,
    BLOCK_TIME,
    CHAIN_ID,
    FUNDED,
    GENESIS,
    METER,
    PLATFORM,
    VAULT,
    Desk,
    block,
    deposited,
    only_postgres,
    only_sqlite,
)

from waterfall.errors import LedgerError, Unavailable
from waterfall.ledger import backup, journal, schema
from waterfall.ledger.journal import Caller
from waterfall.ledger.snapshot import Identity
from waterfall.ledger.store import Ledger, new_receipt_id

# ── Opening ──────────────────────────────────────────────────────────────────────────────────────────


def test_open__new__makes_the_file_and_its_folders(tmp_path):
    url = f"sqlite:///{tmp_path}/a/b/waterfall.db"
    ledger = Ledger.open(url, chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM)
    assert (tmp_path / "a/b/waterfall.db").exists()
    assert ledger.view.head is None
    assert 0 <= ledger.epoch < 2**32
    ledger.close()


@pytest.mark.parametrize(
    "url", ["", "nonsense", "waterfall.db", "sqlite://", "sqlite:///:memory:", "mysql://localhost/x"]
)
def test_open__not_a_database_file__is_refused(url):
    with pytest.raises(LedgerError):
        Ledger.open(url, chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM)


def test_open__folder_that_cannot_be_made__is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError):
        Ledger.open(
            f"sqlite:///{tmp_path}/file/waterfall.db", chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM
        )


@only_sqlite
def test_open__not_a_database__is_refused_and_may_be_tried_again(tmp_path, open_ledger):
    (tmp_path / "waterfall.db").write_text("this is no database at all, it only looks like a file\n" * 50)
    with pytest.raises(LedgerError, match="not a database"):
        open_ledger()
    (tmp_path / "waterfall.db").unlink()
    assert open_ledger().view.head is None


@only_sqlite
def test_open__in_use__is_refused(ledger, open_ledger):
    with pytest.raises(LedgerError, match="in use by another process"):
        open_ledger()


def _open_in_a_process(url, answers):
    try:
        Ledger.open(url, chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM).close()
    except LedgerError as error:
        answers.put(error.message)
    else:
        answers.put("opened")


@only_sqlite
def test_open__in_use_by_another_process__is_refused_until_it_is_closed(ledger, url):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    for expected in ("in use", "opened"):
        process = context.Process(target=_open_in_a_process, args=(url, answers))
        process.start()
        assert expected in answers.get(timeout=30)
        process.join()
        ledger.close()


@pytest.mark.parametrize(
    ("key", "other"), [("chain_id", 1), ("vault", "0x" + "11" * 20), ("platform", PLATFORM + 1)]
)
def test_open__of_another_chain_vault_or_platform__is_refused(ledger, open_ledger, key, other):
    ledger.close()
    with pytest.raises(LedgerError, match=f"belongs to {key}"):
        open_ledger(**{key: other})
    assert open_ledger().platform == PLATFORM


@only_sqlite
def test_open__other_schema__is_refused(ledger, open_ledger, tmp_path):
    ledger.close()
    with sqlite3.connect(tmp_path / "waterfall.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0000'")
    connection.close()
    with pytest.raises(LedgerError, match=r"has schema 0000.*waterfall db upgrade"):
        open_ledger()


def test_open__again__keeps_its_epoch(ledger, open_ledger):
    epoch = ledger.epoch
    ledger.close()
    assert open_ledger().epoch == epoch


def test_open__two_databases__have_different_epochs(tmp_path):
    epochs = set()
    for name in "abcd":
        ledger = Ledger.open(
            f"sqlite:///{tmp_path}/{name}.db", chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM
        )
        epochs.add(ledger.epoch)
        ledger.close()
    assert len(epochs) == 4


@only_sqlite
def test_tables__every_one__is_strict(ledger):
    with sa.create_engine(f"sqlite:///{ledger._database.engine.url.database}").connect() as connection:  # noqa: SLF001
        rows = connection.exec_driver_sql("SELECT name, strict FROM pragma_table_list WHERE schema = 'main'")
        loose = {name for name, strict in rows if not strict and not name.startswith(("sqlite_", "alembic_"))}
    connection.engine.dispose()
    assert loose == set()


# ── Recovery ─────────────────────────────────────────────────────────────────────────────────────────


@only_sqlite
async def test_open__holds_of_a_dead_process__are_lost_and_their_money_free(desk, open_ledger):
    held = await desk.hold(3)
    charge = await desk.charge(5)
    desk.ledger.close()
    again = Desk(open_ledger(), METER)
    assert again.ledger.lost_at_start == 1
    wallet = await again.wallet()
    assert (wallet.held, wallet.unsettled) == (0, charge.amount)
    at = (await again.call(held)).settlement
    assert (at.state, at.reason) == ("lost", "the gateway stopped between the hold and the capture")


@only_sqlite
async def test_open__sums_that_drifted__are_derived_anew_and_named(desk, open_ledger):
    await desk.charge(5)
    await desk.ledger.write(lambda tx: tx.run(schema.wallets.update().values(unsettled=6)))
    desk.ledger.close()
    again = Desk(open_ledger(), METER)
    assert again.ledger.recounted_at_start == [ACCOUNT]
    assert (await again.wallet()).unsettled == 5


async def test_open__again__goes_on_at_its_block_but_trusts_no_clock(desk, open_ledger):
    desk.ledger.close()
    again = open_ledger()
    assert again.view.head.block == block(1, BLOCK_TIME)
    with pytest.raises(Unavailable, match="not seen since the start"):
        again.block_time(10**9)
    again.view.saw_head()
    assert again.block_time(10**9) == BLOCK_TIME


# ── Whether calls may be authorised ──────────────────────────────────────────────────────────────────


def test_block_time__chain_not_read_yet__is_unavailable(ledger):
    with pytest.raises(Unavailable, match="not been read yet"):
        ledger.block_time(60)


async def test_block_time__view_of_the_chain_is_old__is_unavailable(desk, monkeypatch):
    now = desk.ledger.view.head.seen_at
    monkeypatch.setattr("time.monotonic", lambda: now + 60)
    assert desk.ledger.block_time(60) == BLOCK_TIME
    monkeypatch.setattr("time.monotonic", lambda: now + 61)
    with pytest.raises(Unavailable, match="last seen 61 s ago"):
        desk.ledger.block_time(60)
    desk.ledger.view.saw_head()
    assert desk.ledger.block_time(60) == BLOCK_TIME


async def test_block_time__refused__says_why_until_it_is_lifted(desk):
    desk.ledger.gate.refuse("settlement has stopped")
    with pytest.raises(Unavailable, match="settlement has stopped"):
        desk.ledger.block_time(60)
    desk.ledger.gate.refuse(None)
    assert desk.ledger.block_time(60) == BLOCK_TIME


# ── Hands ────────────────────────────────────────────────────────────────────────────────────────────


async def test_keep_rate_card__known_already__costs_no_write(desk, monkeypatch):
    kept = []
    monkeypatch.setattr(journal, "keep_rate_card", lambda tx, price_id, card: kept.append(price_id))
    for _ in range(3):
        await desk.ledger.keep_rate_card("0x1", None)
    assert kept == ["0x1"]


async def test_hold__lease__is_of_the_databases_clock(desk):
    held = await desk.hold(1)
    (row,) = await desk.table(schema.holds)
    now = await desk.ledger.read(lambda c: c.execute(sa.select(schema.now_ms())).scalar())
    assert now < row["lease_until"] <= now + 60_000
    assert held.sequence == row["sequence"]


async def test_read__while_writing__sees_only_what_is_committed(desk):
    entered, release = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(tx):
        tx.run(schema.wallets.update().values(held=99))
        loop.call_soon_threadsafe(entered.set)
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(10)

    writing = asyncio.create_task(desk.ledger.write(slow))
    await entered.wait()
    assert (await desk.wallet()).held == 0
    release.set()
    await writing
    assert (await desk.wallet()).held == 99


async def test_close__then_any_write__is_refused(desk):
    desk.ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        await desk.hold(1)


# ── Other processes ──────────────────────────────────────────────────────────────────────────────────


@only_postgres
async def test_follow__another_process_applies_a_block__it_is_the_head_here(desk, open_ledger):
    other = open_ledger()
    async with following(other):
        await desk.apply(block(2))
        await until(lambda: other.view.head is not None and other.view.head.block == block(2))
        assert other.block_time(60) == block(2).timestamp
        await desk.ledger.view.rewind(block(1, BLOCK_TIME))
        await until(lambda: other.view.head.block == block(1, BLOCK_TIME))


@only_postgres
async def test_follow__own_blocks__are_applied_one_after_another_all_the_same(desk):
    """What `follow` reads between a commit and its answer is no other process's move."""
    async with following(desk.ledger):
        for number in range(2, 60):
            await desk.apply(block(number))
    assert desk.ledger.view.head.block == block(59)


@only_postgres
async def test_apply__planned_on_a_head_that_another_process_has_taken_back__is_refused(desk, open_ledger):
    """Its view may be the newest by then, as it follows the other: its blocks are not."""
    other = open_ledger()
    async with following(other):
        await desk.apply(block(2), deposited(ACCOUNT, 5, entry=2))
        await desk.apply(block(3))
        await desk.ledger.view.rewind(block(1, BLOCK_TIME))
        await until(lambda: other.view._moves == desk.ledger.view._moves)  # noqa: SLF001 - it has seen all that
        with pytest.raises(LedgerError, match="while this move was planned"):
            await other.view.apply([(block(4), [])], spendable=4, final=0, after=block(3))
        with pytest.raises(LedgerError, match="while this move was planned"):
            await other.view.rewind(GENESIS, head=block(3))
        await other.view.apply([(block(2, fork="b"), [])], spendable=2, final=0, after=block(1, BLOCK_TIME))
    assert (await desk.wallet()).balance == FUNDED


@only_postgres
async def test_follow__key_made_and_replaced_by_another_process__is_known_and_forgotten_here(
    desk, open_ledger
):
    other = open_ledger()
    async with following(other):
        await desk.ledger.keys.set_platform_key("wf_first", "admin")
        await until(lambda: other.keys.find("wf_first") is not None)
        await desk.ledger.keys.set_platform_key("wf_second", "admin")
        await until(lambda: other.keys.find("wf_first").revoked_at is not None)
        assert other.keys.find("wf_second").revoked_at is None


@only_postgres
async def test_refuse__by_another_process__refuses_here_until_it_is_lifted(desk, open_ledger):
    other = open_ledger()
    async with following(desk.ledger), following(other):
        await desk.apply(block(2))
        await until(lambda: other.view.head is not None and other.view.head.block == block(2))
        desk.ledger.gate.refuse("settlement has stopped")
        await until(lambda: refusal(other) is not None)
        assert "settlement has stopped" in refusal(other)
        desk.ledger.gate.refuse(None)
        assert refusal(desk.ledger) is None
        await until(lambda: refusal(other) is None)


@only_postgres
async def test_saw_head__by_another_process__the_view_stays_fresh_here(desk, open_ledger, monkeypatch):
    other = open_ledger()
    async with following(desk.ledger), following(other):
        await desk.apply(block(2))
        await until(lambda: other.view.head is not None and other.view.head.block == block(2))
        before = other.view.head.seen_at
        desk.ledger.view.saw_head()
        await until(lambda: other.view.head.seen_at > before)


@only_postgres
async def test_follow__other_process_reads_older_blocks__the_view_is_no_fresher_here(desk, open_ledger):
    other = open_ledger()
    async with following(other):
        await until(lambda: other.view.head is not None)
        for number in (2, 3):
            before = other.view.head.seen_at
            await desk.ledger.view.apply([(block(number), [])], spendable=number, final=0)
            await until(lambda number=number: other.view.head.block == block(number))
            assert other.view.head.seen_at == before
        await desk.apply(block(4))
        await until(lambda: other.view.head.block == block(4))
        assert other.view.head.seen_at > before


@only_postgres
async def test_follow__process_stood_still__what_it_finds_is_as_old_as_its_last_look(desk, open_ledger):
    """Stopped for a minute, it may read a head that a relayer, dead by now, wrote just after it was stopped."""
    other = open_ledger()
    async with following(desk.ledger):
        async with following(other):
            await desk.apply(block(2))
            desk.ledger.view.saw_head()
            await until(lambda: refusal(other) is None)
        stopped_at = time.monotonic()
        await desk.apply(block(3))
        desk.ledger.view.saw_head()
        await until(lambda: not desk.ledger.view._has_beat)  # noqa: SLF001
        await other.view.look()
        assert other.view.head.block == block(3)
        assert other.view.head.seen_at <= stopped_at
        async with following(other):
            desk.ledger.view.saw_head()
            await until(lambda: other.view.head.seen_at > stopped_at)


@only_postgres
async def test_follow__ledger_restored_meanwhile__goes_on_with_its_epoch_and_ids(
    desk, open_ledger, url, tmp_path
):
    """The server was away, the database came back from a backup: nothing of what was known counts any more."""
    for number in range(2, 6):
        await desk.apply(block(number))
    backup.backup(url, tmp_path / "one.wfb")
    caller = Caller(ACCOUNT, None)
    await desk.ledger.draw(caller, 1)
    desk.ledger._database.engine.dispose()  # noqa: SLF001 - as when the server goes away
    await desk.apply(block(6))
    desk.ledger._database.engine.dispose()  # noqa: SLF001
    desk.ledger._writer._disconnect()  # noqa: SLF001
    restored = backup.restore(url, tmp_path / "one.wfb", Identity(CHAIN_ID, VAULT, PLATFORM), overwrite=True)
    async with following(desk.ledger):
        await until(lambda: desk.ledger.epoch == restored.epoch)
        assert desk.ledger.view.head.block == block(5)
        ledgers = desk.ledger, open_ledger()
        drawn = [await one.draw(caller, 1) for _ in range(40) for one in ledgers]
        assert len({held.charge_id for held in drawn}) == 80
        assert {journal.epoch_of(held.charge_id) for held in drawn} == {restored.epoch}
        await desk.apply(block(6))


@only_postgres
async def test_leads__two_processes__one_does_until_it_is_gone(ledger, open_ledger):
    other = open_ledger()
    assert await ledger.leads("indexer")
    assert not await other.leads("indexer")
    assert await other.leads("a lane")
    assert await ledger.leads("indexer")
    ledger.close()
    await until_true(lambda: other.leads("indexer"))  # once the server has ended its session


@only_postgres
async def test_leads__session_lost__leads_no_more_until_it_is_elected_again(ledger, open_ledger, postgres):
    other = open_ledger()
    assert await ledger.leads("indexer")
    with ledger._database.engine.connect() as connection:  # noqa: SLF001
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'waterfall leader'"
        )
    await until_true(lambda: other.leads("indexer"))
    with pytest.raises(LedgerError):
        await ledger.leads("indexer")
    assert not await ledger.leads("indexer")


@only_postgres
async def test_draw__many_processes__never_the_same_id(ledger, open_ledger):
    ledgers = [ledger, open_ledger(), open_ledger()]
    caller = Caller(ACCOUNT, None)
    drawn = await asyncio.gather(*(one.draw(caller, 1) for _ in range(100) for one in ledgers))
    assert len({hold.sequence for hold in drawn}) == 300


@contextlib.asynccontextmanager
async def following(ledger):
    """Keeps up with the other processes meanwhile."""
    task = asyncio.create_task(ledger.follow())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def until_true(ask):
    async with asyncio.timeout(10):
        while not await ask():
            await asyncio.sleep(0.01)


def refusal(ledger):
    try:
        ledger.block_time(60)
    except Unavailable as error:
        return error.message
    return None


def test_new_receipt_id__one_millisecond_after_another__comes_after_it_and_cannot_be_guessed(monkeypatch):
    now = itertools.count(1_800_000_000_000)
    monkeypatch.setattr("waterfall.ledger.journal.now_ms", lambda: next(now))
    ids = [new_receipt_id() for _ in range(100)]
    assert ids == sorted(ids)
    assert all(re.fullmatch("[0-9a-f]{32}", id_) for id_ in ids)
    assert len({id_[12:] for id_ in ids}) == 100
