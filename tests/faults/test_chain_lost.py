"""The chain restarts with nothing on it; clocks that are an hour off."""

import asyncio
import os

import pytest
from processes import waterfall

from waterfall.devnet import deploy
from waterfall.devnet.anvil import Anvil

HOUR = 3600


async def restart_empty(net):
    """The same port, another chain."""
    port = int(net.anvil.rpc_url.rpartition(":")[2])
    await net.anvil.stop()
    net.anvil.state_file.unlink()
    net.anvil = Anvil(net.anvil.folder, port=port)
    await net.anvil.start()


async def test_chain__restarted_empty__halts_says_why_and_goes_on_after_a_rebuild(either_site):
    site = either_site
    async with site.serve() as service:
        caller = await site.open_account(service.url)
        async with caller.calling(service.url):
            await site.until_settled(3)
            await restart_empty(site.net)
            try:
                async with asyncio.timeout(60):
                    while (health := await site.client(service.url).request("GET", "/healthz"))[0] == 200:
                        await asyncio.sleep(0.05)
            except BaseException:
                await site.net.anvil.stop()
                raise
        assert "has lost block" in health[1]["halted"]["indexer"]
        assert "waterfall rebuild" in health[1]["halted"]["indexer"]
        assert await caller.call(service.url) == "unavailable"
    # It does not start on a chain without its vault, and with a new one only after somebody has said so.
    code, _, complained = await waterfall("serve", "--config", site.config())
    assert code == 1
    assert "there is no contract" in complained
    assert (await deploy.deploy(site.net.anvil.rpc)).vault == site.net.chain.vault
    code, _, complained = await waterfall("serve", "--config", site.config())
    assert (code, "has lost block" in complained) == (1, True)
    code, _, complained = await waterfall("rebuild", "--config", site.config())
    assert code == 0, complained
    async with site.serve() as service:
        # What was settled on the chain that is gone is owed on this one, and paid from what is paid in again.
        await site.net.deposit(caller.account, 1_000_000)
        await caller.until("answered", service.url)
        await site.check_books()
    await site.net.anvil.stop()


@pytest.mark.parametrize(
    ("hours", "database"),
    [
        (-1, "postgresql"),
        (1, "sqlite"),
        pytest.param(1, "postgresql", marks=pytest.mark.all_faults),
        pytest.param(-1, "sqlite", marks=pytest.mark.all_faults),
    ],
    indirect=["database"],
)
async def test_host_clock__an_hour_off_all_of_a_sudden__everything_settles_as_before(site, tmp_path, hours):
    """Windows and deadlines follow block time, leases the database's, waits the monotonic clock."""
    offset, path = clock_that_jumps(tmp_path)
    async with site.under_load(PYTHONPATH=path) as (_, caller):
        offset.write_text(str(hours * HOUR))
        await site.until_settled(5)
    assert caller.outcomes.keys() == {"answered"}
    async with site.serve(PYTHONPATH=path) as service:
        await caller.until("answered", service.url)
        await site.check_books()


@pytest.mark.parametrize("hours", [1, 24])
async def test_block_time__far_ahead_of_the_hosts_clock__everything_settles_as_before(sqlite_site, hours):
    site, rpc = sqlite_site, sqlite_site.net.anvil.rpc
    async with site.under_load() as (_, caller):
        await rpc.call("evm_increaseTime", hours * HOUR)
        await site.until_settled(5)
    assert caller.outcomes.keys() == {"answered"}


def clock_that_jumps(folder):
    """A place for Python programs to take `time` from; the file with the seconds by which it is wrong, and the path for them."""
    (folder / "clock").mkdir()
    offset = folder / "clock" / "offset"
    offset.write_text("0")
    (folder / "clock" / "sitecustomize.py").write_text(
        "import pathlib, time\n"
        f"file = pathlib.Path({str(offset)!r})\n"
        "real, real_ns = time.time, time.time_ns\n"
        "time.time = lambda: real() + int(file.read_text() or 0)\n"
        "time.time_ns = lambda: real_ns() + int(file.read_text() or 0) * 10**9\n"
    )
    return offset, f"{folder / 'clock'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
