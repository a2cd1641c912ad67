import asyncio
import multiprocessing
import sqlite3

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
    charged,
    deposited,
    policy_set,
)

from waterfall.chain.events import Position
from waterfall.errors import LedgerError, Unavailable
from waterfall.ledger import journal, projection, schema
from waterfall.ledger.store import LEASE_MS, Ledger
from waterfall.types import Policy

# ── Opening ──────────────────────────────────────────────────────────────────────────────────────────


def test_open__new__makes_the_file_and_its_folders(tmp_path):
    url = f"sqlite:///{tmp_path}/a/b/waterfall.db"
    ledger = Ledger.open(url, chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM)
    assert (tmp_path / "a/b/waterfall.db").exists()
    assert ledger.head is None
    assert 0 <= ledger.epoch < 2**32
    ledger.close()


@pytest.mark.parametrize(
    "url", ["", "nonsense", "waterfall.db", "sqlite://", "sqlite:///:memory:", "postgresql://localhost/x"]
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


def test_open__not_a_database__is_refused_and_may_be_tried_again(tmp_path, open_ledger):
    (tmp_path / "waterfall.db").write_text("this is no database at all, it only looks like a file\n" * 50)
    with pytest.raises(LedgerError, match="not a database"):
        open_ledger()
    (tmp_path / "waterfall.db").unlink()
    assert open_ledger().head is None


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


def test_open__other_schema__is_refused(ledger, open_ledger, tmp_path):
    ledger.close()
    with sqlite3.connect(tmp_path / "waterfall.db") as connection:
        connection.execute("UPDATE meta SET value = '0' WHERE key = 'schema'")
    connection.close()
    with pytest.raises(LedgerError, match="has schema 0"):
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


def test_tables__every_one__is_strict(ledger):
    with sa.create_engine(f"sqlite:///{ledger._engine.url.database}").connect() as connection:  # noqa: SLF001
        rows = connection.exec_driver_sql("SELECT name, strict FROM pragma_table_list WHERE schema = 'main'")
        loose = {name for name, strict in rows if not strict and not name.startswith("sqlite_")}
    connection.engine.dispose()
    assert loose == set()


# ── Recovery ─────────────────────────────────────────────────────────────────────────────────────────


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


async def test_open__sums_that_drifted__are_derived_anew_and_named(desk, open_ledger):
    await desk.charge(5)
    await desk.ledger.write(lambda tx: tx.hot("UPDATE wallets SET unsettled = '6'"))
    desk.ledger.close()
    again = Desk(open_ledger(), METER)
    assert again.ledger.recounted_at_start == [ACCOUNT]
    assert (await again.wallet()).unsettled == 5


async def test_open__again__goes_on_at_its_block_but_trusts_no_clock(desk, open_ledger):
    desk.ledger.close()
    again = open_ledger()
    assert again.head.block == block(1, BLOCK_TIME)
    with pytest.raises(Unavailable, match="not seen since the start"):
        again.block_time(10**9)
    again.saw_head()
    assert again.block_time(10**9) == BLOCK_TIME


# ── Whether calls may be authorised ──────────────────────────────────────────────────────────────────


def test_block_time__chain_not_read_yet__is_unavailable(ledger):
    with pytest.raises(Unavailable, match="not been read yet"):
        ledger.block_time(60)


async def test_block_time__view_of_the_chain_is_old__is_unavailable(desk, monkeypatch):
    now = desk.ledger.head.seen_at
    monkeypatch.setattr("time.monotonic", lambda: now + 60)
    assert desk.ledger.block_time(60) == BLOCK_TIME
    monkeypatch.setattr("time.monotonic", lambda: now + 61)
    with pytest.raises(Unavailable, match="last seen 61 s ago"):
        desk.ledger.block_time(60)
    desk.ledger.saw_head()
    assert desk.ledger.block_time(60) == BLOCK_TIME


async def test_block_time__refused__says_why_until_it_is_lifted(desk):
    desk.ledger.refuse("settlement has stopped")
    with pytest.raises(Unavailable, match="settlement has stopped"):
        desk.ledger.block_time(60)
    desk.ledger.refuse(None)
    assert desk.ledger.block_time(60) == BLOCK_TIME


def test_saw_head__nothing_read_yet__changes_nothing(ledger):
    ledger.saw_head()
    assert ledger.head is None


# ── The chain's view ─────────────────────────────────────────────────────────────────────────────────


async def test_recent_blocks__applied_and_not_final__newest_first(desk):
    for number in (2, 3):
        await desk.apply(block(number))
    assert await desk.ledger.recent_blocks() == [block(3), block(2), block(1, BLOCK_TIME), GENESIS]
    await desk.ledger.finalize(spendable=3, final=2)
    assert [b.number for b in await desk.ledger.recent_blocks()] == [3, 2]


async def test_apply__several_blocks__are_one_step(desk):
    await desk.ledger.apply([(block(2), []), (block(3), [])], spendable=3, final=0)
    assert desk.ledger.head.block == block(3)
    assert [b.number for b in await desk.ledger.recent_blocks()] == [3, 2, 1, 0]


async def test_apply__one_block_fails__none_is_projected(desk):
    position = Position(3, 0, "0x" + "11" * 32)
    twice = [(position, deposited(ACCOUNT, 1)), (position, deposited(ACCOUNT, 1))]
    with pytest.raises(LedgerError):
        await desk.ledger.apply([(block(2), []), (block(3), twice)], spendable=3, final=0)
    assert desk.ledger.head.block.number == 1
    assert [b.number for b in await desk.ledger.recent_blocks()] == [1, 0]
    assert (await desk.wallet()).balance == FUNDED


async def test_rewind__head_and_waiters__are_told(desk):
    await desk.apply(block(2))
    desk.ledger.captured.clear()
    await desk.ledger.rewind(block(1, BLOCK_TIME))
    assert desk.ledger.head.block.number == 1
    assert desk.ledger.captured.is_set()


async def test_rebuild__from_the_chain__same_balances_and_what_the_chain_does_not_know(desk):
    settled, waiting = await desk.charge(5), await desk.charge(7)
    policy = Policy(max_per_charge=100)
    await desk.apply(block(2), charged(settled), policy_set(ACCOUNT, policy))
    await desk.ledger.finalize(spendable=2, final=2)
    epoch = desk.ledger.epoch
    await desk.ledger.rebuild()
    assert desk.ledger.epoch != epoch
    assert desk.ledger.head is None
    wallet = await desk.wallet()
    assert (wallet.balance, wallet.unsettled, wallet.policies) == (0, 12, ())
    await desk.apply(block(1, BLOCK_TIME), deposited(ACCOUNT, FUNDED))
    await desk.apply(block(2), charged(settled), policy_set(ACCOUNT, policy))
    wallet = await desk.wallet()
    assert (wallet.balance, wallet.unsettled, wallet.policies) == (FUNDED - 5, 7, (policy,))
    assert await desk.states() == ["settled", "queued"]
    held = await desk.hold(1)
    assert held.charge_id >> 32 == desk.ledger.epoch
    assert held.charge_id != waiting.id


async def test_rebuild__epoch__is_the_one_it_opens_with_again(desk, open_ledger):
    await desk.ledger.rebuild()
    epoch = desk.ledger.epoch
    desk.ledger.close()
    assert open_ledger().epoch == epoch


async def test_mismatch__is_kept_over_a_restart_until_a_rebuild(desk, open_ledger):
    await desk.ledger.note_mismatch("first")
    await desk.ledger.note_mismatch("second")
    desk.ledger.close()
    again = open_ledger()
    assert again.mismatches == ["first"]
    await again.rebuild()
    assert again.mismatches == []
    again.close()
    assert open_ledger().mismatches == []


async def test_finalize__nothing_new__costs_no_write(desk, monkeypatch):
    await desk.ledger.finalize(spendable=1, final=1)
    written = []
    monkeypatch.setattr(
        projection, "finalize", lambda tx, spendable, final: written.append((spendable, final))
    )
    await desk.ledger.finalize(spendable=1, final=1)
    assert written == []
    await desk.ledger.finalize(spendable=1, final=0)
    assert written == [(1, 0)]


# ── Hands ────────────────────────────────────────────────────────────────────────────────────────────


async def test_keep_rate_card__known_already__costs_no_write(desk, monkeypatch):
    kept = []
    monkeypatch.setattr(journal, "keep_rate_card", lambda tx, price_id, card: kept.append(price_id))
    for _ in range(3):
        await desk.ledger.keep_rate_card("0x1", None)
    assert kept == ["0x1"]


async def test_hold__lease__is_some_minutes(desk):
    held = await desk.hold(1)
    (row,) = await desk.table(schema.holds)
    assert row["lease_until"] - row["created_at"] == LEASE_MS
    assert held.sequence == row["sequence"]


async def test_read__while_writing__sees_only_what_is_committed(desk):
    entered, release = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(tx):
        tx.hot("UPDATE wallets SET held = '99'")
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
