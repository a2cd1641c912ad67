"""Deposit addresses and the vault's own balance: what is there before any code, by mistake, or as a gift."""

import pytest
from conftest import LABEL, SALT, TOKENS_PER_USD, USD, ZERO_ADDRESS
from eth_abi import encode
from eth_utils import keccak, to_checksum_address
from reverts import reverts

TOKENS = TOKENS_PER_USD
CREATE2_FACTORY = "0x4e59b44847b379578588920cA78FbF26c0B4956C"  # anvil has it, as most chains do


@pytest.fixture
def source(vault, platform, user):
    return vault.depositAddress(platform, user, LABEL)


@pytest.fixture
def wrong(project, admin):
    """A token that is not the vault's."""
    return admin.deploy(project.PlainToken, 18)


@pytest.fixture
def implementation(vault):
    """What the vault made in its constructor, by its first nonce."""
    return to_checksum_address(keccak(b"\xd6\x94" + bytes.fromhex(vault.address[2:]) + b"\x01")[-20:])


@pytest.fixture
def wei(chain):
    return lambda whose: chain.provider.get_balance(getattr(whose, "address", whose))


# ── Who makes the clone ──


def test_clone__made_by_somebody_else_first__is_at_another_address(
    vault, chain, platform, user, account, token, admin, stranger, source, implementation, moves
):
    """The attacker deploys the same code with the same salt, so that the vault finds code and trusts it."""
    assert chain.provider.get_code(implementation)
    code = bytes.fromhex("3d602d80600a3d3981f3363d3d373d3d3d363d73")
    code += bytes.fromhex(implementation[2:]) + bytes.fromhex("5af43d82803e903d91602b57fd5bf3")
    tag = keccak(text="waterfall.deposit-address.account")
    salt = keccak(encode(["bytes32", "bytes32"], [tag, account]))
    at_vault = keccak(b"\xff" + bytes.fromhex(vault.address[2:]) + salt + keccak(code))[-20:]
    assert to_checksum_address(at_vault) == source
    token.mint(source, TOKENS, sender=admin)
    stranger.transfer(CREATE2_FACTORY, 0, data=salt + code)
    elsewhere = keccak(b"\xff" + bytes.fromhex(CREATE2_FACTORY[2:]) + salt + keccak(code))[-20:]
    assert chain.provider.get_code(to_checksum_address(elsewhere))
    assert not chain.provider.get_code(source)
    with moves({source: -TOKENS, vault: TOKENS, account: USD}):
        vault.sweep(platform, user, LABEL, sender=stranger)


@pytest.mark.parametrize("first", ["sweep", "rescue"])
def test_clone__made_by_an_earlier_call__what_comes_later_is_credited_too(
    vault, platform, user, account, token, admin, stranger, source, wrong, moves, first
):
    if first == "sweep":
        token.mint(source, 1, sender=admin)
        vault.sweep(platform, user, LABEL, sender=stranger)
    else:
        wrong.mint(source, 1, sender=stranger)
        vault.rescue(platform, user, LABEL, wrong, user, sender=user)
    token.mint(source, TOKENS, sender=admin)
    with moves({source: -TOKENS, vault: TOKENS, account: USD}):
        vault.sweep(platform, user, LABEL, sender=stranger)
    with moves(), reverts(vault.ZeroAmount):
        vault.sweep(platform, user, LABEL, sender=stranger)


def test_clone__told_by_anybody_but_the_vault__sends_nothing(
    project, vault, token, admin, platform, user, operator, stranger, source, implementation, moves
):
    """At the clone, at an inbox, and at what they are clones of."""
    token.mint(source, 1, sender=admin)
    vault.sweep(platform, user, LABEL, sender=stranger)
    for place in (source, implementation):
        token.mint(place, TOKENS, sender=admin)
    with moves():
        for place in (source, implementation):
            clone = project.DepositAddress.at(place)
            assert clone.vault() == vault.address
            for caller in (user, operator, stranger):
                with reverts(clone.NotVault, caller=caller.address, vault=vault.address):
                    clone.send(token, caller, TOKENS, sender=caller)
                with reverts(clone.NotVault, caller=caller.address, vault=vault.address):
                    clone.sendNative(caller, 0, sender=caller)


