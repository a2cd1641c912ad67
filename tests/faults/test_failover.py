"""The pool over real nodes that fail on demand: what it answers, which node it asks, what it tells."""

import asyncio
import gzip
import itertools
import json
import traceback
from email.utils import formatdate

import pytest
import structlog
from aiohttp import web

from waterfall.chain.rpc import Rpc, RpcError, RpcUnavailable, WrongChain
from waterfall.devnet.anvil import Anvil
from waterfall.devnet.proxy import (
    Proxy,
    delay,
    drop,
    error,
    garbage,
    result,
    silence,
    status,
    truncated,
    wrong_id,
)
from waterfall.errors import SettingsError

SECRET = "3f9a1c77d0e84b5e"
FAILURES = {
    "connection dropped": drop(),
    "answer dropped": drop(forward=True),
    "429": status(429, b'{"error": "slow down"}'),
    "500": status(500),
    "502 with a page": status(502, b"<html>"),
    "403": status(403),
    "redirect": status(302),
    "page": garbage(),
    "nothing": garbage(b""),
    "half of JSON": garbage(b'{"jsonrpc": "2.0", "id": 1, "res'),
    "no JSON-RPC": garbage(b'{"ok": true}'),
    "neither result nor error": garbage(b'{"jsonrpc": "2.0", "id": 2}'),
    "array": garbage(b"[]"),
    "error of no form": garbage(b'{"jsonrpc": "2.0", "id": 2, "error": "busy"}'),
    "error without message": garbage(b'{"jsonrpc": "2.0", "id": 2, "error": {"code": -32000}}'),
    "not UTF-8": garbage(b'{"jsonrpc": "2.0", "id": 2, "result": "\xff"}'),
    "cut": truncated(),
    "wrong id": wrong_id(),
    "limited": error(-32005, "daily request count exceeded, request rate limited"),
    "missing block": error(-32000, "header not found"),
    "internal error": error(-32603, "Internal error"),
}


async def until(condition, seconds=5):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


# ── One node ─────────────────────────────────────────────────────────────────────────────────────────


async def test_call__healthy_node__result_over_one_connection(anvil, proxy, open_rpc):
    rpc = await open_rpc(proxy)
    for _ in range(20):
        assert await rpc.call("eth_chainId") == hex(anvil.chain_id)
    assert proxy.connections == 1
    (endpoint,) = rpc.endpoints
    assert endpoint.healthy
    assert endpoint.requests == {"answered": 21}, "and one for the chain id"
    assert endpoint.latency.count == 21 == sum(endpoint.latency.buckets)


async def test_call__many_at_once__each_has_its_own_answer(anvil, proxy, open_rpc):
    await anvil.rpc.call("anvil_mine", hex(30))
    rpc = await open_rpc(proxy)
    blocks = await asyncio.gather(*(rpc.call("eth_getBlockByNumber", hex(n), False) for n in range(30)))
    assert [int(block["number"], 16) for block in blocks] == list(range(30))
    assert proxy.counts["eth_chainId"] == 1, "the chain is looked at once"


@pytest.mark.parametrize("name", FAILURES)
async def test_call__no_answer_to_be_used__is_unavailable_with_the_nodes_name(proxy, open_rpc, name):
    rpc = await open_rpc(proxy)
    await rpc.call("eth_blockNumber")
    proxy.fault("eth_gasPrice", FAILURES[name])
    with pytest.raises(RpcUnavailable) as failure:
        await rpc.call("eth_gasPrice")
    assert f"{proxy.name}: " in failure.value.message
    (endpoint,) = rpc.endpoints
    assert not endpoint.healthy
    assert endpoint.last_error in failure.value.message
    assert endpoint.requests["failed"] + endpoint.requests["limited"] == 1
    proxy.clear()
    await rpc.call("eth_gasPrice")
    assert endpoint.healthy


@pytest.mark.parametrize("forward", [False, True])
async def test_call__silence__ends_at_the_timeout(proxy, open_rpc, forward):
    rpc = await open_rpc(proxy, timeout_seconds=0.2)
    proxy.fault("eth_gasPrice", silence(forward=forward))
    with pytest.raises(RpcUnavailable, match=r"no answer within 0\.2 s"):
        await rpc.call("eth_gasPrice")


