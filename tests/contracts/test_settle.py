import ape
import pytest
from conftest import BALANCE, CENT, CURVE_ORDER, HOUR, SALT, USD, ZERO_AMOUNT
from eth_abi import encode
from eth_account.messages import encode_typed_data
from eth_utils import keccak
from hypothesis import given
from hypothesis import strategies as st
from reverts import reverts
from settings import few
from typed_data import Charge, settlement, sign


@pytest.fixture
def signed(vault, domain_of, platform, meter, now):
    """Arguments of settle for one batch."""

    def signed(*charges, deadline=None):
        deadline = deadline or now() + HOUR
        signature = sign(meter.key, domain_of(vault), "Settlement", settlement(platform, charges, deadline))
        return platform, charges, deadline, signature

    return signed


# ── What a charge does ──


def test_settle__one_charge__moves_credit_to_the_platform(vault, platform, fund, settle, earnings):
    account = fund(10**6)
    receipt_hash = keccak(b"receipt")
    tx = settle(Charge(account, 7, 30 * CENT + 1, receipt_hash))
    assert tx.events == [
        vault.Charged(account=account, id=7, amount=30 * CENT + 1, entry=2, receiptHash=receipt_hash)
    ]
    record = vault.accountOf(platform, account)
    assert (record.balance, record.entries, record.spentInWindow) == (70 * CENT - 1, 2, 0)
    assert earnings() == 30 * CENT + 1
    assert vault.isSettled(platform, 7)
    assert not vault.isSettled(platform, 6)
    assert not vault.isSettled(platform, 8)


@few
@given(
    tokens=st.integers(1, 10**9),
    amounts=st.lists(st.integers(1, 2**96 - 1) | st.integers(1, 10**15), min_size=1, max_size=20),
    base=st.integers(0, 2**64 - 2**10),
)
def test_settle__any_amounts__as_a_model_says(
    vault, platform, fund, settle, earnings, balance_of, isolate, tokens, amounts, base
):
    balance, taken = tokens * 10**6, []
    for number, amount in enumerate(amounts):
        if amount <= balance:
            balance -= amount
            taken.append(base + number)
    with isolate():
        account = fund(tokens)
        tx = settle(*(Charge(account, base + number, amount) for number, amount in enumerate(amounts)))
        assert [log.id for log in tx.events.filter(vault.Charged)] == taken
        assert balance_of(account) == balance
        assert earnings() == tokens * 10**6 - balance
        for number in range(len(amounts)):
            assert vault.isSettled(platform, base + number) == (base + number in taken)


def test_settle__account_twice_in_a_batch__each_charge_sees_the_one_before(vault, fund, settle, balance_of):
    account = fund(10**6)
    tx = settle(Charge(account, 1, 60 * CENT), Charge(account, 2, 60 * CENT), Charge(account, 3, 40 * CENT))
    assert [(log.id, log.entry) for log in tx.events.filter(vault.Charged)] == [(1, 2), (3, 3)]
    assert [(log.id, log.reason) for log in tx.events.filter(vault.ChargeRejected)] == [(2, BALANCE)]
    assert balance_of(account) == 0


def test_settle__last_unit__accepted_and_one_more_is_not(vault, platform, fund, settle):
    account = fund(1)
    assert settle(Charge(account, 1, 10**6 + 1)).events == [
        vault.ChargeRejected(platform=platform, account=account, id=1, reason=BALANCE)
    ]
    assert settle(Charge(account, 1, 10**6)).events.filter(vault.Charged)


def test_settle__zero_amount__rejected(vault, platform, fund, settle):
    account = fund(10**6)
    assert settle(Charge(account, 1, 0)).events == [
        vault.ChargeRejected(platform=platform, account=account, id=1, reason=ZERO_AMOUNT)
    ]
    assert not vault.isSettled(platform, 1)


# ── Bad charges in a batch ──


def test_settle__one_bad_charge__the_rest_settle(vault, platform, fund, settle, earnings):
    account, empty = fund(10**6), b"\xee" * 32
    tx = settle(Charge(account, 1, CENT), Charge(empty, 2, CENT), Charge(account, 3, CENT))
    assert [log.event_name for log in tx.events] == ["Charged", "ChargeRejected", "Charged"]
    assert [vault.isSettled(platform, id_) for id_ in (1, 2, 3)] == [True, False, True]
    assert earnings() == 2 * CENT


