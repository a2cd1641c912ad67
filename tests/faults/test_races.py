"""One charge posted many times at once; several relayers at once, of which one freezes; two ledgers with one key."""

import asyncio
import contextlib
import signal

import pytest
from books import ALL, Site, depose

SPARE_KEY = "0x7c852118294e51e653712a81e05800f419141751be58f605c371e15141b007a6"
"""Of anvil's fourth account, which everybody knows."""
POINTS = ["lane.planned:2", "lane.journalled:2", "indexer.read:9"]
if ALL:
    POINTS += ["lane.broadcast:2", "lane.mined:2", "indexer.applied:9"]


@pytest.mark.parametrize("gateways", [1, 2])
async def test_charge__fifty_times_at_once__runs_once_and_all_get_its_receipt(site, session, gateways):
    """Settling as a counter change cannot be repeated (mozilla-ai/otari#742)."""
    if gateways == 2 and not site.database.startswith("postgres"):
        pytest.skip("a SQLite file is of one process")
    async with contextlib.AsyncExitStack() as stack:
        services = [
            await stack.enter_async_context(site.serve(name)) for name in ("serve", "gateway")[:gateways]
        ]
        urls = [service.url for service in services]
        caller = await site.open_account(urls[0])
        for url in urls:
            await caller.until("answered", url)
        before = len(await site.client(urls[0]).calls(caller.account))

        async def post(url, amount="0.000017"):
            return await caller.charge(url, "once", amount)

        answers = await asyncio.gather(*(post(url) for url in urls for _ in range(50 // gateways)))
        assert {status for status, _ in answers} == {202}, answers
        (receipt,) = {answer["id"] for _, answer in answers}
        for url in urls:
            conflict = await post(url, "0.000018")
            assert (conflict[0], conflict[1]["error"]["code"]) == (409, "idempotency_conflict")
            assert (await post(url))[1]["id"] == receipt
        assert len(await site.client(urls[0]).calls(caller.account)) == before + 1
        await site.check_books()


# ── Two relayers, one database ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("point", POINTS)
async def test_relayers__leader_freezes_and_wakes_when_another_leads__nothing_is_sent_twice(
    postgres_site, point
):
    """Relayers' nonces drift (OpenZeppelin relayer #683, #818): here a nonce is one row, whoever leads."""
    site = postgres_site
    async with contextlib.AsyncExitStack() as stack:
        leader, gateway = await asyncio.gather(
            stack.enter_async_context(site.serve("relayer", WATERFALL_FAILPOINT=f"{point}:freeze")),
            stack.enter_async_context(site.serve("gateway")),
        )
        caller = await site.open_account(gateway.url)
        async with site.serve("relayer") as other, caller.calling(gateway.url):
            await leader.frozen()
            await depose(site.database)
            await site.until_settled(3)
            leader.process.send_signal(signal.SIGCONT)
            await site.until_settled(3)
            await other.stop()  # whoever woke up leads again
            await site.until_settled(3)
        await site.check_books()


@pytest.mark.all_faults
async def test_relayers__leader_freezes_and_nobody_deposes_it__another_leads_after_half_a_minute(
    postgres_site,
):
    site = postgres_site
    async with contextlib.AsyncExitStack() as stack:
        leader, gateway = await asyncio.gather(
            stack.enter_async_context(site.serve("relayer", WATERFALL_FAILPOINT="lane.journalled:2:freeze")),
            stack.enter_async_context(site.serve("gateway")),
        )
        caller = await site.open_account(gateway.url)
        await stack.enter_async_context(site.serve("relayer"))
        async with caller.calling(gateway.url, pause=0.5):
            await leader.frozen()
            await site.until_settled(3)
        leader.process.send_signal(signal.SIGCONT)
        await site.check_books()


# ── Two ledgers, one key ─────────────────────────────────────────────────────────────────────────────


async def test_row_17__two_ledgers_with_one_key__one_halts_and_says_why_and_nothing_is_charged_twice(
    sqlite_site, tmp_path
):
    site = sqlite_site
    (tmp_path / "other").mkdir()
    other = Site(
        site.net, site.upstream, f"sqlite:///{tmp_path}/other/waterfall.db", tmp_path / "other", site.session
    )
    async with site.serve() as ours, other.serve() as theirs:
        caller = await site.open_account(ours.url)
        stranger = await other.open_account(theirs.url)
        assert await caller.call(ours.url) == "answered"
        await site.until(lambda states: states["settled"] + states["final"] == 1)
        assert await stranger.call(theirs.url) == "answered"  # takes the next nonce of the same key
        await other.until(lambda states: states["settled"] + states["final"] == 1)
        await caller.until("unavailable", ours.url)
        status, health, _ = await site.client(ours.url).request("GET", "/healthz")
        assert status == 503
        (reason,) = health["halted"].values()
        assert "not in the journal" in reason
        assert await stranger.call(theirs.url) == "answered"
        await other.check_books(started=2)
    # What waits is settled under a key of its own.
    async with site.serve(WATERFALL_GAS_KEY=SPARE_KEY) as ours:
        await caller.until("answered", ours.url)
        await site.check_books(foreign=True, started=2)
