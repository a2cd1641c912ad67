import pytest
from conftest import CENT, DAY, HOUR, MAX_TOKENS, NONCE, SALT, USD, ZERO_ADDRESS
from reverts import reverts
from typed_data import sign

TOKENS = 10**6
NO_LABEL = bytes(32)


@pytest.fixture
def inbox(vault, platform):
    return vault.inbox(platform)


@pytest.fixture
def payers(vault, platform, payer):
    """The account the payer's money is credited to."""
    return vault.accountId(platform, payer.address, NO_LABEL)


@pytest.fixture
def send(token, admin, inbox):
    """Has tokens in the inbox that nobody has booked."""
    return lambda tokens=TOKENS, to=inbox: token.mint(to, tokens, sender=admin)


@pytest.fixture
def signed(vault, domain_of, platform, payer, meter, now):
    """Arguments of bookInbox."""

    def signed(tokens=TOKENS, *, vault=vault, platform=platform, deadline=None):
        deadline = deadline or now() + HOUR
        message = {
            "platform": platform,
            "payer": payer.address,
            "nonce": NONCE,
            "tokens": tokens,
            "deadline": deadline,
        }
        signature = sign(meter.key, domain_of(vault), "InboxBooking", message)
        return [platform, payer.address, NONCE, tokens, deadline, signature]

    return signed


# ── What it does ──


