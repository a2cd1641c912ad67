"""Fixtures over a real chain, a real vault, a real database and the real service."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from service import Client, Net, local_net, running, settings_for
from upstream import ScriptedUpstream


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Net]:
    async with local_net(tmp_path / "chain") as chain:
        yield chain


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as scripted:
        yield scripted


@pytest.fixture
async def client(net: Net, upstream: ScriptedUpstream, tmp_path: Path) -> AsyncIterator[Client]:
    async with running(net, settings_for(upstream.base_url, tmp_path / "waterfall.db")) as running_client:
        yield running_client


@dataclass
class Stage:
    """A service for all tests of a module, each with an account of its own."""

    net: Net
    upstream: ScriptedUpstream
    client: Client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    folder = tmp_path_factory.mktemp("stage")
    async with (
        local_net(folder / "chain") as net,
        ScriptedUpstream() as upstream,
        running(net, settings_for(upstream.base_url, folder / "waterfall.db")) as client,
    ):
        yield Stage(net, upstream, client)
