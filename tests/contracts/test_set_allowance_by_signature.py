import pytest
from conftest import CENT, CURVE_ORDER, DAY, LABEL, NO_CAP, NO_EXPIRY, SALT, USD, ZERO_ADDRESS
from reverts import reverts
from typed_data import Charge

NAMES = ["platform", "owner", "label", "cap", "expires_at", "nonce", "deadline", "signature"]


def changed(arguments, **changes):
    return [changes.get(name, value) for name, value in zip(NAMES, arguments, strict=True)]


@pytest.fixture
def nonce_of(vault, platform):
    return lambda account: vault.accountOf(platform, account).allowanceNonce


@pytest.fixture
def wallet(project, admin, user):
    """A contract for which the user's key speaks."""
    return admin.deploy(project.ContractWallet, user)


# ── What it does ──


def test_set_allowance_by_signature__submitted_by_anybody__as_if_the_owner_had_sent_it(
    vault, platform, user, account, stranger, sign_allowance, now
):
    expires_at = now() + 30 * DAY
    tx = vault.setAllowanceBySignature(*sign_allowance(USD, expires_at), sender=stranger)
    assert tx.events == [
        vault.AllowanceSet(
            platform=platform,
            account=account,
            owner=user,
            label=LABEL,
            cap=USD,
            expiresAt=expires_at,
            effectiveAt=tx.timestamp + DAY,
            nonce=0,
        )
    ]
    view = vault.accountOf(platform, account)
    assert tuple(view.allowance) == (NO_CAP, 0, NO_EXPIRY)
    assert (view.nextCap, view.nextExpiresAt) == (USD, expires_at)
    assert (view.allowanceChangesAt, view.allowanceNonce) == (tx.timestamp + DAY, 1)


def test_set_allowance_by_signature__raise_and_removal__at_once(
    vault, platform, account, relayer, set_allowance, sign_allowance, at
):
    at(set_allowance(USD) + 1)
    for nonce, cap in ((1, 2 * USD), (2, NO_CAP)):
        tx = vault.setAllowanceBySignature(*sign_allowance(cap), sender=relayer)
        assert (tx.events[0].nonce, tx.events[0].effectiveAt) == (nonce, tx.timestamp)
        assert vault.accountOf(platform, account).allowance.cap == cap


def test_set_allowance_by_signature__balance_policy_and_exit__untouched(
    vault, platform, relayer, fund, set_policy, request_exit, settle, sign_allowance
):
    account = fund(10**6)
    set_policy(account, per_charge=USD, per_window=(USD, 2**32 - 1))
    settle(Charge(account, 1, CENT))
    request_exit(400_000)
    before = tuple(vault.accountOf(platform, account))[:8]
    vault.setAllowanceBySignature(*sign_allowance(0, 0), sender=relayer)
    assert tuple(vault.accountOf(platform, account))[:8] == before


# ── Who signs ──


def test_set_allowance_by_signature__contract_wallet__its_word_counts(
    vault, platform, wallet, relayer, sign_allowance, nonce_of
):
    vault.setAllowanceBySignature(*sign_allowance(USD, owner=wallet.address), sender=relayer)
    assert nonce_of(vault.accountId(platform, wallet.address, LABEL)) == 1


def test_set_allowance_by_signature__contract_wallet_does_not_agree__reverts(
    vault, platform, wallet, stranger, relayer, sign_allowance
):
    account = vault.accountId(platform, wallet.address, LABEL)
    with reverts(vault.NotSignedByOwner, account=account, owner=wallet.address):
        vault.setAllowanceBySignature(
            *sign_allowance(USD, owner=wallet.address, key=stranger.private_key), sender=relayer
        )


