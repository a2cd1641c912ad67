"""An allowance limits all charges there ever are, over and above any policy."""

import pytest
from conftest import (
    ALLOWANCE_CAP,
    ALLOWANCE_EXPIRED,
    BALANCE,
    CENT,
    DAY,
    HOUR,
    LABEL,
    MAX_PER_CHARGE,
    MAX_PER_WINDOW,
    NO_CAP,
    NO_EXPIRY,
    POLICY_EXPIRED,
    USD,
    ZERO_ADDRESS,
    ZERO_AMOUNT,
)
from hypothesis import given
from hypothesis import strategies as st
from settings import few
from typed_data import Charge


@pytest.fixture
def outcome(vault, settle):
    """Settles one charge: its rejection, or None."""

    def outcome(account, id_, amount):
        log = settle(Charge(account, id_, amount)).events[-1]
        return log.reason if log.event_name == "ChargeRejected" else None

    return outcome


@pytest.fixture
def spent(vault, platform):
    return lambda account: vault.accountOf(platform, account).allowance.spent


@pytest.fixture
def bound(fund, set_allowance, chain):
    """An account of a dollar, the allowance binding: the account."""

    def bound(cap=NO_CAP, expires_at=NO_EXPIRY):
        account = fund(10**6)
        chain.mine(timestamp=set_allowance(cap, expires_at))
        return account

    return bound


# ── At its bounds ──


def test_settle__at_the_cap__charged_and_one_unit_more_is_not(
    vault, platform, bound, settle, outcome, spent, balance_of
):
    account = bound(10 * CENT)
    assert outcome(account, 1, 4 * CENT) is None
    assert settle(Charge(account, 2, 6 * CENT + 1)).events == [
        vault.ChargeRejected(platform=platform, account=account, id=2, reason=ALLOWANCE_CAP)
    ]
    assert outcome(account, 2, 6 * CENT) is None
    assert outcome(account, 3, 1) == ALLOWANCE_CAP
    assert (spent(account), balance_of(account)) == (10 * CENT, 90 * CENT)


def test_settle__cap_of_zero__refuses_all(bound, outcome, spent):
    account = bound(0)
    assert outcome(account, 1, 1) == ALLOWANCE_CAP
    assert outcome(account, 1, USD) == ALLOWANCE_CAP
    assert spent(account) == 0


def test_settle__allowance_around_its_expiry__charged_until_the_second_before(
    vault, platform, bound, settle, outcome, at, now, spent
):
    expires_at = now() + 2 * DAY
    account = bound(USD, expires_at)
    at(expires_at - 1)
    assert outcome(account, 1, CENT) is None
    for timestamp in (expires_at, expires_at + 1):
        at(timestamp)
        assert settle(Charge(account, 2, CENT)).events == [
            vault.ChargeRejected(platform=platform, account=account, id=2, reason=ALLOWANCE_EXPIRED)
        ]
    assert spent(account) == CENT


def test_settle__expiry_of_zero__refuses_all(bound, outcome):
    account = bound(NO_CAP, 0)
    assert outcome(account, 1, 1) == ALLOWANCE_EXPIRED


def test_settle__largest_amount_there_is__refused_not_wrapped(bound, outcome, spent):
    account = bound(NO_CAP - 1)
    assert outcome(account, 1, CENT) is None
    assert outcome(account, 2, 2**96 - 1) == ALLOWANCE_CAP
    assert spent(account) == CENT


# ── From when on ──


def test_settle__before_the_first_binds__charged_beyond_it_and_counted(
    fund, set_allowance, outcome, at, spent
):
    account = fund(10**6)
    assert outcome(account, 1, CENT) is None
    assert spent(account) == 0  # there was none
    effective_at = set_allowance(10 * CENT)
    assert outcome(account, 2, 8 * CENT) is None
    at(effective_at - 1)
    assert outcome(account, 3, 8 * CENT) is None
    assert spent(account) == 16 * CENT
    at(effective_at)
    assert outcome(account, 4, 1) == ALLOWANCE_CAP


def test_settle__first_second_of_the_first__what_was_spent_before_leaves_the_rest(
    fund, set_allowance, outcome, at
):
    account = fund(10**6)
    effective_at = set_allowance(10 * CENT)
    assert outcome(account, 1, 4 * CENT) is None
    at(effective_at)
    assert outcome(account, 2, 6 * CENT + 1) == ALLOWANCE_CAP
    at(effective_at + 1)
    assert outcome(account, 2, 6 * CENT) is None
    assert outcome(account, 3, 1) == ALLOWANCE_CAP


