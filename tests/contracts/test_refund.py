import pytest
from conftest import CENT, HOUR, LABEL, SALT, USD, ZERO_ADDRESS
from hypothesis import given
from hypothesis import strategies as st
from reverts import reverts
from settings import few
from typed_data import Charge


@pytest.fixture
def charged(fund, settle):
    """An account whose dollar was charged 30 cents, under id 7."""
    account = fund(10**6)
    settle(Charge(account, 7, 30 * CENT))
    return account


def test_refund__of_a_charge__moves_credit_from_the_earnings(
    vault, token, platform, operator, user, charged, earnings
):
    tx = vault.refund(platform, 7, user, LABEL, 20 * CENT + 1, sender=operator)
    assert tx.return_value == charged
    assert tx.events == [
        vault.Refunded(
            platform=platform,
            account=charged,
            id=7,
            owner=user,
            label=LABEL,
            amount=20 * CENT + 1,
            entry=3,
        )
    ]
    record = vault.accountOf(platform, charged)
    assert (record.balance, record.entries) == (90 * CENT + 1, 3)
    assert earnings() == 10 * CENT - 1
    assert vault.isSettled(platform, 7)
    assert token.balanceOf(vault) == 10**6


def test_refund__all_of_the_earnings__leaves_none_and_one_unit_more_reverts(
    vault, platform, operator, user, charged, earnings, balance_of
):
    with reverts(vault.ExceedsEarnings, amount=30 * CENT + 1, available=30 * CENT):
        vault.refund(platform, 7, user, LABEL, 30 * CENT + 1, sender=operator)
    vault.refund(platform, 7, user, LABEL, 30 * CENT, sender=operator)
    assert (balance_of(charged), earnings()) == (USD, 0)