async def test_call__slow_node__is_waited_for(proxy, open_rpc):
    rpc = await open_rpc(proxy)
    proxy.fault("*", delay(0.05))
    assert await rpc.call("eth_blockNumber") == "0x0"


async def test_call__nobody_there__says_so_without_the_url(proxy, open_rpc):
    rpc = await open_rpc(proxy)
    await proxy.refuse()
    with pytest.raises(RpcUnavailable, match=f"{proxy.name}: it cannot be reached: Connect"):
        await rpc.call("eth_gasPrice")
    await proxy.listen()
    assert await rpc.call("eth_blockNumber") == "0x0"


@pytest.mark.parametrize(
    ("code", "message", "data"),
    [
        (3, "execution reverted: no", "0x1234"),
        (-32602, "invalid argument 0: hex string", None),
        (-32000, "nonce too low", None),
        (-32005, "query returned more than 10000 results", None),
        (-32601, "the method eth_gasPrice does not exist", None),
        (-32000, "words nobody has heard", None),
    ],
)
async def test_call__error_about_the_request__is_a_refusal_and_no_fault(proxy, open_rpc, code, message, data):
    rpc = await open_rpc(proxy)
    proxy.fault("eth_gasPrice", error(code, message, data))
    with pytest.raises(RpcError) as refusal:
        await rpc.call("eth_gasPrice")
    assert refusal.value.details == {
        "method": "eth_gasPrice",
        "reason": message,
        "data": data,
        "code": code,
    }
    assert rpc.endpoints[0].healthy
    assert rpc.endpoints[0].requests["refused"] == 1


@pytest.fixture
async def serve():
    """Answers every request with the given response, on a port of its own."""
    runners = []

    async def serve(make):
        async def handle(request):
            return make(json.loads(await request.read()))

        app = web.Application()
        app.router.add_post("/", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # noqa: SLF001

    yield serve
    for runner in runners:
        await runner.cleanup()


def answered(asked, value):
    return json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": value}).encode()


async def test_call__gzip__is_read(serve, open_rpc):
    def make(asked):
        body = gzip.compress(answered(asked, "0x" + "00" * 10_000))
        return web.Response(body=body, headers={"Content-Encoding": "gzip"})

    rpc = await open_rpc(await serve(make), chain_id=None)
    assert len(await rpc.call("eth_getCode")) == 20_002


@pytest.mark.parametrize("is_packed", [False, True])
async def test_call__body_over_the_bound__is_not_read_on(serve, open_rpc, is_packed):
    def make(asked):
        body = answered(asked, "0x" + "00" * 100_000)
        headers = {"Content-Encoding": "gzip"} if is_packed else {}
        return web.Response(body=gzip.compress(body) if is_packed else body, headers=headers)

    rpc = await open_rpc(await serve(make), chain_id=None, most_bytes=100_000)
    with pytest.raises(RpcUnavailable, match="larger than 100000 bytes"):
        await rpc.call("eth_getCode")


async def test_call__error_with_status_400__is_the_nodes_refusal(serve, open_rpc):
    def make(asked):
        found = {
            "jsonrpc": "2.0",
            "id": asked["id"],
            "error": {"code": -32000, "message": "Known transaction"},
        }
        return web.json_response(found, status=400)

    rpc = await open_rpc(await serve(make), chain_id=None)
    with pytest.raises(RpcError, match="Known transaction"):
        await rpc.call("eth_sendRawTransaction", "0x00")


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: answer.pop("jsonrpc"),
        lambda answer: answer.update(jsonrpc="1.0"),
        lambda answer: answer.pop("id"),
        lambda answer: answer.update(id=None),
        lambda answer: answer.update(id=str(answer["id"])),
        lambda answer: answer.update(id=bool(answer["id"])),
        lambda answer: answer.pop("result"),
        lambda answer: answer.update(error={"code": -32000, "message": "what?"}),
        lambda answer: answer.update(error="what?"),
    ],
)
async def test_call__answer_that_is_nearly_right__is_none(serve, open_rpc, change):
    def make(asked):
        answer = {"jsonrpc": "2.0", "id": asked["id"], "result": "0x1"}
        change(answer)
        return web.json_response(answer)

    rpc = await open_rpc(await serve(make), chain_id=None)
    with pytest.raises(RpcUnavailable):
        await rpc.call("eth_gasPrice")


