"""The OpenAPI document against what the routes answer."""

import io
import re

import pytest
import pytest_asyncio
from service import ADMIN_KEY
from upstream import answers, stalls

from waterfall.gateway.wire import ErrorBody, RefusalBody

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPOSIT = 1_000_000
NOBODY = "0x" + "ab" * 32
CHAT = ("POST", "/v1/chat/completions")
SURFACES = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20},
    ("POST", "/v1/responses"): {"input": "hi", "max_output_tokens": 20},
    ("POST", "/v1/messages"): {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20},
    ("POST", "/v1/embeddings"): {"input": "hi"},
}
OPEN = ("POST", "/api/accounts")
CHARGE = ("POST", "/api/charges")
CALLS = ("GET", "/api/calls")
LOOKS = {"/healthz": "Health", "/readyz": "Readiness"}
COUNT = ("POST", "/v1/messages/count_tokens")
ESTIMATE = ("POST", "/api/estimate")
ROTATE = ("POST", "/api/keys/{key_id}/rotate")
PUBLIC = ("GET", "/api/prices/{price_id}")
ERRORS = {
    **{route: {400, 401, 402, 403, 404, 409, 413, 429, 502, 503, 504} for route in SURFACES},
    COUNT: {400, 401, 403, 404, 413, 502, 504},
    ("GET", "/v1/models"): {401},
    PUBLIC: {400, 404},
    ESTIMATE: {400, 401, 403, 404, 413},
    ("GET", "/healthz"): {503},
    ("GET", "/readyz"): {503},
    ("GET", "/metrics"): {401, 403},
    ("GET", "/api/platform"): {401},
    ("GET", "/api/totals"): {401, 403},
    ("GET", "/api/accounts"): {401, 403},
    OPEN: {400, 401, 403, 409, 413, 503},
    ("GET", "/api/accounts/{account}"): {400, 401, 403, 404},
    ("POST", "/api/accounts/{account}/keys"): {400, 401, 403, 404, 413, 503},
    ("GET", "/api/accounts/{account}/keys"): {400, 401, 403, 404},
    ("DELETE", "/api/keys/{key_id}"): {401, 403, 404, 503},
    ROTATE: {400, 401, 403, 404, 413, 503},
    ("PUT", "/api/accounts/{account}/policy"): {400, 401, 403, 404, 413, 503},
    ("DELETE", "/api/accounts/{account}/data"): {400, 401, 403, 404, 409, 503},
    ("GET", "/api/accounts/{account}/statement"): {400, 401, 403, 404},
    CHARGE: {400, 401, 402, 403, 404, 409, 413, 503},
    ("GET", "/api/receipts/{receipt_id}"): {401, 404},
    CALLS: {400, 401, 403},
}
NOT_PROVOKED = {
    ("GET", "/healthz", 503),  # a halted relayer
    ("GET", "/readyz", 503),  # a stopping gateway
    (*OPEN, 503),  # a broken disk, as the next three
    ("POST", "/api/accounts/{account}/keys", 503),
    ("DELETE", "/api/keys/{key_id}", 503),
    (*ROTATE, 503),
    ("PUT", "/api/accounts/{account}/policy", 503),
    ("DELETE", "/api/accounts/{account}/data", 503),
    ("DELETE", "/api/accounts/{account}/data", 409),  # a call that runs meanwhile: test_upkeep
}


@pytest_asyncio.fixture(loop_scope="module")
async def document(client):
    status, document, _ = await client.request("GET", "/openapi.json", headers={"Authorization": ""})
    assert status == 200
    return document


@pytest.fixture
def operations(document):
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


