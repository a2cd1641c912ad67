import pytest
from conftest import CENT, DAY, EXPIRY, HOUR, PER_CHARGE, PER_WINDOW, USD
from reverts import reverts
from typed_data import Charge

ALL = PER_CHARGE | PER_WINDOW | EXPIRY


def test_set_policy__all_limits__read_back(vault, platform, account, operator):
    policy = (USD, 10 * USD, HOUR, 2**40 - 1)
    tx = vault.setPolicy(platform, account, ALL, policy, sender=operator)
    assert tx.events == [vault.PolicySet(platform=platform, account=account, limits=ALL, policy=policy)]
    record = vault.accountOf(platform, account)
    assert record.limits == ALL
    assert tuple(record.policy) == policy


@pytest.mark.parametrize("policy", [(2**80 - 1, 2**80 - 1, 2**32 - 1, 2**40 - 1), (0, 0, 60, 0)])
def test_set_policy__widest_and_narrowest_values__read_back(vault, platform, account, operator, policy):
    vault.setPolicy(platform, account, ALL, policy, sender=operator)
    record = vault.accountOf(platform, account)
    assert tuple(record.policy) == policy
    assert (record.balance, record.spentInWindow, record.entries) == (0, 0, 0)


def test_set_policy__zero_limits__removes_them(vault, platform, account, operator):
    vault.setPolicy(platform, account, ALL, (1, 1, 60, 1), sender=operator)
    vault.setPolicy(platform, account, 0, (0, 0, 0, 0), sender=operator)
    record = vault.accountOf(platform, account)
    assert (record.limits, tuple(record.policy)) == (0, (0, 0, 0, 0))


def test_set_policy__pending_exit__kept(vault, platform, fund, set_policy, request_exit):
    account = fund(10**6)
    matures_at = request_exit(400_000)
    set_policy(account, per_charge=CENT)
    record = vault.accountOf(platform, account)
    assert (record.balance, record.exitAmount, record.exitMaturesAt) == (60 * CENT, 40 * CENT, matures_at)


def test_set_policy__not_the_owner__reverts(vault, platform, account, set_policy, stranger, meter):
    with reverts(vault.NotPlatformOwner, platform=platform, caller=stranger.address):
        set_policy(account, sender=stranger)


def test_set_policy__hostile_platform__cannot_touch_anothers_account(
    vault, platform, account, register, set_policy, stranger
):
    hostile = register(b"\x66" * 32, owner=stranger)
    set_policy(account, platform=hostile, per_charge=0, sender=stranger)
    assert vault.accountOf(platform, account).limits == 0


@pytest.mark.parametrize("limits", [8, 16, 32, 64, 128, 255])
def test_set_policy__unknown_flags__reverts(vault, platform, account, operator, limits):
    with reverts(vault.UnknownLimits, limits=limits):
        vault.setPolicy(platform, account, limits, (0, 0, 60, 0), sender=operator)


@pytest.mark.parametrize(
    ("flag", "policy"),
    [
        (PER_CHARGE, (1, 0, 60, 0)),
        (PER_WINDOW, (0, 1, 0, 0)),
        (PER_WINDOW, (0, 0, 60, 0)),
        (EXPIRY, (0, 0, 60, 1)),
    ],
)
def test_set_policy__value_without_its_flag__reverts(vault, platform, account, operator, flag, policy):
    with reverts(vault.LimitWithoutFlag, flag=flag):
        vault.setPolicy(platform, account, ALL & ~flag, policy, sender=operator)


@pytest.mark.parametrize("seconds", [0, 59])
def test_set_policy__window_too_short__reverts(vault, account, set_policy, seconds):
    with reverts(vault.WindowTooShort, windowSeconds=seconds, min=60):
        set_policy(account, per_window=(USD, seconds))


def test_set_policy__within_the_window__what_was_spent_stays_counted(
    vault, platform, fund, set_policy, settle, at, next_window
):
    account = fund(10**6)
    set_policy(account, per_window=(50 * CENT, HOUR))
    at(next_window)
    settle(Charge(account, 1, 30 * CENT))
    set_policy(account, per_window=(20 * CENT, HOUR), per_charge=USD)
    record = vault.accountOf(platform, account)
    assert (record.spentInWindow, record.window) == (30 * CENT, next_window // HOUR)


def test_set_policy__limit_below_what_was_spent__refuses_until_the_window_turns(
    vault, fund, set_policy, settle, at, next_window
):
    account = fund(10**6)
    set_policy(account, per_window=(50 * CENT, HOUR))
    at(next_window)
    settle(Charge(account, 1, 30 * CENT))
    set_policy(account, per_window=(20 * CENT, HOUR))
    assert not settle(Charge(account, 2, 1)).events.filter(vault.Charged)
    at(next_window + HOUR)
    assert settle(Charge(account, 2, 20 * CENT)).events.filter(vault.Charged)


def test_set_policy__other_window_length__counts_in_full_against_the_new_window(
    vault, platform, fund, set_policy, settle, at, next_window
):
    account = fund(10**6)
    set_policy(account, per_window=(50 * CENT, HOUR))
    at(next_window)
    settle(Charge(account, 1, 30 * CENT))
    at(next_window + HOUR - 1)  # still the first hour
    set_policy(account, per_window=(50 * CENT, 60))
    record = vault.accountOf(platform, account)
    assert (record.spentInWindow, record.window) == (30 * CENT, (next_window + HOUR - 1) // 60)


def test_set_policy__after_the_window_turned__counts_from_zero(
    vault, platform, fund, set_policy, settle, at, next_window
):
    account = fund(10**6)
    set_policy(account, per_window=(50 * CENT, HOUR))
    at(next_window)
    settle(Charge(account, 1, 30 * CENT))
    at(next_window + HOUR)
    set_policy(account, per_window=(50 * CENT, DAY))
    record = vault.accountOf(platform, account)
    assert (record.spentInWindow, record.window) == (0, (next_window + HOUR) // DAY)


def test_set_policy__window_removed_and_set_again__counts_from_zero(
    vault, platform, fund, set_policy, settle, at, next_window
):
    account = fund(10**6)
    set_policy(account, per_window=(50 * CENT, HOUR))
    at(next_window)
    settle(Charge(account, 1, 30 * CENT))
    set_policy(account)
    set_policy(account, per_window=(50 * CENT, HOUR))
    record = vault.accountOf(platform, account)
    assert (record.spentInWindow, record.window) == (0, next_window // HOUR)