async def test_call__redirect__is_not_followed(serve, open_rpc):
    asked_elsewhere = []

    def elsewhere(asked):
        asked_elsewhere.append(asked)
        return web.Response(body=answered(asked, "0x1"))

    other = await serve(elsewhere)
    url = await serve(lambda _: web.Response(status=307, headers={"Location": other}))
    rpc = await open_rpc(url, chain_id=None)
    with pytest.raises(RpcUnavailable, match="HTTP 307"):
        await rpc.call("eth_gasPrice")
    assert asked_elsewhere == []


# ── Several nodes ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def two(open_proxy):
    return await open_proxy(), await open_proxy()


@pytest.mark.parametrize("name", FAILURES)
async def test_call__preferred_node_fails__the_next_answers_and_is_kept(two, open_rpc, clock, name):
    first, second = two
    rpc = await open_rpc(first, second)
    await rpc.call("eth_blockNumber")
    first.fault("*", FAILURES[name])
    for _ in range(5):
        assert await rpc.call("eth_gasPrice")
    assert first.counts["eth_gasPrice"] == 1, "it is left alone"
    assert second.counts["eth_gasPrice"] == 5
    assert [endpoint.healthy for endpoint in rpc.endpoints] == [False, True]
    first.clear()
    clock.seconds += 1
    await rpc.call("eth_gasPrice")
    await until(lambda: rpc.endpoints[0].healthy)
    await rpc.call("eth_gasPrice")
    assert first.counts["eth_gasPrice"] == 2, "it is preferred again"


async def test_call__both_healthy__always_the_preferred_one(two, open_rpc):
    first, second = two
    rpc = await open_rpc(first, second)
    for _ in range(10):
        await rpc.call("eth_gasPrice")
    assert (first.counts["eth_gasPrice"], second.counts["eth_gasPrice"]) == (10, 0)


async def test_call__node_comes_back__nobody_waits_for_its_probe(two, open_rpc, clock):
    first, second = two
    rpc = await open_rpc(first, second, timeout_seconds=5)
    first.fault("*", drop())
    await rpc.call("eth_gasPrice")
    first.fault("*", silence())
    clock.seconds += 1
    async with asyncio.timeout(2):
        for _ in range(5):
            await rpc.call("eth_gasPrice")
    assert first.counts["eth_chainId"] <= 2, "one probe at a time"


async def test_call__node_stays_away__is_tried_less_and_less(two, open_rpc, clock):
    first, second = two
    rpc = await open_rpc(first, second)
    await rpc.call("eth_gasPrice")
    first.fault("*", drop())
    probes = []
    for _ in range(300):
        before = len(first.calls)
        await rpc.call("eth_gasPrice")
        await until(lambda: not rpc._behind)  # noqa: SLF001 - its probe has ended
        if len(first.calls) > before:
            probes.append(clock.seconds)
        clock.seconds += 1
    waited = [later - earlier for earlier, later in itertools.pairwise(probes)]
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert first.counts["eth_gasPrice"] == 2, "only a look at its chain, once it had failed"


async def test_call__one_method_of_the_only_node_fails__is_told_once_in_its_backoff(
    proxy, open_rpc, clock, all_logs
):
    rpc = await open_rpc(proxy)
    proxy.fault("eth_getLogs", error(-32000, "header not found"))
    with structlog.testing.capture_logs() as logs:
        for _ in range(10):
            with pytest.raises(RpcUnavailable):
                await rpc.call("eth_getLogs", {})
            assert not rpc.endpoints[0].healthy
            clock.seconds += 0.05
    assert [entry["event"] for entry in logs] == ["node cannot be used"]
    assert await rpc.call("eth_gasPrice")
    assert rpc.endpoints[0].healthy


async def test_call__many_fail_together__count_as_one_failure(two, open_rpc, clock):
    first, second = two
    rpc = await open_rpc(first, second)
    await rpc.call("eth_gasPrice")
    first.fault("*", status(502))
    await asyncio.gather(*(rpc.call("eth_gasPrice") for _ in range(20)))
    assert rpc.endpoints[0].requests["failed"] > 1
    first.clear()
    clock.seconds += 1
    await rpc.call("eth_gasPrice")
    await until(lambda: rpc.endpoints[0].healthy)


