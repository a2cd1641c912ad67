"""The platform's own interface: what it shows, to whom, and page by page."""

import asyncio
import json
import re

import pytest
from service import ADMIN_KEY
from upstream import answers, uses

from waterfall.chain.vault import account_id, deposit_address
from waterfall.money import format_usd, parse_usd
from waterfall.receipts import price_id
from waterfall.types import RateCard

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPOSIT = 1_000_000


# ── Accounts and keys ────────────────────────────────────────────────────────────────────────────────


async def test_account__opened__shows_what_the_vault_will_know_it_by(client, net):
    owner = "0x" + "Ab" * 20
    body = {"label": "team é", "owner": owner}

    status, shown, _ = await client.request("POST", "/api/accounts", json=body)

    assert (status, shown["label"], shown["owner"]) == (201, "team é", owner.lower())
    assert shown["id"] == account_id(net.chain.platform, owner.lower(), shown["label_hash"])
    assert shown["deposit_address"] == deposit_address(net.chain.vault, shown["id"])
    assert "team" not in json.dumps({k: v for k, v in shown.items() if k != "label"})
    money = ("balance", "pending", "unsettled", "held", "available")
    assert {shown[name] for name in money} == {"0.00"}
    assert (shown["wanted_policy"], shown["exit"]) == (None, None)
    assert await client.account(shown["id"]) == shown


async def test_accounts__listed__oldest_first_and_in_the_totals(client):
    before = (await client.request("GET", "/api/totals"))[1]
    opened = [(await client.open_account(micro_usd=n * DEPOSIT))[0]["id"] for n in (1, 2)]

    _, listed, _ = await client.request("GET", "/api/accounts")
    _, totals, _ = await client.request("GET", "/api/totals")

    assert [account["id"] for account in listed][-2:] == opened
    assert len({account["id"] for account in listed}) == len(listed)
    assert parse_usd(totals["balance"]) - parse_usd(before["balance"]) == parse_usd("3")
    assert parse_usd(totals["balance"]) == sum(parse_usd(account["balance"]) for account in listed)


async def test_account__first_seen_on_the_chain__gets_its_label_when_it_is_opened(client, net):
    _, probe, _ = await client.request("POST", "/api/accounts", json={"label": "probe"})
    unknown = {"owner": "0x" + "11" * 20, "label_hash": probe["label_hash"]}
    await net.deposit(unknown, DEPOSIT)
    id_ = account_id(net.chain.platform, unknown["owner"], unknown["label_hash"])
    async with asyncio.timeout(10):
        while (await client.request("GET", f"/api/accounts/{id_}"))[0] == 404:
            await asyncio.sleep(0.02)
    assert (await client.account(id_))["label"] is None

    body = {"label": "probe", "owner": unknown["owner"]}
    status, shown, _ = await client.request("POST", "/api/accounts", json=body)

    assert (status, shown["id"], shown["label"], shown["balance"]) == (201, id_, "probe", "1.00")
    status, conflict, _ = await client.request("POST", "/api/accounts", json=body)
    assert (status, conflict["error"]["code"]) == (409, "account_exists")


