"""The proxy fails as it says it does: seen by a plain client, so that nothing of ours can hide it."""

import aiohttp
import pytest
from eth_account import Account

from waterfall.devnet.proxy import (
    Proxy,
    delay,
    drop,
    error,
    forget,
    garbage,
    result,
    silence,
    status,
    truncated,
    wrong_id,
)

KEY = "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80"
TARGET = "0x" + "11" * 20


def call(method, *parameters, id_=1):
    return {"jsonrpc": "2.0", "id": id_, "method": method, "params": list(parameters)}


class Client:
    """Asks a proxy, and looks at the answer as it came."""

    def __init__(self, session, url):
        self.session, self.url = session, url

    async def post(self, body, *, seconds=5):
        timeout = aiohttp.ClientTimeout(total=seconds)
        async with self.session.post(self.url, json=body, timeout=timeout) as response:
            return response.status, response.headers, await response.read()

    async def ask(self, method, *parameters):
        async with self.session.post(self.url, json=call(method, *parameters)) as response:
            return await response.json()

    async def result(self, method, *parameters):
        return (await self.ask(method, *parameters))["result"]


@pytest.fixture
async def client(proxy):
    async with aiohttp.ClientSession() as session:
        yield Client(session, proxy.url)


@pytest.fixture
async def transaction(anvil):
    """A signed transaction of a funded key."""
    account = Account.from_key(KEY)
    await anvil.rpc.call("anvil_setBalance", account.address, hex(10**20))
    fields = {"nonce": 0, "gas": 21_000, "maxFeePerGas": 10**10, "maxPriorityFeePerGas": 1}
    signed = account.sign_transaction({**fields, "to": TARGET, "value": 7, "chainId": anvil.chain_id})
    return "0x" + bytes(signed.raw_transaction).hex(), "0x" + bytes(signed.hash).hex()


async def mine(anvil):
    """Mine, without leaving it to anvil when."""
    await anvil.rpc.call("anvil_mine", "0x1")


async def balance(anvil):
    await mine(anvil)
    return int(await anvil.rpc.call("eth_getBalance", TARGET, "latest"), 16)


async def test_proxy__no_fault__the_nodes_own_answers_over_one_connection(anvil, proxy, client):
    assert await client.result("eth_chainId") == hex(anvil.chain_id)
    assert (await client.ask("eth_nonsense"))["error"]["code"] == -32601
    batch = [call("eth_chainId", id_=1), call("eth_blockNumber", id_=2)]
    async with client.session.post(proxy.url, json=batch) as response:
        assert [answer["id"] for answer in await response.json()] == [1, 2]
    assert proxy.connections == 1
    assert proxy.counts == {"eth_chainId": 2, "eth_nonsense": 1, "eth_blockNumber": 1}


@pytest.mark.parametrize(
    ("forward", "moved"),
    [(False, 0), (True, 7)],
)
@pytest.mark.parametrize("fault", [drop, silence])
async def test_fault__no_answer__before_or_after_the_node_has_it(
    anvil, proxy, client, transaction, fault, forward, moved
):
    proxy.fault("eth_sendRawTransaction", fault(forward=forward))
    with pytest.raises((aiohttp.ClientError, TimeoutError)):
        await client.post(call("eth_sendRawTransaction", transaction[0]), seconds=0.5)
    assert await balance(anvil) == moved


async def test_fault__times__ends_by_itself(proxy, client):
    proxy.fault("*", status(500), times=2)
    statuses = [(await client.post(call("eth_chainId")))[0] for _ in range(3)]
    assert statuses == [500, 500, 200]


async def test_fault__of_one_method__leaves_the_others_alone(proxy, client):
    proxy.fault("eth_call", status(429, retry_after=7))
    code, headers, _ = await client.post(call("eth_call"))
    assert (code, headers["Retry-After"]) == (429, "7")
    assert (await client.post(call("eth_chainId")))[0] == 200
    proxy.clear("eth_call")
    assert (await client.post(call("eth_call", {}, "latest")))[0] == 200


async def test_fault__garbage__status_200_without_json(proxy, client):
    proxy.fault("*", garbage())
    code, _, body = await client.post(call("eth_chainId"))
    assert (code, body[:6]) == (200, b"<html>")


async def test_fault__truncated__is_cut_in_the_body(proxy, client):
    proxy.fault("*", truncated())
    with pytest.raises(aiohttp.ClientPayloadError):
        await client.post(call("eth_chainId"))


async def test_fault__wrong_id__is_the_answer_to_something_else(proxy, client):
    proxy.fault("*", wrong_id())
    assert (await client.ask("eth_chainId"))["id"] == 1001


async def test_fault__error_and_result__in_the_place_of_the_nodes(proxy, client):
    proxy.fault("eth_call", error(-32000, "header not found", "0x12"))
    proxy.fault("eth_chainId", result("0x1"))
    answer = await client.ask("eth_call")
    assert answer["error"] == {"code": -32000, "message": "header not found", "data": "0x12"}
    assert await client.result("eth_chainId") == "0x1"


