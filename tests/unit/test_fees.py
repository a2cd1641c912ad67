import pytest
from hypothesis import given
from hypothesis import strategies as st

from waterfall.chain import fees as fees_module
from waterfall.chain.fees import FeeAboveCap, Fees, bump, l1_fee, minable_fees, suggest_fees, worst_cost
from waterfall.chain.rpc import RpcError, RpcUnavailable

GWEI = 10**9
WEI = st.integers(0, 2**80)
FEES = st.builds(lambda a, b: Fees(max(a, b), min(a, b)), WEI, WEI)
NO_METHOD = RpcError(method="eth_maxPriorityFeePerGas", reason="the method is not available", data=None)


class Node:
    """Answers each method with the same; an exception is raised."""

    def __init__(self, base=None, tip=None, **answers):
        block = {} if base is None else {"baseFeePerGas": hex(base)}
        tip = hex(tip) if isinstance(tip, int) else tip
        self._answers = {"eth_getBlockByNumber": block, "eth_maxPriorityFeePerGas": tip, **answers}

    async def call(self, method, *_):
        answer = self._answers[method]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(
    ("base", "tip", "cap", "expected"),
    [
        (10, 2, 100, Fees(22, 2)),
        (10, 2, 15, Fees(15, 2)),
        (10, 2, 10, Fees(10, 2)),
        (10, 50, 15, Fees(15, 15)),
        (0, 0, 100, Fees(0, 0)),
        (None, 3, 100, Fees(3, 3)),
    ],
)
async def test_fees__block_and_tip__twice_the_base_fee_plus_the_tip_capped(base, tip, cap, expected):
    assert await suggest_fees(Node(base, tip), cap) == expected
    assert await minable_fees(Node(base, tip), cap) == expected


@given(WEI, WEI, WEI)
async def test_fees__any_chain__never_above_the_cap_and_above_the_base_fee_or_none(base, tip, cap):
    node = Node(base, tip)
    capped = await suggest_fees(node, cap)
    assert capped.priority_fee <= capped.max_fee <= cap
    assert capped.priority_fee <= tip
    if base > cap:
        with pytest.raises(FeeAboveCap) as wait:
            await minable_fees(node, cap)
        assert wait.value.details == {"base_fee": base, "cap": cap}
    else:
        assert await minable_fees(node, cap) == capped
        assert capped.max_fee >= base
        assert capped.max_fee == cap or capped.max_fee >= 2 * base


@given(WEI, st.integers(1, 2**80), WEI, WEI)
async def test_fees__base_fee_falls__less_is_offered(base, fall, tip, cap):
    before = await suggest_fees(Node(base + fall, tip), cap)
    after = await suggest_fees(Node(base, tip), cap)
    assert after.max_fee <= before.max_fee
    if before.max_fee < cap:
        assert after.max_fee == before.max_fee - 2 * fall


@pytest.mark.parametrize(
    ("history", "tip"),
    [
        ({"reward": [["0x5"], ["0x1"], ["0x3"]]}, 3),
        ({"reward": [["0x7"]]}, 7),
        ({"reward": []}, GWEI),
        ({"reward": [[], []]}, GWEI),
        ({"reward": None}, GWEI),
        ({}, GWEI),
        (None, GWEI),
        (RpcError(method="eth_feeHistory", reason="not here either", data=None), GWEI),
    ],
)
async def test_fees__node_that_suggests_no_tip__median_of_the_newest_blocks_or_a_gwei(history, tip):
    node = Node(10, NO_METHOD, eth_feeHistory=history)
    assert await suggest_fees(node, 10 * GWEI) == Fees(20 + tip, tip)


@pytest.mark.parametrize(
    "answers",
    [
        {"eth_getBlockByNumber": None},
        {"eth_getBlockByNumber": "0x1"},
        {"eth_getBlockByNumber": {"baseFeePerGas": None}},
        {"eth_getBlockByNumber": {"baseFeePerGas": "0xzz"}},
        {"eth_maxPriorityFeePerGas": None},
        {"eth_maxPriorityFeePerGas": 7},
        {"eth_maxPriorityFeePerGas": "7"},
        {"eth_maxPriorityFeePerGas": RpcUnavailable(reason="TimeoutError")},
        {"eth_maxPriorityFeePerGas": NO_METHOD, "eth_feeHistory": {"reward": [[None]]}},
    ],
)
async def test_fees__answer_that_is_none__is_no_fee(answers):
    with pytest.raises(RpcUnavailable):
        await suggest_fees(Node(10, 1, **answers), 100)


@given(FEES, FEES, st.integers(0, 2**81))
def test_bump__any_fees__both_at_least_an_eighth_higher_or_none_at_the_cap(last, suggested, cap):
    fees = bump(last, suggested, cap)
    if fees is None:
        assert max(suggested.max_fee, last.max_fee + last.max_fee // 8 + 1) > cap
        return
    assert fees.priority_fee <= fees.max_fee <= cap
    assert fees.max_fee >= suggested.max_fee
    assert fees.priority_fee >= suggested.priority_fee
    assert 8 * fees.max_fee >= 9 * last.max_fee + 1
    assert 8 * fees.priority_fee >= 9 * last.priority_fee + 1


@given(FEES, st.integers(1, 2**81))
def test_bump__again_and_again__ends_at_the_cap(last, cap):
    steps = 0
    while last is not None and last.max_fee <= cap:
        last = bump(last, Fees(0, 0), cap)
        steps += 1
        assert steps < 600


async def test_l1_fee__no_oracle__is_none():
    assert await l1_fee(Node(eth_call="0x"), b"\x02") == 0
    assert await l1_fee(Node(eth_call="0x" + "00" * 31 + "07"), b"\x02") == 7


@pytest.mark.parametrize("answer", ["0x07", "0x" + "00" * 33, None, 7, "0x" + "zz" * 32])
async def test_l1_fee__answer_that_is_no_word__is_no_fee(answer):
    with pytest.raises(RpcUnavailable):
        await l1_fee(Node(eth_call=answer), b"\x02")


def test_l1_fee__selector__of_the_oracles_interface():
    assert fees_module._GET_L1_FEE.hex() == "49948e0e"  # noqa: SLF001 - as explorers show it


@given(st.integers(21_000, 2**30), FEES, WEI, WEI)
def test_worst_cost__any__covers_gas_at_the_most_and_an_l1_fee_that_doubles(gas, fees, fee, rise):
    cost = worst_cost(gas, fees, fee)
    assert cost >= gas * fees.max_fee + fee + min(rise, fee)
    assert worst_cost(gas, fees) == gas * fees.max_fee
