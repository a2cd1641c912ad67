"""Signatures offered where they were not meant: another chain, vault, platform or type, or in another form.

One key signs everything here, as meter, platform owner and account owner at once: nothing but what it signed tells
one signature from another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from conftest import CENT, CURVE_ORDER, DAY, HOUR, LABEL, MINUTE, NONCE, SALT, TOKENS_PER_USD, ZERO_ADDRESS
from reverts import reverts
from typed_data import Charge, settlement, sign

TYPES = ["Settlement", "Voiding", "InboxBooking", "ExitConsent", "AllowanceChange", "UsageReceipt"]
EVERYONES = b"\x0d" * 32


class Document(NamedTuple):
    """Something to sign, and how it is submitted."""

    message: dict[str, Any]
    submit: Callable[[bytes], Any]


@pytest.fixture
def everyones(register, user):
    """A platform of the user's, whose meter the user's key is."""
    return register(EVERYONES, owner=user, payout=user, meter=user.address)


@pytest.fixture
def documents(vault, token, admin, user, everyones, fund, now):
    """One of each type, all of them good if signed; the account has a dollar and the inbox another."""
    funded = fund(TOKENS_PER_USD, platform=everyones)
    token.mint(vault.inbox(everyones), TOKENS_PER_USD, sender=admin)
    deadline, charges, ids = now() + 5 * MINUTE, (Charge(funded, 1, CENT),), [2, 3]
    booking = {"payer": user.address, "nonce": NONCE, "tokens": 10}
    consent = {"tokens": 10, "to": user.address, "nonce": NONCE}
    change = {"cap": 5, "expiresAt": deadline + DAY, "nonce": 0}
    receipt = {
        "account": funded,
        "chargeId": 1,
        "requestHash": SALT,
        "responseHash": SALT,
        "model": "m",
        "inputTokens": 1,
        "cachedInputTokens": 1,
        "outputTokens": 1,
        "reasoningTokens": 1,
        "usageHash": SALT,
        "priceId": SALT,
        "amount": CENT,
        "issuedAt": now(),
        "complete": True,
    }
    end = {"deadline": deadline}

    def documents(platform=everyones, vault=vault):
        its = {"platform": platform, "account": vault.accountId(platform, user, LABEL)}
        at = {"platform": platform}
        return {
            "Settlement": Document(
                settlement(platform, charges, deadline),
                lambda signature: vault.settle(platform, charges, deadline, signature, sender=user),
            ),
            "Voiding": Document(
                at | {"ids": ids} | end,
                lambda signature: vault.voidCharges(platform, ids, deadline, signature, sender=user),
            ),
            "InboxBooking": Document(
                at | booking | end,
                lambda signature: vault.bookInbox(
                    platform, *booking.values(), deadline, signature, sender=user
                ),
            ),
            "ExitConsent": Document(
                its | consent | end,
                lambda signature: vault.exitWithConsent(
                    platform, user, LABEL, *consent.values(), deadline, signature, sender=user
                ),
            ),
            "AllowanceChange": Document(
                its | change | end,
                lambda signature: vault.setAllowanceBySignature(
                    platform, user, LABEL, *change.values(), deadline, signature, sender=user
                ),
            ),
            "UsageReceipt": Document(
                at | receipt,
                lambda signature: vault.verifyReceipt({"platform": platform, **receipt}, signature),
            ),
        }

    return documents


@pytest.fixture
def signed(domain_of, vault, user):
    """The user's signature of a document."""

    def signed(primary, document, domain=None):
        return sign(user.private_key, domain or domain_of(vault), primary, document.message)

    return signed


def refuses(vault, primary, document, signature):
    """Well-formed, and of the right key for another thing: seen as of an unknown key."""
    if primary == "UsageReceipt":
        check = document.submit(signature)
        assert not check.validAtIssue
        assert not check.validNow
        assert check.signer != ZERO_ADDRESS
        return
    refusal = vault.NotSignedByOwner if primary == "AllowanceChange" else vault.NotAMeter
    with reverts(refusal):
        document.submit(signature)


def accepts(primary, document, signature):
    answer = document.submit(signature)
    if primary == "UsageReceipt":
        assert answer.validNow
    else:
        assert answer.events


# ── For something else ──


@pytest.mark.parametrize("primary", TYPES)
def test_signature_of_another_chain__same_vault_address__refused(
    vault, documents, signed, elsewhere, isolate, moves, primary
):
    """Signed and good on the other chain, then offered here; and signed here, offered there."""
    document = documents()[primary]
    here = signed(primary, document)
    with isolate(), elsewhere() as its_domain_of:
        there = signed(primary, document, its_domain_of(vault))
        with moves():
            refuses(vault, primary, document, here)
        accepts(primary, document, there)
    with moves():
        refuses(vault, primary, document, there)
    accepts(primary, document, here)


@pytest.mark.parametrize("primary", TYPES)
def test_signature_for_another_vault__same_platform_and_token__refused(
    project, vault, token, admin, user, register, domain_of, documents, signed, everyones, moves, primary
):
    other = admin.deploy(project.CreditVault, token)
    assert register(EVERYONES, vault=other, owner=user, payout=user, meter=user.address) == everyones
    document = documents()[primary]
    with moves():
        refuses(vault, primary, document, signed(primary, document, domain_of(other)))
        refuses(other, primary, documents(vault=other)[primary], signed(primary, document))
    assert token.balanceOf(other) == 0
    accepts(primary, document, signed(primary, document))


