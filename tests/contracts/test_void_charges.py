import pytest
from conftest import CENT, HOUR, SALT, USD
from reverts import reverts
from typed_data import Charge, sign

IDS = (7, 9)


@pytest.fixture
def signed(vault, domain_of, platform, meter, now):
    """Arguments of voidCharges."""

    def signed(*ids, vault=vault, platform=platform, key=meter.key, deadline=None):
        deadline = deadline or now() + HOUR
        message = {"platform": platform, "ids": list(ids), "deadline": deadline}
        return platform, ids, deadline, sign(key, domain_of(vault), "Voiding", message)

    return signed


# ── What it does ──


def test_void_charges__unused_ids__are_used_and_nothing_moves(
    vault, token, platform, fund, void, balance_of, earnings
):
    account = fund(10**6)
    tx = void(*IDS)
    assert tx.events == [vault.ChargeVoided(platform=platform, id=id_) for id_ in IDS]
    assert [vault.isSettled(platform, id_) for id_ in range(6, 11)] == [False, True, False, True, False]
    assert (balance_of(account), vault.accountOf(platform, account).entries, earnings()) == (USD, 1, 0)
    assert token.balanceOf(vault) == 10**6


def test_void_charges__then_charged__skipped_without_an_event(fund, void, settle, balance_of):
    account = fund(10**6)
    void(7)
    assert settle(Charge(account, 7, CENT)).events == []
    assert balance_of(account) == USD


def test_void_charges__rejected_charge__never_settles(vault, account, fund, void, settle, balance_of):
    assert settle(Charge(account, 7, CENT)).events.filter(vault.ChargeRejected)
    void(7)
    fund(10**6)
    assert settle(Charge(account, 7, CENT)).events == []
    assert balance_of(account) == USD


def test_void_charges__charged_before__skipped_and_stays_charged(
    vault, platform, fund, settle, void, balance_of, earnings
):
    account = fund(10**6)
    settle(Charge(account, 7, CENT))
    assert void(7, 9).events == [vault.ChargeVoided(platform=platform, id=9)]
    assert (balance_of(account), earnings()) == (99 * CENT, CENT)


def test_void_charges__id_twice_in_a_batch__one_event(vault, platform, void):
    assert void(7, 7).events == [vault.ChargeVoided(platform=platform, id=7)]


def test_void_charges__same_batch_again__without_an_event(signed, vault, relayer, stranger):
    arguments = signed(*IDS)
    vault.voidCharges(*arguments, sender=relayer)
    assert vault.voidCharges(*arguments, sender=stranger).events == []


@pytest.mark.parametrize("ids", [(255, 256), (0, 2**64 - 1, 255, 256, 511), (2**64 - 256, 2**64 - 257)])
def test_void_charges__ids_over_several_words__each_and_no_neighbour(vault, platform, void, ids):
    assert [log.id for log in void(*ids).events] == list(ids)
    neighbours = {near for id_ in ids for near in (id_ - 1, id_ + 1) if 0 <= near < 2**64} - set(ids)
    assert all(vault.isSettled(platform, id_) for id_ in ids)
    assert not any(vault.isSettled(platform, near) for near in neighbours)


def test_void_charges__same_id_of_another_platform__stays_unused(vault, register, void, fund, settle):
    other = register(b"\x0b" * 32)
    void(7)
    assert not vault.isSettled(other, 7)
    charge = Charge(fund(10**6, platform=other), 7, CENT)
    assert settle(charge, platform=other).events.filter(vault.Charged)


# ── Who may ──


@pytest.mark.parametrize("sender", ["stranger", "user", "operator"])
def test_void_charges__submitted_by_anybody__voids(vault, platform, void, request, sender):
    void(7, sender=request.getfixturevalue(sender))
    assert vault.isSettled(platform, 7)


def test_void_charges__platform_owner_signs__reverts(vault, platform, void, operator):
    with reverts(vault.NotAMeter, platform=platform, meter=operator.address):
        void(7, key=operator.private_key)


