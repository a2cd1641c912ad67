"""The real service, for one test each."""

from collections.abc import AsyncIterator

import pytest
from service import Client, Net, running, settings_for
from upstream import ScriptedUpstream


@pytest.fixture
async def client(net: Net, upstream: ScriptedUpstream, database: str) -> AsyncIterator[Client]:
    async with running(net, settings_for(upstream.base_url, database)) as running_client:
        yield running_client
