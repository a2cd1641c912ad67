"""Allowances as a way not to pay, and as a limit that should hold."""

import pytest
from conftest import (
    ALLOWANCE_CAP,
    ALLOWANCE_EXPIRED,
    CENT,
    DAY,
    HOUR,
    LABEL,
    NO_CAP,
    NO_EXPIRY,
    TOKENS_PER_USD,
    USD,
    ZERO_ADDRESS,
)
from reverts import reverts
from typed_data import Charge, settlement, sign

TOKENS = TOKENS_PER_USD


@pytest.fixture
def allowance_of(vault, platform):
    """Cap, spent and expiry that bind now."""

    def allowance_of(account):
        allowance = vault.accountOf(platform, account).allowance
        return allowance.cap, allowance.spent, allowance.expiresAt

    return allowance_of


@pytest.fixture
def refused(vault):
    """Ids and reasons a transaction refused."""
    return lambda tx: [(log.id, log.reason) for log in tx.events.filter(vault.ChargeRejected)]


# ── Not to pay ──


@pytest.mark.parametrize("dodge", ["first", "first expiry", "lower", "expiry", "zero", "exit", "all"])
def test_dodge__change_between_the_call_and_its_settlement__the_debt_is_paid(
    vault, platform, user, fund, set_allowance, request_exit, settle, at, now, moves, dodge
):
    """Owes 60 cents for what was delivered, and changes what may be charged before the batch is mined."""
    account = fund(TOKENS)
    if dodge in {"lower", "expiry"}:
        set_allowance(USD, now() + 30 * DAY)
    changed_at = now() + 10
    at(changed_at)
    if dodge == "exit":
        request_exit(TOKENS)
    elif dodge == "all":
        request_exit(TOKENS)
        set_allowance(0, 0)
    else:
        set_allowance(
            *{
                "first": (CENT,),
                "first expiry": (NO_CAP, changed_at),
                "lower": (CENT, now() + 30 * DAY),
                "expiry": (USD, changed_at),
                "zero": (0, 0),
            }[dodge]
        )
    paid_from = {("exit", account) if dodge in {"exit", "all"} else account: -60 * CENT, platform: 60 * CENT}
    at(changed_at + DAY - 1)
    with moves(paid_from):
        settle(Charge(account, 1, 60 * CENT))


@pytest.mark.parametrize("change", ["first", "lower", "expiry", "zero"])
def test_dodge__once_the_delay_is_over__the_change_binds(
    vault, platform, fund, set_allowance, settle, at, now, moves, refused, change
):
    """The other side: from that second on nothing more is charged than the owner said."""
    account = fund(TOKENS)
    if change in {"lower", "expiry"}:
        set_allowance(USD, now() + 30 * DAY)
    changed_at = now() + 10
    at(changed_at)
    arguments = {
        "first": (CENT,),
        "lower": (CENT, now() + 30 * DAY),
        "expiry": (USD, changed_at),
        "zero": (0, 0),
    }[change]
    assert set_allowance(*arguments) == changed_at + DAY
    at(changed_at + DAY)
    with moves():
        tx = settle(Charge(account, 1, CENT + 1), Charge(account, 2, 2 * CENT))
    reason = ALLOWANCE_EXPIRED if change == "expiry" else ALLOWANCE_CAP
    assert refused(tx) == [(1, reason), (2, reason)]


def test_dodge__a_tightening_renewed_again_and_again__each_waits_the_whole_delay(
    vault, platform, account, fund, set_allowance, settle, at, now, moves
):
    """A later change must not bind on the timer of an earlier one."""
    fund(TOKENS)
    effective_at = set_allowance(90 * CENT)
    at(effective_at - 1)
    assert set_allowance(CENT) == effective_at - 1 + DAY
    at(effective_at)
    with moves({account: -95 * CENT, platform: 95 * CENT}):
        settle(Charge(account, 1, 95 * CENT))


def test_dodge__by_the_shortest_delay_there_is__a_batch_signed_before_still_settles(
    vault, register, user, domain_of, meter, fund, settle, at, now, moves
):
    """The delay is never shorter than a batch's deadline may be far."""
    platform = register(b"\x0c" * 32, exit_delay=HOUR)
    account = fund(TOKENS, platform=platform)
    deadline = now() + HOUR
    charges = (Charge(account, 1, 60 * CENT),)
    batch = sign(meter.key, domain_of(vault), "Settlement", settlement(platform, charges, deadline))
    at(now() + 1)
    vault.setAllowance(platform, user, LABEL, 0, 0, sender=user)
    vault.requestExit(platform, user, LABEL, TOKENS, sender=user)
    at(deadline)
    with moves({("exit", account): -60 * CENT, platform: 60 * CENT}):
        settle(*charges, platform=platform, deadline=deadline, signature=batch)


