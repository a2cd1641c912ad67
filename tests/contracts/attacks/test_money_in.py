"""Every way in, submitted by somebody with a signature or an approval of others, for a platform of his own."""

import pytest
from conftest import CREDIT_PER_TOKEN, HOUR, LABEL, NONCE, SALT, TOKENS_PER_USD, USD
from reverts import reverts
from typed_data import sign

TOKENS = TOKENS_PER_USD
OTHER = b"\x0f" * 32


@pytest.fixture
def authorized(vault, token, admin, token_domain, platform, user, payer, now):
    """A payer's signature for one deposit into the user's account, by the arguments of depositWithAuthorization."""
    token.mint(payer.address, TOKENS, sender=admin)
    before = now() + HOUR
    message = {
        "from": payer.address,
        "to": vault.address,
        "value": TOKENS,
        "validAfter": 0,
        "validBefore": before,
        "nonce": vault.depositNonce(platform, user, LABEL, SALT),
    }
    return {
        "platform": platform,
        "owner": user.address,
        "label": LABEL,
        "payer": payer.address,
        "tokens": TOKENS,
        "validAfter": 0,
        "validBefore": before,
        "salt": SALT,
        "signature": sign(payer.key, token_domain, "ReceiveWithAuthorization", message),
    }


@pytest.fixture
def paid(pay_inbox):
    """A payer's signature for one payment to the platform's inbox, by the arguments of depositFromInbox."""
    names = ["platform", "payer", "tokens", "validAfter", "validBefore", "nonce", "signature"]
    return dict(zip(names, pay_inbox(), strict=True))


@pytest.fixture
def rich(mint, stranger):
    """The attacker, with tokens of his own and an approval."""
    mint(stranger, 10 * TOKENS)
    return stranger


# ── A standing approval ──


def test_standing_approval__deposited_by_another__stays_the_holders(
    vault, token, platform, hostile, user, stranger, mint, moves
):
    """The victim approved the vault for ever; the attacker has it pulled into an account his meter can charge."""
    mint(user, 10 * TOKENS)
    with moves():
        for number, owner in ((hostile, stranger), (hostile, user), (platform, stranger), (platform, user)):
            with reverts("ERC20: transfer amount exceeds allowance"):
                vault.deposit(number, owner, LABEL, TOKENS, sender=stranger)
    assert token.allowance(user, vault) == 10 * TOKENS


def test_standing_approval__attacker_has_his_own__only_his_tokens_move(
    vault, token, hostile, user, rich, mint, moves
):
    mint(user, 10 * TOKENS)
    account = vault.accountId(hostile, user, LABEL)
    with moves({rich: -TOKENS, vault: TOKENS, account: USD}):
        vault.deposit(hostile, user, LABEL, TOKENS, sender=rich)
    assert token.allowance(user, vault) == 10 * TOKENS


def test_standing_approval__named_as_payer_without_a_signature__reverts(
    vault, hostile, user, stranger, mint, moves
):
    mint(user, 10 * TOKENS)
    with moves():
        for signature, reason in (
            (b"", "ECRecover: invalid signature length"),
            (bytes(65), "ECRecover: invalid signature 'v' value"),
            (bytes(64) + b"\x1b", "ECRecover: invalid signature"),
        ):
            with reverts(reason):
                vault.depositWithAuthorization(
                    hostile, stranger, LABEL, user, TOKENS, 0, 2**40, SALT, signature, sender=stranger
                )
            with reverts(reason):
                vault.depositFromInbox(hostile, user, TOKENS, 0, 2**40, NONCE, signature, sender=stranger)


# ── A stolen authorization of a deposit ──


@pytest.mark.parametrize(
    "field",
    ["platform", "owner", "label", "payer", "tokens", "more", "validAfter", "validBefore", "salt"],
)
def test_stolen_authorization__one_argument_changed__reverts(vault, authorized, hostile, rich, moves, field):
    change = {
        "platform": {"platform": hostile},
        "owner": {"owner": rich.address},
        "label": {"label": OTHER},
        "payer": {"payer": rich.address},
        "tokens": {"tokens": TOKENS - 1},
        "more": {"tokens": TOKENS + 1},
        "validAfter": {"validAfter": 1},
        "validBefore": {"validBefore": 2**40},
        "salt": {"salt": OTHER},
    }[field]
    with moves(), reverts("FiatTokenV2: invalid signature"):
        vault.depositWithAuthorization(*(authorized | change).values(), sender=rich)


def test_stolen_authorization__for_an_account_of_his_own_platform__reverts(
    vault, authorized, hostile, stranger, moves
):
    stolen = authorized | {"platform": hostile, "owner": stranger.address}
    with moves(), reverts("FiatTokenV2: invalid signature"):
        vault.depositWithAuthorization(*stolen.values(), sender=stranger)


def test_stolen_authorization__submitted_as_it_is__goes_where_the_payer_meant(
    vault, authorized, payer, account, stranger, moves
):
    with moves({payer: -TOKENS, vault: TOKENS, account: USD}):
        vault.depositWithAuthorization(*authorized.values(), sender=stranger)
    with moves(), reverts("FiatTokenV2: authorization is used or canceled"):
        vault.depositWithAuthorization(*authorized.values(), sender=stranger)