async def test_openapi__every_route__is_there_with_its_errors(document, operations):
    assert set(operations) == set(ERRORS)
    for route, operation in operations.items():
        assert operation["summary"], route
        told = {status: answer for status, answer in operation["responses"].items() if status[0] != "2"}
        others = set() if route[1] in LOOKS else {"default"}
        assert set(told) == {str(status) for status in ERRORS[route]} | others, route
        for status, answer in told.items():
            schema = answer["content"]["application/json"]["schema"]
            if route in {*SURFACES, COUNT} and status == "default":
                assert schema["required"] == ["error"], "an upstream's own error has any fields"
                continue
            form = "RefusalBody" if status == "402" else "ErrorBody"
            form = LOOKS.get(route[1], form)
            assert schema == {"$ref": f"#/components/schemas/{form}"}, (route, status)
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert document["security"] == [{"key": []}]
    assert {path for (_, path), operation in operations.items() if "security" in operation} == {
        *LOOKS,
        PUBLIC[1],
    }
    fields = document["components"]["schemas"]["ErrorFacts"]["properties"]
    assert set(fields) == {"message", "type", "code", "param"}


async def test_openapi__every_answer__has_a_schema(operations):
    for route, operation in operations.items():
        (good,) = (answer for status, answer in operation["responses"].items() if status[0] == "2")
        assert all(content["schema"] for content in good["content"].values()), route


class Provoked:
    """Errors that a test got out of the routes, each in the form that the document declares."""

    def __init__(self, client, key, bodies):
        self._client, self._keys, self._bodies = client, dict.fromkeys([*SURFACES, COUNT], key), bodies
        self.seen = set()

    async def see(self, status, route, id_=NOBODY, **options):
        method, path = route
        body = {} if method == "GET" or "data" in options else {"json": self._bodies.get(route, {})}
        defaults = {"key": self._keys.get(route, ADMIN_KEY), "headers": {"Idempotency-Key": "once"}, **body}
        url = path.format(account=id_, receipt_id=id_, price_id=id_, key_id=id_)
        seen, answer, _ = await self._client.request(method, url, **defaults | options)
        assert seen == status, (route, answer)
        (RefusalBody if status == 402 else ErrorBody).model_validate(answer)
        self.seen.add((*route, status))


async def see_errors_of_a_call(see, upstream, route, body, poor, poor_key):
    lost = {"Idempotency-Key": f"lost by {route}"}
    await see(403, route, headers={"X-Waterfall-Account": poor["id"]})
    await see(404, route, json=body | {"model": "nothing"})
    upstream.behaviour = answers(b"no JSON")
    await see(502, route, headers=lost)
    if route != COUNT:
        await see(402, route, key=poor_key)
        await see(409, route, headers=lost)
    upstream.behaviour = stalls
    await see(504, route, headers={})