# ── Signatures ──


def test_raise__replayed_after_a_lowering__reverts(
    vault,
    account,
    user,
    stranger,
    fund,
    sign_allowance,
    set_allowance,
    settle,
    at,
    moves,
    allowance_of,
    refused,
):
    """The platform keeps the signature of the raise, and submits it when the owner has gone back on it."""
    fund(TOKENS)
    raised = sign_allowance(90 * CENT)
    vault.setAllowanceBySignature(*raised, sender=stranger)
    lowered_at = set_allowance(CENT)
    with moves(), reverts(vault.WrongAllowanceNonce, nonce=0, expected=2):
        vault.setAllowanceBySignature(*raised, sender=stranger)
    at(lowered_at)
    with moves():
        assert refused(settle(Charge(account, 1, 2 * CENT))) == [(1, ALLOWANCE_CAP)]
    assert allowance_of(account) == (CENT, 0, NO_EXPIRY)


def test_raise__signed_and_never_submitted__void_after_any_change(
    vault, user, stranger, fund, sign_allowance, set_allowance, moves
):
    """The owner takes a signature back by a change of the same values."""
    fund(TOKENS)
    set_allowance(CENT)
    raised = sign_allowance(90 * CENT)
    set_allowance(CENT)
    with moves(), reverts(vault.WrongAllowanceNonce, nonce=1, expected=2):
        vault.setAllowanceBySignature(*raised, sender=stranger)


@pytest.mark.parametrize("field", ["label", "owner", "cap", "expiresAt", "nonce", "deadline"])
def test_raise__one_argument_changed__reverts(
    vault, platform, account, user, stranger, fund, sign_allowance, moves, allowance_of, field
):
    fund(TOKENS)
    names = ["platform", "owner", "label", "cap", "expiresAt", "nonce", "deadline", "signature"]
    signed = dict(zip(names, sign_allowance(CENT, 2**40 - 2), strict=True))
    change, error = {
        "label": ({"label": b"\x0f" * 32}, vault.NotSignedByOwner),
        "owner": ({"owner": stranger.address}, vault.NotSignedByOwner),
        "cap": ({"cap": NO_CAP}, vault.NotSignedByOwner),
        "expiresAt": ({"expiresAt": NO_EXPIRY}, vault.NotSignedByOwner),
        "nonce": ({"nonce": 1}, vault.WrongAllowanceNonce),
        "deadline": ({"deadline": 2**40 - 1}, vault.NotSignedByOwner),
    }[field]
    with moves(), reverts(error):
        vault.setAllowanceBySignature(*(signed | change).values(), sender=stranger)
    assert allowance_of(account) == (NO_CAP, 0, NO_EXPIRY)
    assert vault.accountOf(platform, account).allowanceNonce == 0


def test_raise__by_the_platform_or_its_meter__reverts(
    vault, platform, account, user, operator, stranger, meter, fund, sign_allowance, set_allowance, at, moves
):
    """Those who would profit from it."""
    fund(TOKENS)
    at(set_allowance(CENT))
    with moves():
        for key in (operator.private_key, meter.key, stranger.private_key):
            with reverts(vault.NotSignedByOwner, account=account):
                vault.setAllowanceBySignature(*sign_allowance(key=key), sender=operator)
        with reverts(vault.NotAccountOwner, account=account, caller=operator.address):
            vault.setAllowance(platform, user, LABEL, NO_CAP, NO_EXPIRY, sender=operator)


def test_raise__of_a_contract_wallet_replayed__reverts(
    project, vault, platform, user, stranger, fund, sign_allowance, moves
):
    """Its contract would say yes to the same signature for ever."""
    wallet = stranger.deploy(project.ContractWallet, user)
    account = fund(TOKENS, owner=wallet)
    raised = sign_allowance(90 * CENT, owner=wallet, key=user.private_key)
    with moves():
        vault.setAllowanceBySignature(*raised, sender=stranger)
        with reverts(vault.WrongAllowanceNonce, nonce=0, expected=1):
            vault.setAllowanceBySignature(*raised, sender=stranger)
    assert vault.accountOf(platform, account).nextCap == 90 * CENT


# ── A limit that should hold ──


