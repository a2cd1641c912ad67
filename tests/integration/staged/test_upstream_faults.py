"""Whatever an upstream does: the client is told, the hold is closed, and only what was delivered is charged."""

import asyncio
import gzip
import json
import random
import zlib

import brotli
import pytest
from aiohttp import web
from sse import error_of, events_of, pieces_of, without_cost
from upstream import (
    DONE,
    ScriptedUpstream,
    answers,
    chunk,
    completion,
    delta,
    stream_chunks,
    streams,
    usage,
    uses,
    writes,
)

from waterfall.chain.verify import verify
from waterfall.cli.receipts import parse
from waterfall.money import format_usd, parse_usd

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPOSIT = 1_000_000
FULL = "0.000017"  # 12 in, 5 out, a micro-dollar each


# ── Whole answers ────────────────────────────────────────────────────────────────────────────────────

UNREADABLE = {
    "html": answers(b"<html>it works</html>", content_type="text/html"),
    "garbage": answers(b"\x00\xff\xfe garbage"),
    "nothing": answers(b""),
    "a list": answers([1, 2]),
    "a number": answers(7),
    "no usage": answers({"choices": []}),
    "an error": answers({"error": {"message": "no", "type": "server_error"}}),
    "usage null": uses(None),
    "usage a list": uses([12, 5]),
    "usage empty": uses({}),
    "prompt missing": uses({"completion_tokens": 5}),
    "completion missing": uses({"prompt_tokens": 12}),
    "completion null": uses({"prompt_tokens": 12, "completion_tokens": None}),
    "negative": uses({"prompt_tokens": 12, "completion_tokens": -5}),
    "fraction": uses({"prompt_tokens": 12, "completion_tokens": 5.5}),
    "text": uses({"prompt_tokens": "12", "completion_tokens": 5}),
    "boolean": uses({"prompt_tokens": True, "completion_tokens": 5}),
    "beyond 64 bits": uses({"prompt_tokens": 2**63, "completion_tokens": 5}),
    "more cached than sent": uses(usage() | {"prompt_tokens_details": {"cached_tokens": 13}}),
    "more thought than said": uses(
        usage() | {"completion_tokens_details": {"reasoning_tokens": 6}, "total_tokens": None}
    ),
    "nested too deeply": uses(
        usage() | {"x": json.loads('{"x":' * 200 + "1" + "}" * 200)},
    ),
    "204": answers(b"", status=204),
    "closed before an answer": writes(b""),
    "not http": writes(b"hello, is this the library?\r\n\r\n"),
    "half a header": writes(b"HTTP/1.1 200 OK\r\nContent-"),
    "closed in the body": answers(b'{"choices": [', end="closed"),
    "reset in the body": answers(b'{"choices": [', end="reset"),
    "closed after the body": answers(completion({"model": "micro"}), end="closed"),
    "broken compression": answers(b"not gzip", headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("case", UNREADABLE)
async def test_whole__unreadable__is_lost_not_delivered_not_charged(client, upstream, case):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = UNREADABLE[case]

    status, body, headers = await client.chat(key)

    assert (status, body["error"]["code"]) == (502, "upstream_invalid")
    assert set(body["error"]) >= {"message", "type", "code", "param"}
    assert headers["x-should-retry"] == "false"  # it may have run: the SDK would run it again by itself
    assert upstream.counts["started"] == 1
    call = await client.ended(account)
    assert (call["status"], call["cost"], call["receipt"]) == ("lost", None, None)
    assert call["reason"]
    assert [c["id"] for c in await client.calls(account, status="lost")] == [call["id"]]
    await client.check_books(account, DEPOSIT, "0")


OUR_FAULT = {"error": {"message": "Incorrect API key", "type": "invalid_request_error", "code": "x"}}
THEIR_ERROR = {"error": {"message": "look here", "type": "t", "code": "c", "param": "temperature", "more": 1}}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("status", [400, 404, 408, 409, 413, 422, 429, 500, 503, 529])
async def test_refusal__openai_error__is_passed_on_and_free(client, upstream, status, stream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers(
        THEIR_ERROR, status=status, headers={"Retry-After": "7", "Retry-After-Ms": "7000", "Server": "x"}
    )

    seen, body, headers = await client.chat(key, stream=stream)

    assert (seen, body) == (status, THEIR_ERROR)
    assert (headers["Retry-After"], headers["Retry-After-Ms"]) == ("7", "7000")
    assert "x-should-retry" not in headers
    call = await client.ended(account)
    assert (call["status"], call["cost"]) == ("released", None)
    assert str(status) in call["reason"]
    await client.check_books(account, DEPOSIT, "0")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("status", [401, 402, 403])
async def test_refusal__of_our_own_key__is_not_the_callers_fault(client, upstream, status, stream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers(OUR_FAULT, status=status)

    seen, body, _ = await client.chat(key, stream=stream)

    assert (seen, body["error"]["code"]) == (502, "upstream_refused")
    assert "Incorrect API key" not in body["error"]["message"]
    assert (await client.ended(account))["status"] == "released"
    await client.check_books(account, DEPOSIT, "0")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("status", "said", "content_type", "hold"),
    [
        (503, b"<html>Service Unavailable</html>", "text/html", "released"),
        (429, b"slow down", "text/plain", "released"),
        (400, b'{"object": "error", "message": "slow down"}', "application/json", "released"),
        (502, b"<html>Bad Gateway</html>", "text/html", "lost"),
        (504, b"<html>Gateway Time-out</html>", "text/html", "lost"),
        (524, b"", "text/plain", "lost"),
    ],
)
async def test_refusal__in_another_format__becomes_an_openai_error_of_its_status(
    client, upstream, status, said, content_type, hold, stream
):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers(said, status=status, content_type=content_type)

    seen, body, headers = await client.chat(key, stream=stream)

    assert (seen, body["error"]["code"]) == (status, "upstream_refused")
    assert ("slow down" in body["error"]["message"]) == (b"slow down" in said)
    assert "<html>" not in body["error"]["message"]
    assert headers.get("x-should-retry") == ("false" if hold == "lost" else None)
    call = await client.ended(account)
    assert (call["status"], call["id"]) == (hold, headers["X-Waterfall-Receipt-Id"])
    await client.check_books(account, DEPOSIT, "0")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect__elsewhere__is_not_followed(client, upstream, status):
    """Another server would see the prompt and run the call, at another price."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    async with ScriptedUpstream() as other:
        location = {"Location": f"{other.base_url}/chat/completions"}
        upstream.behaviour = answers(b"", status=status, headers=location)

        seen, body, _ = await client.chat(key)

        assert (seen, body["error"]["code"]) == (502, "upstream_refused")
        assert other.counts["started"] == 0
    assert (await client.ended(account))["status"] == "released"
    await client.check_books(account, DEPOSIT, "0")


async def test_connection__closed_as_a_second_request_comes__is_lost_not_sent_twice(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    assert (await client.chat(key))[0] == 200
    upstream.behaviour = writes(b"")

    status, body, _ = await client.chat(key)

    assert (status, body["error"]["code"]) == (502, "upstream_invalid")
    assert upstream.counts["started"] == 2
    assert [c["status"] for c in await client.calls(account, status="lost")] == ["lost"]
    await client.check_books(account, DEPOSIT, FULL)


async def test_usage__explicit_zeros__stay_zeros(client, upstream):
    """Peers read an explicit zero as missing (LiteLLM #37992)."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = uses({"prompt_tokens": 0, "completion_tokens": 0})

    status, _, headers = await client.chat(key)

    assert (status, headers["X-Waterfall-Cost"]) == (200, "0.00")
    call = await client.ended(account)
    assert (call["status"], call["cost"]) == ("free", "0.00")
    assert call["receipt"]["receipt"]["complete"] is True
    await client.check_books(account, DEPOSIT, "0")


async def test_usage__with_cached_and_reasoning__each_counted_once(client, upstream, net):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = uses(
        usage(100, 10)
        | {
            "prompt_tokens_details": {"cached_tokens": 60},
            "completion_tokens_details": {"reasoning_tokens": 9},
        }
    )

    _, _, headers = await client.chat(key, model="gpt-4o-mini", max_tokens=100)

    # 40 at 0.15, 60 cached at 0.075 and 10 at 0.60 USD per million
    assert headers["X-Waterfall-Cost"] == "0.0000165"
    receipt = await client.receipt(headers["X-Waterfall-Receipt-Id"])
    assert receipt["receipt"]["receipt"]["cached_input_tokens"] == 60
    assert receipt["receipt"]["receipt"]["reasoning_tokens"] == 9
    await client.check_books(account, DEPOSIT, "0.0000165")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_usage__beyond_the_hold__is_charged_up_to_it_and_the_rest_recorded(
    client, upstream, net, stream
):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    used = usage(12, 1_000_000)
    upstream.behaviour = (
        streams(lambda body: [chunk(body, choices=[], usage=used), DONE]) if stream else uses(used)
    )

    status, _, headers = await client.chat(key, stream=stream)

    assert status == 200
    held = headers["X-Waterfall-Hold"]
    settled = await client.settled(account["id"])
    assert parse_usd(settled["balance"]) == parse_usd("1") - parse_usd(held)
    receipt = await client.receipt(headers["X-Waterfall-Receipt-Id"])
    assert receipt["cost"] == held
    assert parse_usd(receipt["excess"]) == parse_usd("1.000012") - parse_usd(held)
    assert parse_usd((await client.request("GET", "/api/totals"))[1]["excess"]) >= parse_usd(
        receipt["excess"]
    )
    proof = await verify(parse(receipt), net.vault, net.chain.chain_id)
    assert any("note: less than the 1.000012 USD" in line for line in proof.shown)
    await client.check_books(account, DEPOSIT, held)


async def test_answer__status_201__is_an_answer(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers(completion({"model": "micro"}), status=201)

    assert (await client.chat(key))[0] == 200
    await client.check_books(account, DEPOSIT, FULL)


# ── Streams ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("end", ["closed", "reset"])
@pytest.mark.parametrize("sent", range(8))
async def test_stream__cut_after_a_chunk__is_charged_as_far_as_it_came(client, upstream, sent, end):
    """role, three pieces, reason, usage, [DONE]: complete from the usage on."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: stream_chunks(body)[:sent], end)

    status, text, headers = await client.chat(key, stream=True)

    pieces = max(0, min(sent - 1, 3))
    call = await client.ended(account)
    assert status == (200 if isinstance(text, str) else 502)
    assert isinstance(text, str) or sent == 0 or end == "reset"
    assert call["id"] == headers["X-Waterfall-Receipt-Id"]
    events = events_of(text)
    if end == "closed":  # a reset may overtake what was sent before it
        assert pieces_of(events) == "".join(("Hel", "lo", " there")[:pieces])
    if sent >= 6:
        assert call["cost"] == FULL
        assert call["receipt"]["receipt"]["complete"] is True
        assert all("error" not in event for event in events)
        assert ("[DONE]" in events) is (sent == 7)
    elif call["status"] == "lost":
        assert end == "reset" or pieces == 0
        assert error_of(events)["code"] == "upstream_invalid"
    else:
        receipt = call["receipt"]["receipt"]
        assert (receipt["complete"], receipt["input_tokens"]) == (False, 0)
        assert receipt["output_tokens"] == len([e for e in events if pieces_of([e])])
        assert call["cost"] == format_usd(receipt["output_tokens"] * 10**6)
        assert error_of(events)["code"] == "upstream_invalid"
    await client.check_books(account, DEPOSIT, call["cost"] or "0")


async def test_stream__cut_at_every_byte__is_never_charged_beyond_what_came(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    whole = b"".join(stream_chunks({"model": "micro", "stream_options": {"include_usage": True}}))
    usage_at, done_at = whole.index(b'"usage"'), whole.index(b"data: [DONE]")
    cuts = range(0, len(whole), 3)
    position = iter(cuts)
    upstream.behaviour = streams(lambda body: [whole[: next(position)]], "closed")

    charged = 0
    seen = []
    for _ in cuts:
        _, text, headers = await client.chat(key, stream=True)
        seen.append((events_of(text), headers["X-Waterfall-Receipt-Id"]))
    await client.settled(account["id"])
    for cut, (events, receipt_id) in zip(cuts, seen, strict=True):
        call = await client.receipt(receipt_id)
        received = [e for e in events if pieces_of([e])]
        if call["status"] == "lost":
            assert received == []
            assert error_of(events)["code"] == "upstream_invalid"
        elif call["receipt"]["receipt"]["complete"]:
            assert cut > usage_at
            assert call["cost"] == FULL
        else:
            assert cut < done_at
            assert call["cost"] == format_usd(len(received) * 10**6)
            assert error_of(events)["code"] == "upstream_invalid"
        charged += parse_usd(call["cost"] or "0")
    await client.check_books(account, DEPOSIT, format_usd(charged))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda body: [], ""),
        (lambda body: [b"<html>it works</html>"], ""),
        (lambda body: [b"<html>\n\nit works</html>\n\n"], ""),
        (lambda body: [json.dumps(completion(body)).encode()], ""),
        (lambda body: [json.dumps(completion(body)).encode() + b"\n\n"], ""),
        (lambda body: [b"data: {]\n\n"], ""),
        (lambda body: [b"data: 7\n\n"], ""),
        (lambda body: [b'data: {"choices": 7}\n\n'], ""),
        (lambda body: [b'data: {"choices": "abc"}\n\n'], ""),
        (lambda body: [b'data: {"choices": {"delta": {"content": "abc"}}}\n\n'], ""),
        (lambda body: [b"data: \xff\xfe\n\n"], ""),
        (lambda body: [b'data: {"error": {"message": "overloaded"}}\n\n'], "overloaded"),
    ],
    ids=[
        "nothing",
        "html",
        "html events",
        "a whole answer",
        "a whole answer and a blank line",
        "broken json",
        "a number",
        "choices a number",
        "choices a string",
        "choices an object",
        "not utf-8",
        "an error",
    ],
)
async def test_stream__no_event_of_a_stream__is_lost_and_an_error_with_its_status(
    client, upstream, make, said
):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(make)

    status, body, headers = await client.chat(key, stream=True)

    assert (status, body["error"]["code"]) == (502, "upstream_invalid")
    assert said in body["error"]["message"]
    assert "it works" not in str(body)
    assert "Hello there" not in str(body)
    assert headers["x-should-retry"] == "false"
    call = await client.ended(account)
    assert (call["status"], call["id"]) == ("lost", headers["X-Waterfall-Receipt-Id"])
    await client.check_books(account, DEPOSIT, "0")


@pytest.mark.parametrize(
    "first", [b": keep-alive\n\n", b'data: {"choices": [7, null, {"delta": 7}]}\n\n'], ids=["comment", "odd"]
)
async def test_stream__events_without_output__is_lost_and_told_in_the_stream(client, upstream, first):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: [first, DONE])

    status, text, _ = await client.chat(key, stream=True)

    assert status == 200  # its headers were out before
    assert error_of(events_of(text))["code"] == "upstream_invalid"
    assert (await client.ended(account))["status"] == "lost"
    await client.check_books(account, DEPOSIT, "0")


GARBAGE = {
    "broken json": b"data: {]\n\n",
    "a number": b"data: 7\n\n",
    "choices a number": b'data: {"choices": 7}\n\n',
    "an error": b'data: {"error": {"message": "overloaded", "code": 529}}\n\n',
    "no event": b"it works\n\n",
}


@pytest.mark.parametrize("case", GARBAGE)
async def test_stream__garbage_in_the_middle__ends_it_with_an_error(client, upstream, case):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(
        lambda body: [*stream_chunks(body)[:3], GARBAGE[case], *stream_chunks(body)[3:]]
    )

    _, text, _ = await client.chat(key, stream=True)

    events = events_of(text)
    assert pieces_of(events) == "Hello"
    assert error_of(events)["code"] == "upstream_invalid"
    call = await client.ended(account)
    assert call["cost"] == "0.000002"
    assert call["receipt"]["receipt"]["complete"] is False
    assert call["receipt"]["usage"] is None
    await client.check_books(account, DEPOSIT, "0.000002")


async def test_stream__without_usage__is_charged_a_token_a_piece_and_flagged(client, upstream, net):
    """Peers serve streams without usage for nothing (otari#256, LiteLLM #6633)."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: stream_chunks({**body, "stream_options": None}))

    _, text, headers = await client.chat(key, stream=True)

    assert events_of(text)[-1] == "[DONE]"
    await client.check_books(account, DEPOSIT, "0.000003")
    receipt = await client.receipt(headers["X-Waterfall-Receipt-Id"])
    assert receipt["receipt"]["receipt"]["complete"] is False
    await verify(parse(receipt), net.vault, net.chain.chain_id)
    await client.chat(key)
    assert [call["id"] for call in await client.calls(account, complete="false")] == [receipt["id"]]
    assert (await client.request("GET", "/api/totals"))[1]["incomplete"] >= 1


@pytest.mark.parametrize(
    "used",
    [
        {"completion_tokens": 5},
        {"prompt_tokens": 1, "completion_tokens": -1},
        {},
        7,
        usage() | {"prompt_tokens_details": {"cached_tokens": 99}},
    ],
    ids=["missing", "negative", "empty", "a number", "contradicting"],
)
async def test_stream__with_unreadable_usage__is_charged_a_token_a_piece_and_flagged(client, upstream, used):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(
        lambda body: [
            *stream_chunks({**body, "stream_options": None})[:-1],
            chunk(body, choices=[], usage=used),
            DONE,
        ]
    )

    _, text, headers = await client.chat(key, stream=True)

    assert pieces_of(events_of(text)) == "Hello there"
    await client.check_books(account, DEPOSIT, "0.000003")
    receipt = await client.receipt(headers["X-Waterfall-Receipt-Id"])
    assert receipt["receipt"]["receipt"]["complete"] is False


async def test_stream__with_zero_usage__is_free(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(
        lambda body: [chunk(body, choices=[], usage={"prompt_tokens": 0, "completion_tokens": 0}), DONE]
    )

    await client.chat(key, stream=True)

    call = await client.ended(account)
    assert (call["status"], call["receipt"]["receipt"]["complete"]) == ("free", True)
    await client.check_books(account, DEPOSIT, "0")


@pytest.mark.parametrize("with_choices", [False, True])
async def test_stream__placeholder_usage_then_cut__is_not_trusted(client, upstream, with_choices):
    """Peers trust a placeholder or a partial usage (LiteLLM #39893)."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    first = [delta({"role": "assistant", "content": ""})] if with_choices else []
    upstream.behaviour = streams(
        lambda body: [chunk(body, choices=first, usage=usage(12, 0)), *stream_chunks(body)[1:3]], "closed"
    )

    _, text, _ = await client.chat(key, stream=True)

    events = events_of(text)
    assert pieces_of(events) == "Hello"
    error_of(events)
    call = await client.ended(account)
    assert call["receipt"]["receipt"]["complete"] is False
    assert call["cost"] == "0.000002"
    await client.check_books(account, DEPOSIT, "0.000002")


async def test_stream__placeholder_usage_and_then_no_output__is_lost(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(
        lambda body: [chunk(body, choices=[], usage=usage(12, 0)), stream_chunks(body)[0]], "closed"
    )

    _, text, _ = await client.chat(key, stream=True)

    assert error_of(events_of(text))["code"] == "upstream_invalid"
    assert (await client.ended(account))["status"] == "lost"
    await client.check_books(account, DEPOSIT, "0")


@pytest.mark.parametrize("blank_line", [False, True])
async def test_stream__ends_early_without_a_break__is_told_and_flagged(client, upstream, blank_line):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    def unfinished(body: dict) -> list[bytes]:
        first, second, third = stream_chunks(body)[:3]
        return [first, second, third if blank_line else third.strip()]

    upstream.behaviour = streams(unfinished)

    _, text, _ = await client.chat(key, stream=True)

    events = events_of(text)
    assert pieces_of(events) == "Hello"
    assert "cut before its end" in error_of(events)["message"]
    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == ("0.000002", False)
    await client.check_books(account, DEPOSIT, "0.000002")


async def test_stream__placeholder_usage_and_no_other__is_not_trusted(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(
        lambda body: [
            chunk(body, choices=[], usage=usage(12, 0)),
            *stream_chunks({**body, "stream_options": None}),
        ]
    )

    _, text, _ = await client.chat(key, stream=True)

    assert pieces_of(events_of(text)) == "Hello there"
    call = await client.ended(account)
    assert (call["receipt"]["receipt"]["complete"], call["cost"]) == (False, "0.000003")
    await client.check_books(account, DEPOSIT, "0.000003")


EARLY_USAGE = {
    "first": lambda body: [chunk(body, choices=[], usage=usage(12, 0)), *stream_chunks(body)],
    "in every chunk": lambda body: [
        *(
            chunk(body, choices=[delta({"content": piece})], usage=usage(12, n))
            for n, piece in enumerate(("Hel", "lo", " there"))
        ),
        *stream_chunks(body)[-3:],
    ],
}


@pytest.mark.parametrize("case", EARLY_USAGE)
async def test_stream__usage_before_its_end__does_not_keep_what_follows_back(client, upstream, case):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.permits = asyncio.Semaphore(3)
    upstream.behaviour = streams(EARLY_USAGE[case])

    async with client.streaming(key) as response, asyncio.timeout(10):
        text = ""
        while "Hel" not in text:
            text += (await response.content.readany()).decode()
        for _ in range(10):
            upstream.permits.release()
        text += (await response.read()).decode()

    assert pieces_of(events_of(text)) == "Hello there"
    assert '"choices": [],' not in text
    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == (FULL, True)
    await client.check_books(account, DEPOSIT, FULL)


async def test_stream__usage_in_every_chunk__the_last_counts(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(
        lambda body: [
            *(chunk(body, choices=[delta({"content": "x"})], usage=usage(12, n)) for n in (1, 2, 5)),
            chunk(body, choices=[delta({}, "stop")]),
            DONE,
        ]
    )

    await client.chat(key, stream=True)

    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == (FULL, True)
    await client.check_books(account, DEPOSIT, FULL)


async def test_stream__usage_in_every_chunk_then_cut__is_flagged(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(
        lambda body: [chunk(body, choices=[delta({"content": "x"})], usage=usage(12, n)) for n in (1, 2)],
        "closed",
    )

    await client.chat(key, stream=True)

    call = await client.ended(account)
    assert call["receipt"]["receipt"]["complete"] is False
    await client.check_books(account, DEPOSIT, "0.000002")


async def test_stream__usage_in_the_last_choices_chunk__is_complete(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(
        lambda body: [
            *stream_chunks(body)[:4],
            chunk(body, choices=[delta({}, "stop")], usage=usage()),
            DONE,
        ]
    )

    _, text, _ = await client.chat(key, stream=True)

    events = events_of(text)
    assert pieces_of(events) == "Hello there"
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == (FULL, True)
    await client.check_books(account, DEPOSIT, FULL)


async def test_stream__without_done__is_complete_with_its_usage(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: stream_chunks(body)[:-1])

    _, text, _ = await client.chat(key, stream=True)

    assert pieces_of(events_of(text)) == "Hello there"
    assert "error" not in text
    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == (FULL, True)
    await client.check_books(account, DEPOSIT, FULL)


# ── How streams are cut into writes ──────────────────────────────────────────────────────────────────


def shown(raw: bytes) -> bytes:
    """What a client gets that did not ask for usage."""
    events = raw.split(b"\n\n")
    return b"\n\n".join(event for event in events if b'"usage"' not in event)


async def test_stream__a_thousand_chunks__arrive_untouched_and_at_once(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: stream_chunks(body, map(str, range(1000))))

    _, text, _ = await client.chat(key, stream=True)

    expected = b"".join(stream_chunks({**upstream.bodies[0]}, map(str, range(1000))))
    assert without_cost(text.encode()) == shown(expected)
    await client.check_books(account, DEPOSIT, FULL)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("include_usage", [False, True])
async def test_stream__split_anywhere__arrives_untouched(client, upstream, line_end, include_usage):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    model = {"model": "micro", "stream_options": {"include_usage": True}}
    whole = b": hello\n\nevent: message\nid: 1\nretry: 5\n" + b"".join(
        stream_chunks(model, ["é", "\u2028", "a"])
    )
    raw = whole.replace(b"\n", line_end)
    expected = raw if include_usage else shown(whole).replace(b"\n", line_end)
    rng = random.Random(7)  # noqa: S311 - repeatable
    calls = 20

    def pieces(_: dict) -> list[bytes]:
        size = len(upstream.bodies)
        if size == 1:
            return [raw]
        if size == 2:
            return [raw[i : i + 1] for i in range(len(raw))]
        cuts = sorted(rng.sample(range(1, len(raw)), rng.randint(1, 40)))
        return [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]

    upstream.behaviour = streams(pieces)
    for _ in range(calls):
        async with client.streaming(key, stream_options={"include_usage": include_usage}) as response:
            assert without_cost(await response.read()) == expected

    assert {c["receipt"]["receipt"]["complete"] for c in await client.calls(account)} == {True}
    await client.check_books(account, DEPOSIT, format_usd(calls * 17 * 10**6))


async def test_stream__comments_around_the_usage__are_passed_on(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    def with_comments(body: dict) -> list[bytes]:
        return [b": ping\n\n" + data for data in stream_chunks(body)] + [b": bye\n\n"]

    upstream.behaviour = streams(with_comments)

    _, text, _ = await client.chat(key, stream=True)

    assert text.count(": ping") == 7
    assert text.endswith("data: [DONE]\n\n: bye\n\n")
    assert '"usage"' not in text
    await client.check_books(account, DEPOSIT, FULL)


async def test_stream__last_event_without_a_blank_line__is_read(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: [b"".join(stream_chunks(body)).removesuffix(b"\n\n")])

    _, text, _ = await client.chat(key, stream=True)

    assert text.endswith("data: [DONE]")
    await client.check_books(account, DEPOSIT, FULL)


async def test_stream__of_several_choices__counts_each_piece(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(
        lambda body: [
            chunk(body, choices=[delta({"content": "a"}, index=0), delta({"content": "b"}, index=1)]),
            chunk(body, choices=[delta({"tool_calls": [{"index": 0}]}, index=0), delta({}, "stop", index=1)]),
            chunk(body, choices=[delta({"reasoning_content": "hm"}), delta({"content": ""}, index=1)]),
        ],
        "closed",
    )

    await client.chat(key, stream=True, n=2)

    assert upstream.bodies[0]["max_tokens"] == 20
    assert (await client.ended(account))["cost"] == "0.000004"
    await client.check_books(account, DEPOSIT, "0.000004")


# ── Failures of our own ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_signing__fails__is_lost_and_told(client, upstream, monkeypatch, stream):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    def broken(*_: object) -> None:
        raise RuntimeError("the key server is gone")

    monkeypatch.setattr("waterfall.gateway.calls.Calls.sign", broken)

    status, body, headers = await client.chat(key, stream=stream)

    if stream:
        events = events_of(body)
        assert error_of(events)["code"] == "internal_error"
        assert pieces_of(events) == "Hello there"
    else:
        assert (status, body["error"]["code"]) == (500, "internal_error")
        assert headers["x-should-retry"] == "false"
    assert (await client.ended(account))["status"] == "lost"
    await client.check_books(account, DEPOSIT, "0")


async def test_pump__fails_after_the_answer_started__ends_the_stream_with_an_error(
    client, upstream, monkeypatch
):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    seen = []

    def broken(self: object, event: object) -> list:
        seen.append(event)
        if len(seen) == 3:
            raise RuntimeError("a defect")
        return [event.raw]

    monkeypatch.setattr("waterfall.gateway.surfaces.streams.StreamMeter.take", broken)

    async with asyncio.timeout(10):
        _, text, _ = await client.chat(key, stream=True)

    assert error_of(events_of(text))["code"] == "internal_error"
    assert "a defect" not in text
    assert (await client.ended(account))["status"] == "lost"
    await client.check_books(account, DEPOSIT, "0")


# ── Bodies that were compressed though nobody asked ──────────────────────────────────────────────────

CODINGS = {"gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress}


def compressed(coding, make):
    """Answers in pieces of a coding."""

    async def behaviour(upstream, request, body):
        kind, raw = make(body)
        response = web.StreamResponse(headers={"Content-Type": kind, "Content-Encoding": coding})
        await response.prepare(request)
        packed = CODINGS[coding](raw)
        for at in range(0, len(packed), 7):
            await response.write(packed[at : at + 7])
        return response

    return behaviour


@pytest.mark.parametrize("coding", CODINGS)
async def test_answer__compressed__is_read_billed_and_given_plain(client, upstream, coding):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = compressed(
        coding, lambda body: ("application/json", json.dumps(completion(body)).encode())
    )
    status, body, headers = await client.chat(key)
    assert (status, body["choices"][0]["message"]["content"]) == (200, "Hello there")
    assert "content-encoding" not in headers
    assert upstream.headers[-1]["Accept-Encoding"] == "identity"
    upstream.behaviour = compressed(coding, lambda body: ("text/event-stream", b"".join(stream_chunks(body))))
    status, text, _ = await client.chat(key, stream=True)
    assert (status, "".join(pieces_of(events_of(text)))) == (200, "Hello there")
    await client.check_books(account, DEPOSIT, "0.000034")


async def test_answer__that_claims_to_be_compressed_and_is_not__is_lost(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers(b"plain", headers={"Content-Encoding": "br"})
    status, body, _ = await client.chat(key)
    assert (status, body["error"]["code"]) == (502, "upstream_invalid")
    assert (await client.ended(account))["status"] == "lost"
    await client.check_books(account, DEPOSIT, "0")
