"""What a service says of itself: /healthz, /readyz, /metrics."""

import asyncio
import json
import time

import pytest
from making import GENESIS, USD, only_postgres, only_sqlite
from scrape import samples

from waterfall.errors import LedgerError
from waterfall.gateway import watch as watching
from waterfall.gateway.watch import Watch
from waterfall.ledger import journal
from waterfall.settlement.parts import PartState, State

ONE, OTHER = "settle 0x01", "settle 0x02"


def part(state, reason="a reason", seconds=0):
    return PartState(state, reason, time.time() - seconds)


def parts(**changed):
    """A relayer that works, but for this."""
    names = {"indexer": "indexer", "one": ONE, "other": OTHER, "policy": "policy"}
    return {name: changed.get(key, part(State.OK, None)) for key, name in names.items()}


@pytest.fixture
def look(desk):
    """The answers of a watch: status and body."""

    async def look(what, watch=None, **options):
        options = {"max_age_seconds": 60, "parts": parts()} | options
        response = await getattr(watch or Watch(desk.ledger, **options), what)()
        return response.status_code, json.loads(response.body)

    return look


async def scraped(watch):
    return samples((await watch.metrics()).body.decode())


# ── /healthz ─────────────────────────────────────────────────────────────────────────────────────────


@only_sqlite
async def test_health__all_well__is_ok_and_shows_the_parts(look):
    status, body = await look("health")
    assert (status, body["status"], body["reasons"], body["halted"]) == (200, "ok", [], {})
    assert set(body["parts"]) == {"indexer", ONE, OTHER, "policy"}


@only_sqlite
@pytest.mark.parametrize(
    "changed",
    [
        {"one": part(State.HALTED)},
        {"one": part(State.LOW_ON_GAS)},
        {"policy": part(State.HALTED)},
        {"indexer": part(State.RETRYING, seconds=31)},
        {"one": part(State.WAITING, seconds=31)},
    ],
    ids=[
        "one lane halted",
        "one lane without gas",
        "policies halted",
        "chain not read for long",
        "fee too high",
    ],
)
async def test_health__one_part_needs_looking_after__is_degraded_and_names_it(look, changed):
    status, body = await look("health", parts=parts(**changed))
    (name,) = changed
    shown = {"one": ONE}.get(name, name)
    assert (status, body["status"]) == (200, "degraded")
    assert body["reasons"] == [f"{shown} is {changed[name].state.value}: a reason"]


@only_sqlite
@pytest.mark.parametrize(
    ("state", "names"),
    [(State.RETRYING, ["one"]), (State.WAITING, ["indexer"]), (State.NOT_LEADING, ["one", "other"])],
    ids=["a moment's trouble", "just begun", "another process leads"],
)
async def test_health__nothing_that_needs_a_person__is_ok(look, state, names):
    changed = {name: part(state, seconds=5) for name in names}
    assert (await look("health", parts=parts(**changed)))[1]["status"] == "ok"


@only_sqlite
async def test_health__for_anybody__tells_how_it_is_and_not_why(desk):
    watch = Watch(desk.ledger, max_age_seconds=60, parts=parts(one=part(State.HALTED)))
    body = json.loads((await watch.health(with_reasons=False)).body)
    assert (body["status"], body["reasons"], body["halted"], body["parts"]) == ("degraded", [], {}, {})


@only_sqlite
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"indexer": part(State.HALTED)}, "the chain is not read: a reason"),
        ({"one": part(State.HALTED), "other": part(State.HALTED)}, "no lane settles"),
        ({"one": part(State.HALTED), "other": part(State.LOW_ON_GAS)}, "no lane settles"),
    ],
)
async def test_health__nothing_settles__is_halted(look, changed, reason):
    status, body = await look("health", parts=parts(**changed))
    assert (status, body["status"], body["reasons"][0]) == (503, "halted", reason)
    halted = {ONE: "one", OTHER: "other", "indexer": "indexer"}
    expected = {name for name, key in halted.items() if key in changed and changed[key].state is State.HALTED}
    assert set(body["halted"]) == expected


@only_sqlite
async def test_health__chain_against_the_journal__is_halted(look, desk):
    await desk.ledger.view.note_mismatch("the chain has another")
    status, body = await look("health")
    assert (status, body["reasons"][0]) == (503, "the chain has another")


@only_sqlite
async def test_health__charge_waits_for_long__is_degraded(look, desk, monkeypatch):
    await desk.charge(USD)
    assert (await look("health"))[1]["status"] == "ok"
    monkeypatch.setattr(watching, "now_ms", lambda: journal.now_ms() + 301_000)
    _, body = await look("health")
    assert (body["status"], body["reasons"]) == ("degraded", ["a charge has waited for settlement for 301 s"])


@only_postgres
async def test_health__of_a_gateway_alone__says_whether_any_relayer_works(look, desk, open_ledger):
    status, body = await look("health", parts=None)
    assert (status, body["reasons"][0]) == (503, "no relayer works")
    relayers = open_ledger()
    assert await relayers.leads("indexer")
    assert (await look("health", parts=None))[1]["status"] == "ok"
    assert not await desk.ledger.is_led("settle 0x01")
    relayers.close()
    async with asyncio.timeout(10):  # the server sees a moment later that its client has gone
        while (await look("health", parts=None))[0] == 200:
            await asyncio.sleep(0.01)


