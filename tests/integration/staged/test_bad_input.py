"""Requests that are wrong: a typed error in OpenAI's format, nothing held, nothing charged, no upstream called."""

import asyncio
import io
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import pytest
import pytest_asyncio
from multidict import CIMultiDict
from service import ADMIN_KEY, Client
from upstream import ScriptedUpstream

from waterfall.money import parse_usd

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
UNKNOWN = "0x" + "ab" * 32


def short(value: object) -> str:
    return ascii(value)[:40]


@dataclass
class Wallet:
    """A funded account that no bad request may touch, and a key of it."""

    client: Client
    upstream: ScriptedUpstream
    account: dict
    key: str
    before: list = field(default_factory=list)

    async def refuses(
        self, method: str, path: str, status: int, code: str, param: str | None = None, **options: object
    ) -> dict:
        """Send a bad request; the error, once everything else is seen to be as it was."""
        seen, body, headers = await self.client.request(method, path, **{"key": self.key} | options)
        assert (seen, body["error"]["code"]) == (status, code), body
        assert set(body) == {"error"}
        assert headers.get("x-should-retry") == ("false" if status == 501 else None)
        error = body["error"]
        assert error["message"]
        assert len(error["message"]) < 1000
        assert not re.search(r"\{[a-z_]+\}", error["message"]), "a template that was not filled in"
        assert error["type"]
        assert error["param"] == param
        await self.check_untouched()
        return error

    async def look(self) -> list:
        return [
            await self.client.settled(self.account["id"]),
            [call["id"] for call in await self.client.calls(self.account)],
            (await self.client.request("GET", "/api/totals"))[1]["held"],
            self.upstream.counts["started"],
        ]

    async def check_untouched(self) -> None:
        assert await self.look() == self.before

    async def refuses_chat(self, status: int, code: str, param: str | None, **fields: object) -> dict:
        body = {"model": "micro", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20} | fields
        sent = {name: value for name, value in body.items() if value is not ...}
        return await self.refuses("POST", CHAT, status, code, param, json=sent)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def funded(stage) -> AsyncIterator[Wallet]:
    account, key = await stage.client.open_account(micro_usd=100_000_000)
    return Wallet(stage.client, stage.upstream, await stage.client.account(account["id"]), key)


@pytest_asyncio.fixture(loop_scope="module")
async def wallet(funded) -> Wallet:
    funded.upstream.reset()
    funded.before = await funded.look()
    return funded


# ── Bodies ───────────────────────────────────────────────────────────────────────────────────────────

BODIES = {
    "nothing": b"",
    "cut": b'{"model": "micro", "messages": [',
    "two values": b"{}{}",
    "a comment": b"// hi",
    "a list": b"[]",
    "a string": b'"micro"',
    "null": b"null",
    "a number": b"7",
    "not utf-8": b'{"model": "\xff\xfe"}',
    "utf-16": '{"model": "micro"}'.encode("utf-16"),
    "half a surrogate": rb'{"model": "\ud800"}',
    "byte order mark": b'\xef\xbb\xbf{"model": "micro"}',
    "nan": b'{"model": NaN}',
    "infinite": b'{"model": "micro", "temperature": 1e999}',
    "nul": b"\x00",
    "form": b"model=micro",
    "nested beyond reading": b"[" * 100_000,
    "nested beyond writing": b'{"model": "micro", "messages": [{"role": "user", "content": "hi"}], "x": %s}'
    % (b"[" * 300 + b"]" * 300),
    "tools nested beyond writing": b'{"model": "micro", "messages": [{"role": "user"}], "tools": %s}'
    % (b"[" * 300 + b"]" * 300),
}


@pytest.mark.parametrize("case", BODIES)
async def test_chat__body_cannot_be_read__is_refused(wallet, case):
    await wallet.refuses("POST", CHAT, 400, "invalid_request", data=BODIES[case])


@pytest.mark.parametrize("case", [name for name in BODIES if name not in {"byte order mark", "infinite"}])
async def test_api__body_cannot_be_read__is_refused(wallet, case):
    raw = BODIES[case].replace(b'"model"', b'"label"')
    headers = {"Content-Type": "application/json"}
    seen, body, _ = await wallet.client.request("POST", "/api/accounts", data=raw, headers=headers)
    assert (seen, body["error"]["code"]) == (400, "invalid_request")
    await wallet.check_untouched()


