"""What an account's owner sets, and from when on it binds. What it does to charges: test_settle_with_allowance.py."""

import pytest
from conftest import CENT, DAY, HOUR, LABEL, NO_CAP, NO_EXPIRY, SALT, USD, ZERO_ADDRESS
from reverts import reverts
from typed_data import Charge

NONE = (NO_CAP, NO_EXPIRY)


@pytest.fixture
def allowance(vault, platform, chain):
    """What binds, what is to bind and from when on; in a block of this timestamp or in the latest."""

    def allowance(account, timestamp=None):
        if timestamp is not None:
            chain.mine(timestamp=timestamp)
        view = vault.accountOf(platform, account)
        binds = view.allowance.cap, view.allowance.expiresAt
        return binds, (view.nextCap, view.nextExpiresAt), view.allowanceChangesAt

    return allowance


@pytest.fixture
def bound(set_allowance, chain):
    """Sets an allowance and waits until it binds."""

    def bound(cap=NO_CAP, expires_at=NO_EXPIRY):
        effective_at = set_allowance(cap, expires_at)
        chain.mine(timestamp=effective_at)
        return effective_at

    return bound


# ── The first ──


def test_set_allowance__never_set__nothing_binds(vault, platform, account, allowance):
    assert allowance(account) == (NONE, (0, 0), 0)
    view = vault.accountOf(platform, account)
    assert (view.allowance.spent, view.allowanceNonce) == (0, 0)


def test_set_allowance__first__binds_after_the_exit_delay(vault, platform, user, account, allowance, at, now):
    at(start := now() + 100)
    expires_at = start + 30 * DAY
    tx = vault.setAllowance(platform, user, LABEL, USD, expires_at, sender=user)
    assert tx.events == [
        vault.AllowanceSet(
            platform=platform,
            account=account,
            owner=user,
            label=LABEL,
            cap=USD,
            expiresAt=expires_at,
            effectiveAt=start + DAY,
            nonce=0,
        )
    ]
    new = USD, expires_at
    assert allowance(account) == (NONE, new, start + DAY)
    assert allowance(account, start + DAY - 1) == (NONE, new, start + DAY)
    assert allowance(account, start + DAY) == (new, new, 0)
    assert allowance(account, start + DAY + 1) == (new, new, 0)
    assert vault.accountOf(platform, account).allowanceNonce == 1


@pytest.mark.parametrize(("cap", "expires_at"), [(NO_CAP - 1, NO_EXPIRY), (NO_CAP, NO_EXPIRY - 1), (0, 0)])
def test_set_allowance__widest_and_narrowest__bind(account, set_allowance, allowance, cap, expires_at):
    effective_at = set_allowance(cap, expires_at)
    new = cap, expires_at
    assert allowance(account, effective_at - 1) == (NONE, new, effective_at)
    assert allowance(account, effective_at) == (new, new, 0)


@pytest.mark.parametrize("delay", [HOUR, 7 * DAY])
def test_set_allowance__another_exit_delay__the_platforms_own_counts(vault, register, user, delay):
    other = register(b"\x07" * 32, exit_delay=delay)
    tx = vault.setAllowance(other, user, LABEL, USD, NO_EXPIRY, sender=user)
    assert tx.events[0].effectiveAt == tx.timestamp + delay


# ── Changes ──


@pytest.mark.parametrize(
    "new",
    [
        (2 * USD, NO_EXPIRY - 3),
        (2 * USD, NO_EXPIRY),
        (NO_CAP, NO_EXPIRY - 2),
        (USD, NO_EXPIRY - 1),
    ],
)
def test_set_allowance__raised__binds_at_once(vault, platform, user, account, bound, allowance, new):
    bound(USD, NO_EXPIRY - 3)
    tx = vault.setAllowance(platform, user, LABEL, *new, sender=user)
    assert tx.events == [
        vault.AllowanceSet(
            platform=platform,
            account=account,
            owner=user,
            label=LABEL,
            cap=new[0],
            expiresAt=new[1],
            effectiveAt=tx.timestamp,
            nonce=1,
        )
    ]
    assert allowance(account) == (new, new, 0)


