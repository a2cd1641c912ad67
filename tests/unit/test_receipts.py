import json
from pathlib import Path

import pytest
import rfc8785
from eth_account import Account
from eth_account.messages import encode_typed_data
from eth_hash.auto import keccak
from hypothesis import given
from hypothesis import strategies as st
from making import ACCOUNT, METER, card, sign, word

from waterfall.errors import VerificationFailed
from waterfall.ledger.books import Hold
from waterfall.receipts import (
    Domain,
    bytes_hash,
    canonical_hash,
    check_signature,
    price_id,
    receipt_digest,
    recover,
    settlement_digest,
)
from waterfall.signers import LocalSigner
from waterfall.types import Charge, RateCard, SignedReceipt, UsageReceipt

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "digests.json").read_text())
DOMAIN = Domain(VECTORS["domain"]["chainId"], VECTORS["domain"]["verifyingContract"])
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
HELD = Hold(1, 2**32 + 1, "ab" * 16, ACCOUNT, 10, 0)


def snake(name):
    return "".join("_" + c.lower() if c.isupper() else c for c in name)


def receipt_of(message):
    fields = {snake(name): value for name, value in message.items()}
    integers = (
        "input_tokens",
        "cached_input_tokens",
        "output_tokens",
        "reasoning_tokens",
        "amount",
        "issued_at",
    )
    return UsageReceipt(**{**fields, **{name: int(fields[name]) for name in integers}})


def charge_of(message):
    fields = {snake(name): value for name, value in message.items()}
    return Charge(**{**fields, "amount": int(fields["amount"])})


def about(vector):
    return vector["about"]


# ── Golden vectors ───────────────────────────────────────────────────────────────────────────────────


def test_domain__golden_vector__same_separator():
    assert "0x" + DOMAIN.separator.hex() == VECTORS["domain"]["separator"]


@pytest.mark.parametrize("vector", VECTORS["receipts"], ids=about)
def test_receipt_digest__golden_vector__same_digest_and_signature(vector):
    digest = receipt_digest(DOMAIN, receipt_of(vector["message"]))
    assert "0x" + digest.hex() == vector["digest"]
    assert digest == DOMAIN.digest(bytes.fromhex(vector["structHash"][2:]))
    assert "0x" + LocalSigner(bytes.fromhex(VECTORS["key"][2:])).sign(digest).hex() == vector["signature"]
    assert recover(digest, bytes.fromhex(vector["signature"][2:])) == VECTORS["meter"]


@pytest.mark.parametrize("vector", VECTORS["settlements"], ids=about)
def test_settlement_digest__golden_vector__same_digest_and_signature(vector):
    message = vector["message"]
    charges = [charge_of(charge) for charge in message["charges"]]
    digest = settlement_digest(DOMAIN, int(message["platform"]), charges, int(message["deadline"]))
    assert "0x" + digest.hex() == vector["digest"]
    assert digest == DOMAIN.digest(bytes.fromhex(vector["structHash"][2:]))
    assert "0x" + LocalSigner(bytes.fromhex(VECTORS["key"][2:])).sign(digest).hex() == vector["signature"]


# ── Against eth_account ──────────────────────────────────────────────────────────────────────────────

