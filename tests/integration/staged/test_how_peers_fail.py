"""How other gateways lost money or refused it, row by row, and what this one does in their place.

The rows of processes, nodes and databases that fail have their tests where those are made to fail (`-k test_row_`): 4 in
test_limits, 5 in test_kills and test_stop, 15 in test_projection, 16 in test_gas_faults, 17 in test_races, 19 in test_reorgs.
"""

import asyncio
import json

import pytest
import sqlalchemy as sa
from upstream import answer, answers, chunk, delta, stream_chunks, streams, uses

from waterfall.chain.events import decided_in
from waterfall.ledger import schema
from waterfall.money import format_usd, parse_usd

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPOSIT = 1_000_000
FULL = "0.000017"  # 12 tokens in, 5 out, at a micro-dollar each
COPY = {"from": "0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266"}
"""Anybody at all: a key of anvil's."""


async def cost_of(client, headers):
    return (await client.receipt(headers["X-Waterfall-Receipt-Id"]))["cost"]


async def test_row_01__sixty_calls_at_once_on_a_budget_for_ten__exactly_ten_run(client, upstream):
    """Check-then-act: LiteLLM #34732, #40095."""
    upstream.delay = 0.3
    _, empty = await client.open_account()
    _, refusal, _ = await client.chat(empty)
    maximum = parse_usd(refusal["error"]["maximum"])
    account, _ = await client.open_account(micro_usd=DEPOSIT)
    limits = {"limits": {"budget": format_usd(10 * maximum)}}
    _, key, _ = await client.request("POST", f"/api/accounts/{account['id']}/keys", json=limits)
    results = await asyncio.gather(*(client.chat(key["key"]) for _ in range(60)))
    assert sorted(status for status, _, _ in results) == [200] * 10 + [402] * 50
    assert upstream.counts["started"] == 10
    await client.check_books(account, DEPOSIT, "0.00017")


async def test_row_02__storm_of_every_kind_of_call__leaves_no_hold_and_the_books_add_up(client, upstream):
    """Holds leak, then false refusals: LiteLLM #27639, #36926, #40050; Otari."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    ends = [
        streams(),
        streams(lambda body: stream_chunks(body)[:3], end="reset"),
        answers(b"no JSON"),
        answers({"error": {"message": "too many"}}, status=429),
        answers({"error": {"message": "broken"}}, status=500),
    ]
    for number in range(25):
        upstream.behaviour = ends[number % len(ends)]
        if number % 2:
            async with client.streaming(key) as response:
                await response.content.readany()
        else:
            await client.chat(key)
    async with asyncio.timeout(20):
        while (await client.account(account["id"]))["held"] != "0.00":
            await asyncio.sleep(0.05)
    calls = await client.calls(account)
    charged = sum(parse_usd(call["cost"]) for call in calls if call["cost"] is not None)
    assert len(calls) == 25
    await client.check_books(account, DEPOSIT, format_usd(charged))


async def test_row_03__batch_sent_to_the_chain_again_by_somebody__debits_nothing_more(client, net, upstream):
    """Settling is a counter change, so it cannot be idempotent: mozilla-ai/otari#742."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    for _ in range(2):
        await client.chat(key)
        await client.settled(account["id"])
    query = sa.select(schema.slots.c.calldata, schema.slots.c.target).where(
        schema.slots.c.purpose == "settle"
    )
    slots = await client.ledger.read(lambda c: c.execute(query).all())
    assert len(slots) >= 2
    for slot in reversed(slots):  # the later one first
        raw = slot.calldata if isinstance(slot.calldata, str) else "0x" + bytes(slot.calldata).hex()
        sent = await net.anvil.rpc.call("eth_sendTransaction", COPY | {"to": slot.target, "data": raw})
        async with asyncio.timeout(10):
            while (receipt := await net.anvil.rpc.call("eth_getTransactionReceipt", sent)) is None:
                await asyncio.sleep(0.05)
        assert receipt["status"] == "0x1", "the vault has taken it, and knew every charge"
        assert not decided_in(receipt["logs"], slot.target)
    await client.check_books(account, DEPOSIT, "0.000034")
    assert (await client.request("GET", "/healthz"))[1]["status"] == "ok"


