"""PostgreSQL for every test that asks: one real server for each test process, one database for each test."""

import shutil
import tempfile
from pathlib import Path

import pytest
from postgres import Server


@pytest.fixture(scope="session")
def postgres():
    """The server."""
    folder = Path(tempfile.mkdtemp(prefix="waterfall-postgres-"))
    server = Server(folder)
    yield server
    server.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres):
    """URL of an empty database for one test."""
    url = postgres.new_database()
    yield url
    postgres.drop(url)


# What these need is imported when they are asked for: contracts are tested without any of it.


@pytest.fixture
async def net(tmp_path):
    """A chain of its own, with a vault and a platform on it."""
    from service import local_net  # noqa: PLC0415

    async with local_net(tmp_path / "chain") as chain:
        yield chain


@pytest.fixture
async def upstream():
    """A provider that does as it is told."""
    from upstream import ScriptedUpstream  # noqa: PLC0415

    async with ScriptedUpstream() as scripted:
        yield scripted


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """URL of a new database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/waterfall.db"
    return request.getfixturevalue("postgres_url")
