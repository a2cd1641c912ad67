"""SIGTERM under load: whatever was answered is charged, and the process ends by itself within its bound."""

import asyncio
import signal

import pytest
import sqlalchemy as sa

from waterfall.ledger import schema


@pytest.mark.parametrize("command", ["serve", "gateway"])
async def test_row_05__stopped_under_load__ends_within_its_bound_and_every_answer_is_charged(site, command):
    """Peers lose charges at shutdown (LiteLLM #38157)."""
    if command == "gateway" and site.database.startswith("sqlite"):
        pytest.skip("a SQLite file is of one process")
    site.upstream.delay = 0.2
    async with site.serve("serve") as other:
        caller = await site.open_account(other.url)
        if command == "serve":
            await stop_under_load(site, caller, other)
        else:
            async with site.serve("gateway") as service:
                await caller.until("answered", service.url)
                await stop_under_load(site, caller, service)
    async with site.serve() as service:
        assert await caller.call(service.url) == "answered"
        await site.check_books()


async def stop_under_load(site, caller, service):
    async with caller.calling(service.url, at_once=8, pause=0):
        await site.until(lambda states: states["held"] >= 8)
        assert await service.stop() == 0
    assert caller.outcomes["answered"] > 0
    ended = {state for (state,) in await site.rows(sa.select(schema.holds.c.state))}
    assert ended.isdisjoint({"held", "lost"}), "calls that run are waited for, then charged"


async def test_stop__upstream_does_not_answer__ends_within_its_bound_and_the_call_is_listed(sqlite_site):
    site = sqlite_site
    async with site.serve(gateway={"drain_seconds": 2}) as service:
        caller = await site.open_account(service.url)
        site.upstream.permits = asyncio.Semaphore(0)
        async with asyncio.TaskGroup() as calls:
            calls.create_task(caller.call(service.url))
            await site.upstream.until("started", 1)
            service.process.send_signal(signal.SIGTERM)
            assert await service.ended(30) == 0
            site.upstream.permits = None
    ((state, reason),) = await site.rows(sa.select(schema.holds.c.state, schema.holds.c.reason))
    assert state == "lost"
    assert reason
    async with site.serve() as service:
        assert await caller.call(service.url) == "answered"
        await site.check_books()


async def test_stop__database_gone__ends_all_the_same(postgres, postgres_site):
    site = postgres_site
    async with site.serve(gateway={"drain_seconds": 2}) as service:
        caller = await site.open_account(service.url)
        site.upstream.delay = 1
        async with asyncio.TaskGroup() as calls:
            calls.create_task(caller.call(service.url))
            await site.upstream.until("started", 1)
            try:
                await asyncio.to_thread(postgres.stop)
                assert await service.stop() in {0, 1}
            finally:
                await asyncio.to_thread(postgres.start)
    async with site.serve() as service:
        assert await caller.call(service.url) == "answered"
        await site.check_books()
