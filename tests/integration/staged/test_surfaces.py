"""Every surface over HTTP, by the providers' own clients where they have one, billed to the last unit."""

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest
from sse import without_cost
from upstream import DONE, answers, chunk, completion, streams

from waterfall.receipts import canonical_hash

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPOSIT = 1_000_000
FULL = "0.000017"  # 12 tokens in, 5 out

# ── What the providers answer ────────────────────────────────────────────────────────────────────────

RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "status": "completed",
    "model": "micro",
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "output": [
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello there", "annotations": []}],
        }
    ],
    "usage": {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 17,
    },
}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "micro",
    "content": [{"type": "text", "text": "Hello there"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 12, "output_tokens": 5},
}
EMBEDDING = {
    "object": "list",
    "model": "micro",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}],
    "usage": {"prompt_tokens": 12, "total_tokens": 12},
}


def sse(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def response_events(pieces: tuple[str, ...] = ("Hel", "lo", " there")) -> list[bytes]:
    begun = {**RESPONSE, "status": "in_progress", "output": [], "usage": None}
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
    return [
        sse("response.created", sequence_number=0, response=begun),
        *(
            sse("response.output_text.delta", sequence_number=n, delta=piece, **place)
            for n, piece in enumerate(pieces, 1)
        ),
        sse("response.completed", sequence_number=9, response=RESPONSE),
    ]


def message_events(pieces: tuple[str, ...] = ("Hel", "lo", " there")) -> list[bytes]:
    begun = {**MESSAGE, "content": [], "stop_reason": None, "usage": {"input_tokens": 12, "output_tokens": 1}}
    ended = {"stop_reason": "end_turn", "stop_sequence": None}
    return [
        sse("message_start", message=begun),
        sse("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        sse("ping"),
        *(
            sse("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})
            for piece in pieces
        ),
        sse("content_block_stop", index=0),
        sse("message_delta", delta=ended, usage={"output_tokens": 5}),
        sse("message_stop"),
    ]


@pytest.fixture(params=[False, True], ids=["async", "sync"])
def use(request, client):
    """Uses a provider's client, in either kind, and gives back the result or all events of a stream."""

    async def use(kind: str, key: str, work: Callable[[Any], Any], **options: Any) -> Any:
        library, base = (openai, f"{client.url}/v1") if kind == "OpenAI" else (anthropic, client.url)
        options = {"api_key": key, "base_url": base, **options}
        if request.param:
            return await asyncio.to_thread(synchronously, getattr(library, kind), work, options)
        async with getattr(library, f"Async{kind}")(**options) as sdk:
            result = await work(sdk)
            return [part async for part in result] if hasattr(result, "__aiter__") else result

    return use


def synchronously(client: Any, work: Callable[[Any], Any], options: dict) -> Any:
    with client(**options) as sdk:
        result = work(sdk)
        return list(result) if isinstance(result, openai.Stream | anthropic.Stream) else result


# ── Responses ────────────────────────────────────────────────────────────────────────────────────────


async def test_responses__whole__is_answered_and_charged(client, upstream, use):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers(RESPONSE)

    made = await use("OpenAI", key, lambda sdk: sdk.responses.create(model="micro", input="hi"))

    assert made.output_text == "Hello there"
    assert made.usage.total_tokens == 17
    assert upstream.bodies[0] == {"model": "micro", "input": "hi", "max_output_tokens": 4096}
    await client.check_books(account, DEPOSIT, FULL)
    (call,) = await client.calls(account)
    assert (call["surface"], call["receipt"]["usage"]) == ("responses", RESPONSE["usage"])


async def test_responses__stream__ends_with_the_cost_once_it_is_charged(client, upstream, use):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: response_events())

    events = await use(
        "OpenAI", key, lambda sdk: sdk.responses.create(model="micro", input="hi", stream=True)
    )

    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Hello there"
    assert events[-1].response.usage.total_tokens == 17
    (call,) = await client.calls(account)
    told = {"receipt_id": call["id"], "cost": FULL, "balance": "0.999983"}
    assert events[-1].model_extra["waterfall"] == told
    await client.check_books(account, DEPOSIT, FULL)


async def test_responses__stream_cut__raises_and_is_charged_for_its_pieces(client, upstream, use):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: response_events()[:3], "reset")

    with pytest.raises(openai.APIError, match="the connection broke"):
        await use("OpenAI", key, lambda sdk: sdk.responses.create(model="micro", input="hi", stream=True))

    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == ("0.000002", False)
    await client.check_books(account, DEPOSIT, "0.000002")


# ── Messages ─────────────────────────────────────────────────────────────────────────────────────────

ASK: dict[str, Any] = {
    "model": "micro",
    "max_tokens": 20,
    "messages": [{"role": "user", "content": "hi"}],
}


async def test_messages__whole__is_answered_and_charged(client, upstream, use):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers(MESSAGE)

    beta = {"anthropic-beta": "context-1m-2025-08-07"}
    made = await use("Anthropic", key, lambda sdk: sdk.messages.create(**ASK, extra_headers=beta))

    assert made.content[0].text == "Hello there"
    assert (made.usage.input_tokens, made.usage.output_tokens) == (12, 5)
    assert (
        upstream.headers[0]["anthropic-version"]
        == anthropic.AsyncAnthropic(api_key="").default_headers["anthropic-version"]
    )
    assert upstream.headers[0]["anthropic-beta"] == beta["anthropic-beta"]
    assert key not in str(upstream.headers[0])
    await client.check_books(account, DEPOSIT, FULL)
    (call,) = await client.calls(account)
    assert (call["surface"], call["receipt"]["usage"]) == ("messages", MESSAGE["usage"])


async def test_messages__stream__ends_with_the_cost_once_it_is_charged(client, upstream, use):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: message_events())

    events = await use("Anthropic", key, lambda sdk: sdk.messages.create(**ASK, stream=True))

    assert "".join(e.delta.text for e in events if e.type == "content_block_delta") == "Hello there"
    (last,) = [event for event in events if event.type == "message_delta"]
    (call,) = await client.calls(account)
    assert last.model_extra["waterfall"] == {"receipt_id": call["id"], "cost": FULL, "balance": "0.999983"}
    assert events[-1].type == "message_stop"
    await client.check_books(account, DEPOSIT, FULL)


