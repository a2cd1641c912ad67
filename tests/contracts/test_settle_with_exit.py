"""A charge draws on the balance first, then on an exit that has not matured."""

import pytest
from conftest import BALANCE, CENT, DAY, USD
from typed_data import Charge


@pytest.fixture
def leaving(fund, request_exit):
    """An account with 40 cents in its balance and 60 in its exit: the account, and when that matures."""
    account = fund(10**6)
    return account, request_exit(600_000)


@pytest.fixture
def record(vault, platform):
    """Balance, exit and its maturity."""

    def record(account):
        view = vault.accountOf(platform, account)
        return view.balance, view.exitAmount, view.exitMaturesAt

    return record


def test_settle__balance_suffices__the_exit_is_untouched(vault, leaving, settle, record):
    account, matures_at = leaving
    tx = settle(Charge(account, 1, 40 * CENT))
    assert [log.event_name for log in tx.events] == ["Charged"]
    assert record(account) == (0, 60 * CENT, matures_at)


def test_settle__balance_is_short__the_rest_is_drawn_from_the_exit(vault, leaving, settle, record, earnings):
    account, matures_at = leaving
    charge = Charge(account, 1, 50 * CENT + 1)
    tx = settle(charge)
    assert tx.events == [
        vault.ExitDrawn(account=account, id=1, amount=10 * CENT + 1),
        vault.Charged(account=account, id=1, amount=charge.amount, entry=3, receiptHash=charge.receiptHash),
    ]
    assert record(account) == (0, 50 * CENT - 1, matures_at)
    assert earnings() == charge.amount


def test_settle__takes_all_of_balance_and_exit__the_exit_is_over(
    vault, leaving, settle, record, request_exit, fund
):
    account, _ = leaving
    settle(Charge(account, 1, USD))
    assert record(account) == (0, 0, 0)
    fund(10**6)
    matures_at = request_exit(10**6)  # a new exit, not more of the old
    assert record(account) == (0, USD, matures_at)


def test_settle__more_than_balance_and_exit__rejected_whole(vault, platform, leaving, settle, record):
    account, matures_at = leaving
    assert settle(Charge(account, 1, USD + 1)).events == [
        vault.ChargeRejected(platform=platform, account=account, id=1, reason=BALANCE)
    ]
    assert record(account) == (40 * CENT, 60 * CENT, matures_at)


def test_settle__second_before_maturity__draws(vault, leaving, settle, at, record):
    account, matures_at = leaving
    at(matures_at - 1)
    assert settle(Charge(account, 1, 41 * CENT)).events.filter(vault.ExitDrawn)
    assert record(account) == (0, 59 * CENT, matures_at)


@pytest.mark.parametrize("later", [0, 1, 365 * DAY])
def test_settle__from_maturity_on__the_exit_is_beyond_any_charge(vault, leaving, settle, at, record, later):
    account, matures_at = leaving
    at(matures_at + later)
    tx = settle(Charge(account, 1, 41 * CENT), Charge(account, 2, 40 * CENT))
    assert [(log.event_name, log.id) for log in tx.events] == [("ChargeRejected", 1), ("Charged", 2)]
    assert record(account) == (0, 60 * CENT, matures_at)


def test_settle__two_charges_in_a_batch__draw_one_after_the_other(vault, leaving, settle, record):
    account, matures_at = leaving
    tx = settle(Charge(account, 1, 70 * CENT), Charge(account, 2, 20 * CENT), Charge(account, 3, 20 * CENT))
    assert [(log.event_name, log.amount) for log in tx.events if "amount" in log.event_arguments] == [
        ("ExitDrawn", 30 * CENT),
        ("Charged", 70 * CENT),
        ("ExitDrawn", 20 * CENT),
        ("Charged", 20 * CENT),
    ]
    assert record(account) == (0, 10 * CENT, matures_at)


def test_settle__limits__bind_what_is_drawn_too(vault, platform, leaving, settle, set_policy, record):
    account, matures_at = leaving
    set_policy(account, per_window=(50 * CENT, 2**32 - 1))
    tx = settle(Charge(account, 1, 51 * CENT), Charge(account, 2, 50 * CENT))
    assert [log.event_name for log in tx.events] == ["ChargeRejected", "ExitDrawn", "Charged"]
    assert record(account) == (0, 50 * CENT, matures_at)
    assert vault.accountOf(platform, account).spentInWindow == 50 * CENT


def test_settle__drawn_to_a_fraction_of_a_token_unit__exit_pays_whole_units(
    vault, token, platform, user, stranger, leaving, settle, at, record
):
    account, matures_at = leaving
    settle(Charge(account, 1, 40 * CENT + 1))
    at(matures_at)
    vault.finalizeExit(platform, user, b"\x02" * 32, stranger, sender=user)
    assert token.balanceOf(stranger) == 599_999
    assert record(account) == (10**6 - 1, 0, 0)