@pytest.mark.parametrize("retry_after", ["20", lambda: formatdate(usegmt=True)])
async def test_call__429_with_retry_after__is_left_alone_for_so_long(two, open_rpc, clock, retry_after):
    first, second = two
    rpc = await open_rpc(first, second)
    await rpc.call("eth_gasPrice")
    asked_for = retry_after if isinstance(retry_after, str) else retry_after()
    first.fault("*", status(429, retry_after=asked_for))
    await rpc.call("eth_gasPrice")
    first.clear()
    assert rpc.endpoints[0].requests["limited"] == 1
    seconds = 20 if asked_for == "20" else 1
    clock.seconds += seconds - 0.1
    await rpc.call("eth_gasPrice")
    await until(lambda: not rpc._behind)  # noqa: SLF001 - no probe is under way
    assert not rpc.endpoints[0].healthy
    clock.seconds += 0.1
    await rpc.call("eth_gasPrice")
    await until(lambda: rpc.endpoints[0].healthy)


async def test_call__refused_by_the_first__is_not_asked_elsewhere(two, open_rpc):
    first, second = two
    rpc = await open_rpc(first, second)
    first.fault("eth_call", error(3, "execution reverted", "0xabcd"))
    with pytest.raises(RpcError, match="execution reverted"):
        await rpc.call("eth_call", {}, "latest")
    assert second.calls == []
    assert rpc.endpoints[0].healthy


async def test_call__words_nobody_knows__another_node_is_asked_and_none_is_blamed(two, open_rpc):
    first, second = two
    rpc = await open_rpc(first, second)
    first.fault("eth_maxPriorityFeePerGas", error(-32601, "the method is not available"))
    assert await rpc.call("eth_maxPriorityFeePerGas")
    second.fault("eth_maxPriorityFeePerGas", error(-32000, "not for you"))
    with pytest.raises(RpcError, match="the method is not available"):
        await rpc.call("eth_maxPriorityFeePerGas")
    assert all(endpoint.healthy for endpoint in rpc.endpoints)


async def test_call__all_down__names_every_node_and_its_reason_and_goes_on_trying(two, open_rpc):
    first, second = two
    rpc = await open_rpc(first, second)
    await rpc.call("eth_gasPrice")
    first.fault("*", status(503))
    second.fault("*", garbage())
    for _ in range(3):
        with pytest.raises(RpcUnavailable) as failure:
            await rpc.call("eth_gasPrice")
        assert f"{first.name}: HTTP 503; {second.name}: its answer is not JSON" in failure.value.message
    first.clear()
    assert await rpc.call("eth_gasPrice"), "it is asked though its backoff is not over"


async def test_call__all_down_then_any_one_is_back__is_found_before_its_backoff_is_over(two, open_rpc, clock):
    rpc = await open_rpc(*two)
    await rpc.call("eth_gasPrice")
    for back in two:
        for proxy in two:
            proxy.fault("*", status(503))
        for _ in range(200):
            clock.seconds += 0.5
            with pytest.raises(RpcUnavailable):
                await rpc.call("eth_gasPrice")
        back.clear()
        failures = 0
        while failures < 2:
            clock.seconds += 0.01
            try:
                await rpc.call("eth_gasPrice")
                break
            except RpcUnavailable:
                failures += 1
        assert failures < 2, "at most one call asks the other one first"


async def test_call__stale_replica__is_used_only_while_the_first_is_away(anvil, two, open_rpc, clock):
    first, second = two
    await anvil.rpc.call("anvil_mine", "0x5")
    second.stale_by = 2
    rpc = await open_rpc(first, second)
    assert {await rpc.call("eth_blockNumber") for _ in range(5)} == {"0x5"}
    first.fault("*", drop())
    assert {await rpc.call("eth_blockNumber") for _ in range(5)} == {"0x3"}
    first.clear()
    clock.seconds += 1
    await rpc.call("eth_blockNumber")
    await until(lambda: rpc.endpoints[0].healthy)
    assert {await rpc.call("eth_blockNumber") for _ in range(5)} == {"0x5"}


