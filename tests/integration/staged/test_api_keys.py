"""API keys over HTTP: listed without secrets, revoked at once, rotated."""

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPOSIT = 1_000_000


async def its_keys(client, account):
    status, listed, _ = await client.request("GET", f"/api/accounts/{account['id']}/keys")
    assert status == 200
    return listed


async def test_revoke__key__is_refused_from_the_next_call_on(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    (listed,) = await its_keys(client, account)
    assert (listed["name"], listed["revoked_at"], "key" in listed) == ("test", None, False)
    assert (await client.chat(key))[0] == 200

    status, ended, _ = await client.request("DELETE", f"/api/keys/{listed['id']}")
    assert (status, ended["id"]) == (200, listed["id"])
    assert ended["revoked_at"] is not None

    status, body, _ = await client.chat(key)
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert await its_keys(client, account) == [ended]
    assert (await client.request("DELETE", f"/api/keys/{listed['id']}"))[0] == 404
    await client.check_books(account, DEPOSIT, "0.000017")


async def test_rotate__with_grace__both_pay_and_without_it_the_new_one_alone(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    (listed,) = await its_keys(client, account)
    status, second, _ = await client.request(
        "POST", f"/api/keys/{listed['id']}/rotate", json={"grace_seconds": 60}
    )
    assert (status, second["account"], second["name"]) == (201, account["id"], "test")
    assert [(await client.chat(its))[0] for its in (key, second["key"])] == [200, 200]
    _, third, _ = await client.request("POST", f"/api/keys/{second['id']}/rotate", json={})
    assert [(await client.chat(its))[0] for its in (second["key"], third["key"])] == [401, 200]
    assert len(await its_keys(client, account)) == 3


async def test_keys__of_an_account__are_for_the_platform_alone(client):
    account, key = await client.open_account()
    (listed,) = await its_keys(client, account)
    for method, path in (
        ("GET", f"/api/accounts/{account['id']}/keys"),
        ("DELETE", f"/api/keys/{listed['id']}"),
        ("POST", f"/api/keys/{listed['id']}/rotate"),
    ):
        status, body, _ = await client.request(method, path, key=key, json={} if method == "POST" else None)
        assert (status, body["error"]["code"]) == (403, "permission_denied")


async def limited(client, account, **limits):
    """A key of the account with limits of its own."""
    path = f"/api/accounts/{account['id']}/keys"
    status, made, _ = await client.request("POST", path, json={"name": "limited", "limits": limits})
    assert status == 201, made
    return made


async def test_limits__other_models_and_surfaces__are_refused_before_anything_is_held(client, upstream):
    account, _ = await client.open_account(micro_usd=DEPOSIT)
    key = (await limited(client, account, models=["micro"], surfaces=["chat"]))["key"]
    asked = len(upstream.bodies)
    status, body, _ = await client.chat(key, model="another")
    assert (status, body["error"]["code"]) == (403, "not_permitted")
    status, body, _ = await client.chat(key, models=["micro", "another"], model=None)
    assert (status, body["error"]["code"]) == (403, "not_permitted")
    status, body, _ = await client.request(
        "POST", "/v1/embeddings", key=key, json={"model": "micro", "input": "hi"}
    )
    assert (status, body["error"]["code"]) == (403, "not_permitted")
    assert len(upstream.bodies) == asked
    assert (await client.chat(key))[0] == 200
    _, models, _ = await client.request("GET", "/v1/models", key=key)
    assert [model["id"] for model in models["data"]] == ["micro"]


async def test_limits__budget_and_rate__bind_under_the_accounts_policy_and_are_told(client, upstream):
    account, _ = await client.open_account(micro_usd=DEPOSIT)
    made = await limited(client, account, budget="0.001", budget_seconds=86_400)
    assert made["limits"]["budget"] == "0.001"
    assert (await client.chat(made["key"]))[0] == 200
    listed = {key["id"]: key for key in await its_keys(client, account)}
    assert listed[made["id"]]["spent"] == "0.000017"
    status, body, _ = await client.chat(made["key"], max_tokens=100_000)
    error = body["error"]
    assert (status, error["code"], error["scope"]) == (402, "limit_exceeded", "key_budget")
    assert (error["limit"], error["available"], error["window_seconds"]) == ("0.001", "0.000983", 86_400)

    rated = await limited(client, account, calls_per_minute=1)
    assert (await client.chat(rated["key"]))[0] == 200
    status, body, headers = await client.chat(rated["key"])
    assert (status, body["error"]["code"], body["error"]["type"]) == (429, "rate_limited", "rate_limit_error")
    assert 0 < int(headers["retry-after"]) <= 60
    await client.check_books(account, DEPOSIT, "0.000034")


@pytest.mark.parametrize(
    "limits",
    [
        {"budget": "-1"},
        {"budget": 1},
        {"budget_seconds": 60},
        {"budget": "1", "budget_seconds": 59},
        {"models": [""]},
        {"surfaces": ["fax"]},
        {"calls_per_minute": 0},
        {"calls_per_minut": 1},
    ],
)
async def test_limits__that_are_none__are_refused_and_no_key_is_made(client, limits):
    account, _ = await client.open_account()
    path = f"/api/accounts/{account['id']}/keys"
    status, body, _ = await client.request("POST", path, json={"limits": limits})
    assert (status, body["error"]["code"]) == (400, "invalid_request")
    assert len(await its_keys(client, account)) == 1