def test_settle__all_rejected__nothing_but_their_events(vault, platform, account, settle, earnings):
    tx = settle(*(Charge(account, id_, CENT) for id_ in range(5)))
    assert tx.events == [
        vault.ChargeRejected(platform=platform, account=account, id=id_, reason=BALANCE) for id_ in range(5)
    ]
    assert earnings() == 0
    assert vault.accountOf(platform, account).entries == 0


def test_settle__rejected_charge__settles_under_the_same_id_once_it_can(vault, account, fund, settle):
    charge = Charge(account, 1, CENT)
    assert settle(charge).events.filter(vault.ChargeRejected)
    fund(10**6)
    assert settle(charge).events.filter(vault.Charged)


# ── Replay ──


def test_settle__id_twice_in_a_batch__first_counts(vault, fund, settle, balance_of):
    account = fund(10**6)
    tx = settle(Charge(account, 1, CENT), Charge(account, 1, 2 * CENT))
    assert [log.amount for log in tx.events] == [CENT]
    assert balance_of(account) == 99 * CENT


def test_settle__id_rejected_and_repeated_in_a_batch__the_one_that_can_counts(vault, fund, settle):
    account = fund(10**6)
    tx = settle(Charge(account, 1, 2 * USD), Charge(account, 1, CENT))
    assert [log.event_name for log in tx.events] == ["ChargeRejected", "Charged"]


def test_settle__same_batch_again__skipped_without_an_event(
    vault, fund, signed, relayer, balance_of, stranger
):
    account = fund(10**6)
    arguments = signed(Charge(account, 1, CENT), Charge(account, 300, CENT))
    vault.settle(*arguments, sender=relayer)
    assert vault.settle(*arguments, sender=stranger).events == []
    assert balance_of(account) == 98 * CENT


@pytest.mark.parametrize(
    "ids", [(255, 256), (256, 255), (0, 2**64 - 1, 255, 256, 0), (1, 300, 2, 301, 1, 300)]
)
def test_settle__ids_over_several_words__each_once(vault, platform, fund, settle, ids):
    account = fund(10**6)
    tx = settle(*(Charge(account, id_, CENT) for id_ in ids))
    assert [log.id for log in tx.events] == list(dict.fromkeys(ids))
    assert settle(*(Charge(account, id_, CENT) for id_ in ids)).events == []
    neighbours = {near for id_ in ids for near in (id_ - 1, id_ + 1) if 0 <= near < 2**64} - set(ids)
    assert all(vault.isSettled(platform, id_) for id_ in ids)
    assert not any(vault.isSettled(platform, near) for near in neighbours)


def test_settle__same_id_of_another_platform__its_own(vault, platform, register, fund, settle):
    other = register(b"\x0b" * 32)
    settle(Charge(fund(10**6), 1, CENT))
    account = fund(10**6, platform=other)
    assert settle(Charge(account, 1, CENT), platform=other).events.filter(vault.Charged)


def test_settle__signed_for_another_platform__reverts(vault, register, fund, signed, relayer):
    other = register(b"\x0b" * 32)
    account = fund(10**6, platform=other)
    _, *arguments = signed(Charge(account, 1, CENT))
    with reverts(vault.NotAMeter, platform=other):
        vault.settle(other, *arguments, sender=relayer)


def test_settle__signed_for_another_vault__reverts(
    project, token, admin, vault, register, signed, relayer, account
):
    other = admin.deploy(project.CreditVault, token)
    register(SALT, vault=other)
    with reverts(other.NotAMeter):
        other.settle(*signed(Charge(account, 1, CENT)), sender=relayer)


# ── Who may charge whom ──


def test_settle__hostile_platform_charges_anothers_account__finds_no_credit(
    vault, platform, fund, register, settle, stranger, other_meter, balance_of, earnings
):
    account = fund(10**6)
    hostile = register(SALT, owner=stranger, meter=other_meter.address)
    tx = settle(Charge(account, 1, CENT), platform=hostile, key=other_meter.key)
    assert tx.events == [vault.ChargeRejected(platform=hostile, account=account, id=1, reason=BALANCE)]
    assert (balance_of(account), earnings(hostile)) == (USD, 0)


