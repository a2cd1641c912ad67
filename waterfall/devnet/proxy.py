"""A JSON-RPC proxy before a real node, in our own process, that fails on demand.

    async with Proxy(anvil.rpc_url) as proxy:
        rpc = Rpc(proxy.url)
        proxy.fault("eth_getLogs", status(429, retry_after=2))   # until `clear`
        proxy.fault("eth_sendRawTransaction", drop(forward=True), times=1)
        proxy.fault("*", silence())                              # every method that has no fault of its own
        proxy.stale_by = 3                                       # a replica three blocks behind
        proxy.stands_at = 7                                      # one that is cut off from the chain
        proxy.storm(seed=7, rate=0.2)                            # random faults, the same ones for a seed
        proxy.clear()                                            # healthy again
        await proxy.refuse(); await proxy.listen()               # nobody listens at the port; somebody does again

A fault is a function of the exchange; it answers, or returns None to let the request pass. In a batch the first call
with a fault decides for all of it, unless the fault is one call's own answer.
"""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
from aiohttp import web

from waterfall.keccak import keccak

_STATE_BLOCK = {
    # Where the block parameter stands in calls that read the state.
    "eth_call": 1,
    "eth_estimateGas": 1,
    "eth_getBalance": 1,
    "eth_getCode": 1,
    "eth_getStorageAt": 2,
    "eth_getTransactionCount": 1,
}
_EPOCHS_BEHIND_HEAD = {"latest": 0, "pending": 0, "safe": 1, "finalized": 2}
"""Of anvil."""


@dataclass
class Exchange:
    """One request to the proxy."""

    proxy: "Proxy"
    request: web.Request
    body: Any
    """Decoded: one call, or a list of them."""

    async def forward(self) -> Any:
        """What the node answers, as the stale replica would where the proxy is one."""
        if isinstance(self.body, list):
            return [await self.proxy.ask(call) for call in self.body]
        return await self.proxy.ask(self.body)

    def cut(self) -> web.StreamResponse:
        """Reset the connection."""
        if self.request.transport is not None:
            self.request.transport.abort()
        return web.Response()


Call = dict[str, Any]
"""One call or its answer, decoded."""
Fault = Callable[[Exchange], Awaitable[web.StreamResponse]]


class Answer:
    """A fault that is one call's own answer, in a batch too."""

    def __init__(self, answer: Callable[["Proxy", Call], Awaitable[Call]]) -> None:
        self.answer = answer


# ── Faults ───────────────────────────────────────────────────────────────────────────────────────────


def drop(*, forward: bool = False) -> Fault:
    """The connection is reset, before the node has the request or after it answered."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        if forward:
            await exchange.forward()
        return exchange.cut()

    return fault


def silence(*, forward: bool = False) -> Fault:
    """The request is taken and never answered."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        if forward:
            await exchange.forward()
        await exchange.proxy.released.wait()
        return exchange.cut()

    return fault


def status(code: int, body: bytes = b"", *, retry_after: int | str | None = None) -> Fault:
    """An HTTP status in the place of an answer."""

    async def fault(_: Exchange) -> web.StreamResponse:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        return web.Response(status=code, body=body, headers=headers)

    return fault


def garbage(body: bytes = b"<html><body>Welcome to the hotel's network</body></html>") -> Fault:
    """Status 200 with something else than JSON-RPC."""

    async def fault(_: Exchange) -> web.StreamResponse:
        return web.Response(body=body, content_type="text/html")

    return fault


def truncated(*, forward: bool = True) -> Fault:
    """The right answer, cut in its middle."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        answer = json.dumps(await exchange.forward() if forward else {"jsonrpc": "2.0"}).encode()
        response = web.StreamResponse(headers={"Content-Length": str(len(answer))})
        await response.prepare(exchange.request)
        await response.write(answer[: len(answer) // 2])
        exchange.cut()
        return response

    return fault


def wrong_id() -> Fault:
    """The right answer to another request."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        answers = await exchange.forward()
        for answer in answers if isinstance(answers, list) else [answers]:
            answer["id"] += 1000
        return web.json_response(answers)

    return fault


