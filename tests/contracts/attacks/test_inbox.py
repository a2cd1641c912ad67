"""Money in an inbox is whose the meter says it is: no more than there is, and once for each authorization."""

import pytest
from conftest import CREDIT_PER_TOKEN, LABEL, NONCE, TOKENS_PER_USD, USD
from eth_account import Account
from reverts import reverts
from typed_data import sign

TOKENS = TOKENS_PER_USD
OTHER = b"\x0f" * 32


@pytest.fixture
def inbox(vault, platform):
    return vault.inbox(platform)


@pytest.fixture
def account_of(vault, platform):
    """Where a payer's money is credited."""
    return lambda payer: vault.accountId(platform, payer.address, bytes(32))


@pytest.fixture
def other_payer():
    return Account.from_key("0x" + "d4" * 32)


@pytest.fixture
def cancel(token, token_domain, relayer):
    """Cancels a payer's authorization: to the token's `authorizationState`, it is as if spent."""

    def cancel(payer, nonce=NONCE):
        message = {"authorizer": payer.address, "nonce": nonce}
        signature = sign(payer.key, token_domain, "CancelAuthorization", message)
        token.cancelAuthorization(payer.address, nonce, signature, sender=relayer)

    return cancel


# ── Front-run ──


def test_front_run__then_booked__credited_once(
    vault, inbox, pay_inbox, front_run, book, payer, account_of, stranger, relayer, moves
):
    """The attacker gives the payment to the token, so that the money lies in the inbox and nobody has it."""
    payment = pay_inbox()
    with moves({payer: -TOKENS, inbox: TOKENS}):
        front_run(payment)
    with moves(), reverts("FiatTokenV2: authorization is used or canceled"):
        vault.depositFromInbox(*payment, sender=relayer)
    with moves({inbox: -TOKENS, vault: TOKENS, account_of(payer): USD}):
        book(sender=stranger)
    assert vault.accountOf(payment[0], account_of(payer)).entries == 1


def test_front_run__booked_twice__the_second_reverts(
    vault, inbox, token, admin, pay_inbox, front_run, book, moves
):
    """By a second signature over the same nonce, and money enough in the inbox to pay it."""
    front_run(pay_inbox())
    token.mint(inbox, 10 * TOKENS, sender=admin)
    book()
    with moves():
        for tokens in (TOKENS, 1, 10 * TOKENS):
            with reverts(vault.AlreadyBooked, nonce=NONCE):
                book(tokens)


def test_front_run__deposited_after_booking__reverts(
    vault, inbox, token, admin, pay_inbox, front_run, book, relayer, moves
):
    payment = pay_inbox()
    front_run(payment)
    token.mint(inbox, TOKENS, sender=admin)
    book()
    with moves(), reverts(vault.AlreadyBooked, nonce=NONCE):
        vault.depositFromInbox(*payment, sender=relayer)


def test_front_run__booked_after_a_deposit__reverts(
    vault, inbox, token, admin, pay_inbox, book, relayer, moves
):
    """The money of another payer would be credited to one who has had all of his."""
    vault.depositFromInbox(*pay_inbox(), sender=relayer)
    token.mint(inbox, TOKENS, sender=admin)
    with moves(), reverts(vault.AlreadyBooked, nonce=NONCE):
        book()


def test_front_run__a_second_payment__credited_by_itself(
    vault, inbox, pay_inbox, front_run, book, payer, account_of, relayer, moves
):
    """What lies in the inbox unbooked is not counted into the next payment."""
    front_run(pay_inbox(5 * TOKENS))
    payment = pay_inbox(nonce=OTHER)
    with moves({payer: -TOKENS, vault: TOKENS, account_of(payer): USD}):
        vault.depositFromInbox(*payment, sender=relayer)
    with moves({inbox: -5 * TOKENS, vault: 5 * TOKENS, account_of(payer): 5 * USD}):
        book(5 * TOKENS)


# ── Authorizations that brought nothing ──


def test_cancelled_authorization__without_the_meters_word__nothing_is_booked(
    vault, inbox, token, admin, pay_inbox, cancel, book, payer, user, operator, stranger, relayer, moves
):
    """A payer cancels, and claims what others have in the inbox: the token says of both that the nonce is used."""
    payment = pay_inbox()
    cancel(payer)
    token.mint(inbox, TOKENS, sender=admin)
    assert token.authorizationState(payer.address, NONCE)
    with moves():
        with reverts("FiatTokenV2: authorization is used or canceled"):
            vault.depositFromInbox(*payment, sender=relayer)
        for key in (payer.key, user.private_key, operator.private_key, stranger.private_key):
            with reverts(vault.NotAMeter):
                book(key=key)


def test_cancelled_authorization__booked_by_the_meter__its_word_counts_up_to_what_is_there(
    vault, inbox, token, admin, pay_inbox, cancel, book, payer, account_of, moves
):
    """The chain cannot tell a cancelled authorization from a spent one: this is all a deceived meter can lose."""
    pay_inbox()
    cancel(payer)
    with moves(), reverts(vault.ExceedsInbox, tokens=TOKENS, available=0):
        book()
    token.mint(inbox, TOKENS, sender=admin)
    with moves({inbox: -TOKENS, vault: TOKENS, account_of(payer): USD}):
        book()