@pytest.mark.parametrize("case", ["cut", "not utf-8", "form", "nested beyond reading"])
async def test_api__body_is_not_json__is_told_in_our_words(wallet, case):
    options = {"key": ADMIN_KEY, "headers": {"Content-Type": "application/json"}, "data": BODIES[case]}
    error = await wallet.refuses("POST", "/api/accounts", 400, "invalid_request", **options)
    assert error["message"] == "The body is not JSON."


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
@pytest.mark.parametrize("path", [CHAT, "/api/charges", "/v1/nothing"])
async def test_body__of_50_megabytes__is_refused_and_the_connection_lives_on(wallet, path, chunked):
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b" " * 2**20

    data = pieces() if chunked else io.BytesIO(b" " * 50 * 2**20)
    await wallet.refuses("POST", path, 413, "body_too_large", data=data, key=ADMIN_KEY)
    assert (await wallet.client.request("GET", "/healthz"))[0] == 200


async def test_body__just_within_the_limit__is_accepted(stage):
    account, key = await stage.client.open_account(micro_usd=100_000_000)
    stage.upstream.reset()
    body = {"model": "micro", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    raw = json.dumps(body).encode().ljust(16 * 2**20)

    status, answer, _ = await stage.client.request("POST", CHAT, key=key, data=io.BytesIO(raw))
    assert status == 200, answer
    status, answer, _ = await stage.client.request("POST", CHAT, key=key, data=io.BytesIO(raw + b" "))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    await stage.client.check_books(account, 100_000_000, "0.000017")


async def test_body__client_leaves_in_the_middle__nothing_happens(wallet):
    url = aiohttp.client.URL(wallet.client.url)
    _, writer = await asyncio.open_connection(url.host, url.port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {wallet.key}\r\nContent-Length: 500\r\n\r\n"
    writer.write(head.encode() + b'{"model": "micro", ')
    await writer.drain()
    writer.close()
    await writer.wait_closed()

    await wallet.check_untouched()


# ── Who asks ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "shown",
    [
        "",
        "wf_admin",
        "Basic d2ZfYWRtaW46",
        "Bearer",
        "Bearer ",
        "Bearer wf_nobody",
        "Bearer wf_admin x",
        "Token wf_admin",
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/api/totals")])
async def test_key__absent_or_wrong__is_refused(wallet, shown, method, path):
    json_ = {"model": "micro", "messages": [{"role": "user", "content": "hi"}]} if method == "POST" else None
    await wallet.refuses(method, path, 401, "invalid_api_key", headers={"Authorization": shown}, json=json_)


async def test_key__in_other_cases_and_spaces__is_found(wallet):
    for shown in (f"bearer {wallet.key}", f"BEARER   {wallet.key}  "):
        status, _, _ = await wallet.client.request("GET", "/v1/models", headers={"Authorization": shown})
        assert status == 200


async def test_key__shown_twice__the_first_counts_on_every_route(stage):
    _, key = await stage.client.open_account(micro_usd=1_000_000)
    body = {"model": "micro", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
    for shown, statuses in (((key, "wf_nobody"), (200, 200)), (("wf_nobody", key), (401, 401))):
        headers = CIMultiDict([("Authorization", f"Bearer {one}") for one in shown])
        async with (
            stage.client.session.post(stage.client.url + CHAT, headers=headers, json=body) as called,
            stage.client.session.get(stage.client.url + "/v1/models", headers=headers) as listed,
        ):
            assert (called.status, listed.status) == statuses


async def test_key__expired__is_refused(wallet):
    path = f"/api/accounts/{wallet.account['id']}/keys"
    expired = {"name": "old", "expires_at": int(time.time()) - 1}
    _, made, _ = await wallet.client.request("POST", path, json=expired)

    for method, route in (("POST", CHAT), ("GET", f"/api/accounts/{wallet.account['id']}")):
        error = await wallet.refuses(method, route, 401, "api_key_expired", key=made["key"])
        assert error["expired_at"].endswith("+00:00")


async def test_account__named_by_another_accounts_key__is_refused(wallet):
    other, _ = await wallet.client.open_account()
    named = {"X-Waterfall-Account": other["id"]}
    await wallet.refuses("POST", CHAT, 403, "permission_denied", headers=named, json={})


async def test_account__not_named_by_the_platforms_key__is_refused(wallet):
    error = await wallet.refuses("POST", CHAT, 400, "invalid_request", key=ADMIN_KEY, json={})
    assert "X-Waterfall-Account" in error["message"]


@pytest.mark.parametrize("named", [UNKNOWN, "ada", "", "0x12", "é", "x" * 60_000], ids=short)
async def test_account__named_that_is_not_there__is_refused(wallet, named):
    body = {"model": "micro", "messages": [{"role": "user", "content": "hi"}]}
    headers = {"X-Waterfall-Account": named}
    await wallet.refuses("POST", CHAT, 404, "account_not_found", key=ADMIN_KEY, headers=headers, json=body)


async def test_account__named_by_the_platform_or_by_its_own_key__pays(stage):
    account, key = await stage.client.open_account(micro_usd=1_000_000)
    for shown, named in ((ADMIN_KEY, account["id"]), (key, account["id"].upper().replace("0X", "0x"))):
        status, body, _ = await stage.client.chat(shown, headers={"X-Waterfall-Account": named})
        assert status == 200, body
    await stage.client.check_books(account, 1_000_000, "0.000034")


# ── What is asked ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", [..., None, "", 7, True, [], {}, ["micro"]], ids=short)
async def test_model__is_no_name__is_refused(wallet, model):
    await wallet.refuses_chat(400, "invalid_request", "model", model=model)


@pytest.mark.parametrize(
    "model", ["nothing", "MICRO", "micro ", "x" * 10_000, "{0}", "é", "../micro"], ids=short
)
async def test_model__unknown__is_refused(wallet, model):
    error = await wallet.refuses_chat(404, "model_not_found", None, model=model)
    assert error["model"] == model[:100]


async def test_model__unpriced__is_refused(wallet):
    """Peers serve what they have no price for at no price (LiteLLM #30715)."""
    await wallet.refuses_chat(400, "model_not_priced", None, model="unpriced")


@pytest.mark.parametrize("messages", [..., None, [], {}, "hi", 7, True], ids=short)
async def test_messages__are_no_list__is_refused(wallet, messages):
    await wallet.refuses_chat(400, "invalid_request", "messages", messages=messages)


@pytest.mark.parametrize("message", [None, 7, "hi", [], True], ids=short)
async def test_message__is_no_object__is_refused(wallet, message):
    messages = [{"role": "user", "content": "hi"}, message]
    await wallet.refuses_chat(400, "invalid_request", "messages[1]", messages=messages)


CONTENTS = {
    "number": 7,
    "boolean": True,
    "object": {"type": "text", "text": "hi"},
    "image": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
    "audio": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}],
    "file": [{"type": "file", "file": {"file_id": "file-1"}}],
    "video": [{"type": "video_url", "video_url": {"url": "x"}}],
    "no type": [{"text": "hi"}],
    "type null": [{"type": None}],
    "type a list": [{"type": ["text"]}],
    "type an object": [{"type": {}}],
    "a string": ["hi"],
    "null part": [None],
    "a list": [[]],
}


@pytest.mark.parametrize("case", CONTENTS)
async def test_content__that_is_not_priced__is_refused(wallet, case):
    messages = [{"role": "user", "content": CONTENTS[case]}]
    await wallet.refuses_chat(400, "invalid_request", "messages[0].content", messages=messages)


async def test_message__that_refers_to_stored_audio__is_refused(wallet):
    messages = [{"role": "assistant", "audio": {"id": "audio_1"}}]
    await wallet.refuses_chat(400, "invalid_request", "messages[0].audio", messages=messages)


@pytest.mark.parametrize(
    "content",
    [None, "", "hi", [], [{"type": "text", "text": "hi"}, {"type": "refusal", "refusal": "no"}]],
    ids=short,
)
async def test_content__of_text__is_passed_on(stage, content):
    account, key = await stage.client.open_account(micro_usd=1_000_000)
    stage.upstream.reset()
    messages = [{"role": "user", "content": content}]
    assert (await stage.client.chat(key, messages=messages))[0] == 200
    assert stage.upstream.bodies[0]["messages"] == messages
    await stage.client.check_books(account, 1_000_000, "0.000017")


NO_COUNTS = [-1, 0, 10**30, "5", "", 5.0, 5.5, -0.0, True, False, [], [5], {}]


@pytest.mark.parametrize("value", [*NO_COUNTS, 10_000_001], ids=short)
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_limit__is_no_count__is_refused(wallet, name, value):
    await wallet.refuses_chat(400, "invalid_request", name, **{name: value})


@pytest.mark.parametrize("value", [*NO_COUNTS, 129], ids=short)
async def test_n__is_no_count__is_refused(wallet, value):
    await wallet.refuses_chat(400, "invalid_request", "n", n=value)


async def test_limit__absurd__is_more_than_the_wallet_has(wallet):
    error = await wallet.refuses_chat(402, "insufficient_funds", None, max_tokens=10_000_000, n=128)
    assert float(error["required"]) > float(error["available"])
    assert error["deposit_address"] == wallet.account["deposit_address"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_predict", 5),
        ("num_predict", 5),
        ("max_new_tokens", 5),
        ("min_tokens", 5),
        ("best_of", 2),
        ("n_cmpl", 4),
        ("use_beam_search", True),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("plugins", [{"id": "web"}]),
        ("chat_template", "{% for i in range(10**9) %}x{% endfor %}"),
        ("n_predict", 0),
        ("audio", False),
    ],
)
async def test_field__that_breaks_the_bound__is_refused(wallet, name, value):
    error = await wallet.refuses_chat(400, "invalid_request", name, **{name: value})
    assert name in error["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("service_tier", "priority"),
        ("service_tier", 7),
        ("service_tier", []),
        ("service_tier", {}),
        ("modalities", ["text", "audio"]),
        ("modalities", "text"),
        ("modalities", 7),
        ("modalities", [[]]),
        ("modalities", [{}]),
        ("modalities", {"text": 1}),
        ("stream", "true"),
        ("stream", 1),
        ("stream", []),
        ("stream_options", 7),
        ("stream_options", []),
        ("stream_options", "include_usage"),
        ("tools", {}),
        ("tools", 7),
        ("tools", "none"),
        ("tools", [{"type": "web_search"}]),
        ("tools", [{"type": "function", "function": {"name": "f"}}, {"type": "code_interpreter"}]),
        ("tools", [{"type": []}]),
        ("tools", [{"function": {"name": "f"}}]),
    ],
)
async def test_field__of_the_wrong_kind__is_refused(wallet, name, value):
    await wallet.refuses_chat(400, "invalid_request", name, **{name: value})


