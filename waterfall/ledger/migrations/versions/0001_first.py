"""The first tables."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_MONEY = sa.Numeric(39, 0).with_variant(sa.Text(), "sqlite")


def _where(condition: sa.TextClause) -> dict[str, Any]:
    return {"sqlite_where": condition, "postgresql_where": condition}


def upgrade() -> None:
    """Make them."""
    if op.get_context().dialect.name == "postgresql":
        op.execute(sa.schema.CreateSequence(sa.Sequence("charge_sequence")))
    op.create_table(
        "accounts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("label_hash", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=True),
        sa.Column("created_at", _INTEGER, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_table(
        "blocks",
        sa.Column("number", _INTEGER, autoincrement=False, nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("timestamp", _INTEGER, nullable=False),
        sa.PrimaryKeyConstraint("number"),
        sqlite_strict=True,
    )
    op.create_table(
        "events",
        sa.Column("block", _INTEGER, nullable=False),
        sa.Column("log_index", _INTEGER, nullable=False),
        sa.Column("tx_hash", sa.Text(), nullable=False),
        sa.Column("timestamp", _INTEGER, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=True),
        sa.Column("charge_id", sa.Text(), nullable=True),
        sa.Column("amount", _MONEY, nullable=True),
        sa.Column("entry", _INTEGER, nullable=True),
        sa.Column("source", sa.Text(), nullable=True),
        sa.Column("source_entry", _INTEGER, nullable=True),
        sa.Column("data", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("block", "log_index"),
        sqlite_strict=True,
    )
    op.create_index("events_account", "events", ["account", "block", "log_index"])
    op.create_index("events_charge", "events", ["charge_id"])
    op.create_index("events_source", "events", ["source"], **_where(sa.text("source IS NOT NULL")))
    op.create_table(
        "meta",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
        sqlite_strict=True,
    )
    op.create_table(
        "raises",
        sa.Column("block", _INTEGER, nullable=False),
        sa.Column("log_index", _INTEGER, nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("amount", _MONEY, server_default="0", nullable=False),
        sa.Column("superseded", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("block", "log_index"),
        sqlite_strict=True,
    )
    op.create_table(
        "rate_cards",
        sa.Column("price_id", sa.Text(), nullable=False),
        sa.Column("card", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("price_id"),
        sqlite_strict=True,
    )
    op.create_table(
        "slots",
        sa.Column("signer", sa.Text(), nullable=False),
        sa.Column("nonce", _INTEGER, nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("reference", sa.Text(), nullable=True),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("calldata", sa.LargeBinary(), nullable=False),
        sa.Column("gas", _INTEGER, nullable=False),
        sa.Column("deadline", _INTEGER, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("tx_hash", sa.Text(), nullable=True),
        sa.Column("block", _INTEGER, nullable=True),
        sa.Column("created_at", _INTEGER, nullable=False),
        sa.PrimaryKeyConstraint("signer", "nonce"),
        sqlite_strict=True,
    )
    op.create_index("slots_open", "slots", ["signer", "nonce"], **_where(sa.text("state = 'open'")))
    op.create_table(
        "undo",
        sa.Column("block", _INTEGER, nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("before", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("block", "account"),
        sqlite_strict=True,
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", _INTEGER, nullable=False),
        sa.Column("expires_at", _INTEGER, nullable=True),
        sa.Column("revoked_at", _INTEGER, nullable=True),
        sa.Column("limits", sa.Text(), nullable=True),
        sa.Column("budget", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["account"], ["accounts.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("hash"),
        sqlite_strict=True,
    )
    op.create_table(
        "key_budgets",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("window", _INTEGER, server_default="0", nullable=False),
        sa.Column("used", _MONEY, server_default="0", nullable=False),
        sa.Column("next_call_at", _INTEGER, server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["account"], ["accounts.id"]),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_table(
        "attempts",
        sa.Column("tx_hash", sa.Text(), nullable=False),
        sa.Column("signer", sa.Text(), nullable=False),
        sa.Column("nonce", _INTEGER, nullable=False),
        sa.Column("raw", sa.LargeBinary(), nullable=False),
        sa.Column("max_fee", _MONEY, nullable=False),
        sa.Column("priority_fee", _MONEY, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("created_at", _INTEGER, nullable=False),
        sa.ForeignKeyConstraint(["signer", "nonce"], ["slots.signer", "slots.nonce"]),
        sa.PrimaryKeyConstraint("tx_hash"),
        sqlite_strict=True,
    )
    op.create_table(
        "holds",
        sa.Column("sequence", _INTEGER, autoincrement=False, nullable=False),
        sa.Column("epoch", _INTEGER, nullable=False),
        sa.Column("receipt_id", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("api_key", sa.Text(), nullable=True),
        sa.Column("budget", sa.Text(), nullable=True),
        sa.Column("budget_window", _INTEGER, nullable=True),
        sa.Column("attribution", sa.Text(), nullable=True),
        sa.Column("surface", sa.Text(), nullable=True),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("amount", _MONEY, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("created_at", _INTEGER, nullable=False),
        sa.Column("lease_until", _INTEGER, nullable=False),
        sa.Column("ended_at", _INTEGER, nullable=True),
        sa.ForeignKeyConstraint(["account"], ["accounts.id"]),
        sa.PrimaryKeyConstraint("sequence"),
        sa.UniqueConstraint("receipt_id"),
        sqlite_strict=True,
    )
    op.create_table(
        "attributed",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("sequence", _INTEGER, autoincrement=False, nullable=False),
        sa.ForeignKeyConstraint(["sequence"], ["holds.sequence"]),
        sa.PrimaryKeyConstraint("name", "value", "sequence"),
        sqlite_strict=True,
    )
    op.create_index("attributed_sequence", "attributed", ["sequence"])
    op.create_index("holds_account", "holds", ["account", "sequence"])
    op.create_index("holds_lost", "holds", ["sequence"], **_where(sa.text("state = 'lost'")))
    op.create_index("holds_open", "holds", ["sequence"], **_where(sa.text("state = 'held'")))
    op.create_table(
        "policy_orders",
        sa.Column("id", _INTEGER, autoincrement=True, nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("after_sequence", _INTEGER, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("created_at", _INTEGER, nullable=False),
        sa.ForeignKeyConstraint(["account"], ["accounts.id"]),
        sa.PrimaryKeyConstraint("id"),
        sqlite_strict=True,
    )
    op.create_table(
        "wallets",
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("balance", _MONEY, server_default="0", nullable=False),
        sa.Column("pending", _MONEY, server_default="0", nullable=False),
        sa.Column("exit_amount", _MONEY, server_default="0", nullable=False),
        sa.Column("exit_matures_at", _INTEGER, server_default="0", nullable=False),
        sa.Column("entries", _INTEGER, server_default="0", nullable=False),
        sa.Column("max_per_charge", _MONEY, nullable=True),
        sa.Column("max_per_window", _MONEY, nullable=True),
        sa.Column("window_seconds", _INTEGER, nullable=True),
        sa.Column("expires_at", _INTEGER, nullable=True),
        sa.Column("window", _INTEGER, server_default="0", nullable=False),
        sa.Column("spent", _MONEY, server_default="0", nullable=False),
        sa.Column("allowance", sa.Text(), nullable=True),
        sa.Column("allowance_spent", _MONEY, server_default="0", nullable=False),
        sa.Column("superseded", sa.Text(), nullable=True),
        sa.Column("held", _MONEY, server_default="0", nullable=False),
        sa.Column("unsettled", _MONEY, server_default="0", nullable=False),
        sa.Column("wanted", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["account"], ["accounts.id"]),
        sa.PrimaryKeyConstraint("account"),
        sqlite_strict=True,
    )
    op.create_table(
        "charges",
        sa.Column("sequence", _INTEGER, autoincrement=False, nullable=False),
        sa.Column("epoch", _INTEGER, nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("amount", _MONEY, nullable=False),
        sa.Column("excess", _MONEY, server_default="0", nullable=False),
        sa.Column("vendor_cost", _MONEY, nullable=True),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("receipt", sa.Text(), nullable=False),
        sa.Column("meter", sa.Text(), nullable=False),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.Column("parts", sa.Text(), nullable=True),
        sa.Column("usage", sa.Text(), nullable=True),
        sa.Column("price_id", sa.Text(), nullable=False),
        sa.Column("complete", _INTEGER, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("signer", sa.Text(), nullable=True),
        sa.Column("nonce", _INTEGER, nullable=True),
        sa.Column("block", _INTEGER, nullable=True),
        sa.Column("tx_hash", sa.Text(), nullable=True),
        sa.Column("captured_at", _INTEGER, nullable=False),
        sa.Column("settled_at", _INTEGER, nullable=True),
        sa.ForeignKeyConstraint(["sequence"], ["holds.sequence"]),
        sa.PrimaryKeyConstraint("sequence"),
        sqlite_strict=True,
    )
    op.create_index("charges_excess", "charges", ["sequence"], **_where(sa.text("excess != '0'")))
    op.create_index("charges_settled", "charges", ["block"], **_where(sa.text("state = 'settled'")))
    op.create_index("charges_slot", "charges", ["signer", "nonce"], **_where(sa.text("state = 'batched'")))
    op.create_index(
        "charges_unsettled",
        "charges",
        ["sequence"],
        **_where(sa.text("state IN ('queued', 'batched', 'rejected')")),
    )
    op.create_index("charges_voided", "charges", ["sequence"], **_where(sa.text("state = 'voided'")))
    op.create_table(
        "idempotency",
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("body_hash", sa.Text(), nullable=False),
        sa.Column("sequence", _INTEGER, autoincrement=False, nullable=False),
        sa.Column("media_type", sa.Text(), nullable=True),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", _INTEGER, nullable=False),
        sa.ForeignKeyConstraint(["sequence"], ["holds.sequence"]),
        sa.PrimaryKeyConstraint("scope", "key"),
        sqlite_strict=True,
    )
    op.create_index("idempotency_age", "idempotency", ["created_at"])
    op.create_index(
        "idempotency_answers", "idempotency", ["created_at"], **_where(sa.text("answer IS NOT NULL"))
    )
