import pytest
from conftest import HOUR, LABEL, SALT, USD
from reverts import reverts
from typed_data import sign

TOKENS = 10**6


@pytest.fixture
def authorize(vault, token, admin, token_domain, platform, user, payer, now):
    """What a payer signs for one deposit: the arguments of depositWithAuthorization."""

    def authorize(
        *, owner=user, label=LABEL, key=payer.key, payer=payer.address, to=vault, salt=SALT, **times
    ):
        token.mint(payer, TOKENS, sender=admin)
        valid_after, valid_before = times.get("after", 0), times.get("before", now() + HOUR)
        message = {
            "from": payer,
            "to": to.address,
            "value": TOKENS,
            "validAfter": valid_after,
            "validBefore": valid_before,
            "nonce": vault.depositNonce(platform, owner, label, salt),
        }
        signature = sign(key, token_domain, "ReceiveWithAuthorization", message)
        return [platform, owner, label, payer, TOKENS, valid_after, valid_before, salt, signature]

    return authorize


def changed(arguments, **changes):
    names = ["platform", "owner", "label", "payer", "tokens", "after", "before", "salt", "signature"]
    return [changes.get(name, value) for name, value in zip(names, arguments, strict=True)]


def test_deposit_with_authorization__submitted_by_anybody__credits_what_the_payer_signed(
    vault, token, platform, user, payer, stranger, authorize
):
    account = vault.accountId(platform, user, LABEL)
    tx = vault.depositWithAuthorization(*authorize(), sender=stranger)
    assert tx.return_value == account
    assert (
        vault.Deposited(
            platform=platform,
            account=account,
            payer=payer.address,
            owner=user,
            label=LABEL,
            amount=USD,
            entry=1,
        )
        in tx.events
    )
    assert vault.accountOf(platform, account).balance == USD
    assert token.balanceOf(payer.address) == 0
    assert token.authorizationState(payer.address, vault.depositNonce(platform, user, LABEL, SALT))


def test_deposit_with_authorization__contract_wallet__its_word_counts(
    project, vault, admin, payer, relayer, authorize, balance_of, account
):
    wallet = admin.deploy(project.ContractWallet, payer.address)
    vault.depositWithAuthorization(*authorize(payer=wallet.address), sender=relayer)
    assert balance_of(account) == USD


def test_deposit_with_authorization__contract_wallet_does_not_agree__reverts(
    project, vault, admin, stranger, relayer, authorize
):
    wallet = admin.deploy(project.ContractWallet, stranger)
    with reverts("FiatTokenV2: invalid signature"):
        vault.depositWithAuthorization(*authorize(payer=wallet.address), sender=relayer)


@pytest.mark.parametrize("stolen_for", ["platform", "owner", "label", "salt", "tokens", "payer"])
def test_deposit_with_authorization__signature_stolen_for_something_else__reverts(
    vault, register, stranger, authorize, stolen_for
):
    change = {
        "platform": lambda: register(SALT, owner=stranger),  # hostile: its meter would take the credit
        "owner": lambda: stranger.address,
        "label": lambda: SALT,
        "salt": lambda: LABEL,
        "tokens": lambda: TOKENS - 1,
        "payer": lambda: stranger.address,
    }[stolen_for]()
    with reverts("FiatTokenV2: invalid signature"):
        vault.depositWithAuthorization(*changed(authorize(), **{stolen_for: change}), sender=stranger)


def test_deposit_with_authorization__twice__reverts(vault, relayer, authorize):
    arguments = authorize()
    vault.depositWithAuthorization(*arguments, sender=relayer)
    with reverts("FiatTokenV2: authorization is used or canceled"):
        vault.depositWithAuthorization(*arguments, sender=relayer)


def test_deposit_with_authorization__another_vault__reverts(
    project, vault, token, admin, register, authorize
):
    other = admin.deploy(project.CreditVault, token)
    register(SALT, vault=other)
    with reverts("FiatTokenV2: invalid signature"):
        other.depositWithAuthorization(*authorize(to=vault), sender=admin)


def test_deposit_with_authorization__given_to_the_token_directly__reverts(
    vault, token, stranger, authorize, platform, user
):
    _, _, _, payer, tokens, after, before, _, signature = authorize()
    nonce = vault.depositNonce(platform, user, LABEL, SALT)
    receive = token.receiveWithAuthorization
    with reverts("FiatTokenV2: caller must be the payee"):
        receive(payer, vault, tokens, after, before, nonce, signature, sender=stranger)
    with reverts("FiatTokenV2: invalid signature"):
        token.transferWithAuthorization(
            payer, vault, tokens, after, before, nonce, signature, sender=stranger
        )


def test_deposit_with_authorization__valid_after__from_the_next_second(
    vault, relayer, authorize, at, now, isolate
):
    second = now() + 100
    arguments = authorize(after=second)
    with isolate():
        at(second)
        with reverts("FiatTokenV2: authorization is not yet valid"):
            vault.depositWithAuthorization(*arguments, sender=relayer)
    at(second + 1)
    vault.depositWithAuthorization(*arguments, sender=relayer)


def test_deposit_with_authorization__valid_before__until_the_last_second(
    vault, relayer, authorize, at, now, isolate
):
    second = now() + 100
    arguments = authorize(before=second)
    with isolate():
        at(second)
        with reverts("FiatTokenV2: authorization is expired"):
            vault.depositWithAuthorization(*arguments, sender=relayer)
    at(second - 1)
    vault.depositWithAuthorization(*arguments, sender=relayer)


def test_deposit_with_authorization__unknown_platform__reverts(vault, relayer, authorize):
    with reverts(vault.UnknownPlatform, platform=7):
        vault.depositWithAuthorization(*changed(authorize(), platform=7), sender=relayer)


def test_deposit_with_authorization__cancelled__reverts(
    vault, token, token_domain, platform, user, payer, relayer, authorize
):
    arguments = authorize()
    nonce = vault.depositNonce(platform, user, LABEL, SALT)
    message = {"authorizer": payer.address, "nonce": nonce}
    signature = sign(payer.key, token_domain, "CancelAuthorization", message)
    token.cancelAuthorization(payer.address, nonce, signature, sender=relayer)
    with reverts("FiatTokenV2: authorization is used or canceled"):
        vault.depositWithAuthorization(*arguments, sender=relayer)
