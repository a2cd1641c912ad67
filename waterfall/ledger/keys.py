"""API keys: shown once, kept as hashes, bound to one account or to the platform."""

import hashlib
import secrets
from dataclasses import dataclass, replace
from typing import TypeVar

import sqlalchemy as sa

from waterfall.errors import KeyNotFound
from waterfall.ledger import budgets, schema, shared
from waterfall.ledger.database import as_text
from waterfall.ledger.journal import now_ms
from waterfall.ledger.reader import Reader
from waterfall.ledger.shared import Shared
from waterfall.ledger.writer import Operation, Transaction, Writer
from waterfall.types import KeyLimits

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the ledger knows it; `account` None: the platform's, which may do everything."""

    id: str
    account: str | None
    name: str
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    limits: KeyLimits | None = None
    budget: str | None = None
    """What its calls are counted by, where they are."""


def new_secret() -> str:
    """A fresh key: 256 random bits behind a prefix that secret scanners can find."""
    return "wf_" + secrets.token_urlsafe(32)


def hash_of(secret: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Keyring:
    """Every key of a ledger, in memory: a call asks for one without waiting for the database."""

    def __init__(self, writer: Writer, reader: Reader) -> None:
        self._writer = writer
        self._reader = reader
        self._keys: dict[str, ApiKey] = {}
        self._version: str | None = None
        """Changes whenever any process changes keys."""

    def open(self, known: Shared) -> None:
        """Read them all, blocking.

        Raises:
            LedgerError
        """
        self._keys, self._version = self._reader.read_sync(_read_all), known.keys

    async def learn(self, known: Shared) -> None:
        """Read them anew if they have changed.

        Raises:
            LedgerError: they could not be read; what is known stays.
        """
        before = self._version
        if known.keys != before:
            read = await self._reader.read(_read_all)
            if self._version == before:  # else this process has changed them meanwhile
                self._keys, self._version = read, known.keys

    def find(self, secret: str) -> ApiKey | None:
        """The key with this secret, expired or revoked ones too."""
        return self._keys.get(hash_of(secret))

    async def add(
        self,
        secret: str,
        *,
        account: str | None,
        name: str,
        expires_at: int | None = None,
        limits: KeyLimits | None = None,
    ) -> ApiKey:
        """Register a key; registering the same secret again renews it, with this name, expiry and limits.

        Args:
            secret: is shown to its user, and not kept.
            account: which it opens; None: it is the platform's.
            name: what its user calls it.
            expires_at: Unix milliseconds; None: never.
            limits: what it may do, of an account's.

        Raises:
            LedgerError
        """
        self._version, key = await self._write(
            lambda tx: _add(tx, secret, account=account, name=name, expires_at=expires_at, limits=limits)
        )
        self._keys[hash_of(secret)] = key
        return key

    def of(self, account: str) -> list[ApiKey]:
        """An account's keys, expired and revoked ones too, oldest first."""
        its = [key for key in self._keys.values() if key.account == account]
        return sorted(its, key=lambda key: (key.created_at, key.id))

    async def revoke(self, id_: str) -> ApiKey:
        """Take a key of an account back, from now on and for ever.

        Raises:
            KeyNotFound, LedgerError
        """
        now = now_ms()
        return replace(await self.change(lambda tx: _end(tx, id_, {"revoked_at": now})), revoked_at=now)

    async def rotate(self, id_: str, secret: str, *, grace_ms: int) -> ApiKey:
        """Put a fresh key in the place of one, which is valid for a while longer.

        Args:
            id_: of the key that ends.
            secret: the fresh one's.
            grace_ms: for how long both are valid; 0: the old one is revoked.

        Raises:
            KeyNotFound, LedgerError
        """

        def run(tx: Transaction) -> ApiKey:
            now = now_ms()
            old = _end(tx, id_, {"expires_at": now + grace_ms} if grace_ms else {"revoked_at": now})
            return _add(
                tx,
                secret,
                account=old.account,
                name=old.name,
                expires_at=old.expires_at,
                limits=old.limits,
                budget=old.budget,
            )

        return await self.change(run)

    async def set_platform_key(self, secret: str, name: str) -> None:
        """Make this the platform's only key of this name.

        Raises:
            LedgerError
        """
        await self.change(lambda tx: _revoke_others(tx, _add(tx, secret, account=None, name=name)))

    async def change(self, operation: Operation[T]) -> T:
        """Do durably what changes keys in whatever way, and know them as they are then.

        Raises:
            LedgerError
        """
        try:
            version, result = await self._write(operation)
        except KeyNotFound:  # it may have ended without our knowing, where that was answered by an error
            self._keys = await self._reader.read(_read_all)
            raise
        self._keys = await self._reader.read(_read_all)
        self._version = version  # not before: what could not be read has to be read again
        return result

    async def _write(self, operation: Operation[T]) -> tuple[str, T]:
        version = secrets.token_hex(8)

        def run(tx: Transaction) -> T:
            shared.publish(tx, {shared.KEYS: version})
            return operation(tx)

        return version, await self._writer.run(run)


def _add(
    tx: Transaction,
    secret: str,
    *,
    account: str | None,
    name: str,
    expires_at: int | None = None,
    limits: KeyLimits | None = None,
    budget: str | None = None,
) -> ApiKey:
    values = {
        "account": account,
        "name": name,
        "expires_at": expires_at,
        "revoked_at": None,
        "limits": None if limits is None else limits.model_dump_json(exclude_defaults=True),
    }
    table = schema.api_keys
    hashed = hash_of(secret)
    if tx.run(table.update().where(table.c.hash == hashed).values(**values)).rowcount == 0:
        id_ = "key_" + secrets.token_hex(8)
        tx.run(table.insert(), {"id": id_, "hash": hashed, "created_at": now_ms(), **values})
    key = _read(tx.run(sa.select(table).where(table.c.hash == hashed)).one())
    if limits is None or not limits.are_counted or key.budget is not None:
        return key
    budget = key.id if budget is None else budget
    tx.insert_new(schema.key_budgets, {"id": budget, "account": account})
    tx.run(table.update().where(table.c.id == key.id).values(budget=budget))
    return replace(key, budget=budget)


def _end(tx: Transaction, id_: str, values: dict[str, int]) -> ApiKey:
    """End a valid key of an account; as it was before.

    Raises:
        KeyNotFound
    """
    table = schema.api_keys
    its = table.c.id == as_text(id_), table.c.account.is_not(None), table.c.revoked_at.is_(None)
    row = tx.run(sa.select(table).where(*its).with_for_update()).one_or_none()
    if row is None or (row.expires_at is not None and row.expires_at <= now_ms()):
        raise KeyNotFound(key=id_)
    if "expires_at" in values and row.expires_at is not None:
        values = {"expires_at": min(values["expires_at"], row.expires_at)}
    tx.run(table.update().where(*its).values(**values))
    return _read(row)


def _revoke_others(tx: Transaction, key: ApiKey) -> None:
    """Revoke every other key of the same account and name: this one has taken their place."""
    table = schema.api_keys
    others = table.c.account.is_not_distinct_from(key.account), table.c.name == key.name, table.c.id != key.id
    tx.run(table.update().where(*others, table.c.revoked_at.is_(None)).values(revoked_at=now_ms()))


def _read_all(connection: sa.Connection) -> dict[str, ApiKey]:
    """By their hashes."""
    return {row.hash: _read(row) for row in connection.execute(sa.select(schema.api_keys))}


def spent(connection: sa.Connection, key: ApiKey, now: int) -> int | None:
    """What is used of a key's budget, in the window of now; None where it has none."""
    if key.budget is None or key.limits is None or key.limits.budget is None:
        return None
    budget = budgets.find(connection.execute, key.budget)
    if budget is None:
        return 0
    budget.turn(key.limits, now)
    return budget.used


def _read(row: sa.Row[tuple[object, ...]]) -> ApiKey:
    limits = None if row.limits is None else KeyLimits.model_validate_json(row.limits)
    ended = row.expires_at, row.revoked_at
    return ApiKey(row.id, row.account, row.name, row.created_at, *ended, limits, row.budget)