def test_nonce_spent_elsewhere__without_the_meters_word__nothing_is_booked(
    vault, inbox, token, admin, pay_inbox, book, payer, user, operator, stranger, relayer, moves
):
    """The payer's nonce went into a transfer to himself at another address, and never to the inbox."""
    payment = pay_inbox(to=stranger.address)
    _, holder, tokens, after, before, nonce, signature = payment
    token.transferWithAuthorization(
        holder, stranger, tokens, after, before, nonce, signature, sender=stranger
    )
    token.mint(inbox, TOKENS, sender=admin)
    with moves():
        with reverts("FiatTokenV2: authorization is used or canceled"):
            vault.depositFromInbox(*payment, sender=relayer)
        for key in (payer.key, user.private_key, operator.private_key, stranger.private_key):
            with reverts(vault.NotAMeter):
                book(key=key)


def test_nonce_spent_elsewhere__booked_by_the_meter__its_word_counts_up_to_what_is_there(
    vault, inbox, token, admin, pay_inbox, book, payer, stranger, account_of, moves
):
    _, holder, tokens, after, before, nonce, signature = pay_inbox(to=stranger.address)
    token.transferWithAuthorization(
        holder, stranger, tokens, after, before, nonce, signature, sender=stranger
    )
    with moves(), reverts(vault.ExceedsInbox, tokens=TOKENS, available=0):
        book()
    token.mint(inbox, TOKENS, sender=admin)
    with moves({inbox: -TOKENS, vault: TOKENS, account_of(payer): USD}):
        book()


# ── Whose, and how much ──


def test_two_payers__booked__each_gets_his_own(
    vault, inbox, pay_inbox, front_run, book, payer, other_payer, account_of, moves
):
    """Both with the same nonce, which is each payer's own."""
    front_run(pay_inbox())
    front_run(pay_inbox(2 * TOKENS, payer=other_payer.address, key=other_payer.key))
    with moves({inbox: -2 * TOKENS, vault: 2 * TOKENS, account_of(other_payer): 2 * USD}):
        book(2 * TOKENS, payer=other_payer.address)
    with moves({inbox: -TOKENS, vault: TOKENS, account_of(payer): USD}):
        book()


def test_two_payers__one_claims_the_others__reverts(
    vault, inbox, pay_inbox, front_run, book, payer, other_payer, platform, moves, domain_of, meter, now
):
    """A booking the meter signed for one payer, with the other's name or amount in it."""
    front_run(pay_inbox())
    front_run(pay_inbox(2 * TOKENS, payer=other_payer.address, key=other_payer.key))
    deadline = now() + 600
    message = {
        "platform": platform,
        "payer": other_payer.address,
        "nonce": NONCE,
        "tokens": 2 * TOKENS,
        "deadline": deadline,
    }
    signature = sign(meter.key, domain_of(vault), "InboxBooking", message)
    stolen = {"signature": signature, "deadline": deadline}
    with moves():
        for change in (
            {"payer": payer.address, "tokens": 2 * TOKENS},
            {"payer": other_payer.address, "tokens": 3 * TOKENS},
            {"payer": other_payer.address, "tokens": 2 * TOKENS, "nonce": OTHER},
            {"payer": other_payer.address, "tokens": 2 * TOKENS, "deadline": deadline + 1},
        ):
            with reverts(vault.NotAMeter):
                book(**stolen | change)


def test_two_payers__one_deposits_while_the_others_money_waits__it_waits_on(
    vault, inbox, pay_inbox, front_run, book, payer, other_payer, account_of, relayer, moves
):
    front_run(pay_inbox(2 * TOKENS, payer=other_payer.address, key=other_payer.key))
    payment = pay_inbox()
    with moves({payer: -TOKENS, vault: TOKENS, account_of(payer): USD}):
        vault.depositFromInbox(*payment, sender=relayer)
    with moves({inbox: -2 * TOKENS, vault: 2 * TOKENS, account_of(other_payer): 2 * USD}):
        book(2 * TOKENS, payer=other_payer.address)


def test_booking__of_more_than_the_inbox_holds__reverts(
    vault, inbox, pay_inbox, front_run, book, payer, account_of, fund, moves
):
    """One unit more, with the vault itself full of other accounts' tokens."""
    fund(100 * TOKENS)
    front_run(pay_inbox())
    with moves():
        for tokens in (TOKENS + 1, 2**256 - 1):
            with reverts(vault.ExceedsInbox, tokens=tokens, available=TOKENS):
                book(tokens)
        with reverts(vault.ZeroAmount):
            book(0)
    with moves({inbox: -TOKENS, vault: TOKENS, account_of(payer): TOKENS * CREDIT_PER_TOKEN}):
        book()


def test_booking__money_without_an_authorization__waits_for_the_meter(
    vault, inbox, token, platform, user, mint, operator, stranger, moves
):
    """Tokens sent to the inbox by a plain transfer: no way out but a booking."""
    mint(user, TOKENS)
    token.transfer(inbox, TOKENS, sender=user)
    with moves():
        with reverts(vault.ZeroAmount):
            vault.sweep(platform, user, LABEL, sender=stranger)
        with reverts(vault.NotRescuable, token=token.address):
            vault.rescueFromInbox(platform, token, operator, sender=operator)
