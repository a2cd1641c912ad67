"""A ledger in a real SQLite file and in a real PostgreSQL, one account in it, and what makes receipts for it."""

import logging

import pytest
import structlog
from hypothesis import HealthCheck, settings
from making import (
    BLOCK_TIME,
    CHAIN_ID,
    FUNDED,
    GENESIS,
    METER,
    PLATFORM,
    VAULT,
    Desk,
    block,
    deposited,
)

from waterfall.ledger.store import Ledger

# Each example of a ledger property opens a database; the figures keep the whole suite under a minute on two cores.
settings.register_profile(
    "unit",
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("unit")
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@pytest.fixture
def sqlite_url(tmp_path):
    return f"sqlite:///{tmp_path}/waterfall.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request):
    """A new database of either kind."""
    return request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")


@pytest.fixture
def open_ledger(url):
    """Opens the test's ledger, again too; closes what is open at the end."""
    opened = []

    def open_ledger(**identity):
        ledger = Ledger.open(url, **{"chain_id": CHAIN_ID, "vault": VAULT, "platform": PLATFORM, **identity})
        opened.append(ledger)
        return ledger

    yield open_ledger
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(open_ledger):
    """An empty ledger."""
    return open_ledger()


@pytest.fixture
async def desk(ledger):
    """A ledger with one funded account, and hands to work with it."""
    await ledger.view.apply([(GENESIS, [])], spendable=GENESIS.number, final=GENESIS.number)
    desk = Desk(ledger, METER)
    await desk.apply(block(1, BLOCK_TIME), deposited(desk.account, FUNDED))
    return desk
