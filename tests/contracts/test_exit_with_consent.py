import pytest
from conftest import CENT, DAY, HOUR, MAX_TOKENS, MINUTE, NONCE, SALT, USD, ZERO_ADDRESS
from hypothesis import given
from hypothesis import strategies as st
from reverts import reverts
from settings import few
from typed_data import Charge

TOKENS = 600_000
NAMES = ["platform", "owner", "label", "tokens", "to", "nonce", "deadline", "signature"]


def changed(arguments, **changes):
    return [changes.get(name, value) for name, value in zip(NAMES, arguments, strict=True)]


# ── What it does ──


def test_exit_with_consent__part_of_the_balance__pays_at_once(
    vault, token, platform, user, stranger, fund, consent
):
    account = fund(10**6)
    tx = vault.exitWithConsent(*consent(TOKENS, to=stranger), sender=user)
    assert tx.events == [
        vault.ExitedWithConsent(
            platform=platform, account=account, to=stranger, tokens=TOKENS, nonce=NONCE, entry=2
        ),
        token.Transfer(**{"from": vault, "to": stranger, "value": TOKENS}),
    ]
    record = vault.accountOf(platform, account)
    assert (record.balance, record.entries, record.exitAmount) == (40 * CENT, 2, 0)
    assert (token.balanceOf(stranger), token.balanceOf(vault)) == (TOKENS, 400_000)


@few
@given(funded=st.integers(1, 10**9), tokens=st.integers(1, 10**9), charge=st.integers(0, 10**6 + 1))
def test_exit_with_consent__any_amount__is_paid_exactly_or_refused(
    vault, token, user, fund, settle, consent, balance_of, isolate, funded, tokens, charge
):
    charge = min(charge, funded * 10**6)
    balance = funded * 10**6 - charge
    with isolate():
        account = fund(funded)
        if charge:
            settle(Charge(account, 1, charge))
        if tokens * 10**6 > balance:
            with reverts(vault.ExceedsBalance, amount=tokens * 10**6, available=balance):
                vault.exitWithConsent(*consent(tokens), sender=user)
            tokens = 0
        else:
            vault.exitWithConsent(*consent(tokens), sender=user)
        assert balance_of(account) == balance - tokens * 10**6
        assert (token.balanceOf(user), token.balanceOf(vault)) == (tokens, funded - tokens)


def test_exit_with_consent__all__leaves_nothing_and_one_unit_more_reverts(
    vault, user, fund, consent, balance_of
):
    account = fund(10**6)
    with reverts(vault.ExceedsBalance, amount=USD + 10**6, available=USD):
        vault.exitWithConsent(*consent(10**6 + 1), sender=user)
    vault.exitWithConsent(*consent(10**6), sender=user)
    assert balance_of(account) == 0


@pytest.mark.parametrize("matured", [False, True])
def test_exit_with_consent__exit_pending__stays_as_it_is(
    vault, token, platform, user, fund, request_exit, consent, at, matured
):
    account = fund(10**6)
    matures_at = request_exit(700_000)
    if matured:
        at(matures_at)
    deadline = matures_at + MINUTE if matured else None
    arguments = consent(300_001, deadline=deadline)
    with reverts(vault.ExceedsBalance, amount=30 * CENT + 10**6, available=30 * CENT):
        vault.exitWithConsent(*arguments, sender=user)
    vault.exitWithConsent(*consent(300_000, deadline=deadline), sender=user)
    record = vault.accountOf(platform, account)
    assert (record.balance, record.exitAmount, record.exitMaturesAt) == (0, 70 * CENT, matures_at)
    assert token.balanceOf(user) == 300_000


def test_exit_with_consent__limits_and_allowance__do_not_bind_it(
    vault, platform, user, fund, set_policy, set_allowance, consent
):
    account = fund(10**6)
    set_policy(account, per_charge=0, per_window=(0, HOUR))
    set_allowance(cap=0)
    vault.exitWithConsent(*consent(10**6), sender=user)
    record = vault.accountOf(platform, account)
    assert (record.balance, record.limits, record.allowance.spent, record.nextCap) == (0, 3, 0, 0)


