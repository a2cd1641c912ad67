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
