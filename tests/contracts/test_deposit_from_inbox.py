import pytest
from conftest import CENT, MAX_TOKENS, NONCE, SALT, USD, ZERO_ADDRESS
from reverts import reverts
from typed_data import Charge, sign

TOKENS = 10**6
NO_LABEL = bytes(32)
NAMES = ["platform", "payer", "tokens", "after", "before", "nonce", "signature"]


@pytest.fixture
def inbox(vault, platform):
    return vault.inbox(platform)


@pytest.fixture
def payers(vault, platform, payer):
    """The account the payer's money is credited to."""
    return vault.accountId(platform, payer.address, NO_LABEL)


def changed(arguments, **changes):
    return [changes.get(name, value) for name, value in zip(NAMES, arguments, strict=True)]


# ── What it does ──


def test_deposit_from_inbox__first_time__makes_the_clone_and_credits_the_payer(
    vault, token, platform, payer, payers, inbox, pay_inbox, stranger, chain
):
    assert not chain.provider.get_code(inbox)
    tx = vault.depositFromInbox(*pay_inbox(TOKENS), sender=stranger)
    assert tx.return_value == payers
    assert tx.events == [
        vault.InboxBooked(platform=platform, payer=payer.address, nonce=NONCE),
        token.AuthorizationUsed(authorizer=payer.address, nonce=NONCE),
        token.Transfer(**{"from": payer.address, "to": inbox, "value": TOKENS}),
        token.Transfer(**{"from": inbox, "to": vault, "value": TOKENS}),
        vault.Deposited(
            platform=platform,
            account=payers,
            payer=payer.address,
            owner=payer.address,
            label=NO_LABEL,
            amount=USD,
            entry=1,
        ),
    ]
    assert chain.provider.get_code(inbox)
    record = vault.accountOf(platform, payers)
    assert (record.balance, record.entries) == (USD, 1)
    holders = (payer.address, inbox, vault)
    assert [token.balanceOf(holder) for holder in holders] == [0, 0, TOKENS]


def test_deposit_from_inbox__clone_exists__credits_the_next_payment(
    vault, platform, payers, pay_inbox, relayer
):
    vault.depositFromInbox(*pay_inbox(TOKENS), sender=relayer)
    tx = vault.depositFromInbox(*pay_inbox(1, nonce=SALT), sender=relayer)
    (log,) = tx.events.filter(vault.Deposited)
    assert (log.amount, log.entry) == (10**6, 2)
    assert vault.accountOf(platform, payers).balance == USD + 10**6


def test_deposit_from_inbox__unbooked_money_there_before__stays_there(
    vault, token, inbox, payers, pay_inbox, front_run, stranger, relayer, balance_of
):
    front_run(pay_inbox(3 * TOKENS, payer=stranger.address, key=stranger.private_key))
    vault.depositFromInbox(*pay_inbox(TOKENS), sender=relayer)
    assert balance_of(payers) == USD
    assert (token.balanceOf(inbox), token.balanceOf(vault)) == (3 * TOKENS, TOKENS)


def test_deposit_from_inbox__credit__is_the_payers_to_take_out(
    vault, token, platform, stranger, pay_inbox, relayer, request_exit, at
):
    vault.depositFromInbox(*pay_inbox(payer=stranger.address, key=stranger.private_key), sender=relayer)
    at(request_exit(TOKENS, owner=stranger, label=NO_LABEL))
    vault.finalizeExit(platform, stranger, NO_LABEL, stranger, sender=stranger)
    assert token.balanceOf(stranger) == TOKENS


def test_deposit_from_inbox__credit__can_be_charged(vault, payers, pay_inbox, relayer, settle, balance_of):
    vault.depositFromInbox(*pay_inbox(), sender=relayer)
    (log,) = settle(Charge(payers, 1, CENT)).events
    assert (log.event_name, log.entry, balance_of(payers)) == ("Charged", 2, 99 * CENT)


