from conftest import DAY, LABEL, USD, ZERO_ADDRESS
from reverts import reverts
from typed_data import Charge


def test_add_meter__by_the_owner__can_settle(
    vault, platform, operator, other_meter, fund, settle, balance_of
):
    account = fund(10**6)
    tx = vault.addMeter(platform, other_meter.address, sender=operator)
    assert tx.events == [vault.MeterAdded(platform=platform, meter=other_meter.address)]
    assert tuple(vault.meterOf(platform, other_meter.address)) == (tx.timestamp, 0, 0)
    settle(Charge(account, 1, USD), key=other_meter.key)
    assert balance_of(account) == 0


def test_add_meter__of_one_platform__is_none_of_another(vault, platform, register, stranger, other_meter):
    register(LABEL, owner=stranger, meter=other_meter.address)
    assert tuple(vault.meterOf(platform, other_meter.address)) == (0, 0, 0)


def test_add_meter__not_the_owner__reverts(vault, platform, stranger, other_meter):
    with reverts(vault.NotPlatformOwner, platform=platform, caller=stranger.address):
        vault.addMeter(platform, other_meter.address, sender=stranger)


def test_add_meter__unknown_platform__reverts(vault, operator, other_meter):
    with reverts(vault.UnknownPlatform, platform=7):
        vault.addMeter(7, other_meter.address, sender=operator)


def test_add_meter__zero__reverts(vault, platform, operator):
    with reverts(vault.ZeroAddress):
        vault.addMeter(platform, ZERO_ADDRESS, sender=operator)


def test_add_meter__valid_meter__reverts(vault, platform, operator, meter):
    with reverts(vault.MeterExists, platform=platform, meter=meter.address):
        vault.addMeter(platform, meter.address, sender=operator)


def test_add_meter__retired_meter__reverts_for_ever(vault, platform, operator, meter, at, now):
    vault.retireMeter(platform, meter.address, 0, sender=operator)
    at(now() + 365 * DAY)
    with reverts(vault.MeterExists, platform=platform, meter=meter.address):
        vault.addMeter(platform, meter.address, sender=operator)