async def test_include_usage__is_no_boolean__is_refused(wallet):
    await wallet.refuses_chat(
        400, "invalid_request", "include_usage", stream=True, stream_options={"include_usage": "yes"}
    )


async def test_fields__that_cost_nothing__are_passed_on_untouched(stage):
    account, key = await stage.client.open_account(micro_usd=1_000_000)
    stage.upstream.reset()
    fields = {
        "temperature": 0.2,
        "stop": ["x"],
        "logit_bias": {"50256": -100},
        "response_format": {"type": "json_object"},
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {}}},
            {"type": "custom", "custom": {"name": "g"}},
        ],
        "service_tier": "flex",
        "modalities": ["text"],
        "metadata": {"é": "\u2028"},
        "unheard_of": {"a": [1, 2.5, None]},
        "n_predict": None,
        "audio": None,
    }

    assert (await stage.client.chat(key, **fields))[0] == 200

    sent = stage.upstream.bodies[0]
    assert {name: sent[name] for name in fields} == fields
    assert (sent["model"], sent["max_tokens"]) == ("micro", 20)
    await stage.client.check_books(account, 1_000_000, "0.000017")


async def test_tools__thousands__are_held_for_and_passed_on(stage):
    account, key = await stage.client.open_account(micro_usd=10_000_000)
    stage.upstream.reset()
    tools = [
        {"type": "function", "function": {"name": f"tool_{number}", "parameters": {"type": "object"}}}
        for number in range(5000)
    ]
    status, _, headers = await stage.client.chat(key, tools=tools)
    assert (status, stage.upstream.bodies[0]["tools"]) == (200, tools)
    assert parse_usd(headers["X-Waterfall-Hold"]) > 5000 * parse_usd("0.00003")
    await stage.client.check_books(account, 10_000_000, "0.000017")