WORDS = st.binary(min_size=32, max_size=32).map(lambda data: "0x" + data.hex())
TOKENS = st.integers(0, 2**63 - 1)
RECEIPTS = st.builds(
    UsageReceipt,
    platform=st.integers(0, 2**128 - 1),
    account=WORDS,
    charge_id=st.integers(0, 2**64 - 1),
    request_hash=WORDS,
    response_hash=WORDS,
    model=st.text(st.characters(exclude_categories=["Cs"])),
    input_tokens=TOKENS,
    cached_input_tokens=TOKENS,
    output_tokens=TOKENS,
    reasoning_tokens=TOKENS,
    usage_hash=WORDS,
    price_id=WORDS,
    amount=st.integers(0, 2**96 - 1),
    issued_at=st.integers(0, 2**40 - 1),
    complete=st.booleans(),
)
CHARGES = st.builds(
    Charge,
    account=WORDS,
    id=st.integers(0, 2**64 - 1),
    amount=st.integers(0, 2**96 - 1),
    receipt_hash=WORDS,
)
DOMAINS = st.builds(
    Domain,
    chain_id=st.integers(1, 2**64),
    vault=st.binary(min_size=20, max_size=20).map(lambda data: "0x" + data.hex()),
)
TYPES = {
    "UsageReceipt": [
        {"name": "platform", "type": "uint128"},
        {"name": "account", "type": "bytes32"},
        {"name": "chargeId", "type": "uint64"},
        {"name": "requestHash", "type": "bytes32"},
        {"name": "responseHash", "type": "bytes32"},
        {"name": "model", "type": "string"},
        {"name": "inputTokens", "type": "uint64"},
        {"name": "cachedInputTokens", "type": "uint64"},
        {"name": "outputTokens", "type": "uint64"},
        {"name": "reasoningTokens", "type": "uint64"},
        {"name": "usageHash", "type": "bytes32"},
        {"name": "priceId", "type": "bytes32"},
        {"name": "amount", "type": "uint96"},
        {"name": "issuedAt", "type": "uint40"},
        {"name": "complete", "type": "bool"},
    ],
    "Charge": [
        {"name": "account", "type": "bytes32"},
        {"name": "id", "type": "uint64"},
        {"name": "amount", "type": "uint96"},
        {"name": "receiptHash", "type": "bytes32"},
    ],
    "Settlement": [
        {"name": "platform", "type": "uint128"},
        {"name": "charges", "type": "Charge[]"},
        {"name": "deadline", "type": "uint40"},
    ],
}


def as_message(model):
    names = {snake(field["name"]): field for kind in ("UsageReceipt", "Charge") for field in TYPES[kind]}
    return {
        names[name]["name"]: bytes.fromhex(value[2:]) if names[name]["type"] == "bytes32" else value
        for name, value in model.model_dump().items()
    }


def typed_digest(domain, types, message):
    fields = {"name": "Waterfall CreditVault", "version": "1", "chainId": domain.chain_id}
    signable = encode_typed_data(
        {**fields, "verifyingContract": domain.vault}, {name: TYPES[name] for name in types}, message
    )
    return keccak(b"\x19" + signable.version + signable.header + signable.body)


@given(DOMAINS, RECEIPTS)
def test_receipt_digest__any_receipt__that_of_eth_account(domain, receipt):
    assert receipt_digest(domain, receipt) == typed_digest(domain, ["UsageReceipt"], as_message(receipt))


@given(DOMAINS, st.integers(0, 2**128 - 1), st.lists(CHARGES, max_size=5), st.integers(0, 2**40 - 1))
def test_settlement_digest__any_batch__that_of_eth_account(domain, platform, charges, deadline):
    message = {"platform": platform, "charges": [as_message(c) for c in charges], "deadline": deadline}
    expected = typed_digest(domain, ["Settlement", "Charge"], message)
    assert settlement_digest(domain, platform, iter(charges), deadline) == expected


# ── Signatures ───────────────────────────────────────────────────────────────────────────────────────


@given(st.binary(min_size=32, max_size=32))
def test_recover__signature_of_eth_account__its_address(digest):
    signed = Account.unsafe_sign_hash(digest, b"\xa1" * 32)
    assert recover(digest, bytes(signed.signature)) == METER.address


@pytest.mark.parametrize("length", [0, 64, 66])
def test_recover__another_length__is_refused(length):
    with pytest.raises(VerificationFailed, match="not 65 bytes"):
        recover(bytes(32), b"\x1b" * length)


@pytest.mark.parametrize("v", [0, 1, 26, 29, 255])
def test_recover__another_v__is_refused(v):
    signature = METER.sign(bytes(32))
    with pytest.raises(VerificationFailed, match="not 65 bytes"):
        recover(bytes(32), signature[:64] + bytes([v]))


