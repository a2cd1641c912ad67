"""Taking out what is not there, before its time, twice, or to where it would be lost."""

import pytest
from conftest import (
    BALANCE,
    CENT,
    DAY,
    HOUR,
    LABEL,
    MINUTE,
    NONCE,
    SALT,
    TOKENS_PER_USD,
    USD,
    ZERO_ADDRESS,
)
from reverts import reverts
from typed_data import Charge

TOKENS = TOKENS_PER_USD
OTHER = b"\x0f" * 32


@pytest.fixture
def exit_of(vault, platform):
    """What is in an account's exit, and when that matures."""

    def exit_of(account):
        view = vault.accountOf(platform, account)
        return view.exitAmount, view.exitMaturesAt

    return exit_of


# ── The timer ──


def test_exit__none_requested__nothing_to_take(vault, platform, user, fund, token, admin, moves):
    """Not even when the vault has more than it owes."""
    account = fund(TOKENS)
    token.mint(vault, TOKENS, sender=admin)
    with moves():
        with reverts(vault.NoExit, account=account):
            vault.finalizeExit(platform, user, LABEL, user, sender=user)
        with reverts(vault.NoExit, account=account):
            vault.cancelExit(platform, user, LABEL, sender=user)


def test_exit__taken_and_taken_again__reverts(vault, platform, user, fund, request_exit, at, moves):
    account = fund(TOKENS)
    at(request_exit(TOKENS // 2))
    with moves({("exit", account): -50 * CENT, vault: -TOKENS // 2, user: TOKENS // 2}):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)
    with moves():
        with reverts(vault.NoExit, account=account):
            vault.finalizeExit(platform, user, LABEL, user, sender=user)
        with reverts(vault.NoExit, account=account):
            vault.cancelExit(platform, user, LABEL, sender=user)


def test_second_request__just_before_maturity__waits_for_the_whole_again(
    vault, platform, user, fund, settle, request_exit, at, exit_of, moves
):
    """The bulk is to leave on the timer of a small first request."""
    account = fund(TOKENS)
    first = request_exit(1)
    at(first - 1)
    second = request_exit(TOKENS - 1)
    assert second == first - 1 + DAY
    at(first)
    with moves(), reverts(vault.ExitNotMature, maturesAt=second, timestamp=first):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)
    at(second - 1)
    with moves({("exit", account): -CENT, platform: CENT}):
        settle(Charge(account, 1, CENT))
    assert exit_of(account) == (99 * CENT, second)


def test_second_request__after_maturity__chargeable_again(
    vault, platform, user, fund, settle, request_exit, at, exit_of, moves
):
    """A matured exit is kept open as a hole through which later deposits leave at once."""
    account = fund(TOKENS)
    first = request_exit(TOKENS // 2)
    at(first + HOUR)
    second = request_exit(TOKENS // 2)
    assert second == first + HOUR + DAY
    with moves(), reverts(vault.ExitNotMature, maturesAt=second):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)
    with moves({("exit", account): -USD, platform: USD}):
        settle(Charge(account, 1, USD))
    assert exit_of(account) == (0, 0)


@pytest.mark.parametrize(("second", "charged"), [(-1, True), (0, False), (1, False)])
def test_charge__second_before_at_or_after_maturity__draws_only_before(
    vault, fund, platform, settle, request_exit, at, moves, second, charged
):
    account = fund(TOKENS)
    at(request_exit(TOKENS) + second)
    with moves({("exit", account): -CENT, platform: CENT} if charged else {}):
        tx = settle(Charge(account, 1, CENT))
    refusals = [log.reason for log in tx.events.filter(vault.ChargeRejected)]
    assert refusals == ([] if charged else [BALANCE])
    assert vault.isSettled(platform, 1) is charged


def test_exit__of_all_just_after_spending__the_charge_still_lands(
    vault, platform, user, fund, settle, request_exit, at, now, moves
):
    """Spends, and asks for everything back before the batch is mined: there is a day to settle it."""
    account = fund(TOKENS)
    matures_at = request_exit(TOKENS)
    at(matures_at - 1)
    with moves({("exit", account): -60 * CENT, platform: 60 * CENT}):
        settle(Charge(account, 1, 60 * CENT))
    at(matures_at)
    with moves({("exit", account): -40 * CENT, vault: -400_000, user: 400_000}):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)


def test_exit__cancelled_and_requested_again__the_timer_begins_anew(
    vault, platform, user, fund, request_exit, at, moves
):
    fund(TOKENS)
    first = request_exit(TOKENS)
    at(first - 10)
    vault.cancelExit(platform, user, LABEL, sender=user)
    second = request_exit(TOKENS)
    assert second >= first - 10 + DAY
    at(first)
    with moves(), reverts(vault.ExitNotMature, maturesAt=second):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)


def test_exit__of_anothers_account__reverts(
    vault, platform, user, operator, stranger, fund, request_exit, consent, at, moves
):
    account = fund(TOKENS)
    at(request_exit(TOKENS // 2))
    with moves():
        for thief in (operator, stranger):
            for call in (
                lambda thief: vault.requestExit(platform, user, LABEL, 1, sender=thief),
                lambda thief: vault.cancelExit(platform, user, LABEL, sender=thief),
                lambda thief: vault.finalizeExit(platform, user, LABEL, thief, sender=thief),
                lambda thief: vault.exitWithConsent(*consent(1, to=thief), sender=thief),
            ):
                with reverts(vault.NotAccountOwner, account=account, caller=thief.address):
                    call(thief)


# ── Consent ──


def test_consent__kept_while_spending__refused_for_what_is_gone(
    vault, platform, user, fund, settle, consent, moves
):
    """The meter consents to all there is, the user spends it, and takes it out as well."""
    account = fund(TOKENS)
    kept = consent(TOKENS)
    settle(Charge(account, 1, CENT))
    with moves(), reverts(vault.ExceedsBalance, amount=USD, available=99 * CENT):
        vault.exitWithConsent(*kept, sender=user)
    fund(TOKENS)
    with moves({account: -USD, vault: -TOKENS, user: TOKENS}):
        vault.exitWithConsent(*kept, sender=user)


def test_consent__with_a_pending_exit__takes_nothing_of_it(
    vault, platform, user, fund, request_exit, consent, moves
):
    """What is on its way out already is not taken a second time."""
    fund(TOKENS)
    request_exit(TOKENS)
    with moves(), reverts(vault.ExceedsBalance, amount=USD, available=0):
        vault.exitWithConsent(*consent(TOKENS), sender=user)


def test_consent__replayed__reverts(vault, platform, user, fund, consent, moves):
    account = fund(2 * TOKENS)
    once = consent(TOKENS)
    with moves({account: -USD, vault: -TOKENS, user: TOKENS}):
        vault.exitWithConsent(*once, sender=user)
    with moves():
        with reverts(vault.ConsentUsed, platform=platform, nonce=NONCE):
            vault.exitWithConsent(*once, sender=user)
        with reverts(vault.ConsentUsed, platform=platform, nonce=NONCE):  # another one, by the same nonce
            vault.exitWithConsent(*consent(1), sender=user)


@pytest.mark.parametrize("field", ["to", "tokens", "label", "owner", "platform", "nonce", "deadline"])
def test_consent__one_argument_changed__reverts(
    vault, register, operator, user, stranger, fund, consent, meter, moves, field
):
    """Each of these would be good if the meter had signed it: the money is there, and the caller owns the account."""
    other = register(SALT, owner=stranger, meter=meter.address)
    for elsewhere in (
        {},
        {"label": OTHER},
        {"owner": stranger},
        {"platform": other},
    ):
        fund(2 * TOKENS, **elsewhere)
    names = ["platform", "owner", "label", "tokens", "to", "nonce", "deadline", "signature"]
    given = dict(zip(names, consent(TOKENS), strict=True))
    change = {
        "to": {"to": stranger.address},
        "tokens": {"tokens": TOKENS + 1},
        "label": {"label": OTHER},
        "owner": {"owner": stranger.address},
        "platform": {"platform": other},
        "nonce": {"nonce": OTHER},
        "deadline": {"deadline": given["deadline"] + 1},
    }[field]
    caller = stranger if field == "owner" else user
    with moves(), reverts(vault.NotAMeter):
        vault.exitWithConsent(*(given | change).values(), sender=caller)


def test_consent__submitted_by_another_caller__reverts(
    vault, platform, user, operator, stranger, relayer, fund, consent, moves
):
    """Nobody ends an account but its owner, wherever the money goes."""
    account = fund(TOKENS)
    with moves():
        for caller in (operator, stranger, relayer):
            with reverts(vault.NotAccountOwner, account=account, caller=caller.address):
                vault.exitWithConsent(*consent(TOKENS), sender=caller)


def test_consent__after_ten_minutes__reverts(vault, user, fund, consent, at, now, isolate, moves):
    account, signed_at = fund(TOKENS), now() + 10
    deadline = signed_at + 10 * MINUTE
    kept = consent(TOKENS, deadline=deadline)
    with isolate():
        at(signed_at - 1)
        with moves(), reverts(vault.DeadlineTooFar, deadline=deadline, max=deadline - 1):
            vault.exitWithConsent(*kept, sender=user)
    with isolate():
        at(deadline + 1)
        with moves(), reverts(vault.DeadlinePassed, deadline=deadline, timestamp=deadline + 1):
            vault.exitWithConsent(*kept, sender=user)
    at(deadline)
    with moves({account: -USD, vault: -TOKENS, user: TOKENS}):
        vault.exitWithConsent(*kept, sender=user)


def test_consent__of_the_owner_or_a_strangers_platform__is_none(
    vault, hostile, user, operator, fund, consent, other_meter, moves
):
    """Only a meter of the account's own platform knows what was spent and not settled."""
    fund(TOKENS)
    with moves():
        for key in (user.private_key, operator.private_key, other_meter.key):
            with reverts(vault.NotAMeter):
                vault.exitWithConsent(*consent(TOKENS, key=key), sender=user)


# ── To where it would be lost ──


@pytest.mark.parametrize("place", ["zero", "vault", "token"])
def test_recipient_that_cannot_send_on__every_way_out__refused(
    vault,
    token,
    project,
    platform,
    user,
    operator,
    meter,
    fund,
    request_exit,
    consent,
    settle,
    at,
    moves,
    place,
):
    """Tokens sent back to the vault would be a donation: owed to nobody, and in nobody's reach."""
    to = {"zero": ZERO_ADDRESS, "vault": vault.address, "token": token.address}[place]
    account = fund(2 * TOKENS)
    settle(Charge(account, 1, CENT))
    wrong = operator.deploy(project.PlainToken, 18)
    for source in (vault.depositAddress(platform, user, LABEL), vault.inbox(platform)):
        wrong.mint(source, 1, sender=user)
    at(request_exit(TOKENS))
    with moves():
        for call in (
            lambda: vault.finalizeExit(platform, user, LABEL, to, sender=user),
            lambda: vault.exitWithConsent(*consent(TOKENS // 2, to=to), sender=user),
            lambda: vault.setPayout(platform, to, sender=operator),
            lambda: vault.registerPlatform(OTHER, to, meter.address, DAY, sender=operator),
            lambda: vault.rescue(platform, user, LABEL, wrong, to, sender=user),
            lambda: vault.rescueFromInbox(platform, wrong, to, sender=operator),
        ):
            with reverts(vault.BadRecipient, to=to):
                call()
    assert vault.platformOf(vault.platformId(operator, OTHER)).owner == ZERO_ADDRESS
    assert wrong.balanceOf(to) == 0