def test_settle__hostile_platform_signs_for_another__reverts(
    vault, platform, fund, register, settle, stranger, other_meter
):
    account = fund(10**6)
    register(SALT, owner=stranger, meter=other_meter.address)
    with reverts(vault.NotAMeter, platform=platform, meter=other_meter.address):
        settle(Charge(account, 1, CENT), key=other_meter.key)


def test_settle__platform_owner_signs__reverts(vault, platform, fund, settle, operator):
    with reverts(vault.NotAMeter, platform=platform, meter=operator.address):
        settle(Charge(fund(10**6), 1, CENT), key=operator.private_key)


def test_settle__relayer_changes_anything__reverts(vault, platform, fund, signed, relayer):
    account = fund(10**6)
    first, second = Charge(account, 1, CENT), Charge(account, 2, CENT)
    _, charges, deadline, signature = signed(first, second)
    for tampered in (
        (platform, charges, deadline - 1, signature),
        (platform, charges[:1], deadline, signature),
        (platform, charges[::-1], deadline, signature),
        (platform, (*charges, first), deadline, signature),
        (platform, (first._replace(amount=2 * CENT), second), deadline, signature),
        (platform, (first._replace(account=b"\xee" * 32), second), deadline, signature),
        (platform, (first, second._replace(id=3)), deadline, signature),
        (platform, (first, second._replace(receiptHash=bytes(32))), deadline, signature),
    ):
        with reverts(vault.NotAMeter, platform=platform):
            vault.settle(*tampered, sender=relayer)


# ── Signatures ──


def test_settle__high_s__reverts(vault, fund, signed, relayer):
    *arguments, signature = signed(Charge(fund(10**6), 1, CENT))
    r, s, v = signature[:32], int.from_bytes(signature[32:64], "big"), signature[64]
    high = (CURVE_ORDER - s).to_bytes(32, "big")
    with reverts(vault.ECDSAInvalidSignatureS, s=high):
        vault.settle(*arguments, r + high + bytes([55 - v]), sender=relayer)


@pytest.mark.parametrize("length", [0, 64, 66])
def test_settle__signature_of_another_length__reverts(vault, fund, signed, relayer, length):
    *arguments, signature = signed(Charge(fund(10**6), 1, CENT))
    with reverts(vault.ECDSAInvalidSignatureLength, length=length):
        vault.settle(*arguments, (signature + b"\x00")[:length], sender=relayer)


def test_settle__compact_signature__reverts(vault, fund, signed, relayer):
    *arguments, signature = signed(Charge(fund(10**6), 1, CENT))
    vs = int.from_bytes(signature[32:64], "big") | (signature[64] - 27) << 255
    with reverts(vault.ECDSAInvalidSignatureLength, length=64):
        vault.settle(*arguments, signature[:32] + vs.to_bytes(32, "big"), sender=relayer)


@pytest.mark.parametrize("v", [0, 1, 26, 29, 255])
def test_settle__other_v__reverts(vault, fund, signed, relayer, v):
    *arguments, signature = signed(Charge(fund(10**6), 1, CENT))
    with reverts(vault.ECDSAInvalidSignature):
        vault.settle(*arguments, signature[:64] + bytes([v]), sender=relayer)


def test_settle__zero_signature__reverts(vault, fund, signed, relayer):
    *arguments, _ = signed(Charge(fund(10**6), 1, CENT))
    for signature in (bytes(65), bytes(64) + b"\x1b"):
        with reverts(vault.ECDSAInvalidSignature):
            vault.settle(*arguments, signature, sender=relayer)


# ── Deadline and size ──


def test_settle__at_the_deadline__settles_and_a_second_later_reverts(
    vault, fund, signed, relayer, at, now, isolate
):
    deadline = now() + 100
    arguments = signed(Charge(fund(10**6), 1, CENT), deadline=deadline)
    with isolate():
        at(deadline + 1)
        with reverts(vault.DeadlinePassed, deadline=deadline, timestamp=deadline + 1):
            vault.settle(*arguments, sender=relayer)
    at(deadline)
    assert vault.settle(*arguments, sender=relayer).events.filter(vault.Charged)


