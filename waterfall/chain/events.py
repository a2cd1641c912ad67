"""The vault's events, decoded by hand: all their fields are static words (0.3 µs a log; web3 takes 190).

Source: contracts/interfaces/ICreditVault.sol. A test holds this table against the compiled ABI.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

from waterfall.errors import ChainError
from waterfall.keccak import keccak


class Rejection(IntEnum):
    """Why the vault left a charge out of a batch."""

    ZERO_AMOUNT = 0
    BALANCE = 1
    MAX_PER_CHARGE = 2
    MAX_PER_WINDOW = 3
    POLICY_EXPIRED = 4
    ALLOWANCE_CAP = 5
    ALLOWANCE_EXPIRED = 6


@dataclass(frozen=True, slots=True)
class Position:
    """Where a log stands on the chain."""

    block: int
    log_index: int
    tx_hash: str


@dataclass(frozen=True, slots=True)
class PlatformRegistered:
    """A platform was registered."""

    platform: int
    owner: str
    payout: str
    exit_delay: int
    salt: str


@dataclass(frozen=True, slots=True)
class PlatformTransferStarted:
    """A platform was offered to somebody."""

    platform: int
    owner: str
    pending_owner: str


@dataclass(frozen=True, slots=True)
class PlatformTransferred:
    """A platform has another owner."""

    platform: int
    previous_owner: str
    new_owner: str


@dataclass(frozen=True, slots=True)
class PayoutSet:
    """Earnings go elsewhere from now on."""

    platform: int
    payout: str


@dataclass(frozen=True, slots=True)
class MeterAdded:
    """A key may sign receipts and batches from now on."""

    platform: int
    meter: str


@dataclass(frozen=True, slots=True)
class MeterRetired:
    """A key may not sign any more."""

    platform: int
    meter: str
    compromised_since: int


@dataclass(frozen=True, slots=True)
class Deposited:
    """Credit arrived."""

    platform: int
    account: str
    payer: str
    owner: str
    label: str
    amount: int
    entry: int


@dataclass(frozen=True, slots=True)
class InboxBooked:
    """An EIP-3009 authorization's money came in through the inbox; its `Deposited` stands beside it."""

    platform: int
    payer: str
    nonce: str


@dataclass(frozen=True, slots=True)
class Rescued:
    """Something that is not the vault's token left a deposit address or an inbox."""

    platform: int
    source: str
    token: str
    to: str
    amount: int


@dataclass(frozen=True, slots=True)
class PolicySet:
    """The limits of an account are these from now on."""

    platform: int
    account: str
    limits: int
    max_per_charge: int
    max_per_window: int
    window_seconds: int
    expires_at: int


@dataclass(frozen=True, slots=True)
class AllowanceSet:
    """The owner's limit is this: what loosens binds at once, what tightens from `effective_at` on."""

    platform: int
    account: str
    owner: str
    label: str
    cap: int
    expires_at: int
    effective_at: int
    nonce: int


@dataclass(frozen=True, slots=True)
class Charged:
    """A charge was settled."""

    account: str
    id: int
    amount: int
    entry: int
    receipt_hash: str


@dataclass(frozen=True, slots=True)
class ExitDrawn:
    """A charge took part of its credit from a pending exit."""

    account: str
    id: int
    amount: int


@dataclass(frozen=True, slots=True)
class ChargeRejected:
    """A charge of a batch was left out."""

    platform: int
    account: str
    id: int
    reason: Rejection


@dataclass(frozen=True, slots=True)
class ChargeVoided:
    """A charge id was used up without a charge."""

    platform: int
    id: int


@dataclass(frozen=True, slots=True)
class Refunded:
    """Credit came back from the platform's earnings."""

    platform: int
    account: str
    id: int
    owner: str
    label: str
    amount: int
    entry: int


@dataclass(frozen=True, slots=True)
class Allocated:
    """Credit went from an account the platform holds, `source`, to `account`."""

    platform: int
    source: str
    account: str
    owner: str
    label: str
    amount: int
    source_entry: int
    entry: int


@dataclass(frozen=True, slots=True)
class ExitRequested:
    """Credit left the balance towards an exit."""

    platform: int
    account: str
    amount: int
    total: int
    matures_at: int
    entry: int


@dataclass(frozen=True, slots=True)
class ExitCancelled:
    """An exit returned to the balance."""

    platform: int
    account: str
    amount: int
    entry: int


@dataclass(frozen=True, slots=True)
class ExitFinalized:
    """An exit left the vault."""

    platform: int
    account: str
    to: str
    tokens: int
    remainder: int
    entry: int


@dataclass(frozen=True, slots=True)
class ExitedWithConsent:
    """Credit left the vault at once."""

    platform: int
    account: str
    to: str
    tokens: int
    nonce: str
    entry: int


@dataclass(frozen=True, slots=True)
class EarningsWithdrawn:
    """Earnings left the vault."""

    platform: int
    payout: str
    tokens: int