def test_void_charges__meter_of_another_platform__reverts(
    vault, platform, register, void, stranger, other_meter
):
    register(SALT, owner=stranger, meter=other_meter.address)
    with reverts(vault.NotAMeter, platform=platform, meter=other_meter.address):
        void(7, key=other_meter.key)


def test_void_charges__retired_meter__reverts(vault, platform, operator, meter, signed, relayer):
    arguments = signed(7)
    vault.retireMeter(platform, meter.address, 0, sender=operator)
    with reverts(vault.NotAMeter, platform=platform, meter=meter.address):
        vault.voidCharges(*arguments, sender=relayer)


def test_void_charges__signed_for_another_platform__reverts(vault, register, signed, relayer):
    other = register(b"\x0b" * 32)
    _, *arguments = signed(7)
    with reverts(vault.NotAMeter, platform=other):
        vault.voidCharges(other, *arguments, sender=relayer)


def test_void_charges__unknown_platform__has_no_meter(vault, signed, meter, relayer):
    with reverts(vault.NotAMeter, platform=7, meter=meter.address):
        vault.voidCharges(*signed(7, platform=7), sender=relayer)


def test_void_charges__signed_for_another_vault__reverts(project, token, admin, register, signed, relayer):
    other = admin.deploy(project.CreditVault, token)
    platform = register(SALT, vault=other)
    with reverts(other.NotAMeter, platform=platform):
        other.voidCharges(*signed(7), sender=relayer)
    other.voidCharges(*signed(7, vault=other), sender=relayer)


def test_void_charges__submitter_changes_anything__reverts(vault, platform, signed, relayer):
    _, ids, deadline, signature = signed(*IDS)
    for tampered in (
        (ids, deadline - 1, signature),
        (ids[:1], deadline, signature),
        (ids[::-1], deadline, signature),
        ((*ids, 1), deadline, signature),
        ((7, 8), deadline, signature),
    ):
        with reverts(vault.NotAMeter, platform=platform):
            vault.voidCharges(platform, *tampered, sender=relayer)


def test_void_charges__malformed_signature__reverts(vault, signed, malformed, relayer):
    *arguments, signature = signed(7)
    for bad, error, inputs in malformed(signature):
        with reverts(error, **inputs):
            vault.voidCharges(*arguments, bad, sender=relayer)


# ── Deadline and size ──


def test_void_charges__at_the_deadline__voids_and_a_second_later_reverts(
    vault, signed, relayer, at, now, isolate
):
    deadline = now() + 100
    arguments = signed(7, deadline=deadline)
    with isolate():
        at(deadline + 1)
        with reverts(vault.DeadlinePassed, deadline=deadline, timestamp=deadline + 1):
            vault.voidCharges(*arguments, sender=relayer)
    at(deadline)
    assert vault.voidCharges(*arguments, sender=relayer).events.filter(vault.ChargeVoided)


def test_void_charges__deadline_an_hour_ahead__voids_and_a_second_more_reverts(
    vault, signed, relayer, at, now, isolate
):
    deadline = now() + 100 + HOUR
    arguments = signed(7, deadline=deadline)
    with isolate():
        at(deadline - HOUR - 1)
        with reverts(vault.DeadlineTooFar, deadline=deadline, max=deadline - 1):
            vault.voidCharges(*arguments, sender=relayer)
    at(deadline - HOUR)
    assert vault.voidCharges(*arguments, sender=relayer).events.filter(vault.ChargeVoided)


def test_void_charges__no_ids__reverts(vault, void):
    with reverts(vault.EmptyBatch):
        void()


def test_void_charges__thousand_ids__void_and_one_more_reverts(vault, void):
    with reverts(vault.BatchTooLarge, length=1_001, max=1_000):
        void(*range(1_001), signature=bytes(65))
    assert len(void(*range(1_000)).events) == 1_000
