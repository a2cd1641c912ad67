"""`available` is the largest charge that `settle` makes in the same block."""

import pytest
from conftest import CENT, DAY, HOUR, LABEL, MAX_TOKENS, NO_CAP, NO_EXPIRY, SALT, USD, ZERO_ADDRESS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typed_data import Charge


@pytest.fixture
def available(vault, platform, chain):
    """In a block of this timestamp, or in the latest."""

    def available(account, timestamp=None):
        if timestamp is not None:
            chain.mine(timestamp=timestamp)
        return vault.available(platform, account)

    return available


# ── Each of what bounds it ──


def test_available__nothing_ever_happened__nothing(vault, account, available):
    assert available(account) == 0
    assert vault.available(1, account) == 0


def test_available__no_limits__the_balance(fund, settle, available):
    account = fund(10**6)
    assert available(account) == USD
    settle(Charge(account, 1, CENT + 1))
    assert available(account) == 99 * CENT - 1


def test_available__allowance_removed_after_much_was_spent__binds_no_more(
    vault, platform, operator, user, fund, settle, set_allowance, available
):
    """The counter stays, and with the balance it may pass any cap there is."""
    everything = MAX_TOKENS * 10**6
    account = fund(MAX_TOKENS)
    set_allowance(0)
    settle(Charge(account, 1, everything - 1))
    vault.refund(platform, 1, user, LABEL, everything - 1, sender=operator)
    set_allowance()
    assert available(account) == everything
    settle(Charge(account, 2, everything))


def test_available__exit_around_its_maturity__counts_until_the_second_before(fund, request_exit, available):
    account = fund(10**6)
    matures_at = request_exit(600_000)
    assert available(account) == USD
    assert available(account, matures_at - 1) == USD
    assert available(account, matures_at) == 40 * CENT
    assert available(account, matures_at + 1) == 40 * CENT


def test_available__exit_cancelled_or_paid__only_the_balance(
    vault, platform, user, fund, request_exit, available, at
):
    account = fund(10**6)
    request_exit(600_000)
    vault.cancelExit(platform, user, LABEL, sender=user)
    assert available(account) == USD
    at(request_exit(600_000))
    vault.finalizeExit(platform, user, LABEL, user, sender=user)
    assert available(account) == 40 * CENT


def test_available__charge_limit__no_more_than_it(fund, set_policy, available):
    account = fund(10**6)
    set_policy(account, per_charge=CENT)
    assert available(account) == CENT
    set_policy(account, per_charge=2 * USD)
    assert available(account) == USD
    set_policy(account, per_charge=0)
    assert available(account) == 0


def test_available__window_limit__what_is_left_of_it(fund, set_policy, settle, available, at, next_window):
    account = fund(10**6)
    set_policy(account, per_window=(10 * CENT, HOUR))
    at(next_window)
    settle(Charge(account, 1, 4 * CENT))
    assert available(account) == 6 * CENT
    assert available(account, next_window + HOUR - 1) == 6 * CENT
    assert available(account, next_window + HOUR) == 10 * CENT


def test_available__window_limit_below_what_was_spent__nothing(
    fund, set_policy, settle, available, at, next_window
):
    account = fund(10**6)
    set_policy(account, per_window=(10 * CENT, HOUR))
    at(next_window)
    settle(Charge(account, 1, 4 * CENT))
    set_policy(account, per_window=(3 * CENT, HOUR))
    assert available(account) == 0


def test_available__policy_around_its_expiry__nothing_from_it_on(fund, set_policy, available, now):
    account = fund(10**6)
    expires_at = now() + 100
    set_policy(account, expires_at=expires_at)
    assert available(account, expires_at - 1) == USD
    assert available(account, expires_at) == 0
    assert available(account, expires_at + 1) == 0