def test_set_allowance__the_same_again__binds_at_once_and_counts_as_a_change(
    vault, platform, account, bound, set_allowance, allowance, now
):
    bound(USD)
    assert set_allowance(USD) == now()
    assert allowance(account) == ((USD, NO_EXPIRY), (USD, NO_EXPIRY), 0)
    assert vault.accountOf(platform, account).allowanceNonce == 2


def test_set_allowance__lowered__binds_after_the_exit_delay(account, bound, set_allowance, allowance, now):
    bound(USD)
    old, new = (USD, NO_EXPIRY), (USD - 1, NO_EXPIRY)
    effective_at = set_allowance(*new)
    assert effective_at == now() + DAY
    assert allowance(account) == (old, new, effective_at)
    assert allowance(account, effective_at - 1) == (old, new, effective_at)
    assert allowance(account, effective_at) == (new, new, 0)


def test_set_allowance__expiry_earlier__binds_after_the_exit_delay(
    account, bound, set_allowance, allowance, now
):
    expires_at = now() + 30 * DAY
    bound(USD, expires_at)
    old, new = (USD, expires_at), (USD, expires_at - 1)
    effective_at = set_allowance(*new)
    assert effective_at == now() + DAY
    assert allowance(account, effective_at - 1) == (old, new, effective_at)
    assert allowance(account, effective_at) == (new, new, 0)


def test_set_allowance__cap_up_and_expiry_earlier__the_cap_at_once_the_expiry_later(
    account, bound, set_allowance, allowance, now
):
    expires_at = now() + 30 * DAY
    bound(USD, expires_at)
    new = 2 * USD, expires_at - DAY
    effective_at = set_allowance(*new)
    assert allowance(account) == ((2 * USD, expires_at), new, effective_at)
    assert allowance(account, effective_at - 1) == ((2 * USD, expires_at), new, effective_at)
    assert allowance(account, effective_at) == (new, new, 0)


def test_set_allowance__cap_down_and_expiry_later__the_expiry_at_once_the_cap_later(
    account, bound, set_allowance, allowance, now
):
    expires_at = now() + 30 * DAY
    bound(USD, expires_at)
    new = CENT, expires_at + DAY
    effective_at = set_allowance(*new)
    assert allowance(account) == ((USD, expires_at + DAY), new, effective_at)
    assert allowance(account, effective_at - 1) == ((USD, expires_at + DAY), new, effective_at)
    assert allowance(account, effective_at) == (new, new, 0)


# ── A change under way ──


def test_set_allowance__while_a_lowering_is_under_way__takes_its_place_and_restarts_the_delay(
    account, bound, set_allowance, allowance, at
):
    bound(USD)
    first = set_allowance(10 * CENT)
    at(first - 1)
    second = set_allowance(20 * CENT)
    assert second == first - 1 + DAY
    old, new = (USD, NO_EXPIRY), (20 * CENT, NO_EXPIRY)
    assert allowance(account, first) == (old, new, second)
    assert allowance(account, second - 1) == (old, new, second)
    assert allowance(account, second) == (new, new, 0)


def test_set_allowance__once_a_lowering_binds__the_next_starts_from_it(
    account, bound, set_allowance, allowance, at
):
    bound(USD)
    first = set_allowance(10 * CENT)
    at(first)
    assert set_allowance(20 * CENT) == first  # a raise, of what came to bind this second
    assert allowance(account) == ((20 * CENT, NO_EXPIRY), (20 * CENT, NO_EXPIRY), 0)


def test_set_allowance__lowered_again_once_a_lowering_binds__the_first_binds_meanwhile(
    account, bound, set_allowance, allowance, at
):
    bound(USD)
    first = set_allowance(10 * CENT)
    at(first)
    second = set_allowance(5 * CENT)
    middle, new = (10 * CENT, NO_EXPIRY), (5 * CENT, NO_EXPIRY)
    assert second == first + DAY
    assert allowance(account, second - 1) == (middle, new, second)
    assert allowance(account, second) == (new, new, 0)


