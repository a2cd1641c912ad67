"""Many gateways and several relayers on one PostgreSQL database."""

import asyncio
import contextlib
import re
import subprocess

import aiohttp
import pytest
from processes import KEYS, WATERFALL, served, write_config
from service import Client

from waterfall.money import format_usd

CALL = 17  # micro-dollars: what one call costs


@pytest.fixture
def config(tmp_path, net, upstream, postgres_url):
    return write_config(tmp_path, net, upstream, postgres_url)


@contextlib.asynccontextmanager
async def cluster(config, net, *, gateways=2, relayers=2):
    """Gateways' clients and relayers, each a process."""
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=30)
            )
        )
        parts = [stack.enter_async_context(served(config, "relayer")) for _ in range(relayers)]
        parts += [stack.enter_async_context(served(config, "gateway")) for _ in range(gateways)]
        started = [await part for part in parts]
        clients = [Client(gateway.url, None, net, session) for gateway in started[relayers:]]
        for client in clients:
            await ready(client)
        yield clients, started[:relayers]


async def ready(client):
    """Once this gateway has seen the chain."""
    _, key = await client.open_account()
    async with asyncio.timeout(20):
        while (await client.chat(key))[1]["error"]["code"] == "unavailable":
            await asyncio.sleep(0.05)


async def test_budget__calls_at_once_on_two_gateways__exactly_as_many_run_as_it_pays_for(
    net, upstream, config
):
    """Peers check a budget and then act on it (LiteLLM #34732): here 60 calls at once find money for 10."""
    async with cluster(config, net) as (clients, _):
        one, other = clients
        probe, key = await one.open_account(micro_usd=10_000)
        maximum = (await one.calls(probe))[0]["held"] if (await one.chat(key))[0] == 200 else None
        upstream.permits = asyncio.Semaphore(0)
        micro = round(float(maximum) * 10**6)
        account, key = await one.open_account(micro_usd=10 * micro)
        async with asyncio.timeout(10):
            while (await other.chat(key, model="none"))[0] == 401:
                await asyncio.sleep(0.02)
        calls = [asyncio.create_task(client.chat(key)) for _ in range(30) for client in clients]
        async with asyncio.timeout(30):
            while sum(call.done() for call in calls) < 50:
                await asyncio.sleep(0.02)
        for _ in range(10):
            upstream.permits.release()
        statuses = [status for status, _, _ in await asyncio.gather(*calls)]
        assert sorted(set(statuses)) == [200, 402]
        assert statuses.count(200) == 10
        await other.check_books(account, 10 * micro, format_usd(10 * CALL * 10**6))


async def test_relayer__leader_killed__another_settles_what_waits(net, upstream, config):
    async with cluster(config, net) as ((client, _), relayers):
        account, key = await client.open_account(micro_usd=1_000_000)
        assert (await client.chat(key))[0] == 200
        await client.settled(account["id"])
        for number, relayer in enumerate(relayers, 1):
            await relayer.kill()
            assert (await client.chat(key))[0] == 200
            if number < len(relayers):
                await client.settled(account["id"])
        async with served(config, "relayer"):
            await client.check_books(account, 1_000_000, format_usd(3 * CALL * 10**6))


async def test_relayers__none_left__calls_are_refused_once_the_view_is_old(net, upstream, tmp_path, config):
    config.write_text(config.read_text().replace("[gateway]", "[gateway]\nmax_projection_age_seconds = 1"))
    async with cluster(config, net, gateways=1, relayers=1) as ((client,), (relayer,)):
        _, key = await client.open_account(micro_usd=1_000_000)
        assert (await client.chat(key))[0] == 200
        await relayer.kill()
        async with asyncio.timeout(20):
            while (answer := await client.chat(key))[0] == 200:
                await asyncio.sleep(0.1)
        assert answer[1]["error"]["code"] == "unavailable"
        async with served(config, "relayer"):
            await ready_again(client, key)


async def ready_again(client, key):
    async with asyncio.timeout(20):
        while (await client.chat(key))[0] != 200:
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("command", ["gateway", "relayer"])
def test_apart__on_a_sqlite_file__is_refused(tmp_path, command):
    config = tmp_path / "waterfall.toml"
    config.write_text(f'database = "sqlite:///{tmp_path}/waterfall.db"\n')
    ran = subprocess.run(
        [WATERFALL, command, "--config", config], env=KEYS, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 1
    assert re.search(r"database: .*PostgreSQL.*waterfall serve", ran.stderr)
