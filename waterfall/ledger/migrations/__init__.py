"""How the tables came to be what `schema` says: one Alembic revision for every change."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext

from waterfall.errors import LedgerError
from waterfall.ledger import schema
from waterfall.ledger.database import DATABASE_ERRORS, Database, reason_of


def upgrade(url: str) -> tuple[str | None, str]:
    """Bring the tables of a database to this version's; the revision before and after.

    A database without tables gets them. It is done in one transaction: what fails, changes nothing.

    Raises:
        LedgerError: in use, unreadable, or newer than this version.
    """
    database = Database.open(url)
    try:
        with database.engine.begin() as connection:
            database.prepare(connection)
            before = revision(connection)
            _run(connection)
            return before, revision(connection) or schema.REVISION
    except DATABASE_ERRORS as error:
        raise LedgerError(reason=reason_of(error)) from error
    finally:
        database.close()


def revision(connection: sa.Connection) -> str | None:
    """The revision of a database's tables; None: it has none."""
    return MigrationContext.configure(connection).get_current_revision()


def _run(connection: sa.Connection) -> None:
    from alembic.util import CommandError  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise LedgerError(reason=f"its tables cannot be upgraded by this version: {error}") from None