@few
@given(charge=st.integers(1, USD), share=st.fractions(0, 1), withdrawn=st.integers(0, 10**6))
def test_refund__any_amount__is_conserved_or_refused(
    vault,
    token,
    platform,
    operator,
    user,
    fund,
    settle,
    earnings,
    balance_of,
    isolate,
    charge,
    share,
    withdrawn,
):
    amount = max(1, int(charge * share))
    withdrawn = min(withdrawn, charge // 10**6)
    left = charge - withdrawn * 10**6
    with isolate():
        account = fund(10**6)
        settle(Charge(account, 7, charge))
        if withdrawn:
            vault.withdrawEarnings(platform, withdrawn, sender=operator)
        if amount > left:
            with reverts(vault.ExceedsEarnings, amount=amount, available=left):
                vault.refund(platform, 7, user, LABEL, amount, sender=operator)
            amount = 0
        else:
            vault.refund(platform, 7, user, LABEL, amount, sender=operator)
        assert (balance_of(account), earnings()) == (USD - charge + amount, left - amount)
        assert balance_of(account) + earnings() == token.balanceOf(vault) * 10**6


def test_refund__largest_amount__reverts_as_any_other(vault, platform, operator, user, charged):
    with reverts(vault.ExceedsEarnings, amount=2**96 - 1, available=30 * CENT):
        vault.refund(platform, 7, user, LABEL, 2**96 - 1, sender=operator)


def test_refund__same_id_again__reverts(vault, platform, operator, user, charged, earnings):
    vault.refund(platform, 7, user, LABEL, 1, sender=operator)
    with reverts(vault.AlreadyRefunded, platform=platform, id=7):
        vault.refund(platform, 7, user, LABEL, 1, sender=operator)
    assert earnings() == 30 * CENT - 1


def test_refund__each_id_once__gapless_entries(vault, platform, operator, user, charged, settle):
    settle(Charge(charged, 8, CENT))
    logs = [vault.refund(platform, id_, user, LABEL, CENT, sender=operator).events[0] for id_ in (8, 7)]
    assert [(log.id, log.entry) for log in logs] == [(8, 4), (7, 5)]


@pytest.mark.parametrize("id_", [6, 8, 7 + 256, 2**64 - 1])
def test_refund__unused_id__reverts(vault, platform, operator, user, charged, id_):
    with reverts(vault.IdNotUsed, platform=platform, id=id_):
        vault.refund(platform, id_, user, LABEL, 1, sender=operator)


def test_refund__rejected_charge__its_id_is_unused(vault, platform, operator, user, charged, settle):
    settle(Charge(charged, 8, 2 * USD))
    with reverts(vault.IdNotUsed, platform=platform, id=8):
        vault.refund(platform, 8, user, LABEL, 1, sender=operator)


def test_refund__id_of_another_platform__unused_here(
    vault, platform, operator, user, charged, register, fund, settle
):
    other = register(b"\x0b" * 32)
    settle(Charge(fund(10**6, platform=other), 8, CENT), platform=other)
    with reverts(vault.IdNotUsed, platform=platform, id=8):
        vault.refund(platform, 8, user, LABEL, 1, sender=operator)


def test_refund__refunded_on_another_platform__still_refundable_here(
    vault, platform, operator, user, charged, register, fund, settle, balance_of
):
    other = register(b"\x0b" * 32)
    settle(Charge(fund(10**6, platform=other), 7, CENT), platform=other)
    vault.refund(other, 7, user, LABEL, CENT, sender=operator)
    vault.refund(platform, 7, user, LABEL, CENT, sender=operator)
    assert balance_of(charged) == 71 * CENT


def test_refund__voided_id__counts_as_used(vault, platform, operator, user, charged, void, balance_of):
    """The vault keeps no amounts: a charge written off by mistake can be made good."""
    void(9)
    vault.refund(platform, 9, user, LABEL, CENT, sender=operator)
    assert balance_of(charged) == 71 * CENT


def test_refund__to_an_account_not_charged__credits_that(vault, platform, operator, charged, balance_of):
    tx = vault.refund(platform, 7, ZERO_ADDRESS, SALT, CENT, sender=operator)
    held = vault.accountId(platform, ZERO_ADDRESS, SALT)
    assert (tx.return_value, tx.events[0].owner, tx.events[0].entry) == (held, ZERO_ADDRESS, 1)
    assert (balance_of(held), balance_of(charged)) == (CENT, 70 * CENT)


def test_refund__with_an_exit_pending__leaves_it_alone(
    vault, platform, operator, user, charged, request_exit, balance_of
):
    matures_at = request_exit(700_000)
    vault.refund(platform, 7, user, LABEL, 30 * CENT, sender=operator)
    record = vault.accountOf(platform, charged)
    assert (record.balance, record.exitAmount, record.exitMaturesAt) == (30 * CENT, 70 * CENT, matures_at)


def test_refund__charge_under_policy_and_allowance__does_not_give_their_room_back(
    vault, platform, operator, user, fund, settle, set_policy, set_allowance
):
    account = fund(10**6)
    set_policy(account, per_window=(USD, HOUR))
    set_allowance(cap=90 * CENT)
    settle(Charge(account, 7, 30 * CENT))
    vault.refund(platform, 7, user, LABEL, 30 * CENT, sender=operator)
    record = vault.accountOf(platform, account)
    assert (record.spentInWindow, record.allowance.spent) == (30 * CENT, 30 * CENT)


def test_refund__earnings_withdrawn__reverts(vault, platform, operator, user, charged):
    vault.withdrawEarnings(platform, 300_000, sender=operator)
    with reverts(vault.ExceedsEarnings, amount=1, available=0):
        vault.refund(platform, 7, user, LABEL, 1, sender=operator)


def test_refund__from_anothers_earnings__reverts(vault, stranger, user, charged, register, earnings, void):
    hostile = register(SALT, owner=stranger)
    void(7, platform=hostile)
    with reverts(vault.ExceedsEarnings, amount=1, available=0):
        vault.refund(hostile, 7, user, LABEL, 1, sender=stranger)
    assert earnings() == 30 * CENT


def test_refund__refused__the_id_stays_refundable(vault, platform, operator, user, charged, balance_of):
    with reverts(vault.ExceedsEarnings, amount=USD, available=30 * CENT):
        vault.refund(platform, 7, user, LABEL, USD, sender=operator)
    vault.refund(platform, 7, user, LABEL, 30 * CENT, sender=operator)
    assert balance_of(charged) == USD


def test_refund__nothing__reverts(vault, platform, operator, user, charged):
    with reverts(vault.ZeroAmount):
        vault.refund(platform, 7, user, LABEL, 0, sender=operator)


@pytest.mark.parametrize("caller", ["stranger", "user", "relayer", "treasury"])
def test_refund__not_the_platforms_owner__reverts(vault, platform, user, charged, request, caller):
    caller = request.getfixturevalue(caller)
    with reverts(vault.NotPlatformOwner, platform=platform, caller=caller.address):
        vault.refund(platform, 7, user, LABEL, 1, sender=caller)


def test_refund__platform_handed_over__the_new_owner_refunds(
    vault, platform, operator, stranger, user, charged, hand_over, balance_of
):
    hand_over(stranger)
    with reverts(vault.NotPlatformOwner, platform=platform, caller=operator.address):
        vault.refund(platform, 7, user, LABEL, 1, sender=operator)
    vault.refund(platform, 7, user, LABEL, 1, sender=stranger)
    assert balance_of(charged) == 70 * CENT + 1


def test_refund__unknown_platform__reverts(vault, operator, user):
    with reverts(vault.UnknownPlatform, platform=7):
        vault.refund(7, 7, user, LABEL, 1, sender=operator)
