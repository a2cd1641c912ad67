"""Upstreams that are not there, or say nothing: each service waits 0.3 seconds for them."""

import asyncio
import io
import json
import socket

import pytest
from service import running, settings_for
from sse import error_of, events_of, pieces_of
from upstream import ScriptedUpstream, deaf_server, stalls, stream_chunks, streams

DEPOSIT = 1_000_000


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_upstream__down__is_said_and_may_be_tried_again(net, tmp_path, stream):
    with socket.socket() as unused:  # bound and not listening: nobody else gets the port, all are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        async with running(net, settings_for(url, tmp_path / "waterfall.db")) as client:
            account, key = await client.open_account(micro_usd=DEPOSIT)

            status, body, headers = await client.chat(key, stream=stream)

            assert (status, body["error"]["code"]) == (502, "upstream_unavailable")
            assert "x-should-retry" not in headers
            assert (await client.ended(account))["status"] == "released"
            await client.check_books(account, DEPOSIT, "0")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_upstream__silent__times_out_and_is_lost(net, upstream, tmp_path, stream):
    upstream.behaviour = stalls
    settings = settings_for(upstream.base_url, tmp_path / "waterfall.db", timeout_seconds=0.3)
    async with running(net, settings) as client:
        account, key = await client.open_account(micro_usd=DEPOSIT)

        status, body, headers = await client.chat(key, stream=stream)

        assert (status, body["error"]["code"]) == (504, "upstream_timeout")
        assert headers["x-should-retry"] == "false"
        assert (await client.ended(account))["status"] == "lost"
        await client.check_books(account, DEPOSIT, "0")


async def test_upstream__deaf_to_a_large_request__times_out_and_is_lost(net, tmp_path):
    async with (
        deaf_server() as url,
        running(net, settings_for(url, tmp_path / "waterfall.db", timeout_seconds=0.3)) as client,
    ):
        account, key = await client.open_account(micro_usd=100 * DEPOSIT)
        # More than the sockets' buffers take.
        large = {
            "model": "micro",
            "messages": [{"role": "user", "content": "x" * 12_000_000}],
            "max_tokens": 1,
        }

        async with asyncio.timeout(20):
            status, body, _ = await client.request(
                "POST", "/v1/chat/completions", key=key, data=io.BytesIO(json.dumps(large).encode())
            )

        assert (status, body["error"]["code"]) == (504, "upstream_timeout")
        assert (await client.ended(account))["status"] == "lost"
        await client.check_books(account, 100 * DEPOSIT, "0")


async def test_connection__closed_by_the_upstream_while_idle__is_not_used_again(net, tmp_path):
    async with ScriptedUpstream(keepalive_seconds=0.05) as upstream:
        settings = settings_for(upstream.base_url, tmp_path / "waterfall.db")
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
    net, upstream, tmp_path, sent
):
    upstream.behaviour = streams(lambda body: stream_chunks(body)[:sent], "stalled")
    settings = settings_for(upstream.base_url, tmp_path / "waterfall.db", timeout_seconds=0.3)
    async with running(net, settings) as client:
        account, key = await client.open_account(micro_usd=DEPOSIT)

        _, text, _ = await client.chat(key, stream=True)

        events = events_of(text)
        assert pieces_of(events) == ("Hello" if sent else "")
        assert error_of(events)["code"] == "upstream_timeout"
        call = await client.ended(account)
        assert (call["status"] == "lost", call["cost"]) == ((False, "0.000002") if sent else (True, None))
        await client.check_books(account, DEPOSIT, call["cost"] or "0")