def test_set_allowance__raised_while_a_lowering_is_under_way__the_lowering_is_off(
    account, bound, set_allowance, allowance, now
):
    bound(USD)
    effective_at = set_allowance(10 * CENT)
    new = 2 * USD, NO_EXPIRY
    assert set_allowance(*new) == now()
    assert allowance(account) == (new, new, 0)
    assert allowance(account, effective_at) == (new, new, 0)


def test_set_allowance__replaced_before_it_ever_bound__its_delay_begins_anew(
    account, set_allowance, allowance, at
):
    first = set_allowance(USD)
    at(first - 1)
    second = set_allowance(2 * USD)  # looser than the first, but nothing binds yet
    assert second == first - 1 + DAY
    assert allowance(account, second - 1) == (NONE, (2 * USD, NO_EXPIRY), second)
    assert allowance(account, second) == ((2 * USD, NO_EXPIRY), (2 * USD, NO_EXPIRY), 0)


# ── Removal ──


def test_set_allowance__both_maxima__removes_it_at_once(vault, platform, user, account, bound, allowance):
    bound(USD, NO_EXPIRY - 1)
    tx = vault.setAllowance(platform, user, LABEL, NO_CAP, NO_EXPIRY, sender=user)
    assert tx.events == [
        vault.AllowanceSet(
            platform=platform,
            account=account,
            owner=user,
            label=LABEL,
            cap=NO_CAP,
            expiresAt=NO_EXPIRY,
            effectiveAt=tx.timestamp,
            nonce=1,
        )
    ]
    assert allowance(account) == (NONE, NONE, 0)


def test_set_allowance__removed_before_it_bound__never_binds(account, set_allowance, allowance, now):
    effective_at = set_allowance(USD)
    assert set_allowance(*NONE) == now()
    assert allowance(account, effective_at) == (NONE, NONE, 0)


def test_set_allowance__removed_without_one__changes_the_nonce_alone(
    vault, platform, account, set_allowance, allowance, now
):
    assert set_allowance(*NONE) == now()
    assert allowance(account) == (NONE, NONE, 0)
    assert vault.accountOf(platform, account).allowanceNonce == 1


def test_set_allowance__after_removal__waits_as_the_first_did(account, bound, set_allowance, allowance, now):
    bound(USD)
    set_allowance(*NONE)
    effective_at = set_allowance(USD)
    assert effective_at == now() + DAY
    assert allowance(account, effective_at - 1) == (NONE, (USD, NO_EXPIRY), effective_at)
    assert allowance(account, effective_at) == ((USD, NO_EXPIRY), (USD, NO_EXPIRY), 0)


# ── Who ──


def test_set_allowance__not_the_account_owner__reverts(
    vault, platform, user, account, operator, stranger, relayer
):
    for caller in (operator, stranger, relayer):
        with reverts(vault.NotAccountOwner, account=account, caller=caller.address):
            vault.setAllowance(platform, user, LABEL, 0, 0, sender=caller)
    assert vault.accountOf(platform, account).allowanceNonce == 0


def test_set_allowance__held_account__the_platforms_owner_acts(
    vault, platform, operator, stranger, allowance
):
    account = vault.accountId(platform, ZERO_ADDRESS, LABEL)
    with reverts(vault.NotAccountOwner, account=account, caller=stranger.address):
        vault.setAllowance(platform, ZERO_ADDRESS, LABEL, USD, NO_EXPIRY, sender=stranger)
    tx = vault.setAllowance(platform, ZERO_ADDRESS, LABEL, USD, NO_EXPIRY, sender=operator)
    assert tx.events == [
        vault.AllowanceSet(
            platform=platform,
            account=account,
            owner=ZERO_ADDRESS,
            label=LABEL,
            cap=USD,
            expiresAt=NO_EXPIRY,
            effectiveAt=tx.timestamp + DAY,
            nonce=0,
        )
    ]
    assert allowance(account) == (NONE, (USD, NO_EXPIRY), tx.timestamp + DAY)