async def test_key__made__is_shown_once_and_kept_as_a_hash(client):
    account, _ = await client.open_account()
    path = f"/api/accounts/{account['id']}/keys"
    status, made, _ = await client.request("POST", path, json={"name": "laptop", "expires_at": 2**39})

    assert status == 201
    assert (made["name"], made["account"], made["expires_at"]) == ("laptop", account["id"], 2**39)
    assert re.fullmatch(r"wf_[\w-]{43}", made["key"])
    rows = await client.ledger.read(lambda c: str(c.exec_driver_sql("SELECT * FROM api_keys").all()))
    assert made["id"] in rows
    assert made["key"] not in rows
    assert (await client.request("GET", f"/api/accounts/{account['id']}", key=made["key"]))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api/accounts", None),
        ("POST", "/api/accounts", {"label": "mine"}),
        ("GET", "/api/totals", None),
        ("POST", "/api/charges", {"account": "{own}", "amount": "0.01"}),
        ("POST", "/api/accounts/{own}/keys", {}),
        ("PUT", "/api/accounts/{own}/policy", {}),
        ("GET", "/api/accounts/{other}", None),
        ("GET", "/api/accounts/{other}/statement", None),
        ("POST", "/api/accounts/{other}/keys", {}),
        ("PUT", "/api/accounts/{other}/policy", {}),
        ("GET", "/api/calls?account={other}", None),
    ],
)
async def test_account_key__beyond_its_account__is_refused(client, method, path, body):
    own, key = await client.open_account()
    other, _ = await client.open_account()
    names = {"own": own["id"], "other": other["id"]}
    options = {} if body is None else {"json": {k: v.format(**names) for k, v in body.items()}}
    accounts = len((await client.request("GET", "/api/accounts"))[1])

    status, answer, _ = await client.request(
        method, path.format(**names), key=key, headers={"Idempotency-Key": "x"}, **options
    )

    assert (status, answer["error"]["code"]) == (403, "permission_denied")
    assert answer["error"]["type"] == "permission_error"
    assert len((await client.request("GET", "/api/accounts"))[1]) == accounts
    assert await client.account(own["id"]) == own


async def test_account_key__receipt_of_another_account__is_as_if_there_were_none(client):
    _, key = await client.open_account()
    _, other_key = await client.open_account(micro_usd=DEPOSIT)
    _, _, headers = await client.chat(other_key)
    answers_ = [
        await client.request("GET", f"/api/receipts/{receipt}", key=key)
        for receipt in (headers["X-Waterfall-Receipt-Id"], "0" * 32)
    ]
    assert [(status, body["error"]["code"]) for status, body, _ in answers_] == [
        (404, "receipt_not_found")
    ] * 2


async def test_account_key__its_own_account__may_be_read(client):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    _, other_key = await client.open_account(micro_usd=DEPOSIT)
    _, _, headers = await client.chat(key)
    await client.chat(other_key)
    receipt = headers["X-Waterfall-Receipt-Id"]
    await client.settled(account["id"])

    for path in (f"/api/accounts/{account['id']}", f"/api/accounts/{account['id']}/statement"):
        status, shown, _ = await client.request("GET", path, key=key)
        assert (status, shown.get("id", shown.get("account"))) == (200, account["id"])
    assert (await client.request("GET", f"/api/receipts/{receipt}", key=key))[1]["id"] == receipt
    for query in ("", f"?account={account['id']}"):
        _, calls, _ = await client.request("GET", f"/api/calls{query}", key=key)
        assert [call["id"] for call in calls] == [receipt]
    assert (await client.request("GET", "/api/platform", key=key))[0] == 200
    assert (await client.request("GET", "/v1/models", key=key))[0] == 200


# ── Receipts, calls and statements ───────────────────────────────────────────────────────────────────


