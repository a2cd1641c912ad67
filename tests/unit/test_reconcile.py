"""Whatever is changed in the ledger or on the chain, one comparison finds and names."""

import dataclasses
import json

import pytest
import sqlalchemy as sa
from eth_abi.abi import encode
from fake_chain import FakeChain
from making import (
    ACCOUNT,
    CHAIN_ID,
    GAS,
    OTHER,
    PLATFORM,
    TOKEN,
    USD,
    VAULT,
    allowance_set,
    only_sqlite,
    word,
)
from relaying import ADA, BOB, Clock, Relay

from waterfall.chain import events as chain
from waterfall.chain import vault as calls
from waterfall.chain.rpc import RpcError
from waterfall.chain.vault import Vault
from waterfall.errors import ChainError, LedgerError
from waterfall.keccak import keccak
from waterfall.ledger import backup, reconciliation, schema, views
from waterfall.ledger.reconciliation import CONFLICT, DAMAGED, REBUILD, RESTORE
from waterfall.ledger.snapshot import Identity
from waterfall.ledger.store import Ledger
from waterfall.settlement import reconcile as reconciling
from waterfall.settlement.reconcile import loss, reconcile
from waterfall.types import Allowance, Policy


class Answering(FakeChain):
    """A chain that also shows accounts, the platform and the vault's tokens, at any block."""

    tampered = None
    """Changes what an account's view says: (block number, fields) → fields."""
    allowances = None
    """By account: cap, what was spent of it, expiry."""
    stolen = 0
    """Tokens that are not there."""

    def emit(self, block, *events):
        """Put logs into a block that is there."""
        self._emit(block, word("tx"), events)

    def _eth_blockNumber(self):  # noqa: N802 - the node's name for it
        return hex(self.head.number)

    def _eth_call(self, call, at):
        data = bytes.fromhex(call["data"][2:])
        state = self.state if at == "latest" else self.blocks[int(at, 16)].state
        if data[:4] == keccak(b"token()")[:4]:
            return "0x" + TOKEN[2:].rjust(64, "0")
        if call["to"] == TOKEN:
            credit = state.earned + sum(a.balance + a.exit_amount for a in state.accounts.values())
            return "0x" + encode(["uint256"], [-(-credit // 10**6) - self.stolen]).hex()
        if data[:4] == keccak(b"platformOf(uint128)")[:4]:
            return "0x" + b"".join(n.to_bytes(32, "big") for n in (1, 2, 3, state.earned, 0)).hex()
        if data[:4] == keccak(b"accountOf(uint128,bytes32)")[:4]:
            return "0x" + self._account(state, "0x" + data[36:68].hex())
        return super()._eth_call(call, at)

    def _account(self, state, account):
        its = state.accounts.get(account)
        its = dataclasses.replace(its) if its is not None else type(state.accounts["none"])()
        if self.tampered is not None:
            self.tampered(account, its)
        policy = its.policy
        limits = (
            (policy.max_per_charge is not None)
            + 2 * (policy.max_per_window is not None)
            + 4 * (policy.expires_at is not None)
        )
        limit = [
            getattr(policy, name) or 0
            for name in ("max_per_charge", "max_per_window", "window_seconds", "expires_at")
        ]
        matures_at = its.exit_matures_at if its.exit_amount else 0
        words = [its.balance, its.spent, its.window, its.entries, limits, *limit, its.exit_amount, matures_at]
        cap, spent, expires_at = (self.allowances or {}).get(account, (calls.NO_CAP, 0, calls.NO_EXPIRY))
        words += [cap, spent, expires_at, 0, 0, 0, 0, 0]
        return b"".join(n.to_bytes(32, "big") for n in words).hex()


@pytest.fixture
async def relay(ledger, monkeypatch):
    """A ledger that has seen everything: two accounts, a policy, an exit; charges in every state."""
    monkeypatch.setattr(reconciling, "_PAUSE_SECONDS", 0)
    relay = Relay(ledger, Clock().install(monkeypatch), Answering(final_depth=3))
    await relay.fund()
    await relay.fund(label=BOB)
    desk = relay.desk
    await relay.mine(
        lambda s: s.set_policy(
            ACCOUNT, Policy(max_per_charge=4 * USD, max_per_window=9 * USD, window_seconds=3600)
        )
    )
    for _ in range(3):
        await desk.charge(USD)
    await relay.settle()
    await relay.mine(lambda s: s.request_exit(OTHER, 2 * USD), lambda s: s.request_exit(OTHER, USD))
    relay.chain.skip(4)
    await relay.index()
    held = await desk.hold(5)
    await desk.capture(held, 0)  # free
    await desk.ledger.lose(await desk.hold(7), "it is lost")
    await desk.charge(USD)
    await relay.settle()  # settled, not final
    await desk.charge(USD)
    await relay.lane.step()  # batched
    await desk.charge(USD)  # queued
    await desk.hold(USD)
    return relay


def compare(relay, url, **options):
    return reconcile(Vault(relay.chain, VAULT), url, **options)


def tamper(url, *statements):
    """Change rows behind the ledger's back."""
    if url.startswith("sqlite"):
        engine = sa.create_engine(url)
    else:
        engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount != 0
    engine.dispose()


# ── Equal ────────────────────────────────────────────────────────────────────────────────────────────


async def test_reconcile__ledger_at_work__is_equal_and_counted(relay, url):
    report = await compare(relay, url)
    assert report.differences == []
    assert report.equal
    assert (report.accounts, report.charges, report.events) == (2, 7, 9)
    assert (report.waiting, report.waiting_amount) == (2, 2 * USD)
    assert (report.unknown, report.behind) == (0, 0)
    assert (report.block, report.block_hash) == (relay.chain.head.number, relay.chain.head.hash)
    assert json.loads(json.dumps(report.as_dict()))["equal"] is True


async def test_reconcile__nodes_limit_ranges__reads_them_in_parts(relay, url):
    relay.chain.range_limit = 3
    assert (await compare(relay, url)).events == 9


async def test_reconcile__since_a_block__compares_events_from_there_and_all_balances(relay, url):
    report = await compare(relay, url, since=relay.chain.head.number)
    assert (report.equal, report.events, report.accounts) == (True, 0, 2)
    first = sa.select(sa.func.min(schema.events.c.block)).scalar_subquery()
    tamper(url, schema.events.update().where(schema.events.c.block == first).values(tx_hash=word("other")))
    assert (await compare(relay, url, since=relay.chain.head.number)).equal
    assert not (await compare(relay, url)).equal


async def test_reconcile__chain_is_ahead__compares_at_the_ledgers_block(relay, url):
    relay.chain.mine(lambda s: s.deposit(USD, label=ADA), transactions=True)
    report = await compare(relay, url)
    assert (report.equal, report.behind) == (True, 1)


async def test_reconcile__writer_at_work__never_sees_half_a_commit(relay, url):
    for _ in range(5):
        await relay.desk.charge(10)
        report = await compare(relay, url)
        assert report.equal, report.differences


async def test_reconcile__charges_set_aside__are_equal_and_wait(relay, url):
    """That no transaction can carry them is no event: neither of one never sent, nor of one the vault once rejected."""
    desk = relay.desk
    await relay.settle()
    once = await desk.charge(USD)
    await relay.mine(lambda s: s.set_policy(ACCOUNT, Policy(max_per_charge=1)))
    await relay.settle()
    (event,) = [row for row in await desk.table(EVENTS) if row["name"] == "ChargeRejected"]
    assert int(event["charge_id"]) == once.id
    relay.chain.poison.add(once.id)
    await relay.mine(lambda s: s.set_policy(ACCOUNT, Policy()))
    await relay.settle()
    never = await desk.charge(USD)
    relay.chain.poison.add(never.id)
    await relay.settle()
    assert (await desk.states())[-2:] == ["rejected", "rejected"]
    report = await compare(relay, url)
    assert report.differences == []
    assert (report.waiting, report.waiting_amount) == (2, 2 * USD)


# ── Not to be compared ───────────────────────────────────────────────────────────────────────────────


async def test_reconcile__empty_ledger__says_that_the_chain_was_not_read(ledger, url, monkeypatch):
    monkeypatch.setattr(reconciling, "_PAUSE_SECONDS", 0)
    with pytest.raises(ChainError, match="has not read the chain yet"):
        await reconcile(Vault(Answering(), VAULT), url)


async def test_reconcile__reorg_not_followed_yet__says_so(relay, url):
    relay.chain.reorg(1)
    relay.chain.skip(2)
    with pytest.raises(ChainError, match="it has no block"):
        await compare(relay, url)


async def test_reconcile__reorg_meanwhile__compares_again(relay, url):
    """What was read before and after a reorg is nothing to hold against anything."""
    asked = relay.chain.sent("eth_getBlockByNumber")
    shown = await relay.chain.call("eth_getBlockByNumber", hex(relay.chain.head.number), False)
    relay.chain.script("eth_getBlockByNumber", shown, shown, {**shown, "hash": word("another")})
    assert (await compare(relay, url)).equal
    assert len(relay.chain.sent("eth_getBlockByNumber")) == len(asked) + 1 + 2 * 3, "a second round"


async def test_reconcile__no_database__is_told_and_none_is_made(tmp_path):
    with pytest.raises(LedgerError, match="there is no"):
        await reconcile(Vault(Answering(), VAULT), f"sqlite:///{tmp_path}/none.db")
    assert list(tmp_path.iterdir()) == []


async def test_reconcile__node_refuses_a_single_block__is_told(relay, url):
    relay.chain.range_limit = 0
    with pytest.raises(RpcError):
        await compare(relay, url)


# ── The ledger is wrong ──────────────────────────────────────────────────────────────────────────────

CHARGES, WALLETS, EVENTS, HOLDS = schema.charges, schema.wallets, schema.events, schema.holds


def _of(table, name, states):
    """The first row in one of these states."""
    key = table.c.sequence
    return table.update().where(
        key == sa.select(sa.func.min(key)).where(table.c[name].in_(states)).scalar_subquery()
    )


def charge(*states):
    return _of(CHARGES, "state", states)


def event(of, /, **values):
    it = sa.select(sa.func.min(EVENTS.c.block)).where(EVENTS.c.name == of).scalar_subquery()
    return EVENTS.update().where(EVENTS.c.block == it, EVENTS.c.name == of).values(**values)


def wallet(**values):
    return WALLETS.update().where(WALLETS.c.account == ACCOUNT).values(**values)


@pytest.mark.parametrize(
    ("statement", "what", "todo"),
    [
        (wallet(balance=1), "balance", REBUILD),
        (WALLETS.delete().where(WALLETS.c.account == OTHER), "balance", REBUILD),
        (wallet(held=1), "held", REBUILD),
        (wallet(unsettled=1), "unsettled", REBUILD),
        (wallet(pending=1), "pending", REBUILD),
        (wallet(entries=99), "entries", REBUILD),
        (wallet(exit_amount=5), "exit_amount on the chain", REBUILD),
        (wallet(max_per_charge=5), "max_per_charge on the chain", REBUILD),
        (wallet(max_per_window=5), "max_per_window on the chain", REBUILD),
        (wallet(window_seconds=60), "window_seconds on the chain", REBUILD),
        (wallet(expires_at=60), "expires_at on the chain", REBUILD),
        (wallet(window=60), "window on the chain", REBUILD),
        (wallet(spent=60), "spent on the chain", REBUILD),
        (wallet(allowance='{"cap":"1","expires_at":1}'), "allowance on the chain", REBUILD),
        (
            WALLETS.update().where(WALLETS.c.account == OTHER).values(exit_matures_at=5),
            "exit_matures_at on the chain",
            REBUILD,
        ),
        (charge("final").values(state="queued"), "state after Charged", REBUILD),
        (charge("final").values(state="voided"), "state after Charged", REBUILD),
        (charge("settled").values(state="rejected"), "state after Charged", REBUILD),
        (charge("queued").values(state="settled"), "state after none", REBUILD),
        (charge("queued").values(state="rejected"), "state after none", REBUILD),
        (charge("queued").values(state="rejected", reason="max_per_window"), "state after none", REBUILD),
        (charge("final").values(state="rejected", reason="reverted: no"), "state after Charged", REBUILD),
        (charge("queued").values(state="free"), "state after none", REBUILD),
        (charge("queued").values(state="batched"), "slot that carries it", REBUILD),
        (charge("batched").values(nonce=7), "slot that carries it", REBUILD),
        (charge("free").values(state="queued"), "state after none", REBUILD),
        (charge("final").values(amount=5), "account, amount and receipt", CONFLICT),
        (charge("queued").values(amount=5), "what its receipt says", DAMAGED),
        (charge("queued").values(amount=2 * USD), "amount within its hold", DAMAGED),
        (charge("queued").values(account=OTHER), "what its receipt says", DAMAGED),
        (charge("queued").values(digest=word("x")), "digest of its receipt", DAMAGED),
        (charge("queued").values(receipt="{}"), "receipt", DAMAGED),
        (charge("final").values(digest=word("x")), "account, amount and receipt", CONFLICT),
        (charge("final").values(tx_hash=word("x")), "transaction", REBUILD),
        (charge("final").values(block=1), "transaction", REBUILD),
        (charge("final").values(epoch=1), "in the journal", RESTORE),
        (_of(HOLDS, "state", ["captured"]).values(state="lost"), "its hold", DAMAGED),
        (_of(HOLDS, "state", ["captured"]).values(amount=1), "amount within its hold", DAMAGED),
        (_of(HOLDS, "state", ["lost"]).values(state="captured"), "in the journal", DAMAGED),
        (_of(HOLDS, "state", ["lost"]).values(state="held"), "held", REBUILD),
        (_of(HOLDS, "state", ["held"]).values(amount=3), "held", REBUILD),
        (event("Charged", amount=5), "Charged.amount", REBUILD),
        (event("Charged", charge_id="5"), "Charged.charge_id", REBUILD),
        (event("Deposited", amount=5), "Deposited.amount", REBUILD),
        (event("Deposited", account=OTHER), "Deposited.account", REBUILD),
        (event("Deposited", data="{}"), "Deposited.data", REBUILD),
        (event("Deposited", entry=7), "Deposited.entry", REBUILD),
        (event("PolicySet", name="Other"), "PolicySet.name", REBUILD),
        (event("PolicySet", block=12345), "kept", REBUILD),
        (event("Charged", log_index=EVENTS.c.log_index + 12345), "kept", REBUILD),
        (EVENTS.delete().where(EVENTS.c.name == "Deposited"), "kept", REBUILD),
        (EVENTS.delete().where(EVENTS.c.name == "Charged"), "state after none", REBUILD),
    ],
)
@only_sqlite
async def test_reconcile__row_changed__is_found_and_told_what_to_do(relay, url, statement, what, todo):
    tamper(url, statement)
    report = await compare(relay, url)
    assert not report.equal
    assert (what, todo) in {(found.what, found.todo) for found in report.differences}
    assert report.as_dict()["differences"]


async def test_reconcile__event_that_never_was__is_found(relay, url):
    names = [c.name for c in EVENTS.c]
    made_up = {"block": 1, "log_index": 99, "name": "MeterAdded", "account": None}
    values = [sa.literal(made_up[n], EVENTS.c[n].type) if n in made_up else EVENTS.c[n] for n in names]
    deposit = sa.select(*values).where(EVENTS.c.name == "Deposited").limit(1)
    tamper(url, EVENTS.insert().from_select(names, deposit))
    (found,) = (await compare(relay, url)).differences
    assert (found.subject, found.kept, found.expected) == ("event 99 of block 1", "MeterAdded", None)


@only_sqlite
async def test_reconcile__charge_and_event_moved_beyond_the_head__are_found(relay, url):
    tamper(url, charge("final").values(block=99_999), event("Charged", block=99_999))
    assert (99_999, "block") in {(d.kept, d.what) for d in (await compare(relay, url)).differences}


async def test_reconcile__rows_lost__are_found(relay, url):
    """The same on either database: charges, slots and accounts that are gone."""
    ours = await relay.desk.charges()
    tamper(
        url,
        CHARGES.delete().where(CHARGES.c.state == "final", CHARGES.c.sequence == ours[0].id & 0xFFFFFFFF),
        schema.meta.insert().values(key="mismatch", value="something"),
    )
    report = await compare(relay, url)
    found = {(d.subject, d.what) for d in report.differences}
    assert {(f"charge {ours[0].id}", "in the journal"), ("settlement", "stopped")} <= found


# ── The chain is wrong ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("balance", 1),
        ("entries", 1),
        ("exit_amount", 1),
        ("spent", 1),
        ("window", 1),
        ("policy", Policy(max_per_charge=1)),
    ],
)
async def test_reconcile__chain_shows_another_account__is_found(relay, url, name, value):
    def tampered(account, its):
        if account == ACCOUNT:
            setattr(its, name, value)

    relay.chain.tampered, relay.chain.stolen = tampered, -1
    report = await compare(relay, url)
    assert report.differences
    assert {d.subject for d in report.differences} == {f"account {ACCOUNT}"}
    assert all(d.what.endswith("on the chain") for d in report.differences)


@pytest.mark.parametrize(
    ("shown", "what"),
    [
        ((50 * USD, USD, 2**39), None),
        ((50 * USD + 1, USD, 2**39), "allowance on the chain"),
        ((50 * USD, USD, 2**38), "allowance on the chain"),
        ((50 * USD, USD + 1, 2**39), "allowance_spent on the chain"),
    ],
)
async def test_reconcile__owners_allowance__is_compared_with_what_was_spent_of_it(relay, url, shown, what):
    await relay.settle()
    await relay.mine(lambda _: [allowance_set(ACCOUNT, Allowance(cap=50 * USD, expires_at=2**39))])
    await relay.desk.charge(USD)
    await relay.settle()
    relay.chain.allowances = {ACCOUNT: shown}
    assert [d.what for d in (await compare(relay, url)).differences] == ([what] if what else [])


async def test_reconcile__vault_holds_too_few_tokens__is_found(relay, url):
    relay.chain.stolen = 1
    (found,) = (await compare(relay, url)).differences
    assert (found.subject, found.kept) == ("vault", found.expected - 10**6)


async def test_reconcile__earnings_are_others__is_found(relay, url):
    relay.chain.state.earned += 1
    assert [d.what for d in (await compare(relay, url)).differences] == ["earnings"]


async def test_reconcile__key_used_by_somebody_else__is_found(relay, url):
    await relay.settle()
    await relay.mine(relay.chain.foreign_transaction(GAS.address))
    (found,) = (await compare(relay, url)).differences
    assert (found.subject, found.kept + 1) == (f"key {GAS.address}", found.expected)


async def test_reconcile__log_that_the_ledger_never_saw__is_found(relay, url):
    block = relay.chain.blocks[2]
    relay.chain.emit(block, chain.ChargeVoided(PLATFORM, 77))
    (found,) = (await compare(relay, url)).differences
    assert (found.kept, found.expected) == (None, "ChargeVoided")


async def test_reconcile__other_platforms_events__do_not_count(relay, url):
    before = await compare(relay, url)
    block, theirs = relay.chain.blocks[2], word("theirs")
    relay.chain.emit(
        block,
        chain.Deposited(PLATFORM + 1, theirs, "0x" + "99" * 20, "0x" + "11" * 20, word("l"), 5, 1),
        chain.Charged(theirs, 5, 5, 2, word("r")),
        chain.ChargeVoided(PLATFORM + 1, 5),
    )
    after = await compare(relay, url)
    assert (after.equal, after.events) == (True, before.events)


# ── What a rebuild would lose ────────────────────────────────────────────────────────────────────────


def lost(relay, ledger=None):
    return loss(Vault(relay.chain, VAULT), ledger or relay.ledger)


async def test_loss__whole_journal__is_none_whatever_other_platforms_charged(relay):
    id_ = (await relay.desk.charges())[0].id
    relay.chain.emit(relay.chain.blocks[2], chain.Charged(word("theirs"), id_, 5, 2, word("r")))
    assert await lost(relay) is None


async def test_loss__id_that_the_chain_has_for_another_charge__is_named(relay, url):
    relay.chain.range_limit = 3
    tamper(url, charge("final").values(digest=word("x")))
    assert str((await relay.desk.charges())[0].id) in await lost(relay)


async def test_loss__ledger_without_a_call__has_lost_what_the_chain_has_charges_of(relay, tmp_path):
    empty = Ledger.open(f"sqlite:///{tmp_path}/empty.db", chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM)
    try:
        assert "has not a single call" in await lost(relay, empty)
        relay.chain = Answering()
        assert await lost(relay, empty) is None
    finally:
        empty.close()


# ── Ledgers before this one ──────────────────────────────────────────────────────────────────────────


async def test_reconcile__restored__equal_but_for_receipts_that_are_lost(relay, url, tmp_path):
    backup.backup(url, tmp_path / "b")
    await relay.settle()
    lost = await relay.desk.charge(USD // 2)
    await relay.settle()
    relay.ledger.close()
    backup.restore(url, tmp_path / "b", Identity(31337, VAULT, PLATFORM), overwrite=True)
    relay.ledger = type(relay.ledger).open(url, chain_id=31337, vault=VAULT, platform=PLATFORM)
    relay.start()
    await relay.index()
    report = await compare(relay, url)
    assert report.differences == []
    assert (report.unknown, report.unknown_amount) == (1, lost.amount)
    assert report.waiting == 0
    relay.ledger.close()


async def test_reconcile__charge_of_this_epoch_unknown__says_to_restore(relay, url):
    """The database's file was put back by hand: an older one under the same epoch."""
    known = (await relay.desk.charges())[0]
    unknown = known.model_copy(update={"id": known.id + 1000})
    await relay.mine(lambda s: s.settle([unknown]))
    report = await compare(relay, url)
    assert (f"charge {unknown.id}", RESTORE) in {(d.subject, d.todo) for d in report.differences}
    assert "settlement" in {d.subject for d in report.differences}


# ── What is lost for good ────────────────────────────────────────────────────────────────────────────


async def test_is_journal_lost__new_database_for_a_platform_with_charges__is_true(relay, url):
    assert not await relay.ledger.read(reconciliation.is_journal_lost)
    tamper(url, *(table.delete() for table in (schema.charges, schema.holds)))
    assert await relay.ledger.read(reconciliation.is_journal_lost)


async def test_is_journal_lost__new_platform__is_false(ledger):
    assert not await ledger.read(reconciliation.is_journal_lost)


async def test_unknown_charges__of_earlier_ledgers__are_counted(relay):
    assert await relay.ledger.read(reconciliation.unknown_charges) == (0, 0)
    known = (await relay.desk.charges())[0]
    foreign = known.model_copy(update={"id": known.id ^ 1 << 40})
    await relay.mine(lambda s: s.settle([foreign]))
    assert not relay.ledger.view.mismatches
    assert await relay.ledger.read(reconciliation.unknown_charges) == (1, USD)


async def test_write_off_conflicts__id_used_for_another_charge__settlement_goes_on_and_it_is_equal(
    relay, url
):
    """Two ledgers were run under one epoch: what only the other charged can never be charged here."""
    charge = await relay.desk.charge(USD)
    await relay.mine(lambda s: s.settle([charge.model_copy(update={"receipt_hash": word("another")})]))
    assert relay.ledger.view.mismatches
    assert CONFLICT in {d.todo for d in (await compare(relay, url)).differences}
    assert await relay.ledger.view.write_off_conflicts() == 1
    assert not relay.ledger.view.mismatches
    assert (await compare(relay, url)).differences == []
    call = await relay.ledger.read(lambda c: views.calls(c, 1, VAULT, state="voided"))
    assert [c.settlement.reason for c in call] == ["its id was used by another charge"]
    await relay.settle()
    assert (await compare(relay, url)).equal