def test_stolen_authorization__given_to_the_token__reverts_and_stays_usable(
    vault, token, authorized, payer, account, stranger, moves
):
    """Spent at the token, the money would lie in the vault without an account."""
    message = [payer.address, vault, TOKENS, 0, authorized["validBefore"]]
    message += [vault.depositNonce(*(authorized[name] for name in ("platform", "owner", "label", "salt")))]
    with moves():
        with reverts("FiatTokenV2: caller must be the payee"):
            token.receiveWithAuthorization(*message, authorized["signature"], sender=stranger)
        with reverts("FiatTokenV2: invalid signature"):
            token.transferWithAuthorization(*message, authorized["signature"], sender=stranger)
    with moves({payer: -TOKENS, vault: TOKENS, account: USD}):
        vault.depositWithAuthorization(*authorized.values(), sender=stranger)


def test_stolen_authorization__as_a_payment_to_an_inbox__reverts(
    vault, authorized, platform, hostile, payer, stranger, moves
):
    nonce = vault.depositNonce(platform, authorized["owner"], LABEL, SALT)
    with moves():
        for number in (platform, hostile):
            with reverts("FiatTokenV2: invalid signature"):
                vault.depositFromInbox(
                    number,
                    payer.address,
                    TOKENS,
                    0,
                    authorized["validBefore"],
                    nonce,
                    authorized["signature"],
                    sender=stranger,
                )


# ── A stolen payment to an inbox ──


@pytest.mark.parametrize(
    "field", ["platform", "payer", "tokens", "more", "validAfter", "validBefore", "nonce"]
)
def test_stolen_payment__one_argument_changed__reverts(vault, paid, hostile, rich, moves, field):
    change = {
        "platform": {"platform": hostile},
        "payer": {"payer": rich.address},
        "tokens": {"tokens": TOKENS - 1},
        "more": {"tokens": TOKENS + 1},
        "validAfter": {"validAfter": 1},
        "validBefore": {"validBefore": 2**40},
        "nonce": {"nonce": OTHER},
    }[field]
    with moves(), reverts("FiatTokenV2: invalid signature"):
        vault.depositFromInbox(*(paid | change).values(), sender=rich)


def test_stolen_payment__submitted_as_it_is__goes_to_the_payers_account(
    vault, paid, platform, payer, stranger, moves
):
    account = vault.accountId(platform, payer.address, bytes(32))
    with moves({payer: -TOKENS, vault: TOKENS, account: USD}):
        vault.depositFromInbox(*paid.values(), sender=stranger)
    with moves(), reverts(vault.AlreadyBooked, nonce=NONCE):
        vault.depositFromInbox(*paid.values(), sender=stranger)


def test_stolen_payment__as_an_authorization_of_a_deposit__reverts(
    vault, token_domain, platform, hostile, user, payer, stranger, token, admin, now, moves
):
    """A payment whose nonce happens to be the attacker's deposit nonce."""
    token.mint(payer.address, TOKENS, sender=admin)
    before = now() + HOUR
    with moves():
        for to in (vault.address, vault.inbox(platform), vault.inbox(hostile)):
            message = {
                "from": payer.address,
                "to": to,
                "value": TOKENS,
                "validAfter": 0,
                "validBefore": before,
                "nonce": vault.depositNonce(hostile, stranger, LABEL, SALT),
            }
            signature = sign(payer.key, token_domain, "TransferWithAuthorization", message)
            with reverts("FiatTokenV2: invalid signature"):
                vault.depositWithAuthorization(
                    *(hostile, stranger, LABEL, payer.address, TOKENS, 0, before, SALT, signature),
                    sender=stranger,
                )


# ── Money on its way: deposit addresses and inboxes ──


def test_sweep__of_anothers_deposit_address_into_his_own_account__finds_nothing(
    vault, token, admin, platform, hostile, user, account, stranger, moves
):
    source = vault.depositAddress(platform, user, LABEL)
    token.mint(source, TOKENS, sender=admin)
    with moves():
        for arguments in ((hostile, user, LABEL), (hostile, stranger, LABEL), (platform, stranger, LABEL)):
            with reverts(vault.ZeroAmount):
                vault.sweep(*arguments, sender=stranger)
    with moves({source: -TOKENS, vault: TOKENS, account: USD}):
        vault.sweep(platform, user, LABEL, sender=stranger)


def test_booking__by_a_meter_of_his_own_platform__reaches_no_other_inbox(
    vault, platform, hostile, front_run, pay_inbox, book, payer, stranger, other_meter, moves
):
    front_run(pay_inbox())
    with moves():
        with reverts(vault.NotAMeter, platform=platform, meter=other_meter.address):
            book(payer=stranger.address, key=other_meter.key)
        with reverts(vault.ExceedsInbox, tokens=TOKENS, available=0):
            book(platform=hostile, payer=stranger.address, key=other_meter.key)
    account = vault.accountId(platform, payer.address, bytes(32))
    with moves({vault.inbox(platform): -TOKENS, vault: TOKENS, account: TOKENS * CREDIT_PER_TOKEN}):
        book(sender=stranger)