@pytest.mark.parametrize("chunks", range(1, 6))
async def test_row_06__client_hangs_up_at_a_chunk__is_charged_in_full(client, upstream, chunks):
    """A client that hangs up pays nothing: LiteLLM #33736, #37734."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams()
    async with client.streaming(key) as response:
        for _ in range(chunks):
            await response.content.readuntil(b"\n\n")
    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"]) == (FULL, True)
    await client.check_books(account, DEPOSIT, FULL)


async def test_row_07__usage_in_the_middle_of_a_cut_stream__is_no_last_word(client, upstream):
    """A partial or placeholder usage is trusted: LiteLLM #39893."""
    account, key = await client.open_account(micro_usd=DEPOSIT)

    def placeholder(body):
        early = {"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 13}
        return [
            chunk(body, choices=[delta({"content": "Hel"})], usage=early),
            chunk(body, choices=[delta({"content": "lo"})]),
            chunk(body, choices=[delta({"content": " there"})]),
        ]

    upstream.behaviour = streams(placeholder, end="closed")
    async with client.streaming(key) as response:
        await response.read()
    call = await client.ended(account)
    assert (call["cost"], call["receipt"]["receipt"]["complete"], call["receipt"]["usage"]) == (
        "0.000003",
        False,
        None,
    )
    incomplete = await client.calls(account, complete="false")
    assert [one["id"] for one in incomplete] == [call["id"]]


async def test_row_08__explicit_zero__stays_zero(client, upstream):
    """An explicit zero is read as missing: LiteLLM #37992."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = uses({"prompt_tokens": 12, "completion_tokens": 0, "total_tokens": 12})
    _, _, headers = await client.chat(key)
    assert await cost_of(client, headers) == "0.000012"
    upstream.behaviour = uses({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})
    status, _, headers = await client.chat(key)
    receipt = await client.receipt(headers["X-Waterfall-Receipt-Id"])
    assert (status, receipt["cost"], receipt["status"]) == (200, "0.00", "free")
    await client.check_books(account, DEPOSIT, "0.000012")


async def test_row_09__stream_without_usage_asked_for__is_billed_and_shows_none(client, upstream):
    """Streams without usage are free: otari#256, LiteLLM #6633."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    _, text, _ = await client.chat(key, stream=True)
    assert upstream.bodies[-1]["stream_options"] == {"include_usage": True}
    assert "prompt_tokens" not in text
    await client.check_books(account, DEPOSIT, FULL)


async def test_row_10__model_without_a_price__is_refused_before_anything_is_sent(client, upstream):
    """An unpriced model costs 0: LiteLLM #30715."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    status, body, _ = await client.chat(key, model="unpriced")
    assert (status, body["error"]["code"]) == (400, "model_not_priced")
    assert (upstream.counts["started"], await client.calls(account)) == (0, [])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_row_11__fallback__is_held_and_priced_by_the_model_that_served(client, upstream, stream):
    """A fallback is billed at the wrong model's price: LiteLLM #39294."""
    account, key = await client.open_account(micro_usd=DEPOSIT)

    async def first_is_busy(upstream, request, body):
        busy = answers({"error": {"message": "too many"}}, status=429)
        return await (busy if body["model"] == "micro" else answer)(upstream, request, body)

    upstream.behaviour = first_is_busy
    status, _, headers = await client.chat(key, model=None, models=["micro", "gpt-4o-mini"], stream=stream)
    assert (status, headers["X-Waterfall-Model"]) == (200, "gpt-4o-mini")
    assert [body["model"] for body in upstream.bodies] == ["micro", "gpt-4o-mini"]
    assert all("models" not in body for body in upstream.bodies)
    served, failed = await client.calls(account)
    assert (failed["model"], failed["status"], failed["cost"]) == ("micro", "released", None)
    assert (served["model"], served["cost"]) == ("gpt-4o-mini", "0.0000048")  # 12 × 0.15 + 5 × 0.60
    await client.check_books(account, DEPOSIT, "0.0000048")


@pytest.mark.parametrize(
    ("used", "cost"),
    [
        (
            {"prompt_tokens": 12, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 8}},
            "0.0000042",
        ),
        ({"prompt_tokens": 12, "completion_tokens": 5}, "0.0000048"),
    ],
)
async def test_row_12__cached_tokens__are_a_part_of_the_prompts_and_cheaper(client, upstream, used, cost):
    """Cached tokens are counted twice: LiteLLM #14849, #9812; aider#5516. Anthropic's vectors: test_usage_of_surfaces."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = uses(used)
    _, _, headers = await client.chat(key, model="gpt-4o-mini")
    assert await cost_of(client, headers) == cost
    await client.check_books(account, DEPOSIT, cost)


async def test_row_13__answer_read_again__has_one_receipt_and_reading_is_free(client, upstream):
    """One response is billed twice: LiteLLM #15740, #17814."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    once = {"Idempotency-Key": "row 13"}
    first, again = await client.chat(key, headers=once), await client.chat(key, headers=once)
    assert (first[0], again[0], first[1]) == (200, 200, again[1])
    assert first[2]["X-Waterfall-Receipt-Id"] == again[2]["X-Waterfall-Receipt-Id"]
    status, body, _ = await client.request("GET", "/v1/responses/resp_1", key=key)
    assert (status, body["error"]["code"]) == (501, "unsupported_route")
    assert len(await client.calls(account)) == 1
    await client.check_books(account, DEPOSIT, FULL)


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/completions", "/v1/images/generations", "/v1/audio/speech", "/v1/batches", "/v1/files"),
        *("/v1/chat/completions/", "/v1//chat/completions", "/v1/rerank", "/v1/moderations", "/v1/realtime"),
    ],
)
async def test_row_14__route_that_is_not_metered__is_refused_and_not_passed_on(client, upstream, path):
    """A route skips metering: bifrost#2873."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    body = {"model": "micro", "messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "input": "hi"}
    status, refusal, _ = await client.request("POST", path, key=key, json=body)
    assert (status, refusal["error"]["code"]) == (501, "unsupported_route")
    assert (upstream.counts["started"], await client.calls(account)) == (0, [])


async def test_row_18__call_whose_answer_never_came__is_not_made_again_by_its_repeat(client, upstream):
    """A timeout is reported as a failure, and the payer pays again: x402 #452, #786, #1062."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers(json.dumps({"choices": []}).encode(), end="closed")
    once = {"Idempotency-Key": "row 18"}
    status, body, headers = await client.chat(key, headers=once)
    assert (status, body["error"]["code"], headers["x-should-retry"]) == (502, "upstream_invalid", "false")
    upstream.reset()
    status, body, _ = await client.chat(key, headers=once)
    assert (status, body["error"]["code"]) == (409, "call_lost")
    assert upstream.counts["started"] == 0
    await client.check_books(account, DEPOSIT, "0")


