"""A ledger's first moments: its tables, and what it is the ledger of."""

import secrets

import sqlalchemy as sa

from waterfall.errors import LedgerError
from waterfall.ledger import projection, schema, shared
from waterfall.ledger.database import Database
from waterfall.ledger.writer import Transaction

_EPOCH_BITS = 32
_VERSIONS = sa.table("alembic_version", sa.column("version_num"))


def open_schema(database: Database, identity: dict[str, str]) -> int:
    """Make the tables of a new ledger, or check those of an old one; its epoch.

    Raises:
        LedgerError: it needs a migration, or is of another chain, vault or platform.
    """
    with database.engine.begin() as connection:
        make_tables(database, connection)
        table = schema.meta
        known = {row.key: row.value for row in connection.execute(sa.select(table))}
        if shared.EPOCH not in known:
            known = {**identity, shared.EPOCH: str(secrets.randbits(_EPOCH_BITS)), shared.VIEW: "0"}
            connection.execute(table.insert(), [{"key": key, "value": value} for key, value in known.items()])
        for key, value in identity.items():
            if known[key] != value:
                raise LedgerError(
                    reason=f"it belongs to {key} {known[key]}, not {value}: name another database"
                )
        database.start(connection)
    return int(known[shared.EPOCH])


def make_tables(database: Database, connection: sa.Connection) -> None:
    """Make the tables, or check those that are there, and be the only one that does, until the transaction ends.

    Raises:
        LedgerError: they need a migration.
    """
    database.prepare(connection)
    tables = set(sa.inspect(connection).get_table_names())
    if _VERSIONS.name in tables:
        revision = connection.execute(sa.select(_VERSIONS.c.version_num)).scalar()
        if revision != schema.REVISION:
            raise LedgerError(
                reason=f"it has schema {revision}, this version of Waterfall needs {schema.REVISION}: "
                "run `waterfall db upgrade`"
            )
    elif schema.meta.name in tables:
        raise LedgerError(
            reason="it was made by a version of Waterfall before the first: name another database"
        )
    else:
        schema.metadata.create_all(connection)
        connection.exec_driver_sql(
            "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"
        )
        connection.execute(_VERSIONS.insert().values(version_num=schema.REVISION))


def new_epoch(tx: Transaction) -> int:
    """Begin anew with charge ids: none of them can be one that was used before. What was under way is forgotten."""
    epoch = secrets.randbits(_EPOCH_BITS)
    projection.forget_slots(tx)
    shared.publish(tx, {shared.EPOCH: str(epoch), shared.FORGOT_SLOTS: "yes"})
    return epoch
