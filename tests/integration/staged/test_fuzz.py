"""The OpenAPI document, fuzzed: whatever is sent is answered, by an error that clients can read, and leaves no hold behind."""

import asyncio

import pytest
import schemathesis
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from service import ADMIN_KEY
from upstream import completion, streams

from waterfall.gateway.wire import ErrorBody

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPOSIT = 100_000_000
EXAMPLES = 25
SECONDS = 30
USED = {
    "prompt_tokens": 12,
    "completion_tokens": 5,
    "total_tokens": 17,
    "input_tokens": 12,
    "output_tokens": 5,
}
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
NOT_SERVED = 501
MOST_OPERATIONS = 18
"""Of 26, those that take something."""


async def whole_or_streamed(upstream, request, body):
    """Answers that every surface can meter; a stream of chat's on all of them."""
    if body.get("stream") and not request.path.endswith("count_tokens"):
        return await streams()(upstream, request, body)
    return web.json_response(completion(body, used=USED))


def check(response, route):
    """No 5xx but for what is not served; every error in the form of its surface."""
    status = response.status_code
    assert status < 500 or status == NOT_SERVED, (route, status, response.text)
    if status >= 400:
        body = response.json()
        error = body["error"]
        assert {error["message"], error["type"]}.isdisjoint({None, ""}), (route, body)
        if not route.startswith("/v1/messages"):
            ErrorBody.model_validate(body)


def fuzz(operation, mode, url, key, account):
    """Send what the document permits of an operation, or what it does not."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), is_known=st.booleans())
    def send(case, is_known):
        if is_known and isinstance(case.body, dict) and operation.path.startswith("/v1/"):
            case.body["model"] = "micro"  # else nearly every call is one of a model that is not there
        if is_known and operation.method != "delete" and "account" in (case.path_parameters or {}):
            case.path_parameters["account"] = account
        response = case.call(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=SECONDS)
        check(response, operation.path)

    send()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
async def test_openapi__fuzzed__no_failure_no_hang_no_hold_left(client, upstream, mode):
    upstream.behaviour = whole_or_streamed
    account, key = await client.open_account(micro_usd=DEPOSIT)
    _, document, _ = await client.request("GET", "/openapi.json")
    schema = schemathesis.openapi.from_dict(document)
    fuzzed = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        its = key if operation.path.startswith("/v1/") else ADMIN_KEY
        try:
            await asyncio.to_thread(fuzz, operation, mode, client.url, its, account["id"])
            fuzzed += 1
        except Unsatisfiable:  # it takes nothing that could be wrong
            assert mode is schemathesis.GenerationMode.NEGATIVE
            assert operation.method == "get"
    assert fuzzed >= MOST_OPERATIONS
    async with asyncio.timeout(SECONDS):
        while (await client.request("GET", "/api/totals"))[1]["held"] != "0.00":
            await asyncio.sleep(0.1)