async def test_fault__delay__is_the_answer_late(anvil, proxy, client):
    proxy.fault("*", delay(0.01))
    assert await client.result("eth_chainId") == hex(anvil.chain_id)


async def test_forget__transaction__its_hash_and_nothing_else(anvil, proxy, client, transaction):
    raw, tx_hash = transaction
    proxy.fault("eth_sendRawTransaction", forget())
    assert await client.result("eth_sendRawTransaction", raw) == tx_hash
    assert await balance(anvil) == 0
    proxy.clear()
    assert await client.result("eth_sendRawTransaction", raw) == tx_hash
    assert await balance(anvil) == 7


async def test_result__receipt_swallowed__until_it_is_cleared(anvil, proxy, client, transaction):
    raw, tx_hash = transaction
    await client.result("eth_sendRawTransaction", raw)
    await mine(anvil)
    proxy.fault("eth_getTransactionReceipt", result(None))
    assert await client.result("eth_getTransactionReceipt", tx_hash) is None
    proxy.clear()
    assert (await client.result("eth_getTransactionReceipt", tx_hash))["status"] == "0x1"


async def test_refuse__and_listen__nobody_there_then_the_same_port(proxy, client):
    url = proxy.url
    await client.result("eth_chainId")
    await proxy.refuse()
    with pytest.raises(aiohttp.ClientConnectorError):
        await client.post(call("eth_chainId"))
    await proxy.listen()
    assert proxy.url == url
    await client.result("eth_chainId")


async def test_stale__replica__knows_nothing_of_the_newest_blocks(anvil, proxy, client, transaction):
    await anvil.rpc.call("anvil_mine", "0x5")
    raw, tx_hash = transaction
    sender = Account.from_key(KEY).address
    await anvil.rpc.call("evm_setAutomine", False)
    await client.result("eth_sendRawTransaction", raw)
    await mine(anvil)
    block = await anvil.rpc.call("eth_getBlockByNumber", "latest", False)
    assert block["transactions"] == [tx_hash]
    await anvil.rpc.call("anvil_mine", "0x2")
    proxy.stale_by = 3
    head = int(await anvil.rpc.call("eth_blockNumber"), 16) - 3
    assert await client.result("eth_blockNumber") == hex(head)
    assert (await client.result("eth_getBlockByNumber", "latest", False))["number"] == hex(head)
    assert await client.result("eth_getBlockByNumber", block["number"], False) is None
    assert await client.result("eth_getBlockByHash", block["hash"], False) is None
    assert await client.result("eth_getTransactionReceipt", tx_hash) is None
    assert await client.result("eth_getTransactionCount", sender, "latest") == "0x0"
    assert await client.result("eth_getBalance", TARGET, "latest") == "0x0"
    assert (await client.ask("eth_getBalance", TARGET, block["number"]))["error"]["code"] == -32000
    assert (await client.ask("eth_getLogs", {"blockHash": block["hash"]}))["error"]["code"] == -32000
    assert await client.result("eth_getLogs", {"fromBlock": "0x0", "toBlock": block["number"]}) == []
    proxy.stale_by = 2
    assert await client.result("eth_getTransactionCount", sender, "latest") == "0x1"
    assert (await client.result("eth_getTransactionReceipt", tx_hash))["status"] == "0x1"


async def outcomes(client, seed):
    client.proxy.storm(seed, 0.5)
    found = []
    for _ in range(40):
        try:
            code, _, body = await client.post(call("eth_blockNumber"))
            found.append((code, body[:20]))
        except aiohttp.ClientError as failure:
            found.append(type(failure).__name__)
    return found


async def test_storm__seed__the_same_faults_again(proxy, client):
    client.proxy = proxy
    first, again, other = [await outcomes(client, seed) for seed in (1, 1, 2)]
    assert first == again != other
    assert len(set(map(str, first))) > 4, "several kinds of faults"
    good = sum(outcome[0] == 200 and b"jsonrpc" in outcome[1] for outcome in first)
    assert 5 < good < 35
    proxy.clear()
    assert (await client.post(call("eth_blockNumber")))[0] == 200


async def test_batch__fault_of_one_call__its_own_answer_or_the_whole_batchs(proxy, client):
    batch = [call("eth_chainId", id_=1), call("eth_call", {}, "latest", id_=2)]
    proxy.fault("eth_call", error(-32000, "header not found"))
    async with client.session.post(proxy.url, json=batch) as response:
        first, second = await response.json()
    assert ("result" in first, "error" in second) == (True, True)
    proxy.fault("eth_call", status(500))
    assert (await client.post(batch))[0] == 500
    proxy.clear()
    proxy.takes_batches = False
    async with client.session.post(proxy.url, json=batch) as response:
        assert "error" in await response.json()


async def test_proxy__stops__with_a_request_that_is_never_answered(anvil):
    async with aiohttp.ClientSession() as session, Proxy(anvil.rpc_url) as proxy:
        proxy.fault("*", silence())
        with pytest.raises(TimeoutError):
            await Client(session, proxy.url).post(call("eth_chainId"), seconds=0.1)
