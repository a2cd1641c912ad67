"""EIP-712 digests of receipts and batches, their signatures, and canonical hashes of what they commit to.

Sources: EIP-712 (https://eips.ethereum.org/EIPS/eip-712), RFC 8785 (JSON Canonicalization Scheme).
Digests are built from joined 32-byte words: the golden vectors hold them against the contract and eth_account.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import coincurve
import rfc8785

from waterfall.errors import VerificationFailed
from waterfall.keccak import keccak
from waterfall.signers import address_of
from waterfall.types import Charge, RateCard, SignedReceipt, UsageReceipt

DOMAIN_NAME = "Waterfall CreditVault"
DOMAIN_VERSION = "1"

_DOMAIN_TYPE = keccak(b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)")
_CHARGE = b"Charge(bytes32 account,uint64 id,uint96 amount,bytes32 receiptHash)"
_CHARGE_TYPE = keccak(_CHARGE)
_SETTLEMENT_TYPE = keccak(b"Settlement(uint128 platform,Charge[] charges,uint40 deadline)" + _CHARGE)
_RECEIPT_TYPE = keccak(
    b"UsageReceipt(uint128 platform,bytes32 account,uint64 chargeId,bytes32 requestHash,bytes32 responseHash,"
    b"string model,uint64 inputTokens,uint64 cachedInputTokens,uint64 outputTokens,uint64 reasoningTokens,"
    b"bytes32 usageHash,bytes32 priceId,uint96 amount,uint40 issuedAt,bool complete)"
)
_HALF_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141 // 2


@dataclass(frozen=True)
class Domain:
    """The EIP-712 domain of one vault: signatures for it are worth nothing anywhere else."""

    chain_id: int
    vault: str
    separator: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        separator = keccak(
            _DOMAIN_TYPE
            + keccak(DOMAIN_NAME.encode())
            + keccak(DOMAIN_VERSION.encode())
            + _uint(self.chain_id)
            + bytes(12)
            + bytes.fromhex(self.vault[2:])
        )
        object.__setattr__(self, "separator", separator)

    def digest(self, struct_hash: bytes) -> bytes:
        """What is signed for a struct in this domain."""
        return keccak(b"\x19\x01" + self.separator + struct_hash)


def _uint(value: int) -> bytes:
    return value.to_bytes(32, "big")


def _word(hex_string: str) -> bytes:
    return bytes.fromhex(hex_string[2:])


def receipt_digest(domain: Domain, receipt: UsageReceipt) -> bytes:
    """EIP-712 digest of a receipt: what the meter signs and the charge's `receiptHash`."""
    return domain.digest(
        keccak(
            b"".join(
                (
                    _RECEIPT_TYPE,
                    _uint(receipt.platform),
                    _word(receipt.account),
                    _uint(receipt.charge_id),
                    _word(receipt.request_hash),
                    _word(receipt.response_hash),
                    keccak(receipt.model.encode()),
                    _uint(receipt.input_tokens),
                    _uint(receipt.cached_input_tokens),
                    _uint(receipt.output_tokens),
                    _uint(receipt.reasoning_tokens),
                    _word(receipt.usage_hash),
                    _word(receipt.price_id),
                    _uint(receipt.amount),
                    _uint(receipt.issued_at),
                    _uint(receipt.complete),
                )
            )
        )
    )


def settlement_digest(domain: Domain, platform: int, charges: Iterable[Charge], deadline: int) -> bytes:
    """EIP-712 digest of a batch: what the meter signs for `settle`."""
    hashes = b"".join(
        keccak(_CHARGE_TYPE + _word(c.account) + _uint(c.id) + _uint(c.amount) + _word(c.receipt_hash))
        for c in charges
    )
    return domain.digest(keccak(_SETTLEMENT_TYPE + _uint(platform) + keccak(hashes) + _uint(deadline)))


def recover(digest: bytes, signature: bytes) -> str:
    """Address that signed a digest; only the form the vault accepts: 65 bytes r ‖ s ‖ v, low s.

    Raises:
        VerificationFailed: malformed signature.
    """
    if len(signature) != 65 or signature[64] not in (27, 28):  # noqa: PLR2004 - r ‖ s ‖ v
        raise VerificationFailed(reason="the signature is not 65 bytes r ‖ s ‖ v")
    if int.from_bytes(signature[32:64], "big") > _HALF_ORDER:
        raise VerificationFailed(reason="the signature's s is in the upper half")
    try:
        key = coincurve.PublicKey.from_signature_and_message(
            signature[:64] + bytes([signature[64] - 27]), digest, hasher=None
        )
    except Exception:  # noqa: BLE001 - coincurve raises bare Exception
        raise VerificationFailed(reason="no key can have made the signature") from None
    return address_of(key.format(compressed=False))


def canonical_hash(value: Any) -> str:
    """keccak256 of a JSON value in its canonical form (RFC 8785), as hex.

    Numbers are doubles there: an integer beyond 2**53 (providers report nanoseconds) hashes as its nearest.

    Raises:
        ValueError: not a JSON value.
    """
    try:
        canonical = rfc8785.dumps(value)
    except rfc8785.IntegerDomainError:
        canonical = rfc8785.dumps(_with_doubles(value))
    return "0x" + keccak(canonical).hex()


def _with_doubles(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_doubles(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_doubles(item) for item in value]
    return float(value) if type(value) is int and abs(value) >= 2**53 else value


NO_USAGE = canonical_hash(None)
"""`usage_hash` of a receipt for an answer that had no usage object."""


def price_id(card: RateCard) -> str:
    """The receipt's `priceId` of a rate card."""
    return canonical_hash(card.model_dump(mode="json"))


def bytes_hash(data: bytes) -> str:
    """keccak256 of raw bytes, as hex: the receipt's `requestHash` and `responseHash`."""
    return "0x" + keccak(data).hex()


def check_signature(signed: SignedReceipt) -> None:
    """Check that digest, signature, usage and rate card of a receipt belong together, offline.

    Raises:
        VerificationFailed: with the first thing that differs.
    """
    digest = receipt_digest(Domain(signed.chain_id, signed.vault), signed.receipt)
    if signed.digest != "0x" + digest.hex():
        raise VerificationFailed(reason="the digest is not that of the receipt's fields")
    signer = recover(digest, _word(signed.signature))
    if signer != signed.meter:
        raise VerificationFailed(reason=f"it was signed by {signer}, not by the meter {signed.meter}")
    if signed.usage_removed:
        if signed.usage is not None or signed.receipt.usage_hash == NO_USAGE:
            raise VerificationFailed(reason="it is said to lack a usage object, which it has or never had")
    elif not _hashes_to(signed.usage, signed.receipt.usage_hash):
        raise VerificationFailed(reason="the usage object is not the one the receipt commits to")
    card = signed.rate_card.model_dump(mode="json") if signed.rate_card else None
    if not _hashes_to(card, signed.receipt.price_id):
        raise VerificationFailed(reason="the rate card is not the one the receipt commits to")


def _hashes_to(value: Any, expected: str) -> bool:
    try:
        return canonical_hash(value) == expected
    except (ValueError, OverflowError, RecursionError):  # no canonical form, so nothing commits to it
        return False
