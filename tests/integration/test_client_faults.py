"""Clients that leave, crawl or are cut off: the call is metered to its end and charged exactly once."""

import asyncio
import contextlib
import json
import random
import socket
import threading
from urllib.parse import urlsplit

import aiohttp
import pytest
from service import running, settings_for
from upstream import answer, chunk, delta, stalls, stream_chunks, streams

from waterfall.devnet import deploy
from waterfall.gateway.app import Gateway
from waterfall.gateway.watch import Watch
from waterfall.money import format_usd

DEPOSIT = 1_000_000
FULL = "0.000017"
CHUNKS = 7  # role, three pieces, reason, usage, [DONE]
SHOWN = 5  # the last two wait for the capture


def raw_request(key: str, **fields: object) -> bytes:
    body = {"model": "micro", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20} | fields
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    return head.encode() + f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that takes in little by itself."""
    parts = urlsplit(url)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
    return await asyncio.open_connection(sock=sock, limit=4096)


async def until_at_rest(client) -> None:
    """Wait until the gateway has taken in every connection made so far and works on none."""
    async with aiohttp.ClientSession() as later:
        await later.get(client.url + "/healthz")
    at_work = ("run_asgi", "Calls._hold", "Serving.whole", "Serving._pump")
    async with asyncio.timeout(20):
        while any(name in str(task) for task in asyncio.all_tasks() for name in at_work):
            await asyncio.sleep(0.01)


# ── Leaving ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("written", range(1, CHUNKS + 1))
async def test_stream__client_leaves_after_a_chunk__is_charged_in_full_once(client, upstream, written):
    """At peers a client that hangs up pays nothing (LiteLLM #33736, #37734)."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.permits = asyncio.Semaphore(written)

    async with client.streaming(key) as response, asyncio.timeout(10):
        text = b""
        while text.count(b"\n\n") < min(written, SHOWN):
            text += await response.content.readany()
        await upstream.until("chunks", written)
    for _ in range(CHUNKS):
        upstream.permits.release()

    await upstream.until("answered", 1)
    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == (FULL, True)
    assert upstream.counts["started"] == 1
    await client.check_books(account, DEPOSIT, FULL)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_call__client_leaves_before_the_answer__is_charged_in_full_once(
    client, upstream, stream, reset
):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    opened = asyncio.Event()

    async def late(*arguments):
        await opened.wait()
        return await answer(*arguments)

    upstream.behaviour = late
    _, writer = await connect(client.url)
    writer.write(raw_request(key, stream=stream))
    await upstream.until("started", 1)
    if reset:
        writer.transport.abort()
    else:
        writer.close()
    assert (await client.account(account["id"]))["held"] != "0.00"
    opened.set()

    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == (FULL, True)
    assert upstream.counts == {"started": 1, "answered": 1, **({"chunks": CHUNKS} if stream else {})}
    await client.check_books(account, DEPOSIT, FULL)


async def test_stream__client_leaves_before_an_answer_that_never_comes__is_lost(net, upstream, database):
    upstream.behaviour = stalls
    settings = settings_for(upstream.base_url, database, timeout_seconds=0.3)
    async with running(net, settings) as client:
        account, key = await client.open_account(micro_usd=DEPOSIT)
        _, writer = await connect(client.url)
        writer.write(raw_request(key, stream=True))
        await upstream.until("started", 1)
        writer.close()

        assert (await client.ended(account))["status"] == "lost"
        await client.check_books(account, DEPOSIT, "0")


async def test_streams__forty_left_anywhere__each_charged_in_full_once(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.pause = 0.005
    rng = random.Random(7)  # noqa: S311 - repeatable

    async def leave(after: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after), client.streaming(key) as response:
                await response.read()

    await asyncio.gather(*(leave(rng.uniform(0.02, 0.5)) for _ in range(40)))
    await until_at_rest(client)

    calls = await client.calls(account)
    assert {call["cost"] for call in calls} == {FULL}
    assert len(calls) == upstream.counts["started"] > 0
    await client.check_books(account, DEPOSIT, format_usd(17 * 10**6 * len(calls)))


# ── Crawling ─────────────────────────────────────────────────────────────────────────────────────────

LARGE = 64 * 1024


def large_chunks(count: int):
    def chunks(body: dict) -> list[bytes]:
        whole = stream_chunks(body)
        large = chunk(body, choices=[delta({"content": "x" * LARGE})])
        return [*whole[:1], *[large] * count, *whole[-3:]]

    return chunks


async def test_stream__client_reads_only_once_it_is_charged__holds_nothing_up_and_loses_nothing(
    client, upstream
):
    """Read at its client's pace, a stream would keep its hold open for as long as that likes."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(large_chunks(50))
    reader, writer = await connect(client.url)
    writer.write(raw_request(key, stream=True))

    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == (FULL, True)
    received = bytearray()
    async with asyncio.timeout(20):
        while not received.endswith(b"0\r\n\r\n"):  # the end of the chunked body
            data = await reader.read(LARGE)
            assert data
            received += data
    writer.close()

    assert received.count(b"x" * LARGE) == 50
    assert b"[DONE]" in received
    await client.check_books(account, DEPOSIT, FULL)


async def test_stream__client_reads_far_too_little__is_charged_in_full_and_told(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(large_chunks(400))
    reader, writer = await connect(client.url)
    writer.write(raw_request(key, stream=True))

    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == (FULL, True)
    await client.check_books(account, DEPOSIT, FULL)
    received = bytearray()
    async with asyncio.timeout(20):
        while not received.endswith(b"0\r\n\r\n"):
            received += await reader.read(LARGE)
    writer.close()
    assert received.count(b"stream_dropped") == 1
    assert b"[DONE]" not in received
    assert received.count(b"x" * LARGE) < 200


async def test_stream__client_reads_nothing_and_leaves__is_charged_in_full(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(large_chunks(400))
    _, writer = await connect(client.url)
    writer.write(raw_request(key, stream=True))
    await upstream.until("chunks", 2)
    writer.transport.abort()

    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == (FULL, True)
    assert upstream.counts["chunks"] == 404
    await client.check_books(account, DEPOSIT, FULL)
    await until_at_rest(client)


@pytest.mark.parametrize("then", ["silence", "endless pieces"])
async def test_stream__goes_on_beyond_the_longest_call__is_charged_as_far_as_it_came(
    net, upstream, database, then
):
    def pieces(body: dict) -> list[bytes]:
        piece = chunk(body, choices=[delta({"content": "x"})])
        return [piece] * (2 if then == "silence" else 100_000)

    upstream.behaviour = streams(pieces, "stalled")
    settings = settings_for(upstream.base_url, database, timeout_seconds=60, max_call_seconds=2)
    async with running(net, settings) as client:
        account, key = await client.open_account(micro_usd=DEPOSIT)
        upstream.pause = 0.01
        async with client.streaming(key, max_tokens=1000) as response:
            await response.content.readuntil(b"\n\n")
            await response.content.readuntil(b"\n\n")

        call = await client.ended(account)
        receipt = call["receipt"]["receipt"]
        assert (receipt["complete"], receipt["input_tokens"]) == (False, 0)
        assert 2 <= receipt["output_tokens"] <= upstream.counts["chunks"]
        assert receipt["output_tokens"] == 2 or then != "silence"
        await client.check_books(account, DEPOSIT, format_usd(receipt["output_tokens"] * 10**6))


# ── Cancelled ────────────────────────────────────────────────────────────────────────────────────────


class Cancellable:
    """Calls to a gateway over the client's ledger, without a server between: they can be cancelled anywhere."""

    def __init__(self, client, upstream, key: str) -> None:
        self.client = client
        settings = settings_for(upstream.base_url, "sqlite:///unused.db", drain_seconds=5)
        self.gateway = Gateway(
            settings.gateway,
            settings.upstreams,
            settings.models,
            client.ledger,
            deploy.METER,
            b"salt",
            Watch(client.ledger, max_age_seconds=60),
        )
        self.key = key

    def call(self, *, stream: bool) -> "asyncio.Task[None]":
        body = json.dumps(
            {"model": "micro", "messages": [{"role": "user"}], "max_tokens": 20, "stream": stream}
        ).encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"authorization", f"Bearer {self.key}".encode())],
        }
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict:
            for message in messages:
                return message
            return await asyncio.Event().wait()

        async def send(message: dict) -> None:
            await asyncio.sleep(0)

        return asyncio.create_task(self.gateway.app(scope, receive, send))

    @contextlib.asynccontextmanager
    async def running(self):
        async with self.gateway.app.router.lifespan_context(self.gateway.app):
            yield self