def test_recover__high_s__is_refused_as_the_vault_does():
    signature = METER.sign(bytes(32))
    high = ORDER - int.from_bytes(signature[32:64], "big")
    twin = signature[:32] + high.to_bytes(32, "big") + bytes([55 - signature[64]])
    with pytest.raises(VerificationFailed, match="upper half"):
        recover(bytes(32), twin)


def test_recover__no_curve_point__is_refused():
    with pytest.raises(VerificationFailed, match="no key"):
        recover(bytes(32), bytes(64) + b"\x1b")


# ── Canonical hashes ─────────────────────────────────────────────────────────────────────────────────


def test_canonical_hash__order_of_keys__does_not_matter():
    assert canonical_hash({"b": 1, "a": [1.5, "ü", None]}) == canonical_hash({"a": [1.5, "ü", None], "b": 1})
    assert canonical_hash({"a": [1.5, "ü", None], "b": 1}) == bytes_hash(
        '{"a":[1.5,"ü",null],"b":1}'.encode()
    )


@given(st.integers(-(2**64), 2**64))
def test_canonical_hash__integer_beyond_a_double__hashes_as_the_nearest(number):
    expected = rfc8785.dumps({"at": [number if abs(number) < 2**53 else float(number)]})
    assert canonical_hash({"at": [number]}) == bytes_hash(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {1: 2}])
def test_canonical_hash__not_a_json_value__is_refused(value):
    with pytest.raises(ValueError):  # noqa: PT011 - whatever the reason
        canonical_hash(value)


def test_price_id__card_from_its_json__same_id():
    tariff = card("m", "0.150", "2.50")
    assert price_id(RateCard.model_validate_json(tariff.model_dump_json())) == price_id(tariff)
    assert price_id(tariff) != price_id(card("m", "0.151", "2.50"))


def test_bytes_hash__nothing__keccak_of_nothing():
    assert bytes_hash(b"") == "0xc5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"


# ── Whole receipts, offline ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def signed():
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.1}
    tariff = card()
    return sign(HELD, 5, usage=usage, price_id=price_id(tariff)).model_copy(update={"rate_card": tariff})


def test_check_signature__honest_receipt__passes(signed):
    check_signature(signed)
    check_signature(SignedReceipt.model_validate_json(signed.model_dump_json()))


def test_check_signature__cut_receipt_without_rate_card__passes():
    check_signature(sign(HELD, 5))


@pytest.mark.parametrize("name", sorted(UsageReceipt.model_fields))
def test_check_signature__any_field_changed__fails(signed, name):
    value = getattr(signed.receipt, name)
    changed = word("x") if str(value).startswith("0x") else value + "x" if name == "model" else value ^ 1
    forged = signed.receipt.model_copy(update={name: changed})
    with pytest.raises(VerificationFailed, match="digest is not that of"):
        check_signature(signed.model_copy(update={"receipt": forged}))


@pytest.mark.parametrize("change", [{"chain_id": 1}, {"vault": "0x" + "11" * 20}])
def test_check_signature__another_domain__fails(signed, change):
    with pytest.raises(VerificationFailed, match="digest is not that of"):
        check_signature(signed.model_copy(update=change))


def test_check_signature__another_meter__fails(signed):
    with pytest.raises(VerificationFailed, match="not by the meter"):
        check_signature(signed.model_copy(update={"meter": "0x" + "11" * 20}))


def test_check_signature__another_usage__fails(signed):
    with pytest.raises(VerificationFailed, match="usage object"):
        check_signature(signed.model_copy(update={"usage": {**signed.usage, "cost": 0.2}}))


def test_check_signature__usage_that_has_no_canonical_form__fails(signed):
    with pytest.raises(VerificationFailed, match="usage object"):
        check_signature(signed.model_copy(update={"usage": {"prompt_tokens": float("inf")}}))


@pytest.mark.parametrize("tariff", [None, card("m", "1", "3")])
def test_check_signature__another_rate_card__fails(signed, tariff):
    with pytest.raises(VerificationFailed, match="rate card"):
        check_signature(signed.model_copy(update={"rate_card": tariff}))