def test_available__allowance__what_is_left_of_it_once_it_binds(fund, set_allowance, settle, available):
    account = fund(10**6)
    effective_at = set_allowance(10 * CENT)
    settle(Charge(account, 1, 4 * CENT))
    assert available(account, effective_at - 1) == 96 * CENT
    assert available(account, effective_at) == 6 * CENT
    assert available(account, effective_at + 1) == 6 * CENT


def test_available__allowance_below_what_was_spent__nothing(fund, set_allowance, settle, available):
    account = fund(10**6)
    effective_at = set_allowance(3 * CENT)
    settle(Charge(account, 1, 4 * CENT))
    assert available(account, effective_at) == 0


def test_available__allowance_around_its_expiry__nothing_from_it_on(fund, set_allowance, available, now):
    account = fund(10**6)
    expires_at = now() + 2 * DAY
    set_allowance(NO_CAP, expires_at)
    assert available(account, expires_at - 1) == USD
    assert available(account, expires_at) == 0
    assert available(account, expires_at + 1) == 0


def test_available__allowance_removed__the_balance(fund, set_allowance, available):
    account = fund(10**6)
    effective_at = set_allowance(0, 0)
    assert available(account, effective_at) == 0
    set_allowance()
    assert available(account) == USD


def test_available__another_account__as_if_alone(fund, set_allowance, set_policy, available):
    fund(10**6)
    other = fund(2 * 10**6, label=SALT)
    held = fund(3 * 10**6, owner=ZERO_ADDRESS)
    effective_at = set_allowance(0)
    set_policy(held, per_charge=CENT)
    assert available(other, effective_at) == 2 * USD
    assert available(held) == CENT


# ── Any account ──

amounts = st.integers(0, 120 * CENT)
bounds = st.one_of(st.none(), amounts)
times = st.one_of(st.none(), st.integers(-1, 1))  # seconds from the block that counts


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    exit_tokens=st.integers(0, 10**6),
    matures=st.sampled_from([-1, 0, 1]),
    spent=st.lists(st.integers(1, 20 * CENT), max_size=2),
    per_charge=bounds,
    per_window=bounds,
    policy_expiry=times,
    cap=bounds,
    lowered=bounds,
    allowance_expiry=times,
    binds=st.sampled_from([-1, 0, 1]),
)
def test_available__any_account__such_a_charge_is_made_and_one_unit_more_is_not(
    vault,
    platform,
    fund,
    request_exit,
    set_policy,
    set_allowance,
    settle,
    available,
    at,
    now,
    isolate,
    exit_tokens,
    matures,
    spent,
    per_charge,
    per_window,
    policy_expiry,
    cap,
    lowered,
    allowance_expiry,
    binds,
):
    with isolate():
        account = fund(10**6)
        time = now() + 4 * DAY  # of the block that counts
        if cap is not None or allowance_expiry is not None:
            expires_at = NO_EXPIRY if allowance_expiry is None else time + allowance_expiry
            set_allowance(NO_CAP if cap is None else cap, expires_at)
        changes = []
        if lowered is not None:
            changes.append((time + binds - DAY, lambda: set_allowance(lowered)))
        if exit_tokens:
            changes.append((time + matures - DAY, lambda: request_exit(exit_tokens)))
        for timestamp, change in sorted(changes, key=lambda change: change[0]):
            at(max(timestamp, now() + 1))
            change()
        settle(Charge(account, 0, 0), *(Charge(account, id_, amount) for id_, amount in enumerate(spent, 1)))
        set_policy(
            account,
            per_charge=per_charge,
            per_window=None if per_window is None else (per_window, 2**32 - 1),
            expires_at=None if policy_expiry is None else time + policy_expiry,
        )
        with isolate():
            most = available(account, time)
        at(time)
        tx = settle(Charge(account, 10, most + 1), Charge(account, 11, most))
        assert tx.timestamp == time
        assert [(log.event_name, log.id) for log in tx.events if log.event_name != "ExitDrawn"] == [
            ("ChargeRejected", 10),
            ("Charged" if most else "ChargeRejected", 11),
        ]
