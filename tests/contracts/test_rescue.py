import pytest
from ape.exceptions import TransactionError
from conftest import LABEL, NONCE, SALT, USD, ZERO_ADDRESS
from reverts import reverts

TOKENS = 10**6
COIN = ZERO_ADDRESS
WEI = 10**18


@pytest.fixture
def wrong(project, admin):
    """A token that the vault does not keep."""
    return admin.deploy(project.PlainToken, 18)


@pytest.fixture
def source(vault, platform, user):
    return vault.depositAddress(platform, user, LABEL)


@pytest.fixture
def inbox(vault, platform):
    return vault.inbox(platform)


@pytest.fixture(params=["rescue", "rescueFromInbox"])
def kind(request):
    return request.param


@pytest.fixture
def place(kind, source, inbox):
    """Where it lies."""
    return {"rescue": source, "rescueFromInbox": inbox}[kind]


@pytest.fixture
def owner(kind, user, operator):
    """Who may rescue it."""
    return {"rescue": user, "rescueFromInbox": operator}[kind]


@pytest.fixture
def rescue(kind, vault, platform, user, owner):
    def rescue(wrong_token, to, *, sender=owner):
        if kind == "rescue":
            return vault.rescue(platform, user, LABEL, wrong_token, to, sender=sender)
        return vault.rescueFromInbox(platform, wrong_token, to, sender=sender)

    return rescue


# ── Either way ──


def test_rescue__wrong_token__all_of_it_goes_to_the_recipient(
    vault, platform, wrong, place, treasury, stranger, rescue, account, chain
):
    wrong.mint(place, 7, sender=stranger)
    assert not chain.provider.get_code(place)
    tx = rescue(wrong, treasury)
    assert tx.events == [
        vault.Rescued(platform=platform, source=place, token=wrong, to=treasury, amount=7),
        wrong.Transfer(**{"from": place, "to": treasury, "value": 7}),
    ]
    assert chain.provider.get_code(place)
    assert (wrong.balanceOf(place), wrong.balanceOf(vault), wrong.balanceOf(treasury)) == (0, 0, 7)
    assert vault.accountOf(platform, account).entries == 0


def test_rescue__clone_exists__what_came_since(wrong, place, treasury, stranger, rescue):
    for _ in range(2):
        wrong.mint(place, 7, sender=stranger)
        rescue(wrong, treasury)
    assert wrong.balanceOf(treasury) == 14


def test_rescue__coin__all_of_it_goes_to_the_recipient(vault, platform, place, treasury, stranger, rescue):
    stranger.transfer(place, WEI)
    before = treasury.balance
    tx = rescue(COIN, treasury)
    assert tx.events == [vault.Rescued(platform=platform, source=place, token=COIN, to=treasury, amount=WEI)]
    assert treasury.balance - before == WEI
    with reverts(vault.ZeroAmount):
        rescue(COIN, treasury)


def test_rescue__coin_once_there_is_code__is_not_taken(wrong, place, treasury, stranger, rescue):
    wrong.mint(place, 1, sender=stranger)
    rescue(wrong, treasury)
    with pytest.raises(TransactionError):
        stranger.transfer(place, WEI)


def test_rescue__coin_to_one_that_does_not_take_it__reverts_and_stays(
    project, admin, place, treasury, stranger, rescue
):
    refuses = admin.deploy(project.ContractWallet, stranger)
    stranger.transfer(place, WEI)
    with pytest.raises(TransactionError):
        rescue(COIN, refuses)
    before = treasury.balance
    rescue(COIN, treasury)
    assert treasury.balance - before == WEI


def test_rescue__wrong_token_with_the_vaults_and_coin_there__leaves_them(
    token, wrong, place, admin, treasury, stranger, rescue, chain
):
    token.mint(place, TOKENS, sender=admin)
    stranger.transfer(place, WEI)
    wrong.mint(place, 7, sender=stranger)
    rescue(wrong, treasury)
    assert (token.balanceOf(place), chain.get_balance(place)) == (TOKENS, WEI)
    assert (token.balanceOf(treasury), wrong.balanceOf(treasury)) == (0, 7)


def test_rescue__the_vaults_token__reverts(vault, token, place, admin, treasury, rescue):
    token.mint(place, TOKENS, sender=admin)
    with reverts(vault.NotRescuable, token=token.address):
        rescue(token, treasury)
    assert token.balanceOf(place) == TOKENS


def test_rescue__no_contract__reverts(vault, stranger, treasury, rescue):
    with reverts(vault.NotRescuable, token=stranger.address):
        rescue(stranger, treasury)


def test_rescue__nothing_there__reverts(vault, wrong, treasury, rescue):
    for wrong_token in (wrong, COIN):
        with reverts(vault.ZeroAmount):
            rescue(wrong_token, treasury)


@pytest.mark.parametrize("to", ["zero", "vault", "token"])
def test_rescue__recipient_that_cannot_send_on__reverts(vault, token, wrong, place, stranger, rescue, to):
    wrong.mint(place, 7, sender=stranger)
    to = {"zero": ZERO_ADDRESS, "vault": vault.address, "token": token.address}[to]
    with reverts(vault.BadRecipient, to=to):
        rescue(wrong, to)


