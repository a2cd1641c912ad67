import pytest
from conftest import CENT, HOUR, LABEL, SALT, USD, ZERO_ADDRESS
from hypothesis import given
from hypothesis import strategies as st
from reverts import reverts
from settings import few
from typed_data import Charge


@pytest.fixture
def held(fund, user):
    """An account the platform holds, with a dollar."""
    return fund(10**6, owner=ZERO_ADDRESS, label=SALT)


def test_allocate__to_a_user__moves_credit(vault, token, platform, operator, user, account, held):
    tx = vault.allocate(platform, SALT, user, LABEL, 30 * CENT + 1, sender=operator)
    assert tx.return_value == account
    assert tx.events == [
        vault.Allocated(
            platform=platform,
            source=held,
            account=account,
            owner=user,
            label=LABEL,
            amount=30 * CENT + 1,
            sourceEntry=2,
            entry=1,
        )
    ]
    source, target = vault.accountOf(platform, held), vault.accountOf(platform, account)
    assert (source.balance, source.entries) == (70 * CENT - 1, 2)
    assert (target.balance, target.entries) == (30 * CENT + 1, 1)
    assert token.balanceOf(vault) == 10**6


@few
@given(tokens=st.integers(1, 10**9), amount=st.integers(1, 10**15) | st.integers(1, 2**96 - 1))
def test_allocate__any_amount__is_conserved_or_refused(
    vault, platform, operator, user, account, fund, balance_of, isolate, tokens, amount
):
    balance = tokens * 10**6
    with isolate():
        held = fund(tokens, owner=ZERO_ADDRESS, label=SALT)
        if amount > balance:
            with reverts(vault.ExceedsBalance, amount=amount, available=balance):
                vault.allocate(platform, SALT, user, LABEL, amount, sender=operator)
            amount = 0
        else:
            vault.allocate(platform, SALT, user, LABEL, amount, sender=operator)
        assert (balance_of(held), balance_of(account)) == (balance - amount, amount)


def test_allocate__all__leaves_nothing_and_one_unit_more_reverts(
    vault, platform, operator, user, account, held, balance_of
):
    with reverts(vault.ExceedsBalance, amount=USD + 1, available=USD):
        vault.allocate(platform, SALT, user, LABEL, USD + 1, sender=operator)
    vault.allocate(platform, SALT, user, LABEL, USD, sender=operator)
    assert (balance_of(held), balance_of(account)) == (0, USD)


def test_allocate__again__entries_without_a_gap(vault, platform, operator, user, held, fund):
    fund(10**6)
    logs = [vault.allocate(platform, SALT, user, LABEL, CENT, sender=operator).events[0] for _ in range(2)]
    assert [(log.sourceEntry, log.entry) for log in logs] == [(2, 2), (3, 3)]


def test_allocate__to_another_held_account__moves_credit(vault, platform, operator, held, balance_of):
    other = vault.accountId(platform, ZERO_ADDRESS, LABEL)
    vault.allocate(platform, SALT, ZERO_ADDRESS, LABEL, CENT, sender=operator)
    assert (balance_of(held), balance_of(other)) == (99 * CENT, CENT)


def test_allocate__to_itself__reverts(vault, platform, operator, held):
    with reverts(vault.SameAccount, account=held):
        vault.allocate(platform, SALT, ZERO_ADDRESS, SALT, 1, sender=operator)


def test_allocate__same_label_of_a_user__is_another_account(
    vault, platform, operator, user, held, balance_of
):
    account = vault.allocate(platform, SALT, user, SALT, CENT, sender=operator).return_value
    assert balance_of(account) == CENT


def test_allocate__pending_exit__stays_where_it_is(
    vault, platform, operator, user, account, held, balance_of
):
    tx = vault.requestExit(platform, ZERO_ADDRESS, SALT, 600_000, sender=operator)
    with reverts(vault.ExceedsBalance, amount=40 * CENT + 1, available=40 * CENT):
        vault.allocate(platform, SALT, user, LABEL, 40 * CENT + 1, sender=operator)
    vault.allocate(platform, SALT, user, LABEL, 40 * CENT, sender=operator)
    source = vault.accountOf(platform, held)
    assert (source.balance, source.exitAmount, source.exitMaturesAt) == (
        0,
        60 * CENT,
        tx.events[0].maturesAt,
    )
    target = vault.accountOf(platform, account)
    assert (target.balance, target.exitAmount) == (40 * CENT, 0)


def test_allocate__limits_of_either__do_not_bind_it_and_stay(
    vault, platform, operator, user, account, held, set_policy, set_allowance
):
    for limited in (held, account):
        set_policy(limited, per_charge=0, per_window=(0, HOUR))
    set_allowance(cap=0)
    vault.allocate(platform, SALT, user, LABEL, CENT, sender=operator)
    assert vault.accountOf(platform, held).limits == 3
    target = vault.accountOf(platform, account)
    assert (target.limits, target.balance, target.nextCap, target.allowance.spent) == (3, CENT, 0, 0)


def test_allocate__then_charged__as_if_deposited(
    vault, platform, operator, user, account, held, settle, earnings
):
    vault.allocate(platform, SALT, user, LABEL, CENT, sender=operator)
    (log,) = settle(Charge(account, 1, CENT)).events
    assert (log.event_name, log.entry) == ("Charged", 2)
    assert earnings() == CENT


def test_allocate__credit_of_a_user__out_of_reach(vault, platform, operator, user, fund, balance_of):
    account = fund(10**6)
    with reverts(vault.ExceedsBalance, amount=1, available=0):
        vault.allocate(platform, LABEL, operator, LABEL, 1, sender=operator)
    assert balance_of(account) == USD


def test_allocate__credit_of_another_platform__out_of_reach(
    vault, platform, stranger, held, register, balance_of
):
    hostile = register(SALT, owner=stranger)
    with reverts(vault.ExceedsBalance, amount=1, available=0):
        vault.allocate(hostile, SALT, stranger, LABEL, 1, sender=stranger)
    with reverts(vault.NotPlatformOwner, platform=platform, caller=stranger.address):
        vault.allocate(platform, SALT, stranger, LABEL, 1, sender=stranger)
    assert balance_of(held) == USD


@pytest.mark.parametrize("caller", ["stranger", "user", "relayer", "treasury"])
def test_allocate__not_the_platforms_owner__reverts(vault, platform, user, held, request, caller):
    caller = request.getfixturevalue(caller)
    with reverts(vault.NotPlatformOwner, platform=platform, caller=caller.address):
        vault.allocate(platform, SALT, user, LABEL, 1, sender=caller)


def test_allocate__platform_handed_over__the_new_owner_allocates(
    vault, platform, operator, stranger, user, account, held, hand_over, balance_of
):
    hand_over(stranger)
    with reverts(vault.NotPlatformOwner, platform=platform, caller=operator.address):
        vault.allocate(platform, SALT, user, LABEL, 1, sender=operator)
    vault.allocate(platform, SALT, user, LABEL, 1, sender=stranger)
    assert balance_of(account) == 1


def test_allocate__nothing__reverts(vault, platform, operator, user, held):
    with reverts(vault.ZeroAmount):
        vault.allocate(platform, SALT, user, LABEL, 0, sender=operator)


def test_allocate__unknown_platform__reverts(vault, operator, user):
    with reverts(vault.UnknownPlatform, platform=7):
        vault.allocate(7, SALT, user, LABEL, 1, sender=operator)