def test_set_allowance_by_signature__key_with_code__signs_still_and_so_does_its_code(
    project, vault, chain, admin, account, user, other_meter, relayer, sign_allowance, nonce_of
):
    # As with a delegation of EIP-7702: the code answers for another key.
    wallet = admin.deploy(project.ContractWallet, other_meter.address)
    code = chain.provider.get_code(wallet.address)
    chain.provider.make_request("anvil_setCode", [user.address, code.to_0x_hex()])
    vault.setAllowanceBySignature(*sign_allowance(USD), sender=relayer)
    vault.setAllowanceBySignature(*sign_allowance(2 * USD, key=other_meter.key), sender=relayer)
    assert nonce_of(account) == 2


@pytest.mark.parametrize("signer", ["operator", "meter", "stranger"])
def test_set_allowance_by_signature__another_key__reverts(
    vault, user, account, operator, meter, stranger, sign_allowance, nonce_of, signer
):
    key = {"operator": operator.private_key, "meter": meter.key, "stranger": stranger.private_key}[signer]
    with reverts(vault.NotSignedByOwner, account=account, owner=user.address):
        vault.setAllowanceBySignature(*sign_allowance(USD, key=key), sender=user)  # the sender is nobody
    assert nonce_of(account) == 0


def test_set_allowance_by_signature__held_account__the_platforms_owner_signs(
    vault, platform, operator, user, relayer, sign_allowance
):
    account = vault.accountId(platform, ZERO_ADDRESS, LABEL)
    with reverts(vault.NotSignedByOwner, account=account, owner=operator.address):
        vault.setAllowanceBySignature(*sign_allowance(USD, owner=ZERO_ADDRESS), sender=relayer)
    arguments = sign_allowance(USD, owner=ZERO_ADDRESS, key=operator.private_key)
    tx = vault.setAllowanceBySignature(*arguments, sender=relayer)
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


def test_set_allowance_by_signature__held_account_of_a_platform_handed_over__the_new_owner_signs(
    vault, platform, operator, stranger, relayer, sign_allowance, nonce_of
):
    account = vault.accountId(platform, ZERO_ADDRESS, LABEL)
    signed_before = sign_allowance(USD, owner=ZERO_ADDRESS, key=operator.private_key)
    vault.transferPlatform(platform, stranger, sender=operator)
    vault.acceptPlatform(platform, sender=stranger)
    with reverts(vault.NotSignedByOwner, account=account, owner=stranger.address):
        vault.setAllowanceBySignature(*signed_before, sender=relayer)
    vault.setAllowanceBySignature(
        *sign_allowance(USD, owner=ZERO_ADDRESS, key=stranger.private_key), sender=relayer
    )
    assert nonce_of(account) == 1


def test_set_allowance_by_signature__held_account__a_signature_that_recovers_nobody_is_not_its_owners(
    vault, platform, operator, relayer, sign_allowance
):
    account = vault.accountId(platform, ZERO_ADDRESS, LABEL)
    arguments = sign_allowance(USD, owner=ZERO_ADDRESS, key=operator.private_key)
    with reverts(vault.NotSignedByOwner, account=account, owner=operator.address):
        vault.setAllowanceBySignature(*changed(arguments, signature=bytes(65)), sender=relayer)


# ── What is signed ──


@pytest.mark.parametrize("name", ["cap", "expires_at", "deadline", "label", "owner"])
def test_set_allowance_by_signature__anything_else_than_signed__reverts(
    vault, platform, user, stranger, relayer, sign_allowance, now, name
):
    other = {
        "cap": USD + 1,
        "expires_at": NO_EXPIRY - 1,
        "deadline": now() + 2 * DAY,
        "label": SALT,
        "owner": stranger.address,
    }[name]
    arguments = changed(sign_allowance(USD), **{name: other})
    owner, label = arguments[1], arguments[2]
    account = vault.accountId(platform, owner, label)
    with reverts(vault.NotSignedByOwner, account=account, owner=getattr(owner, "address", owner)):
        vault.setAllowanceBySignature(*arguments, sender=relayer)


def test_set_allowance_by_signature__another_platform__reverts(
    vault, user, relayer, register, sign_allowance
):
    twin = register(b"\x07" * 32)
    with reverts(vault.NotSignedByOwner, account=vault.accountId(twin, user, LABEL), owner=user.address):
        vault.setAllowanceBySignature(*changed(sign_allowance(USD), platform=twin), sender=relayer)


