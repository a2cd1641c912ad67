import pytest
from conftest import CENT, DAY, LABEL, NO_CAP, NO_EXPIRY, SALT, USD, ZERO_ADDRESS
from reverts import reverts
from typed_data import Charge

UNKNOWN = 1


@pytest.fixture
def owners(vault, platform):
    """Owner and pending owner."""

    def owners():
        view = vault.platformOf(platform)
        return view.owner, view.pendingOwner

    return owners


@pytest.fixture
def handed_over(vault, platform, operator, stranger):
    """Makes the platform the stranger's."""

    def handed_over():
        vault.transferPlatform(platform, stranger, sender=operator)
        vault.acceptPlatform(platform, sender=stranger)

    return handed_over


# ── The offer ──


def test_transfer_platform__by_the_owner__offers_and_gives_nothing_yet(
    vault, platform, operator, stranger, owners, set_policy, account
):
    tx = vault.transferPlatform(platform, stranger, sender=operator)
    assert tx.events == [
        vault.PlatformTransferStarted(platform=platform, owner=operator, pendingOwner=stranger)
    ]
    assert owners() == (operator, stranger)
    set_policy(account, per_charge=CENT)  # still the operator's
    with reverts(vault.NotPlatformOwner, platform=platform, caller=stranger.address):
        set_policy(account, sender=stranger)


def test_transfer_platform__not_the_owner__reverts(vault, platform, operator, stranger, owners):
    with reverts(vault.NotPlatformOwner, platform=platform, caller=stranger.address):
        vault.transferPlatform(platform, stranger, sender=stranger)
    assert owners() == (operator, ZERO_ADDRESS)


def test_transfer_platform__by_the_pending_owner__reverts(vault, platform, operator, stranger, user, owners):
    vault.transferPlatform(platform, stranger, sender=operator)
    with reverts(vault.NotPlatformOwner, platform=platform, caller=stranger.address):
        vault.transferPlatform(platform, user, sender=stranger)
    assert owners() == (operator, stranger)


def test_transfer_platform__zero_address__reverts(vault, platform, operator):
    with reverts(vault.ZeroAddress):
        vault.transferPlatform(platform, ZERO_ADDRESS, sender=operator)


def test_transfer_platform__unknown_platform__reverts(vault, operator, stranger):
    with reverts(vault.UnknownPlatform, platform=UNKNOWN):
        vault.transferPlatform(UNKNOWN, stranger, sender=operator)


def test_transfer_platform__second_offer__takes_the_place_of_the_first(
    vault, platform, operator, stranger, user, owners
):
    vault.transferPlatform(platform, stranger, sender=operator)
    vault.transferPlatform(platform, user, sender=operator)
    with reverts(vault.NotPendingOwner, platform=platform, caller=stranger.address):
        vault.acceptPlatform(platform, sender=stranger)
    vault.acceptPlatform(platform, sender=user)
    assert owners() == (user, ZERO_ADDRESS)


def test_transfer_platform__to_oneself__takes_the_offer_back(vault, platform, operator, stranger, owners):
    vault.transferPlatform(platform, stranger, sender=operator)
    vault.transferPlatform(platform, operator, sender=operator)
    with reverts(vault.NotPendingOwner, platform=platform, caller=stranger.address):
        vault.acceptPlatform(platform, sender=stranger)
    vault.acceptPlatform(platform, sender=operator)
    assert owners() == (operator, ZERO_ADDRESS)


# ── Its acceptance ──


def test_accept_platform__by_the_pending_owner__the_platform_is_theirs(
    vault, platform, operator, stranger, treasury, owners
):
    vault.transferPlatform(platform, stranger, sender=operator)
    tx = vault.acceptPlatform(platform, sender=stranger)
    assert tx.events == [
        vault.PlatformTransferred(platform=platform, previousOwner=operator, newOwner=stranger)
    ]
    assert owners() == (stranger, ZERO_ADDRESS)
    view = vault.platformOf(platform)
    assert (view.payout, view.exitDelay, view.earnings) == (treasury, DAY, 0)


def test_accept_platform__not_the_pending_owner__reverts(vault, platform, operator, stranger, user, owners):
    vault.transferPlatform(platform, stranger, sender=operator)
    for caller in (user, operator):
        with reverts(vault.NotPendingOwner, platform=platform, caller=caller.address):
            vault.acceptPlatform(platform, sender=caller)
    assert owners() == (operator, stranger)


