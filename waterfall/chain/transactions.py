"""EIP-1559 transactions, signed by any `Signer`, and what a broadcast's outcome means.

Source: https://eips.ethereum.org/EIPS/eip-1559
"""

import asyncio
from dataclasses import dataclass
from typing import Any, NamedTuple

from eth_account.typed_transactions.typed_transaction import TypedTransaction

from waterfall.chain.fees import FeeAboveCap, Fees, bump, l1_fee, minable_fees, suggest_fees, worst_cost
from waterfall.chain.refusals import Broadcast, Refusal, classify, refusal
from waterfall.chain.rpc import Rpc, RpcError, RpcUnavailable, quantity
from waterfall.errors import ChainError
from waterfall.keccak import keccak
from waterfall.signers import Signer

__all__ = [
    "Broadcast",
    "FeeAboveCap",
    "Fees",
    "Refusal",
    "Sent",
    "Signed",
    "broadcast",
    "bump",
    "classify",
    "l1_fee",
    "minable_fees",
    "refusal",
    "sign",
    "suggest_fees",
    "transact",
    "worst_cost",
]

_POLL_SECONDS = 0.1


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


class Sent(NamedTuple):
    """What became of a broadcast: `outcome, detail = await broadcast(…)`."""

    outcome: Broadcast
    detail: str
    """The nodes' words for it; empty where they had none."""

    @property
    def reason(self) -> Refusal | None:
        """Why all nodes refuse it; None if they do not."""
        return refusal(self.detail) if self.outcome is Broadcast.REFUSED else None


async def broadcast(rpc: Rpc, raw: bytes) -> Sent:
    """Send a signed transaction to all nodes at once.

    It is accepted as soon as one node takes it or has it, refused if every node that could be reached refuses it,
    else unknown.
    """
    try:
        await rpc.call("eth_sendRawTransaction", "0x" + raw.hex())
    except RpcError as error:
        message = str(error.details["reason"])
        return Sent(classify(message), message)
    except RpcUnavailable as error:
        return Sent(Broadcast.UNKNOWN, error.message)
    return Sent(Broadcast.ACCEPTED, "")


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
    gas = quantity(await rpc.call("eth_estimateGas", call))
    signed = sign(
        signer,
        chain_id=quantity(await rpc.call("eth_chainId")),
        nonce=quantity(await rpc.call("eth_getTransactionCount", signer.address, "pending")),
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
