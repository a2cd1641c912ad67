"""The tables. Money is exact (`Units`): a 64-bit integer holds only 9.2 million USD of credit units.

Times are Unix milliseconds of the host's clock unless a name says block time (seconds); leases are by the database's
own clock (`now_ms`), as hosts differ. Every change of a table needs a migration, see `migrations`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.types import TypeDecorator

REVISION = "0001"
"""The newest migration, whose tables these are."""

UNSETTLED = ("queued", "batched", "rejected")
"""States of a charge that is owed and not on the chain."""

metadata = sa.MetaData()


class Units(TypeDecorator[int]):
    """Credit units: int in Python, exact in the database; text in SQLite, whose numbers would turn into floats."""

    impl = sa.Numeric(39, 0)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> Any:
        """The column's type."""
        return dialect.type_descriptor(sa.Text() if dialect.name == "sqlite" else sa.Numeric(39, 0))

    def process_bind_param(self, value: int | None, dialect: sa.Dialect) -> Any:
        """To the database."""
        return str(value) if value is not None and dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> int | None:  # noqa: ARG002
        """From the database."""
        return None if value is None else int(value)


class now_ms(sa.sql.functions.FunctionElement[int]):  # noqa: N801 - used like SQL's own functions
    """The database's clock: Unix milliseconds."""

    type = sa.BigInteger()
    inherit_cache = True


