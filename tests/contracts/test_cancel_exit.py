import pytest
from conftest import CENT, LABEL, USD, ZERO_ADDRESS
from reverts import reverts
from typed_data import Charge


@pytest.mark.parametrize("wait", [-1, 0, 1])  # seconds from maturity
def test_cancel_exit__by_the_owner__returns_the_whole(vault, platform, user, fund, request_exit, at, wait):
    account = fund(10**6)
    at(request_exit(600_000) + wait)
    tx = vault.cancelExit(platform, user, LABEL, sender=user)
    assert tx.events == [vault.ExitCancelled(platform=platform, account=account, amount=60 * CENT, entry=3)]
    record = vault.accountOf(platform, account)
    assert (record.balance, record.exitAmount, record.exitMaturesAt) == (USD, 0, 0)


def test_cancel_exit__after_a_charge_drew_on_it__returns_what_is_left(
    vault, platform, user, fund, request_exit, settle, balance_of
):
    account = fund(10**6)
    request_exit(600_000)
    settle(Charge(account, 1, 50 * CENT))
    vault.cancelExit(platform, user, LABEL, sender=user)
    assert balance_of(account) == 50 * CENT


def test_cancel_exit__then_a_charge_beyond_the_balance__finds_no_exit(
    vault, platform, user, fund, request_exit, settle, balance_of
):
    account = fund(10**6)
    request_exit(600_000)
    vault.cancelExit(platform, user, LABEL, sender=user)
    assert settle(Charge(account, 1, USD + 1)).events.filter(vault.ChargeRejected)
    assert balance_of(account) == USD


def test_cancel_exit__then_request__does_not_remember_the_old_one(vault, platform, user, fund, request_exit):
    account = fund(10**6)
    request_exit(600_000)
    vault.cancelExit(platform, user, LABEL, sender=user)
    request_exit(1)
    assert vault.accountOf(platform, account).exitAmount == 10**6


def test_cancel_exit__platform_held__the_platforms_owner_acts(vault, platform, operator, fund, balance_of):
    account = fund(10**6, owner=ZERO_ADDRESS)
    vault.requestExit(platform, ZERO_ADDRESS, LABEL, 10**6, sender=operator)
    vault.cancelExit(platform, ZERO_ADDRESS, LABEL, sender=operator)
    assert balance_of(account) == USD


@pytest.mark.parametrize("caller", ["stranger", "operator"])
def test_cancel_exit__not_the_owner__reverts(vault, platform, user, fund, request_exit, request, caller):
    account, caller = fund(10**6), request.getfixturevalue(caller)
    request_exit(10**6)
    with reverts(vault.NotAccountOwner, account=account, caller=caller.address):
        vault.cancelExit(platform, user, LABEL, sender=caller)


def test_cancel_exit__none__reverts(vault, platform, user, fund):
    with reverts(vault.NoExit, account=fund(10**6)):
        vault.cancelExit(platform, user, LABEL, sender=user)


def test_cancel_exit__twice__reverts(vault, platform, user, fund, request_exit):
    account = fund(10**6)
    request_exit(10**6)
    vault.cancelExit(platform, user, LABEL, sender=user)
    with reverts(vault.NoExit, account=account):
        vault.cancelExit(platform, user, LABEL, sender=user)