async def test_messages__streaming_helper__gives_the_final_message(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: message_events())
    async with (
        anthropic.AsyncAnthropic(api_key=key, base_url=client.url) as sdk,
        sdk.messages.stream(**ASK) as stream,
    ):
        final = await stream.get_final_message()
    assert (final.content[0].text, final.usage.output_tokens) == ("Hello there", 5)
    await client.check_books(account, DEPOSIT, FULL)


async def test_messages__stream_cut__raises_and_is_charged_for_input_and_pieces(client, upstream, use):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: message_events()[:5], "reset")

    with pytest.raises(anthropic.APIStatusError, match="the connection broke"):
        await use("Anthropic", key, lambda sdk: sdk.messages.create(**ASK, stream=True))

    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == ("0.000014", False)
    await client.check_books(account, DEPOSIT, "0.000014")


async def test_messages__no_money__raises_a_billing_error_that_is_not_tried_again(client, upstream, use):
    account, key = await client.open_account(micro_usd=5)

    with pytest.raises(anthropic.APIStatusError) as raised:
        await use("Anthropic", key, lambda sdk: sdk.messages.create(**ASK))

    assert (raised.value.status_code, raised.value.body["type"]) == (402, "error")
    error = raised.value.body["error"]
    assert (error["type"], error["code"]) == ("billing_error", "insufficient_funds")
    assert error["deposit_address"] == account["deposit_address"]
    assert upstream.counts["started"] == 0


@pytest.mark.parametrize("status", [400, 429, 529])
async def test_messages__upstreams_own_error__is_passed_on_and_free(client, upstream, use, status):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    upstream.behaviour = answers(error, status=status)

    with pytest.raises(anthropic.APIStatusError) as raised:
        await use("Anthropic", key, lambda sdk: sdk.messages.create(**ASK), max_retries=0)

    assert (raised.value.status_code, raised.value.body) == (status, error)
    await client.check_books(account, DEPOSIT, "0")


async def test_messages__unknown_key__is_told_in_anthropics_words(client):
    status, body, _ = await client.request(
        "POST", "/v1/messages", headers={"x-api-key": "wf_nobody", "Authorization": ""}, json=ASK
    )
    assert (status, body["type"], body["error"]["type"]) == (401, "error", "authentication_error")