Event = (
    PlatformRegistered
    | PlatformTransferStarted
    | PlatformTransferred
    | PayoutSet
    | MeterAdded
    | MeterRetired
    | Deposited
    | InboxBooked
    | Rescued
    | PolicySet
    | AllowanceSet
    | Charged
    | ExitDrawn
    | ChargeRejected
    | ChargeVoided
    | Refunded
    | Allocated
    | ExitRequested
    | ExitCancelled
    | ExitFinalized
    | ExitedWithConsent
    | EarningsWithdrawn
)


def decided_in(logs: Sequence[Mapping[str, Any]], vault: str) -> frozenset[int]:
    """Ids of the charges that a transaction settled or had rejected, by its receipt's logs.

    Raises:
        ChainError: they cannot be read.
    """
    try:
        events = [decode(log) for log in logs if log["address"].lower() == vault]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ChainError(reason=f"the logs of a receipt cannot be read: {error!r}") from error
    return frozenset(
        found[1].id for found in events if found and isinstance(found[1], Charged | ChargeRejected)
    )


def _uint(word: bytes) -> int:
    return int.from_bytes(word, "big")


def _address(word: bytes) -> str:
    return "0x" + word[12:].hex()


def _bytes32(word: bytes) -> str:
    return "0x" + word.hex()


def _rejection(word: bytes) -> Rejection:
    return Rejection(word[31])


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "uint128": _uint,
    "uint96": _uint,
    "uint80": _uint,
    "uint64": _uint,
    "uint40": _uint,
    "uint32": _uint,
    "uint8": _uint,
    "uint256": _uint,
    "address": _address,
    "bytes32": _bytes32,
}

# class → solidity signature; the indexed fields come first, as they do in every event of the vault.
SIGNATURES: dict[type[Any], str] = {
    PlatformRegistered: "PlatformRegistered(uint128,address,address,uint32,bytes32)",
    PlatformTransferStarted: "PlatformTransferStarted(uint128,address,address)",
    PlatformTransferred: "PlatformTransferred(uint128,address,address)",
    PayoutSet: "PayoutSet(uint128,address)",
    MeterAdded: "MeterAdded(uint128,address)",
    MeterRetired: "MeterRetired(uint128,address,uint40)",
    Deposited: "Deposited(uint128,bytes32,address,address,bytes32,uint96,uint40)",
    InboxBooked: "InboxBooked(uint128,address,bytes32)",
    Rescued: "Rescued(uint128,address,address,address,uint256)",
    PolicySet: "PolicySet(uint128,bytes32,uint8,(uint80,uint80,uint32,uint40))",
    AllowanceSet: "AllowanceSet(uint128,bytes32,address,bytes32,uint96,uint40,uint40,uint64)",
    Charged: "Charged(bytes32,uint64,uint96,uint40,bytes32)",
    ExitDrawn: "ExitDrawn(bytes32,uint64,uint96)",
    ChargeRejected: "ChargeRejected(uint128,bytes32,uint64,uint8)",
    ChargeVoided: "ChargeVoided(uint128,uint64)",
    Refunded: "Refunded(uint128,bytes32,uint64,address,bytes32,uint96,uint40)",
    Allocated: "Allocated(uint128,bytes32,bytes32,address,bytes32,uint96,uint40,uint40)",
    ExitRequested: "ExitRequested(uint128,bytes32,uint96,uint96,uint40,uint40)",
    ExitCancelled: "ExitCancelled(uint128,bytes32,uint96,uint40)",
    ExitFinalized: "ExitFinalized(uint128,bytes32,address,uint256,uint96,uint40)",
    ExitedWithConsent: "ExitedWithConsent(uint128,bytes32,address,uint256,bytes32,uint40)",
    EarningsWithdrawn: "EarningsWithdrawn(uint128,address,uint256)",
}


def _decoders(event: type[Any], signature: str) -> tuple[Callable[[bytes], Any], ...]:
    types = signature[signature.index("(") + 1 : -1].replace("(", "").replace(")", "").split(",")
    names = [field.name for field in fields(event)]
    return tuple(
        _rejection if name == "reason" else _DECODERS[type_] for name, type_ in zip(names, types, strict=True)
    )


TOPICS: dict[str, tuple[type[Any], tuple[Callable[[bytes], Any], ...]]] = {
    "0x" + keccak(signature.encode()).hex(): (event, _decoders(event, signature))
    for event, signature in SIGNATURES.items()
}


def decode(log: Mapping[str, Any]) -> tuple[Position, Event] | None:
    """Decode one log of the vault as `eth_getLogs` returns it; None for events this version does not know.

    Raises:
        ChainError: the node left words out; nothing is ever read as zero.
    """
    topics = log["topics"]
    known = TOPICS.get(topics[0]) if topics else None
    if known is None:
        return None
    event, decoders = known
    words = bytes.fromhex("".join(topic[2:] for topic in topics[1:]) + log["data"][2:])
    if len(words) != 32 * len(decoders):
        raise ChainError(reason=f"the log of {event.__name__} in {log['transactionHash']} is not whole")
    values = [decoder(words[32 * n : 32 * n + 32]) for n, decoder in enumerate(decoders)]
    position = Position(int(log["blockNumber"], 16), int(log["logIndex"], 16), log["transactionHash"])
    return position, event(*values)
