"""A real chain, a real vault, a real database and the real service, for one test each."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
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
