"""Upstreams that are not there, say nothing, or need a service of their own to be seen."""

import asyncio
import contextlib
import io
import json
import socket

import aiohttp
import pytest
from aiohttp import web
from service import running, settings_for
from sse import error_of, events_of, pieces_of
from upstream import ScriptedUpstream, answers, completion, deaf_server, stalls, stream_chunks, streams

from waterfall.money import parse_usd

DEPOSIT = 1_000_000


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_upstream__down__is_said_and_may_be_tried_again(net, database, stream):
    with socket.socket() as unused:  # bound and not listening: nobody else gets the port, all are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        async with running(net, settings_for(url, database)) as client:
            account, key = await client.open_account(micro_usd=DEPOSIT)

            status, body, headers = await client.chat(key, stream=stream)

            assert (status, body["error"]["code"]) == (502, "upstream_unavailable")
            assert "x-should-retry" not in headers
            assert (await client.ended(account))["status"] == "released"
            await client.check_books(account, DEPOSIT, "0")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_upstream__silent__times_out_and_is_lost(net, upstream, database, stream):
    upstream.behaviour = stalls
    settings = settings_for(upstream.base_url, database, timeout_seconds=0.3)
    async with running(net, settings) as client:
        account, key = await client.open_account(micro_usd=DEPOSIT)

        status, body, headers = await client.chat(key, stream=stream)

        assert (status, body["error"]["code"]) == (504, "upstream_timeout")
        assert headers["x-should-retry"] == "false"
        assert (await client.ended(account))["status"] == "lost"
        await client.check_books(account, DEPOSIT, "0")


def large_request() -> io.BytesIO:
    """More than the sockets' buffers take."""
    messages = [{"role": "user", "content": "x" * 12_000_000}]
    return io.BytesIO(json.dumps({"model": "micro", "messages": messages, "max_tokens": 1}).encode())


async def test_upstream__deaf_to_a_large_request__times_out_and_is_lost(net, database):
    async with (
        deaf_server() as url,
        running(net, settings_for(url, database, timeout_seconds=0.3, connect_seconds=1)) as client,
    ):
        account, key = await client.open_account(micro_usd=100 * DEPOSIT)
        async with asyncio.timeout(20):
            status, body, _ = await client.request(
                "POST", "/v1/chat/completions", key=key, data=large_request()
            )

        assert (status, body["error"]["code"]) == (504, "upstream_timeout")
        assert (await client.ended(account))["status"] == "lost"
        await client.check_books(account, 100 * DEPOSIT, "0")


async def test_service__stops_while_an_upstream_is_deaf__does_not_wait_for_it(net, database):
    async with deaf_server() as url:
        settings = settings_for(url, database, timeout_seconds=60, drain_seconds=0.3)
        async with running(net, settings) as client:
            account, key = await client.open_account(micro_usd=100 * DEPOSIT)
            call = asyncio.create_task(
                client.request("POST", "/v1/chat/completions", key=key, data=large_request())
            )
            await client.until(account["id"], lambda a: a["held"] != "0.00")
        with contextlib.suppress(aiohttp.ClientError):
            await call

    async with running(net, settings) as client:
        assert (await client.ended(account))["status"] == "lost"
        await client.check_books(account, 100 * DEPOSIT, "0")


async def test_connection__closed_by_the_upstream_while_idle__is_not_used_again(net, database):
    async with ScriptedUpstream(keepalive_seconds=0.05) as upstream:
        settings = settings_for(upstream.base_url, database)
        async with running(net, settings) as client:
            account, key = await client.open_account(micro_usd=DEPOSIT)
            for number in range(1, 5):
                status, body, _ = await client.chat(key)
                assert status == 200, body
                assert upstream.counts["started"] == number
                await upstream.until_disconnected()
            await client.check_books(account, DEPOSIT, "0.000068")


@pytest.mark.parametrize("sent", [0, 3])
async def test_stream__stalled__ends_with_an_error_and_is_charged_as_far_as_it_came(
    net, upstream, database, sent
):
    upstream.behaviour = streams(lambda body: stream_chunks(body)[:sent], "stalled")
    settings = settings_for(upstream.base_url, database, timeout_seconds=0.3)
    async with running(net, settings) as client:
        account, key = await client.open_account(micro_usd=DEPOSIT)

        _, text, _ = await client.chat(key, stream=True)

        events = events_of(text)
        assert pieces_of(events) == ("Hello" if sent else "")
        assert error_of(events)["code"] == "upstream_timeout"
        call = await client.ended(account)
        assert (call["status"] == "lost", call["cost"]) == ((False, "0.000002") if sent else (True, None))
        await client.check_books(account, DEPOSIT, call["cost"] or "0")


async def test_stream__longer_than_any_limit_on_silence__is_not_cut(net, upstream, database):
    upstream.behaviour = streams(lambda body: stream_chunks(body, "x" * 30))
    upstream.pause = 0.08
    settings = settings_for(upstream.base_url, database, timeout_seconds=1)
    async with running(net, settings) as client:
        account, key = await client.open_account(micro_usd=DEPOSIT)

        _, text, _ = await client.chat(key, stream=True)

        assert events_of(text)[-1] == "[DONE]"
        await client.check_books(account, DEPOSIT, "0.000017")


async def test_cookies__of_an_upstream__are_not_sent_with_other_calls(net, upstream, database):
    url = upstream.base_url.replace("127.0.0.1", "localhost")  # no cookie is kept for a bare address
    upstream.behaviour = answers(completion({"model": "micro"}), headers={"Set-Cookie": "who=ada; Path=/"})
    async with running(net, settings_for(url, database)) as client:
        _, key = await client.open_account(micro_usd=DEPOSIT)

        assert [(await client.chat(key))[0] for _ in range(2)] == [200, 200]

    assert [headers.get("Cookie") for headers in upstream.headers] == [None, None]
    assert all(key not in str(headers) for headers in upstream.headers)


async def test_streams__a_thousand_idle_ones__leave_room_for_others_and_are_all_charged(
    net, upstream, database
):
    many, go_on = 1000, asyncio.Event()

    async def idle(upstream, request, body):
        first, *rest = stream_chunks(body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(first)
        await go_on.wait()
        for data in rest:
            await response.write(data)
        return response

    settings = settings_for(upstream.base_url, database, timeout_seconds=120)
    async with running(net, settings) as client, contextlib.AsyncExitStack() as stack:
        account, key = await client.open_account(micro_usd=DEPOSIT)
        other, other_key = await client.open_account(micro_usd=DEPOSIT)
        upstream.behaviour = idle
        opened = await asyncio.gather(
            *(stack.enter_async_context(client.streaming(key)) for _ in range(many))
        )
        for response in opened:
            await response.content.readuntil(b"\n\n")
        upstream.behaviour = streams()
        for _ in range(5):
            assert (await client.chat(other_key, stream=True))[0] == 200
        held = sum(parse_usd(response.headers["X-Waterfall-Hold"]) for response in opened)
        assert parse_usd((await client.account(account["id"]))["held"]) == held
        go_on.set()
        for response in opened:
            assert b"[DONE]" in await response.content.read()
        await client.check_books(other, DEPOSIT, "0.000085")
        await client.check_books(account, DEPOSIT, "0.017")
