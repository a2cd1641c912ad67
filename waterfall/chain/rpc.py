"""JSON-RPC to one chain, over one node or several.

Failures are told apart: the nodes said no (`RpcError`), or nobody knows (`RpcUnavailable`).
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import aiohttp
import structlog

from waterfall.chain.endpoint import Endpoint
from waterfall.chain.jsonrpc import Call, NoAnswer, Refused
from waterfall.chain.refusals import Broadcast, Fault, classify
from waterfall.errors import ChainError, SettingsError

_SEND = "eth_sendRawTransaction"
_IDLE_SECONDS = 4
"""Shorter than after what servers close an idle connection (Node.js: 5 s): none closes while we send."""
_MOST_BYTES = 64 * 2**20
_COMPARE_SECONDS = 5
"""How often the nodes' newest blocks are compared, and so how long one may lack what another has."""

log = structlog.get_logger()


class RpcUnavailable(ChainError):
    """No node of the chain gave an answer: {reason}."""

    code = "rpc_unavailable"


class WrongChain(RpcUnavailable):
    """No node of this chain is configured: {reason}."""

    code = "wrong_chain"


class RpcError(ChainError):
    """The chain's node refused {method}: {reason}."""

    code = "rpc_error"


class Rpc:
    """Calls the nodes of one chain: the preferred one as long as it answers, else the next.

    A node that gives no answer is avoided for a while, which doubles from a second to a minute, and then probed. Its
    chain is looked at before it is used, and again after it failed. One that answers and stands still comes after those
    that go on.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        chain_id: int | None = None,
        timeout_seconds: float = 10,
        most_bytes: int = _MOST_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Describe the nodes. Nothing is asked yet.

        Args:
            urls: of one node or several, the preferred ones first.
            chain_id: the chain all of them have to be of; None takes their word for it (for set-up).
            timeout_seconds: how long one node may take to answer once.
            most_bytes: the largest answer that is read.
            clock: seconds, for backoffs and latencies.

        Raises:
            SettingsError: one of them is no URL.
        """
        try:
            self.endpoints = tuple(
                Endpoint(
                    url,
                    chain_id=chain_id,
                    timeout_seconds=timeout_seconds,
                    most_bytes=most_bytes,
                    clock=clock,
                )
                for url in ([urls] if isinstance(urls, str) else urls)
            )
        except ValueError as error:
            raise SettingsError(reason=f"the URL of a node {error}") from None
        if not self.endpoints:
            raise SettingsError(reason="there is no node to ask")
        _tell_apart(self.endpoints)
        self._clock = clock
        self._compared_at = clock()
        self._newest_then = 0
        """The newest block that any node had when they were last compared."""
        self._session: aiohttp.ClientSession | None = None
        self._behind: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"Rpc({', '.join(endpoint.name for endpoint in self.endpoints)})"

    async def call(self, method: str, *parameters: Any) -> Any:
        """The result of one call. `eth_sendRawTransaction` goes to all nodes at once, everything else to one.

        Raises:
            RpcUnavailable: no answer, or not a JSON-RPC answer; whatever was asked may have happened.
            RpcError: a node's own error; `details["code"]` is its code, `details["data"]` has revert data where it
                sent any. Of a transaction that is sent: all nodes refuse it, or one says that it has it already.
        """
        if method == _SEND:
            return await self._send(parameters)
        unclear: Refused | None = None
        for endpoint in self._in_order():
            try:
                return await endpoint.call(self._http(), method, parameters)
            except Refused as refused:
                if refused.fault is Fault.REQUEST:
                    raise _error(method, refused) from None
                unclear = unclear or refused
            except NoAnswer:
                continue  # the endpoint keeps its reason
        raise self._unavailable(method) if unclear is None else _error(method, unclear)

    async def batch(self, calls: Sequence[Call]) -> list[Any]:
        """The results of many calls, all of one node's: in one request where it takes that.

        As with a single call, another node is asked where one says no for a reason of its own.

        Args:
            calls: methods with their parameters; no transactions to send.

        Returns:
            For each call its result, or the `RpcError` it was refused with.

        Raises:
            RpcUnavailable: no node answers all of them.
        """
        if any(method == _SEND for method, _ in calls):
            raise ValueError(f"{_SEND} goes to all nodes, not into a batch")
        if not calls:
            return []
        unclear: list[Any] | None = None
        for endpoint in self._in_order():
            try:
                answers = await endpoint.batch(self._http(), calls)
            except NoAnswer:
                continue
            refused = [answer for answer in answers if isinstance(answer, Refused)]
            found = [
                _error(method, answer) if isinstance(answer, Refused) else answer
                for (method, _), answer in zip(calls, answers, strict=True)
            ]
            if all(answer.fault is Fault.REQUEST for answer in refused):
                return found
            unclear = unclear or found
        if unclear is None:
            raise self._unavailable("batch")
        return unclear

    async def close(self) -> None:
        """Close all connections; what is still under way behind the calls ends."""
        for task in self._behind:
            task.cancel()
        if self._behind:
            await asyncio.wait(self._behind)
        for endpoint in self.endpoints:
            await endpoint.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    # ── Which node ───────────────────────────────────────────────────────────────────────────────────

    def _in_order(self) -> list[Endpoint]:
        """The nodes to ask, until one answers: those in use, those to be tried again, the least bad of the others."""
        ready = [endpoint for endpoint in self.endpoints if endpoint.is_ready]
        if len(ready) > 1 and self._clock() - self._compared_at >= _COMPARE_SECONDS:
            self._compared_at = self._clock()
            self._start(self._compare(ready))
        ready.sort(key=lambda endpoint: endpoint.is_behind)
        due = [endpoint for endpoint in self.endpoints if endpoint.is_due and not endpoint.is_ready]
        avoided = [endpoint for endpoint in self.endpoints if not endpoint.is_due]
        if ready:
            # Nobody waits for a node that may still be dead while another one answers.
            for endpoint in due:
                if not endpoint.is_being_verified:
                    self._start(endpoint.verify(self._http()))
        # Of those that have failed just now, the one that did so longest ago: each has its turn.
        return ready + due + sorted(avoided, key=lambda endpoint: endpoint.failed_at)[:1]

    async def _compare(self, endpoints: Sequence[Endpoint]) -> None:
        """See which nodes still lack a block that another one had the last time."""

        async def newest(endpoint: Endpoint) -> int | None:
            try:
                return quantity(await endpoint.call(self._http(), "eth_blockNumber", ()))
            except (Refused, NoAnswer, RpcUnavailable):
                return None

        found = await asyncio.gather(*(newest(endpoint) for endpoint in endpoints))
        numbers = {
            endpoint: number for endpoint, number in zip(endpoints, found, strict=True) if number is not None
        }
        for endpoint, number in numbers.items():
            was_behind, endpoint.is_behind = endpoint.is_behind, number < self._newest_then
            if endpoint.is_behind != was_behind:
                says = "node is behind" if endpoint.is_behind else "node has caught up"
                log.warning(says, endpoint=endpoint.name, block=number, others_had=self._newest_then)
        self._newest_then = max(numbers.values(), default=0)

    def _unavailable(self, method: str) -> RpcUnavailable:
        reasons = {endpoint.name: endpoint.last_error or "not asked" for endpoint in self.endpoints}
        every_chain_is_wrong = all(endpoint.is_of_another_chain for endpoint in self.endpoints)
        return (WrongChain if every_chain_is_wrong else RpcUnavailable)(
            reason="; ".join(f"{name}: {reason}" for name, reason in reasons.items()), method=method
        )

    # ── Sending ──────────────────────────────────────────────────────────────────────────────────────

    async def _send(self, parameters: Sequence[Any]) -> Any:
        """Give a transaction to all nodes; the first that has it decides, else all of them together."""
        tasks = {
            self._start(endpoint.call(self._http(), _SEND, parameters)): endpoint.name
            for endpoint in self.endpoints
        }
        waiting = set(tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                failure = task.exception()
                if failure is None:
                    return task.result()
                if not isinstance(failure, NoAnswer | Refused):
                    raise failure
                if isinstance(failure, Refused) and classify(failure.message) is Broadcast.ACCEPTED:
                    raise _error(_SEND, failure) from None
        failures = {name: task.exception() for task, name in tasks.items()}
        refused = [failure for failure in failures.values() if isinstance(failure, Refused)]
        clear = [failure for failure in refused if classify(failure.message) is Broadcast.REFUSED]
        may_have_it = any(
            isinstance(failure, NoAnswer) and failure.delivered for failure in failures.values()
        )
        if may_have_it or not refused or len(clear) not in {0, len(refused)}:
            words = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
            raise RpcUnavailable(reason=words, method=_SEND)
        first = refused[0]
        words = "; ".join(dict.fromkeys(failure.message for failure in refused))
        raise _error(_SEND, Refused(first.code, words, first.data))

    # ── Inside ───────────────────────────────────────────────────────────────────────────────────────

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(keepalive_timeout=_IDLE_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start what may outlive the call that needs it."""
        task = asyncio.create_task(work)
        self._behind.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._behind.discard(task)
        if not task.cancelled():
            task.exception()  # its endpoint keeps it


def quantity(value: Any) -> int:
    """An integer as nodes write it: `0x…`.

    Raises:
        RpcUnavailable: it is none.
    """
    if not isinstance(value, str) or not value.startswith("0x"):
        raise RpcUnavailable(reason="a node answered with something else than a number")
    try:
        return int(value, 16)
    except ValueError:
        raise RpcUnavailable(reason="a node answered with something else than a number") from None


def member(answer: Any, name: str) -> Any:
    """A member of an object that a node answered with.

    Raises:
        RpcUnavailable: it is no object, or has none of this name.
    """
    if not isinstance(answer, dict) or name not in answer:
        raise RpcUnavailable(reason=f"a node answered without {name}")
    return answer[name]


def _error(method: str, refused: Refused) -> RpcError:
    return RpcError(method=method, reason=refused.message, data=refused.data, code=refused.code)


def _tell_apart(endpoints: Sequence[Endpoint]) -> None:
    """Number the names of nodes that share host and port, such as two keys at one provider."""
    names = [endpoint.name for endpoint in endpoints]
    for index, endpoint in enumerate(endpoints):
        earlier = names[:index].count(names[index])
        if earlier:
            endpoint.name = f"{endpoint.name}#{earlier + 1}"
