"""The ERC-20 token that backs all credit, as far as anyone here needs it."""

from eth_abi.abi import decode, encode

from waterfall.chain.rpc import Rpc
from waterfall.keccak import keccak

TRANSFER_TOPIC = "0x" + keccak(b"Transfer(address,address,uint256)").hex()


def approve(spender: str, tokens: int) -> bytes:
    """Calldata of `approve`; `tokens` in base units."""
    return keccak(b"approve(address,uint256)")[:4] + encode(("address", "uint256"), (spender, tokens))


async def balance_of(rpc: Rpc, token: str, holder: str) -> int:
    """A holder's tokens, in base units."""
    data = keccak(b"balanceOf(address)")[:4] + encode(("address",), (holder,))
    result = await rpc.call("eth_call", {"to": token, "data": "0x" + data.hex()}, "latest")
    return int(decode(("uint256",), bytes.fromhex(result[2:]))[0])
