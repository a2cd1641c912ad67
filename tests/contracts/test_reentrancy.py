"""A token that calls back in the middle of a transfer."""

import pytest
from conftest import CENT, DAY, LABEL, MINUTE, NONCE, SALT, USD
from reverts import reverts
from typed_data import Charge, settlement, sign

TOKENS = 10**6


@pytest.fixture
def hostile_token(project, admin):
    return admin.deploy(project.ReentrantToken)


@pytest.fixture
def wrong_token(project, admin):
    """Hostile as well, and not the vault's."""
    return admin.deploy(project.ReentrantToken)


@pytest.fixture
def its_vault(project, admin, hostile_token):
    return admin.deploy(project.CreditVault, hostile_token)


@pytest.fixture
def its_platform(its_vault, register):
    return register(SALT, vault=its_vault)


@pytest.fixture
def its_account(its_vault, hostile_token, wrong_token, its_platform, user, settle, at, chain):
    """A dollar in, ten cents earned, fifty cents in a matured exit, and a dollar each to deposit, sweep, book and,
    of another token, rescue."""
    hostile_token.mint(user, 3 * TOKENS, sender=user)
    hostile_token.approve(its_vault, 3 * TOKENS, sender=user)
    its_vault.deposit(its_platform, user, LABEL, TOKENS, sender=user)
    account = its_vault.accountId(its_platform, user, LABEL)
    settle(Charge(account, 1, 10 * CENT), vault=its_vault, platform=its_platform)
    tx = its_vault.requestExit(its_platform, user, LABEL, 500_000, sender=user)
    source, inbox = its_vault.depositAddress(its_platform, user, LABEL), its_vault.inbox(its_platform)
    hostile_token.transfer(source, TOKENS, sender=user)
    hostile_token.mint(inbox, TOKENS, sender=user)
    for place in (source, inbox):
        wrong_token.mint(place, TOKENS, sender=user)
    at(tx.timestamp + DAY)
    chain.mine()
    return account


@pytest.fixture
def calls(its_vault, its_platform, its_account, wrong_token, user, operator, consent, domain_of, meter, now):
    """Every function that moves tokens: what to call, with what, and who does."""
    booking = {
        "platform": its_platform,
        "payer": user.address,
        "nonce": NONCE,
        "tokens": TOKENS,
        "deadline": now() + MINUTE,
    }
    signature = sign(meter.key, domain_of(its_vault), "InboxBooking", booking)
    exits = consent(100_000, vault=its_vault, platform=its_platform, deadline=now() + MINUTE)
    return {
        "deposit": (its_vault.deposit, (its_platform, user, LABEL, TOKENS), user),
        "depositWithAuthorization": (
            its_vault.depositWithAuthorization,
            (its_platform, user, LABEL, user, TOKENS, 0, 2**40, SALT, b""),
            user,
        ),
        "sweep": (its_vault.sweep, (its_platform, user, LABEL), user),
        "depositFromInbox": (
            its_vault.depositFromInbox,
            (its_platform, user, TOKENS, 0, 2**40, NONCE, b""),
            user,
        ),
        "bookInbox": (its_vault.bookInbox, (*booking.values(), signature), user),
        "rescue": (its_vault.rescue, (its_platform, user, LABEL, wrong_token, user), user),
        "rescueFromInbox": (its_vault.rescueFromInbox, (its_platform, wrong_token, user), operator),
        "finalizeExit": (its_vault.finalizeExit, (its_platform, user, LABEL, user), user),
        "exitWithConsent": (its_vault.exitWithConsent, tuple(exits), user),
        "withdrawEarnings": (its_vault.withdrawEarnings, (its_platform, 100_000), operator),
    }


@pytest.fixture
def arm(hostile_token, wrong_token, user):
    """Has the token that a function moves call back."""

    def arm(outer, target, data):
        moved = wrong_token if outer.startswith("rescue") else hostile_token
        moved.arm(target, data, sender=user)

    return arm


FUNCTIONS = [
    "deposit",
    "depositWithAuthorization",
    "sweep",
    "depositFromInbox",
    "bookInbox",
    "rescue",
    "rescueFromInbox",
    "finalizeExit",
    "exitWithConsent",
    "withdrawEarnings",
]


def test_table__has_every_guarded_function(calls):
    assert list(calls) == FUNCTIONS


@pytest.mark.parametrize("outer", FUNCTIONS)
def test_token_path__entered_from_any__reverts(its_vault, calls, arm, isolate, outer):
    method, arguments, sender = calls[outer]
    for inner_method, inner_arguments, _ in calls.values():
        with isolate():
            arm(outer, its_vault, inner_method.encode_input(*inner_arguments))
            with reverts(its_vault.ReentrancyGuardReentrantCall):
                method(*arguments, sender=sender)


@pytest.mark.parametrize("outer", FUNCTIONS)
def test_token_path__unarmed__works(its_vault, its_account, calls, outer):
    method, arguments, sender = calls[outer]
    method(*arguments, sender=sender)


@pytest.mark.parametrize("outer", FUNCTIONS)
def test_settle__in_the_middle_of_a_transfer__sees_consistent_credit(
    its_vault, hostile_token, its_platform, its_account, calls, arm, user, meter, domain_of, now, outer
):
    """Settling needs no guard: what leaves is booked before it goes, what comes in after it has arrived."""
    charges, deadline = [Charge(its_account, 2, 30 * CENT)], now() + MINUTE
    signature = sign(
        meter.key, domain_of(its_vault), "Settlement", settlement(its_platform, charges, deadline)
    )
    arm(outer, its_vault, its_vault.settle.encode_input(its_platform, charges, deadline, signature))
    method, arguments, sender = calls[outer]
    method(*arguments, sender=sender)

    assert its_vault.isSettled(its_platform, 2)
    record = its_vault.accountOf(its_platform, its_account)
    payers = its_vault.accountOf(its_platform, its_vault.accountId(its_platform, user, bytes(32)))
    credit = record.balance + record.exitAmount + its_vault.platformOf(its_platform).earnings
    assert credit + payers.balance == hostile_token.balanceOf(its_vault) * 10**6
    into = {"deposit": USD, "depositWithAuthorization": USD, "sweep": USD, "exitWithConsent": -10 * CENT}
    assert record.balance == 10 * CENT + into.get(outer, 0)
    assert payers.balance == (USD if outer in ("depositFromInbox", "bookInbox") else 0)


def test_donation__in_the_middle_of_a_deposit__is_the_depositors(
    its_vault, hostile_token, its_platform, its_account, calls, user
):
    """Measured is what the balance grew by: whoever adds to it in between gives it away."""
    hostile_token.mint(hostile_token, TOKENS, sender=user)
    hostile_token.arm(hostile_token, hostile_token.transfer.encode_input(its_vault, TOKENS), sender=user)
    before = its_vault.accountOf(its_platform, its_account).balance
    its_vault.deposit(its_platform, user, LABEL, TOKENS, sender=user)
    assert its_vault.accountOf(its_platform, its_account).balance - before == 2 * USD