async def test_row_20__refusal__says_which_budget_and_what_is_left_of_it(client, upstream):
    """An error does not say which budget: LiteLLM #14144."""
    account, key = await client.open_account(micro_usd=100)
    status, body, _ = await client.chat(key)
    error = body["error"]
    assert (status, error["code"], error["account"]) == (402, "insufficient_funds", account["id"])
    assert (error["balance"], error["available"], error["held"]) == ("0.0001", "0.0001", "0.00")
    assert parse_usd(error["required"]) > parse_usd("0.0001")
    assert error["deposit_address"].startswith("0x")

    account, key = await client.open_account(micro_usd=DEPOSIT)
    keys = f"/api/accounts/{account['id']}/keys"
    _, made, _ = await client.request("POST", keys, json={"limits": {"max_per_call": "0.00001"}})
    policy = {"max_per_charge": "0.00002"}
    assert (await client.request("PUT", f"/api/accounts/{account['id']}/policy", json=policy))[0] == 202
    await client.until(account["id"], lambda a: a["wanted_policy"] is None)
    _, body, _ = await client.chat(key)
    assert (body["error"]["scope"], body["error"]["limit"]) == ("per_charge", "0.00002")
    policy = {"max_per_charge": None}
    assert (await client.request("PUT", f"/api/accounts/{account['id']}/policy", json=policy))[0] == 202
    await client.until(account["id"], lambda a: a["policy"]["max_per_charge"] is None)
    _, body, _ = await client.chat(made["key"])
    assert (body["error"]["scope"], body["error"]["limit"]) == ("key_per_call", "0.00001")
