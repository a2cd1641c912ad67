"""A real anvil, and proxies before it that fail on demand."""

import contextlib
import logging
import random

import aiohttp
import pytest
import structlog
from books import ALL, SEED, Site

from waterfall.chain.rpc import Rpc
from waterfall.devnet.anvil import Anvil
from waterfall.devnet.proxy import Proxy


def pytest_configure(config):
    config.addinivalue_line("markers", "all_faults: runs in `make faults` only")


def pytest_collection_modifyitems(items):
    for item in items:
        if not ALL and item.get_closest_marker("all_faults"):
            item.add_marker(pytest.mark.skip(reason="in `make faults` only"))


class Clock:
    """Seconds that pass when a test says so: for backoffs, never for timeouts."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
async def anvil(tmp_path):
    async with Anvil(tmp_path / "chain") as anvil:
        yield anvil


@pytest.fixture
def all_logs():
    """Everything is logged, whatever other tests have set."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))
    yield
    structlog.configure(**before)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def open_proxy(anvil):
    """Opens proxies before the anvil."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_proxy(node=None, **options):
            return await stack.enter_async_context(Proxy(node or anvil.rpc_url, **options))

        yield open_proxy


@pytest.fixture
async def proxy(open_proxy):
    return await open_proxy()


@pytest.fixture
async def open_rpc(anvil, clock):
    """Opens pools over proxies, of the anvil's chain unless told otherwise."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_rpc(*proxies, **options):
            options = {"chain_id": anvil.chain_id, "timeout_seconds": 5, "clock": clock, **options}
            rpc = Rpc([getattr(each, "url", each) for each in proxies], **options)
            stack.push_async_callback(rpc.close)
            return rpc

        yield open_rpc


@pytest.fixture
def chance():
    """What is drawn by chance, the same for a seed."""
    return random.Random(SEED)  # noqa: S311 - repeatable


@pytest.fixture
async def session():
    """Waits as long as a client would, and opens as many connections as it likes."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=90)
    ) as session:
        yield session


@pytest.fixture
def site(net, upstream, database, tmp_path, session):
    """All that a service needs, on both databases."""
    return Site(net, upstream, database, tmp_path, session)


@pytest.fixture(params=["sqlite_site", "postgres_site"] if ALL else ["sqlite_site"])
def either_site(request):
    """One of both, or both at the full size: for faults that reach the database only as what they make of it."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def sqlite_site(net, upstream, tmp_path, session):
    """The same for faults that have nothing to do with the database."""
    return Site(net, upstream, f"sqlite:///{tmp_path}/waterfall.db", tmp_path, session)


@pytest.fixture
def postgres_site(net, upstream, postgres_url, tmp_path, session):
    """The same for faults of many processes."""
    return Site(net, upstream, postgres_url, tmp_path, session)


@pytest.fixture
async def node(net):
    """The site's node, behind a proxy that fails on demand."""
    async with Proxy(net.anvil.rpc_url) as node:
        yield node
