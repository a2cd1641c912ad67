"""Run by Alembic, within the transaction that `upgrade` has begun."""

from alembic import context

from waterfall.ledger import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    render_as_batch=True,  # SQLite changes a table by copying it
    transactional_ddl=False,  # the transaction is upgrade's
)
context.run_migrations()
