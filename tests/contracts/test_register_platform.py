import pytest
from conftest import DAY, HOUR, SALT, ZERO_ADDRESS
from reverts import reverts

NEW = b"\x0a" * 32


def test_register_platform__valid__is_the_callers(vault, operator, treasury, meter, now):
    tx = vault.registerPlatform(NEW, treasury, meter.address, DAY, sender=operator)
    platform = vault.platformId(operator, NEW)
    assert tx.return_value == platform
    assert tx.events == [
        vault.PlatformRegistered(platform=platform, owner=operator, payout=treasury, exitDelay=DAY, salt=NEW),
        vault.MeterAdded(platform=platform, meter=meter.address),
    ]
    record = vault.platformOf(platform)
    assert (record.owner, record.payout, record.exitDelay, record.earnings) == (operator, treasury, DAY, 0)
    assert tuple(vault.meterOf(platform, meter.address)) == (now(), 0, 0)


def test_register_platform__same_salt_of_another_caller__another_platform(register, operator, stranger):
    assert register(NEW, owner=operator) != register(NEW, owner=stranger)


def test_register_platform__registered_before__reverts(vault, platform, operator, treasury, meter):
    with reverts(vault.PlatformExists, platform=platform):
        vault.registerPlatform(SALT, treasury, meter.address, DAY, sender=operator)


@pytest.mark.parametrize("payout", ["zero", "vault", "token"])
def test_register_platform__payout_that_cannot_pay_on__reverts(vault, token, operator, meter, payout):
    payout = {"zero": ZERO_ADDRESS, "vault": vault.address, "token": token.address}[payout]
    with reverts(vault.BadRecipient, to=payout):
        vault.registerPlatform(NEW, payout, meter.address, DAY, sender=operator)


def test_register_platform__zero_meter__reverts(vault, operator, treasury):
    with reverts(vault.ZeroAddress):
        vault.registerPlatform(NEW, treasury, ZERO_ADDRESS, DAY, sender=operator)


@pytest.mark.parametrize("exit_delay", [0, HOUR - 1, 7 * DAY + 1, 2**32 - 1])
def test_register_platform__exit_delay_out_of_range__reverts(vault, operator, treasury, meter, exit_delay):
    with reverts(vault.ExitDelayOutOfRange, exitDelay=exit_delay, min=HOUR, max=7 * DAY):
        vault.registerPlatform(NEW, treasury, meter.address, exit_delay, sender=operator)


@pytest.mark.parametrize("exit_delay", [HOUR, 7 * DAY])
def test_register_platform__exit_delay_at_a_bound__accepted(vault, register, exit_delay):
    assert vault.platformOf(register(NEW, exit_delay=exit_delay)).exitDelay == exit_delay


def test_platform_of__unknown__is_empty(vault):
    assert tuple(vault.platformOf(1)) == (ZERO_ADDRESS, ZERO_ADDRESS, 0, 0, ZERO_ADDRESS)