async def test_receipt__of_a_call_that_runs__says_held(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    upstream.permits = asyncio.Semaphore(0)
    call = asyncio.create_task(client.chat(key))
    await upstream.until("started", 1)

    [held] = await client.calls(account)
    shown = await client.account(account["id"])
    assert (held["status"], held["cost"], held["receipt"], held["reason"]) == ("held", None, None, None)
    assert held["held"] == shown["held"]
    assert parse_usd(shown["available"]) == parse_usd("1") - parse_usd(held["held"])
    assert (await client.request("GET", "/api/totals"))[1]["held"] == held["held"]
    assert (await client.request("GET", "/api/totals"))[1]["calls"]["held"] == 1
    assert [c["id"] for c in await client.calls(account, status="held")] == [held["id"]]

    upstream.permits.release()
    _, _, headers = await call
    assert headers["X-Waterfall-Receipt-Id"] == held["id"]
    assert headers["X-Waterfall-Hold"] == held["held"]
    await client.check_books(account, DEPOSIT, "0.000017")


async def test_receipt__settled__becomes_final_where_the_chain_has_it(client, net):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    _, _, headers = await client.chat(key)
    await client.settled(account["id"])
    settled = await client.receipt(headers["X-Waterfall-Receipt-Id"])
    assert settled["status"] in {"settled", "final"}

    await net.anvil.rpc.call("anvil_mine", "0x4")
    async with asyncio.timeout(10):
        while (final := await client.receipt(settled["id"]))["status"] != "final":
            await asyncio.sleep(0.02)

    mined = await net.anvil.rpc.call("eth_getTransactionReceipt", final["transaction"])
    assert int(mined["blockNumber"], 16) == final["block"] == settled["block"]
    assert final["captured_at"] <= final["settled_at"]


async def test_calls__of_every_kind__are_listed_by_status(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    kinds = {
        "settled": uses({"prompt_tokens": 1, "completion_tokens": 1}),
        "free": uses({"prompt_tokens": 0, "completion_tokens": 0}),
        "lost": answers(b""),
        "released": answers({"error": {"message": "no"}}, status=400),
    }
    made = {}
    for kind, behaviour in kinds.items():
        upstream.behaviour = behaviour
        await client.chat(key)
        made[kind] = (await client.calls(account, limit=1))[0]["id"]
    await client.settled(account["id"])

    newest_first = [call["id"] for call in await client.calls(account)]
    assert newest_first == list(reversed(made.values()))
    for kind, id_ in made.items():
        statuses = ("settled", "final") if kind == "settled" else (kind,)
        assert [c["id"] for s in statuses for c in await client.calls(account, status=s)] == [id_]
    for status in ("held", "queued", "batched", "rejected"):
        assert await client.calls(account, status=status) == []
    totals = (await client.request("GET", "/api/totals"))[1]["calls"]
    assert {"free", "lost", "released"} <= set(totals)
    assert "captured" not in totals
    await client.check_books(account, DEPOSIT, "0.000002")


async def test_calls__page_by_page__each_once(client):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    _, other_key = await client.open_account(micro_usd=DEPOSIT)
    for number in range(7):
        await client.chat(key if number % 3 else other_key)
    everything = [call["id"] for call in await client.calls(account)]
    assert len(everything) == 4

    seen, query = [], {"limit": 3}
    async with asyncio.timeout(10):
        while page := await client.calls(account, **query):
            seen += [call["id"] for call in page]
            query["before"] = page[-1]["charge_id"]
    assert seen == everything


async def test_statement__page_by_page__gapless_lines_with_their_receipts(client):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    receipts = []
    for _ in range(4):
        receipts.append((await client.chat(key))[2]["X-Waterfall-Receipt-Id"])
        await client.settled(account["id"])
    await client.net.deposit(account, 5)
    path = f"/api/accounts/{account['id']}/statement"
    async with asyncio.timeout(10):
        while len((await client.request("GET", path))[1]["lines"]) < 6:
            await asyncio.sleep(0.02)

    lines, after = [], 0
    async with asyncio.timeout(10):
        while page := (await client.request("GET", path, params={"after": after, "limit": 4}))[1]["lines"]:
            lines += page
            after = page[-1]["entry"]

    assert [line["entry"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["event"] for line in lines] == ["Deposited", *["Charged"] * 4, "Deposited"]
    assert [line["receipt_id"] for line in lines] == [None, *receipts, None]
    assert [line["amount"] for line in lines] == ["1.00", *["0.000017"] * 4, "0.000005"]
    blocks = [line["block"] for line in lines]
    assert blocks == sorted(blocks)
    # What the lines say is what the account has.
    signed = {"Deposited": 1, "Charged": -1}
    total = sum(signed[line["event"]] * parse_usd(line["amount"]) for line in lines)
    assert (await client.account(account["id"]))["balance"] == format_usd(total)


async def test_charge__repeated__is_the_same_receipt_before_and_after_it_settled(client, net):
    account, _ = await client.open_account(micro_usd=DEPOSIT)
    body = {"account": account["id"], "amount": "0.5"}
    headers = {"Idempotency-Key": "order 7"}

    _, first, _ = await client.request("POST", "/api/charges", json=body, headers=headers)
    await client.settled(account["id"])
    status, again, _ = await client.request("POST", "/api/charges", json=body, headers=headers)

    assert (status, again["id"], again["cost"]) == (202, first["id"], "0.50")
    assert again["status"] in {"settled", "final"}
    await client.check_books(account, DEPOSIT, "0.5")


async def test_charge__repeated_while_the_chain_is_silent__is_answered_all_the_same(client, monkeypatch):
    account, _ = await client.open_account(micro_usd=DEPOSIT)
    body = {"account": account["id"], "amount": "0.5"}
    headers = {"Idempotency-Key": "order 8"}
    _, first, _ = await client.request("POST", "/api/charges", json=body, headers=headers)
    client.ledger.gate.refuse("settlement has stopped")
    try:
        status, again, _ = await client.request("POST", "/api/charges", json=body, headers=headers)
        assert (status, again["id"]) == (202, first["id"])
        changed = body | {"amount": "0.6"}
        status, conflict, _ = await client.request("POST", "/api/charges", json=changed, headers=headers)
        assert (status, conflict["error"]["code"]) == (409, "idempotency_conflict")
        headers = {"Idempotency-Key": "order 9"}
        assert (await client.request("POST", "/api/charges", json=body, headers=headers))[0] == 503
    finally:
        client.ledger.gate.refuse(None)


async def test_charge__beyond_the_balance__tells_where_to_send_money(client):
    account, _ = await client.open_account()
    body = {"account": account["id"], "amount": "0.5"}
    headers = {"Idempotency-Key": "order 10"}
    status, refusal, _ = await client.request("POST", "/api/charges", json=body, headers=headers)
    assert (status, refusal["error"]["deposit_address"]) == (402, account["deposit_address"])


async def test_charge__of_an_amount__is_complete(client):
    account, _ = await client.open_account(micro_usd=DEPOSIT)
    before = (await client.request("GET", "/api/totals"))[1]
    body = {"account": account["id"], "amount": "0.5"}
    headers = {"Idempotency-Key": "order 11"}
    _, charge, _ = await client.request("POST", "/api/charges", json=body, headers=headers)
    assert charge["receipt"]["receipt"]["complete"] is True
    assert (await client.request("GET", "/api/totals"))[1]["incomplete"] == before["incomplete"]


# ── The rest ─────────────────────────────────────────────────────────────────────────────────────────


async def test_platform__shown__is_the_one_on_the_chain(client, net):
    _, shown, _ = await client.request("GET", "/api/platform")
    assert (shown["platform"], shown["vault"]) == (str(net.chain.platform), net.chain.vault)
    assert shown["chain_id"] == net.chain.chain_id
    meter = await net.vault.meter(net.chain.platform, shown["meter"])
    assert meter.added_at > 0
    assert shown["head"] >= net.chain.deployed_block


async def test_models__listed__are_those_with_a_price_and_its_hash(client):
    _, key = await client.open_account(micro_usd=DEPOSIT)
    _, listed, _ = await client.request("GET", "/v1/models", key=key)

    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["micro", "gpt-4o-mini"]
    assert {model["object"] for model in listed["data"]} == {"model"}
    _, _, headers = await client.chat(key)
    receipt = (await client.receipt(headers["X-Waterfall-Receipt-Id"]))["receipt"]
    card = RateCard.model_validate(receipt["rate_card"])
    assert receipt["receipt"]["price_id"] == price_id(card) == listed["data"][0]["price_id"]


async def test_health__nothing_wrong__needs_no_key(client):
    status, body, _ = await client.request("GET", "/healthz", headers={"Authorization": ""})
    assert (status, body["status"], body["halted"]) == (200, "ok", {})


async def test_key__of_the_platform__is_never_in_an_answer(client):
    for path in ("/api/platform", "/api/totals", "/api/accounts", "/api/calls", "/openapi.json", "/healthz"):
        _, body, headers = await client.request("GET", path)
        assert ADMIN_KEY not in json.dumps(body) + str(headers)