def test_spent_to_exactly_zero__then_charged__nothing_more(
    vault, platform, fund, set_allowance, settle, at, moves, refused, allowance_of
):
    """What is left is 0, and must not be read as unlimited."""
    account = fund(TOKENS)
    at(set_allowance(30 * CENT))
    with moves({account: -30 * CENT, platform: 30 * CENT}):
        settle(Charge(account, 1, 30 * CENT))
    assert allowance_of(account) == (30 * CENT, 30 * CENT, NO_EXPIRY)
    assert vault.available(platform, account) == 0
    with moves():
        tx = settle(Charge(account, 2, 1), Charge(account, 3, 2**96 - 1), Charge(account, 4, 70 * CENT))
    assert refused(tx) == [(2, ALLOWANCE_CAP), (3, ALLOWANCE_CAP), (4, ALLOWANCE_CAP)]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [((0, NO_EXPIRY), ALLOWANCE_CAP), ((NO_CAP, 0), ALLOWANCE_EXPIRED), ((0, 0), ALLOWANCE_CAP)],
)
def test_limit_of_zero__charged__nothing(
    vault, platform, fund, set_allowance, settle, at, moves, refused, limits, reason
):
    account = fund(TOKENS)
    at(set_allowance(*limits))
    with moves():
        tx = settle(Charge(account, 1, 1), Charge(account, 2, CENT))
    assert refused(tx) == [(1, reason), (2, reason)]
    assert vault.available(platform, account) == 0


def test_several_charges_in_a_batch__together_beyond_the_cap__not_made(
    platform, fund, set_allowance, settle, at, moves, refused
):
    account = fund(TOKENS)
    at(set_allowance(30 * CENT))
    with moves({account: -20 * CENT, platform: 20 * CENT}):
        tx = settle(*(Charge(account, number, 20 * CENT) for number in (1, 2, 3)))
    assert refused(tx) == [(2, ALLOWANCE_CAP), (3, ALLOWANCE_CAP)]


def test_removed_and_set_again__spent_stays_counted(
    vault, platform, user, fund, set_allowance, settle, at, moves, refused, allowance_of
):
    """The platform cannot win by it: a cap that was used up is used up."""
    account = fund(TOKENS)
    at(set_allowance(30 * CENT))
    settle(Charge(account, 1, 30 * CENT))
    set_allowance()
    assert allowance_of(account) == (NO_CAP, 30 * CENT, NO_EXPIRY)
    at(set_allowance(30 * CENT))
    with moves():
        assert refused(settle(Charge(account, 2, 1))) == [(2, ALLOWANCE_CAP)]


def test_set_policy__over_an_allowance_and_a_pending_exit__both_stay(
    vault,
    platform,
    user,
    fund,
    set_policy,
    set_allowance,
    request_exit,
    settle,
    at,
    moves,
    refused,
    allowance_of,
):
    """The platform rewrites the word in which the owner's flags are."""
    account = fund(TOKENS)
    at(set_allowance(30 * CENT))
    settle(Charge(account, 1, 10 * CENT))
    tightens_at = set_allowance(20 * CENT)
    matures_at = request_exit(TOKENS // 2)
    before = vault.accountOf(platform, account)
    with moves():
        set_policy(account, per_charge=0, per_window=(0, 60), expires_at=0)
        set_policy(account, per_charge=2**80 - 1, per_window=(2**80 - 1, 2**32 - 1), expires_at=2**40 - 1)
        set_policy(account)
    after = vault.accountOf(platform, account)
    assert after.limits == 0
    for field in (
        *("allowance", "nextCap", "nextExpiresAt", "allowanceChangesAt", "allowanceNonce"),
        *("balance", "exitAmount", "exitMaturesAt"),
    ):
        assert getattr(after, field) == getattr(before, field), field
    at(tightens_at - 1)
    with moves({account: -20 * CENT, platform: 20 * CENT}):
        tx = settle(Charge(account, 2, 20 * CENT + 1), Charge(account, 3, 20 * CENT))
    assert refused(tx) == [(2, ALLOWANCE_CAP)]
    at(matures_at)
    with moves({("exit", account): -50 * CENT, vault: -TOKENS // 2, user: TOKENS // 2}):
        vault.finalizeExit(platform, user, LABEL, user, sender=user)


def test_platform_held_account__allowance_by_a_stranger__reverts(
    vault, platform, operator, stranger, fund, sign_allowance, moves
):
    """`owner` 0 must not be anybody, nor the key that a malformed signature recovers to."""
    account = fund(TOKENS, owner=ZERO_ADDRESS)
    signed = sign_allowance(0, 0, owner=ZERO_ADDRESS, key=stranger.private_key)
    with moves():
        for signature in (signed[-1], b"", bytes(65), bytes(64) + b"\x1b"):
            with reverts(vault.NotSignedByOwner, account=account, owner=operator.address):
                vault.setAllowanceBySignature(*signed[:-1], signature, sender=stranger)
        with reverts(vault.NotAccountOwner, account=account, caller=stranger.address):
            vault.setAllowance(platform, ZERO_ADDRESS, LABEL, 0, 0, sender=stranger)
    assert vault.accountOf(platform, account).allowanceNonce == 0