def test_deposit_from_inbox__contract_wallet__its_word_counts(
    project, vault, platform, admin, payer, pay_inbox, relayer, balance_of
):
    wallet = admin.deploy(project.ContractWallet, payer.address)
    vault.depositFromInbox(*pay_inbox(payer=wallet.address), sender=relayer)
    assert balance_of(vault.accountId(platform, wallet, NO_LABEL)) == USD


def test_deposit_from_inbox__token_with_a_fee__credits_what_arrived(project, admin, register, user, relayer):
    """A tenth is kept on the way to the inbox, and a tenth of the rest on the way to the vault."""
    token = admin.deploy(project.FeeToken)
    vault = admin.deploy(project.CreditVault, token)
    platform = register(SALT, vault=vault)
    token.mint(vault.inbox(platform), TOKENS, sender=user)
    token.mint(user, TOKENS, sender=user)
    vault.depositFromInbox(platform, user, TOKENS, 0, 2**40, NONCE, b"", sender=relayer)
    account = vault.accountId(platform, user, NO_LABEL)
    assert vault.accountOf(platform, account).balance == 81 * CENT
    assert token.balanceOf(vault.inbox(platform)) == TOKENS
    assert token.balanceOf(vault) == 810_000


# ── Once for each authorization ──


def test_deposit_from_inbox__twice__reverts(vault, platform, payer, payers, pay_inbox, relayer, balance_of):
    arguments = pay_inbox()
    vault.depositFromInbox(*arguments, sender=relayer)
    with reverts(vault.AlreadyBooked, platform=platform, payer=payer.address, nonce=NONCE):
        vault.depositFromInbox(*arguments, sender=relayer)
    assert balance_of(payers) == USD


def test_deposit_from_inbox__same_nonce_of_another_payer__its_own(
    vault, platform, stranger, pay_inbox, relayer, balance_of
):
    vault.depositFromInbox(*pay_inbox(), sender=relayer)
    vault.depositFromInbox(*pay_inbox(payer=stranger.address, key=stranger.private_key), sender=relayer)
    assert balance_of(vault.accountId(platform, stranger, NO_LABEL)) == USD


def test_deposit_from_inbox__given_to_the_token_directly__reverts_and_can_be_booked(
    vault, token, inbox, payers, pay_inbox, front_run, book, relayer, balance_of
):
    arguments = pay_inbox()
    front_run(arguments)
    with reverts("FiatTokenV2: authorization is used or canceled"):
        vault.depositFromInbox(*arguments, sender=relayer)
    book()
    assert (balance_of(payers), token.balanceOf(inbox)) == (USD, 0)


def test_deposit_from_inbox__booked_by_the_meter__reverts(
    vault, platform, payer, pay_inbox, front_run, book, relayer
):
    arguments = pay_inbox()
    front_run(arguments)
    book()
    with reverts(vault.AlreadyBooked, platform=platform, payer=payer.address, nonce=NONCE):
        vault.depositFromInbox(*arguments, sender=relayer)


def test_deposit_from_inbox__refused__stays_good(
    vault, token, admin, payer, payers, pay_inbox, relayer, balance_of
):
    arguments = pay_inbox()
    token.blacklist(payer.address, sender=admin)
    with reverts("Blacklistable: account is blacklisted"):
        vault.depositFromInbox(*arguments, sender=relayer)
    token.unBlacklist(payer.address, sender=admin)
    vault.depositFromInbox(*arguments, sender=relayer)
    assert balance_of(payers) == USD


# ── What the payer signed ──


@pytest.mark.parametrize(
    "change",
    [{"tokens": TOKENS - 1}, {"after": 1}, {"before": 2**40}, {"nonce": SALT}],
    ids=lambda change: next(iter(change)),
)
def test_deposit_from_inbox__submitter_changes_anything__reverts(vault, stranger, pay_inbox, change):
    with reverts("FiatTokenV2: invalid signature"):
        vault.depositFromInbox(*changed(pay_inbox(), **change), sender=stranger)


