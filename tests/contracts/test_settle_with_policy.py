import pytest
from conftest import BALANCE, CENT, HOUR, MAX_PER_CHARGE, MAX_PER_WINDOW, POLICY_EXPIRED, USD, ZERO_AMOUNT
from hypothesis import given
from hypothesis import strategies as st
from settings import few
from typed_data import Charge


@pytest.fixture
def outcome(vault, settle):
    """Settles one charge: its rejection, or None."""

    def outcome(account, id_, amount):
        (log,) = settle(Charge(account, id_, amount)).events
        return log.reason if log.event_name == "ChargeRejected" else None

    return outcome


# ── Each limit, at its bound ──


def test_settle__at_the_charge_limit__charged_and_one_unit_more_is_not(fund, set_policy, outcome):
    account = fund(10**6)
    set_policy(account, per_charge=CENT)
    assert outcome(account, 1, CENT + 1) == MAX_PER_CHARGE
    assert outcome(account, 1, CENT) is None
    assert outcome(account, 2, CENT) is None


def test_settle__at_the_window_limit__charged_and_one_unit_more_is_not(
    vault, platform, fund, set_policy, outcome, at, next_window
):
    account = fund(10**6)
    set_policy(account, per_window=(10 * CENT, HOUR))
    at(next_window)
    assert outcome(account, 1, 4 * CENT) is None
    assert outcome(account, 2, 6 * CENT + 1) == MAX_PER_WINDOW
    assert outcome(account, 2, 6 * CENT) is None
    assert outcome(account, 3, 1) == MAX_PER_WINDOW
    record = vault.accountOf(platform, account)
    assert (record.spentInWindow, record.window) == (10 * CENT, next_window // HOUR)


def test_settle__first_second_of_a_window__counts_from_zero_and_the_last_does_not(
    vault, platform, fund, set_policy, outcome, at, next_window
):
    account = fund(10**6)
    set_policy(account, per_window=(10 * CENT, HOUR))
    at(next_window)
    assert outcome(account, 1, 10 * CENT) is None
    at(next_window + HOUR - 1)
    assert outcome(account, 2, 1) == MAX_PER_WINDOW
    at(next_window + HOUR)
    assert outcome(account, 2, 9 * CENT) is None
    record = vault.accountOf(platform, account)
    assert (record.spentInWindow, record.window) == (9 * CENT, next_window // HOUR + 1)


def test_settle__last_second_before_expiry__charged_and_at_expiry_not(fund, set_policy, outcome, at, now):
    account = fund(10**6)
    expires_at = now() + 100
    set_policy(account, expires_at=expires_at)
    at(expires_at - 1)
    assert outcome(account, 1, CENT) is None
    at(expires_at)
    assert outcome(account, 2, CENT) == POLICY_EXPIRED


# ── Limits exist by their flag ──


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"per_charge": 0}, MAX_PER_CHARGE),
        ({"per_window": (0, 60)}, MAX_PER_WINDOW),
        ({"expires_at": 0}, POLICY_EXPIRED),
    ],
)
def test_settle__flagged_limit_of_zero__refuses(fund, set_policy, outcome, policy, reason):
    account = fund(10**6)
    set_policy(account, **policy)
    assert outcome(account, 1, 1) == reason


@pytest.mark.parametrize(
    "policy",
    [
        {"per_charge": 2**80 - 1},
        {"per_window": (2**80 - 1, 60)},
        {"expires_at": 2**40 - 1},
        {},
    ],
)
def test_settle__other_limits_unflagged__do_not_exist(fund, set_policy, outcome, policy):
    account = fund(10**6)
    set_policy(account, **policy)
    assert outcome(account, 1, USD) is None


def test_settle__charge_wider_than_the_limits_fields__refused_not_truncated(
    vault, platform, fund, set_policy, outcome
):
    account = fund((2**80 + 10**6) // 10**6 + 1)
    set_policy(account, per_window=(2**80 - 1, HOUR))
    assert outcome(account, 1, 2**80) == MAX_PER_WINDOW
    set_policy(account, per_charge=2**80 - 1)
    assert outcome(account, 1, 2**80) == MAX_PER_CHARGE
    set_policy(account)
    assert outcome(account, 1, 2**80) is None


# ── Which reason is named ──


def test_settle__several_reasons__the_first_in_order_and_balance_last(fund, set_policy, outcome, at, now):
    account = fund(1)
    expired = now()
    set_policy(account, per_charge=CENT, per_window=(CENT, HOUR), expires_at=expired)
    assert outcome(account, 1, 0) == ZERO_AMOUNT
    assert outcome(account, 1, 2 * CENT) == MAX_PER_CHARGE
    set_policy(account, per_window=(CENT, HOUR), expires_at=expired)
    assert outcome(account, 1, 2 * CENT) == MAX_PER_WINDOW
    set_policy(account, expires_at=expired)
    assert outcome(account, 1, 2 * CENT) == POLICY_EXPIRED
    set_policy(account)
    assert outcome(account, 1, 2 * CENT) == BALANCE


def test_settle__refused_for_balance__spends_nothing_of_the_window(
    vault, platform, fund, set_policy, outcome
):
    account = fund(10**6)
    set_policy(account, per_window=(2 * USD, 2**32 - 1))
    assert outcome(account, 1, USD + 1) == BALANCE
    assert vault.accountOf(platform, account).spentInWindow == 0


# ── In a batch ──


def test_settle__account_twice_in_a_batch__the_window_sees_both(vault, platform, fund, set_policy, settle):
    account = fund(10**6)
    set_policy(account, per_window=(10 * CENT, 2**32 - 1))
    tx = settle(*(Charge(account, id_, 4 * CENT) for id_ in range(3)), Charge(account, 3, 2 * CENT))
    assert [(log.event_name, log.id) for log in tx.events] == [
        ("Charged", 0),
        ("Charged", 1),
        ("ChargeRejected", 2),
        ("Charged", 3),
    ]
    assert vault.accountOf(platform, account).spentInWindow == 10 * CENT


@few
@given(
    amounts=st.lists(st.integers(1, 5 * CENT), min_size=1, max_size=12),
    per_charge=st.integers(0, 5 * CENT),
    per_window=st.integers(0, 10 * CENT),
)
def test_settle__any_limits__as_a_model_says(
    vault, platform, fund, set_policy, settle, isolate, amounts, per_charge, per_window
):
    spent, reasons = 0, []
    for amount in amounts:
        if amount > per_charge:
            reasons.append(MAX_PER_CHARGE)
        elif spent + amount > per_window:
            reasons.append(MAX_PER_WINDOW)
        else:
            reasons.append(None)
            spent += amount
    with isolate():
        account = fund(10**6)
        set_policy(account, per_charge=per_charge, per_window=(per_window, 2**32 - 1))
        tx = settle(*(Charge(account, id_, amount) for id_, amount in enumerate(amounts)))
        seen = [log.reason if log.event_name == "ChargeRejected" else None for log in tx.events]
        assert seen == reasons
        record = vault.accountOf(platform, account)
        assert (record.spentInWindow, record.balance) == (spent, USD - spent)


def test_settle__after_the_policy_is_removed__the_window_is_not_written(
    vault, platform, fund, set_policy, outcome
):
    account = fund(10**6)
    set_policy(account, per_charge=USD)
    assert outcome(account, 1, CENT) is None
    record = vault.accountOf(platform, account)
    assert (record.spentInWindow, record.window) == (0, 0)
