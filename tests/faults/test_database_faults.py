"""The database is locked, full, or gone for a while, under load."""

import asyncio
import contextlib
import resource
import subprocess

import pytest
from books import ALL, locked

LONGEST = 45 if ALL else 3
"""Seconds of a lock: SQLite's own wait ends after 30."""


async def test_database__locked_by_somebody__calls_wait_or_are_refused_and_go_on(site):
    async with site.under_load() as (_, caller):
        with locked(site.database):
            await asyncio.sleep(LONGEST)
        await caller.until_answered(5)
    assert caller.outcomes.keys() <= {"answered", *REFUSED}


@contextlib.contextmanager
def no_space(service, folder):
    """No file of the service may grow any more: what a full disk does, without being root."""
    before = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def full_disk(service, folder):
    """Somebody else has filled the disk."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    yield
    filler.unlink()


@pytest.fixture(params=[no_space, full_disk], ids=["file size limit", "full disk"])
def small_disk(request, sqlite_site, tmp_path):
    """A site whose database is on a disk of its own, and what fills that."""
    if request.param is no_space:
        yield sqlite_site, no_space, tmp_path
        return
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    try:
        sqlite_site.database = f"sqlite:///{disk}/waterfall.db"
        yield sqlite_site, full_disk, disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


async def test_disk__full_in_the_middle_of_a_call__refused_until_there_is_space_and_then_charged(small_disk):
    """Peers lose charges on a database error (LiteLLM #35531, #34820) or go on without a store (#33923)."""
    site, fill, folder = small_disk
    async with site.serve() as service:
        caller = await site.open_account(service.url)
        assert await caller.call(service.url) == "answered"
        await site.until(lambda states: states["settled"] + states["final"] == 1)
        site.upstream.permits = asyncio.Semaphore(0)
        under_way = [asyncio.create_task(caller.call(service.url)) for _ in range(5)]
        await site.upstream.until("started", 6)
        with fill(service, folder):
            for _ in under_way:
                site.upstream.permits.release()
            await site.upstream.until("answered", 6)
            assert await caller.call(service.url) == "ledger_error"
            assert await caller.call(service.url) == "ledger_error"
            assert not any(call.done() for call in under_way), "no answer ends before its charge is durable"
            states = await site.states()
            assert (states["held"], states["released"], states["lost"]) == (5, 0, 0)
        site.upstream.permits = None
        assert await asyncio.gather(*under_way) == ["answered"] * 5
        await caller.until("answered", service.url)
        await site.check_books()


async def stop_quickly(postgres):
    """As an administrator in a hurry: sessions are cut, and what was not committed is gone."""
    await asyncio.to_thread(postgres.stop)


async def kill_it(postgres):
    """As the kernel does when memory is short."""
    postgres.kill()


REFUSED = {"ledger_error", "unavailable"}


@pytest.mark.parametrize("end", [stop_quickly, kill_it])
async def test_postgres__restarted_under_load__nothing_is_lost_and_all_goes_on(postgres, postgres_site, end):
    """Peers lose charges at a restart of the database (LiteLLM #34820)."""
    site = postgres_site
    site.upstream.delay = 0.05
    async with site.serve() as service:
        caller = await site.open_account(service.url)
        async with caller.calling(service.url, at_once=8):
            for _ in range(5 if ALL else 2):
                await site.until_settled(5)
                await end(postgres)
                try:  # a call of its own: the others may all wait for their captures
                    await caller.until(REFUSED, service.url)
                finally:
                    await asyncio.to_thread(postgres.start)
                await caller.until_answered(5)
        await site.check_books()
    assert caller.outcomes.keys() <= {"answered", *REFUSED}