def test_accept_platform__offered_to_nobody__reverts(vault, platform, stranger):
    with reverts(vault.NotPendingOwner, platform=platform, caller=stranger.address):
        vault.acceptPlatform(platform, sender=stranger)


def test_accept_platform__twice__reverts(vault, platform, stranger, handed_over):
    handed_over()
    with reverts(vault.NotPendingOwner, platform=platform, caller=stranger.address):
        vault.acceptPlatform(platform, sender=stranger)


def test_accept_platform__unknown_platform__reverts(vault, stranger):
    with reverts(vault.UnknownPlatform, platform=UNKNOWN):
        vault.acceptPlatform(UNKNOWN, sender=stranger)


def test_accept_platform__another_platform_of_the_owner__stays(
    vault, operator, stranger, register, handed_over
):
    other = register(b"\x07" * 32)
    handed_over()
    assert vault.platformOf(other).owner == operator
    with reverts(vault.NotPendingOwner, platform=other, caller=stranger.address):
        vault.acceptPlatform(other, sender=stranger)


# ── What goes with it ──


def test_accept_platform__every_power__passes_from_the_old_owner_to_the_new(
    vault, token, platform, operator, stranger, treasury, other_meter, fund, settle, set_policy, handed_over
):
    account = fund(10**6)
    settle(Charge(account, 1, 50 * CENT))
    handed_over()
    calls = [
        (vault.setPayout, stranger),
        (vault.addMeter, other_meter.address),
        (vault.retireMeter, other_meter.address, 0),
        (vault.withdrawEarnings, 500_000),
        (vault.transferPlatform, operator),
    ]
    for function, *arguments in calls:
        with reverts(vault.NotPlatformOwner, platform=platform, caller=operator.address):
            function(platform, *arguments, sender=operator)
    with reverts(vault.NotPlatformOwner, platform=platform, caller=operator.address):
        set_policy(account)
    set_policy(account, per_charge=CENT, sender=stranger)
    for function, *arguments in calls:
        function(platform, *arguments, sender=stranger)
    assert (token.balanceOf(stranger), token.balanceOf(treasury)) == (500_000, 0)


def test_accept_platform__held_accounts__their_exit_is_the_new_owners(
    vault, token, platform, operator, stranger, fund, request_exit, handed_over, at
):
    account = fund(10**6, owner=ZERO_ADDRESS)
    vault.requestExit(platform, ZERO_ADDRESS, LABEL, 400_000, sender=operator)
    matures_at = vault.accountOf(platform, account).exitMaturesAt
    handed_over()
    at(matures_at)
    with reverts(vault.NotAccountOwner, account=account, caller=operator.address):
        vault.finalizeExit(platform, ZERO_ADDRESS, LABEL, operator, sender=operator)
    at(matures_at + 1)
    vault.finalizeExit(platform, ZERO_ADDRESS, LABEL, stranger, sender=stranger)
    assert token.balanceOf(stranger) == 400_000


def test_accept_platform__users_account__untouched_and_out_of_reach(
    vault, platform, stranger, user, fund, request_exit, set_allowance, set_policy, handed_over
):
    account = fund(10**6)
    set_policy(account, per_charge=CENT)
    request_exit(400_000)
    set_allowance(USD)
    before = vault.accountOf(platform, account)
    handed_over()
    assert vault.accountOf(platform, account) == before
    with reverts(vault.NotAccountOwner, account=account, caller=stranger.address):
        vault.setAllowance(platform, user, LABEL, NO_CAP, NO_EXPIRY, sender=stranger)
    with reverts(vault.NotAccountOwner, account=account, caller=stranger.address):
        vault.cancelExit(platform, user, LABEL, sender=stranger)


def test_accept_platform__meter__signs_on_until_it_is_retired(
    vault, platform, meter, stranger, fund, settle, handed_over
):
    account = fund(10**6)
    handed_over()
    assert settle(Charge(account, 1, CENT)).events.filter(vault.Charged)
    vault.retireMeter(platform, meter.address, 0, sender=stranger)
    with reverts(vault.NotAMeter, platform=platform, meter=meter.address):
        settle(Charge(account, 2, CENT))


def test_accept_platform__registrants_salt__stays_taken(vault, platform, operator, register, handed_over):
    handed_over()
    with reverts(vault.PlatformExists, platform=platform):
        register(SALT, owner=operator)