def delay(seconds: float) -> Fault:
    """The right answer, late."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(exchange.proxy.released.wait(), seconds)
        return web.json_response(await exchange.forward())

    return fault


def error(code: int, message: str, data: Any = None) -> Answer:
    """A JSON-RPC error."""

    async def answer(_: "Proxy", call: Call) -> Call:
        found = {"code": code, "message": message} | ({} if data is None else {"data": data})
        return {"jsonrpc": "2.0", "id": call["id"], "error": found}

    return Answer(answer)


def result(value: Any, *, forward: bool = False) -> Answer:
    """Another result than the node's: `0x1` for eth_chainId is a wrong chain, None a swallowed receipt."""

    async def answer(proxy: "Proxy", call: Call) -> Call:
        if forward:
            await proxy.ask(call)
        return {"jsonrpc": "2.0", "id": call["id"], "result": value}

    return Answer(answer)


def forget() -> Answer:
    """A transaction is accepted and goes nowhere, as when a mempool drops it."""

    async def answer(_: "Proxy", call: Call) -> Call:
        raw = bytes.fromhex(call["params"][0][2:])
        return {"jsonrpc": "2.0", "id": call["id"], "result": "0x" + keccak(raw).hex()}

    return Answer(answer)


STORM: tuple[tuple[str, Fault | Answer], ...] = (
    ("*", drop()),
    ("*", drop(forward=True)),
    ("*", status(429)),
    ("*", status(502)),
    ("*", garbage()),
    ("*", truncated()),
    ("*", wrong_id()),
    ("*", error(-32603, "internal error")),
    ("*", error(-32000, "header not found")),
    ("*", result(None)),
    ("eth_sendRawTransaction", forget()),
    ("eth_sendRawTransaction", error(-32000, "txpool is full")),
)
"""What a storm chooses from: each only for its method."""


@dataclass
class _Active:
    """A fault that is on."""

    fault: Fault | Answer
    times: int | None
    """How often still; None: until it is taken back."""


