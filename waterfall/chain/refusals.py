"""What nodes say, and what it means: JSON-RPC has no codes for it that clients agree on, so it goes by their words.

Two tables, first match wins. Fixtures with each client's own messages: tests/unit/node_messages.json.
"""

from dataclasses import dataclass
from enum import StrEnum


class Broadcast(StrEnum):
    """What is known after a broadcast. A timeout is never a failure."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    UNKNOWN = "unknown"


class Refusal(StrEnum):
    """Why a transaction was refused."""

    NONCE_TOO_LOW = "nonce_too_low"
    """Another transaction with this nonce was mined, or this one was: only receipts can tell."""
    UNDERPRICED = "underpriced"
    """Too little more than the transaction it would replace, or less than the node takes at all."""
    FEE_BELOW_BASE = "fee_below_base"
    INSUFFICIENT_FUNDS = "insufficient_funds"
    GAS_LIMIT = "gas_limit"
    """Less gas than any such transaction needs, or more than a block has."""
    INVALID = "invalid"
    """No node of this chain will ever take it."""
    OTHER = "other"


class Fault(StrEnum):
    """Whose fault an error is that a node answers with."""

    REQUEST = "request"
    """Every node would say the same."""
    NODE = "node"
    """Another node can do better."""
    UNCLEAR = "unclear"
    """Another node may do better; that this one cannot says nothing against it."""


@dataclass(frozen=True, slots=True)
class _Said:
    client: str
    words: str
    """Fragment of the message, lower case."""
    means: Broadcast | Refusal


# "known transaction" is in "unknown transaction type": that one first.
_SENDING = (
    _Said("anvil, geth", "unknown transaction", Broadcast.UNKNOWN),
    _Said("geth, erigon, nethermind, reth", "already known", Broadcast.ACCEPTED),
    _Said("anvil", "already imported", Broadcast.ACCEPTED),
    _Said("nethermind before 2026", "alreadyknown", Broadcast.ACCEPTED),
    _Said("besu, older geth", "known transaction", Broadcast.ACCEPTED),
    _Said("erigon", "with same hash", Broadcast.ACCEPTED),
    _Said("Cosmos SDK", "already in mempool", Broadcast.ACCEPTED),
    _Said("geth, erigon, besu, reth, anvil", "nonce too low", Refusal.NONCE_TOO_LOW),
    _Said("openethereum", "nonce is too low", Refusal.NONCE_TOO_LOW),
    _Said("nethermind before 2026", "oldnonce", Refusal.NONCE_TOO_LOW),
    _Said("geth, erigon, reth, anvil", "less than block base fee", Refusal.FEE_BELOW_BASE),
    _Said("besu", "below current base fee", Refusal.FEE_BELOW_BASE),
    _Said("nethermind before 2026", "feetoolow, maxfeepergas too low", Refusal.FEE_BELOW_BASE),
    _Said("geth, erigon, besu, nethermind, reth", "underpriced", Refusal.UNDERPRICED),
    _Said("anvil", "insufficient gas price to replace", Refusal.UNDERPRICED),
    _Said("besu", "below configured minimum gas price", Refusal.UNDERPRICED),
    _Said("erigon", "fee too low", Refusal.UNDERPRICED),
    _Said("erigon", "could not replace existing tx", Refusal.UNDERPRICED),
    _Said("nethermind before 2026", "feetoolow", Refusal.UNDERPRICED),
    _Said("nethermind before 2026", "replacementnotallowed", Refusal.UNDERPRICED),
    _Said("geth, erigon, nethermind, reth, anvil", "insufficient funds", Refusal.INSUFFICIENT_FUNDS),
    _Said("nethermind before 2026", "insufficientfunds", Refusal.INSUFFICIENT_FUNDS),
    _Said("besu", "upfront cost exceeds account balance", Refusal.INSUFFICIENT_FUNDS),
    _Said("geth, reth, anvil", "intrinsic gas too", Refusal.GAS_LIMIT),
    _Said("besu", "intrinsic gas exceeds gas limit", Refusal.GAS_LIMIT),
    _Said("erigon", "intrinsicgas", Refusal.GAS_LIMIT),
    _Said("geth, besu, reth", "exceeds block gas limit", Refusal.GAS_LIMIT),
    _Said("reth", "exceeds max transaction gas limit", Refusal.GAS_LIMIT),
    _Said("geth since Osaka", "transaction gas limit too high", Refusal.GAS_LIMIT),
    _Said("anvil", "gas limit is greater than", Refusal.GAS_LIMIT),
    _Said("older geth", "gas limit too high", Refusal.GAS_LIMIT),
    _Said("erigon", "gas limit is too high", Refusal.GAS_LIMIT),
    _Said("nethermind", "gas limit reached", Refusal.GAS_LIMIT),
    _Said("nethermind before 2026", "gaslimitexceeded", Refusal.GAS_LIMIT),
    _Said("geth, erigon, reth", "invalid sender", Refusal.INVALID),
    _Said("besu", "invalid signature", Refusal.INVALID),
    _Said("nethermind", "failed to recover sender", Refusal.INVALID),
    _Said("geth, anvil", "invalid chain id", Refusal.INVALID),
    _Said("besu", "wrong chainid", Refusal.INVALID),
    _Said("anvil, reth", "failed to decode signed transaction", Refusal.INVALID),
    _Said("geth, erigon, reth, nethermind", "sender not an eoa", Refusal.INVALID),
    _Said("geth, erigon, reth", "oversized data", Refusal.INVALID),
    _Said("nethermind", "transaction too large", Refusal.INVALID),
    _Said("geth, reth, anvil", "max priority fee per gas higher than", Refusal.INVALID),
    _Said("besu", "max priority fee per gas exceeds", Refusal.INVALID),
    _Said("geth, nethermind, besu, anvil", "nonce too high", Refusal.OTHER),
    _Said("nethermind", "nonce too far in future", Refusal.OTHER),
    _Said("besu", "nonce is too distant", Refusal.OTHER),
    _Said("nethermind before 2026", "noncegap", Refusal.OTHER),
)


def _sending(message: str) -> Broadcast | Refusal:
    text = message.lower()
    return next((said.means for said in _SENDING if said.words in text), Broadcast.UNKNOWN)


def classify(message: str) -> Broadcast:
    """What a node's words about a transaction mean. What is in no table is unknown: the safe reading."""
    means = _sending(message)
    return Broadcast.REFUSED if isinstance(means, Refusal) else means