def test_book_inbox__authorization_given_to_the_token__credits_its_payer(
    vault, token, platform, payer, payers, inbox, pay_inbox, front_run, book, chain
):
    front_run(pay_inbox(TOKENS))
    assert not chain.provider.get_code(inbox)
    tx = book(TOKENS)
    assert tx.return_value == payers
    assert tx.events == [
        vault.InboxBooked(platform=platform, payer=payer.address, nonce=NONCE),
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
    assert record.consentsFrom == tx.timestamp + DAY
    assert (token.balanceOf(inbox), token.balanceOf(vault)) == (0, TOKENS)


def test_book_inbox__part__the_rest_stays_for_others(
    vault, token, platform, payers, stranger, inbox, send, book, balance_of
):
    send(TOKENS)
    book(300_000)
    assert (balance_of(payers), token.balanceOf(inbox)) == (30 * CENT, 700_000)
    book(700_000, payer=stranger.address)
    assert balance_of(vault.accountId(platform, stranger, NO_LABEL)) == 70 * CENT
    assert token.balanceOf(inbox) == 0


def test_book_inbox__again_for_the_payer__entries_without_a_gap(vault, send, book):
    send()
    logs = [book(1, nonce=nonce).events.filter(vault.Deposited)[0] for nonce in (NONCE, SALT)]
    assert [log.entry for log in logs] == [1, 2]


def test_book_inbox__more_than_is_there__reverts_and_all_of_it_is_credited(
    vault, token, inbox, payers, send, book, balance_of
):
    send()
    with reverts(vault.ExceedsInbox, tokens=TOKENS + 1, available=TOKENS):
        book(TOKENS + 1)
    book(TOKENS)
    assert (balance_of(payers), token.balanceOf(inbox)) == (USD, 0)


def test_book_inbox__empty__reverts(vault, book):
    with reverts(vault.ExceedsInbox, tokens=1, available=0):
        book(1)


def test_book_inbox__largest_number__reverts(vault, send, book):
    send()
    with reverts(vault.ExceedsInbox, tokens=2**256 - 1, available=TOKENS):
        book(2**256 - 1)


def test_book_inbox__money_of_another_platforms_inbox__out_of_reach(
    vault, token, register, stranger, other_meter, inbox, send, book
):
    hostile = register(SALT, owner=stranger, meter=other_meter.address)
    send()
    with reverts(vault.ExceedsInbox, tokens=1, available=0):
        book(1, platform=hostile, payer=stranger.address, key=other_meter.key)
    assert token.balanceOf(inbox) == TOKENS


def test_book_inbox__token_with_a_fee__credits_what_arrived(
    project, admin, register, user, relayer, signed, payer
):
    token = admin.deploy(project.FeeToken)
    vault = admin.deploy(project.CreditVault, token)
    platform = register(SALT, vault=vault)
    token.mint(vault.inbox(platform), 2 * TOKENS, sender=user)
    account = vault.accountId(platform, payer.address, NO_LABEL)
    vault.bookInbox(*signed(vault=vault, platform=platform), sender=relayer)
    assert vault.accountOf(platform, account).balance == 90 * CENT
    assert token.balanceOf(vault.inbox(platform)) == TOKENS


# ── Once for each authorization ──


def test_book_inbox__twice__reverts(vault, token, platform, payer, inbox, send, signed, relayer):
    send(2 * TOKENS)
    arguments = signed()
    vault.bookInbox(*arguments, sender=relayer)
    with reverts(vault.AlreadyBooked, platform=platform, payer=payer.address, nonce=NONCE):
        vault.bookInbox(*arguments, sender=relayer)
    assert token.balanceOf(inbox) == TOKENS


def test_book_inbox__other_part_under_the_same_nonce__reverts(vault, platform, payer, send, book):
    send()
    book(300_000)
    with reverts(vault.AlreadyBooked, platform=platform, payer=payer.address, nonce=NONCE):
        book(700_000)


def test_book_inbox__deposited_before__reverts(
    vault, platform, payer, payers, pay_inbox, relayer, send, book, balance_of
):
    vault.depositFromInbox(*pay_inbox(), sender=relayer)
    send()
    with reverts(vault.AlreadyBooked, platform=platform, payer=payer.address, nonce=NONCE):
        book()
    assert balance_of(payers) == USD


def test_book_inbox__same_nonce_on_another_platform__its_own(vault, register, payer, send, book, balance_of):
    other = register(b"\x0b" * 32)
    send()
    send(to=vault.inbox(other))
    book()
    book(platform=other)
    assert balance_of(vault.accountId(other, payer.address, NO_LABEL), other) == USD


def test_book_inbox__refused__the_booking_stays_good(vault, payers, send, signed, relayer, balance_of):
    arguments = signed()
    with reverts(vault.ExceedsInbox, tokens=TOKENS, available=0):
        vault.bookInbox(*arguments, sender=relayer)
    send()
    vault.bookInbox(*arguments, sender=relayer)
    assert balance_of(payers) == USD


# ── Who may ──


@pytest.mark.parametrize("sender", ["stranger", "user", "operator"])
def test_book_inbox__submitted_by_anybody__credits_the_payer(payers, send, book, balance_of, request, sender):
    send()
    book(sender=request.getfixturevalue(sender))
    assert balance_of(payers) == USD


def test_book_inbox__platform_owner_signs__reverts(vault, platform, operator, send, book):
    send()
    with reverts(vault.NotAMeter, platform=platform, meter=operator.address):
        book(key=operator.private_key)


def test_book_inbox__payer_signs__reverts(vault, platform, payer, send, book):
    send()
    with reverts(vault.NotAMeter, platform=platform, meter=payer.address):
        book(key=payer.key)


def test_book_inbox__meter_of_another_platform__reverts(
    vault, platform, register, stranger, other_meter, send, book
):
    register(SALT, owner=stranger, meter=other_meter.address)
    send()
    with reverts(vault.NotAMeter, platform=platform, meter=other_meter.address):
        book(key=other_meter.key)


def test_book_inbox__retired_meter__reverts(vault, platform, operator, meter, send, signed, relayer):
    send()
    arguments = signed()
    vault.retireMeter(platform, meter.address, 0, sender=operator)
    with reverts(vault.NotAMeter, platform=platform, meter=meter.address):
        vault.bookInbox(*arguments, sender=relayer)


@pytest.mark.parametrize("field", ["platform", "payer", "nonce", "tokens", "deadline"])
def test_book_inbox__submitter_changes_anything__reverts(
    vault, register, stranger, send, signed, platform, field
):
    other = register(b"\x0b" * 32)
    send()
    send(to=vault.inbox(other))
    arguments = signed()
    changes = {
        "platform": other,
        "payer": stranger.address,
        "nonce": SALT,
        "tokens": TOKENS - 1,
        "deadline": arguments[4] - 1,
    }
    arguments[list(changes).index(field)] = changes[field]
    with reverts(vault.NotAMeter, platform=arguments[0]):
        vault.bookInbox(*arguments, sender=stranger)


def test_book_inbox__signed_for_another_vault__reverts(
    project, token, admin, register, send, signed, relayer
):
    other = admin.deploy(project.CreditVault, token)
    platform = register(SALT, vault=other)
    send(to=other.inbox(platform))
    with reverts(other.NotAMeter, platform=platform):
        other.bookInbox(*signed(), sender=relayer)
    other.bookInbox(*signed(vault=other), sender=relayer)


def test_book_inbox__malformed_signature__reverts(vault, send, signed, malformed, relayer):
    send()
    *arguments, signature = signed()
    for bad, error, inputs in malformed(signature):
        with reverts(error, **inputs):
            vault.bookInbox(*arguments, bad, sender=relayer)


# ── Arguments ──


def test_book_inbox__to_nobody__reverts(vault, send, book):
    """It would be an account of the platform's own."""
    send()
    with reverts(vault.ZeroAddress):
        book(payer=ZERO_ADDRESS)


def test_book_inbox__nothing__reverts(vault, send, book):
    send()
    with reverts(vault.ZeroAmount):
        book(0)


def test_book_inbox__more_than_fits__reverts(vault, send, book):
    send(MAX_TOKENS + 1)
    with reverts(vault.AmountTooLarge, tokens=MAX_TOKENS + 1, max=MAX_TOKENS):
        book(MAX_TOKENS + 1)


def test_book_inbox__unknown_platform__reverts(vault, signed, relayer):
    with reverts(vault.UnknownPlatform, platform=7):
        vault.bookInbox(*signed(platform=7), sender=relayer)


def test_book_inbox__at_the_deadline__books_and_a_second_later_reverts(
    vault, payers, send, signed, relayer, at, now, isolate, balance_of
):
    send()
    deadline = now() + 100
    arguments = signed(deadline=deadline)
    with isolate():
        at(deadline + 1)
        with reverts(vault.DeadlinePassed, deadline=deadline, timestamp=deadline + 1):
            vault.bookInbox(*arguments, sender=relayer)
    at(deadline)
    vault.bookInbox(*arguments, sender=relayer)
    assert balance_of(payers) == USD


def test_book_inbox__deadline_an_hour_ahead__books_and_a_second_more_reverts(
    vault, payers, send, signed, relayer, at, now, isolate, balance_of
):
    send()
    deadline = now() + 100 + HOUR
    arguments = signed(deadline=deadline)
    with isolate():
        at(deadline - HOUR - 1)
        with reverts(vault.DeadlineTooFar, deadline=deadline, max=deadline - 1):
            vault.bookInbox(*arguments, sender=relayer)
    at(deadline - HOUR)
    vault.bookInbox(*arguments, sender=relayer)
    assert balance_of(payers) == USD
