"""The migrations make the tables that the code works with, on both databases."""

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from making import ACCOUNT, CHAIN_ID, FUNDED, GENESIS, METER, PLATFORM, VAULT, Desk, deposited, only_sqlite
from making import block as block_

from waterfall.errors import LedgerError
from waterfall.ledger import migrations, schema
from waterfall.ledger.database import Database
from waterfall.ledger.store import Ledger


@pytest.fixture
def connection(url):
    database = Database.open(url)
    with database.engine.connect() as connection:
        yield connection
    database.close()


def indexes(connection):
    """Every index with its columns and condition, as the database has it."""
    if connection.dialect.name == "sqlite":
        query = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY name"
    else:
        query = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY indexname"
    return [tuple(row) for row in connection.exec_driver_sql(query) if "alembic" not in row[0]]


def columns(connection):
    inspector = sa.inspect(connection)
    return {
        table: sorted(
            (c["name"], str(c["type"]), c["nullable"], str(c["default"]), c.get("primary_key"))
            for c in inspector.get_columns(table)
        )
        for table in inspector.get_table_names()
        if table != "alembic_version"
    }


def test_revision__newest__is_the_schemas():
    scripts = ScriptDirectory(next(iter(migrations.__path__)))
    assert scripts.get_heads() == [schema.REVISION]


def test_upgrade__empty_database__same_tables_as_a_new_ledger(url, tmp_path, request):
    assert migrations.upgrade(url) == (None, schema.REVISION)
    upgraded = Database.open(url)
    with upgraded.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        made = columns(connection), indexes(connection)
    upgraded.close()
    if url.startswith("sqlite"):
        other = f"sqlite:///{tmp_path}/other.db"
    else:
        other = request.getfixturevalue("postgres").new_database()
    Ledger.open(other, chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM).close()
    new = Database.open(other)
    with new.engine.connect() as connection:
        assert (columns(connection), indexes(connection)) == made
    new.close()


async def test_upgrade__then_open__is_a_ledger(url):
    migrations.upgrade(url)
    ledger = Ledger.open(url, chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM)
    desk = Desk(ledger, METER)
    await desk.apply(GENESIS)
    await desk.apply(block_(1), deposited(ACCOUNT, FUNDED))
    assert (await desk.hold(5)).amount == 5
    ledger.close()


async def test_upgrade__newest_already__changes_nothing(desk, url):
    await desk.charge(5)
    before = await desk.table(schema.charges)
    desk.ledger.close()
    assert migrations.upgrade(url) == (schema.REVISION, schema.REVISION)
    again = Desk(Ledger.open(url, chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM), METER)
    assert await again.table(schema.charges) == before
    again.ledger.close()


def test_upgrade__made_by_a_newer_version__is_refused(ledger, url):
    database = ledger._database  # noqa: SLF001
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    ledger.close()
    with pytest.raises(LedgerError, match="9999"):
        migrations.upgrade(url)


@only_sqlite
def test_upgrade__in_use__is_refused(ledger, url):
    with pytest.raises(LedgerError, match="in use"):
        migrations.upgrade(url)
