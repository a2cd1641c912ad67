"""The ERC-20 token that backs all credit, as far as anyone here needs it."""

from eth_abi.abi import decode, encode
from eth_abi.exceptions import DecodingError

from waterfall.chain.rpc import Rpc
from waterfall.errors import ChainError
from waterfall.keccak import keccak

TRANSFER_TOPIC = "0x" + keccak(b"Transfer(address,address,uint256)").hex()


def approve(spender: str, tokens: int) -> bytes:
    """Calldata of `approve`; `tokens` in base units."""
    return keccak(b"approve(address,uint256)")[:4] + encode(("address", "uint256"), (spender, tokens))


async def balance_of(rpc: Rpc, token: str, holder: str) -> int:
    """A holder's tokens, in base units.

    Raises:
        ChainError
    """
    data = keccak(b"balanceOf(address)")[:4] + encode(("address",), (holder,))
    result = await rpc.call("eth_call", {"to": token, "data": "0x" + data.hex()}, "latest")
    try:
        return int(decode(("uint256",), bytes.fromhex(result[2:]))[0])
    except (DecodingError, ValueError, TypeError, LookupError):
        raise ChainError(reason=f"the token {token} answers balanceOf with {result!r:.80}") from None
