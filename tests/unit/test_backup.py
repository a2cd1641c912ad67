"""A ledger goes into a file beside its service, and comes back from it as one that the chain cannot contradict."""

import asyncio
import gzip
import hashlib
import json
import stat

import pytest
from making import (
    ACCOUNT,
    CHAIN_ID,
    FUNDED,
    GAS,
    METER,
    OTHER,
    PLATFORM,
    USD,
    VAULT,
    Desk,
    batch,
    block,
    charged,
    deposited,
    only_postgres,
    only_sqlite,
)
from relaying import Clock, Relay

from waterfall.errors import LaneHalted, LedgerError
from waterfall.ledger import backup, schema
from waterfall.ledger.backup import BackupError
from waterfall.ledger.snapshot import Identity
from waterfall.ledger.store import Ledger
from waterfall.types import Policy

OF = Identity(CHAIN_ID, VAULT, PLATFORM)
LOST = (schema.slots, schema.attempts)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ledger.backup"


@pytest.fixture
def other_url(request, tmp_path):
    """Another empty database, of the other kind where the test asks for it."""
    kind = getattr(request, "param", "sqlite")
    return f"sqlite:///{tmp_path}/other.db" if kind == "sqlite" else request.getfixturevalue("postgres_url")


def reopen(url):
    return Ledger.open(url, chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM)


async def rows(ledger, *, without=()):
    """Every table that a backup keeps."""
    desk = Desk(ledger, METER)
    return {t.name: await desk.table(t) for t in schema.metadata.sorted_tables if t not in (*LOST, *without)}


async def used(desk):
    """A ledger with something in every table."""
    await desk.open("bob")
    await desk.ledger.keys.add("wf_secret", account=desk.account, name="näme \N{SNOWMAN}")
    await desk.order(Policy(max_per_charge=5 * USD))
    first, second = await desk.charge(USD), await desk.charge(2)
    await desk.apply(block(2), charged(first), deposited(OTHER, 2**90, label="bob"))
    await batch(desk, [second])
    await desk.hold(3)
    return first, second


# ── The file ─────────────────────────────────────────────────────────────────────────────────────────


