"""The service as those see it who watch it: scraped, asked for its health, followed through its logs, stopped."""

import asyncio
import contextlib
import re
import signal
from pathlib import Path

import aiohttp
import pytest
import yaml
from collector import collector
from processes import ADMIN_KEY, served, write_config
from prometheus_client.parser import text_string_to_metric_families
from scrape import samples
from service import Client, calldata, running, settings_for
from settling import GAS
from upstream import stalls

from waterfall.chain.transactions import transact
from waterfall.cli.secrets import Secrets
from waterfall.devnet import deploy
from waterfall.signers import LocalSigner

DOCS = Path(__file__).parents[2] / "docs"
COST = 17 * 10**6  # credit units: what one call costs
EMPTY = LocalSigner(b"\xee" * 32)
LANE = f"settle {deploy.GAS.address}"
SETTLED = ("waterfall_capture_to_inclusion_seconds_count",)


async def scraped(client, path="/metrics", **options):
    status, text, headers = await client.request("GET", path, **options)
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return samples(text)


async def until(look, condition):
    """What is seen once a condition holds of it."""
    async with asyncio.timeout(30):
        while not condition(seen := await look()):
            await asyncio.sleep(0.05)
    return seen


# ── /metrics ─────────────────────────────────────────────────────────────────────────────────────────


async def test_metrics__a_call_and_its_settlement__are_counted(client, upstream):
    before = await scraped(client)
    account, key = await client.open_account(micro_usd=1_000_000)
    assert (await client.chat(key))[0] == 200
    assert (await client.chat(key, model="absent"))[0] == 404
    await client.settled(account["id"])
    # What the ledger says, is read once a second.
    after = await until(
        lambda: scraped(client),
        lambda seen: (
            seen[SETTLED] == 1
            and seen.get(("waterfall_slot_attempts_count", LANE)) == 1
            and seen["waterfall_oldest_unsettled_seconds",] == seen["waterfall_open_holds",] == 0
        ),
    )

    def grew(*sample):
        return after[sample] - before.get(sample, 0)

    assert grew("waterfall_charges_captured_total") == 1
    assert grew("waterfall_captured_credits_total") == COST
    assert grew("waterfall_http_requests_total", "POST", "/v1/chat/completions", "200") == 1
    assert grew("waterfall_http_requests_total", "POST", "/v1/chat/completions", "404") == 1
    assert grew("waterfall_http_request_seconds_count", "/v1/chat/completions") == 2
    assert grew("waterfall_upstream_requests_total", "200", "local") == 1
    assert grew("waterfall_upstream_seconds_count", "local") == 1
    assert grew("waterfall_broadcasts_total", LANE, "accepted", "") == 1
    assert grew("waterfall_slots_closed_total", LANE, "settle", "succeeded") == 1
    assert grew("waterfall_slot_attempts_count", LANE) == 1
    assert after["waterfall_part_state", LANE, "ok"] == 1
    assert after["waterfall_signer_balance_wei", LANE, deploy.GAS.address] > 10**18
    assert after["waterfall_signer_batches_left", LANE, deploy.GAS.address] > 3
    assert sum(n for (name, *_), n in after.items() if name == "waterfall_unsettled_credits") == 0
    assert after["waterfall_head_block",] >= after["waterfall_chain_newest_block",] - 1
    (endpoint,) = {sample[1] for sample in after if sample[0] == "waterfall_rpc_requests_total"}
    assert re.fullmatch(r"127\.0\.0\.1:\d+", endpoint)
    assert after["waterfall_rpc_seconds_count", endpoint] > 10