async def test_fields__numbers_beyond_64_bits__are_passed_on_as_their_nearest_double(stage):
    """What JSON's numbers are to most readers: https://datatracker.ietf.org/doc/html/rfc8259#section-6."""
    account, key = await stage.client.open_account(micro_usd=1_000_000)
    stage.upstream.reset()
    numbers = {"seed": 2**70, "least": -(2**63) - 1, "most": 2**64 - 1}
    assert (await stage.client.chat(key, **numbers))[0] == 200
    sent = stage.upstream.bodies[0]
    assert {name: sent[name] for name in numbers} == {
        "seed": float(2**70),
        "least": float(-(2**63)),
        "most": 2**64 - 1,
    }
    await stage.client.check_books(account, 1_000_000, "0.000017")


async def test_limits__both_given__the_smaller_is_sent_once(stage):
    account, key = await stage.client.open_account(micro_usd=1_000_000)
    stage.upstream.reset()

    status, _, headers = await stage.client.chat(key, max_tokens=50, max_completion_tokens=7)

    assert status == 200
    assert stage.upstream.bodies[0]["max_tokens"] == 7
    assert "max_completion_tokens" not in stage.upstream.bodies[0]
    await stage.client.check_books(account, 1_000_000, headers["X-Waterfall-Cost"])


