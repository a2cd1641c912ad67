import pytest
from conftest import LABEL, MAX_TOKENS, SALT, USD, ZERO_ADDRESS
from reverts import reverts


@pytest.fixture
def source(vault, platform, user, project):
    return vault.depositAddress(platform, user, LABEL)


@pytest.fixture
def send(token, admin):
    return lambda to, tokens: token.mint(to, tokens, sender=admin)


def test_sweep__first_time__makes_the_clone_and_credits(
    vault, token, platform, user, stranger, account, source, send, chain
):
    send(source, 10**6)
    assert not chain.provider.get_code(source)
    tx = vault.sweep(platform, user, LABEL, sender=stranger)
    assert tx.return_value == account
    assert (
        vault.Deposited(
            platform=platform, account=account, payer=source, owner=user, label=LABEL, amount=USD, entry=1
        )
        in tx.events
    )
    assert chain.provider.get_code(source)
    assert vault.accountOf(platform, account).balance == USD
    assert (token.balanceOf(source), token.balanceOf(vault)) == (0, 10**6)


def test_sweep__clone_exists__credits_what_came_since(
    vault, platform, user, account, source, send, balance_of
):
    for _ in range(2):
        send(source, 10**6)
        vault.sweep(platform, user, LABEL, sender=user)
    assert balance_of(account) == 2 * USD


def test_sweep__platform_held_account__credited(vault, platform, stranger, send, balance_of):
    send(vault.depositAddress(platform, ZERO_ADDRESS, LABEL), 10**6)
    vault.sweep(platform, ZERO_ADDRESS, LABEL, sender=stranger)
    assert balance_of(vault.accountId(platform, ZERO_ADDRESS, LABEL)) == USD


def test_sweep__into_another_account__takes_nothing(vault, token, platform, user, stranger, source, send):
    send(source, 10**6)
    with reverts(vault.ZeroAmount):
        vault.sweep(platform, stranger, LABEL, sender=stranger)
    assert token.balanceOf(source) == 10**6


def test_sweep__nothing_there__reverts(vault, platform, user):
    with reverts(vault.ZeroAmount):
        vault.sweep(platform, user, LABEL, sender=user)


def test_sweep__platform_not_yet_registered__the_tokens_wait(
    vault, user, stranger, send, register, balance_of
):
    platform = vault.platformId(stranger, SALT)
    send(vault.depositAddress(platform, user, LABEL), 10**6)
    with reverts(vault.UnknownPlatform, platform=platform):
        vault.sweep(platform, user, LABEL, sender=user)
    register(SALT, owner=stranger)
    vault.sweep(platform, user, LABEL, sender=user)
    assert balance_of(vault.accountId(platform, user, LABEL), platform) == USD


def test_sweep__more_than_fits__reverts(vault, platform, user, source, send):
    send(source, MAX_TOKENS + 1)
    with reverts(vault.AmountTooLarge, tokens=MAX_TOKENS + 1, max=MAX_TOKENS):
        vault.sweep(platform, user, LABEL, sender=user)


def test_sweep__token_with_a_fee__credits_what_arrived(project, admin, register, user):
    token = admin.deploy(project.FeeToken)
    vault = admin.deploy(project.CreditVault, token)
    platform = register(SALT, vault=vault)
    token.mint(vault.depositAddress(platform, user, LABEL), 10**6, sender=user)
    vault.sweep(platform, user, LABEL, sender=user)
    assert vault.accountOf(platform, vault.accountId(platform, user, LABEL)).balance == USD * 9 // 10


def test_deposit_address__anybody_but_the_vault__reverts(project, vault, token, platform, user, source, send):
    send(source, 10**6)
    vault.sweep(platform, user, LABEL, sender=user)
    clone = project.DepositAddress.at(source)
    assert clone.vault() == vault.address
    send(source, 10**6)
    with reverts(clone.NotVault, caller=user.address, vault=vault.address):
        clone.send(token, user, 10**6, sender=user)


def test_deposit_address__of_another_deployer__obeys_only_that(project, admin, user, token, mint):
    instance = admin.deploy(project.DepositAddress)
    mint(user, 10**6)
    token.transfer(instance, 10**6, sender=user)
    instance.send(token, user, 10**6, sender=admin)
    assert token.balanceOf(user) == 10**6
