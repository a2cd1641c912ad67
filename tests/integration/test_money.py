"""What must never differ: what a wallet had, what was delivered, what the chain says."""

import asyncio

from service import running, settings_for

from waterfall.chain.verify import verify
from waterfall.cli.receipts import parse
from waterfall.money import format_usd, parse_usd


async def test_call__whole__is_charged_settled_and_proven(client, net):
    account, key = await client.open_account(micro_usd=1_000_000)

    status, answer, headers = await client.chat(key)
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == 12
    assert headers["X-Waterfall-Cost"] == "0.000017"  # 12 in, 5 out, a micro-dollar each
    assert headers["X-Waterfall-Balance"] == "0.999983"
    assert parse_usd(headers["X-Waterfall-Hold"]) > parse_usd(headers["X-Waterfall-Cost"])

    settled = await client.settled(account["id"])
    assert settled["balance"] == "0.999983"
    receipt = await client.receipt(headers["X-Waterfall-Receipt-Id"])
    assert receipt["status"] in {"settled", "final"}
    proof = await verify(parse(receipt), net.vault, net.chain.chain_id)
    assert proof.transaction == receipt["transaction"]
    assert (await net.vault.account(net.chain.platform, account["id"])).balance == parse_usd("0.999983")


async def test_call__streamed__hides_usage_that_was_not_asked_for(client, upstream):
    account, key = await client.open_account(micro_usd=1_000_000)

    status, text, headers = await client.chat(key, stream=True)

    assert status == 200
    assert text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in text
    assert upstream.bodies[0]["stream_options"] == {"include_usage": True}
    settled = await client.settled(account["id"])
    assert settled["balance"] == "0.999983"
    receipt = await client.receipt(headers["X-Waterfall-Receipt-Id"])
    assert receipt["receipt"]["receipt"]["complete"] is True


async def test_call__streamed_with_usage_asked_for__shows_it(client):
    _, key = await client.open_account(micro_usd=1_000_000)

    _, text, _ = await client.chat(key, stream=True, stream_options={"include_usage": True})

    assert '"prompt_tokens": 12' in text