async def test_field__given_twice__the_last_one_counts_for_bound_and_upstream(stage):
    account, key = await stage.client.open_account(micro_usd=1_000_000)
    stage.upstream.reset()
    raw = b'{"model": "micro", "messages": [{"role": "user"}], "max_tokens": 1000000, "max_tokens": 3}'

    status, _, _ = await stage.client.request("POST", CHAT, key=key, data=raw)

    assert (status, stage.upstream.bodies[0]["max_tokens"]) == (200, 3)
    await stage.client.check_books(account, 1_000_000, "0.000017")


# ── Routes ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "/v1/completions",
        "/v1/embeddings/1",
        "/v1/responses/resp_1",
        "/v1/messages/batches",
        "/v1/files",
        "/v1/models/micro",
        "/v1/chat/completions/",
        "/v1/chat/completions/chatcmpl-1",
        "/v1/chat/completions%2F",
        "//v1/chat/completions",
        "/V1/chat/completions",
        "/v1/%ff%00",
        "/api",
        "/api/nothing",
        "/api/accounts/",
        "/api/charges/1",
        "/" + "x" * 5000,
    ],
    ids=short,
)
async def test_route__unknown__is_refused(wallet, method, path):
    """Peers let a route skip metering (bifrost #2873)."""
    url = aiohttp.client.URL(wallet.client.url + path, encoded=True)
    body = {} if method == "POST" else None
    async with wallet.client.session.request(method, url, json=body, allow_redirects=False) as response:
        answer = await response.json()
        assert (response.status, answer["error"]["code"]) == (501, "unsupported_route")
        assert response.headers["x-should-retry"] == "false"
        assert len(answer["error"]["message"]) < 300
    await wallet.check_untouched()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", CHAT),
        ("PUT", CHAT),
        ("PATCH", CHAT),
        ("DELETE", CHAT),
        ("OPTIONS", CHAT),
        ("POST", "/v1/models"),
        ("POST", "/healthz"),
        ("DELETE", "/api/accounts"),
        ("PUT", "/api/charges"),
        ("GET", "/api/charges"),
        ("POST", "/api/totals"),
        ("DELETE", "/api/receipts/1"),
        ("POST", f"/api/accounts/{UNKNOWN}/policy"),
    ],
)
async def test_method__wrong__is_refused(wallet, method, path):
    await wallet.refuses(method, path, 501, "unsupported_route", key=ADMIN_KEY)


# ── /api ─────────────────────────────────────────────────────────────────────────────────────────────

NO_MONEY = {
    "number": 1,
    "fraction": 0.1,
    "boolean": True,
    "13 decimals": "0.0000000000001",
    "exponent": "1e3",
    "plus": "+1",
    "spaces": " 1 ",
    "comma": "1,5",
    "words": "one",
    "empty": "",
    "no digits": ".5",
    "other digits": "\u0661",
    "nan": "NaN",
    "infinite": "Infinity",
    "hex": "0x10",
    "negative": "-1",
    "beyond the vault": "79228162514264337593543950336",
    "endless": "9" * 5000,
    "list": ["1"],
}