def test_settle__lowered_cap__binds_from_its_second_on(bound, set_allowance, outcome, at, spent):
    account = bound(50 * CENT)
    effective_at = set_allowance(10 * CENT)
    at(effective_at - 1)
    assert outcome(account, 1, 11 * CENT) is None
    at(effective_at)
    assert outcome(account, 2, 1) == ALLOWANCE_CAP
    assert spent(account) == 11 * CENT


def test_settle__earlier_expiry__binds_from_its_second_on(bound, set_allowance, outcome, at, now):
    account = bound(USD, now() + 30 * DAY)
    effective_at = set_allowance(USD, now())  # passed by then
    at(effective_at - 1)
    assert outcome(account, 1, CENT) is None
    at(effective_at)
    assert outcome(account, 2, CENT) == ALLOWANCE_EXPIRED


def test_settle__raised_cap__binds_in_the_same_second(bound, set_allowance, outcome):
    account = bound(10 * CENT)
    assert outcome(account, 1, 10 * CENT) is None
    assert outcome(account, 2, 1) == ALLOWANCE_CAP
    set_allowance(20 * CENT)
    assert outcome(account, 2, 10 * CENT) is None
    assert outcome(account, 3, 1) == ALLOWANCE_CAP


def test_settle__cap_up_and_expiry_earlier__charged_up_to_the_new_cap_until_the_old_expiry(
    bound, set_allowance, outcome, at, now
):
    account = bound(10 * CENT, now() + 30 * DAY)
    effective_at = set_allowance(30 * CENT, now() + HOUR)
    assert outcome(account, 1, 20 * CENT) is None
    at(effective_at - 1)  # past the new expiry
    assert outcome(account, 2, 9 * CENT) is None
    at(effective_at)
    assert outcome(account, 3, CENT) == ALLOWANCE_EXPIRED


def test_settle__lowering_replaced__only_the_later_one_ever_binds(bound, set_allowance, outcome, at):
    account = bound(50 * CENT)
    first = set_allowance(5 * CENT)
    at(first - 1)
    second = set_allowance(20 * CENT)
    at(first)
    assert outcome(account, 1, 10 * CENT) is None
    at(second - 1)
    assert outcome(account, 2, 11 * CENT) is None
    at(second)
    assert outcome(account, 3, 1) == ALLOWANCE_CAP


@pytest.mark.parametrize("charged", [False, True])
def test_settle__lowering_that_came_to_bind__stays_whether_a_charge_or_a_change_comes_next(
    vault, platform, bound, set_allowance, outcome, at, spent, charged
):
    account = bound(50 * CENT)
    effective_at = set_allowance(10 * CENT)
    at(effective_at)
    if charged:
        assert outcome(account, 1, 2 * CENT) is None
        view = vault.accountOf(platform, account)
        assert tuple(view.allowance) == (10 * CENT, 2 * CENT, NO_EXPIRY)
        assert view.allowanceChangesAt == 0
    later = set_allowance(5 * CENT)
    assert outcome(account, 2, 10 * CENT - spent(account) + 1) == ALLOWANCE_CAP  # not the 50 of before
    at(later - 1)
    assert outcome(account, 2, 6 * CENT) is None
    at(later)
    assert outcome(account, 3, 1) == ALLOWANCE_CAP


def test_settle__lowering_under_way__is_not_ended_by_a_charge(
    vault, platform, bound, set_allowance, outcome, at
):
    account = bound(50 * CENT)
    effective_at = set_allowance(10 * CENT)
    assert outcome(account, 1, 2 * CENT) is None
    view = vault.accountOf(platform, account)
    assert tuple(view.allowance) == (50 * CENT, 2 * CENT, NO_EXPIRY)
    assert (view.nextCap, view.allowanceChangesAt) == (10 * CENT, effective_at)
    at(effective_at)
    assert outcome(account, 2, 8 * CENT + 1) == ALLOWANCE_CAP


# ── The counter ──


def test_settle__removed_and_set_again__what_was_spent_stays_counted(
    bound, set_allowance, outcome, at, spent
):
    account = bound(10 * CENT)
    assert outcome(account, 1, 6 * CENT) is None
    set_allowance()
    assert spent(account) == 6 * CENT
    assert outcome(account, 2, 20 * CENT) is None  # unlimited, and counted by nobody
    assert spent(account) == 6 * CENT
    at(set_allowance(10 * CENT))
    assert outcome(account, 3, 4 * CENT + 1) == ALLOWANCE_CAP
    assert outcome(account, 3, 4 * CENT) is None
    assert spent(account) == 10 * CENT