@pytest.mark.parametrize("primary", TYPES)
def test_signature_for_another_platform__same_key__refused(
    vault, register, user, documents, signed, moves, primary
):
    other = register(SALT, owner=user, payout=user, meter=user.address)
    document = documents()[primary]
    with moves():
        refuses(vault, primary, documents(other)[primary], signed(primary, document))
        refuses(vault, primary, document, signed(primary, documents(other)[primary]))
    accepts(primary, document, signed(primary, document))


@pytest.mark.parametrize("primary", TYPES)
def test_signature_of_another_type__same_key__refused(vault, documents, signed, moves, primary):
    each = documents()
    with moves():
        for offered in TYPES:
            if offered != primary:
                refuses(vault, primary, each[primary], signed(offered, each[offered]))
    accepts(primary, each[primary], signed(primary, each[primary]))


@pytest.mark.parametrize("primary", TYPES)
def test_signature_of_the_token__same_key__refused(
    vault, token_domain, documents, user, now, everyones, moves, primary
):
    """What the key signed as a payer, offered as what it signs as a meter or an owner."""
    payment = {
        "from": user.address,
        "to": vault.inbox(everyones),
        "value": 10,
        "validAfter": 0,
        "validBefore": now() + HOUR,
        "nonce": NONCE,
    }
    permit = {
        "owner": user.address,
        "spender": vault.address,
        "value": 10,
        "nonce": 0,
        "deadline": now() + HOUR,
    }
    document = documents()[primary]
    with moves():
        for kind, message in (
            ("TransferWithAuthorization", payment),
            ("ReceiveWithAuthorization", payment),
            ("CancelAuthorization", {"authorizer": user.address, "nonce": NONCE}),
            ("Permit", permit),
        ):
            refuses(vault, primary, document, sign(user.private_key, token_domain, kind, message))


# ── In another form ──


def high_s(signature):
    s = CURVE_ORDER - int.from_bytes(signature[32:64], "big")
    return signature[:32] + s.to_bytes(32, "big") + bytes([55 - signature[64]])


def compact(signature):
    """EIP-2098: 64 bytes, v in the highest bit of s."""
    vs = int.from_bytes(signature[32:64], "big") | (signature[64] - 27) << 255
    return signature[:32] + vs.to_bytes(32, "big")


def malformed(vault, signature):
    """Each with the error of OpenZeppelin's ECDSA for it."""
    return [
        (high_s(signature), vault.ECDSAInvalidSignatureS),
        (compact(signature), vault.ECDSAInvalidSignatureLength),
        (signature + b"\x00", vault.ECDSAInvalidSignatureLength),
        (b"", vault.ECDSAInvalidSignatureLength),
        (bytes(64), vault.ECDSAInvalidSignatureLength),
        (bytes(65), vault.ECDSAInvalidSignature),
        (bytes(64) + b"\x1b", vault.ECDSAInvalidSignature),
        (signature[:64] + bytes([signature[64] - 27]), vault.ECDSAInvalidSignature),
    ]


@pytest.mark.parametrize("primary", TYPES)
def test_malformed_signature__high_s_or_compact_or_zero__refused(vault, documents, signed, moves, primary):
    """A second form of a good signature, or one that is nobody's."""
    document = documents()[primary]
    good = signed(primary, document)
    with moves():
        for bad, error in malformed(vault, good):
            if primary == "UsageReceipt":
                check = document.submit(bad)
                assert (check.signer, check.validAtIssue, check.validNow) == (ZERO_ADDRESS, False, False)
            else:
                with reverts(vault.NotSignedByOwner if primary == "AllowanceChange" else error):
                    document.submit(bad)
    accepts(primary, document, good)


@pytest.mark.parametrize("primary", ["InboxBooking", "ExitConsent", "AllowanceChange"])
def test_second_form__of_a_signature_that_was_used__moves_nothing_again(
    vault, documents, signed, moves, primary
):
    document = documents()[primary]
    good = signed(primary, document)
    document.submit(good)
    spent = {
        "InboxBooking": vault.AlreadyBooked,
        "ExitConsent": vault.ConsentUsed,
        "AllowanceChange": vault.WrongAllowanceNonce,
    }[primary]
    with moves():
        with reverts(spent):
            document.submit(good)
        for form, error in malformed(vault, good)[:2]:
            with reverts(spent if primary == "AllowanceChange" else error):
                document.submit(form)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (high_s, "ECRecover: invalid signature 's' value"),
        (compact, "ECRecover: invalid signature length"),
        (lambda _: bytes(65), "ECRecover: invalid signature 'v' value"),
        (lambda _: bytes(64) + b"\x1b", "ECRecover: invalid signature"),
    ],
)
def test_malformed_signature__of_a_payer__refused_by_the_token(
    vault, token_domain, platform, user, payer, pay_inbox, relayer, now, moves, form, reason
):
    *payment, signature = pay_inbox()
    before = now() + HOUR
    message = {
        "from": payer.address,
        "to": vault.address,
        "value": TOKENS_PER_USD,
        "validAfter": 0,
        "validBefore": before,
        "nonce": vault.depositNonce(platform, user, LABEL, SALT),
    }
    authorization = sign(payer.key, token_domain, "ReceiveWithAuthorization", message)
    with moves():
        with reverts(reason):
            vault.depositFromInbox(*payment, form(signature), sender=relayer)
        with reverts(reason):
            vault.depositWithAuthorization(
                *(platform, user, LABEL, payer.address, TOKENS_PER_USD, 0, before, SALT, form(authorization)),
                sender=relayer,
            )