def test_exit_with_consent__earnings__untouched(vault, user, fund, settle, consent, earnings):
    settle(Charge(fund(10**6), 1, 40 * CENT))
    vault.exitWithConsent(*consent(TOKENS), sender=user)
    assert earnings() == 40 * CENT


# ── Once for each consent ──


def test_exit_with_consent__twice__reverts(vault, token, platform, user, fund, consent):
    fund(2 * 10**6)
    arguments = consent(TOKENS)
    vault.exitWithConsent(*arguments, sender=user)
    with reverts(vault.ConsentUsed, platform=platform, nonce=NONCE):
        vault.exitWithConsent(*arguments, sender=user)
    assert token.balanceOf(user) == TOKENS


def test_exit_with_consent__nonce_of_another_account__is_used(vault, platform, user, stranger, fund, consent):
    fund(10**6)
    fund(10**6, owner=stranger)
    vault.exitWithConsent(*consent(1), sender=user)
    with reverts(vault.ConsentUsed, platform=platform, nonce=NONCE):
        vault.exitWithConsent(*consent(1, owner=stranger, to=stranger), sender=stranger)
    vault.exitWithConsent(*consent(1, owner=stranger, to=stranger, nonce=SALT), sender=stranger)


def test_exit_with_consent__nonce_of_another_platform__is_not_used(
    vault, token, user, fund, consent, register
):
    other = register(b"\x0b" * 32)
    fund(10**6)
    fund(10**6, platform=other)
    vault.exitWithConsent(*consent(TOKENS), sender=user)
    vault.exitWithConsent(*consent(TOKENS, platform=other), sender=user)
    assert token.balanceOf(user) == 2 * TOKENS


def test_exit_with_consent__refused__the_consent_stays_good(vault, token, user, account, fund, consent):
    arguments = consent(TOKENS)
    with reverts(vault.ExceedsBalance, amount=TOKENS * 10**6, available=0):
        vault.exitWithConsent(*arguments, sender=user)
    fund(10**6)
    vault.exitWithConsent(*arguments, sender=user)
    assert token.balanceOf(user) == TOKENS


def test_exit_with_consent__charged_since__pays_no_more_than_is_left(
    vault, user, fund, settle, consent, balance_of
):
    account = fund(10**6)
    arguments = consent(10**6)
    settle(Charge(account, 1, 1))
    with reverts(vault.ExceedsBalance, amount=USD, available=USD - 1):
        vault.exitWithConsent(*arguments, sender=user)
    assert balance_of(account) == USD - 1


def test_exit_with_consent__recipient_is_blacklisted__the_consent_stays_good(
    vault, token, admin, user, fund, consent, balance_of
):
    account = fund(10**6)
    arguments = consent(TOKENS)
    token.blacklist(user, sender=admin)
    with reverts("Blacklistable: account is blacklisted"):
        vault.exitWithConsent(*arguments, sender=user)
    assert balance_of(account) == USD
    token.unBlacklist(user, sender=admin)
    vault.exitWithConsent(*arguments, sender=user)


# ── Who may ──


@pytest.mark.parametrize("caller", ["stranger", "operator", "relayer"])
def test_exit_with_consent__not_the_owner__reverts(vault, user, fund, consent, request, caller):
    account, caller = fund(10**6), request.getfixturevalue(caller)
    with reverts(vault.NotAccountOwner, account=account, caller=caller.address):
        vault.exitWithConsent(*consent(TOKENS), sender=caller)


