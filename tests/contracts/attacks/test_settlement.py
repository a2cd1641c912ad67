"""Batches: offered again, cut short, made of rubbish, or charging what is not the platform's."""

from itertools import pairwise

import pytest
from conftest import (
    BALANCE,
    CENT,
    DAY,
    HOUR,
    LABEL,
    MAX_PER_WINDOW,
    MINUTE,
    TOKENS_PER_USD,
    USD,
    ZERO_AMOUNT,
)
from eth_abi import encode
from eth_utils import keccak
from reverts import reverts
from typed_data import Charge, settlement, sign

TOKENS = TOKENS_PER_USD
ENTRIES_OFFSET, FLAGS_OFFSET = 208, 248
ALL_ENTRIES = 2**40 - 1
CHARGED = keccak(text="Charged(bytes32,uint64,uint96,uint40,bytes32)")
DRAWN = keccak(text="ExitDrawn(bytes32,uint64,uint96)")


@pytest.fixture
def signed(vault, domain_of, platform, meter, now):
    """Arguments of settle for one batch."""

    def signed(*charges, deadline=None):
        deadline = deadline or now() + HOUR // 2
        signature = sign(meter.key, domain_of(vault), "Settlement", settlement(platform, charges, deadline))
        return [platform, charges, deadline, signature]

    return signed


@pytest.fixture
def charged(vault):
    """Ids and amounts a transaction charged, and ids and reasons it refused."""

    def charged(tx):
        made = [(log.id, log.amount) for log in tx.events.filter(vault.Charged)]
        return made, [(log.id, log.reason) for log in tx.events.filter(vault.ChargeRejected)]

    return charged


# ── A platform of the attacker's own ──


@pytest.mark.parametrize("amount", [0, 1, CENT, USD, 2**96 - 1])
def test_hostile_platform__charges_anothers_account__no_charge_of_it_is_ever_logged(
    vault, chain, platform, hostile, fund, settle, other_meter, moves, charged, amount
):
    """`Charged` names no platform: one of amount 0 would forge a line in the victim's statement."""
    account = fund(TOKENS)
    entries = vault.accountOf(platform, account).entries
    with moves():
        tx = settle(Charge(account, 1, amount), platform=hostile, key=other_meter.key)
    assert charged(tx) == ([], [(1, BALANCE if amount else ZERO_AMOUNT)])
    assert not vault.isSettled(hostile, 1)
    assert vault.accountOf(platform, account).entries == entries
    forged = {"fromBlock": 0, "address": vault.address, "topics": [[CHARGED, DRAWN], account]}
    assert chain.provider.web3.eth.get_logs(forged) == []


def test_hostile_platform__charges_anothers_exit_or_limits_it__nothing_there(
    vault, platform, hostile, fund, settle, set_policy, request_exit, stranger, other_meter, moves, charged
):
    account = fund(TOKENS)
    request_exit(TOKENS)
    with moves():
        set_policy(account, platform=hostile, sender=stranger, per_charge=0)
        tx = settle(Charge(account, 1, CENT), platform=hostile, key=other_meter.key)
    assert charged(tx)[0] == []
    with moves({("exit", account): -CENT, platform: CENT}):
        settle(Charge(account, 1, CENT))


def test_hostile_platform__offers_its_batch_to_another__reverts(
    vault, platform, hostile, fund, settle, other_meter, moves
):
    account = fund(TOKENS)
    with moves(), reverts(vault.NotAMeter, platform=platform, meter=other_meter.address):
        settle(Charge(account, 1, CENT), key=other_meter.key)


# ── An old batch ──


