import pytest
from conftest import CENT, MAX_TOKENS, SALT, USD
from reverts import reverts
from typed_data import Charge


@pytest.fixture
def earned(fund, settle):
    """The platform has earned half a dollar and one unit of credit."""
    settle(Charge(fund(10**6), 1, 50 * CENT + 1))


def test_withdraw_earnings__part__goes_to_the_payout_address(
    vault, token, platform, operator, treasury, earned, earnings
):
    tx = vault.withdrawEarnings(platform, 200_000, sender=operator)
    assert vault.EarningsWithdrawn(platform=platform, payout=treasury, tokens=200_000) in tx.events
    assert earnings() == 30 * CENT + 1
    assert (token.balanceOf(treasury), token.balanceOf(vault)) == (200_000, 800_000)


def test_withdraw_earnings__all_whole_units__keeps_the_rest(vault, platform, operator, earned, earnings):
    vault.withdrawEarnings(platform, 500_000, sender=operator)
    assert earnings() == 1


def test_withdraw_earnings__to_the_last_unit__leaves_nothing(
    vault, platform, operator, fund, settle, earnings
):
    settle(Charge(fund(10**6), 1, USD))
    vault.withdrawEarnings(platform, 10**6, sender=operator)
    assert earnings() == 0


def test_withdraw_earnings__one_unit_too_much__reverts(vault, platform, operator, earned):
    with reverts(vault.ExceedsEarnings, amount=50 * CENT + 10**6, available=50 * CENT + 1):
        vault.withdrawEarnings(platform, 500_001, sender=operator)


def test_withdraw_earnings__of_another_platform__untouched(vault, register, stranger, earned, earnings):
    hostile = register(SALT, owner=stranger)
    with reverts(vault.ExceedsEarnings, amount=10**6, available=0):
        vault.withdrawEarnings(hostile, 1, sender=stranger)
    assert earnings() == 50 * CENT + 1


@pytest.mark.parametrize("caller", ["stranger", "treasury", "relayer"])
def test_withdraw_earnings__not_the_owner__reverts(vault, platform, earned, request, caller):
    caller = request.getfixturevalue(caller)
    with reverts(vault.NotPlatformOwner, platform=platform, caller=caller.address):
        vault.withdrawEarnings(platform, 1, sender=caller)


def test_withdraw_earnings__nothing__reverts(vault, platform, operator, earned):
    with reverts(vault.ZeroAmount):
        vault.withdrawEarnings(platform, 0, sender=operator)


def test_withdraw_earnings__more_than_fits__reverts(vault, platform, operator):
    with reverts(vault.AmountTooLarge, tokens=MAX_TOKENS + 1, max=MAX_TOKENS):
        vault.withdrawEarnings(platform, MAX_TOKENS + 1, sender=operator)


def test_withdraw_earnings__payout_is_blacklisted__stays_earned(
    vault, token, platform, operator, treasury, admin, earned, earnings
):
    token.blacklist(treasury, sender=admin)
    with reverts("Blacklistable: account is blacklisted"):
        vault.withdrawEarnings(platform, 1, sender=operator)
    assert earnings() == 50 * CENT + 1


def test_withdraw_earnings__of_all_platforms_and_users__leaves_less_than_a_unit_each(
    vault, token, platform, operator, user, earned, request_exit, at
):
    vault.withdrawEarnings(platform, 500_000, sender=operator)
    at(request_exit(499_999))
    vault.finalizeExit(platform, user, b"\x02" * 32, user, sender=user)
    assert token.balanceOf(vault) == 1
    assert USD == (500_000 + 499_999) * 10**6 + 1 + (10**6 - 1)
