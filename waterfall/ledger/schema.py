"""The tables. Money is exact text (`Units`): a 64-bit integer holds only 9.2 million USD of credit units.

Times are Unix milliseconds of the host's clock unless a name says block time (seconds).
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

VERSION = "3"

UNSETTLED = ("queued", "batched", "rejected")
"""States of a charge that is owed and not on the chain."""

metadata = sa.MetaData()


class Units(TypeDecorator[int]):
    """Credit units: int in Python, exact in the database."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        """To the database."""
        return None if value is None else str(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> int | None:  # noqa: ARG002
        """From the database."""
        return None if value is None else int(value)


def _table(name: str, *columns: Any) -> sa.Table:
    return sa.Table(name, metadata, *columns, sqlite_strict=True)


def _column(name: str, type_: Any = sa.Text, *args: Any, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, type_, *args, **{"nullable": False, **options})


def _money(name: str) -> sa.Column[Any]:
    return _column(name, Units, server_default="0")


# What this ledger is of: chain id, vault, platform, schema version, epoch, and the indexer's cursor.
meta = _table("meta", _column("key", primary_key=True), _column("value"))

accounts = _table(
    "accounts",
    _column("id", primary_key=True),
    _column("owner"),
    _column("label_hash"),
    _column("label", nullable=True),  # unknown for accounts first seen on the chain
    _column("created_at", sa.Integer),
)

wallets = _table(
    "wallets",
    _column("account", sa.Text, sa.ForeignKey("accounts.id"), primary_key=True),
    # Projection: derived only from chain events; a rewind restores it.
    _money("balance"),
    _money("pending"),  # the part of `balance` whose arrival is not final yet
    _money("exit_amount"),
    _column("exit_matures_at", sa.Integer, server_default="0"),  # block time
    _column("entries", sa.Integer, server_default="0"),
    _column("max_per_charge", Units, nullable=True),
    _column("max_per_window", Units, nullable=True),
    _column("window_seconds", sa.Integer, nullable=True),
    _column("expires_at", sa.Integer, nullable=True),  # block time
    _column("window", sa.Integer, server_default="0"),
    _money("spent"),  # in window number `window`
    _column("allowance", nullable=True),  # JSON: the owner's, as last asked for on the chain
    _money("allowance_spent"),  # since the owner's first allowance, while there is one
    _column("superseded", nullable=True),  # JSON: limits that still bind, as their loosening is not final
    # Reservations: what the chain does not know yet.
    _money("held"),
    _money("unsettled"),
    _column("wanted", nullable=True),  # JSON: a policy asked for and not yet seen on the chain
)
# What an undo row keeps; `pending` and `superseded` follow from `raises` instead.
UNDONE = (
    "balance",
    "exit_amount",
    "exit_matures_at",
    "entries",
    "max_per_charge",
    "max_per_window",
    "window_seconds",
    "expires_at",
    "window",
    "spent",
    "allowance",
    "allowance_spent",
)

api_keys = _table(
    "api_keys",
    _column("id", primary_key=True),
    _column("hash", unique=True),  # sha256: the keys are 256 random bits, so nothing slower is needed
    _column("account", sa.Text, sa.ForeignKey("accounts.id"), nullable=True),  # null: platform key
    _column("name"),
    _column("created_at", sa.Integer),
    _column("expires_at", sa.Integer, nullable=True),
    _column("revoked_at", sa.Integer, nullable=True),
)

# One row per call. held → captured | released | lost
holds = _table(
    "holds",
    _column("sequence", sa.Integer, primary_key=True),  # with the epoch: the charge id
    _column("epoch", sa.Integer),
    _column("receipt_id", unique=True),
    _column("account", sa.Text, sa.ForeignKey("accounts.id")),
    _column("api_key", nullable=True),
    _column("model"),
    _column("amount", Units),  # the provable maximum
    _column("state"),
    _column("reason", nullable=True),  # why released or lost
    _column("created_at", sa.Integer),
    _column("lease_until", sa.Integer),
    _column("ended_at", sa.Integer, nullable=True),
)
holds.dialect_options["sqlite"]["autoincrement"] = True
sa.Index("holds_open", holds.c.sequence, sqlite_where=holds.c.state == "held")
sa.Index("holds_lost", holds.c.sequence, sqlite_where=holds.c.state == "lost")

# One row per captured hold. queued → batched → settled → final; rejected is retried.
charges = _table(
    "charges",
    _column("sequence", sa.Integer, sa.ForeignKey("holds.sequence"), primary_key=True),
    _column("epoch", sa.Integer),
    _column("account"),
    _column("amount", Units),
    _money("excess"),  # metered beyond the hold: the platform's loss
    _column("digest"),
    _column("receipt"),  # JSON of the UsageReceipt
    _column("meter"),
    _column("signature"),
    _column("usage", nullable=True),  # JSON, the provider's whole object
    _column("price_id"),
    _column("complete", sa.Integer),  # 0: the provider's usage never came
    _column("state"),
    _column("reason", nullable=True),
    _column("signer", nullable=True),  # with `nonce`: the slot that carries it
    _column("nonce", sa.Integer, nullable=True),
    _column("block", sa.Integer, nullable=True),
    _column("tx_hash", nullable=True),
    _column("captured_at", sa.Integer),
    _column("settled_at", sa.Integer, nullable=True),
)
sa.Index(
    "charges_unsettled",
    charges.c.sequence,
    sqlite_where=charges.c.state.in_(UNSETTLED),
)
sa.Index("charges_settled", charges.c.block, sqlite_where=charges.c.state == "settled")
sa.Index("charges_account", charges.c.account, charges.c.sequence)

rate_cards = _table("rate_cards", _column("price_id", primary_key=True), _column("card"))

idempotency = _table(
    "idempotency",
    _column("scope", primary_key=True),  # whose keys, and of what, these are
    _column("key", primary_key=True),
    _column("body_hash"),
    _column("sequence", sa.Integer, sa.ForeignKey("holds.sequence")),
    _column("created_at", sa.Integer),
)

policy_orders = _table(
    "policy_orders",
    _column("id", sa.Integer, primary_key=True),
    _column("account", sa.Text, sa.ForeignKey("accounts.id")),
    _column("policy"),  # JSON
    _column("after_sequence", sa.Integer),  # waits for holds and charges up to here
    _column("state"),  # waiting → sent → done | replaced
    _column("created_at", sa.Integer),
)

# The journal row is the nonce's allocation; there is no other counter.
slots = _table(
    "slots",
    _column("signer", primary_key=True),
    _column("nonce", sa.Integer, primary_key=True),
    _column("purpose"),  # settle | policy | sweep
    _column("reference", nullable=True),
    _column("target"),
    _column("calldata", sa.LargeBinary),
    _column("gas", sa.Integer),
    _column("deadline", sa.Integer),  # block time; 0: none
    _column("state"),  # open → mined | reverted
    _column("tx_hash", nullable=True),
    _column("block", sa.Integer, nullable=True),
    _column("created_at", sa.Integer),
)
sa.Index("slots_open", slots.c.signer, slots.c.nonce, sqlite_where=slots.c.state == "open")

attempts = _table(
    "attempts",
    _column("tx_hash", primary_key=True),
    _column("signer"),
    _column("nonce", sa.Integer),
    _column("raw", sa.LargeBinary),
    _column("max_fee", Units),  # wei
    _column("priority_fee", Units),  # wei
    _column("state"),  # signed → accepted | refused | unknown
    _column("detail", nullable=True),
    _column("created_at", sa.Integer),
    sa.ForeignKeyConstraint(["signer", "nonce"], ["slots.signer", "slots.nonce"]),
)

blocks = _table(
    "blocks",
    _column("number", sa.Integer, primary_key=True),
    _column("hash"),
    _column("timestamp", sa.Integer),  # block time
)

events = _table(
    "events",
    _column("block", sa.Integer, primary_key=True),
    _column("log_index", sa.Integer, primary_key=True),
    _column("tx_hash"),
    _column("timestamp", sa.Integer),  # block time
    _column("name"),
    _column("account", nullable=True),
    _column("charge_id", nullable=True),  # decimal
    _column("amount", Units, nullable=True),
    _column("entry", sa.Integer, nullable=True),
    _column("source", nullable=True),  # the account that an allocation came from
    _column("source_entry", sa.Integer, nullable=True),
    _column("data"),  # JSON
)
sa.Index("events_account", events.c.account, events.c.block, events.c.log_index)
sa.Index("events_source", events.c.source, sqlite_where=events.c.source.is_not(None))
sa.Index("events_charge", events.c.charge_id)

# Wallets as they were before a block that is not final yet.
undo = _table(
    "undo",
    _column("block", sa.Integer, primary_key=True),
    _column("account", primary_key=True),
    _column("before"),  # JSON of the UNDONE columns
)

# What loosened a wallet in a block that does not count yet: credit that arrived, or a policy that was replaced.
raises = _table(
    "raises",
    _column("block", sa.Integer, primary_key=True),
    _column("log_index", sa.Integer, primary_key=True),
    _column("account"),
    _money("amount"),
    _column("superseded", nullable=True),  # JSON of the policy or allowance before
)
