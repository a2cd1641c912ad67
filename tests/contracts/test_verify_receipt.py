import pytest
from conftest import CENT, CURVE_ORDER, ZERO_ADDRESS
from eth_utils import keccak
from hypothesis import given
from hypothesis import strategies as st
from settings import few
from typed_data import TYPES, Charge, digest, sign

VALUES = {
    "uint128": st.integers(0, 2**128 - 1),
    "uint96": st.integers(0, 2**96 - 1),
    "uint64": st.integers(0, 2**64 - 1),
    "uint40": st.integers(0, 2**40 - 1),
    "bytes32": st.binary(min_size=32, max_size=32),
    "string": st.text(max_size=80),
    "bool": st.booleans(),
}
RECEIPT = st.fixed_dictionaries({field: VALUES[kind] for field, kind in TYPES["UsageReceipt"]})


@pytest.fixture
def receipt(platform, account, now):
    return {
        "platform": platform,
        "account": account,
        "chargeId": 7,
        "requestHash": keccak(b"request"),
        "responseHash": keccak(b"response"),
        "model": "gemma-3-270m",
        "inputTokens": 120,
        "cachedInputTokens": 20,
        "outputTokens": 40,
        "reasoningTokens": 10,
        "usageHash": keccak(b"usage"),
        "priceId": keccak(b"price"),
        "amount": CENT,
        "issuedAt": now(),
        "complete": True,
    }


@pytest.fixture
def verify(vault, domain_of, meter):
    """Signs and checks a receipt: signer, valid at issue, valid now, used."""

    def verify(receipt, key=meter.key):
        signature = sign(key, domain_of(vault), "UsageReceipt", receipt)
        check = vault.verifyReceipt(receipt, signature)
        assert check.digest == digest(domain_of(vault), "UsageReceipt", receipt)
        return check.signer, check.validAtIssue, check.validNow, check.used

    return verify


@few
@given(receipt=RECEIPT)
def test_verify_receipt__any_receipt__digest_is_the_typed_data_digest(vault, domain_of, receipt):
    check = vault.verifyReceipt(receipt, b"")
    assert check.digest == digest(domain_of(vault), "UsageReceipt", receipt)


def test_verify_receipt__signed_by_a_meter__valid(verify, receipt, meter):
    assert verify(receipt) == (meter.address, True, True, False)


def test_verify_receipt__charged__used_and_its_log_holds_the_digest(
    vault, domain_of, verify, receipt, fund, settle, meter
):
    receipt_hash = digest(domain_of(vault), "UsageReceipt", receipt)
    account = fund(10**6)
    (log,) = settle(Charge(account, receipt["chargeId"], receipt["amount"], receipt_hash)).events
    assert (log.account, log.id, log.amount) == (receipt["account"], receipt["chargeId"], receipt["amount"])
    assert log.receiptHash == receipt_hash
    assert verify(receipt) == (meter.address, True, True, True)


def test_verify_receipt__unsigned_by_a_meter__names_the_signer(verify, receipt, other_meter):
    assert verify(receipt, other_meter.key) == (other_meter.address, False, False, False)


def test_verify_receipt__signed_by_a_meter_of_another_platform__invalid(
    verify, receipt, register, other_meter
):
    register(b"\x0b" * 32, meter=other_meter.address)
    assert verify(receipt, other_meter.key)[1:3] == (False, False)


def test_verify_receipt__issued_before_the_meter_was_added__invalid_at_issue(
    vault, platform, verify, receipt, meter
):
    added_at = vault.meterOf(platform, meter.address).addedAt
    assert verify({**receipt, "issuedAt": added_at - 1})[1:3] == (False, True)
    assert verify({**receipt, "issuedAt": added_at})[1:3] == (True, True)


def test_verify_receipt__meter_retired_since__valid_at_issue_only(
    vault, platform, operator, verify, receipt, meter, at, now
):
    retired_at = now() + 100
    at(retired_at)
    vault.retireMeter(platform, meter.address, 0, sender=operator)
    assert verify(receipt)[1:3] == (True, False)
    assert verify({**receipt, "issuedAt": retired_at - 1})[1:3] == (True, False)
    assert verify({**receipt, "issuedAt": retired_at})[1:3] == (False, False)


def test_verify_receipt__meter_compromised__void_from_that_second(
    vault, platform, operator, verify, receipt, meter, at, now
):
    since = now() + 50
    at(since + 50)
    vault.retireMeter(platform, meter.address, since, sender=operator)
    assert verify({**receipt, "issuedAt": since - 1})[1:3] == (True, False)
    assert verify({**receipt, "issuedAt": since})[1:3] == (False, False)
    assert verify({**receipt, "issuedAt": since + 1})[1:3] == (False, False)


def test_verify_receipt__one_field_differs__another_signer(vault, domain_of, receipt, meter):
    signature = sign(meter.key, domain_of(vault), "UsageReceipt", receipt)
    for field, value in receipt.items():
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, int):
            other = value + 1
        else:
            other = value + "x" if isinstance(value, str) else b"\x01" * 32
        check = vault.verifyReceipt({**receipt, field: other}, signature)
        assert check.signer != meter.address, field
        assert not check.validAtIssue


def test_verify_receipt__of_another_vault__another_signer(
    project, vault, token, admin, domain_of, receipt, meter
):
    other = admin.deploy(project.CreditVault, token)
    signature = sign(meter.key, domain_of(other), "UsageReceipt", receipt)
    assert vault.verifyReceipt(receipt, signature).signer != meter.address


def test_verify_receipt__malformed_signature__no_signer(vault, domain_of, receipt, meter):
    signature = sign(meter.key, domain_of(vault), "UsageReceipt", receipt)
    high_s = (CURVE_ORDER - int.from_bytes(signature[32:64], "big")).to_bytes(32, "big")
    flipped = bytes([55 - signature[64]])
    for malformed in (b"", signature[:64], bytes(65), signature + b"\x00", signature[:32] + high_s + flipped):
        check = vault.verifyReceipt(receipt, malformed)
        assert (check.signer, check.validAtIssue, check.validNow) == (ZERO_ADDRESS, False, False)