async def test_openapi__every_declared_error__is_one_that_the_route_answers(client, upstream):
    account, key = await client.open_account(micro_usd=DEPOSIT)
    poor, poor_key = await client.open_account()
    charge = {"account": account["id"], "amount": "0.01"}
    calls = {route: {"model": "micro", **fields} for route, fields in SURFACES.items()}
    count = {"model": "micro", "messages": [{"role": "user", "content": "hi"}]}
    asked = {"account": account["id"], "request": calls[CHAT]}
    bodies = {**calls, COUNT: count, ESTIMATE: asked, OPEN: {"label": account["label"]}, CHARGE: charge}
    provoked = Provoked(client, key, bodies)
    see = provoked.see

    for route, statuses in ERRORS.items():
        if 401 in statuses:
            await see(401, route, key="wf_nobody")
        if 403 in statuses and route not in {*SURFACES, COUNT, CALLS}:
            await see(403, route, key=poor_key)
        if 413 in statuses:
            await see(413, route, data=io.BytesIO(b" " * 17 * 2**20))
            await see(400, route, id_=account["id"], data=b"{", headers={"Content-Type": "application/json"})
        elif 400 in statuses and route != CALLS:
            await see(400, route, id_="0x12")
        if 404 in statuses and route not in {*SURFACES, COUNT, ESTIMATE, CHARGE}:
            await see(404, route)
    await see(403, CALLS, params={"account": account["id"]}, key=poor_key)
    await see(400, CALLS, params={"limit": 0})
    await see(409, OPEN)
    await see(402, CHARGE, json=charge | {"account": poor["id"]})
    await see(404, CHARGE, json=charge | {"account": NOBODY})
    assert (await client.request(*CHARGE, json=charge, headers={"Idempotency-Key": "once"}))[0] == 202
    await see(409, CHARGE, json=charge | {"amount": "1"})
    await see(404, ESTIMATE, json=asked | {"request": calls[CHAT] | {"model": "nothing"}})
    for route, body in (calls | {COUNT: count}).items():
        await see_errors_of_a_call(see, upstream, route, body, poor, poor_key)
    limits = {"name": "slow", "limits": {"calls_per_minute": 1}}
    _, slow, _ = await client.request("POST", f"/api/accounts/{account['id']}/keys", json=limits)
    upstream.behaviour = answers(b"no JSON")
    await client.chat(slow["key"])
    for route in calls:
        await see(429, route, key=slow["key"], headers={})
    client.ledger.gate.refuse("settlement has stopped")
    try:
        for route in (*calls, CHARGE):
            await see(503, route, headers={"Idempotency-Key": "another"})
    finally:
        client.ledger.gate.refuse(None)

    declared = {(*route, status) for route, statuses in ERRORS.items() for status in statuses}
    assert provoked.seen == declared - NOT_PROVOKED


async def test_openapi__money_that_is_sent__may_have_no_sign(document):
    amount, _ = document["components"]["schemas"]["NewCharge"]["properties"]["amount"]["anyOf"]
    assert re.fullmatch(amount["pattern"], "12.50")
    assert not re.fullmatch(amount["pattern"], "-12.50")


async def test_openapi__a_charges_key_and_an_answers_money__are_told(client, operations):
    (key,) = operations[CHARGE]["parameters"]
    assert (key["name"], key["in"], key["required"]) == ("Idempotency-Key", "header", True)
    assert key["description"]
    answered = operations[CHAT]["responses"]["200"]
    assert set(answered["content"]) == {"application/json", "text/event-stream"}
    money = {f"X-Waterfall-{name}" for name in ("Receipt-Id", "Hold", "Cost", "Balance")}
    assert set(answered["headers"]) == money
    account, api_key = await client.open_account(micro_usd=DEPOSIT)
    status, _, headers = await client.chat(api_key)
    assert status == 200
    assert money <= {name.title() for name in headers}
    assert (await client.ended(account))["id"] == headers["X-Waterfall-Receipt-Id"]


async def test_openapi__a_refusal__has_every_fact_that_is_told(client, document):
    described = document["components"]["schemas"]["RefusalFacts"]
    own = described["properties"].keys() - {"message", "type", "code", "param"}
    assert all(described["properties"][name]["description"] for name in own)
    account, key = await client.open_account(micro_usd=1)
    _, poor, _ = await client.chat(key)
    policies = [
        {"max_per_charge": "0"},
        {"max_per_window": "0", "window_seconds": 3600},
        {"expires_at": 1},
    ]
    refusals = [poor]
    for policy in policies:
        other, other_key = await client.open_account(micro_usd=DEPOSIT)
        await client.request("PUT", f"/api/accounts/{other['id']}/policy", json=policy)
        status, body, _ = await client.chat(other_key)
        assert status == 402, body
        refusals.append(body)
    seen = set()
    for body in refusals:
        facts = body["error"]
        assert set(described["required"]) <= set(facts) <= set(described["properties"])
        seen |= set(facts)
    assert seen == set(described["properties"])
    codes = [body["error"]["code"] for body in refusals]
    assert codes == ["insufficient_funds", "limit_exceeded", "limit_exceeded", "policy_expired"]
    assert account["deposit_address"] == poor["error"]["deposit_address"]