async def test_call__block_that_a_replica_has_not_seen__is_asked_of_another(anvil, two, open_rpc):
    first, second = two
    await anvil.rpc.call("anvil_mine", "0x5")
    block = await anvil.rpc.call("eth_getBlockByNumber", "latest", False)
    first.stale_by = 2
    rpc = await open_rpc(first, second)
    assert await rpc.call("eth_getLogs", {"blockHash": block["hash"]}) == []
    assert await rpc.call("eth_getCode", "0x" + "00" * 20, block["number"]) == "0x"
    assert second.counts["eth_getLogs"] == 1


async def test_call__preferred_node_stands_still__others_are_asked_until_it_has_caught_up(
    anvil, two, open_rpc, clock
):
    first, second = two
    rpc = await open_rpc(first, second)

    async def newest():
        clock.seconds += 5
        await rpc.call("eth_gasPrice")
        await until(lambda: not rpc._behind)  # noqa: SLF001 - the nodes were compared
        return await rpc.call("eth_blockNumber")

    assert await newest() == "0x0"
    for number in (5, 10, 15):
        await anvil.rpc.call("anvil_mine", "0x5")
        first.stale_by = number
        last = await newest()
    assert last == "0xf"
    assert [endpoint.healthy for endpoint in rpc.endpoints] == [False, True]
    first.stale_by = 0
    await newest()
    assert all(endpoint.healthy for endpoint in rpc.endpoints)
    asked = second.counts["eth_blockNumber"]
    await rpc.call("eth_blockNumber")
    assert second.counts["eth_blockNumber"] == asked


async def test_call__waits_for_a_timeout__others_go_on(two, open_rpc):
    first, second = two
    rpc = await open_rpc(first, second, timeout_seconds=0.5)
    await rpc.call("eth_gasPrice")
    first.fault("eth_getLogs", silence())
    logs = asyncio.create_task(rpc.call("eth_getLogs", {}))
    await until(lambda: first.counts["eth_getLogs"] == 1)
    for _ in range(5):
        await rpc.call("eth_gasPrice")
    assert not logs.done()
    assert await logs == []
    assert second.counts["eth_getLogs"] == 1


# ── Chains ───────────────────────────────────────────────────────────────────────────────────────────


async def test_chain__of_the_preferred_node_is_wrong__never_used(two, open_rpc):
    first, second = two
    first.fault("eth_chainId", result("0x1"))
    rpc = await open_rpc(first, second)
    for _ in range(3):
        assert await rpc.call("eth_gasPrice")
    assert set(first.counts) == {"eth_chainId"}
    assert first.counts["eth_chainId"] == 1
    assert rpc.endpoints[0].last_error == "it is a node of chain 1, not of chain 31337"
    assert rpc.endpoints[0].requests == {"wrong_chain": 1}


@pytest.mark.parametrize("told", ["0x1", "31337", None, 31337, {}])
async def test_chain__of_all_is_wrong__says_so_and_nothing_is_asked_or_sent(two, open_rpc, told):
    rpc = await open_rpc(*two)
    for proxy in two:
        proxy.fault("eth_chainId", result(told))
    for method in ("eth_gasPrice", "eth_gasPrice"):
        with pytest.raises(WrongChain, match="not of chain 31337"):
            await rpc.call(method)
    with pytest.raises(RpcUnavailable, match="not of chain 31337"):
        await rpc.call("eth_sendRawTransaction", "0x00")
    with pytest.raises(WrongChain):
        await rpc.batch([("eth_gasPrice", ())])
    assert all(set(proxy.counts) == {"eth_chainId"} for proxy in two)


async def test_chain__node_replaced_by_one_of_another_chain__is_noticed(tmp_path, two, open_rpc, clock):
    first, second = two
    rpc = await open_rpc(first, second)
    await rpc.call("eth_gasPrice")
    await first.refuse()
    await rpc.call("eth_gasPrice")
    async with Anvil(tmp_path / "other", chain_id=99) as other:
        first.node = other.rpc_url
        await first.listen()
        clock.seconds += 1
        await rpc.call("eth_gasPrice")
        await until(lambda: rpc.endpoints[0].requests["wrong_chain"] == 1)
        clock.seconds += 1
        await rpc.call("eth_gasPrice")
    assert first.counts["eth_gasPrice"] == 1, "only before it went away"
    assert second.counts["eth_gasPrice"] == 3