async def test_calls__sixty_at_once_on_a_wallet_for_ten__exactly_ten_run(client, net, upstream):
    """Peers let concurrent calls pass a budget together, or leak holds and refuse for ever (LiteLLM, Otari)."""
    upstream.delay = 0.3
    empty, empty_key = await client.open_account("empty")
    status, refusal, _ = await client.chat(empty_key)
    assert status == 402
    assert refusal["error"]["code"] == "insufficient_funds"
    maximum = parse_usd(refusal["error"]["maximum"])
    assert maximum % 10**6 == 0

    account, key = await client.open_account("ada", micro_usd=10 * maximum // 10**6)
    results = await asyncio.gather(*(client.chat(key) for _ in range(60)))

    assert [status for status, _, _ in results].count(200) == 10
    refused = [body["error"]["code"] for status, body, _ in results if status != 200]
    assert refused == ["funds_held"] * 50
    assert upstream.counts["started"] == 10
    receipts = [headers["X-Waterfall-Receipt-Id"] for status, _, headers in results if status == 200]
    assert all(headers["X-Waterfall-Hold"] == format_usd(maximum) for s, _, headers in results if s == 200)

    settled = await client.settled(account["id"])
    charged = sum([parse_usd((await client.receipt(receipt))["cost"]) for receipt in receipts])
    assert parse_usd(settled["balance"]) == 10 * maximum - charged
    assert (await net.vault.account(net.chain.platform, account["id"])).balance == 10 * maximum - charged
    assert (await client.account(empty["id"]))["held"] == "0.00"


async def test_call__without_max_tokens__output_is_capped_to_what_the_wallet_affords(client, upstream):
    _, key = await client.open_account(micro_usd=500)

    status, _, headers = await client.chat(key, max_tokens=None)

    assert status == 200
    assert headers["X-Waterfall-Hold"] == "0.0005"
    assert 16 <= upstream.bodies[0]["max_tokens"] < 500


async def test_policy__lowered__binds_at_once_and_reaches_the_chain(client, net, upstream):
    account, key = await client.open_account(micro_usd=1_000_000)
    policy = {"max_per_charge": "0.00001", "max_per_window": "0.5", "window_seconds": 3600}

    status, shown, _ = await client.request("PUT", f"/api/accounts/{account['id']}/policy", json=policy)
    assert status == 202
    assert shown["wanted_policy"]["max_per_charge"] == "0.00001"
    status, refusal, _ = await client.chat(key)
    assert status == 402
    assert (refusal["error"]["code"], refusal["error"]["scope"]) == ("limit_exceeded", "per_charge")
    assert upstream.counts["started"] == 0

    shown = await client.until(account["id"], lambda a: a["wanted_policy"] is None)
    assert shown["policy"]["max_per_window"] == "0.50"
    on_chain = (await net.vault.account(net.chain.platform, account["id"])).policy
    assert on_chain.max_per_charge == parse_usd("0.00001")


async def test_deposit_address__money_sent_there__is_swept_into_the_account(client, net):
    account, _ = await client.open_account()
    call = {"from": "0x90f79bf6eb2c4f870365e785982e1f101e93b906", "to": net.token, "gas": "0x30000"}
    to = account["deposit_address"][2:].rjust(64, "0")
    await net.anvil.rpc.call("eth_sendTransaction", call | {"data": f"0x40c10f19{to}{2_500_000:064x}"})

    shown = await client.until(account["id"], lambda a: a["balance"] != "0.00")

    assert shown["balance"] == "2.50"


async def test_charges__metered_elsewhere__once_per_key(client, net):
    account, _ = await client.open_account(micro_usd=1_000_000)
    body = {"account": account["id"], "amount": "0.000000000001"}

    async def post(key: str, sent: dict) -> tuple[int, dict, object]:
        return await client.request("POST", "/api/charges", json=sent, headers={"Idempotency-Key": key})

    results = await asyncio.gather(*(post("one", body) for _ in range(20)))
    assert {status for status, _, _ in results} == {202}
    assert len({shown["id"] for _, shown, _ in results}) == 1
    status, conflict, _ = await post("one", {**body, "amount": "0.000000000002"})
    assert (status, conflict["error"]["code"]) == (409, "idempotency_conflict")
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    status, metered, _ = await post("two", {"account": account["id"], "model": "gpt-4o-mini", "usage": usage})
    assert (status, metered["cost"]) == (202, "0.00000285")

    settled = await client.settled(account["id"])
    assert settled["balance"] == "0.999997149999"
    for receipt_id in (results[0][1]["id"], metered["id"]):
        await verify(parse(await client.receipt(receipt_id)), net.vault, net.chain.chain_id)


async def test_charge__repeated_when_its_model_is_gone__is_the_same_receipt(net, upstream, database):
    settings = settings_for(upstream.base_url, database)
    asked = {"headers": {"Idempotency-Key": "order 1"}}
    async with running(net, settings) as client:
        account, _ = await client.open_account(micro_usd=1_000_000)
        usage = {"prompt_tokens": 12, "completion_tokens": 5}
        asked["json"] = {"account": account["id"], "model": "micro", "usage": usage}
        _, first, _ = await client.request("POST", "/api/charges", **asked)

    async with running(net, settings.model_copy(update={"models": {}})) as client:
        status, again, _ = await client.request("POST", "/api/charges", **asked)
        assert (status, again["id"]) == (202, first["id"])
        asked["headers"] = {"Idempotency-Key": "order 2"}
        status, new, _ = await client.request("POST", "/api/charges", **asked)
        assert (status, new["error"]["code"]) == (404, "model_not_found")
        await client.check_books(account, 1_000_000, "0.000017")