# ── Sent by mistake ──


def test_wrong_token__at_a_deposit_address__goes_to_its_owner_alone(
    vault, platform, hostile, user, operator, stranger, account, source, wrong, moves
):
    """Neither the platform nor another owner of the same label, nor by a platform of his own."""
    wrong.mint(source, 5, sender=stranger)
    with moves():
        for thief in (operator, stranger):
            with reverts(vault.NotAccountOwner, account=account, caller=thief.address):
                vault.rescue(platform, user, LABEL, wrong, thief, sender=thief)
        with reverts(vault.ZeroAmount):
            vault.rescue(platform, stranger, LABEL, wrong, stranger, sender=stranger)
        with reverts(vault.ZeroAmount):
            vault.rescue(hostile, stranger, LABEL, wrong, stranger, sender=stranger)
        assert wrong.balanceOf(source) == 5
        vault.rescue(platform, user, LABEL, wrong, user, sender=user)
    assert (wrong.balanceOf(source), wrong.balanceOf(user)) == (0, 5)


def test_wrong_token__at_an_inbox__goes_to_the_platforms_owner_alone(
    vault, platform, hostile, user, operator, stranger, meter, wrong, moves
):
    inbox = vault.inbox(platform)
    wrong.mint(inbox, 5, sender=stranger)
    with moves():
        for thief in (user, stranger):
            with reverts(vault.NotPlatformOwner, platform=platform, caller=thief.address):
                vault.rescueFromInbox(platform, wrong, thief, sender=thief)
        with reverts(vault.ZeroAmount):
            vault.rescueFromInbox(hostile, wrong, stranger, sender=stranger)
        assert wrong.balanceOf(inbox) == 5
        vault.rescueFromInbox(platform, wrong, operator, sender=operator)
    assert (wrong.balanceOf(inbox), wrong.balanceOf(operator)) == (0, 5)


def test_vaults_token__rescued__never(vault, token, admin, platform, user, operator, source, moves):
    """Rescued, what was paid for credit would leave without an exit; the platform would have its users' payments."""
    for place in (source, vault.inbox(platform)):
        token.mint(place, TOKENS, sender=admin)
    with moves():
        with reverts(vault.NotRescuable, token=token.address):
            vault.rescue(platform, user, LABEL, token, user, sender=user)
        with reverts(vault.NotRescuable, token=token.address):
            vault.rescueFromInbox(platform, token, operator, sender=operator)


def test_ether__at_a_deposit_address_without_code__rescued_by_its_owner_alone(
    vault, platform, user, operator, stranger, account, source, wei, moves
):
    stranger.transfer(source, 1_000)
    before = wei(operator)
    with moves():
        with reverts(vault.NotAccountOwner, account=account, caller=stranger.address):
            vault.rescue(platform, user, LABEL, ZERO_ADDRESS, stranger, sender=stranger)
        vault.rescue(platform, user, LABEL, ZERO_ADDRESS, operator, sender=user)
        with reverts(vault.ZeroAmount):
            vault.rescue(platform, user, LABEL, ZERO_ADDRESS, operator, sender=user)
    assert (wei(source), wei(operator) - before) == (0, 1_000)


def test_ether__at_an_inbox_without_code__rescued_by_the_platforms_owner_alone(
    vault, platform, user, operator, stranger, treasury, wei, moves
):
    inbox, before = vault.inbox(platform), wei(treasury)
    stranger.transfer(inbox, 1_000)
    with moves():
        with reverts(vault.NotPlatformOwner, platform=platform, caller=user.address):
            vault.rescueFromInbox(platform, ZERO_ADDRESS, user, sender=user)
        vault.rescueFromInbox(platform, ZERO_ADDRESS, treasury, sender=operator)
    assert (wei(inbox), wei(treasury) - before) == (0, 1_000)