# ── /readyz ──────────────────────────────────────────────────────────────────────────────────────────


async def test_readiness__calls_would_be_accepted__is_ready(look):
    assert await look("readiness") == (200, {"ready": True, "reasons": []})


@only_sqlite
async def test_readiness__new_calls_refused__says_why(look, desk):
    desk.ledger.gate.refuse("100001 charges wait for settlement")
    assert await look("readiness") == (
        503,
        {"ready": False, "reasons": ["100001 charges wait for settlement"]},
    )


@only_sqlite
async def test_readiness__view_of_the_chain_too_old__says_so(look):
    status, body = await look("readiness", max_age_seconds=-1)
    assert (status, body["reasons"]) == (503, ["the chain's newest block was last seen 0 s ago"])
    _, health = await look("health", max_age_seconds=-1)
    assert health["status"] == "degraded"


@only_sqlite
async def test_readiness__stopping__says_so(look, desk):
    watch = Watch(desk.ledger, max_age_seconds=60)
    watch.is_stopping = True
    assert (await look("readiness", watch))[1]["reasons"] == ["it is stopping"]


@only_sqlite
@pytest.mark.parametrize("state", [State.HALTED, State.RETRYING])
async def test_readiness__of_a_relayer_alone__is_whether_it_reads_the_chain(look, state):
    assert (await look("readiness", max_age_seconds=None))[0] == 200
    status, body = await look("readiness", max_age_seconds=None, parts=parts(indexer=part(state)))
    assert (status, body["reasons"]) == (503, ["the chain is not read: a reason"])


@only_sqlite
async def test_readiness__ledger_cannot_write__says_so(look, desk, monkeypatch):
    async def refuse():
        raise LedgerError(reason="disk full")

    monkeypatch.setattr(desk.ledger, "probe", refuse)
    assert (await look("readiness"))[1]["reasons"] == ["The ledger cannot be used: disk full."]


# ── A ledger that does not answer ────────────────────────────────────────────────────────────────────


@pytest.fixture
def stuck(desk, monkeypatch):
    """A ledger that answers nothing, and how often it was asked."""
    monkeypatch.setattr(watching, "_ANSWER_SECONDS", 0.001)
    asked = []

    async def never():
        asked.append(1)
        await asyncio.Event().wait()

    for name in ("figures", "probe"):
        monkeypatch.setattr(desk.ledger, name, never)
    return asked


@only_sqlite
async def test_metrics__ledger_does_not_answer__show_the_rest_and_say_so(desk, stuck):
    seen = await scraped(Watch(desk.ledger, max_age_seconds=60))
    assert seen["waterfall_ledger_readable",] == 0
    assert seen["waterfall_head_block",] == 1
    assert not any(name.startswith(("waterfall_unsettled", "waterfall_open_holds")) for name, *_ in seen)


@only_sqlite
async def test_metrics__chain_not_read_yet__alert_like_a_head_that_nobody_has_seen_for_ever(ledger):
    seen = await scraped(Watch(ledger, max_age_seconds=60))
    assert seen["waterfall_head_seen_seconds",] == float("inf")


@only_sqlite
async def test_watch__ledger_does_not_answer__is_asked_once_however_often_we_are(look, desk, stuck):
    watch = Watch(desk.ledger, max_age_seconds=60)
    for _ in range(5):
        await watch.metrics()
        assert (await look("health", watch))[1]["reasons"] == [
            "The ledger cannot be used: it does not answer."
        ]
        assert (await look("readiness", watch))[0] == 503
    assert len(stuck) == 2, "once for the figures, once for the probe"


@only_sqlite
async def test_metrics__within_a_second__are_read_once(desk, monkeypatch):
    reads = []
    read = desk.ledger.figures

    async def counted():
        reads.append(1)
        return await read()

    monkeypatch.setattr(desk.ledger, "figures", counted)
    watch = Watch(desk.ledger, max_age_seconds=60)
    monkeypatch.setattr(watching, "_AGE_SECONDS", 60)
    await asyncio.gather(*(watch.metrics() for _ in range(10)))
    await watch.metrics()
    assert len(reads) == 1


async def test_metrics__ledger_at_work__has_its_figures(desk):
    held = await desk.hold(3 * USD)
    await desk.charge(2 * USD)
    seen = await scraped(Watch(desk.ledger, max_age_seconds=60))
    assert seen["waterfall_open_holds",] == 1
    assert seen["waterfall_open_holds_credits",] == held.amount
    assert seen["waterfall_charges", "queued"] == 1
    assert seen["waterfall_charges", "rejected"] == 0
    assert seen["waterfall_unsettled_credits", "queued"] == 2 * USD
    assert seen["waterfall_oldest_unsettled_seconds",] >= 0
    assert seen["waterfall_final_lag_blocks",] == 1 - GENESIS.number
    assert seen["waterfall_ledger_commit_seconds_count",] >= 3