def test_settle__deadline_an_hour_ahead__settles_and_a_second_more_reverts(
    vault, fund, signed, relayer, at, now, isolate
):
    arguments = signed(Charge(fund(10**6), 1, CENT), deadline=now() + 100 + HOUR)
    deadline = arguments[2]
    with isolate():
        at(deadline - HOUR - 1)
        with reverts(vault.DeadlineTooFar, deadline=deadline, max=deadline - 1):
            vault.settle(*arguments, sender=relayer)
    at(deadline - HOUR)
    assert vault.settle(*arguments, sender=relayer).events.filter(vault.Charged)


def test_settle__no_charges__reverts(vault, settle):
    with reverts(vault.EmptyBatch):
        settle()


def test_settle__thousand_charges__settle_and_one_more_reverts(vault, fund, settle, balance_of):
    account = fund(10**6)
    charges = [Charge(account, id_, 1) for id_ in range(1_001)]
    with reverts(vault.BatchTooLarge, length=1_001, max=1_000):
        settle(*charges, signature=bytes(65))
    settle(*charges[1:])
    assert balance_of(account) == USD - 1_000


# ── Gas and encoding ──


def test_settle__short_of_gas__reverts_as_a_whole(
    vault, platform, fund, signed, relayer, balance_of, earnings, isolate
):
    account = fund(10**6)
    arguments = signed(*(Charge(account, 250 + number, CENT) for number in range(12)))
    with isolate():
        needed = vault.settle(*arguments, sender=relayer).gas_used
    intrinsic = 21_000 + 16 * len(vault.settle.encode_input(*arguments))
    for gas in range(intrinsic, needed, (needed - intrinsic) // 12):
        with pytest.raises(ape.exceptions.TransactionError):
            vault.settle(*arguments, sender=relayer, gas=gas)
        assert (balance_of(account), earnings()) == (USD, 0)
        assert not any(vault.isSettled(platform, 250 + number) for number in range(12))
    vault.settle(*arguments, sender=relayer, gas=needed)
    assert balance_of(account) == 88 * CENT


CHARGE_TYPE = b"Charge(bytes32 account,uint64 id,uint96 amount,bytes32 receiptHash)"
SETTLEMENT_TYPE = b"Settlement(uint128 platform,Charge[] charges,uint40 deadline)" + CHARGE_TYPE


@pytest.mark.parametrize("field", ["id", "amount"])
def test_settle__bits_above_a_field__reverts_although_signed(
    vault, platform, fund, domain_of, meter, relayer, now, field, balance_of
):
    account, deadline = fund(10**6), now() + HOUR
    separator = encode_typed_data(domain_of(vault), {"Nothing": []}, {}).header

    def submit(charge):
        """Sends a batch of one charge, given as its four words and signed over just these."""
        charges = keccak(keccak(keccak(CHARGE_TYPE) + b"".join(charge)))
        fields = encode(["uint128", "bytes32", "uint40"], [platform, charges, deadline])
        digest = keccak(b"\x19\x01" + separator + keccak(keccak(SETTLEMENT_TYPE) + fields))
        signature = bytes(meter.unsafe_sign_hash(digest).signature)
        data = vault.settle.encode_input(platform, [Charge(account, 1, CENT)], deadline, signature)
        start = 4 + 5 * 32  # selector, four heads, the array's length
        data = data[:start] + b"".join(charge) + data[start + 4 * 32 :]
        return relayer.transfer(vault, 0, data=data)

    clean = [bytes(account), word(1), word(CENT), bytes(32)]
    dirty = [*clean]
    dirty[{"id": 1, "amount": 2}[field]] = b"\x80" + dirty[{"id": 1, "amount": 2}[field]][1:]
    with reverts(None):
        submit(dirty)
    assert balance_of(account) == USD
    submit(clean)
    assert balance_of(account) == USD - CENT


def word(value):
    return value.to_bytes(32, "big")