@pytest.mark.parametrize("case", NO_MONEY)
async def test_charge__amount_is_no_money__is_refused(wallet, case):
    body = {"account": wallet.account["id"], "amount": NO_MONEY[case]}
    headers = {"Idempotency-Key": case}
    await wallet.refuses(
        "POST", "/api/charges", 400, "invalid_request", "amount", key=ADMIN_KEY, headers=headers, json=body
    )


@pytest.mark.parametrize("name", ["max_per_charge", "max_per_window"])
@pytest.mark.parametrize("case", NO_MONEY)
async def test_policy__limit_is_no_money__is_refused(wallet, case, name):
    path = f"/api/accounts/{wallet.account['id']}/policy"
    body = {"max_per_window": "1", "window_seconds": 60} | {name: NO_MONEY[case]}
    seen, answer, _ = await wallet.client.request("PUT", path, json=body)
    assert (seen, answer["error"]["code"]) == (400, "invalid_request")
    assert name in answer["error"]["message"]
    await wallet.check_untouched()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_per_window": "1"}, "window_seconds"),
        ({"window_seconds": 60}, "window_seconds"),
        ({"max_per_window": "1", "window_seconds": 59}, "window_seconds"),
        ({"max_per_window": "1", "window_seconds": 2**32}, "window_seconds"),
        ({"max_per_window": "1", "window_seconds": "soon"}, "window_seconds"),
        ({"max_per_window": "1", "window_seconds": 60.5}, "window_seconds"),
        ({"max_per_window": "1", "window_seconds": "60"}, "window_seconds"),
        ({"expires_at": -1}, "expires_at"),
        ({"expires_at": 2**40}, "expires_at"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"expires_at": True}, "expires_at"),
        ({"expires_at": "5"}, "expires_at"),
        ({"expires_at": 1.0}, "expires_at"),
        ({"max_per_day": "1"}, "max_per_day"),
        ([], None),
        (None, None),
    ],
    ids=short,
)
async def test_policy__makes_no_sense__is_refused_by_the_name_of_its_field(wallet, body, param):
    path = f"/api/accounts/{wallet.account['id']}/policy"
    seen, answer, _ = await wallet.client.request("PUT", path, json=body)
    assert (seen, answer["error"]["code"], answer["error"]["param"]) == (400, "invalid_request", param)
    assert "Value error" not in answer["error"]["message"]
    await wallet.check_untouched()


@pytest.mark.parametrize("value", ["-1", "1208925819614.629174706176"])
@pytest.mark.parametrize("name", ["max_per_charge", "max_per_window"])
async def test_policy__limit_beyond_the_vault__is_told_in_usd(wallet, name, value):
    path = f"/api/accounts/{wallet.account['id']}/policy"
    body = {"max_per_window": "1", "window_seconds": 60} | {name: value}
    error = await wallet.refuses("PUT", path, 400, "invalid_request", name, key=ADMIN_KEY, json=body)
    assert error["message"] == f"{name}: must be from 0.00 to 1208925819614.629174706175 USD."


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "label"),
        ({"label": None}, "label"),
        ({"label": ""}, "label"),
        ({"label": 7}, "label"),
        ({"label": "a\0"}, "label"),
        ({"label": ["a"]}, "label"),
        ({"label": "x" * 201}, "label"),
        ({"label": "a", "owner": "0x12"}, "owner"),
        ({"label": "a", "owner": "ab" * 20}, "owner"),
        ({"label": "a", "owner": "0x" + "zz" * 20}, "owner"),
        ({"label": "a", "owner": 7}, "owner"),
        ({"label": "a", "owner": None}, "owner"),
        ({"label": "a", "balance": "5"}, "balance"),
        ([], None),
        ("ada", None),
    ],
    ids=short,
)
async def test_account__makes_no_sense__is_refused(wallet, body, param):
    await wallet.refuses("POST", "/api/accounts", 400, "invalid_request", param, key=ADMIN_KEY, json=body)


async def test_account__with_half_a_surrogate__is_refused(wallet):
    headers = {"Content-Type": "application/json"}
    await wallet.refuses(
        "POST",
        "/api/accounts",
        400,
        "invalid_request",
        "label",
        key=ADMIN_KEY,
        headers=headers,
        data=rb'{"label": "\ud800"}',
    )


async def test_account__twice__is_a_conflict(wallet):
    error = await wallet.refuses(
        "POST", "/api/accounts", 409, "account_exists", key=ADMIN_KEY, json={"label": wallet.account["label"]}
    )
    assert error["account"] == wallet.account["id"]


