import pytest
from conftest import CREDIT_PER_TOKEN, LABEL, MAX_TOKENS, SALT, USD, ZERO_ADDRESS
from hypothesis import given
from hypothesis import strategies as st
from reverts import reverts
from settings import few


def test_deposit__into_ones_own_account__credited(vault, token, platform, user, mint):
    mint(user, 10**6)
    account = vault.accountId(platform, user, LABEL)
    tx = vault.deposit(platform, user, LABEL, 10**6, sender=user)
    assert tx.return_value == account
    assert (
        vault.Deposited(
            platform=platform, account=account, payer=user, owner=user, label=LABEL, amount=USD, entry=1
        )
        in tx.events
    )
    record = vault.accountOf(platform, account)
    assert (record.balance, record.entries, record.limits) == (USD, 1, 0)
    assert (token.balanceOf(vault), token.balanceOf(user)) == (10**6, 0)


def test_deposit__for_another_owner__the_owner_is_credited(vault, platform, user, stranger, fund, balance_of):
    account = fund(10**6, owner=user, payer=stranger)
    assert account == vault.accountId(platform, user, LABEL)
    assert balance_of(account) == USD


def test_deposit__platform_held__owner_is_zero(vault, platform, user, mint, balance_of):
    mint(user, 10**6)
    tx = vault.deposit(platform, ZERO_ADDRESS, LABEL, 10**6, sender=user)
    assert tx.events.filter(vault.Deposited)[0].owner == ZERO_ADDRESS
    assert balance_of(vault.accountId(platform, ZERO_ADDRESS, LABEL)) == USD


@few
@given(first=st.integers(1, MAX_TOKENS - 1), data=st.data())
def test_deposit__twice__adds_up_and_numbers_the_lines(vault, platform, fund, isolate, first, data):
    second = data.draw(st.integers(1, MAX_TOKENS - first))
    with isolate():
        account = fund(first)
        fund(second)
        record = vault.accountOf(platform, account)
        assert (record.balance, record.entries) == ((first + second) * CREDIT_PER_TOKEN, 2)


def test_deposit__two_labels__two_balances(fund, balance_of):
    first, second = fund(10**6, label=LABEL), fund(2 * 10**6, label=SALT)
    assert (balance_of(first), balance_of(second)) == (USD, 2 * USD)


def test_deposit__same_owner_and_label_elsewhere__another_account(
    vault, fund, register, balance_of, stranger
):
    other = register(SALT, owner=stranger)
    mine, theirs = fund(10**6), fund(2 * 10**6, platform=other)
    assert mine != theirs
    assert (balance_of(mine), balance_of(mine, platform=other)) == (USD, 0)


def test_deposit__unknown_platform__reverts(vault, user, mint):
    mint(user, 10**6)
    with reverts(vault.UnknownPlatform, platform=7):
        vault.deposit(7, user, LABEL, 10**6, sender=user)


def test_deposit__nothing__reverts(vault, platform, user):
    with reverts(vault.ZeroAmount):
        vault.deposit(platform, user, LABEL, 0, sender=user)


def test_deposit__more_than_approved__reverts(vault, token, platform, user, mint):
    mint(user, 10**6)
    token.approve(vault, 10**6 - 1, sender=user)
    with reverts("ERC20: transfer amount exceeds allowance"):
        vault.deposit(platform, user, LABEL, 10**6, sender=user)


def test_deposit__from_somebody_elses_approval__impossible(vault, platform, user, stranger, mint):
    mint(user, 10**6)  # the user has approved the vault
    with reverts("ERC20: transfer amount exceeds allowance"):
        vault.deposit(platform, stranger, LABEL, 10**6, sender=stranger)


def test_deposit__all_the_credit_there_can_be__accepted(vault, platform, fund, balance_of):
    assert balance_of(fund(MAX_TOKENS)) == MAX_TOKENS * CREDIT_PER_TOKEN


def test_deposit__one_token_unit_more_in_one_account__reverts(vault, platform, user, mint):
    mint(user, MAX_TOKENS + 1)
    with reverts(vault.AmountTooLarge, tokens=MAX_TOKENS + 1, max=MAX_TOKENS):
        vault.deposit(platform, user, LABEL, MAX_TOKENS + 1, sender=user)


def test_deposit__one_token_unit_more_over_all_accounts__reverts(vault, platform, user, mint, fund):
    fund(MAX_TOKENS)
    mint(user, 1)
    with reverts(vault.AmountTooLarge, tokens=MAX_TOKENS + 1, max=MAX_TOKENS):
        vault.deposit(platform, user, SALT, 1, sender=user)


def test_deposit__donated_tokens__are_nobodys(vault, token, platform, fund, stranger, mint, balance_of):
    mint(stranger, 5 * 10**6)
    token.transfer(vault, 5 * 10**6, sender=stranger)
    assert balance_of(fund(10**6)) == USD
    assert token.balanceOf(vault) == 6 * 10**6


@few
@given(tokens=st.integers(1, 10**12))
def test_deposit__token_with_a_fee__credits_what_arrived(project, admin, register, user, isolate, tokens):
    with isolate():
        token = admin.deploy(project.FeeToken)
        vault = admin.deploy(project.CreditVault, token)
        platform = register(SALT, vault=vault)
        token.mint(user, tokens, sender=user)
        token.approve(vault, tokens, sender=user)
        tx = vault.deposit(platform, user, LABEL, tokens, sender=user)
        arrived = tokens - tokens // 10
        assert token.balanceOf(vault) == arrived
        assert tx.events.filter(vault.Deposited)[0].amount == arrived * CREDIT_PER_TOKEN


@pytest.mark.parametrize("who", ["payer", "vault"])
def test_deposit__blacklisted__reverts(vault, token, platform, user, admin, mint, who):
    mint(user, 10**6)
    token.blacklist(user if who == "payer" else vault, sender=admin)
    with reverts("Blacklistable: account is blacklisted"):
        vault.deposit(platform, user, LABEL, 10**6, sender=user)


def test_deposit__paused_token__reverts(vault, token, platform, user, admin, mint):
    mint(user, 10**6)
    token.pause(sender=admin)
    with reverts("Pausable: paused"):
        vault.deposit(platform, user, LABEL, 10**6, sender=user)