# ── The proxy ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Proxy:
    """Passes requests on to a node, but for the faults that are on."""

    node: str
    path: str = "/"
    """Of its URL: a key, for tests that look for it in messages."""
    stale_by: int = 0
    """It answers as of so many blocks ago: heads, state, nonces, receipts, logs."""
    stands_at: int | None = None
    """It has no blocks after this one, as if it was cut off from the chain; None: it has."""
    epoch_blocks: int = 1
    """Of the node, for the stale replica's `safe` and `finalized`."""
    takes_batches: bool = True
    keeps_calls: bool = True
    """Whether `calls` is kept: over hours it would grow without end."""
    calls: list[tuple[str, list[Any]]] = field(default_factory=list, init=False)
    """Everything it was asked, in order."""
    released: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    """Set when the proxy stops: what waits for ever ends."""
    _faults: dict[str, "_Active"] = field(default_factory=dict, init=False)
    _random: random.Random | None = field(default=None, init=False)
    _rate: float = field(default=0, init=False)
    _storm: Sequence[tuple[str, Fault | Answer]] = field(default=(), init=False)
    _port: int = field(default=0, init=False)
    _transports: set[asyncio.Transport] = field(default_factory=set, init=False)
    _peers: set[Any] = field(default_factory=set, init=False)

    # ── What is done to it ───────────────────────────────────────────────────────────────────────────

    def fault(self, method: str, fault: Fault | Answer, *, times: int | None = None) -> None:
        """Do this with a method's requests (`*`: all without a fault of their own), as often, or until `clear`."""
        self._faults[method] = _Active(fault, times)

    def clear(self, method: str | None = None) -> None:
        """Take a method's fault back, or everything: faults, staleness, storm."""
        if method is not None:
            self._faults.pop(method, None)
            return
        self._faults.clear()
        self.stale_by, self.stands_at, self.takes_batches, self._random = 0, None, True, None

    def storm(self, seed: int, rate: float, faults: Sequence[tuple[str, Fault | Answer]] = STORM) -> None:
        """From now on, let a part of all requests fail, each in a way drawn from those for its method."""
        self._random, self._rate, self._storm = random.Random(seed), rate, faults  # noqa: S311 - repeatable

    async def refuse(self) -> None:
        """Close the port and all connections: nobody is there any more."""
        await self._site.stop()
        for transport in self._transports:
            transport.abort()
        self._transports.clear()
        await asyncio.sleep(0.01)  # clients in this process see it

    async def listen(self) -> None:
        """Open the port, the same one again."""
        self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await self._site.start()
        self._port = self._runner.addresses[0][1]

    @property
    def url(self) -> str:
        """Where to ask."""
        return f"http://127.0.0.1:{self._port}{self.path}"

    @property
    def name(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._port}"

    @property
    def connections(self) -> int:
        """How many it has had that asked something."""
        return len(self._peers)

    def asked(self, method: str) -> list[list[Any]]:
        """The parameters of all calls of a method."""
        return [parameters for asked, parameters in self.calls if asked == method]

    @property
    def counts(self) -> Counter[str]:
        """How often each method was asked."""
        return Counter(method for method, _ in self.calls)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession()
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.released.set()
        await self._runner.cleanup()
        await self._session.close()

    # ── How it answers ───────────────────────────────────────────────────────────────────────────────

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            self._transports.add(request.transport)
            self._peers.add(request.transport.get_extra_info("peername"))
        body = json.loads(await request.read())
        calls = body if isinstance(body, list) else [body]
        if self.keeps_calls:
            self.calls += [(call["method"], call["params"]) for call in calls]
        if isinstance(body, list) and not self.takes_batches:
            refusal = {"code": -32600, "message": "batch requests are not supported"}
            return web.json_response({"jsonrpc": "2.0", "id": None, "error": refusal})
        exchange = Exchange(self, request, body)
        answers = []
        for call in calls:
            fault = self._next(call["method"])
            if fault is None:
                answers.append(await self.ask(call))
            elif isinstance(fault, Answer):
                answers.append(await fault.answer(self, call))
            else:
                return await fault(exchange)
        return web.json_response(answers if isinstance(body, list) else answers[0])

    def _next(self, method: str) -> Fault | Answer | None:
        found = self._faults.get(method) or self._faults.get("*")
        if found is not None:
            if found.times is None:
                return found.fault
            if found.times > 0:
                found.times -= 1
                return found.fault
        if self._random is not None and self._random.random() < self._rate:
            return self._random.choice([fault for of, fault in self._storm if of in {"*", method}])
        return None

    async def ask(self, call: Call) -> Call:
        """The node's answer to a call; that of the stale replica, where this is one."""
        has_all = self.stale_by == 0 and self.stands_at is None
        return await (self._node if has_all else self._replica)(call)

    async def _node(self, call: Call) -> Call:
        async with self._session.post(self.node, json=call) as response:
            answer: Call = await response.json()
            return answer

    async def _replica(self, call: Call) -> Call:
        """As a node that has not seen the newest blocks."""
        method, parameters = call["method"], list(call["params"])
        real = await self._node({"jsonrpc": "2.0", "id": 0, "method": "eth_blockNumber", "params": []})
        head = max(0, int(real["result"], 16) - self.stale_by)
        head = head if self.stands_at is None else min(head, self.stands_at)
        if method == "eth_blockNumber":
            return _answer(call, hex(head))
        if method == "eth_getBlockByNumber":
            parameters[0] = self._as_of(parameters[0], head)
            if int(parameters[0], 16) > head:
                return _answer(call, None)
        elif method in _STATE_BLOCK:
            place = _STATE_BLOCK[method]
            asked = parameters[place] if len(parameters) > place else "latest"
            if isinstance(asked, str):
                parameters[place:] = [self._as_of(asked, head)]
                if int(parameters[place], 16) > head:
                    return await error(-32000, "header not found").answer(self, call)
        elif method == "eth_getLogs":
            return await self._replica_logs(call, parameters[0], head)
        answer = await self._node(call | {"params": parameters})
        found = answer.get("result")
        number = found.get("blockNumber", found.get("number")) if isinstance(found, dict) else None
        return _answer(call, None) if number is not None and int(number, 16) > head else answer

    async def _replica_logs(self, call: Call, wanted: dict[str, str], head: int) -> Call:
        if "blockHash" in wanted:
            block = await self._node(
                call | {"method": "eth_getBlockByHash", "params": [wanted["blockHash"], False]}
            )
            found = block.get("result")
            if found is None or int(found["number"], 16) > head:
                return await error(-32000, "unknown block").answer(self, call)
            return await self._node(call)
        bounds = {key: self._as_of(wanted.get(key, "latest"), head) for key in ("fromBlock", "toBlock")}
        if int(bounds["fromBlock"], 16) > head:
            return _answer(call, [])
        bounds["toBlock"] = hex(min(head, int(bounds["toBlock"], 16)))
        return await self._node(call | {"params": [wanted | bounds]})

    def _as_of(self, block: str, head: int) -> str:
        """A block's number, as a replica with this head has it."""
        if block == "earliest":
            return "0x0"
        if block not in _EPOCHS_BEHIND_HEAD:
            return block
        return hex(max(0, head - self.epoch_blocks * _EPOCHS_BEHIND_HEAD[block]))


def _answer(call: Call, value: Any) -> Call:
    return {"jsonrpc": "2.0", "id": call["id"], "result": value}