@pytest.mark.parametrize(
    "label", ["x" * 200, "é\u2028\x01", " ", "{0}", "'; DROP TABLE wallets; --"], ids=short
)
async def test_account__with_an_odd_label__keeps_it(wallet, label):
    seen, shown, _ = await wallet.client.request("POST", "/api/accounts", json={"label": label})
    assert (seen, shown["label"]) == (201, label)
    assert (await wallet.client.account(shown["id"]))["label"] == label


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "x" * 101}, "name"),
        ({"name": None}, "name"),
        ({"expires_at": -1}, "expires_at"),
        ({"expires_at": 2**40}, "expires_at"),
        ({"expires_at": "never"}, "expires_at"),
        ({"expires_at": True}, "expires_at"),
        ({"expires_at": "5"}, "expires_at"),
        ({"expires_at": 1.0}, "expires_at"),
        ({"account": UNKNOWN}, "account"),
    ],
    ids=short,
)
async def test_key__makes_no_sense__is_refused(wallet, body, param):
    path = f"/api/accounts/{wallet.account['id']}/keys"
    await wallet.refuses("POST", path, 400, "invalid_request", param, key=ADMIN_KEY, json=body)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/accounts/{}"),
        ("POST", "/api/accounts/{}/keys"),
        ("PUT", "/api/accounts/{}/policy"),
        ("GET", "/api/accounts/{}/statement"),
    ],
)
async def test_account__in_a_path_that_is_not_there__is_refused(wallet, method, path):
    options = {"key": ADMIN_KEY} | ({"json": {}} if method != "GET" else {})
    await wallet.refuses(method, path.format(UNKNOWN), 404, "account_not_found", **options)
    for malformed in ("0x12", UNKNOWN.upper(), UNKNOWN + "0", "ada", "%00", UNKNOWN[2:]):
        await wallet.refuses(method, path.format(malformed), 400, "invalid_request", "account", **options)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/api/accounts/{}/statement?after=-1", "after"),
        ("/api/accounts/{}/statement?after=x", "after"),
        ("/api/accounts/{}/statement?after=1099511627776", "after"),
        ("/api/accounts/{}/statement?limit=0", "limit"),
        ("/api/accounts/{}/statement?limit=1001", "limit"),
        ("/api/calls?limit=0", "limit"),
        ("/api/calls?limit=1001", "limit"),
        ("/api/calls?limit=many", "limit"),
        ("/api/calls?before=-1", "before"),
        ("/api/calls?before=x", "before"),
        ("/api/calls?before=18446744073709551616", "before"),
        ("/api/calls?before=1e5", "before"),
        ("/api/calls?status=nothing", "status"),
        ("/api/calls?status=", "status"),
        ("/api/calls?account=ada", "account"),
    ],
)
async def test_query__makes_no_sense__is_refused(wallet, path, param):
    await wallet.refuses(
        "GET", path.format(wallet.account["id"]), 400, "invalid_request", param, key=ADMIN_KEY
    )


@pytest.mark.parametrize("id_", ["nothing", "0" * 32, "%00", "é", "' OR 1=1 --", "x" * 5000], ids=short)
async def test_receipt__that_is_not_there__is_refused(wallet, id_):
    await wallet.refuses("GET", f"/api/receipts/{id_}", 404, "receipt_not_found", key=ADMIN_KEY)


CHARGES = {
    "nothing": ({}, "account"),
    "account malformed": ({"account": "ada", "amount": "1"}, "account"),
    "neither": ({}, None),
    "both": ({"amount": "1", "model": "micro", "usage": {}}, None),
    "usage alone": ({"usage": {}}, None),
    "zero": ({"amount": "0"}, "amount"),
    "more than the vault has": ({"amount": "79228162514264337.593543950336"}, "amount"),
    "usage a list": ({"model": "micro", "usage": []}, "usage"),
    "usage empty": ({"model": "micro", "usage": {}}, "usage"),
    "usage half": ({"model": "micro", "usage": {"prompt_tokens": 1}}, "usage"),
    "usage negative": ({"model": "micro", "usage": {"prompt_tokens": -1, "completion_tokens": 1}}, "usage"),
    "usage more cached than sent": (
        {
            "model": "micro",
            "usage": {
                "prompt_tokens": 1,
                "completion_tokens": 1,
                "prompt_tokens_details": {"cached_tokens": 2},
            },
        },
        "usage",
    ),
    "usage free": ({"model": "micro", "usage": {"prompt_tokens": 0, "completion_tokens": 0}}, "usage"),
    "model empty": ({"model": "", "amount": "1"}, "model"),
    "model long": ({"model": "x" * 201, "amount": "1"}, "model"),
    "field unknown": ({"amount": "1", "currency": "EUR"}, "currency"),
}