def test_exit_with_consent__platform_held__the_platforms_current_owner_acts(
    vault, token, platform, operator, stranger, fund, consent, hand_over
):
    account = fund(10**6, owner=ZERO_ADDRESS)
    arguments = consent(TOKENS, owner=ZERO_ADDRESS, to=stranger)
    with reverts(vault.NotAccountOwner, account=account, caller=stranger.address):
        vault.exitWithConsent(*arguments, sender=stranger)
    vault.exitWithConsent(*arguments, sender=operator)
    hand_over(stranger)
    arguments = consent(1, owner=ZERO_ADDRESS, to=stranger, nonce=SALT)
    with reverts(vault.NotAccountOwner, account=account, caller=operator.address):
        vault.exitWithConsent(*arguments, sender=operator)
    vault.exitWithConsent(*arguments, sender=stranger)
    assert token.balanceOf(stranger) == TOKENS + 1


def test_exit_with_consent__platform_owner_signs__reverts(vault, platform, user, operator, fund, consent):
    fund(10**6)
    with reverts(vault.NotAMeter, platform=platform, meter=operator.address):
        vault.exitWithConsent(*consent(TOKENS, key=operator.private_key), sender=user)


def test_exit_with_consent__account_owner_signs__reverts(vault, platform, user, fund, consent):
    fund(10**6)
    with reverts(vault.NotAMeter, platform=platform, meter=user.address):
        vault.exitWithConsent(*consent(TOKENS, key=user.private_key), sender=user)


def test_exit_with_consent__retired_meter__reverts(vault, platform, operator, user, meter, fund, consent):
    fund(10**6)
    arguments = consent(TOKENS)
    vault.retireMeter(platform, meter.address, 0, sender=operator)
    with reverts(vault.NotAMeter, platform=platform, meter=meter.address):
        vault.exitWithConsent(*arguments, sender=user)


def test_exit_with_consent__meter_of_another_platform__reverts(
    vault, platform, user, fund, consent, register, stranger, other_meter
):
    fund(10**6)
    register(SALT, owner=stranger, meter=other_meter.address)
    with reverts(vault.NotAMeter, platform=platform, meter=other_meter.address):
        vault.exitWithConsent(*consent(TOKENS, key=other_meter.key), sender=user)


def test_exit_with_consent__owner_changes_anything__reverts(
    vault, platform, user, stranger, fund, consent, register
):
    other = register(b"\x0b" * 32)
    fund(2 * 10**6)
    fund(10**6, label=SALT)
    fund(10**6, platform=other)
    arguments = consent(TOKENS)
    for change in (
        {"label": SALT},
        {"tokens": TOKENS + 1},
        {"to": stranger},
        {"nonce": SALT},
        {"deadline": arguments[6] - 1},
        {"platform": other},
    ):
        with reverts(vault.NotAMeter, platform=change.get("platform", platform)):
            vault.exitWithConsent(*changed(arguments, **change), sender=user)


def test_exit_with_consent__consent_for_another_owner__reverts(
    vault, platform, user, stranger, fund, consent
):
    fund(10**6)
    fund(10**6, owner=stranger)
    with reverts(vault.NotAMeter, platform=platform):
        vault.exitWithConsent(*changed(consent(TOKENS), owner=stranger), sender=stranger)


def test_exit_with_consent__for_another_vault__reverts(
    project, token, admin, vault, user, fund, consent, register
):
    other = admin.deploy(project.CreditVault, token)
    platform = register(SALT, vault=other)
    with reverts(other.NotAMeter, platform=platform):
        other.exitWithConsent(*consent(TOKENS), sender=user)
    with reverts(other.ExceedsBalance, amount=TOKENS * 10**6, available=0):
        other.exitWithConsent(*consent(TOKENS, vault=other), sender=user)


def test_exit_with_consent__malformed_signature__reverts(vault, user, fund, consent, malformed):
    fund(10**6)
    *arguments, signature = consent(TOKENS)
    for bad, error, inputs in malformed(signature):
        with reverts(error, **inputs):
            vault.exitWithConsent(*arguments, bad, sender=user)


# ── Arguments ──


@pytest.mark.parametrize("to", ["zero", "vault", "token"])
def test_exit_with_consent__recipient_that_cannot_pay_on__reverts(vault, token, user, fund, consent, to):
    fund(10**6)
    to = {"zero": ZERO_ADDRESS, "vault": vault.address, "token": token.address}[to]
    with reverts(vault.BadRecipient, to=to):
        vault.exitWithConsent(*consent(TOKENS, to=to), sender=user)