async def test_chain__comes_right__node_is_used(proxy, open_rpc):
    rpc = await open_rpc(proxy)
    proxy.fault("eth_chainId", result("0x1"), times=1)
    with pytest.raises(WrongChain):
        await rpc.call("eth_gasPrice")
    assert await rpc.call("eth_gasPrice")


async def test_chain__none_expected__is_not_looked_at(proxy, open_rpc):
    rpc = await open_rpc(proxy, chain_id=None)
    proxy.fault("eth_gasPrice", status(500), times=1)
    with pytest.raises(RpcUnavailable):
        await rpc.call("eth_gasPrice")
    await rpc.call("eth_gasPrice")
    assert set(proxy.counts) == {"eth_gasPrice"}


async def test_chain__many_calls_wait_for_a_node_that_is_silent__ask_it_once(two, open_rpc):
    first, second = two
    first.fault("*", silence())
    rpc = await open_rpc(first, second, timeout_seconds=0.3)
    assert len(await asyncio.gather(*(rpc.call("eth_gasPrice") for _ in range(20)))) == 20
    assert first.counts == {"eth_chainId": 1}
    assert second.counts == {"eth_chainId": 1, "eth_gasPrice": 20}


async def test_chain__caller_gives_up__the_others_still_learn_it(proxy, open_rpc):
    rpc = await open_rpc(proxy)
    proxy.fault("eth_chainId", delay(0.1))
    first, second = [asyncio.create_task(rpc.call("eth_gasPrice")) for _ in range(2)]
    await until(lambda: proxy.calls)
    first.cancel()
    assert await second
    assert proxy.counts["eth_chainId"] == 1


# ── Batches ──────────────────────────────────────────────────────────────────────────────────────────

CALLS = [("eth_chainId", ()), ("eth_getBlockByNumber", ("0x0", False)), ("eth_nonsense", ())]


def check(answers):
    assert answers[0] == "0x7a69"
    assert answers[1]["number"] == "0x0"
    assert isinstance(answers[2], RpcError)
    assert answers[2].details["code"] == -32601


async def test_batch__calls__one_request_with_each_ones_answer_in_order(proxy, open_rpc):
    rpc = await open_rpc(proxy)
    check(await rpc.batch(CALLS))
    assert rpc.endpoints[0].requests == {"answered": 2}, "the chain id and the batch"
    assert await rpc.batch([]) == []


async def test_batch__more_than_fit_one__all_answered(anvil, proxy, open_rpc):
    await anvil.rpc.call("anvil_mine", hex(250))
    rpc = await open_rpc(proxy)
    blocks = await rpc.batch([("eth_getBlockByNumber", (hex(n), False)) for n in range(250)])
    assert [int(block["number"], 16) for block in blocks] == list(range(250))
    assert rpc.endpoints[0].requests == {"answered": 4}


async def test_batch__node_takes_none__is_asked_one_by_one_from_then_on(proxy, open_rpc):
    proxy.takes_batches = False
    rpc = await open_rpc(proxy)
    check(await rpc.batch(CALLS))
    asked = len(proxy.calls)
    check(await rpc.batch(CALLS))
    assert len(proxy.calls) == asked + 3, "no batch is tried again"
    assert rpc.endpoints[0].healthy


@pytest.mark.parametrize("name", FAILURES)
async def test_batch__node_fails__all_of_it_is_asked_of_the_next(two, open_rpc, name):
    first, second = two
    rpc = await open_rpc(first, second)
    first.fault("eth_getBlockByNumber", FAILURES[name])
    if name in {"no JSON-RPC", "array"}:
        first.fault("eth_getBlockByNumber", garbage(b"[1]"))
    check(await rpc.batch(CALLS))
    assert second.counts["eth_getBlockByNumber"] == 1
    assert not rpc.endpoints[0].healthy


async def test_batch__one_by_one_and_a_call_fails__the_next_node_is_asked(two, open_rpc):
    first, second = two
    first.takes_batches = False
    first.fault("eth_getBlockByNumber", drop())
    rpc = await open_rpc(first, second)
    check(await rpc.batch(CALLS))
    assert len(second.calls) == 4


