"""A transaction goes to all nodes at once: what is known afterwards, in the nodes' own words where anvil has them."""

import asyncio

import pytest
from eth_account import Account

from waterfall.chain.rpc import RpcUnavailable
from waterfall.chain.transactions import Broadcast, Fees, Refusal, broadcast, sign, transact
from waterfall.devnet.proxy import delay, drop, error, forget, garbage, result, silence, status
from waterfall.signers import LocalSigner

TARGET = "0x" + "11" * 20
GWEI = 10**9
SENDER = LocalSigner(b"\x5a" * 32)
SEND = "eth_sendRawTransaction"
ACCEPTED, REFUSED, UNKNOWN = Broadcast.ACCEPTED, Broadcast.REFUSED, Broadcast.UNKNOWN

NO_MONEY = error(-32000, "insufficient funds for gas * price + value: balance 0, tx cost 1")
LOW_NONCE = error(-32000, "nonce too low: next nonce 2, tx nonce 1")
KNOWN = error(-32000, "already known")
WEIRD = error(-32000, "the stars are not right")
BUSY = error(-32603, "Internal error")


@pytest.fixture
async def funded(anvil):
    await anvil.rpc.call("anvil_setBalance", SENDER.address, hex(10**20))
    await anvil.rpc.call("evm_setAutomine", False)
    return anvil


def signed(anvil, *, nonce=0, fees=Fees(10 * GWEI, GWEI), gas=21_000, value=7, chain_id=None):  # noqa: B008
    return sign(
        SENDER,
        chain_id=chain_id or anvil.chain_id,
        nonce=nonce,
        target=TARGET,
        calldata=b"",
        gas=gas,
        fees=fees,
        value=value,
    )


async def mined(anvil):
    """What TARGET has once everything that waits is mined."""
    await anvil.rpc.call("anvil_mine", "0x1")
    return int(await anvil.rpc.call("eth_getBalance", TARGET, "latest"), 16)


@pytest.fixture
async def three(open_proxy):
    return [await open_proxy() for _ in range(3)]


async def test_broadcast__healthy_nodes__all_of_them_have_it(funded, three, open_rpc):
    rpc = await open_rpc(*three)
    outcome, _ = await broadcast(rpc, signed(funded).raw)
    assert outcome is ACCEPTED
    async with asyncio.timeout(5):
        while not all(proxy.asked(SEND) for proxy in three):
            await asyncio.sleep(0.005)
    assert await mined(funded) == 7


async def test_broadcast__the_same_bytes_again__still_accepted(funded, proxy, open_rpc):
    rpc = await open_rpc(proxy)
    raw = signed(funded).raw
    assert (await broadcast(rpc, raw)).outcome is ACCEPTED
    again = await broadcast(rpc, raw)
    assert (again.outcome, again.reason) == (ACCEPTED, None)
    assert again.detail == "transaction already imported"
    assert await mined(funded) == 7


@pytest.mark.parametrize(
    ("faults", "outcome", "reason"),
    [
        ([None, drop(), status(500)], ACCEPTED, None),
        ([NO_MONEY, LOW_NONCE, None], ACCEPTED, None),
        ([silence(), silence(), None], ACCEPTED, None),
        ([KNOWN, silence(), NO_MONEY], ACCEPTED, None),
        ([NO_MONEY, NO_MONEY, NO_MONEY], REFUSED, Refusal.INSUFFICIENT_FUNDS),
        ([NO_MONEY, LOW_NONCE, NO_MONEY], REFUSED, Refusal.NONCE_TOO_LOW),
        ([NO_MONEY, LOW_NONCE, drop()], UNKNOWN, None),
        ([NO_MONEY, NO_MONEY, silence()], UNKNOWN, None),
        ([NO_MONEY, NO_MONEY, silence(forward=True)], UNKNOWN, None),
        ([NO_MONEY, NO_MONEY, garbage()], UNKNOWN, None),
        ([NO_MONEY, NO_MONEY, status(502)], UNKNOWN, None),
        ([NO_MONEY, NO_MONEY, status(429)], UNKNOWN, None),
        ([NO_MONEY, NO_MONEY, BUSY], UNKNOWN, None),
        ([NO_MONEY, NO_MONEY, WEIRD], UNKNOWN, None),
        ([WEIRD, WEIRD, WEIRD], UNKNOWN, None),
        ([BUSY, BUSY, BUSY], UNKNOWN, None),
        ([drop(), garbage(), status(500)], UNKNOWN, None),
        ([silence(), silence(), silence()], UNKNOWN, None),
    ],
)
async def test_broadcast__nodes_that_differ__one_outcome(funded, three, open_rpc, faults, outcome, reason):
    rpc = await open_rpc(*three, timeout_seconds=0.5)
    for proxy, fault in zip(three, faults, strict=True):
        if fault is not None:
            proxy.fault(SEND, fault)
    sent = await broadcast(rpc, signed(funded).raw)
    assert (sent.outcome, sent.reason) == (outcome, reason)
    assert (sent.detail == "") == (None in faults)


