import pytest
from conftest import CENT, HOUR, USD
from hypothesis import given
from hypothesis import strategies as st
from settings import few
from typed_data import Charge

NO_LIMIT = (2**256 - 1, 0)


@pytest.fixture
def remaining(vault, platform, chain):
    """What is left of the window, in a block of this timestamp or in the latest."""

    def remaining(account, timestamp=None):
        if timestamp is not None:
            chain.mine(timestamp=timestamp)
        return tuple(vault.remainingInWindow(platform, account))

    return remaining


def test_remaining_in_window__no_such_limit__the_largest_number_and_no_end(
    fund, set_policy, settle, remaining, account
):
    assert remaining(account) == NO_LIMIT
    fund(10**6)
    set_policy(account, per_charge=USD, expires_at=2**40 - 1)
    settle(Charge(account, 1, CENT))
    assert remaining(account) == NO_LIMIT


def test_remaining_in_window__unknown_platform_or_account__no_limit(vault, platform, account):
    assert tuple(vault.remainingInWindow(1, account)) == NO_LIMIT
    assert tuple(vault.remainingInWindow(platform, b"\x77" * 32)) == NO_LIMIT


def test_remaining_in_window__before_any_charge__the_whole_limit(account, set_policy, remaining, next_window):
    set_policy(account, per_window=(10 * CENT, HOUR))
    assert remaining(account, next_window) == (10 * CENT, next_window + HOUR)


def test_remaining_in_window__around_the_end_of_a_window__what_is_left_then_the_whole(
    fund, set_policy, settle, at, remaining, next_window
):
    account = fund(10**6)
    set_policy(account, per_window=(10 * CENT, HOUR))
    at(next_window)
    settle(Charge(account, 1, 4 * CENT))
    assert remaining(account) == (6 * CENT, next_window + HOUR)
    assert remaining(account, next_window + HOUR - 1) == (6 * CENT, next_window + HOUR)
    assert remaining(account, next_window + HOUR) == (10 * CENT, next_window + 2 * HOUR)
    assert remaining(account, next_window + HOUR + 1) == (10 * CENT, next_window + 2 * HOUR)


def test_remaining_in_window__limit_reached__nothing(fund, set_policy, settle, at, remaining, next_window):
    account = fund(10**6)
    set_policy(account, per_window=(10 * CENT, HOUR))
    at(next_window)
    settle(Charge(account, 1, 10 * CENT))
    assert remaining(account) == (0, next_window + HOUR)


def test_remaining_in_window__limit_lowered_below_what_was_spent__nothing(
    fund, set_policy, settle, at, remaining, next_window
):
    account = fund(10**6)
    set_policy(account, per_window=(10 * CENT, HOUR))
    at(next_window)
    settle(Charge(account, 1, 4 * CENT))
    set_policy(account, per_window=(3 * CENT, HOUR))
    assert remaining(account) == (0, next_window + HOUR)


def test_remaining_in_window__refused_charge__takes_nothing(
    fund, set_policy, set_allowance, settle, at, remaining, next_window
):
    account = fund(10**6)
    effective_at = set_allowance(CENT)
    set_policy(account, per_window=(2 * USD, HOUR))
    window = effective_at // HOUR + 1
    at(window * HOUR)
    settle(Charge(account, 1, 2 * CENT), Charge(account, 2, USD + 1), Charge(account, 3, 2 * USD + 1))
    assert remaining(account) == (2 * USD, (window + 1) * HOUR)


def test_remaining_in_window__other_limits__do_not_count(
    fund, set_policy, set_allowance, remaining, next_window
):
    account = fund(1)
    set_allowance(0)
    set_policy(account, per_charge=0, per_window=(USD, HOUR), expires_at=0)
    assert remaining(account, next_window) == (USD, next_window + HOUR)


def test_remaining_in_window__longest_window__ends_in_the_first_period(account, set_policy, remaining):
    set_policy(account, per_window=(2**80 - 1, 2**32 - 1))
    assert remaining(account) == (2**80 - 1, 2**32 - 1)


@few
@given(
    seconds=st.integers(60, 400_000),
    limit=st.integers(0, 10 * CENT),
    amounts=st.lists(st.integers(1, 4 * CENT), max_size=6),
    wait=st.integers(1, 400_000),
)
def test_remaining_in_window__any_window__as_a_model_says(
    fund, set_policy, settle, at, now, remaining, isolate, seconds, limit, amounts, wait
):
    with isolate():
        account = fund(10**6)
        set_policy(account, per_window=(limit, seconds))
        start = (now() // seconds + 1) * seconds
        at(start)
        settle(
            Charge(account, 0, 0), *(Charge(account, id_, amount) for id_, amount in enumerate(amounts, 1))
        )
        left = limit
        for amount in amounts:
            left -= amount if amount <= left else 0
        assert remaining(account) == (left, start + seconds)
        turned = wait // seconds
        left = limit if turned else left
        assert remaining(account, start + wait) == (left, start + (turned + 1) * seconds)
