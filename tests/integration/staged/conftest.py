"""One service for all tests of a module, each with an account of its own."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from service import Client, Net, local_net, running, settings_for
from upstream import ScriptedUpstream


@dataclass
class Stage:
    """What the tests of a module share."""

    net: Net
    upstream: ScriptedUpstream
    client: Client


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('ledger')}/waterfall.db"
    return request.getfixturevalue("postgres").new_database()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory, database: str) -> AsyncIterator[Stage]:
    folder = tmp_path_factory.mktemp("stage")
    async with (
        local_net(folder / "chain") as net,
        ScriptedUpstream() as upstream,
        running(net, settings_for(upstream.base_url, database)) as client,
    ):
        yield Stage(net, upstream, client)


@pytest.fixture
def net(stage: Stage) -> Net:
    return stage.net


@pytest.fixture
def upstream(stage: Stage) -> ScriptedUpstream:
    return stage.upstream.reset()


@pytest.fixture
def client(stage: Stage, upstream: ScriptedUpstream) -> Client:
    return stage.client