async def test_broadcast__node_that_is_not_there__does_not_hide_that_the_others_refuse(
    funded, three, open_rpc
):
    rpc = await open_rpc(*three)
    three[0].fault(SEND, NO_MONEY)
    await three[1].refuse()
    three[2].fault("eth_chainId", result("0x1"))
    sent = await broadcast(rpc, signed(funded).raw)
    assert (sent.outcome, sent.reason) == (REFUSED, Refusal.INSUFFICIENT_FUNDS)
    assert three[2].asked(SEND) == [], "never given to a node of another chain"
    await three[0].refuse()
    assert (await broadcast(rpc, signed(funded).raw)).outcome is UNKNOWN


async def test_broadcast__node_that_has_just_gone__does_not_hide_it_either(funded, three, open_rpc):
    rpc = await open_rpc(*three[:2])
    for proxy in three[:2]:
        proxy.fault(SEND, NO_MONEY)
    assert (await broadcast(rpc, signed(funded).raw)).outcome is REFUSED
    await three[1].refuse()
    assert rpc.endpoints[1].is_ready, "nothing is known of it yet"
    assert (await broadcast(rpc, signed(funded).raw)).outcome is REFUSED


async def test_broadcast__node_that_does_not_tell_its_chain__was_given_nothing(funded, three, open_rpc):
    rpc = await open_rpc(*three)
    for proxy in three:
        proxy.fault(SEND, NO_MONEY)
    three[1].fault("eth_chainId", status(500))
    three[2].fault("eth_chainId", error(-32601, "the method is not available"))
    assert (await broadcast(rpc, signed(funded).raw)).outcome is REFUSED
    assert three[1].asked(SEND) == three[2].asked(SEND) == []


async def test_broadcast__one_accepts_one_is_slow__is_known_at_once_and_still_reaches_the_slow_one(
    funded, three, open_rpc
):
    first, second, third = three
    rpc = await open_rpc(*three, timeout_seconds=5)
    first.fault(SEND, delay(0.3))
    for proxy in (second, third):
        proxy.fault(SEND, forget())
    async with asyncio.timeout(4):
        assert (await broadcast(rpc, signed(funded).raw)).outcome is ACCEPTED
        assert await funded.rpc.call("eth_getTransactionByHash", signed(funded).tx_hash) is None
        while not await funded.rpc.call("eth_getTransactionByHash", signed(funded).tx_hash):
            await asyncio.sleep(0.01)
    assert await mined(funded) == 7


async def test_broadcast__lost_answer__is_unknown_and_was_sent(funded, proxy, open_rpc):
    rpc = await open_rpc(proxy)
    proxy.fault(SEND, drop(forward=True))
    assert (await broadcast(rpc, signed(funded).raw)).outcome is UNKNOWN
    assert await mined(funded) == 7


async def test_broadcast__forgotten__sent_again_is_mined(funded, proxy, open_rpc):
    rpc = await open_rpc(proxy)
    raw = signed(funded).raw
    proxy.fault(SEND, forget(), times=1)
    assert (await broadcast(rpc, raw)).outcome is ACCEPTED
    assert await mined(funded) == 0
    assert (await broadcast(rpc, raw)).outcome is ACCEPTED
    assert await mined(funded) == 7


async def test_broadcast__node_that_answered_nothing__names_it(funded, proxy, open_rpc):
    rpc = await open_rpc(proxy)
    proxy.fault(SEND, status(502))
    with pytest.raises(RpcUnavailable, match=f"{proxy.name}: HTTP 502"):
        await rpc.call(SEND, "0x" + signed(funded).raw.hex())


# ── Anvil's own words ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"nonce": 0}, Refusal.NONCE_TOO_LOW),
        ({"nonce": 1, "value": 10**21}, Refusal.INSUFFICIENT_FUNDS),
        ({"nonce": 1, "gas": 20_000}, Refusal.GAS_LIMIT),
        ({"nonce": 1, "gas": 10**9}, Refusal.GAS_LIMIT),
        ({"nonce": 1, "fees": Fees(1, 1)}, Refusal.FEE_BELOW_BASE),
        ({"nonce": 1, "fees": Fees(GWEI, 2 * GWEI)}, Refusal.INVALID),
        ({"nonce": 1, "chain_id": 1}, Refusal.INVALID),
    ],
)
async def test_broadcast__anvil_refuses__the_reason(funded, proxy, open_rpc, fields, reason):
    rpc = await open_rpc(proxy)
    assert (await broadcast(rpc, signed(funded).raw)).outcome is ACCEPTED
    assert await mined(funded) == 7
    sent = await broadcast(rpc, signed(funded, **fields).raw)
    assert (sent.outcome, sent.reason) == (REFUSED, reason), sent.detail


async def test_broadcast__anvil_has_another_of_this_nonce__underpriced(funded, proxy, open_rpc):
    rpc = await open_rpc(proxy)
    assert (await broadcast(rpc, signed(funded).raw)).outcome is ACCEPTED
    sent = await broadcast(rpc, signed(funded, fees=Fees(9 * GWEI, GWEI // 2)).raw)
    assert (sent.outcome, sent.reason) == (REFUSED, Refusal.UNDERPRICED), sent.detail


async def test_transact__through_faults_of_one_node__is_mined(anvil, three, open_rpc):
    await anvil.rpc.call("anvil_setBalance", SENDER.address, hex(10**20))
    rpc = await open_rpc(*three[:2])
    three[0].storm(seed=3, rate=0.5)
    receipt = await transact(rpc, SENDER, TARGET, b"")
    assert receipt["status"] == "0x1"
    assert Account.from_key(b"\x5a" * 32).address.lower() == receipt["from"].lower()