# ── Embeddings ───────────────────────────────────────────────────────────────────────────────────────


async def test_embeddings__text__is_charged_for_its_input_alone(client, upstream, use):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers(EMBEDDING)

    made = await use(
        "OpenAI",
        key,
        lambda sdk: sdk.embeddings.create(model="micro", input=["hi"], encoding_format="float"),
    )

    assert made.data[0].embedding == [0.5, -0.5]
    await client.check_books(account, DEPOSIT, "0.000012")
    (call,) = await client.calls(account)
    assert (call["surface"], call["receipt"]["receipt"]["output_tokens"]) == ("embeddings", 0)


# ── What all of them do ──────────────────────────────────────────────────────────────────────────────

CALLS = {
    "/v1/responses": ({"input": "hi"}, RESPONSE, response_events),
    "/v1/messages": ({"messages": ASK["messages"], "max_tokens": 20}, MESSAGE, message_events),
}


@pytest.mark.parametrize("route", CALLS)
async def test_call__whole__leaves_as_the_upstream_sent_it(client, upstream, route):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    fields, answer_, _ = CALLS[route]
    raw = json.dumps(answer_, indent=1).encode()
    upstream.behaviour = answers(raw)
    headers = {"Authorization": f"Bearer {key}"}
    async with client.session.post(
        client.url + route, headers=headers, json={"model": "micro", **fields}
    ) as got:
        assert await got.read() == raw
        assert (got.headers["x-waterfall-cost"], got.headers["x-waterfall-model"]) == (FULL, "micro")
    await client.check_books(account, DEPOSIT, FULL)


@pytest.mark.parametrize("route", CALLS)
async def test_stream__client_leaves_after_any_event__is_charged_in_full(client, upstream, route):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    fields, _, events = CALLS[route]
    upstream.behaviour, upstream.pause = streams(lambda body: events()), 0.005
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": "micro", "stream": True, **fields}
    for most in range(len(events())):
        async with client.session.post(client.url + route, headers=headers, json=body) as got:
            for _ in range(most):
                await got.content.readany()
    total = len(events()) * 17
    assert {call["status"] for call in (await client.calls(account))} <= {
        "held",
        "queued",
        "batched",
        "settled",
        "final",
    }
    await client.check_books(account, DEPOSIT, f"0.{total:06d}")


@pytest.mark.parametrize("route", CALLS)
async def test_stream__whole__every_byte_arrives_as_it_was_sent(client, upstream, route):
    _, key = await client.open_account(micro_usd=DEPOSIT)
    fields, _, events = CALLS[route]
    upstream.behaviour = streams(lambda body: events())
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": "micro", "stream": True, **fields}
    async with client.session.post(client.url + route, headers=headers, json=body) as got:
        assert without_cost(await got.read()) == b"".join(events())