def test_set_allowance__held_account_of_a_platform_handed_over__the_new_owner_acts(
    vault, platform, operator, stranger
):
    account = vault.accountId(platform, ZERO_ADDRESS, LABEL)
    vault.transferPlatform(platform, stranger, sender=operator)
    vault.setAllowance(platform, ZERO_ADDRESS, LABEL, USD, NO_EXPIRY, sender=operator)
    vault.acceptPlatform(platform, sender=stranger)
    with reverts(vault.NotAccountOwner, account=account, caller=operator.address):
        vault.setAllowance(platform, ZERO_ADDRESS, LABEL, CENT, NO_EXPIRY, sender=operator)
    vault.setAllowance(platform, ZERO_ADDRESS, LABEL, CENT, NO_EXPIRY, sender=stranger)
    assert vault.accountOf(platform, account).allowanceNonce == 2


@pytest.mark.parametrize("held", [False, True])
def test_set_allowance__unknown_platform__reverts(vault, user, held):
    owner = ZERO_ADDRESS if held else user
    with reverts(vault.UnknownPlatform, platform=1):
        vault.setAllowance(1, owner, LABEL, USD, NO_EXPIRY, sender=user)


# ── What it leaves alone ──


def test_set_allowance__policy_exit_and_balance__untouched(
    vault, platform, fund, set_policy, request_exit, settle, set_allowance
):
    account = fund(10**6)
    set_policy(account, per_charge=USD, per_window=(USD, 2**32 - 1), expires_at=NO_EXPIRY)
    settle(Charge(account, 1, CENT))
    request_exit(400_000)
    untouched = (
        "balance",
        "spentInWindow",
        "window",
        "entries",
        "limits",
        "policy",
        "exitAmount",
        "exitMaturesAt",
    )
    before = vault.accountOf(platform, account)
    for change in ((USD, NO_EXPIRY), (2 * USD, NO_EXPIRY - 1), NONE):
        set_allowance(*change)
        after = vault.accountOf(platform, account)
        assert [getattr(after, name) for name in untouched] == [getattr(before, name) for name in untouched]


def test_set_allowance__other_accounts_of_the_owner__untouched(
    vault, platform, user, register, set_allowance
):
    twin = register(b"\x07" * 32)
    others = [
        (platform, vault.accountId(platform, user, SALT)),
        (twin, vault.accountId(twin, user, LABEL)),
    ]
    before = [vault.accountOf(*other) for other in others]
    set_allowance(0, 0)
    assert [vault.accountOf(*other) for other in others] == before


def test_set_allowance__hostile_platform__cannot_touch_anothers_account(
    vault, platform, account, register, stranger
):
    hostile = register(b"\x66" * 32, owner=stranger)
    vault.setAllowance(hostile, ZERO_ADDRESS, LABEL, 0, 0, sender=stranger)
    for id_ in (account, vault.accountId(platform, ZERO_ADDRESS, LABEL)):
        assert vault.accountOf(platform, id_).allowanceNonce == 0


def test_set_policy__allowance_and_exit__untouched(
    vault, platform, fund, bound, set_allowance, request_exit, set_policy
):
    account = fund(10**6)
    bound(USD)
    set_allowance(CENT)
    request_exit(400_000)
    names = (
        "balance",
        "exitAmount",
        "exitMaturesAt",
        "allowance",
        "nextCap",
        "nextExpiresAt",
        "allowanceChangesAt",
        "allowanceNonce",
    )
    before = vault.accountOf(platform, account)
    for policy in ({"per_charge": 1, "per_window": (1, HOUR), "expires_at": 1}, {}):
        set_policy(account, **policy)
        after = vault.accountOf(platform, account)
        assert [getattr(after, name) for name in names] == [getattr(before, name) for name in names]
