"""OpenAI's own clients, unchanged but for base URL and key."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import openai
import pytest
from service import ADMIN_KEY
from upstream import DONE, answer, answers, chunk, completion, delta, stream_chunks, streams

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPOSIT = 1_000_000
FULL = "0.000017"
ASK: dict[str, Any] = {"model": "micro", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}


class Sdk:
    """The synchronous or the asynchronous client; `attempts` counts what it sends, by status."""

    def __init__(self, url: str, *, synchronous: bool) -> None:
        self._url = url
        self._synchronous = synchronous
        self.attempts: Counter[int] = Counter()

    async def call(self, key: str, use: Callable[[Any], Any], **options: Any) -> Any:
        """The result of one use of a client; of a stream, the list of its chunks."""
        options = {"base_url": f"{self._url}/v1", "api_key": key, **options}
        return await (self._call_in_thread if self._synchronous else self._call)(use, options)

    async def _call(self, use: Callable[[Any], Any], options: dict) -> Any:
        async def count(response: Any) -> None:
            self.attempts[response.status_code] += 1

        http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [count]})
        async with openai.AsyncOpenAI(**options, http_client=http) as sdk:
            result = await use(sdk)
            return [part async for part in result] if isinstance(result, openai.AsyncStream) else result

    async def _call_in_thread(self, use: Callable[[Any], Any], options: dict) -> Any:
        def count(response: Any) -> None:
            self.attempts[response.status_code] += 1

        def work() -> Any:
            http = openai.DefaultHttpxClient(event_hooks={"response": [count]})
            with openai.OpenAI(**options, http_client=http) as sdk:
                result = use(sdk)
                return list(result) if isinstance(result, openai.Stream) else result

        return await asyncio.to_thread(work)

    async def ask(self, key: str, **fields: Any) -> Any:
        return await self.call(key, lambda sdk: sdk.chat.completions.create(**ASK | fields))


@pytest.fixture(params=[False, True], ids=["async", "sync"])
def sdk(request, client):
    return Sdk(client.url, synchronous=request.param)


# ── What works ───────────────────────────────────────────────────────────────────────────────────────


async def test_whole__asked__is_answered_and_charged(client, sdk):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    answered = await sdk.ask(key)

    assert answered.choices[0].message.content == "Hello there"
    assert (answered.usage.prompt_tokens, answered.usage.completion_tokens) == (12, 5)
    assert answered.model == "micro"
    assert sdk.attempts == {200: 1}
    await client.check_books(account, DEPOSIT, FULL)


async def test_whole__raw__tells_receipt_and_money(client, sdk):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    raw = await sdk.call(key, lambda sdk: sdk.chat.completions.with_raw_response.create(**ASK))

    assert raw.parse().choices[0].message.content == "Hello there"
    assert raw.headers["x-waterfall-cost"] == FULL
    assert raw.headers["x-waterfall-balance"] == "0.999983"
    receipt = await client.receipt(raw.headers["x-waterfall-receipt-id"])
    assert (receipt["cost"], receipt["held"]) == (FULL, raw.headers["x-waterfall-hold"])
    await client.check_books(account, DEPOSIT, FULL)


async def test_stream__asked__has_no_usage_and_is_charged(client, sdk):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    chunks = await sdk.ask(key, stream=True)

    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello there"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {c.usage for c in chunks} == {None}
    await client.check_books(account, DEPOSIT, FULL)


async def test_stream__with_usage__ends_with_it(client, sdk):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    chunks = await sdk.ask(key, stream=True, stream_options={"include_usage": True})

    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 17
    await client.check_books(account, DEPOSIT, FULL)


async def test_stream__raw__tells_receipt_and_hold_before_it_begins(client, sdk):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    raw = await sdk.call(key, lambda sdk: sdk.chat.completions.with_raw_response.create(**ASK, stream=True))

    assert raw.headers["content-type"].startswith("text/event-stream")
    assert "x-waterfall-cost" not in raw.headers
    call = await client.ended(account)
    assert call["id"] == raw.headers["x-waterfall-receipt-id"]
    assert call["held"] == raw.headers["x-waterfall-hold"]
    await client.check_books(account, DEPOSIT, FULL)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather somewhere.",
            "parameters": {
                "type": "object",
                "properties": {"where": {"type": "string"}},
                "required": ["where"],
            },
        },
    }
]
TOOL_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"where": "Riga"}'},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_tools__in_the_request__reach_the_upstream_and_their_calls_come_back(
    client, upstream, sdk, stream
):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How is it in Riga?"}]},
        {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]

    async def calls_a_tool(upstream, request, body):
        if not body.get("stream"):
            whole = completion(body)
            whole["choices"][0] |= {"finish_reason": "tool_calls"}
            whole["choices"][0]["message"] |= {"content": None, "tool_calls": [TOOL_CALL]}
            return await answers(whole)(upstream, request, body)
        called = chunk(body, choices=[delta({"tool_calls": [{"index": 0, **TOOL_CALL}]})])
        whole = stream_chunks(body, ())
        return await streams(lambda _: [whole[0], called, *whole[1:]])(upstream, request, body)

    upstream.behaviour = calls_a_tool
    asked = {"messages": messages, "tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": False}

    answered = await sdk.ask(key, stream=stream, **asked)

    sent = upstream.bodies[0]
    assert {name: sent[name] for name in asked} == asked
    if stream:
        calls = [call for c in answered for call in c.choices[0].delta.tool_calls or ()]
    else:
        calls = answered.choices[0].message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("weather", '{"where": "Riga"}')
    ]
    await client.check_books(account, DEPOSIT, FULL)


async def test_models__listed__are_the_ones_that_can_be_called(client, sdk):
    _, key = await client.open_account()
    page = await sdk.call(key, lambda sdk: sdk.models.list())
    assert [model.id for model in page.data] == ["micro", "gpt-4o-mini"]


async def test_platform_key__with_an_account_as_default_header__bills_it(client, sdk):
    account, _ = await client.open_account(micro_usd=DEPOSIT)
    named = {"X-Waterfall-Account": account["id"]}
    await sdk.call(ADMIN_KEY, lambda sdk: sdk.chat.completions.create(**ASK), default_headers=named)
    await client.check_books(account, DEPOSIT, FULL)


# ── What is refused ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("fields", "kind", "code", "param"),
    [
        ({"model": "nothing"}, openai.NotFoundError, "model_not_found", None),
        ({"model": "unpriced"}, openai.BadRequestError, "model_not_priced", None),
        ({"max_tokens": -1}, openai.BadRequestError, "invalid_request", "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "invalid_request", "messages"),
        ({"audio": {"voice": "ash", "format": "wav"}}, openai.BadRequestError, "invalid_request", "audio"),
    ],
    ids=["unknown model", "unpriced model", "bad limit", "no messages", "audio"],
)
async def test_request__wrong__raises_what_openai_would(
    client, upstream, sdk, fields, kind, code, param, stream
):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    with pytest.raises(kind) as raised:
        await sdk.ask(key, stream=stream, **fields)

    assert (raised.value.code, raised.value.param) == (code, param)
    assert sdk.attempts == {raised.value.status_code: 1}
    assert upstream.counts["started"] == 0
    await client.check_books(account, DEPOSIT, "0")


async def test_key__wrong__raises_an_authentication_error(client, sdk):
    with pytest.raises(openai.AuthenticationError) as raised:
        await sdk.ask("wf_nobody")
    assert (raised.value.code, raised.value.type) == ("invalid_api_key", "authentication_error")
    assert sdk.attempts == {401: 1}


async def test_account__of_somebody_else__raises_permission_denied(client, sdk):
    _, key = await client.open_account(micro_usd=DEPOSIT)
    other, _ = await client.open_account(micro_usd=DEPOSIT)
    with pytest.raises(openai.PermissionDeniedError) as raised:
        await sdk.ask(key, extra_headers={"X-Waterfall-Account": other["id"]})
    assert raised.value.code == "permission_denied"
    await client.check_books(other, DEPOSIT, "0")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_funds__too_few__raises_402_and_is_not_tried_again(client, upstream, sdk, stream):
    account, key = await client.open_account(micro_usd=5)

    with pytest.raises(openai.APIStatusError) as raised:
        await sdk.ask(key, stream=stream)

    assert type(raised.value) is openai.APIStatusError
    assert (raised.value.status_code, raised.value.code) == (402, "insufficient_funds")
    assert raised.value.body["deposit_address"] == account["deposit_address"]
    assert sdk.attempts == {402: 1}
    assert upstream.counts["started"] == 0


@pytest.mark.parametrize("route", ["images", "completions", "moderations"])
async def test_route__not_served__raises_and_is_not_tried_again(client, upstream, sdk, route):
    _, key = await client.open_account(micro_usd=DEPOSIT)
    uses = {
        "completions": lambda sdk: sdk.completions.create(model="micro", prompt="hi"),
        "moderations": lambda sdk: sdk.moderations.create(model="micro", input="hi"),
        "images": lambda sdk: sdk.images.generate(model="micro", prompt="hi"),
    }
    with pytest.raises(openai.InternalServerError) as raised:
        await sdk.call(key, uses[route])
    assert raised.value.code == "unsupported_route"
    assert sdk.attempts == {501: 1}
    assert upstream.counts["started"] == 0


# ── What the upstream does ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_upstream__busy_at_first__is_tried_again_and_charged_once(client, upstream, sdk, stream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    error = {"error": {"message": "slow down", "type": "rate_limit_error", "code": "rate_limit_exceeded"}}
    busy = answers(error, status=429, headers={"Retry-After-Ms": "20"})

    async def busy_at_first(upstream, request, body):
        behaviour = busy if upstream.counts["started"] < 3 else answer
        return await behaviour(upstream, request, body)

    upstream.behaviour = busy_at_first

    await sdk.ask(key, stream=stream)

    assert sdk.attempts == {429: 2, 200: 1}
    assert [call["status"] for call in await client.calls(account, status="released")] == ["released"] * 2
    await client.check_books(account, DEPOSIT, FULL)


async def test_upstream__busy_for_ever__raises_its_error(client, upstream, sdk):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    error = {"error": {"message": "slow down", "type": "rate_limit_error", "code": "rate_limit_exceeded"}}
    upstream.behaviour = answers(error, status=429, headers={"Retry-After-Ms": "20"})
    with pytest.raises(openai.RateLimitError) as raised:
        await sdk.ask(key)
    assert (raised.value.code, raised.value.body["message"]) == ("rate_limit_exceeded", "slow down")
    assert sdk.attempts == {429: 3}
    await client.check_books(account, DEPOSIT, "0")


async def test_upstream__may_have_run__raises_and_is_not_tried_again(client, upstream, sdk):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers(b'{"choices": [', end="closed")
    with pytest.raises(openai.InternalServerError) as raised:
        await sdk.ask(key)
    assert raised.value.code == "upstream_invalid"
    assert sdk.attempts == {502: 1}
    assert upstream.counts["started"] == 1
    await client.check_books(account, DEPOSIT, "0")


async def test_stream__cut__raises_after_what_came(client, upstream, sdk):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: stream_chunks(body)[:3], "closed")

    with pytest.raises(openai.APIError) as raised:
        await sdk.ask(key, stream=True)

    assert raised.value.code == "upstream_invalid"
    assert "cannot be metered" in raised.value.message
    assert sdk.attempts == {200: 1}
    await client.check_books(account, DEPOSIT, "0.000002")


async def test_stream__with_comments_and_crlf__is_read(client, upstream, sdk):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(
        lambda body: [
            data.replace(b"\n", b"\r\n")
            for data in (b": ping\n\n", *stream_chunks(body)[:-1], b": ping\n\n", DONE)
        ]
    )
    chunks = await sdk.ask(key, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello there"
    await client.check_books(account, DEPOSIT, FULL)


async def test_client__times_out__is_charged_in_full(client, upstream, sdk):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.permits = asyncio.Semaphore(0)
    with pytest.raises(openai.APITimeoutError):
        await sdk.call(key, lambda sdk: sdk.chat.completions.create(**ASK), timeout=0.3, max_retries=0)
    await upstream.until("started", 1)
    upstream.permits.release()
    await client.ended(account)
    await client.check_books(account, DEPOSIT, FULL)


async def test_stream__left_early__is_charged_in_full(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.permits = asyncio.Semaphore(3)
    async with (
        openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key=key) as sdk,
        await sdk.chat.completions.create(**ASK, stream=True) as stream,
    ):
        async for part in stream:
            if part.choices[0].delta.content:
                break
    for _ in range(10):
        upstream.permits.release()
    assert (await client.ended(account))["receipt"]["receipt"]["complete"] is True
    await client.check_books(account, DEPOSIT, FULL)
