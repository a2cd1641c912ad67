from conftest import DAY, USD
from reverts import reverts
from typed_data import Charge


def test_retire_meter__by_the_owner__keeps_its_history(vault, platform, operator, meter, at, now):
    added_at = vault.meterOf(platform, meter.address).addedAt
    at(now() + DAY)
    tx = vault.retireMeter(platform, meter.address, 0, sender=operator)
    assert tx.events == [vault.MeterRetired(platform=platform, meter=meter.address, compromisedSince=0)]
    assert tuple(vault.meterOf(platform, meter.address)) == (added_at, tx.timestamp, 0)


def test_retire_meter__batch_signed_before__reverts(vault, platform, operator, meter, fund, settle):
    account = fund(10**6)
    vault.retireMeter(platform, meter.address, 0, sender=operator)
    with reverts(vault.NotAMeter, platform=platform, meter=meter.address):
        settle(Charge(account, 1, USD))


def test_retire_meter__of_one_platform__stays_a_meter_of_another(vault, platform, operator, meter, register):
    other = register(b"\x07" * 32)
    vault.retireMeter(platform, meter.address, 0, sender=operator)
    assert vault.meterOf(other, meter.address).retiredAt == 0


def test_retire_meter__not_the_owner__reverts(vault, platform, stranger, meter):
    with reverts(vault.NotPlatformOwner, platform=platform, caller=stranger.address):
        vault.retireMeter(platform, meter.address, 0, sender=stranger)


def test_retire_meter__never_added__reverts(vault, platform, operator, other_meter):
    with reverts(vault.NotAMeter, platform=platform, meter=other_meter.address):
        vault.retireMeter(platform, other_meter.address, 0, sender=operator)


def test_retire_meter__twice__reverts(vault, platform, operator, meter):
    vault.retireMeter(platform, meter.address, 0, sender=operator)
    with reverts(vault.NotAMeter, platform=platform, meter=meter.address):
        vault.retireMeter(platform, meter.address, 0, sender=operator)


def test_retire_meter__compromised_since_its_addition_or_now__accepted(
    vault, platform, operator, meter, at, now, isolate
):
    added_at = vault.meterOf(platform, meter.address).addedAt
    retired_at = now() + DAY
    for since in (added_at, retired_at):
        with isolate():
            at(retired_at)
            tx = vault.retireMeter(platform, meter.address, since, sender=operator)
            assert tx.events == [
                vault.MeterRetired(platform=platform, meter=meter.address, compromisedSince=since)
            ]
            assert tuple(vault.meterOf(platform, meter.address)) == (added_at, retired_at, since)


def test_retire_meter__compromised_before_its_addition_or_later_than_now__reverts(
    vault, platform, operator, meter, at, now, isolate
):
    added_at = vault.meterOf(platform, meter.address).addedAt
    retired_at = now() + DAY
    for since in (added_at - 1, retired_at + 1):
        with isolate():
            at(retired_at)
            with reverts(
                vault.CompromisedSinceOutOfRange, compromisedSince=since, min=added_at, max=retired_at
            ):
                vault.retireMeter(platform, meter.address, since, sender=operator)
