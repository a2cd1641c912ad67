"""Fees on a real chain: what is offered is mined, and what OP-stack chains take for L1 is asked of their oracle."""

import pytest

from waterfall.chain.fees import FeeAboveCap, Fees, l1_fee, minable_fees, suggest_fees, worst_cost
from waterfall.chain.rpc import RpcError, RpcUnavailable
from waterfall.chain.transactions import transact
from waterfall.devnet.anvil import Anvil
from waterfall.signers import LocalSigner

GWEI = 10**9
ORACLE = "0x420000000000000000000000000000000000000F"
SENDER = LocalSigner(b"\x5a" * 32)
TARGET = "0x" + "11" * 20

# Stand-ins for the oracle, by hand. All end with MSTORE at 0 and RETURN of 32 bytes: 5f 52 60 20 5f f3.
RETURN = "5f5260205ff3"
CONSTANT = "0x" + "61abcd" + RETURN
"""PUSH2 0xabcd."""
BY_LENGTH = "0x" + "602435" + "6103e8" + "02" + RETURN
"""CALLDATALOAD(0x24), the length of getL1Fee's argument, times 1000."""
BY_SELECTOR = "0x" + "5f3560e01c" + "6349948e0e" + "14" + RETURN
"""Whether the first four bytes of the calldata are getL1Fee(bytes)'s selector, as the real oracle dispatches it."""
SHORT = "0x" + "60015f5360015ff3"
"""Returns one byte."""
REVERTS = "0x" + "5f5ffd"


@pytest.fixture
async def anvil(tmp_path):
    async with Anvil(tmp_path) as anvil:
        yield anvil


async def test_l1_fee__chain_without_an_oracle__is_none(anvil):
    assert await l1_fee(anvil.rpc, b"\x02" * 100) == 0


@pytest.mark.parametrize(
    ("code", "length", "fee"),
    [
        (CONSTANT, 100, 0xABCD),
        (BY_LENGTH, 0, 0),
        (BY_LENGTH, 1, 1000),
        (BY_LENGTH, 31_337, 31_337_000),
        (BY_SELECTOR, 100, 1),
    ],
)
async def test_l1_fee__oracle__its_word_for_all_of_the_bytes(anvil, code, length, fee):
    await anvil.rpc.call("anvil_setCode", ORACLE, code)
    assert await l1_fee(anvil.rpc, b"\x02" * length) == fee


@pytest.mark.parametrize(("code", "error"), [(SHORT, RpcUnavailable), (REVERTS, RpcError)])
async def test_l1_fee__something_else_in_its_place__is_an_error_and_not_free(anvil, code, error):
    await anvil.rpc.call("anvil_setCode", ORACLE, code)
    with pytest.raises(error):
        await l1_fee(anvil.rpc, b"\x02")


async def test_minable_fees__on_a_chain__are_mined_within_the_worst_cost(anvil):
    await anvil.rpc.call("anvil_setBalance", SENDER.address, hex(10**18))
    fees = await minable_fees(anvil.rpc, 100 * GWEI)
    receipt = await transact(anvil.rpc, SENDER, TARGET, b"\x01" * 100)
    left = int(await anvil.rpc.call("eth_getBalance", SENDER.address, "latest"), 16)
    assert receipt["status"] == "0x1"
    assert 0 < 10**18 - left <= worst_cost(int(receipt["gasUsed"], 16), fees)


async def test_minable_fees__base_fee_above_the_cap__nothing_to_send_until_it_falls(anvil):
    await anvil.rpc.call("anvil_setNextBlockBaseFeePerGas", hex(200 * GWEI))
    await anvil.rpc.call("anvil_mine", "0x1")
    with pytest.raises(FeeAboveCap) as wait:
        await minable_fees(anvil.rpc, 100 * GWEI)
    assert wait.value.details == {"base_fee": 200 * GWEI, "cap": 100 * GWEI}
    assert (await suggest_fees(anvil.rpc, 100 * GWEI)).max_fee == 100 * GWEI
    high = await minable_fees(anvil.rpc, 1000 * GWEI)
    await anvil.rpc.call("anvil_mine", "0x14")
    low = await minable_fees(anvil.rpc, 100 * GWEI)
    assert isinstance(low, Fees)
    assert low.max_fee < 100 * GWEI < high.max_fee, "the base fee has fallen, and so has what is offered"