def test_ether__at_a_deposit_address_with_code__refused(
    vault, token, admin, platform, user, stranger, source, implementation, wei
):
    """It could not lie there unseen; neither can it at the vault."""
    token.mint(source, 1, sender=admin)
    vault.sweep(platform, user, LABEL, sender=user)
    for place in (source, implementation, vault.address):
        with reverts(None):
            stranger.transfer(place, 1_000)
        assert wei(place) == 0


def test_ether__rescued_to_one_who_refuses_it__stays(
    vault, token, platform, user, operator, stranger, source, implementation, wei
):
    stranger.transfer(source, 1_000)
    with reverts(None):
        vault.rescue(platform, user, LABEL, ZERO_ADDRESS, implementation, sender=user)
    assert wei(source) == 1_000


# ── Gifts ──


def test_donation__to_the_vault__credits_nobody_and_cannot_be_taken(
    vault, token, platform, user, operator, stranger, account, mint, fund, consent, request_exit, at, moves
):
    """Neither by the giver nor by those who have credit already."""
    mint(stranger, 5 * TOKENS)
    fund(TOKENS)
    with moves({stranger: -5 * TOKENS, vault: 5 * TOKENS}):
        token.transfer(vault, 5 * TOKENS, sender=stranger)
    with moves():
        with reverts(vault.ExceedsBalance, amount=USD + 10**6, available=USD):
            vault.requestExit(platform, user, LABEL, TOKENS + 1, sender=user)
        with reverts(vault.ExceedsBalance, amount=USD + 10**6, available=USD):
            vault.exitWithConsent(*consent(TOKENS + 1), sender=user)
        with reverts(vault.ExceedsEarnings, amount=10**6, available=0):
            vault.withdrawEarnings(platform, 1, sender=operator)
        with reverts(vault.ZeroAmount):
            vault.sweep(platform, stranger, LABEL, sender=stranger)
        with reverts(vault.ZeroAmount):
            vault.deposit(platform, stranger, LABEL, 0, sender=stranger)
    at(request_exit(TOKENS))
    with moves({("exit", account): -USD, vault: -TOKENS, user: TOKENS}):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)
    assert token.balanceOf(vault) == 5 * TOKENS


@pytest.mark.parametrize("way", ["deposit", "sweep", "depositFromInbox"])
def test_donation__just_before_a_credit__is_not_counted_into_it(
    vault,
    token,
    admin,
    platform,
    user,
    payer,
    account,
    source,
    mint,
    pay_inbox,
    stranger,
    relayer,
    moves,
    way,
):
    """Measured is what the call itself brings: a plain token lets nobody in between the two measurements."""
    mint(stranger, TOKENS)
    mint(user, TOKENS)
    token.mint(source, TOKENS, sender=admin)
    payment = pay_inbox()
    token.transfer(vault, TOKENS, sender=stranger)
    changes, call = {
        "deposit": (
            {user: -TOKENS, account: USD},
            lambda: vault.deposit(platform, user, LABEL, TOKENS, sender=user),
        ),
        "sweep": (
            {source: -TOKENS, account: USD},
            lambda: vault.sweep(platform, user, LABEL, sender=relayer),
        ),
        "depositFromInbox": (
            {payer: -TOKENS, vault.accountId(platform, payer.address, bytes(32)): USD},
            lambda: vault.depositFromInbox(*payment, sender=relayer),
        ),
    }[way]
    with moves(changes | {vault: TOKENS}):
        call()


def test_salt__of_account_and_inbox__never_the_same_address(vault, platform, hostile, user, operator):
    """An account whose deposit address is an inbox would have all its payments by a sweep."""
    addresses = [vault.inbox(number) for number in (platform, hostile)]
    addresses += [
        vault.depositAddress(number, owner, label)
        for number in (platform, hostile)
        for owner in (user, operator, ZERO_ADDRESS)
        for label in (LABEL, SALT, bytes(32), platform.to_bytes(32, "big"))
    ]
    assert len(set(addresses)) == len(addresses)