# ── Who may ──


@pytest.mark.parametrize("caller", ["stranger", "operator", "relayer"])
def test_rescue__not_the_accounts_owner__reverts(
    vault, platform, user, account, wrong, source, request, caller
):
    caller = request.getfixturevalue(caller)
    wrong.mint(source, 7, sender=caller)
    with reverts(vault.NotAccountOwner, account=account, caller=caller.address):
        vault.rescue(platform, user, LABEL, wrong, caller, sender=caller)


def test_rescue__of_ones_own_account__takes_nothing_of_anothers(
    vault, platform, wrong, source, inbox, stranger
):
    for place in (source, inbox):
        wrong.mint(place, 7, sender=stranger)
    with reverts(vault.ZeroAmount):
        vault.rescue(platform, stranger, LABEL, wrong, stranger, sender=stranger)
    assert (wrong.balanceOf(source), wrong.balanceOf(inbox)) == (7, 7)


def test_rescue__platform_held__the_platforms_current_owner_acts(
    vault, platform, operator, stranger, wrong, hand_over
):
    held = vault.accountId(platform, ZERO_ADDRESS, LABEL)
    place = vault.depositAddress(platform, ZERO_ADDRESS, LABEL)
    wrong.mint(place, 7, sender=stranger)
    with reverts(vault.NotAccountOwner, account=held, caller=stranger.address):
        vault.rescue(platform, ZERO_ADDRESS, LABEL, wrong, stranger, sender=stranger)
    vault.rescue(platform, ZERO_ADDRESS, LABEL, wrong, operator, sender=operator)
    hand_over(stranger)
    wrong.mint(place, 5, sender=stranger)
    with reverts(vault.NotAccountOwner, account=held, caller=operator.address):
        vault.rescue(platform, ZERO_ADDRESS, LABEL, wrong, operator, sender=operator)
    vault.rescue(platform, ZERO_ADDRESS, LABEL, wrong, stranger, sender=stranger)
    assert (wrong.balanceOf(operator), wrong.balanceOf(stranger)) == (7, 5)


@pytest.mark.parametrize("caller", ["stranger", "user", "treasury"])
def test_rescue_from_inbox__not_the_platforms_owner__reverts(vault, platform, wrong, inbox, request, caller):
    caller = request.getfixturevalue(caller)
    wrong.mint(inbox, 7, sender=caller)
    with reverts(vault.NotPlatformOwner, platform=platform, caller=caller.address):
        vault.rescueFromInbox(platform, wrong, caller, sender=caller)


def test_rescue_from_inbox__platform_handed_over__the_new_owner_rescues(
    vault, platform, operator, stranger, wrong, inbox, hand_over
):
    wrong.mint(inbox, 7, sender=stranger)
    hand_over(stranger)
    with reverts(vault.NotPlatformOwner, platform=platform, caller=operator.address):
        vault.rescueFromInbox(platform, wrong, operator, sender=operator)
    vault.rescueFromInbox(platform, wrong, stranger, sender=stranger)
    assert wrong.balanceOf(stranger) == 7


def test_rescue_from_inbox__of_another_platform__takes_nothing(
    vault, wrong, source, inbox, stranger, register
):
    hostile = register(SALT, owner=stranger)
    for place in (source, inbox):
        wrong.mint(place, 7, sender=stranger)
    with reverts(vault.ZeroAmount):
        vault.rescueFromInbox(hostile, wrong, stranger, sender=stranger)
    assert (wrong.balanceOf(source), wrong.balanceOf(inbox)) == (7, 7)


def test_rescue__unknown_platform__reverts(vault, operator, user, wrong):
    with reverts(vault.UnknownPlatform, platform=7):
        vault.rescue(7, user, LABEL, wrong, user, sender=user)
    with reverts(vault.UnknownPlatform, platform=7):
        vault.rescueFromInbox(7, wrong, operator, sender=operator)


# ── What comes after ──


def test_rescue__then_swept__the_vaults_token_is_credited(
    vault, token, platform, user, account, wrong, source, admin, stranger, balance_of
):
    wrong.mint(source, 7, sender=stranger)
    vault.rescue(platform, user, LABEL, wrong, user, sender=user)
    token.mint(source, TOKENS, sender=admin)
    vault.sweep(platform, user, LABEL, sender=stranger)
    assert balance_of(account) == USD


def test_rescue_from_inbox__then_paid__the_payment_is_credited(
    vault, platform, operator, payer, wrong, inbox, stranger, pay_inbox, balance_of
):
    wrong.mint(inbox, 7, sender=stranger)
    vault.rescueFromInbox(platform, wrong, operator, sender=operator)
    vault.depositFromInbox(*pay_inbox(TOKENS, nonce=NONCE), sender=stranger)
    assert balance_of(vault.accountId(platform, payer.address, bytes(32))) == USD