def test_set_allowance_by_signature__another_vault__reverts(
    project, vault, token, admin, user, account, register, relayer, sign_allowance
):
    other = admin.deploy(project.CreditVault, token)
    register(SALT, vault=other)
    with reverts(vault.NotSignedByOwner, account=account, owner=user.address):
        vault.setAllowanceBySignature(*sign_allowance(USD, vault=other), sender=relayer)
    other.setAllowanceBySignature(*sign_allowance(USD, vault=other), sender=relayer)


def test_set_allowance_by_signature__malformed__reverts(vault, user, account, relayer, sign_allowance):
    arguments = sign_allowance(USD)
    signature = arguments[-1]
    r, s, v = signature[:32], int.from_bytes(signature[32:64], "big"), signature[64]
    high_s = r + (CURVE_ORDER - s).to_bytes(32, "big") + bytes([55 - v])
    for malformed in (b"", signature[:64], bytes(65), signature + b"\x00", high_s, signature[:64] + b"\x00"):
        with reverts(vault.NotSignedByOwner, account=account, owner=user.address):
            vault.setAllowanceBySignature(*changed(arguments, signature=malformed), sender=relayer)
    vault.setAllowanceBySignature(*arguments, sender=relayer)


# ── Once, and in time ──


def test_set_allowance_by_signature__twice__reverts(vault, relayer, sign_allowance):
    arguments = sign_allowance(USD)
    vault.setAllowanceBySignature(*arguments, sender=relayer)
    with reverts(vault.WrongAllowanceNonce, nonce=0, expected=1):
        vault.setAllowanceBySignature(*arguments, sender=relayer)


def test_set_allowance_by_signature__of_a_later_change__reverts(vault, relayer, sign_allowance):
    with reverts(vault.WrongAllowanceNonce, nonce=1, expected=0):
        vault.setAllowanceBySignature(*sign_allowance(USD, nonce=1), sender=relayer)


def test_set_allowance_by_signature__any_change_since__voids_it(
    vault, relayer, set_allowance, sign_allowance
):
    arguments = sign_allowance(2 * USD)
    set_allowance()
    with reverts(vault.WrongAllowanceNonce, nonce=0, expected=1):
        vault.setAllowanceBySignature(*arguments, sender=relayer)


def test_set_allowance_by_signature__change_of_another_account__does_not_void_it(
    vault, relayer, account, set_allowance, sign_allowance, nonce_of
):
    arguments = sign_allowance(USD)
    set_allowance(USD, label=SALT)
    vault.setAllowanceBySignature(*arguments, sender=relayer)
    assert nonce_of(account) == 1


def test_set_allowance_by_signature__around_the_deadline__its_last_second_counts(
    vault, relayer, account, sign_allowance, nonce_of, at, now, isolate
):
    deadline = now() + 100
    arguments = sign_allowance(USD, deadline=deadline)
    for timestamp in (deadline - 1, deadline):
        with isolate():
            at(timestamp)
            vault.setAllowanceBySignature(*arguments, sender=relayer)
            assert nonce_of(account) == 1
    at(deadline + 1)
    with reverts(vault.DeadlinePassed, deadline=deadline, timestamp=deadline + 1):
        vault.setAllowanceBySignature(*arguments, sender=relayer)


def test_set_allowance_by_signature__deadline_far_ahead__accepted(
    vault, relayer, account, sign_allowance, nonce_of
):
    vault.setAllowanceBySignature(*sign_allowance(USD, deadline=2**40 - 1), sender=relayer)
    assert nonce_of(account) == 1


def test_set_allowance_by_signature__unknown_platform__reverts(vault, user, relayer, sign_allowance):
    for owner in (user, ZERO_ADDRESS):
        with reverts(vault.UnknownPlatform, platform=1):
            vault.setAllowanceBySignature(*sign_allowance(USD, platform=1, owner=owner), sender=relayer)
