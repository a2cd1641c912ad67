import pytest
from conftest import DAY, USD, ZERO_ADDRESS
from reverts import reverts
from typed_data import Charge

UNKNOWN = 1


def test_set_payout__by_the_owner__changes_the_payout_alone(vault, platform, operator, stranger):
    vault.transferPlatform(platform, stranger, sender=operator)
    tx = vault.setPayout(platform, stranger, sender=operator)
    assert tx.events == [vault.PayoutSet(platform=platform, payout=stranger)]
    view = vault.platformOf(platform)
    assert view.payout == stranger
    assert (view.owner, view.exitDelay, view.earnings, view.pendingOwner) == (operator, DAY, 0, stranger)


def test_set_payout__earnings_there_are__stay_and_go_to_the_new_payout(
    vault, token, platform, operator, treasury, stranger, fund, settle, earnings
):
    account = fund(10**6)
    settle(Charge(account, 1, USD))
    vault.setPayout(platform, stranger, sender=operator)
    assert earnings() == USD
    tx = vault.withdrawEarnings(platform, 10**6, sender=operator)
    assert vault.EarningsWithdrawn(platform=platform, payout=stranger, tokens=10**6) in tx.events
    assert (token.balanceOf(stranger), token.balanceOf(treasury)) == (10**6, 0)


def test_set_payout__another_platform_of_the_owner__keeps_its_own(
    vault, platform, operator, treasury, stranger, register
):
    other = register(b"\x07" * 32)
    vault.setPayout(platform, stranger, sender=operator)
    assert vault.platformOf(other).payout == treasury


@pytest.mark.parametrize("bad", ["zero", "vault", "token"])
def test_set_payout__recipient_that_could_never_send_on__reverts(
    vault, token, platform, operator, treasury, bad
):
    to = {"zero": ZERO_ADDRESS, "vault": vault.address, "token": token.address}[bad]
    with reverts(vault.BadRecipient, to=to):
        vault.setPayout(platform, to, sender=operator)
    assert vault.platformOf(platform).payout == treasury


def test_set_payout__not_the_owner__reverts(vault, platform, operator, treasury, stranger):
    vault.transferPlatform(platform, stranger, sender=operator)  # an offer is no power
    for caller in (stranger, treasury):
        with reverts(vault.NotPlatformOwner, platform=platform, caller=caller.address):
            vault.setPayout(platform, stranger, sender=caller)
    assert vault.platformOf(platform).payout == treasury


def test_set_payout__unknown_platform__reverts(vault, operator, treasury):
    with reverts(vault.UnknownPlatform, platform=UNKNOWN):
        vault.setPayout(UNKNOWN, treasury, sender=operator)