async def test_metrics__every_one__is_named_and_told_as_prometheus_wants_it(client):
    account, key = await client.open_account(micro_usd=1_000_000)
    await client.chat(key)
    await client.settled(account["id"])
    _, text, _ = await client.request("GET", "/metrics")
    families = [f for f in text_string_to_metric_families(text) if f.name.startswith("waterfall_")]
    assert len(families) > 40
    for family in families:
        assert re.fullmatch(r"waterfall_[a-z0-9]+(_[a-z0-9]+)*", family.name)
        assert family.documentation[0].isupper(), family.name
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"_(ms|milliseconds|usd|gwei|kb|mb|total)$", family.name), family.name
        assert family.name.endswith("_credits") == ("credit units" in family.documentation), family.name
        assert family.type in {"counter", "gauge", "histogram"}, family.name
        if "seconds" in family.name or family.type == "histogram":
            assert re.search(r"_(seconds|attempts|operations)$", family.name), family.name
    for secret in (account["id"], account["owner"] + '"', key, ADMIN_KEY):
        assert secret not in text, "labels are few, and name nobody"


async def test_metrics__on_the_gateways_port__are_the_platforms(client):
    _, key = await client.open_account()
    for headers, status in (({"Authorization": ""}, 401), ({"Authorization": f"Bearer {key}"}, 403)):
        assert (await client.request("GET", "/metrics", headers=headers))[0] == status


async def test_metrics__listener_of_their_own__asks_for_no_key_and_serves_nothing_else(
    net, upstream, database, unused_tcp_port
):
    own = settings_for(upstream.base_url, database, {"metrics": {"port": unused_tcp_port}})
    async with running(net, own) as client:
        client.url, gateway = f"http://127.0.0.1:{unused_tcp_port}", client.url
        nobody = {"Authorization": ""}
        assert (await scraped(client, headers=nobody))["waterfall_ledger_readable",] == 1
        assert (await client.request("GET", "/healthz", headers=nobody))[1]["status"] == "ok"
        assert (await client.request("GET", "/readyz", headers=nobody))[0] == 200
        assert (await client.request("GET", "/api/totals"))[0] == 404
        client.url = gateway
        assert (await client.request("GET", "/metrics", headers=nobody))[0] == 401


async def test_two_services__in_one_process__count_apart(client, net, upstream, tmp_path):
    async with running(net, settings_for(upstream.base_url, f"sqlite:///{tmp_path}/other.db")) as other:
        account, key = await client.open_account(micro_usd=1_000_000)
        await client.chat(key)
        await client.settled(account["id"])
        assert (await scraped(client))["waterfall_charges_captured_total",] == 1
        assert (await scraped(other))["waterfall_charges_captured_total",] == 0