def refusal(message: str) -> Refusal | None:
    """Why a node refuses a transaction; None if these words do not refuse it."""
    means = _sending(message)
    return means if isinstance(means, Refusal) else None


@dataclass(frozen=True, slots=True)
class _Cause:
    client: str
    fault: Fault
    words: str = ""
    """Fragment of the message, lower case; empty: any."""
    code: int | None = None
    """None: any."""


# Of the tags `safe` and `finalized`: after a start, until the node's consensus client has spoken. Others answer null.
_NO_BLOCK_YET = (
    _Cause("geth, erigon", Fault.REQUEST, "safe block not found"),
    _Cause("geth, erigon", Fault.REQUEST, "finalized block not found"),
    _Cause("reth", Fault.REQUEST, "block not found: safe"),
    _Cause("reth", Fault.REQUEST, "block not found: finalized"),
    _Cause("besu, erigon", Fault.REQUEST, code=-39001),
)
# What is about the request comes first: -32005, -32603 and the like are used for both.
_ERRORS = (
    _Cause("all", Fault.REQUEST, "revert"),
    _Cause("geth, reth, anvil", Fault.REQUEST, "gas required exceeds allowance"),
    _Cause("geth, besu, reth, anvil", Fault.REQUEST, "out of gas"),
    _Cause("anvil", Fault.REQUEST, "evm error"),
    *_NO_BLOCK_YET,
    _Cause("Infura", Fault.REQUEST, "query returned more than"),
    _Cause("Alchemy, erigon, nethermind", Fault.REQUEST, "block range"),
    _Cause("QuickNode", Fault.REQUEST, "is limited to a"),
    _Cause("geth", Fault.REQUEST, "response too large"),
    _Cause("reth", Fault.REQUEST, "query exceeds max"),
    _Cause("besu", Fault.REQUEST, "exceeds maximum rpc range limit"),
    _Cause("besu", Fault.REQUEST, "exceeds max batch size"),
    _Cause("JSON-RPC 2.0", Fault.REQUEST, code=-32602),
    _Cause("geth, erigon", Fault.NODE, "header not found"),
    _Cause("geth, bor, nethermind", Fault.NODE, "missing trie node"),
    _Cause("geth", Fault.NODE, "unknown block"),
    _Cause("geth", Fault.NODE, "historical state"),
    _Cause("Alchemy, openethereum", Fault.NODE, "cannot be found"),
    _Cause("nethermind", Fault.NODE, "no state available"),
    _Cause("nethermind", Fault.NODE, "node is syncing"),
    _Cause("besu", Fault.NODE, "world state unavailable"),
    _Cause("besu", Fault.NODE, "initial sync is still in progress"),
    _Cause("besu", Fault.NODE, "transaction pool not enabled"),
    _Cause("reth, erigon, besu", Fault.NODE, "block not found"),
    _Cause("reth", Fault.NODE, "pruned"),
    _Cause("reth", Fault.NODE, "execution aborted (timeout"),
    _Cause("geth", Fault.NODE, "request timed out"),
    _Cause("besu", Fault.NODE, "timeout expired"),
    _Cause("Infura", Fault.NODE, "request rate"),
    _Cause("Infura, EIP-1474", Fault.NODE, code=-32005),
    _Cause("Alchemy", Fault.NODE, code=429),
    _Cause("Alchemy", Fault.NODE, "capacity limit exceeded"),
    _Cause("QuickNode", Fault.NODE, "request limit reached"),
    _Cause("proxyd (OP Mainnet, Base, Mantle)", Fault.NODE, "no backends available"),
    _Cause("proxyd", Fault.NODE, "backend is"),
    _Cause("proxyd", Fault.NODE, "backend offline"),
    _Cause("proxyd", Fault.NODE, "backend returned an invalid response"),
    _Cause("proxyd", Fault.NODE, "gateway timeout"),
    _Cause("proxyd and other providers", Fault.NODE, "rate limit"),
    _Cause("public endpoints", Fault.NODE, "too many requests"),
    _Cause("proxyd, besu, reth", Fault.NODE, "internal error"),
    _Cause("JSON-RPC 2.0", Fault.NODE, code=-32603),
)


def fault(code: object, message: str) -> Fault:
    """Whose fault a node's error is."""
    if _sending(message) is not Broadcast.UNKNOWN:
        return Fault.REQUEST
    cause = _cause(code, message)
    return Fault.UNCLEAR if cause is None else cause.fault


def has_no_block_yet(code: object, message: str) -> bool:
    """Whether a node that was asked for a block by its tag knows the tag, and has no block for it.

    Of words that are in no table, "not found" is taken for that: it is the safe reading.
    """
    cause = _cause(code, message)
    return cause in _NO_BLOCK_YET or (cause is None and "not found" in message.lower())


def _cause(code: object, message: str) -> _Cause | None:
    text = message.lower()
    return next((one for one in _ERRORS if one.words in text and one.code in {None, code}), None)
