"""Whom and what calls are for: kept beside them, found by it, told to nobody else."""

import pytest
from service import ADMIN_KEY

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPOSIT = 1_000_000
ADA = {
    "X-Waterfall-User": "ada@example.org",
    "X-Waterfall-Agent": "planner v2",
    "X-Waterfall-Team": "search",
    "X-Waterfall-Session": "s-1",
    "X-Waterfall-Tags": "beta, eval,beta",
}
NOTHING = {"user": None, "agent": None, "team": None, "session": None, "tags": []}


async def found(client, key=ADMIN_KEY, **query):
    status, calls, _ = await client.request("GET", "/api/calls", key=key, params=query)
    assert status == 200, calls
    return [call["id"] for call in calls]


async def test_attribution__of_calls__is_shown_searched_and_not_sent_on(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    ids = []
    for headers in (ADA, ADA | {"X-Waterfall-Tags": "beta"}, {"X-Waterfall-User": "bob"}, {}):
        status, _, answered = await client.chat(key, headers=headers)
        assert status == 200
        ids.append(answered["x-waterfall-receipt-id"])
    ada, beta, bob, nobody = ids
    mine = {"account": account["id"]}
    assert (await client.receipt(ada))["attribution"] == {
        "user": "ada@example.org",
        "agent": "planner v2",
        "team": "search",
        "session": "s-1",
        "tags": ["beta", "eval", "beta"],
    }
    assert (await client.receipt(nobody))["attribution"] == NOTHING
    assert await found(client, **mine, user="ada@example.org") == [beta, ada]
    assert await found(client, **mine, tag="eval") == [ada]
    assert await found(client, **mine, user="bob") == [bob]
    assert await found(client, **mine, user="bob", team="search") == []
    assert await found(client, **mine, agent="planner v2", session="s-1", tag="beta", limit=1) == [beta]
    assert await found(client, key, user="bob") == [bob]
    told = {name.lower() for headers in upstream.headers for name in headers}
    assert not [name for name in told if "waterfall" in name]


async def test_attribution__of_another_account__is_not_found_with_this_ones_key(client):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    _, other = await client.open_account(micro_usd=DEPOSIT)
    assert (await client.chat(key, headers={"X-Waterfall-User": "eve"}))[0] == 200
    assert await found(client, other, user="eve") == []
    assert len(await found(client, account=account["id"], user="eve")) == 1


async def test_attribution__of_a_refused_call__leaves_nothing(client):
    account, key = await client.open_account()
    assert (await client.chat(key, headers=ADA))[0] == 402
    assert await found(client, account=account["id"]) == []


async def test_attribution__of_a_charge_metered_elsewhere__is_kept(client):
    account, _ = await client.open_account(micro_usd=DEPOSIT)
    body = {"account": account["id"], "amount": "0.01", "attribution": {"team": "batch", "tags": ["night"]}}
    status, made, _ = await client.request(
        "POST", "/api/charges", json=body, headers={"Idempotency-Key": "attributed"}
    )
    assert (status, made["attribution"]) == (202, NOTHING | {"team": "batch", "tags": ["night"]})
    assert await found(client, account=account["id"], team="batch", tag="night") == [made["id"]]


async def test_attribution__of_an_erased_account__is_gone(client):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    assert (await client.chat(key, headers={"X-Waterfall-User": "gone"}))[0] == 200
    await client.settled(account["id"])
    assert (await client.request("DELETE", f"/api/accounts/{account['id']}/data"))[0] == 200
    assert await found(client, account=account["id"], user="gone") == []
    (call,) = await client.calls(account)
    assert call["attribution"] == NOTHING


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Waterfall-User": ""},
        {"X-Waterfall-User": "a" * 201},
        {"X-Waterfall-Team": "caf\u00e9"},
        {"X-Waterfall-Tags": "a,,b"},
        {"X-Waterfall-Tags": ",".join("abcdefghijklmnopqrstu")},
        {"X-Waterfall-Tags": "two words"},
    ],
)
async def test_attribution__that_cannot_be_kept__is_refused_by_its_header(client, headers):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    status, body, _ = await client.chat(key, headers=headers)
    (name,) = headers
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "invalid_request", name)
    await client.check_books(account, DEPOSIT, "0.00")