@compiles(now_ms, "sqlite")
def _now_in_sqlite(*_: Any, **__: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"


@compiles(now_ms, "postgresql")
def _now_in_postgres(*_: Any, **__: Any) -> str:
    return "(EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT"


class _each(sa.sql.functions.FunctionElement[Any]):  # noqa: N801 - likewise
    """The members of one parameter, one row each: a statement is compiled once however many there are."""

    name = "each"
    inherit_cache = True


@compiles(_each, "sqlite")
def _each_in_sqlite(element: _each, compiler: Any, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


@compiles(_each, "postgresql")
def _each_in_postgres(element: _each, compiler: Any, **options: Any) -> str:
    return f"unnest({compiler.process(element.clauses, **options)})"


class _Members(TypeDecorator[Sequence[Any]]):
    """What `_each` takes apart: JSON in SQLite, an array in PostgreSQL."""

    impl = sa.Text
    cache_ok = True

    def __init__(self, of: type[sa.types.TypeEngine[Any]]) -> None:
        super().__init__()
        self.of = of

    def load_dialect_impl(self, dialect: sa.Dialect) -> Any:
        """The parameter's type."""
        return dialect.type_descriptor(sa.Text() if dialect.name == "sqlite" else sa.ARRAY(self.of))

    def process_bind_param(self, value: Sequence[Any] | None, dialect: sa.Dialect) -> Any:
        """To the database."""
        return orjson.dumps(value).decode() if dialect.name == "sqlite" else value


def among(column: sa.Column[Any], keys: Iterable[Any]) -> sa.ColumnElement[bool]:
    """That a column has one of any number of keys, numbers or text."""
    is_text = isinstance(column.type, sa.Text)
    keys_ = sa.literal(list(keys), _Members(sa.Text if is_text else sa.BigInteger))
    # As the column of PostgreSQL's `unnest` has the name of its table, that is given the one SQLite's has.
    return column.in_(sa.select(_each(keys_).table_valued("value", name="value").c.value))


_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_BYTES = sa.LargeBinary()


def _table(name: str, *columns: Any) -> sa.Table:
    return sa.Table(name, metadata, *columns, sqlite_strict=True)


def _column(name: str, type_: Any = sa.Text, *args: Any, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, type_, *args, **{"nullable": False, "autoincrement": False, **options})


def is_(column: sa.Column[Any], *states: str) -> sa.ColumnElement[bool]:
    """That a state is one of these, spelled out: SQLite uses a partial index for no parameter."""
    literals: list[sa.ColumnElement[str]] = [sa.literal_column(f"'{state}'") for state in states]
    return column == literals[0] if len(literals) == 1 else column.in_(literals)


def _index(name: str, *columns: sa.Column[Any], where: sa.ColumnElement[bool] | None = None) -> None:
    sa.Index(name, *columns, sqlite_where=where, postgresql_where=where)


def _money(name: str) -> sa.Column[Any]:
    return _column(name, Units, server_default="0")


# What this ledger is of: chain id, vault, platform, epoch; and what its processes tell each other.
meta = _table("meta", _column("key", primary_key=True), _column("value"))

accounts = _table(
    "accounts",
    _column("id", primary_key=True),
    _column("owner"),
    _column("label_hash"),
    _column("label", nullable=True),  # unknown for accounts first seen on the chain
    _column("created_at", _INTEGER),
)

wallets = _table(
    "wallets",
    _column("account", sa.Text, sa.ForeignKey("accounts.id"), primary_key=True),
    # Projection: derived only from chain events; a rewind restores it.
    _money("balance"),
    _money("pending"),  # the part of `balance` whose arrival is not final yet
    _money("exit_amount"),
    _column("exit_matures_at", _INTEGER, server_default="0"),  # block time
    _column("entries", _INTEGER, server_default="0"),
    _column("max_per_charge", Units, nullable=True),
    _column("max_per_window", Units, nullable=True),
    _column("window_seconds", _INTEGER, nullable=True),
    _column("expires_at", _INTEGER, nullable=True),  # block time
    _column("window", _INTEGER, server_default="0"),
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
    _column("created_at", _INTEGER),
    _column("expires_at", _INTEGER, nullable=True),
    _column("revoked_at", _INTEGER, nullable=True),
    _column("limits", nullable=True),
    _column(
        "budget", nullable=True
    ),  # what its calls are counted by: its own id, or that of the key it replaces
)

# What keys have spent and how often they have called, where that is limited.
key_budgets = _table(
    "key_budgets",
    _column("id", primary_key=True),
    _column("account", sa.Text, sa.ForeignKey("accounts.id")),
    _column("window", _INTEGER, server_default="0"),
    _money("used"),
    _column("next_call_at", _INTEGER, server_default="0"),
)

# One row per call. held → captured | released | lost
holds = _table(
    "holds",
    _column("sequence", _INTEGER, primary_key=True),  # with the epoch: the charge id
    _column("epoch", _INTEGER),
    _column("receipt_id", unique=True),
    _column("account", sa.Text, sa.ForeignKey("accounts.id")),
    _column("api_key", nullable=True),
    _column("budget", nullable=True),  # of its key: what it is counted by, in which window
    _column("budget_window", _INTEGER, nullable=True),
    _column("attribution", nullable=True),  # whom and what it was for
    _column("surface", nullable=True),  # in whose words it was called
    _column("model"),
    _column("amount", Units),  # the provable maximum
    _column("state"),
    _column("reason", nullable=True),  # why released or lost
    _column("created_at", _INTEGER),
    _column("lease_until", _INTEGER),
    _column("ended_at", _INTEGER, nullable=True),
)
_index("holds_open", holds.c.sequence, where=is_(holds.c.state, "held"))
_index("holds_lost", holds.c.sequence, where=is_(holds.c.state, "lost"))
_index("holds_account", holds.c.account, holds.c.sequence)

# The same, to be searched.
attributed = _table(
    "attributed",
    _column("name", primary_key=True),
    _column("value", primary_key=True),
    _column("sequence", _INTEGER, sa.ForeignKey("holds.sequence"), primary_key=True),
)
_index("attributed_sequence", attributed.c.sequence)
charge_sequence = sa.Sequence("charge_sequence", metadata=metadata)
"""Where many processes draw `holds.sequence` from."""

# One row per captured hold. queued → batched → settled → final; rejected is retried.
charges = _table(
    "charges",
    _column("sequence", _INTEGER, sa.ForeignKey("holds.sequence"), primary_key=True),
    _column("epoch", _INTEGER),
    _column("account"),
    _column("amount", Units),
    _money("excess"),  # metered beyond the hold: the platform's loss
    _column("vendor_cost", Units, nullable=True),  # what the call cost the platform; null: not known
    _column("digest"),
    _column("receipt"),  # JSON of the UsageReceipt
    _column("meter"),
    _column("signature"),
    _column("parts", nullable=True),  # JSON of what was used and the receipt has no field for
    _column("usage", nullable=True),  # JSON, the provider's whole object
    _column("price_id"),
    _column("complete", _INTEGER),  # 0: the provider's usage never came
    _column("state"),
    _column("reason", nullable=True),
    _column("signer", nullable=True),  # with `nonce`: the slot that carries it
    _column("nonce", _INTEGER, nullable=True),
    _column("block", _INTEGER, nullable=True),
    _column("tx_hash", nullable=True),
    _column("captured_at", _INTEGER),
    _column("settled_at", _INTEGER, nullable=True),
)
is_unsettled = is_(charges.c.state, *UNSETTLED)
"""To be said of charges even where one state is meant: those that are owed have an index, as they are few."""
_index("charges_unsettled", charges.c.sequence, where=is_unsettled)
_index("charges_settled", charges.c.block, where=is_(charges.c.state, "settled"))
is_voided = is_(charges.c.state, "voided")
is_beyond_hold = charges.c.excess != sa.literal_column("'0'")
_index("charges_voided", charges.c.sequence, where=is_voided)
_index("charges_excess", charges.c.sequence, where=is_beyond_hold)
_index("charges_slot", charges.c.signer, charges.c.nonce, where=is_(charges.c.state, "batched"))

rate_cards = _table("rate_cards", _column("price_id", primary_key=True), _column("card"))

idempotency = _table(
    "idempotency",
    _column("scope", primary_key=True),  # whose keys, and of what, these are
    _column("key", primary_key=True),
    _column("body_hash"),
    _column("sequence", _INTEGER, sa.ForeignKey("holds.sequence")),
    _column("media_type", nullable=True),
    _column("answer", _BYTES, nullable=True),  # as it was given, for as long as it is kept
    _column("created_at", _INTEGER),
)

_index("idempotency_age", idempotency.c.created_at)
has_answer = idempotency.c.answer.is_not(None)
_index("idempotency_answers", idempotency.c.created_at, where=has_answer)

policy_orders = _table(
    "policy_orders",
    _column("id", _INTEGER, primary_key=True, autoincrement=True),
    _column("account", sa.Text, sa.ForeignKey("accounts.id")),
    _column("policy"),  # JSON
    _column("after_sequence", _INTEGER),  # waits for holds and charges up to here
    _column("state"),  # waiting → sent → done | replaced
    _column("created_at", _INTEGER),
)

# The journal row is the nonce's allocation; there is no other counter.
slots = _table(
    "slots",
    _column("signer", primary_key=True),
    _column("nonce", _INTEGER, primary_key=True),
    _column("purpose"),  # settle | policy | sweep
    _column("reference", nullable=True),
    _column("target"),
    _column("calldata", _BYTES),
    _column("gas", _INTEGER),
    _column("deadline", _INTEGER),  # block time; 0: none
    _column("state"),  # open → mined | reverted
    _column("tx_hash", nullable=True),
    _column("block", _INTEGER, nullable=True),
    _column("created_at", _INTEGER),
)
_index("slots_open", slots.c.signer, slots.c.nonce, where=is_(slots.c.state, "open"))

attempts = _table(
    "attempts",
    _column("tx_hash", primary_key=True),
    _column("signer"),
    _column("nonce", _INTEGER),
    _column("raw", _BYTES),
    _column("max_fee", Units),  # wei
    _column("priority_fee", Units),  # wei
    _column("state"),  # signed → accepted | refused | unknown
    _column("detail", nullable=True),
    _column("created_at", _INTEGER),
    sa.ForeignKeyConstraint(["signer", "nonce"], ["slots.signer", "slots.nonce"]),
)

blocks = _table(
    "blocks",
    _column("number", _INTEGER, primary_key=True),
    _column("hash"),
    _column("timestamp", _INTEGER),  # block time
)

events = _table(
    "events",
    _column("block", _INTEGER, primary_key=True),
    _column("log_index", _INTEGER, primary_key=True),
    _column("tx_hash"),
    _column("timestamp", _INTEGER),  # block time
    _column("name"),
    _column("account", nullable=True),
    _column("charge_id", nullable=True),  # decimal
    _column("amount", Units, nullable=True),
    _column("entry", _INTEGER, nullable=True),
    _column("source", nullable=True),  # the account that an allocation came from
    _column("source_entry", _INTEGER, nullable=True),
    _column("data"),  # JSON
)
_index("events_account", events.c.account, events.c.block, events.c.log_index)
_index("events_source", events.c.source, where=events.c.source.is_not(None))
_index("events_charge", events.c.charge_id)

# Wallets as they were before a block that is not final yet.
undo = _table(
    "undo",
    _column("block", _INTEGER, primary_key=True),
    _column("account", primary_key=True),
    _column("before"),  # JSON of the UNDONE columns
)

# What loosened a wallet in a block that does not count yet: credit that arrived, or a policy that was replaced.
raises = _table(
    "raises",
    _column("block", _INTEGER, primary_key=True),
    _column("log_index", _INTEGER, primary_key=True),
    _column("account"),
    _money("amount"),
    _column("superseded", nullable=True),  # JSON of the policy or allowance before
)