@pytest.mark.parametrize(
    ("limits", "amount", "reason"),
    [
        ({}, 0, ZERO_AMOUNT),
        ({}, 60 * CENT + 1, ALLOWANCE_CAP),
        ({"per_charge": CENT}, 2 * CENT, MAX_PER_CHARGE),
        ({"per_window": (CENT, HOUR)}, 2 * CENT, MAX_PER_WINDOW),
        ({"expires_at": 1}, CENT, POLICY_EXPIRED),
    ],
)
def test_settle__refused__counts_nothing(bound, set_policy, outcome, spent, limits, amount, reason):
    account = bound(60 * CENT)
    set_policy(account, **limits)
    assert outcome(account, 1, amount) == reason
    assert spent(account) == 0


def test_settle__refused_for_balance__counts_nothing_and_writes_no_window(
    vault, platform, bound, set_policy, outcome, spent, balance_of
):
    account = bound(2 * USD)
    set_policy(account, per_window=(2 * USD, 2**32 - 1))
    assert outcome(account, 1, USD + 1) == BALANCE
    assert (spent(account), balance_of(account)) == (0, USD)
    assert vault.accountOf(platform, account).spentInWindow == 0


@pytest.mark.parametrize("expires_in", [0, 30 * DAY])
def test_settle__refused_by_the_allowance__spends_nothing_of_the_window(
    vault, platform, bound, set_policy, outcome, now, expires_in
):
    account = bound(CENT, now() + expires_in)
    set_policy(account, per_window=(2 * USD, 2**32 - 1))
    assert outcome(account, 1, 2 * CENT) == ALLOWANCE_CAP
    assert outcome(account, 1, CENT) == (None if expires_in else ALLOWANCE_EXPIRED)
    assert vault.accountOf(platform, account).spentInWindow == (CENT if expires_in else 0)


def test_settle__refused_for_balance_with_a_lowering_that_binds__still_binds(
    bound, set_allowance, outcome, at
):
    account = bound(3 * USD)
    at(set_allowance(2 * USD))
    assert outcome(account, 1, USD + 1) == BALANCE
    assert outcome(account, 1, 2 * USD + 1) == ALLOWANCE_CAP


# ── With policy, exit and others ──


def test_settle__policy_and_allowance__both_bind(bound, set_policy, outcome):
    account = bound(5 * CENT)
    set_policy(account, per_charge=3 * CENT)
    assert outcome(account, 1, 3 * CENT + 1) == MAX_PER_CHARGE
    assert outcome(account, 1, 3 * CENT) is None
    assert outcome(account, 2, 2 * CENT + 1) == ALLOWANCE_CAP
    assert outcome(account, 2, 2 * CENT) is None
    set_policy(account)
    assert outcome(account, 3, 1) == ALLOWANCE_CAP


def test_settle__several_reasons_with_an_allowance__the_first_in_order_and_balance_last(
    bound, set_policy, set_allowance, outcome, now
):
    account = bound(CENT, now())
    set_policy(account, expires_at=1)
    assert outcome(account, 1, 0) == ZERO_AMOUNT
    assert outcome(account, 1, 2 * USD) == POLICY_EXPIRED
    set_policy(account)
    assert outcome(account, 1, 2 * USD) == ALLOWANCE_CAP
    set_allowance(3 * USD, now())
    assert outcome(account, 1, 2 * USD) == ALLOWANCE_EXPIRED
    set_allowance(3 * USD)
    assert outcome(account, 1, 2 * USD) == BALANCE


def test_settle__drawn_from_the_exit__counts_in_full(
    vault, platform, bound, request_exit, settle, spent, now
):
    account = bound(70 * CENT)
    matures_at = request_exit(600_000)
    charge = Charge(account, 1, 50 * CENT)
    assert settle(charge).events == [
        vault.ExitDrawn(account=account, id=1, amount=10 * CENT),
        vault.Charged(account=account, id=1, amount=50 * CENT, entry=3, receiptHash=charge.receiptHash),
    ]
    assert settle(Charge(account, 2, 20 * CENT + 1)).events[0].reason == ALLOWANCE_CAP
    view = vault.accountOf(platform, account)
    assert (spent(account), view.balance, view.exitAmount) == (50 * CENT, 0, 50 * CENT)
    assert view.exitMaturesAt == matures_at


def test_settle__matured_exit_with_an_allowance__is_beyond_any_charge(
    bound, request_exit, outcome, at, spent
):
    account = bound(USD)
    matures_at = request_exit(600_000)
    at(matures_at)
    assert outcome(account, 1, 40 * CENT + 1) == BALANCE
    assert outcome(account, 1, 40 * CENT) is None
    assert spent(account) == 40 * CENT


def test_settle__account_twice_in_a_batch__the_allowance_sees_both(bound, settle, spent):
    account = bound(10 * CENT)
    tx = settle(*(Charge(account, id_, 4 * CENT) for id_ in range(3)), Charge(account, 3, 2 * CENT))
    assert [(log.event_name, log.id) for log in tx.events] == [
        ("Charged", 0),
        ("Charged", 1),
        ("ChargeRejected", 2),
        ("Charged", 3),
    ]
    assert spent(account) == 10 * CENT