def test_deposit_from_inbox__for_another_payer__reverts(vault, stranger, pay_inbox):
    with reverts("FiatTokenV2: invalid signature"):
        vault.depositFromInbox(*changed(pay_inbox(), payer=stranger.address), sender=stranger)


def test_deposit_from_inbox__signed_for_another_platform__reverts(vault, register, stranger, pay_inbox):
    hostile = register(SALT, owner=stranger)
    with reverts("FiatTokenV2: invalid signature"):
        vault.depositFromInbox(*changed(pay_inbox(), platform=hostile), sender=stranger)


def test_deposit_from_inbox__signed_to_a_deposit_address__reverts(
    vault, platform, payer, stranger, pay_inbox
):
    to = vault.depositAddress(platform, payer.address, NO_LABEL)
    with reverts("FiatTokenV2: invalid signature"):
        vault.depositFromInbox(*pay_inbox(to=to), sender=stranger)


def test_deposit_from_inbox__another_vault__reverts(project, token, admin, register, pay_inbox):
    other = admin.deploy(project.CreditVault, token)
    register(SALT, vault=other)
    with reverts("FiatTokenV2: invalid signature"):
        other.depositFromInbox(*pay_inbox(), sender=admin)


def test_deposit_from_inbox__valid_after__from_the_next_second(vault, relayer, pay_inbox, at, now, isolate):
    second = now() + 100
    arguments = pay_inbox(after=second)
    with isolate():
        at(second)
        with reverts("FiatTokenV2: authorization is not yet valid"):
            vault.depositFromInbox(*arguments, sender=relayer)
    at(second + 1)
    vault.depositFromInbox(*arguments, sender=relayer)


def test_deposit_from_inbox__valid_before__until_the_last_second(vault, relayer, pay_inbox, at, now, isolate):
    second = now() + 100
    arguments = pay_inbox(before=second)
    with isolate():
        at(second)
        with reverts("FiatTokenV2: authorization is expired"):
            vault.depositFromInbox(*arguments, sender=relayer)
    at(second - 1)
    vault.depositFromInbox(*arguments, sender=relayer)


# ── Arguments ──


def test_deposit_from_inbox__unknown_platform__reverts(vault, relayer, pay_inbox):
    with reverts(vault.UnknownPlatform, platform=7):
        vault.depositFromInbox(*changed(pay_inbox(), platform=7), sender=relayer)


def test_deposit_from_inbox__nothing__reverts(
    vault, token, platform, inbox, payer, token_domain, admin, relayer
):
    """Although there is something of others in the inbox."""
    token.mint(inbox, TOKENS, sender=admin)
    message = {
        "from": payer.address,
        "to": inbox,
        "value": 0,
        "validAfter": 0,
        "validBefore": 2**40,
        "nonce": NONCE,
    }
    signature = sign(payer.key, token_domain, "TransferWithAuthorization", message)
    with reverts(vault.ZeroAmount):
        vault.depositFromInbox(platform, payer.address, 0, 0, 2**40, NONCE, signature, sender=relayer)


def test_deposit_from_inbox__more_than_fits__reverts(vault, relayer, pay_inbox):
    with reverts(vault.AmountTooLarge, tokens=MAX_TOKENS + 1, max=MAX_TOKENS):
        vault.depositFromInbox(*pay_inbox(MAX_TOKENS + 1), sender=relayer)


def test_deposit_from_inbox__as_much_as_fits__credited(vault, payers, relayer, pay_inbox, balance_of):
    vault.depositFromInbox(*pay_inbox(MAX_TOKENS), sender=relayer)
    assert balance_of(payers) == MAX_TOKENS * 10**6


def test_deposit_from_inbox__from_nobody__reverts(vault, relayer, pay_inbox):
    with reverts("FiatTokenV2: invalid signature"):
        vault.depositFromInbox(*changed(pay_inbox(), payer=ZERO_ADDRESS), sender=relayer)
