import pytest
from conftest import CENT, DAY, HOUR, LABEL, MAX_TOKENS, SALT, USD, ZERO_ADDRESS
from hypothesis import given
from hypothesis import strategies as st
from reverts import reverts
from settings import few


def test_request_exit__by_the_owner__moves_credit_and_starts_the_timer(vault, platform, user, fund):
    account = fund(10**6)
    tx = vault.requestExit(platform, user, LABEL, 600_000, sender=user)
    matures_at = tx.timestamp + DAY
    assert tx.events == [
        vault.ExitRequested(
            platform=platform,
            account=account,
            amount=60 * CENT,
            total=60 * CENT,
            maturesAt=matures_at,
            entry=2,
        )
    ]
    record = vault.accountOf(platform, account)
    assert (record.balance, record.exitAmount, record.exitMaturesAt) == (40 * CENT, 60 * CENT, matures_at)


@few
@given(tokens=st.integers(1, 10**12), data=st.data())
def test_request_exit__any_part__balance_and_exit_add_up(vault, platform, user, fund, isolate, tokens, data):
    out = data.draw(st.integers(1, tokens))
    with isolate():
        account = fund(tokens)
        vault.requestExit(platform, user, LABEL, out, sender=user)
        record = vault.accountOf(platform, account)
        assert (record.balance, record.exitAmount) == ((tokens - out) * 10**6, out * 10**6)


@pytest.mark.parametrize("waited", ["pending", "matured"])
def test_request_exit__second_request__restarts_the_timer_for_the_whole(
    vault, platform, user, fund, request_exit, at, waited
):
    account = fund(10**6)
    first = request_exit(600_000)
    second = first - 1 if waited == "pending" else first + 1
    at(second)
    tx = vault.requestExit(platform, user, LABEL, 100_000, sender=user)
    (log,) = tx.events
    assert (log.amount, log.total, log.maturesAt) == (10 * CENT, 70 * CENT, second + DAY)
    at(second + DAY - 1)
    with reverts(vault.ExitNotMature, maturesAt=second + DAY, timestamp=second + DAY - 1):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)
    assert vault.accountOf(platform, account).exitAmount == 70 * CENT


def test_request_exit__delay_of_the_platform__counts(vault, register, user, fund, request_exit, now):
    platform = register(SALT, owner=user, exit_delay=HOUR)
    fund(10**6, platform=platform)
    assert request_exit(1, platform=platform) == now() + HOUR


def test_request_exit__platform_held__the_platforms_owner_acts(vault, platform, operator, user, fund):
    account = fund(10**6, owner=ZERO_ADDRESS)
    vault.requestExit(platform, ZERO_ADDRESS, LABEL, 10**6, sender=operator)
    assert vault.accountOf(platform, account).exitAmount == USD


@pytest.mark.parametrize("caller", ["stranger", "operator", "relayer"])
def test_request_exit__not_the_owner__reverts(vault, platform, user, fund, request, caller):
    account, caller = fund(10**6), request.getfixturevalue(caller)
    with reverts(vault.NotAccountOwner, account=account, caller=caller.address):
        vault.requestExit(platform, user, LABEL, 10**6, sender=caller)


def test_request_exit__platform_held_and_not_its_owner__reverts(vault, platform, user, fund):
    account = fund(10**6, owner=ZERO_ADDRESS)
    with reverts(vault.NotAccountOwner, account=account, caller=user.address):
        vault.requestExit(platform, ZERO_ADDRESS, LABEL, 10**6, sender=user)


def test_request_exit__unknown_platform__reverts(vault, user):
    for owner in (ZERO_ADDRESS, user):
        with reverts(vault.UnknownPlatform, platform=7):
            vault.requestExit(7, owner, LABEL, 1, sender=user)


def test_request_exit__one_unit_too_much__reverts(vault, platform, user, fund, request_exit):
    fund(10**6)
    request_exit(1)
    with reverts(vault.ExceedsBalance, amount=USD, available=USD - 10**6):
        vault.requestExit(platform, user, LABEL, 10**6, sender=user)


def test_request_exit__nothing__reverts(vault, platform, user, fund):
    fund(10**6)
    with reverts(vault.ZeroAmount):
        vault.requestExit(platform, user, LABEL, 0, sender=user)


@pytest.mark.parametrize("tokens", [MAX_TOKENS + 1, 2**256 - 1])
def test_request_exit__more_than_fits__reverts(vault, platform, user, tokens):
    with reverts(vault.AmountTooLarge, tokens=tokens, max=MAX_TOKENS):
        vault.requestExit(platform, user, LABEL, tokens, sender=user)
