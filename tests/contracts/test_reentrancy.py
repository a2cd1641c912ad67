"""A token that calls back in the middle of a transfer."""

import pytest
from conftest import CENT, DAY, LABEL, SALT, USD
from reverts import reverts
from typed_data import Charge, settlement, sign

TOKENS = 10**6


@pytest.fixture
def hostile_token(project, admin):
    return admin.deploy(project.ReentrantToken)


@pytest.fixture
def its_vault(project, admin, hostile_token):
    return admin.deploy(project.CreditVault, hostile_token)


@pytest.fixture
def its_platform(its_vault, register):
    return register(SALT, vault=its_vault)


@pytest.fixture
def its_account(its_vault, hostile_token, its_platform, user, settle, at):
    """A dollar in, ten cents earned, fifty cents in a matured exit, and a dollar each to deposit and sweep."""
    hostile_token.mint(user, 3 * TOKENS, sender=user)
    hostile_token.approve(its_vault, 3 * TOKENS, sender=user)
    its_vault.deposit(its_platform, user, LABEL, TOKENS, sender=user)
    account = its_vault.accountId(its_platform, user, LABEL)
    settle(Charge(account, 1, 10 * CENT), vault=its_vault, platform=its_platform)
    tx = its_vault.requestExit(its_platform, user, LABEL, 500_000, sender=user)
    hostile_token.transfer(its_vault.depositAddress(its_platform, user, LABEL), TOKENS, sender=user)
    at(tx.timestamp + DAY)
    return account


@pytest.fixture
def calls(its_vault, its_platform, user, operator):
    """Every function that moves tokens: what to call, with what, and who does."""
    return {
        "deposit": (its_vault.deposit, (its_platform, user, LABEL, TOKENS), user),
        "depositWithAuthorization": (
            its_vault.depositWithAuthorization,
            (its_platform, user, LABEL, user, TOKENS, 0, 2**40, SALT, b""),
            user,
        ),
        "sweep": (its_vault.sweep, (its_platform, user, LABEL), user),
        "finalizeExit": (its_vault.finalizeExit, (its_platform, user, LABEL, user), user),
        "withdrawEarnings": (its_vault.withdrawEarnings, (its_platform, 100_000), operator),
    }


FUNCTIONS = ["deposit", "depositWithAuthorization", "sweep", "finalizeExit", "withdrawEarnings"]


@pytest.mark.parametrize("outer", FUNCTIONS)
@pytest.mark.parametrize("inner", FUNCTIONS)
def test_token_path__entered_from_another__reverts(
    its_vault, hostile_token, its_account, calls, user, outer, inner
):
    method, arguments, sender = calls[outer]
    inner_method, inner_arguments, _ = calls[inner]
    hostile_token.arm(its_vault, inner_method.encode_input(*inner_arguments), sender=user)
    with reverts(its_vault.ReentrancyGuardReentrantCall):
        method(*arguments, sender=sender)


@pytest.mark.parametrize("outer", FUNCTIONS)
def test_token_path__unarmed__works(its_vault, its_account, calls, outer):
    method, arguments, sender = calls[outer]
    method(*arguments, sender=sender)


@pytest.mark.parametrize("outer", FUNCTIONS)
def test_settle__in_the_middle_of_a_transfer__sees_consistent_credit(
    its_vault, hostile_token, its_platform, its_account, calls, user, meter, domain_of, now, outer
):
    """Settling needs no guard: what leaves is booked before it goes, what comes in after it has arrived."""
    charges, deadline = [Charge(its_account, 2, 40 * CENT)], now() + DAY + 60
    signature = sign(
        meter.key, domain_of(its_vault), "Settlement", settlement(its_platform, charges, deadline)
    )
    hostile_token.arm(
        its_vault, its_vault.settle.encode_input(its_platform, charges, deadline, signature), sender=user
    )
    method, arguments, sender = calls[outer]
    method(*arguments, sender=sender)

    assert its_vault.isSettled(its_platform, 2)
    record = its_vault.accountOf(its_platform, its_account)
    credit = record.balance + record.exitAmount + its_vault.platformOf(its_platform).earnings
    assert credit == hostile_token.balanceOf(its_vault) * 10**6
    assert record.balance == (USD if outer.startswith(("deposit", "sweep")) else 0)


def test_donation__in_the_middle_of_a_deposit__is_the_depositors(
    its_vault, hostile_token, its_platform, its_account, calls, user
):
    """Measured is what the balance grew by: whoever adds to it in between gives it away."""
    hostile_token.mint(hostile_token, TOKENS, sender=user)
    hostile_token.arm(hostile_token, hostile_token.transfer.encode_input(its_vault, TOKENS), sender=user)
    before = its_vault.accountOf(its_platform, its_account).balance
    its_vault.deposit(its_platform, user, LABEL, TOKENS, sender=user)
    assert its_vault.accountOf(its_platform, its_account).balance - before == 2 * USD