def test_exit_with_consent__nothing__reverts(vault, user, fund, consent):
    fund(10**6)
    with reverts(vault.ZeroAmount):
        vault.exitWithConsent(*consent(0), sender=user)


@pytest.mark.parametrize("tokens", [MAX_TOKENS + 1, 2**256 - 1])
def test_exit_with_consent__more_than_fits__reverts(vault, user, fund, consent, tokens):
    fund(10**6)
    with reverts(vault.AmountTooLarge, tokens=tokens, max=MAX_TOKENS):
        vault.exitWithConsent(*consent(tokens), sender=user)


def test_exit_with_consent__unknown_platform__reverts(vault, user, consent):
    with reverts(vault.UnknownPlatform, platform=7):
        vault.exitWithConsent(*consent(TOKENS, platform=7), sender=user)


def test_exit_with_consent__at_the_deadline__pays_and_a_second_later_reverts(
    vault, token, user, fund, consent, at, now, isolate
):
    fund(10**6)
    deadline = now() + 100
    arguments = consent(TOKENS, deadline=deadline)
    with isolate():
        at(deadline + 1)
        with reverts(vault.DeadlinePassed, deadline=deadline, timestamp=deadline + 1):
            vault.exitWithConsent(*arguments, sender=user)
    at(deadline)
    vault.exitWithConsent(*arguments, sender=user)
    assert token.balanceOf(user) == TOKENS


def test_exit_with_consent__deadline_ten_minutes_ahead__pays_and_a_second_more_reverts(
    vault, token, user, fund, consent, at, now, isolate
):
    fund(10**6)
    deadline = now() + 100 + 10 * MINUTE
    arguments = consent(TOKENS, deadline=deadline)
    with isolate():
        at(deadline - 10 * MINUTE - 1)
        with reverts(vault.DeadlineTooFar, deadline=deadline, max=deadline - 1):
            vault.exitWithConsent(*arguments, sender=user)
    at(deadline - 10 * MINUTE)
    vault.exitWithConsent(*arguments, sender=user)
    assert token.balanceOf(user) == TOKENS


# ── After a booking ──


@pytest.fixture
def booked(vault, token, admin, platform, user, book):
    """Money in the user's account of label 0 on a meter's word alone, and the second from which it may leave by one."""
    token.mint(vault.inbox(platform), 10**6, sender=admin)
    tx = book(10**6, payer=user.address)
    return tx.timestamp + DAY


def test_exit_with_consent__after_a_booking__not_within_the_exit_delay(
    vault, platform, user, consent, booked, at, isolate
):
    with isolate():
        at(booked - 1)
        with reverts(vault.ConsentTooEarly, **{"from": booked, "timestamp": booked - 1}):
            vault.exitWithConsent(*consent(1, label=bytes(32)), sender=user)
    at(booked)
    vault.exitWithConsent(*consent(10**6, label=bytes(32)), sender=user)
    assert vault.accountOf(platform, vault.accountId(platform, user, bytes(32))).balance == 0


def test_exit_with_consent__exit_asked_for_and_cancelled_after_a_booking__still_not_within_the_delay(
    vault, platform, user, consent, booked, request_exit, at
):
    request_exit(400_000, label=bytes(32))
    vault.cancelExit(platform, user, bytes(32), sender=user)
    account = vault.accountId(platform, user, bytes(32))
    assert vault.accountOf(platform, account).consentsFrom == booked
    at(booked - 1)
    with reverts(vault.ConsentTooEarly, **{"from": booked, "timestamp": booked - 1}):
        vault.exitWithConsent(*consent(1, label=bytes(32)), sender=user)


def test_exit_with_consent__booking_into_another_account__does_not_bind(vault, user, fund, consent, booked):
    fund(10**6)
    vault.exitWithConsent(*consent(10**6), sender=user)