def test_settle__refused_by_the_allowance__the_id_stays_free_and_others_are_charged(
    vault, platform, bound, fund, settle, earnings, set_allowance, user
):
    account = bound(0)
    other = fund(10**6, label=b"\x09" * 32)
    tx = settle(Charge(account, 1, CENT), Charge(other, 2, CENT))
    assert [(log.event_name, log.id) for log in tx.events] == [("ChargeRejected", 1), ("Charged", 2)]
    assert (vault.isSettled(platform, 1), earnings()) == (False, CENT)
    set_allowance(CENT)
    assert settle(Charge(account, 1, CENT)).events.filter(vault.Charged)


def test_settle__held_account__its_allowance_binds_too(vault, platform, operator, fund, outcome, chain):
    account = fund(10**6, owner=ZERO_ADDRESS)
    tx = vault.setAllowance(platform, ZERO_ADDRESS, LABEL, CENT, NO_EXPIRY, sender=operator)
    chain.mine(timestamp=tx.events[0].effectiveAt)
    assert outcome(account, 1, CENT + 1) == ALLOWANCE_CAP
    assert outcome(account, 1, CENT) is None


def test_settle__new_deposit__does_not_renew_the_allowance(bound, fund, outcome):
    account = bound(CENT)
    assert outcome(account, 1, CENT) is None
    fund(10**6)
    assert outcome(account, 2, 1) == ALLOWANCE_CAP


# ── Any sequence ──


class Model:
    """What the interface says of one account's allowance."""

    def __init__(self, balance):
        self.balance, self.spent, self.nonce = balance, 0, 0
        self.old = self.new = NO_CAP, NO_EXPIRY
        self.effective_at = 0
        self.exists = False

    def binds(self, time):
        return self.new if time >= self.effective_at else self.old

    def set(self, time, cap, expires_at):
        bound = self.binds(time)
        tightens = cap < bound[0] or expires_at < bound[1]
        self.old = max(cap, bound[0]), max(expires_at, bound[1])
        self.new = cap, expires_at
        self.effective_at = time + DAY if tightens else time
        # Both maxima remove it; nothing else does.
        self.exists = self.new != (NO_CAP, NO_EXPIRY)
        self.nonce += 1
        return self.effective_at

    def charge(self, time, amount):
        cap, expires_at = self.binds(time)
        if self.exists and self.spent + amount > cap:
            return ALLOWANCE_CAP
        if self.exists and time >= expires_at:
            return ALLOWANCE_EXPIRED
        if amount > self.balance:
            return BALANCE
        self.balance -= amount
        self.spent += amount if self.exists else 0
        return None

    def view(self, time):
        return (*self.binds(time), self.spent, self.effective_at if time < self.effective_at else 0)


caps = st.sampled_from([0, 5 * CENT, 10 * CENT, 20 * CENT, 40 * CENT, NO_CAP - 1, NO_CAP])
expiries = st.one_of(st.just(NO_EXPIRY), st.integers(0, 5 * DAY))
steps = st.one_of(
    st.tuples(st.just("set"), caps, expiries),
    st.tuples(st.just("set"), st.just(NO_CAP), st.just(NO_EXPIRY)),
    st.tuples(st.just("charge"), st.integers(1, 25 * CENT), st.none()),
    st.tuples(st.just("wait"), st.sampled_from([1, HOUR, DAY // 2, DAY - 1, DAY, DAY + 1]), st.none()),
    st.tuples(st.just("ripen"), st.sampled_from([-1, 0, 1]), st.none()),
)


@few
@given(sequence=st.lists(steps, min_size=4, max_size=20))
def test_settle__any_sequence_of_changes_charges_and_waits__as_a_model_says(
    vault, platform, fund, set_allowance, outcome, at, now, isolate, sequence
):
    with isolate():
        account = fund(10**6)
        model, start, time = Model(USD), now(), now()
        for id_, (step, value, expiry) in enumerate(sequence):
            time += 1
            if step == "wait":
                time += value
            elif step == "ripen":  # to the second at which the change under way binds, or next to it
                time = max(time, model.effective_at + value)
            elif step == "set":
                at(time)
                expires_at = expiry if expiry == NO_EXPIRY else start + expiry
                assert set_allowance(value, expires_at) == model.set(time, value, expires_at)
            if step != "set":
                at(time)
                amount = value if step == "charge" else CENT
                assert outcome(account, id_, amount) == model.charge(time, amount)
            view = vault.accountOf(platform, account)
            cap, spent, expires_at = view.allowance
            assert (cap, expires_at, spent, view.allowanceChangesAt) == model.view(time)
            assert (view.balance, view.allowanceNonce) == (model.balance, model.nonce)