def test_old_batch__resubmitted_after_a_top_up__only_what_was_rejected_is_charged_and_once(
    vault, platform, account, fund, signed, relayer, stranger, moves, charged
):
    """The platform lives on the rejected charge's retry; the attacker hopes to have the others made twice."""
    fund(50 * 10**4)
    batch = signed(
        Charge(account, 1, 30 * CENT), Charge(account, 2, 30 * CENT), Charge(account, 3, 10 * CENT)
    )
    with moves({account: -40 * CENT, platform: 40 * CENT}):
        tx = vault.settle(*batch, sender=relayer)
    assert charged(tx) == ([(1, 30 * CENT), (3, 10 * CENT)], [(2, BALANCE)])
    fund(TOKENS)
    with moves({account: -30 * CENT, platform: 30 * CENT}):
        tx = vault.settle(*batch, sender=stranger)
    assert charged(tx) == ([(2, 30 * CENT)], [])
    with moves():
        assert vault.settle(*batch, sender=stranger).events == []


def test_old_batch__after_its_deadline__reverts(vault, account, fund, signed, stranger, at, moves):
    batch = signed(Charge(account, 1, 30 * CENT))
    with moves():
        vault.settle(*batch, sender=stranger)
    fund(TOKENS)
    at(batch[2] + 1)
    with moves(), reverts(vault.DeadlinePassed, deadline=batch[2], timestamp=batch[2] + 1):
        vault.settle(*batch, sender=stranger)


def test_old_batch__after_its_ids_were_voided__charges_nothing(
    vault, platform, account, fund, signed, void, stranger, moves
):
    """Written off, the charge must not come back with the next top-up."""
    batch = signed(Charge(account, 1, 30 * CENT), Charge(account, 2, 30 * CENT))
    vault.settle(*batch, sender=stranger)
    fund(TOKENS)
    with moves():
        void(1, 2)
        assert vault.settle(*batch, sender=stranger).events == []
    assert vault.isSettled(platform, 1)


def test_old_voiding__after_the_charge_was_made__leaves_it(
    platform, account, fund, settle, void, chain, moves
):
    """The payer keeps a voiding of his charge's id, for when it is made after all."""
    fund(TOKENS)
    settle(Charge(account, 1, 30 * CENT))
    with moves():
        assert void(1).events == []
        assert settle(Charge(account, 1, 30 * CENT)).events == []


# ── Ids and accounts more than once ──


def test_id_again__with_another_amount_or_account__skipped(
    vault, platform, account, fund, settle, stranger, moves
):
    """The meter signs another charge under an id that was used: in the same batch, and in a later one."""
    fund(TOKENS)
    other = fund(TOKENS, owner=stranger)
    with moves({account: -CENT, platform: CENT}):
        settle(
            Charge(account, 1, CENT),
            Charge(account, 1, 2 * CENT),
            Charge(other, 1, CENT),
            Charge(account, 1, CENT, b"\x5f" * 32),
        )
    with moves():
        for charge in (Charge(account, 1, 2 * CENT), Charge(other, 1, CENT), Charge(account, 1, 0)):
            assert settle(charge).events == []


