import pytest
from conftest import CENT, LABEL, USD, ZERO_ADDRESS
from reverts import reverts
from typed_data import Charge


@pytest.fixture
def matured(fund, request_exit, at):
    """An account whose exit of 60 of its 100 cents matures in the next block."""
    account = fund(10**6)
    at(request_exit(600_000))
    return account


def test_finalize_exit__at_maturity__pays_the_recipient(vault, token, platform, user, stranger, matured):
    tx = vault.finalizeExit(platform, user, LABEL, stranger, sender=user)
    assert (
        vault.ExitFinalized(
            platform=platform, account=matured, to=stranger, tokens=600_000, remainder=0, entry=3
        )
        in tx.events
    )
    record = vault.accountOf(platform, matured)
    assert (record.balance, record.exitAmount, record.exitMaturesAt) == (40 * CENT, 0, 0)
    assert (token.balanceOf(stranger), token.balanceOf(vault)) == (600_000, 400_000)


def test_finalize_exit__second_before_maturity__reverts(vault, platform, user, fund, request_exit, at):
    fund(10**6)
    matures_at = request_exit(10**6)
    at(matures_at - 1)
    with reverts(vault.ExitNotMature, maturesAt=matures_at, timestamp=matures_at - 1):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)


def test_finalize_exit__drawn_on__pays_whole_units_and_keeps_the_rest(
    vault, token, platform, user, fund, request_exit, settle, at
):
    account = fund(10**6)
    matures_at = request_exit(10**6)
    settle(Charge(account, 1, 10**6 + 1))
    at(matures_at)
    tx = vault.finalizeExit(platform, user, LABEL, user, sender=user)
    (log,) = tx.events.filter(vault.ExitFinalized)
    assert (log.tokens, log.remainder) == (999_998, 999_999)
    assert token.balanceOf(user) == 999_998
    assert vault.accountOf(platform, account).balance == 999_999


def test_finalize_exit__drawn_to_less_than_a_unit__pays_nothing_and_keeps_the_rest(
    vault, token, platform, user, fund, request_exit, settle, at, balance_of
):
    account = fund(10**6)
    matures_at = request_exit(10**6)
    settle(Charge(account, 1, USD - 1))
    at(matures_at)
    vault.finalizeExit(platform, user, LABEL, user, sender=user)
    assert token.balanceOf(user) == 0
    assert balance_of(account) == 1


def test_finalize_exit__platform_held__the_platforms_owner_acts(
    vault, token, platform, operator, treasury, fund, at
):
    fund(10**6, owner=ZERO_ADDRESS)
    tx = vault.requestExit(platform, ZERO_ADDRESS, LABEL, 10**6, sender=operator)
    at(tx.events[0].maturesAt)
    vault.finalizeExit(platform, ZERO_ADDRESS, LABEL, treasury, sender=operator)
    assert token.balanceOf(treasury) == 10**6


@pytest.mark.parametrize("caller", ["stranger", "operator"])
def test_finalize_exit__not_the_owner__reverts(vault, platform, user, matured, request, caller):
    caller = request.getfixturevalue(caller)
    with reverts(vault.NotAccountOwner, account=matured, caller=caller.address):
        vault.finalizeExit(platform, user, LABEL, caller, sender=caller)


@pytest.mark.parametrize("to", ["zero", "vault", "token"])
def test_finalize_exit__recipient_that_cannot_pay_on__reverts(vault, token, platform, user, matured, to):
    to = {"zero": ZERO_ADDRESS, "vault": vault.address, "token": token.address}[to]
    with reverts(vault.BadRecipient, to=to):
        vault.finalizeExit(platform, user, LABEL, to, sender=user)


def test_finalize_exit__none__reverts(vault, platform, user, fund):
    with reverts(vault.NoExit, account=fund(10**6)):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)


def test_finalize_exit__twice__reverts(vault, platform, user, matured):
    vault.finalizeExit(platform, user, LABEL, user, sender=user)
    with reverts(vault.NoExit, account=matured):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)


def test_finalize_exit__token_is_paused__stays_claimable(vault, token, platform, user, admin, matured):
    token.pause(sender=admin)
    with reverts("Pausable: paused"):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)
    assert vault.accountOf(platform, matured).exitAmount == 60 * CENT
    token.unpause(sender=admin)
    vault.finalizeExit(platform, user, LABEL, user, sender=user)
    assert token.balanceOf(user) == 600_000


def test_finalize_exit__vault_is_blacklisted__stays_claimable(vault, token, platform, user, admin, matured):
    token.blacklist(vault, sender=admin)
    with reverts("Blacklistable: account is blacklisted"):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)
    assert vault.accountOf(platform, matured).exitAmount == 60 * CENT
    token.unBlacklist(vault, sender=admin)
    vault.finalizeExit(platform, user, LABEL, user, sender=user)
    assert token.balanceOf(user) == 600_000


def test_finalize_exit__recipient_is_blacklisted__stays_claimable_elsewhere(
    vault, token, platform, user, stranger, admin, matured
):
    token.blacklist(user, sender=admin)
    with reverts("Blacklistable: account is blacklisted"):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)
    vault.finalizeExit(platform, user, LABEL, stranger, sender=user)
    assert token.balanceOf(stranger) == 600_000


def test_finalize_exit__meter_retired_and_policy_shut__still_pays(
    vault, token, platform, user, operator, meter, set_policy, matured, at, now
):
    vault.retireMeter(platform, meter.address, 0, sender=operator)
    set_policy(matured, per_charge=0, per_window=(0, 60), expires_at=0)
    vault.finalizeExit(platform, user, LABEL, user, sender=user)
    assert token.balanceOf(user) == 600_000