async def test_alerts__every_metric_they_name__is_one_that_a_service_has(client):
    exposed = ""
    async with asyncio.timeout(60):
        while "waterfall_ledger_readable 1" not in exposed:  # a busy machine may keep it waiting
            _, exposed, _ = await client.request("GET", "/metrics")
    suffixes = {"gauge": ("",), "counter": ("",), "histogram": ("_bucket", "_sum", "_count")}
    families = dict(re.findall(r"^# TYPE (waterfall_\w+) (\w+)$", exposed, re.MULTILINE))
    names = {name + suffix for name, kind in families.items() for suffix in suffixes[kind]}
    text = (DOCS / "operations.md").read_text()
    groups = yaml.safe_load((DOCS / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 20
    for rule in rules:
        named = set(re.findall(r"\bwaterfall_\w+", rule["expr"]))
        assert named, rule["alert"]
        assert named <= names, rule["alert"]
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert f"`{rule['alert']}`" in text, "what it means and what to do is in operations.md"
    told = set(re.findall(r"`(waterfall_\w+)`", text))
    assert told == set(families), "operations.md tells of every metric, and of none that is not there"


# ── /healthz ─────────────────────────────────────────────────────────────────────────────────────────


async def test_health__one_of_two_gas_keys_is_empty__is_degraded_and_the_other_settles(
    net, upstream, database
):
    keys = Secrets(deploy.METER, (EMPTY, deploy.GAS), deploy.OWNER, b"salt", ADMIN_KEY)
    async with running(net, settings_for(upstream.base_url, database), keys) as client:
        account, key = await client.open_account(micro_usd=1_000_000)
        assert (await client.chat(key))[0] == 200
        await client.settled(account["id"])

        async def health():
            await client.chat(key)  # until it is that lane's turn
            return await client.request("GET", "/healthz")

        status, body, _ = await until(health, lambda seen: seen[1]["status"] != "ok")
        anybody = (await client.request("GET", "/healthz", key=key))[1]
        assert (anybody["reasons"], anybody["parts"]) == ([], {})
        assert (status, body["status"], body["halted"]) == (200, "degraded", {})
        (reason,) = body["reasons"]
        assert reason.startswith(f"settle {EMPTY.address} is low_on_gas: {EMPTY.address} has 0 wei")
        seen = await scraped(client)
        assert seen["waterfall_signer_balance_wei", f"settle {EMPTY.address}", EMPTY.address] == 0
        assert (await client.request("GET", "/readyz"))[0] == 200


async def test_health__platform_has_another_owner__says_why_no_policy_can_be_set(net, client):
    chain, rpc, successor = net.chain, net.anvil.rpc, GAS[1]
    handed_over = calldata("transferPlatform(uint128,address)", chain.platform, successor.address)
    await transact(rpc, deploy.OWNER, chain.vault, handed_over)
    await transact(rpc, successor, chain.vault, calldata("acceptPlatform(uint128)", chain.platform))
    account, key = await client.open_account(micro_usd=1_000_000)
    await client.request("PUT", f"/api/accounts/{account['id']}/policy", json={"max_per_charge": "0.5"})
    _, body, _ = await until(
        lambda: client.request("GET", "/healthz"), lambda seen: seen[1]["status"] != "ok"
    )
    assert body["status"] == "degraded"
    assert f"NotPlatformOwner({chain.platform}, {deploy.OWNER.address})" in body["halted"]["policy"]
    assert (await client.chat(key))[0] == 200
    await client.settled(account["id"])


async def test_looks__chain_gone__answer_all_the_same(net, upstream, client):
    await net.anvil.stop()

    async def failures():
        return sum(
            n for (name, *_), n in (await scraped(client)).items() if name == "waterfall_part_failures_total"
        )

    await until(failures, lambda failed: failed > 2)
    seen = await scraped(client)
    assert sum(
        n
        for (name, *labels), n in seen.items()
        if name == "waterfall_rpc_requests_total" and "failed" in labels
    )
    assert [n for (name, *_), n in seen.items() if name == "waterfall_rpc_endpoint_healthy"] == [0]
    assert (await client.request("GET", "/healthz"))[0] == 200


# ── Traces ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
async def test_traces__of_a_call__are_one_of_its_callers_with_a_span_for_each_step(
    net, upstream, tmp_path, stream
):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    sent = {"traceparent": f"00-{trace}-{parent}-01", "tracestate": "theirs=1", "X-Request-Id": "call-7"}
    database = f"sqlite:///{tmp_path}/waterfall.db"
    async with collector() as (kept, url):
        own = settings_for(upstream.base_url, database, {"tracing": {"otlp_endpoint": url}})
        async with running(net, own) as client:
            _, key = await client.open_account(micro_usd=1_000_000)
            status, _, headers = await client.chat(key, headers=sent, stream=stream)
            assert status == 200
        spans = {span.name: span for span in kept.spans if span.trace_id.hex() == trace}
    assert set(spans) == {"POST", "authenticate", "hold", "upstream", "capture"}
    assert spans["POST"].parent_span_id.hex() == parent
    assert {spans[name].parent_span_id for name in spans if name != "POST"} == {spans["POST"].span_id}
    facts = {name: {a.key: a.value.string_value for a in span.attributes} for name, span in spans.items()}
    assert facts["POST"]["waterfall.request_id"] == "call-7"
    assert facts["POST"]["http.route"] == "/v1/chat/completions"
    assert facts["hold"]["waterfall.receipt_id"] == headers["X-Waterfall-Receipt-Id"]
    told = {name.lower(): value for name, value in upstream.headers[-1].items()}
    assert told["traceparent"] == f"00-{trace}-{spans['upstream'].span_id.hex()}-01"
    assert "tracestate" not in told


async def test_traces__not_asked_for__tell_the_upstream_nothing(client, upstream):
    _, key = await client.open_account(micro_usd=1_000_000)
    sent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    assert (await client.chat(key, headers=sent))[0] == 200
    assert "traceparent" not in {name.lower() for name in upstream.headers[-1]}


# ── Gateway and relayer apart, as processes ──────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def session():
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as opened:
        yield opened


async def test_logs__of_two_processes__lead_from_a_request_id_to_its_transaction(
    net, upstream, tmp_path, postgres_url
):
    config = write_config(tmp_path, net, upstream, postgres_url)
    async with served(config, "relayer") as relayer, served(config, "gateway") as gateway, session() as http:
        client = Client(gateway.url, None, net, http)
        account, key = await client.open_account(micro_usd=1_000_000)
        await until(lambda: client.request("GET", "/readyz"), lambda seen: seen[0] == 200)
        for number in range(3):
            status, _, headers = await client.chat(key, headers={"X-Request-Id": f"call-{number}"})
            assert (status, headers["x-request-id"]) == (200, f"call-{number}")
        await client.settled(account["id"])
        receipt = await client.receipt(headers["X-Waterfall-Receipt-Id"])

        async def look():
            return relayer.events()

        def mined(events):
            return [e for e in events if e["event"] == "mined" and e["transaction"] == receipt["transaction"]]

        await until(look, mined)
        ours = [e for e in gateway.events() if e.get("request_id") == "call-2"]
        theirs = relayer.events()
    assert [e["event"] for e in ours] == ["captured"]
    assert {e["charge"] for e in ours} == {int(receipt["charge_id"])}
    assert (ours[0]["receipt"], ours[0]["amount"]) == (receipt["id"], COST)
    assert all({"level", "timestamp"} <= set(e) for e in ours)

    charge = ours[0]["charge"]
    (batched,) = [e for e in theirs if e["event"] == "batched" and charge in e["charges"]]
    (settled,) = [e for e in theirs if e["event"] == "settled" and charge in e["charges"]]
    assert batched["transaction"] == settled["transaction"] == receipt["transaction"]
    (sent,) = [e for e in theirs if e["event"] == "broadcast" and e["transaction"] == batched["transaction"]]
    assert (sent["lane"], sent["nonce"], sent["outcome"]) == (batched["lane"], batched["nonce"], "accepted")
    assert settled["block"] == mined(theirs)[0]["block"] == receipt["block"]


async def test_relayer__alone__is_watched_and_a_gateway_says_when_it_is_gone(
    net, upstream, tmp_path, postgres_url
):
    config = write_config(tmp_path, net, upstream, postgres_url)
    async with served(config, "gateway") as gateway, session() as http:
        client = Client(gateway.url, None, net, http)
        status, body, _ = await client.request("GET", "/healthz")
        assert (status, body["status"], body["reasons"][0]) == (503, "halted", "no relayer works")
        assert (await client.request("GET", "/readyz"))[1]["reasons"] == ["the chain has not been read yet"]
        stranger = await client.request("GET", "/readyz", headers={"Authorization": ""})
        assert stranger[:2] == (503, {"ready": False, "reasons": []})
        async with served(config, "relayer") as relayer:
            watched = Client(relayer.url, None, net, http)
            await until(lambda: client.request("GET", "/readyz"), lambda seen: seen[0] == 200)
            await until(lambda: client.request("GET", "/healthz"), lambda seen: seen[1]["status"] == "ok")
            assert (await watched.request("GET", "/readyz"))[0] == 200
            assert (await watched.request("GET", "/healthz"))[1]["parts"][LANE]["state"] == "ok"
            seen = await scraped(watched, headers={"Authorization": ""})
            assert seen["waterfall_part_state", "indexer", "ok"] == 1
            await relayer.kill()
        await until(lambda: client.request("GET", "/healthz"), lambda seen: seen[0] == 503)


# ── SIGTERM ──────────────────────────────────────────────────────────────────────────────────────────


async def test_sigterm__stream_running__is_unready_at_once_takes_no_calls_and_ends_the_stream(
    net, upstream, tmp_path, database
):
    config = write_config(tmp_path, net, upstream, database)
    async with session() as http:
        async with served(config) as service:
            client = Client(service.url, None, net, http)
            account, key = await client.open_account(micro_usd=1_000_000)
            upstream.permits = asyncio.Semaphore(2)
            async with client.streaming(key) as stream:
                first = await stream.content.readany()
                service.process.send_signal(signal.SIGTERM)
                status, body, _ = await until(
                    lambda: client.request("GET", "/readyz"), lambda seen: seen[0] == 503
                )
                assert body["reasons"] == ["it is stopping"]
                assert (await client.request("GET", "/healthz"))[0] == 200
                status, body, headers = await client.chat(key)
                assert (status, body["error"]["code"], headers["retry-after"]) == (503, "unavailable", "1")
                charge = {"account": account["id"], "amount": "0.5"}
                status, body, _ = await client.request(
                    "POST", "/api/charges", json=charge, headers={"Idempotency-Key": "1"}
                )
                assert (status, body["error"]["code"]) == (503, "unavailable")
                assert "stopping" in body["error"]["message"]
                assert service.process.returncode is None
                for _ in range(20):
                    upstream.permits.release()
                rest = await stream.content.read()
            assert (first + rest).endswith(b"data: [DONE]\n\n")
            async with asyncio.timeout(30):
                assert await service.process.wait() == 0
            assert upstream.counts["started"] == 1, "no call was begun while it stopped"
        upstream.permits = None
        async with served(config) as service:
            client = Client(service.url, None, net, http)
            await client.settled(account["id"])
            (call,) = await client.calls(account)
            assert (call["status"], call["cost"]) == ("settled", "0.000017")


async def test_sigterm__call_that_does_not_end__is_cut_at_the_bound_and_listed(
    net, upstream, tmp_path, database
):
    config = write_config(tmp_path, net, upstream, database)
    config.write_text(config.read_text().replace("[gateway]", "[gateway]\ndrain_seconds = 1"))
    upstream.behaviour = stalls
    async with session() as http:
        async with served(config) as service:
            client = Client(service.url, None, net, http)
            account, key = await client.open_account(micro_usd=1_000_000)
            calling = asyncio.create_task(client.chat(key))
            await upstream.until("started", 1)
            service.process.send_signal(signal.SIGTERM)
            status, body, _ = await calling
            assert (status, body["error"]["code"]) == (502, "upstream_invalid")
            async with asyncio.timeout(15):
                assert await service.process.wait() == 0
        async with served(config) as service:
            client = Client(service.url, None, net, http)
            (call,) = await client.calls(account)
            assert call["status"] == "lost"
            assert "stopped" in call["reason"]


async def test_sigterm__notice_asked_for__answers_503_that_long_though_nothing_runs(net, upstream, tmp_path):
    config = write_config(tmp_path, net, upstream, f"sqlite:///{tmp_path}/waterfall.db")
    config.write_text(config.read_text().replace("[gateway]", "[gateway]\nnotice_seconds = 60"))
    async with served(config) as service, session() as http:
        client = Client(service.url, None, net, http)
        service.process.send_signal(signal.SIGTERM)
        await until(lambda: client.request("GET", "/readyz"), lambda seen: seen[0] == 503)
        service.process.send_signal(signal.SIGTERM)  # a second one ends the wait
        async with asyncio.timeout(15):
            assert await service.process.wait() == 0


async def test_sigterm__relayer_alone__ends_by_itself(net, upstream, tmp_path, postgres_url):
    config = write_config(tmp_path, net, upstream, postgres_url)
    async with served(config, "relayer") as relayer:
        relayer.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(15):
            assert await relayer.process.wait() == 0
    assert b"Traceback" not in relayer.output