async def test_batch__refused_in_words_nobody_knows__the_next_is_asked(two, open_rpc):
    rpc = await open_rpc(*two)
    calls = [("eth_gasPrice", ()), ("eth_getLogs", ({"fromBlock": "0x0", "toBlock": "0x0"},))]
    expected = await rpc.batch(calls)
    two[0].fault("eth_getLogs", error(-32000, "words nobody knows"))
    assert await rpc.batch(calls) == expected
    two[1].fault("eth_getLogs", error(-32602, "block range is too wide"))
    assert "block range" in str((await rpc.batch(calls))[1])


async def test_batch__all_down__is_unavailable(two, open_rpc):
    rpc = await open_rpc(*two)
    for proxy in two:
        proxy.fault("*", status(500))
    with pytest.raises(RpcUnavailable, match=f"{two[1].name}: HTTP 500"):
        await rpc.batch(CALLS)


async def test_batch__transaction__is_a_mistake(proxy, open_rpc):
    rpc = await open_rpc(proxy)
    with pytest.raises(ValueError, match="all nodes"):
        await rpc.batch([("eth_sendRawTransaction", ("0x00",))])


# ── Secrets ──────────────────────────────────────────────────────────────────────────────────────────


async def test_secrets__in_urls__are_in_no_error_log_or_repr(open_proxy, open_rpc, capsys, clock, all_logs):
    proxy = await open_proxy(path=f"/v2/{SECRET}")
    with_user = proxy.url.replace("://", f"://user:{SECRET}@") + f"?apikey={SECRET}"
    told = []
    rpc = await open_rpc(proxy, with_user, timeout_seconds=0.2)
    told += [repr(rpc), str(rpc.endpoints), *(endpoint.name for endpoint in rpc.endpoints)]
    faults = {
        "refusal": error(-32000, f"nonce too low, says {with_user}", f"see {proxy.url}"),
        **FAILURES,
        "silence": silence(),
        "own words": error(-32000, f"cannot reach {proxy.url}: key {SECRET} is not known, header not found"),
        "wrong chain": None,
        "nobody there": None,
    }
    for name, fault in faults.items():
        proxy.clear()
        proxy.fault("*", fault or result("0x1"))
        if fault is not None:
            proxy.fault("eth_chainId", result("0x7a69"))
        if name == "nobody there":
            await proxy.refuse()
        for method in ("eth_gasPrice", "eth_sendRawTransaction"):
            clock.seconds += 1000
            with pytest.raises((RpcError, RpcUnavailable)) as failure:
                await rpc.call(method, "0x00")
            shown = traceback.format_exception(failure.value)
            told += [*shown, str(failure.value.details), failure.value.message]
        told += [str(endpoint.last_error) for endpoint in rpc.endpoints]
    told += list(capsys.readouterr())
    assert any("node cannot be used" in text for text in told), "there are logs"
    assert any("nonce too low, says …" in text for text in told), "the rest of the words is there"
    assert not any(SECRET in text for text in told)
    assert not any("/v2" in text for text in told)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://host/" + SECRET,
        "host/" + SECRET,
        "http:///" + SECRET,
        "http://host:0/" + SECRET,
        f"http://h:x/{SECRET}",
    ],
)
def test_rpc__no_url__is_a_mistake_that_is_told_without_it(url):
    with pytest.raises(SettingsError) as refusal:
        Rpc(["http://127.0.0.1:1", url])
    assert "http or https URL" in refusal.value.message
    assert SECRET not in refusal.value.message


def test_rpc__several_keys_at_one_provider__have_names_of_their_own():
    rpc = Rpc(["https://rpc.example/a", "https://rpc.example/b", "http://[::1]:8545"])
    assert [endpoint.name for endpoint in rpc.endpoints] == [
        "rpc.example:443",
        "rpc.example:443#2",
        "[::1]:8545",
    ]


# ── The end ──────────────────────────────────────────────────────────────────────────────────────────


async def test_close__with_probes_and_connections_under_way__ends_them(anvil, clock):
    async with Proxy(anvil.rpc_url) as first, Proxy(anvil.rpc_url) as second:
        rpc = Rpc([first.url, second.url], chain_id=anvil.chain_id, clock=clock)
        await rpc.call("eth_gasPrice")
        first.fault("*", drop())
        await rpc.call("eth_gasPrice")
        first.fault("*", silence())
        clock.seconds += 1
        await rpc.call("eth_gasPrice")
        async with asyncio.timeout(2):
            await rpc.close()
            await rpc.close()
        assert not rpc._behind  # noqa: SLF001
