import aiohttp
import pytest

from waterfall.chain.rpc import Rpc, RpcError, RpcUnavailable

URL = "http://node.invalid"


@pytest.fixture
async def rpc():
    rpc = Rpc(URL)
    yield rpc
    await rpc.close()


def answering(monkeypatch, rpc, answer):
    asked = []

    async def make_request(method, parameters):
        asked.append((method, parameters))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(rpc.provider, "make_request", make_request)
    return asked


@pytest.mark.parametrize("result", ["0x1", None, [], {}])
async def test_call__result__is_returned_as_it_is(monkeypatch, rpc, result):
    asked = answering(monkeypatch, rpc, {"jsonrpc": "2.0", "id": 1, "result": result})
    assert await rpc.call("eth_method", "a", 1) == result
    assert asked == [("eth_method", ["a", 1])]


@pytest.mark.parametrize(
    ("error", "reason", "data"),
    [
        ({"code": -32000, "message": "nonce too low"}, "nonce too low", None),
        ({"code": 3, "message": "execution reverted", "data": "0x1234"}, "execution reverted", "0x1234"),
        ({"code": -32000}, "{'code': -32000}", None),
        ("busy", "busy", None),
    ],
)
async def test_call__error_of_the_node__is_its_refusal(monkeypatch, rpc, error, reason, data):
    answering(monkeypatch, rpc, {"jsonrpc": "2.0", "id": 1, "error": error})
    with pytest.raises(RpcError) as refusal:
        await rpc.call("eth_method")
    assert refusal.value.details == {"method": "eth_method", "reason": reason, "data": data}


@pytest.mark.parametrize(
    "failure",
    [
        aiohttp.ClientConnectionError("refused"),
        TimeoutError(),
        ValueError("not JSON"),
        OSError("broken pipe"),
    ],
)
async def test_call__no_answer__nobody_knows(monkeypatch, rpc, failure):
    answering(monkeypatch, rpc, failure)
    with pytest.raises(RpcUnavailable, match=r"node\.invalid gave no answer"):
        await rpc.call("eth_method")


@pytest.mark.parametrize("answer", [{}, {"jsonrpc": "2.0", "id": 1}, [], [{"result": 1}], None, "ok"])
async def test_call__not_json_rpc__nobody_knows(monkeypatch, rpc, answer):
    answering(monkeypatch, rpc, answer)
    with pytest.raises(RpcUnavailable, match="not JSON-RPC"):
        await rpc.call("eth_method")