@pytest.mark.parametrize("case", CHARGES)
async def test_charge__makes_no_sense__is_refused(wallet, case):
    fields, param = CHARGES[case]
    body = fields if case == "nothing" else {"account": wallet.account["id"]} | fields
    headers = {"Idempotency-Key": case}
    error = await wallet.refuses(
        "POST", "/api/charges", 400, "invalid_request", param, key=ADMIN_KEY, headers=headers, json=body
    )
    assert re.search(r"[^.]\.$", error["message"])
    assert "Value error" not in error["message"]


@pytest.mark.parametrize(
    "more",
    [b"NaN", b"-Infinity", b"1" + b"0" * 400, rb'"\ud800"', b"[" * 40 + b"]" * 40, b"[" * 900 + b"]" * 900],
    ids=["nan", "infinite", "huge", "half a surrogate", "nested", "nested deeper"],
)
async def test_charge__usage_that_no_receipt_can_carry__is_refused(wallet, more):
    raw = (
        b'{"account": "%s", "model": "micro", "usage": {"prompt_tokens": 1, "completion_tokens": 1, "x": %s}}'
        % (wallet.account["id"].encode(), more)
    )
    headers = {"Idempotency-Key": "x", "Content-Type": "application/json"}
    await wallet.refuses(
        "POST", "/api/charges", 400, "invalid_request", "usage", key=ADMIN_KEY, headers=headers, data=raw
    )


@pytest.mark.parametrize(
    ("status", "code", "model"), [(404, "model_not_found", "nothing"), (400, "model_not_priced", "unpriced")]
)
async def test_charge__of_a_model_without_a_price__is_refused(wallet, status, code, model):
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    body = {"account": wallet.account["id"], "model": model, "usage": usage}
    await wallet.refuses(
        "POST", "/api/charges", status, code, key=ADMIN_KEY, headers={"Idempotency-Key": "x"}, json=body
    )


@pytest.mark.parametrize("key", [None, "", "x" * 256], ids=["none", "empty", "long"])
async def test_charge__without_a_proper_idempotency_key__is_refused(wallet, key):
    body = {"account": wallet.account["id"], "amount": "1"}
    headers = {} if key is None else {"Idempotency-Key": key}
    seen, answer, _ = await wallet.client.request("POST", "/api/charges", headers=headers, json=body)
    assert (seen, answer["error"]["code"]) == (400, "invalid_request")
    assert answer["error"]["param"].lower() == "idempotency-key"
    await wallet.check_untouched()


async def test_charge__of_an_unknown_account__is_refused(wallet):
    body = {"account": UNKNOWN, "amount": "1"}
    await wallet.refuses(
        "POST",
        "/api/charges",
        404,
        "account_not_found",
        key=ADMIN_KEY,
        headers={"Idempotency-Key": "x"},
        json=body,
    )


async def test_charge__beyond_the_balance__is_refused_and_its_key_may_be_used_again(wallet):
    account, _ = await wallet.client.open_account(micro_usd=1_000_000)
    headers = {"Idempotency-Key": "again"}
    for body, status in (({"amount": "1.000000000001"}, 402), ({"amount": "1"}, 202)):
        seen, answer, _ = await wallet.client.request(
            "POST", "/api/charges", headers=headers, json={"account": account["id"]} | body
        )
        assert seen == status, answer
    await wallet.client.check_books(account, 1_000_000, "1")


@pytest.mark.parametrize("size", [10_000, 60_000, 1_000_000])
async def test_header__huge__is_refused_or_ignored(wallet, size):
    seen, _, _ = await wallet.client.request(
        "GET", "/v1/models", key=wallet.key, headers={"X-Huge": "x" * size}
    )
    assert seen in {200, 400, 431}
    await wallet.check_untouched()
    assert (await wallet.client.request("GET", "/healthz"))[0] == 200