@contextlib.asynccontextmanager
async def stopped_writer(ledger):
    """The ledger's writer is busy until the end of the block."""
    busy, go_on = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        busy.set()
        go_on.wait(10)

    waiting = asyncio.create_task(ledger.write(wait))
    await asyncio.to_thread(busy.wait, 10)
    try:
        yield
    finally:
        go_on.set()
        await waiting


async def cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_call__cancelled_while_its_hold_is_taken__gives_it_back(client, upstream, stream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    _, other = await client.open_account(micro_usd=DEPOSIT)
    assert (await client.chat(other))[0] == 200  # its rate card is known from now on
    async with Cancellable(client, upstream, key).running() as direct:
        async with stopped_writer(client.ledger):
            task = direct.call(stream=stream)
            async with asyncio.timeout(10):
                while not direct.gateway.calls._beginning:  # noqa: SLF001 - the moment under test
                    await asyncio.sleep(0.005)
            await cancelled(task)

        call = await client.ended(account)
        assert call["status"] == "released"
        assert upstream.counts["started"] == 1
        await client.check_books(account, DEPOSIT, "0")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_call__cancelled_while_the_upstream_works__is_charged_in_full(client, upstream, stream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    opened = asyncio.Event()
    long = streams(lambda body: stream_chunks(body, "x" * 300))  # more than is kept for a slow client

    async def late(*arguments):
        await opened.wait()
        return await (long if stream else answer)(*arguments)

    upstream.behaviour = late
    async with Cancellable(client, upstream, key).running() as direct:
        task = direct.call(stream=stream)
        await upstream.until("started", 1)
        await cancelled(task)
        opened.set()

        call = await client.ended(account)
        assert (call["cost"], call["receipt"]["receipt"]["complete"]) == (FULL, True)
        await client.check_books(account, DEPOSIT, FULL)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_call__cancelled_while_it_is_captured__is_charged_in_full(
    client, upstream, stream, monkeypatch
):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.permits = asyncio.Semaphore(0)
    capture, capturing = client.ledger.capture, asyncio.Event()

    async def capture_seen(*arguments, **options):
        capturing.set()
        return await capture(*arguments, **options)

    monkeypatch.setattr(client.ledger, "capture", capture_seen)
    async with Cancellable(client, upstream, key).running() as direct:
        task = direct.call(stream=stream)
        await upstream.until("started", 1)
        async with stopped_writer(client.ledger):
            for _ in range(CHUNKS):
                upstream.permits.release()
            async with asyncio.timeout(10):
                await capturing.wait()
            await cancelled(task)

        call = await client.ended(account)
        assert (call["cost"], call["receipt"]["receipt"]["complete"]) == (FULL, True)
        await client.check_books(account, DEPOSIT, FULL)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_calls__cancelled_at_any_step__leave_no_hold(client, upstream, stream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    async with Cancellable(client, upstream, key).running() as direct:
        for steps in range(120):
            task = direct.call(stream=stream)
            for _ in range(steps):
                await asyncio.sleep(0 if steps % 2 else 0.0002)
            await cancelled(task)

    calls = await client.calls(account, limit=1000)
    released = [call for call in calls if call["status"] == "released"]
    charged = [call for call in calls if call["cost"] is not None]
    assert len(released) + len(charged) == len(calls)
    assert len(charged) == upstream.counts["started"] > 0
    assert {call["cost"] for call in charged} == {FULL}
    assert {call["receipt"]["receipt"]["complete"] for call in charged} == {True}
    await client.check_books(account, DEPOSIT, format_usd(17 * 10**6 * len(charged)))


# ── The service stops ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_service__stops_while_a_call_runs__lets_it_end(net, upstream, database, stream):
    """Peers lose charges at shutdown (LiteLLM #38157)."""
    settings = settings_for(upstream.base_url, database)
    async with contextlib.AsyncExitStack() as service:
        client = await service.enter_async_context(running(net, settings))
        account, key = await client.open_account(micro_usd=DEPOSIT)
        reader, writer = await under_way(client, upstream, key, stream)
        stopping = await begin_stop(service, client, upstream)
        async with asyncio.timeout(10):
            received = await reader.read(-1)
        writer.close()
        await stopping

    assert received.startswith(b"HTTP/1.1 200")
    assert (b"[DONE]" if stream else b"Hello there") in received
    async with running(net, settings) as client:
        assert (await client.ended(account))["cost"] == FULL
        await client.check_books(account, DEPOSIT, FULL)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_service__stops_after_the_client_left__lets_the_call_end(net, upstream, database, stream):
    settings = settings_for(upstream.base_url, database)
    async with contextlib.AsyncExitStack() as service:
        client = await service.enter_async_context(running(net, settings))
        account, key = await client.open_account(micro_usd=DEPOSIT)
        reader, writer = await under_way(client, upstream, key, stream)
        if stream:
            await reader.readuntil(b"Hel")
        writer.transport.abort()
        await (await begin_stop(service, client, upstream))

    async with running(net, settings) as client:
        assert (await client.ended(account))["cost"] == FULL
        await client.check_books(account, DEPOSIT, FULL)


async def under_way(client, upstream, key, stream):
    """A call that the upstream goes on with only when it is let; its connection."""
    upstream.permits = asyncio.Semaphore(2 if stream else 0)
    reader, writer = await connect(client.url)
    writer.write(raw_request(key, stream=stream))
    await upstream.until("chunks" if stream else "started", 2 if stream else 1)
    return reader, writer


async def begin_stop(service, client, upstream):
    """Begin to stop, and let the upstream go on once no new connection is taken; the task of stopping."""
    stopping = asyncio.create_task(service.aclose())
    async with asyncio.timeout(10):
        while await accepts(client.url):
            await asyncio.sleep(0.01)
    for _ in range(CHUNKS):
        upstream.permits.release()
    return stopping


async def accepts(url: str) -> bool:
    parts = urlsplit(url)
    try:
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError:
        return False
    writer.close()
    return True


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_service__stops_and_a_call_does_not_end__closes_its_hold(net, upstream, database, stream):
    settings = settings_for(upstream.base_url, database, timeout_seconds=60, drain_seconds=0.3)
    upstream.behaviour = streams(lambda body: stream_chunks(body)[:3], "stalled") if stream else stalls
    async with running(net, settings) as client:
        account, key = await client.open_account(micro_usd=DEPOSIT)
        reader, writer = await connect(client.url)
        writer.write(raw_request(key, stream=stream))
        await upstream.until("chunks" if stream else "started", 3 if stream else 1)
        if stream:
            await reader.readuntil(b"lo")
    writer.close()

    async with running(net, settings) as client:
        assert client.ledger.lost_at_start == 0, "the stop left its hold open"
        call = await client.ended(account)
        if stream:
            assert (call["cost"], call["receipt"]["receipt"]["complete"]) == ("0.000002", False)
        else:
            assert call["status"] == "lost"
        await client.check_books(account, DEPOSIT, call["cost"] or "0")
