"""What a transaction pays: EIP-1559 fees, and on OP-stack chains the fee for the data that goes to L1.

Sources: https://eips.ethereum.org/EIPS/eip-1559, https://docs.optimism.io/stack/transactions/fees, GasPriceOracle of
ethereum-optimism/optimism (packages/contracts-bedrock/src/L2/GasPriceOracle.sol).
"""

from dataclasses import dataclass
from typing import NoReturn

from eth_abi.abi import encode

from waterfall.chain.rpc import Rpc, RpcError, RpcUnavailable, quantity
from waterfall.errors import ChainError
from waterfall.keccak import keccak

_GAS_PRICE_ORACLE = "0x420000000000000000000000000000000000000f"
_GET_L1_FEE = keccak(b"getL1Fee(bytes)")[:4]
_USUAL_TIP = 10**9
"""One gwei: the smallest that geth's and nethermind's miners took by default for years, and far above it on L2s."""
_L1_FEE_MAY_RISE = 2
_HISTORY_BLOCKS = 5


@dataclass(frozen=True, slots=True)
class Fees:
    """What a transaction pays for gas, in wei per gas."""

    max_fee: int
    priority_fee: int


class FeeAboveCap(ChainError):
    """Nothing can be mined now: the base fee is {base_fee} wei per gas, and at most {cap} may be offered."""

    code = "fee_above_cap"


async def minable_fees(rpc: Rpc, max_fee_cap: int) -> Fees:
    """Fees that get a transaction into one of the next blocks: twice the base fee plus the node's tip, capped.

    Raises:
        FeeAboveCap: the base fee alone is above the cap: wait, and tell somebody.
        ChainError: the chain cannot be read.
    """
    base_fee, fees = await _read(rpc, max_fee_cap)
    if base_fee > max_fee_cap:
        raise FeeAboveCap(base_fee=base_fee, cap=max_fee_cap)
    return fees


async def suggest_fees(rpc: Rpc, max_fee_cap: int) -> Fees:
    """The same, for what is to be sent anyway: at the cap, where the base fee is above it.

    Raises:
        ChainError: the chain cannot be read.
    """
    return (await _read(rpc, max_fee_cap))[1]


async def _read(rpc: Rpc, max_fee_cap: int) -> tuple[int, Fees]:
    """The newest block's base fee, and the fees to offer."""
    block = await rpc.call("eth_getBlockByNumber", "latest", False)
    if not isinstance(block, dict):
        _not_understood("eth_getBlockByNumber")
    base_fee = quantity(block.get("baseFeePerGas", "0x0"))
    tip = await _tip(rpc)
    max_fee = min(2 * base_fee + tip, max_fee_cap)
    return base_fee, Fees(max_fee, min(tip, max_fee))


async def _tip(rpc: Rpc) -> int:
    """What blocks pay for priority: the node's word, else the median of the newest blocks' medians, else the usual."""
    try:
        return quantity(await rpc.call("eth_maxPriorityFeePerGas"))
    except RpcError:
        pass  # not every node has this method
    try:
        history = await rpc.call("eth_feeHistory", hex(_HISTORY_BLOCKS), "latest", [50])
    except RpcError:
        return _USUAL_TIP
    rewards = history.get("reward") if isinstance(history, dict) else None
    tips = [quantity(reward[0]) for reward in rewards or () if isinstance(reward, list) and reward]
    return sorted(tips)[len(tips) // 2] if tips else _USUAL_TIP


def bump(last: Fees, suggested: Fees, max_fee_cap: int) -> Fees | None:
    """Fees of a replacement: both at least an eighth above the last attempt's, as nodes demand; None at the cap."""
    fees = Fees(
        max(suggested.max_fee, last.max_fee + last.max_fee // 8 + 1),
        max(suggested.priority_fee, last.priority_fee + last.priority_fee // 8 + 1),
    )
    return fees if fees.max_fee <= max_fee_cap else None


async def l1_fee(rpc: Rpc, transaction: bytes) -> int:
    """What an OP-stack chain takes now for a transaction's data on L1, in wei; 0 on every other chain.

    Args:
        rpc: the chain.
        transaction: its bytes, signed or not; its calldata alone is counted a little low.

    Raises:
        ChainError: the chain cannot be read, or has something else in the oracle's place.
    """
    data = _GET_L1_FEE + encode(["bytes"], [transaction])
    answer = await rpc.call("eth_call", {"to": _GAS_PRICE_ORACLE, "data": "0x" + data.hex()}, "latest")
    if answer == "0x":
        return 0  # no code there: a call of nothing succeeds and returns nothing
    if not isinstance(answer, str) or len(answer) != 2 + 64:
        _not_understood("GasPriceOracle.getL1Fee")
    return quantity(answer)


def worst_cost(gas: int, fees: Fees, l1_fee: int = 0) -> int:
    """The most a transaction without value can cost its sender, in wei.

    Args:
        gas: its gas limit.
        fees: what it offers.
        l1_fee: what its data costs on L1 now; counted twice, since it is not capped and may rise until it is mined.
    """
    return gas * fees.max_fee + _L1_FEE_MAY_RISE * l1_fee


def _not_understood(asked: str) -> NoReturn:
    raise RpcUnavailable(reason=f"a node's answer to {asked} is not understood")
