"""One Idempotency-Key, one call: whatever is repeated, however often, it runs once and is charged once."""

import asyncio

import pytest
import sqlalchemy as sa
from sse import without_cost
from upstream import answer, answers, stream_chunks, streams

from waterfall.ledger import schema

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPOSIT = 1_000_000
FULL = "0.000017"
KEY = {"Idempotency-Key": "once"}


async def test_repeat__whole__is_given_the_same_bytes_and_not_run_again(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    status, first, headers = await client.chat(key, headers=KEY)
    again, second, repeated = await client.chat(key, headers=KEY)
    assert (status, again, first) == (200, 200, second)
    assert upstream.counts["started"] == 1
    for name in ("x-waterfall-receipt-id", "x-waterfall-cost", "x-waterfall-hold", "x-waterfall-model"):
        assert repeated[name] == headers[name]
    assert (headers.get("x-waterfall-replayed"), repeated["x-waterfall-replayed"]) == (None, "true")
    await client.check_books(account, DEPOSIT, FULL)


@pytest.mark.parametrize("include_usage", [False, True])
async def test_repeat__stream__is_given_the_same_events(client, upstream, include_usage):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    asked = {"stream": True, "stream_options": {"include_usage": include_usage}}
    _, first, _ = await client.chat(key, headers=KEY, **asked)
    status, second, headers = await client.chat(key, headers=KEY, **asked)
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/event-stream")
    assert second.encode() == without_cost(first.encode())
    assert second.endswith("data: [DONE]\n\n")
    assert upstream.counts["started"] == 1
    await client.check_books(account, DEPOSIT, FULL)


async def test_repeat__stream_whose_client_left__is_given_what_it_missed(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.pause = 0.02
    async with client.session.post(
        f"{client.url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}", **KEY},
        json={"model": "micro", "messages": [{"role": "user", "content": "hi"}], "stream": True},
    ) as got:
        await got.content.readany()
    async with client.session.post(
        f"{client.url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}", **KEY},
        json={"model": "micro", "messages": [{"role": "user", "content": "hi"}], "stream": True},
    ) as got:
        text = (await got.read()).decode()
    assert text.endswith("data: [DONE]\n\n")
    assert upstream.counts["started"] == 1
    await client.check_books(account, DEPOSIT, FULL)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_repeats__thirty_at_once__one_runs_and_all_are_given_its_answer(client, upstream, stream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.delay = 0.1
    answered = await asyncio.gather(*(client.chat(key, headers=KEY, stream=stream) for _ in range(30)))
    assert {status for status, _, _ in answered} == {200}
    shown = {without_cost(str(body).encode()) for _, body, _ in answered}
    assert len(shown) == 1
    assert len({headers["x-waterfall-receipt-id"] for _, _, headers in answered}) == 1
    assert sum("x-waterfall-replayed" not in headers for _, _, headers in answered) == 1
    assert upstream.counts["started"] == 1
    await client.check_books(account, DEPOSIT, FULL)


async def test_key__with_another_body__is_a_conflict_that_is_not_sent_again(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    await client.chat(key, headers=KEY)
    status, body, headers = await client.chat(key, headers=KEY, max_tokens=21)
    assert (status, body["error"]["code"]) == (409, "idempotency_conflict")
    assert headers["x-should-retry"] == "false"
    assert upstream.counts["started"] == 1
    await client.check_books(account, DEPOSIT, FULL)


async def test_key__of_another_account__is_another_call(client, upstream):
    one, key = await client.open_account(micro_usd=DEPOSIT)
    other, other_key = await client.open_account(micro_usd=DEPOSIT)
    for its in (key, other_key):
        assert (await client.chat(its, headers=KEY))[0] == 200
    assert upstream.counts["started"] == 2
    for account in (one, other):
        await client.check_books(account, DEPOSIT, FULL)


async def test_repeat__of_a_call_that_cost_nothing__is_made(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers({"error": {"message": "overloaded"}}, status=503)
    assert (await client.chat(key, headers=KEY))[0] == 503
    upstream.behaviour = answer
    status, _, headers = await client.chat(key, headers=KEY)
    assert (status, headers.get("x-waterfall-replayed")) == (200, None)
    assert (await client.chat(key, headers=KEY))[2]["x-waterfall-replayed"] == "true"
    assert upstream.counts["started"] == 2
    await client.check_books(account, DEPOSIT, FULL)


async def test_repeat__of_a_call_that_was_lost__is_told_and_never_run_again(client, upstream):
    """Row 18: a timeout reported as failure makes the payer pay again (x402 #452, #786, #1062)."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = answers(b"no JSON")
    assert (await client.chat(key, headers=KEY))[0] == 502
    status, body, headers = await client.chat(key, headers=KEY)
    assert (status, body["error"]["code"]) == (409, "call_lost")
    assert headers["x-should-retry"] == "false"
    assert upstream.counts["started"] == 1
    await client.check_books(account, DEPOSIT, "0")


async def test_repeat__whose_answer_is_kept_no_more__is_told_of_the_charge_and_never_run_again(
    client, upstream
):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    _, _, headers = await client.chat(key, headers=KEY)
    table = schema.idempotency
    await client.ledger.write(lambda tx: tx.run(sa.update(table).values(answer=None)))
    status, body, _ = await client.chat(key, headers=KEY)
    assert (status, body["error"]["code"]) == (409, "already_charged")
    assert body["error"]["receipt"] == headers["x-waterfall-receipt-id"]
    assert upstream.counts["started"] == 1
    await client.check_books(account, DEPOSIT, FULL)


async def test_models__first_is_lost__the_second_serves_under_the_same_key(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    async def first_breaks(upstream_, request, body):
        behaviour = answers(b"no JSON") if body["model"] == "micro" else answer
        return await behaviour(upstream_, request, body)

    upstream.behaviour = first_breaks
    asked = {"model": None, "models": ["micro", "gpt-4o-mini"]}
    status, first, headers = await client.chat(key, headers=KEY, **asked)
    assert (status, headers["x-waterfall-model"]) == (200, "gpt-4o-mini")
    _, second, repeated = await client.chat(key, headers=KEY, **asked)
    assert (second, repeated["x-waterfall-replayed"]) == (first, "true")
    assert upstream.counts["started"] == 2
    await client.check_books(account, DEPOSIT, "0.0000048")


async def test_repeat__of_a_stream_that_was_cut__is_given_the_cut_stream(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.behaviour = streams(lambda body: stream_chunks(body)[:3], "reset")
    _, first, _ = await client.chat(key, headers=KEY, stream=True)
    _, second, _ = await client.chat(key, headers=KEY, stream=True)
    assert second.encode() == without_cost(first.encode())
    assert "the connection broke" in second
    assert upstream.counts["started"] == 1
    await client.check_books(account, DEPOSIT, "0.000002")


async def test_repeats__at_once_after_an_attempt_that_cost_nothing__one_runs(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    refused = answers({"error": {"message": "overloaded"}}, status=503)

    async def first_refuses(upstream_, request, body):
        await asyncio.sleep(0.1)
        return await (refused if upstream.counts["started"] == 1 else answer)(upstream_, request, body)

    upstream.behaviour = first_refuses
    answered = await asyncio.gather(*(client.chat(key, headers=KEY) for _ in range(10)))
    assert sorted(status for status, _, _ in answered) == [200] * 9 + [503]
    assert upstream.counts["started"] == 2
    await client.check_books(account, DEPOSIT, FULL)


async def test_repeat__while_the_second_of_two_models_serves__waits_for_it(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)

    async def first_breaks(upstream_, request, body):
        await asyncio.sleep(0.5)
        behaviour = answers(b"no JSON") if body["model"] == "micro" else answer
        return await behaviour(upstream_, request, body)

    upstream.behaviour = first_breaks
    asked = {"model": None, "models": ["micro", "gpt-4o-mini"]}
    first = asyncio.create_task(client.chat(key, headers=KEY, **asked))
    await upstream.until("started", 1)
    status, body, headers = await client.chat(key, headers=KEY, **asked)
    assert (status, body) == (200, (await first)[1])
    assert (headers["x-waterfall-replayed"], headers["x-waterfall-model"]) == ("true", "gpt-4o-mini")
    await client.check_books(account, DEPOSIT, "0.0000048")


async def test_key__over_another_surface__is_a_conflict(client, upstream):
    _, key = await client.open_account(micro_usd=DEPOSIT)
    assert (await client.chat(key, headers=KEY))[0] == 200
    asked = {"model": "micro", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
    status, body, _ = await client.request("POST", "/v1/messages", key=key, headers=KEY, json=asked)
    assert (status, body["error"]["code"]) == (409, "idempotency_conflict")


@pytest.mark.parametrize("value", ["", "x" * 256])
async def test_key__that_is_none__is_refused(client, upstream, value):
    _, key = await client.open_account(micro_usd=DEPOSIT)
    status, body, _ = await client.chat(key, headers={"Idempotency-Key": value})
    assert (status, body["error"]["param"]) == (400, "Idempotency-Key")
    assert upstream.counts["started"] == 0