def test_account_again__in_one_batch__never_more_than_it_has(
    platform, account, fund, settle, request_exit, moves, charged
):
    """Each charge alone could be borne, of balance and exit; together they cannot."""
    fund(TOKENS)
    request_exit(TOKENS // 2)
    with moves({account: -50 * CENT, ("exit", account): -40 * CENT, platform: 90 * CENT}):
        tx = settle(*(Charge(account, number, 45 * CENT) for number in range(1, 5)))
    assert charged(tx) == ([(1, 45 * CENT), (2, 45 * CENT)], [(3, BALANCE), (4, BALANCE)])


def test_batch__of_no_charges__reverts(vault, settle, void, moves):
    with moves():
        with reverts(vault.EmptyBatch):
            settle()
        with reverts(vault.EmptyBatch):
            void()


def test_batch__too_large__reverts(vault, platform, account, fund, settle, void, moves):
    fund(TOKENS)
    with moves():
        with reverts(vault.BatchTooLarge, length=1_001, max=1_000):
            settle(*(Charge(account, number, 1) for number in range(1_001)))
        with reverts(vault.BatchTooLarge, length=1_001, max=1_000):
            void(*range(1_001))
    assert not vault.isSettled(platform, 0)


def test_batch__every_charge_rejected__moves_nothing_and_leaves_every_id(
    vault, platform, account, settle, moves, charged
):
    ids = (0, 255, 256, 2**64 - 1)
    with moves():
        tx = settle(*(Charge(account, id_, CENT) for id_ in ids))
    assert charged(tx) == ([], [(id_, BALANCE) for id_ in ids])
    assert not any(vault.isSettled(platform, id_) for id_ in ids)
    assert vault.accountOf(platform, account).entries == 0


# ── Gas ──


def test_gas_limit__from_too_little_to_enough__all_of_the_batch_or_nothing(
    vault, chain, fund, signed, relayer, stranger, set_policy, set_allowance, request_exit, isolate
):
    """The relayer gives just enough gas for half of it: ids used without earnings, or charges without their ids."""
    plain = fund(TOKENS)
    leaving = fund(TOKENS, label=b"\x03" * 32)
    request_exit(900_000, label=b"\x03" * 32)
    limited = fund(TOKENS, owner=stranger)
    set_policy(limited, per_charge=20 * CENT, per_window=(25 * CENT, 2**32 - 1), expires_at=2**40 - 1)
    allowed = fund(TOKENS, label=b"\x04" * 32)
    set_allowance(30 * CENT, label=b"\x04" * 32)
    ids = iter(range(254, 300))
    batch = signed(
        *(Charge(account, next(ids), 15 * CENT) for account in (plain, leaving, limited, allowed) * 2)
    )
    data = vault.settle.encode_input(*batch).to_0x_hex()

    def root():
        """All the vault stores, in one hash."""
        return chain.provider.make_request("eth_getProof", [vault.address, [], "latest"])["storageHash"]

    def send(gas):
        call = {"from": relayer.address, "to": vault.address, "data": data, "gas": hex(gas)}
        receipt = chain.provider.make_request("eth_sendTransactionSync", [call])
        return int(receipt["status"], 16), int(receipt["gasUsed"], 16)

    untouched = root()
    with isolate():
        status, enough = send(3_000_000)
        settled = root()
    assert (status, settled != untouched) == (1, True)
    floor = 21_000 + 16 * (len(data) // 2)
    steps = [*range(floor, enough + 25_000, 1_009)]
    seen = []
    for gas in steps:
        with isolate():
            status, _ = send(gas)
            assert root() == (settled if status else untouched), f"with {gas} gas"
            seen.append(status)
    assert seen[0] == 0
    assert seen[-1] == 1
    assert all(less <= more for less, more in pairwise(seen))


# ── An account at its limits ──


def test_entries__at_their_maximum__charging_goes_on_and_flags_stay(
    vault, chain, platform, account, fund, settle, set_policy, set_allowance, request_exit, user, at, moves
):
    """A carry out of the counter would change the flags: the next charge would find other limits."""
    fund(TOKENS)
    set_policy(account, per_charge=20 * CENT, expires_at=2**40 - 1)
    set_allowance(50 * CENT)
    matures_at = request_exit(TOKENS // 2)
    slot = keccak(
        encode(["bytes32", "bytes32"], [account, keccak(encode(["uint128", "uint256"], [platform, 4]))])
    )
    word = int.from_bytes(chain.provider.web3.eth.get_storage_at(vault.address, slot), "big")
    assert word & (2**96 - 1) == 50 * CENT
    assert word >> FLAGS_OFFSET == 1 | 4 | 8 | 16 | 32
    word |= ALL_ENTRIES << ENTRIES_OFFSET
    chain.provider.make_request(
        "anvil_setStorageAt", [vault.address, "0x" + slot.hex(), "0x" + word.to_bytes(32, "big").hex()]
    )

    def flags():
        word = chain.provider.web3.eth.get_storage_at(vault.address, slot)
        return word[0]

    assert vault.accountOf(platform, account).entries == ALL_ENTRIES
    with moves({account: -20 * CENT, platform: 20 * CENT}):
        tx = settle(Charge(account, 1, 20 * CENT), Charge(account, 2, 20 * CENT + 1))
    assert [log.event_name for log in tx.events] == ["Charged", "ChargeRejected"]
    assert tx.events[0].entry == ALL_ENTRIES
    assert (vault.accountOf(platform, account).entries, flags()) == (ALL_ENTRIES, 1 | 4 | 8 | 16 | 32)
    with moves({account: USD, vault: TOKENS}):
        fund(TOKENS)
    assert flags() == 1 | 4 | 8 | 16 | 32
    at(matures_at)
    with moves({("exit", account): -50 * CENT, vault: -TOKENS // 2, user: TOKENS // 2}):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)
    assert (vault.accountOf(platform, account).entries, flags()) == (ALL_ENTRIES, 1 | 4 | 8 | 32)


def test_backlog__across_a_windows_edge__counts_where_it_lands(
    vault, platform, account, fund, signed, relayer, set_policy, at, next_window, moves, charged
):
    """A batch signed in one window and held back to the next: it neither escapes the limit nor doubles it."""
    fund(TOKENS)
    set_policy(account, per_window=(30 * CENT, HOUR))
    edge = next_window + HOUR
    at(edge - 10)
    first = signed(Charge(account, 1, 30 * CENT), deadline=edge + MINUTE)
    held = signed(Charge(account, 2, 20 * CENT), Charge(account, 3, 20 * CENT), deadline=edge + MINUTE)
    with moves({account: -30 * CENT, platform: 30 * CENT}):
        vault.settle(*first, sender=relayer)
    at(edge - 1)
    with moves():
        tx = vault.settle(*held, sender=relayer)
    assert charged(tx) == ([], [(2, MAX_PER_WINDOW), (3, MAX_PER_WINDOW)])
    at(edge)
    with moves({account: -20 * CENT, platform: 20 * CENT}):
        tx = vault.settle(*held, sender=relayer)
    assert charged(tx) == ([(2, 20 * CENT)], [(3, MAX_PER_WINDOW)])
    assert vault.accountOf(platform, account).spentInWindow == 20 * CENT
    assert vault.remainingInWindow(platform, account) == (10 * CENT, edge + HOUR)


def test_backlog__held_back_beyond_an_expiry__refused(
    vault, platform, account, fund, signed, relayer, set_policy, at, now, moves
):
    fund(TOKENS)
    expires_at = now() + MINUTE
    set_policy(account, expires_at=expires_at)
    batch = signed(Charge(account, 1, CENT))
    at(expires_at)
    with moves():
        vault.settle(*batch, sender=relayer)
    assert not vault.isSettled(platform, 1)


@pytest.mark.parametrize(
    "limit",
    [{"per_charge": 0}, {"per_window": (0, HOUR)}, {"expires_at": 0}],
    ids=lambda limit: next(iter(limit)),
)
def test_policy_of_zero__charged__nothing(vault, platform, fund, set_policy, settle, moves, charged, limit):
    """A limit is one by its flag: 0 must not be read as none."""
    account = fund(TOKENS)
    with moves():
        set_policy(account, **limit)
        tx = settle(Charge(account, 1, 1), Charge(account, 2, USD))
    made, refused = charged(tx)
    assert (made, [id_ for id_, _ in refused]) == ([], [1, 2])
    assert vault.available(platform, account) == 0


def test_batch__signed_for_longer_than_an_hour__waits(vault, fund, signed, relayer, now, moves):
    """A compromised meter signs ahead, to charge after it is noticed."""
    batch = signed(Charge(fund(TOKENS), 1, CENT), deadline=now() + DAY)
    with moves(), reverts(vault.DeadlineTooFar, deadline=batch[2]):
        vault.settle(*batch, sender=relayer)