async def test_backup__ledger_in_use__is_whole_and_only_the_owner_can_read_it(desk, url, file):
    await used(desk)
    made = backup.backup(url, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert backup.verify(file) == made
    assert made.identity == OF
    assert (made.head, made.epoch) == (2, desk.ledger.epoch)
    assert made.rows["charges"] == 2
    assert not {"slots", "attempts"} & set(made.rows)
    assert [path.name for path in file.parent.glob(".ledger*")] == []


async def test_backup__file_that_is_there__is_kept_unless_told(desk, url, file):
    file.write_text("precious")
    with pytest.raises(BackupError, match="exists already"):
        backup.backup(url, file)
    assert file.read_text() == "precious"
    backup.backup(url, file, overwrite=True)
    assert backup.verify(file).rows["accounts"] == 1


async def test_backup__folder_that_is_not_there__is_told(desk, url, file):
    with pytest.raises(BackupError, match="No such file"):
        backup.backup(url, file.parent / "none" / "x")


@only_sqlite
def test_backup__no_database__is_told_and_none_is_made(url, file, tmp_path):
    with pytest.raises(LedgerError, match="there is no"):
        backup.backup(url, file)
    assert list(tmp_path.iterdir()) == []


def test_backup__database_without_tables__is_told(request, postgres_url, file):
    with pytest.raises(LedgerError, match="no tables"):
        backup.backup(postgres_url, file)
    assert not file.exists()


async def test_backup__calls_running_meanwhile__is_of_one_moment(desk, url, file):
    """In every backup the sums hold: none shows half a commit."""
    done = asyncio.Event()

    async def work():
        while not done.is_set():
            held = await desk.hold(10)
            await desk.capture(held, 7)

    working = [asyncio.create_task(work()) for _ in range(8)]
    seen = []
    for number in range(5):
        path = file.with_suffix(f".{number}")
        await asyncio.to_thread(backup.backup, url, path)
        seen.append(_sums(path))
    done.set()
    await asyncio.gather(*working)
    assert seen[-1][2] > seen[0][2], "nothing was captured meanwhile"
    for held, unsettled, _, open_holds, owed in seen:
        assert (held, unsettled) == (open_holds, owed)


def _sums(path):
    tables, table = {}, None
    for line in _unpacked(path):
        value = json.loads(line)
        if isinstance(value, list):
            tables[table[0]].append(dict(zip(table[1], value, strict=True)))
        elif "table" in value:
            table = value["table"], value["columns"]
            tables[table[0]] = []
    (wallet,) = tables["wallets"]
    return (
        wallet["held"],
        wallet["unsettled"],
        len(tables["charges"]),
        sum(hold["amount"] for hold in tables["holds"] if hold["state"] == "held"),
        sum(charge["amount"] for charge in tables["charges"]),
    )


def _unpacked(file):
    return gzip.decompress(file.read_bytes()).splitlines(keepends=True)


def _pack(file, lines):
    file.write_bytes(gzip.compress(b"".join(lines)))


def _other_amount(lines):
    number = next(n for n, line in enumerate(lines) if b",10000000000000," in line)
    other = lines[number].replace(b",10000000000000,", b",90000000000000,")
    return [*lines[:number], other, *lines[number + 1 :]]


def _row_less(lines):
    """A file that is whole, and lacks a row: whoever wrote it saw two moments."""
    body = [*lines[:-2]]
    while not body[-1].startswith(b"["):
        body.pop()
    body.pop()
    return [*body, json.dumps({"sha256": hashlib.sha256(b"".join(body)).hexdigest()}).encode()]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda lines: lines[:-1], "its end is missing"),
        (lambda lines: lines[:-2] + lines[-1:], "damaged"),
        (_other_amount, "its hash is another"),
        (_row_less, "rows are missing"),
        (lambda lines: lines[1:], "no backup"),
        (lambda lines: [lines[0].replace(b'"format":1', b'"format":2'), *lines[1:]], "format 2"),
        (lambda lines: [lines[0].replace(b'"0001"', b'"0002"'), *lines[1:]], "schema 0002"),
        (lambda lines: [lines[0], b"nonsense\n", *lines[1:]], "damaged"),
        (lambda lines: [lines[0], b"[1]\n", *lines[1:]], "belongs to no table"),
        (lambda lines: [lines[0], lines[1].replace(b"columns", b"colums"), *lines[2:]], "does not know"),
        (lambda lines: [*lines, lines[-1]], "after its end"),
        (lambda _: [b"{}\n"], "no backup"),
        (lambda _: [], "no backup"),
    ],
)
@only_sqlite
async def test_verify__damaged_in_any_way__is_refused_and_restores_nothing(
    desk, url, file, other_url, spoil, match
):
    await used(desk)
    backup.backup(url, file)
    _pack(file, spoil(_unpacked(file)))
    with pytest.raises(BackupError, match=match):
        backup.verify(file)
    with pytest.raises(BackupError, match=match):
        backup.restore(other_url, file, OF)
    ledger = reopen(other_url)
    assert (await rows(ledger))["accounts"] == []
    ledger.close()


