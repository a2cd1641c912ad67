"""API keys: shown once, kept as hashes, bound to one account or to the platform."""

import hashlib
import secrets
from dataclasses import dataclass

import sqlalchemy as sa

from waterfall.ledger import schema
from waterfall.ledger.journal import now_ms
from waterfall.ledger.writer import Transaction


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the ledger knows it; `account` None: the platform's, which may do everything."""

    id: str
    account: str | None
    name: str
    created_at: int
    expires_at: int | None
    revoked_at: int | None


def new_secret() -> str:
    """A fresh key: 256 random bits behind a prefix that secret scanners can find."""
    return "wf_" + secrets.token_urlsafe(32)


def hash_of(secret: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()


def add_key(
    tx: Transaction, secret: str, *, account: str | None, name: str, expires_at: int | None
) -> ApiKey:
    """Register a key; registering the same secret again renews it, with this name and expiry."""
    values = {"account": account, "name": name, "expires_at": expires_at, "revoked_at": None}
    table = schema.api_keys
    hashed = hash_of(secret)
    if tx.run(table.update().where(table.c.hash == hashed).values(**values)).rowcount == 0:
        row = {"id": "key_" + secrets.token_hex(8), "hash": hashed, "created_at": now_ms(), **values}
        tx.run(table.insert(), row)
    return _read(tx.run(sa.select(table).where(table.c.hash == hashed)).one())


def revoke_others(tx: Transaction, key: ApiKey) -> None:
    """Revoke every other key of the same account and name: this one has taken their place."""
    table = schema.api_keys
    others = table.c.account.is_not_distinct_from(key.account), table.c.name == key.name, table.c.id != key.id
    tx.run(table.update().where(*others, table.c.revoked_at.is_(None)).values(revoked_at=now_ms()))


def all_keys(connection: sa.Connection) -> dict[str, ApiKey]:
    """Every key, by its hash."""
    return {row.hash: _read(row) for row in connection.execute(sa.select(schema.api_keys))}


def _read(row: sa.Row[tuple[object, ...]]) -> ApiKey:
    return ApiKey(row.id, row.account, row.name, row.created_at, row.expires_at, row.revoked_at)