async def test_image__in_a_request__is_held_by_its_number_and_charged_as_reported(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    image = base64.b64encode(bytes(30_000)).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    status, _, headers = await client.chat(
        key, model="gpt-4o-mini", messages=[{"role": "user", "content": [part]}], max_tokens=1
    )
    assert status == 200
    # 50,000 tokens and a few hundred of text at 0.15 USD per million: the image's bytes are not held for.
    assert 0.0075 < float(headers["x-waterfall-hold"]) < 0.0077
    assert (await client.ended(account))["cost"] == "0.0000048"


# ── Several models ───────────────────────────────────────────────────────────────────────────────────


async def test_models__all_fail__the_last_error_is_told_and_nothing_is_charged(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers({"error": {"message": "overloaded"}}, status=503)
    status, body, _ = await client.chat(key, model=None, models=["micro", "gpt-4o-mini"])
    assert (status, body["error"]["message"]) == (503, "overloaded")
    assert [call["status"] for call in await client.calls(account)] == ["released", "released"]
    await client.check_books(account, DEPOSIT, "0")


async def test_models__request_is_wrong__no_other_is_tried(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers({"error": {"message": "context too long"}}, status=400)
    status, _, _ = await client.chat(key, model=None, models=["micro", "gpt-4o-mini"])
    assert (status, upstream.counts["started"]) == (400, 1)
    await client.check_books(account, DEPOSIT, "0")


async def test_models__one_is_unknown__is_refused_before_anything_is_sent(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    status, body, _ = await client.chat(key, model=None, models=["micro", "nothing"])
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert upstream.counts["started"] == 0
    await client.check_books(account, DEPOSIT, "0")


async def test_models__one_cannot_be_bounded__is_refused_before_anything_is_sent(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    messages = [{"role": "user", "content": [image]}]
    status, body, _ = await client.chat(key, model=None, models=["gpt-4o-mini", "micro"], messages=messages)
    assert (status, body["error"]["param"]) == (400, "messages[0].content")
    assert upstream.counts["started"] == 0
    assert await client.calls(account) == []


async def test_models__answer_that_began__is_never_begun_again_by_another(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    def cut(body: dict) -> list[bytes]:
        return [chunk(body, choices=[{"index": 0, "delta": {"content": "Hel"}}])]

    upstream.behaviour = streams(cut, "reset")
    _, text, _ = await client.chat(key, model=None, models=["micro", "gpt-4o-mini"], stream=True)
    assert "the connection broke" in text
    assert DONE.decode() not in text
    assert upstream.counts["started"] == 1
    await client.check_books(account, DEPOSIT, "0.000001")


# ── Who is told what it costs the platform ───────────────────────────────────────────────────────────


async def test_vendor_cost__is_told_to_the_platform_and_never_to_the_account(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers(completion({"model": "micro"}))
    await client.chat(key)
    (shown,) = await client.calls(account)
    assert (shown["vendor_cost"], shown["margin"]) == (FULL, "0.00")
    _, (own,), _ = await client.request("GET", "/api/calls", key=key)
    assert (own["vendor_cost"], own["margin"]) == (None, None)
    _, receipt, _ = await client.request("GET", f"/api/receipts/{shown['id']}", key=key)
    assert (receipt["vendor_cost"], receipt["margin"]) == (None, None)


# ── Prices ───────────────────────────────────────────────────────────────────────────────────────────


async def test_prices__of_a_receipt__are_public_and_hash_to_its_price_id(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    await client.chat(key)
    (call,) = await client.calls(account)
    wanted = call["receipt"]["receipt"]["price_id"]
    status, card, _ = await client.request("GET", f"/api/prices/{wanted}", headers={"Authorization": ""})
    assert (status, card) == (200, call["receipt"]["rate_card"])
    assert canonical_hash(card) == wanted


async def test_estimate__request__is_what_would_be_held_and_holds_nothing(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    asked = {"model": "micro", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
    status, (shown,), _ = await client.request("POST", "/api/estimate", key=key, json={"request": asked})
    assert status == 200
    assert (shown["model"], shown["max_output_tokens"]) == ("micro", 20)
    assert upstream.counts["started"] == 0
    assert await client.calls(account) == []
    async with client.session.post(
        f"{client.url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        data=json.dumps(asked).encode(),
    ) as got:
        assert got.headers["x-waterfall-hold"] == shown["maximum"] == shown["least"]


async def test_estimate__several_models__each_with_its_price(client, upstream):
    asked = {"models": ["micro", "gpt-4o-mini"], "input": "hi"}
    status, shown, _ = await client.request(
        "POST", "/api/estimate", json={"surface": "responses", "request": asked}
    )
    assert status == 200
    assert [estimate["model"] for estimate in shown] == ["micro", "gpt-4o-mini"]
    assert shown[0]["least"] != shown[0]["maximum"], "without a limit the output may be cut"


@pytest.mark.parametrize(
    "request_", [{}, {"model": "micro"}, {"model": "micro", "messages": [{"role": "user", "content": 2**70}]}]
)
async def test_estimate__request_that_would_be_refused__is_refused_in_the_same_words(client, request_):
    status, body, _ = await client.request("POST", "/api/estimate", json={"request": request_})
    assert (status, body["error"]["code"]) == (400, "invalid_request")


# ── Models and counts ────────────────────────────────────────────────────────────────────────────────


async def test_models__listed__by_both_clients(client, use):
    _, key = await client.open_account()
    of_openai = await use("OpenAI", key, lambda sdk: sdk.models.list())
    of_anthropic = await use("Anthropic", key, lambda sdk: sdk.models.list())
    assert (
        {model.id for model in of_openai} == {model.id for model in of_anthropic} == {"micro", "gpt-4o-mini"}
    )


async def test_count_tokens__asked__is_the_upstreams_answer_and_free(client, upstream, use):
    account, key = await client.open_account()
    upstream.behaviour = answers({"input_tokens": 7})
    counted = await use(
        "Anthropic", key, lambda sdk: sdk.messages.count_tokens(model="micro", messages=ASK["messages"])
    )
    assert counted.input_tokens == 7
    assert await client.calls(account) == []


# ── Terms ────────────────────────────────────────────────────────────────────────────────────────────


async def test_settle_included__whole__is_answered_with_its_transaction(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    status, _, headers = await client.chat(key, headers={"X-Waterfall-Settle": "included"})
    assert status == 200
    (call,) = await client.calls(account)
    assert call["status"] in {"settled", "final"}
    assert call["transaction"] == headers["x-waterfall-transaction"]


async def test_settle_included__stream__ends_with_its_transaction(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    async with client.session.post(
        f"{client.url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}", "X-Waterfall-Settle": "included"},
        json={"model": "micro", "messages": [{"role": "user", "content": "hi"}], "stream": True},
    ) as got:
        text = (await got.read()).decode()
    (line,) = [line for line in text.split("\n") if line.startswith(": waterfall ")]
    (call,) = await client.calls(account)
    assert json.loads(line.removeprefix(": waterfall "))["transaction"] == call["transaction"] is not None


async def test_settle__without_asking__is_answered_before_the_chain_knows(client, upstream):
    _, key = await client.open_account(micro_usd=DEPOSIT)
    _, _, headers = await client.chat(key)
    assert "x-waterfall-transaction" not in headers


async def test_wait__funds_held_by_a_running_call__are_waited_for(client, upstream):
    account, key = await client.open_account(micro_usd=500)
    upstream.permits = asyncio.Semaphore(0)
    first = asyncio.create_task(client.chat(key))
    await upstream.until("started", 1)

    status, body, headers = await client.chat(key)
    assert (status, body["error"]["code"], headers["retry-after"]) == (402, "funds_held", "1")

    second = asyncio.create_task(client.chat(key, headers={"X-Waterfall-Wait": "20"}))
    await asyncio.sleep(0.3)
    assert not second.done()
    assert upstream.counts["started"] == 1
    upstream.permits.release()
    upstream.permits.release()
    assert [(await call)[0] for call in (first, second)] == [200, 200]
    await client.check_books(account, 500, "0.000034")


async def test_wait__money_that_is_not_there__is_not_waited_for(client, upstream):
    _, key = await client.open_account(micro_usd=5)
    async with asyncio.timeout(5):
        status, body, _ = await client.chat(key, headers={"X-Waterfall-Wait": "60"})
    assert (status, body["error"]["code"]) == (402, "insufficient_funds")


@pytest.mark.parametrize("headers", [{"X-Waterfall-Wait": "x"}, {"X-Waterfall-Settle": "x"}])
async def test_terms__unknown__are_refused_before_anything_is_held(client, upstream, headers):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    status, body, _ = await client.chat(key, headers=headers)
    assert (status, body["error"]["param"]) == (400, next(iter(headers)))
    assert await client.calls(account) == []


# ── What nobody foresaw ──────────────────────────────────────────────────────────────────────────────


CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 20}),
        ("/v1/messages", CHAT),
        ("/v1/embeddings", {"input": "hi"}),
    ],
)
async def test_defect__of_ours__is_a_typed_500_in_the_surfaces_words_and_tells_nothing(
    client, upstream, monkeypatch, path, fields
):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    def fail(*_):
        raise RuntimeError("hunter2")

    monkeypatch.setattr("waterfall.gateway.app.serve", fail)
    status, answer, headers = await client.request("POST", path, key=key, json={"model": "micro", **fields})
    assert (status, answer["error"]["code"], answer["error"]["type"]) == (500, "internal_error", "api_error")
    assert (answer.get("type") == "error") == (path == "/v1/messages")
    assert (headers["x-should-retry"], "hunter2" in str(answer)) == ("false", False)
    assert headers["x-request-id"]
    await client.check_books(account, DEPOSIT, "0")
