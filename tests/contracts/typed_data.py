"""EIP-712 as wallets do it, through eth_account's own encoder: the vault's hashing is checked against another's."""

from typing import NamedTuple

from eth_account import Account
from eth_account.messages import encode_typed_data
from eth_utils import keccak


class Charge(NamedTuple):
    account: bytes
    id: int
    amount: int
    receiptHash: bytes = b"\x5e" * 32  # noqa: N815  the field's name on the wire


TYPES = {
    "Charge": [
        ("account", "bytes32"),
        ("id", "uint64"),
        ("amount", "uint96"),
        ("receiptHash", "bytes32"),
    ],
    "Settlement": [
        ("platform", "uint128"),
        ("charges", "Charge[]"),
        ("deadline", "uint40"),
    ],
    "Voiding": [
        ("platform", "uint128"),
        ("ids", "uint64[]"),
        ("deadline", "uint40"),
    ],
    "InboxBooking": [
        ("platform", "uint128"),
        ("payer", "address"),
        ("nonce", "bytes32"),
        ("tokens", "uint256"),
        ("deadline", "uint40"),
    ],
    "ExitConsent": [
        ("platform", "uint128"),
        ("account", "bytes32"),
        ("tokens", "uint256"),
        ("to", "address"),
        ("nonce", "bytes32"),
        ("deadline", "uint40"),
    ],
    "AllowanceChange": [
        ("platform", "uint128"),
        ("account", "bytes32"),
        ("cap", "uint96"),
        ("expiresAt", "uint40"),
        ("nonce", "uint64"),
        ("deadline", "uint40"),
    ],
    "UsageReceipt": [
        ("platform", "uint128"),
        ("account", "bytes32"),
        ("chargeId", "uint64"),
        ("requestHash", "bytes32"),
        ("responseHash", "bytes32"),
        ("model", "string"),
        ("inputTokens", "uint64"),
        ("cachedInputTokens", "uint64"),
        ("outputTokens", "uint64"),
        ("reasoningTokens", "uint64"),
        ("usageHash", "bytes32"),
        ("priceId", "bytes32"),
        ("amount", "uint96"),
        ("issuedAt", "uint40"),
        ("complete", "bool"),
    ],
    "ReceiveWithAuthorization": [
        ("from", "address"),
        ("to", "address"),
        ("value", "uint256"),
        ("validAfter", "uint256"),
        ("validBefore", "uint256"),
        ("nonce", "bytes32"),
    ],
    "CancelAuthorization": [
        ("authorizer", "address"),
        ("nonce", "bytes32"),
    ],
    "Permit": [
        ("owner", "address"),
        ("spender", "address"),
        ("value", "uint256"),
        ("nonce", "uint256"),
        ("deadline", "uint256"),
    ],
}
TYPES["TransferWithAuthorization"] = TYPES["ReceiveWithAuthorization"]

NEEDS = {"Settlement": ["Charge"]}


def _signable(domain, primary, message):
    types = {
        name: [{"name": field, "type": kind} for field, kind in TYPES[name]]
        for name in [primary, *NEEDS.get(primary, [])]
    }
    return encode_typed_data(domain, types, message)


def digest(domain, primary, message):
    signable = _signable(domain, primary, message)
    return keccak(b"\x19" + signable.version + signable.header + signable.body)


def sign(key, domain, primary, message):
    """65 bytes r ‖ s ‖ v."""
    return bytes(Account.sign_message(_signable(domain, primary, message), key).signature)


def settlement(platform, charges, deadline):
    return {
        "platform": platform,
        "charges": [charge._asdict() for charge in charges],
        "deadline": deadline,
    }
