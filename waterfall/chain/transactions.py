"""EIP-1559 transactions, signed by any `Signer`, and what a broadcast's outcome means.

Source: https://eips.ethereum.org/EIPS/eip-1559
"""

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from eth_account.typed_transactions.typed_transaction import TypedTransaction

from waterfall.chain.rpc import Rpc, RpcError, RpcUnavailable
from waterfall.errors import ChainError
from waterfall.keccak import keccak
from waterfall.signers import Signer

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Fees:
    """What a transaction pays for gas, in wei per gas."""

    max_fee: int
    priority_fee: int


@dataclass(frozen=True, slots=True)
class Signed:
    """A signed transaction: the same bytes are broadcast for as long as it may be mined."""

    raw: bytes
    tx_hash: str


def sign(
    signer: Signer,
    *,
    chain_id: int,
    nonce: int,
    target: str | None,
    calldata: bytes,
    gas: int,
    fees: Fees,
    value: int = 0,
) -> Signed:
    """Sign a transaction; `target` None creates a contract."""
    transaction = TypedTransaction.from_dict(
        {
            "type": 2,
            "chainId": chain_id,
            "nonce": nonce,
            "to": bytes.fromhex(target[2:]) if target else b"",
            "data": calldata,
            "value": value,
            "gas": gas,
            "maxFeePerGas": fees.max_fee,
            "maxPriorityFeePerGas": fees.priority_fee,
        }
    )
    signature = signer.sign(bytes(transaction.hash()))
    unsigned = transaction.as_dict()
    raw = bytes(
        TypedTransaction.from_dict(
            {
                **unsigned,
                "v": signature[64] - 27,
                "r": int.from_bytes(signature[:32], "big"),
                "s": int.from_bytes(signature[32:64], "big"),
            }
        ).encode()
    )
    return Signed(raw, "0x" + keccak(raw).hex())


async def suggest_fees(rpc: Rpc, max_fee_cap: int) -> Fees:
    """Fees that get a transaction into one of the next blocks: twice the base fee plus the node's tip, capped."""
    block = await rpc.call("eth_getBlockByNumber", "latest", False)
    tip = int(await rpc.call("eth_maxPriorityFeePerGas"), 16)
    max_fee = min(2 * int(block.get("baseFeePerGas", "0x0"), 16) + tip, max_fee_cap)
    return Fees(max_fee, min(tip, max_fee))


def bump(last: Fees, suggested: Fees, max_fee_cap: int) -> Fees | None:
    """Fees of a replacement: both at least an eighth above the last attempt's, as nodes demand; None at the cap."""
    fees = Fees(
        max(suggested.max_fee, last.max_fee + last.max_fee // 8 + 1),
        max(suggested.priority_fee, last.priority_fee + last.priority_fee // 8 + 1),
    )
    return fees if fees.max_fee <= max_fee_cap else None


class Broadcast(StrEnum):
    """What is known after a broadcast. A timeout is never a failure."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    UNKNOWN = "unknown"


# Fragments of nodes' messages, lower case. What matches nothing is unknown: the safe reading.
_ACCEPTED = ("already known", "already imported", "alreadyknown", "already in mempool", "known transaction")
_REFUSED = (
    "nonce too low",
    "nonce is too low",
    "insufficient funds",
    "intrinsic gas too low",
    "underpriced",
    "max fee per gas less than block base fee",
    "exceeds block gas limit",
    "gas limit too high",
    "invalid sender",
    "invalid chain id",
)


async def broadcast(rpc: Rpc, raw: bytes) -> tuple[Broadcast, str]:
    """Send a signed transaction; the outcome, and the node's words for it."""
    try:
        await rpc.call("eth_sendRawTransaction", "0x" + raw.hex())
    except RpcError as error:
        message = str(error.details["reason"])
        return classify(message), message
    except RpcUnavailable as error:
        return Broadcast.UNKNOWN, error.message
    return Broadcast.ACCEPTED, ""


def classify(message: str) -> Broadcast:
    """What a node's refusal means."""
    text = message.lower()
    if any(fragment in text for fragment in _ACCEPTED) and "unknown transaction" not in text:
        return Broadcast.ACCEPTED
    if any(fragment in text for fragment in _REFUSED):
        return Broadcast.REFUSED
    return Broadcast.UNKNOWN


async def transact(
    rpc: Rpc, signer: Signer, target: str | None, calldata: bytes, *, timeout_seconds: float = 60
) -> Any:
    """Send one transaction and wait until it is mined: for set-up and by hand, never for a lane's key.

    Args:
        rpc: the node.
        signer: who sends.
        target: the contract; None creates one.
        calldata: what to call, or the code to create.
        timeout_seconds: how long to wait.

    Returns:
        The transaction's receipt.

    Raises:
        ChainError: it reverted, was refused, or was not mined in time.
    """
    call = {"from": signer.address, "data": "0x" + calldata.hex()} | ({"to": target} if target else {})
    gas = int(await rpc.call("eth_estimateGas", call), 16)
    signed = sign(
        signer,
        chain_id=int(await rpc.call("eth_chainId"), 16),
        nonce=int(await rpc.call("eth_getTransactionCount", signer.address, "pending"), 16),
        target=target,
        calldata=calldata,
        gas=gas + gas // 5,
        fees=await suggest_fees(rpc, max_fee_cap=2**63),
    )
    outcome, detail = await broadcast(rpc, signed.raw)
    if outcome is Broadcast.REFUSED:
        raise ChainError(reason=f"a transaction of {signer.address} was refused: {detail}")
    try:
        async with asyncio.timeout(timeout_seconds):
            while (receipt := await rpc.call("eth_getTransactionReceipt", signed.tx_hash)) is None:
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        raise ChainError(reason=f"{signed.tx_hash} was not mined within {timeout_seconds:g} s") from None
    if receipt["status"] != "0x1":
        raise ChainError(reason=f"{signed.tx_hash} was mined and failed")
    return receipt