@only_sqlite
async def test_verify__cut_off_or_no_gzip__is_refused(desk, url, file):
    backup.backup(url, file)
    whole = file.read_bytes()
    for spoiled in (whole[: len(whole) // 2], whole[:-1], b"no gzip", b""):
        file.write_bytes(spoiled)
        with pytest.raises(BackupError):
            backup.verify(file)
    with pytest.raises(BackupError, match="No such file"):
        backup.verify(file.with_name("none"))


# ── Back from it ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("other_url", ["sqlite", "postgresql"], indirect=True)
@only_sqlite
async def test_restore__into_either_database__everything_is_there_again(desk, url, file, other_url):
    _, second = await used(desk)
    backup.backup(url, file)
    before = await rows(desk.ledger)
    restored = backup.restore(other_url, file, OF)
    ledger = reopen(other_url)
    try:
        after = await rows(ledger)
        for name in before.keys() - {"meta", "holds", "charges", "wallets"}:
            assert after[name] == before[name], name
        assert (await Desk(ledger, METER).wallet(OTHER)).balance == 2**90
        assert [{**row, "signer": None, "nonce": None} for row in before["charges"]] == [
            {**row, "state": "batched" if row["sequence"] == second.id & 0xFFFFFFFF else row["state"]}
            for row in after["charges"]
        ]
        assert ledger.keys.find("wf_secret").name == "näme \N{SNOWMAN}"
        assert (restored.lost_holds, restored.unsettled, restored.open_policies) == (1, 1, (ACCOUNT,))
        assert ledger.epoch == restored.epoch != desk.ledger.epoch
        wallet = await Desk(ledger, METER).wallet()
        assert (wallet.held, wallet.unsettled) == (0, 2)
        assert not await Desk(ledger, METER).table(schema.slots)
    finally:
        ledger.close()


@only_postgres
async def test_restore__from_postgresql_into_sqlite__everything_is_there_again(desk, url, file, tmp_path):
    await used(desk)
    backup.backup(url, file)
    before = await rows(desk.ledger)
    other = f"sqlite:///{tmp_path}/other.db"
    backup.restore(other, file, OF)
    ledger = reopen(other)
    after = await rows(ledger)
    ledger.close()
    for name in before.keys() - {"meta", "holds", "charges", "wallets"}:
        assert after[name] == before[name], name


@pytest.mark.parametrize("other_url", ["sqlite", "postgresql"], indirect=True)
@only_sqlite
async def test_restore__into_another_database__numbers_go_on_there(desk, url, file, other_url):
    for _ in range(40):
        await desk.charge(1)
        await desk.order(Policy(max_per_charge=USD))
    backup.backup(url, file)
    backup.restore(other_url, file, OF)
    ledger = reopen(other_url)
    try:
        again = Desk(ledger, METER)
        assert (await again.hold(1)).sequence == 41
        await again.order(Policy(max_per_charge=3 * USD))
        assert max(row["id"] for row in await again.table(schema.policy_orders)) == 41
    finally:
        ledger.close()


async def test_restore__then_calls__no_number_is_drawn_twice(desk, url, file):
    await used(desk)
    backup.backup(url, file)
    desk.ledger.close()
    backup.restore(url, file, OF, overwrite=True)
    ledger = reopen(url)
    again = Desk(ledger, METER)
    before = {row["sequence"] for row in await again.table(schema.holds)}
    await again.order(Policy(max_per_charge=4 * USD))  # its number, too
    later = [await again.hold(1) for _ in range(40)]
    ledger.close()
    assert len(before | {held.sequence for held in later}) == len(before) + 40
    assert {held.charge_id >> 32 for held in later} == {ledger.epoch}


async def test_restore__ledger_is_there__is_refused_unless_told(desk, url, file):
    await used(desk)
    backup.backup(url, file)
    await desk.charge(5)
    desk.ledger.close()
    with pytest.raises(BackupError, match="2 accounts and 4 calls"):
        backup.restore(url, file, OF)
    assert backup.restore(url, file, OF, overwrite=True).replaced_calls == 4


async def test_restore__ledger_in_use__is_refused(desk, url, file):
    backup.backup(url, file)
    with pytest.raises(LedgerError, match=r"in use|sessions of Waterfall"):
        backup.restore(url, file, OF, overwrite=True)
    assert (await desk.wallet()).balance == FUNDED


@pytest.mark.parametrize(
    "of",
    [
        Identity(1, VAULT, PLATFORM),
        Identity(CHAIN_ID, "0x" + "00" * 20, PLATFORM),
        Identity(CHAIN_ID, VAULT, PLATFORM + 1),
    ],
)
@only_sqlite
async def test_restore__of_another_ledger__is_refused(desk, url, file, other_url, of):
    backup.backup(url, file)
    with pytest.raises(BackupError, match="the settings name"):
        backup.restore(other_url, file, of)


# ── On the chain ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def relay(ledger, monkeypatch):
    relay = Relay(ledger, Clock().install(monkeypatch))
    await relay.fund()
    return relay


async def _restored(relay, url, file):
    """Lose the database and go on with the backup, as a process that starts does."""
    relay.ledger.close()
    backup.restore(url, file, OF, overwrite=True)
    relay.ledger = reopen(url)
    relay.desk = Desk(relay.ledger, METER)
    relay.start()
    return relay


async def test_restore__charges_settled_since__are_charged_once_and_settlement_goes_on(relay, url, file):
    known = [await relay.desk.charge(USD) for _ in range(3)]
    await relay.lane.step()  # in flight when the backup is made
    queued = await relay.desk.charge(USD)
    backup.backup(url, file)
    await relay.settle()
    unknown = await relay.desk.charge(USD)
    await relay.settle()
    assert relay.balance() == 5 * USD

    await _restored(relay, url, file)
    await relay.index()
    assert not relay.ledger.view.mismatches
    assert set(await relay.desk.states()) <= {"settled", "final"}
    assert {c.id for c in await relay.desk.charges()} == {c.id for c in (*known, queued)}
    assert (await relay.desk.wallet()).balance == 5 * USD, unknown
    await relay.desk.charge(USD)
    await relay.settle()
    assert relay.balance() == (await relay.desk.wallet()).balance == 4 * USD
    relay.ledger.close()


async def test_restore__charges_not_settled_before_the_loss__are_settled(relay, url, file):
    await relay.desk.charge(USD)
    await relay.lane.step()
    relay.chain.pending.clear()  # the node has forgotten it
    backup.backup(url, file)
    await _restored(relay, url, file)
    await relay.settle()
    assert relay.balance() == 9 * USD
    assert (await relay.desk.wallet()).unsettled == 0
    relay.ledger.close()


async def test_restore__reorg_afterwards__charges_that_no_slot_carries_are_sent_again(relay, url, file):
    await relay.desk.charge(USD)
    backup.backup(url, file)
    await relay.lane.step()
    relay.chain.mine()
    await _restored(relay, url, file)
    await relay.index()
    assert await relay.desk.states() == ["settled"]
    relay.chain.reorg(1, transactions=False)
    relay.chain.skip(2)
    await relay.index()
    assert await relay.desk.states() == ["queued"]
    await relay.settle()
    assert relay.balance() == 9 * USD
    relay.ledger.close()


async def test_rebuild__database_older_than_the_chain__lane_goes_on_and_no_id_is_used_twice(relay, url):
    """A volume's snapshot came back: its nonces are used, and so are its next charge ids."""
    await relay.desk.charge(USD)
    await relay.settle()
    unknown = (await relay.desk.charges())[0]
    later = unknown.model_copy(update={"id": unknown.id + 1})
    await relay.mine(lambda s: s.settle([later]), relay.chain.foreign_transaction(GAS.address))
    assert relay.ledger.view.mismatches
    await relay.ledger.view.rebuild()
    await relay.index()
    assert not relay.ledger.view.mismatches
    charge = await relay.desk.charge(USD)
    assert charge.id != later.id
    await relay.settle()
    assert relay.balance() == (await relay.desk.wallet()).balance == 7 * USD


async def test_restore__transaction_of_the_lost_ledger_still_waits__lane_goes_on_after_it(relay, url, file):
    await relay.desk.charge(USD)
    await relay.lane.step()
    backup.backup(url, file)
    await _restored(relay, url, file)
    await relay.desk.charge(USD)
    await relay.lane.step()  # the same nonce, which the node gives to the first
    for _ in range(150):
        relay.clock.seconds += 6
        relay.chain.mine()
        await relay.index()
        await relay.lane.step()
    assert relay.balance() == 8 * USD
    relay.ledger.close()


async def test_restore__foreign_transaction_after_the_first_slot_closed__lane_halts(relay, url, file):
    """Of the lost ledger nothing can wait any more: somebody else has the key."""
    backup.backup(url, file)
    await _restored(relay, url, file)
    await relay.desk.charge(USD)
    await relay.settle()
    await relay.desk.charge(USD)
    await relay.lane.step()
    relay.chain.pending.clear()
    await relay.mine(relay.chain.foreign_transaction(GAS.address))
    await relay.lane.step()
    relay.clock.seconds += 61
    with pytest.raises(LaneHalted, match="not in the journal"):
        await relay.lane.step()
    assert await relay.in_flight() is not None  # as evidence
    relay.ledger.close()
