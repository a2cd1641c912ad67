"""`waterfall accuracy` over calls that ended in every way."""

import json

import pytest
from processes import waterfall
from service import ADMIN_KEY
from upstream import answers, stream_chunks, streams

from waterfall.ledger import schema

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPOSIT = 1_000_000


async def measure(client, account, *more):
    code, said, complained = await waterfall(
        *("accuracy", "--url", client.url, "--key", ADMIN_KEY, "--account", account["id"], *more)
    )
    return code, said, complained


async def test_accuracy__calls_of_every_kind__are_counted_and_nothing_differs(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    for _ in range(3):
        assert (await client.chat(key))[0] == 200
    upstream.behaviour = answers(b"no JSON")
    assert (await client.chat(key))[0] == 502
    upstream.behaviour = streams(lambda body: stream_chunks(body)[:3], end="closed")
    async with client.streaming(key) as response:
        await response.read()
    charge = {"account": account["id"], "amount": "0.01"}
    assert (
        await client.request("POST", "/api/charges", json=charge, headers={"Idempotency-Key": "accuracy"})
    )[0] == 202

    code, said, _ = await measure(client, account, "--json")
    seen = json.loads(said)
    counts = {name: seen[name] for name in ("complete", "incomplete", "lost", "given", "running", "released")}
    assert counts == {"complete": 3, "incomplete": 1, "lost": 1, "given": 1, "running": 0, "released": 0}
    assert (code, seen["charged"], seen["by_usage"], seen["difference"]) == (
        0,
        "0.000051",
        "0.000051",
        "0.00",
    )
    assert seen["charged_incomplete"] != "0.00"
    assert seen["differing"] == []

    code, said, _ = await measure(client, account)
    assert (code, "0.000051 USD" in said) == (0, True)


async def test_accuracy__charge_that_is_not_what_its_usage_comes_to__is_named(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    _, _, headers = await client.chat(key)
    receipt = headers["x-waterfall-receipt-id"]
    table, holds = schema.charges, schema.holds
    usage = json.dumps({"prompt_tokens": 1, "completion_tokens": 1})
    its = table.c.sequence.in_(
        holds.select().with_only_columns(holds.c.sequence).where(holds.c.receipt_id == receipt)
    )
    await client.ledger.write(lambda tx: tx.run(table.update().where(its).values(usage=usage)))
    code, said, complained = await measure(client, account, "--json")
    seen = json.loads(said)
    assert (code, seen["differing"]) == (1, [receipt])
    assert seen["difference"] != "0.00"
    assert "1 charges are not what their usage comes to" in complained
