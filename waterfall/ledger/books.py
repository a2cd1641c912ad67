"""The books of one commit: wallets read once under lock, changed in memory by many operations, written once.

Every operation on the path of a call goes through here: hold, capture, release, lose. They share a commit with
whatever else is waiting, so what they write is gathered and written in as few statements as there are tables.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from waterfall.errors import AccountNotFound, HoldNotOpen, InvalidApiKey, LedgerError
from waterfall.ledger import budgets, schema
from waterfall.ledger.budgets import Budget, Draw
from waterfall.ledger.database import Database, as_text
from waterfall.ledger.wallet import Wallet, wallet_of
from waterfall.types import Attribution, KeyLimits, Surface

SEQUENCE_BITS = 32

_HOLD = (
    *("sequence", "epoch", "receipt_id", "account", "api_key", "budget", "budget_window"),
    *("attribution", "surface", "model", "amount", "created_at", "lease_ms"),
)
_END = ("state", "reason", "ended_at")
_CHARGE = (
    "sequence",
    "epoch",
    "account",
    "amount",
    "excess",
    "vendor_cost",
    "digest",
    "receipt",
    "meter",
    "signature",
    "parts",
    "usage",
    "price_id",
    "complete",
    "state",
    "captured_at",
)
_RESERVE = ("held", "unsettled", "its_account")
_ITS_KEY = schema.idempotency.update().where(
    schema.idempotency.c.scope == sa.bindparam("its_scope"),
    schema.idempotency.c.key == sa.bindparam("its_key"),
)
_ITS_KEY_AGAIN = _ITS_KEY.values({name: sa.bindparam(name) for name in ("sequence", "created_at")})
_ITS_ANSWER = _ITS_KEY.values({name: sa.bindparam(name) for name in ("media_type", "answer")})


_BUDGET = ("window", "used", "next_call_at")
_ITS_BUDGET = (
    schema.key_budgets.update()
    .where(schema.key_budgets.c.id == sa.bindparam("its_id"))
    .values({name: sa.bindparam(name) for name in _BUDGET})
)


def _row_of(budget: Budget) -> dict[str, Any]:
    return {"its_id": budget.id, **{name: getattr(budget, name) for name in _BUDGET}}


@dataclass(frozen=True, slots=True)
class Hold:
    """Credit set aside for one call."""

    sequence: int
    charge_id: int
    receipt_id: str
    account: str
    amount: int
    """The provable maximum, credit units."""
    output_tokens: int
    """How much output it pays for."""
    draw: Draw | None = None
    """What it is counted by, of its key's budget."""


@dataclass(frozen=True, slots=True)
class Once:
    """An idempotency key: what is asked for under it happens once."""

    scope: str
    """Whose keys, and of what, these are."""
    key: str
    body_hash: str
    """Hash of the request, so that a reused key is told apart from a repeat."""


class HoldsChanged(Exception):
    """A hold that was to end is not open any more."""


class Statements:
    """What books execute, in the words of a database's driver."""

    def __init__(self, database: Database) -> None:
        holds, charges, wallets = schema.holds, schema.charges, schema.wallets
        self.read_wallets = database.compiled(
            sa.select(wallets.c.account, *(wallets.c[name] for name in Wallet.COLUMNS))
            .where(database.one_of(wallets.c.account))
            .order_by(wallets.c.account)
            .with_for_update(),
            "keys",
        )
        lease = schema.now_ms() + sa.bindparam("lease_ms")
        self.insert_hold = database.compiled(
            holds.insert().values(
                {
                    **{name: sa.bindparam(name) for name in _HOLD[:-1]},
                    "state": sa.literal_column("'held'"),
                    "lease_until": lease,
                }
            ),
            *_HOLD,
        )
        self.end_holds = database.compiled(
            holds.update()
            .where(database.one_of(holds.c.sequence), schema.is_(holds.c.state, "held"))
            .values({name: sa.bindparam(name) for name in _END}),
            *_END,
            "keys",
        )
        self.insert_charge = database.compiled(
            charges.insert().values({name: sa.bindparam(name) for name in _CHARGE}), *_CHARGE
        )
        self.reserve = database.compiled(
            wallets.update()
            .where(wallets.c.account == sa.bindparam("its_account"))
            .values({name: sa.bindparam(name) for name in _RESERVE[:-1]}),
            *_RESERVE,
        )


class Books:
    """The books of one commit."""

    def __init__(
        self, connection: sa.Connection, database: Database, statements: Statements, now: int
    ) -> None:
        """Open them.

        Args:
            connection: within a transaction.
            database: its kind.
            statements: compiled for it.
            now: Unix milliseconds of the host's clock.
        """
        raw = connection.connection.driver_connection
        if raw is None:
            raise LedgerError(reason="the database connection is closed")
        self.now = now
        self._connection = connection
        self._raw = raw
        self._database = database
        self._statements = statements
        self._wallets: dict[str, Wallet] = {}
        self._opened: list[Hold] = []
        self._holds: list[tuple[Any, ...]] = []
        self._ends: list[tuple[str, str | None, int]] = []
        self._ended: list[Hold] = []
        self._charges: list[tuple[Any, ...]] = []
        self._keys: list[dict[str, Any]] = []
        self._keys_again: list[dict[str, Any]] = []
        self._asked: list[tuple[Once, Hold]] = []
        self._answers: list[dict[str, Any]] = []
        self._reserved: list[tuple[Wallet, int, int]] = []
        self._budgets: dict[str, Budget] = {}
        self._attributed: list[dict[str, Any]] = []
        self._counted: list[tuple[Budget, Budget]] = []
        """Budgets that were changed, each as it was before."""

    # ── What operations do ───────────────────────────────────────────────────────────────────────────

    def wallet(self, account: str) -> Wallet:
        """An account's wallet as the books have it now.

        Raises:
            AccountNotFound
        """
        if account not in self._wallets:
            self.read((as_text(account),))
        try:
            return self._wallets[account]
        except KeyError:
            raise AccountNotFound(account=account) from None

    def open(
        self,
        hold: Hold,
        *,
        epoch: int,
        api_key: str | None,
        attribution: Attribution | None = None,
        surface: Surface | None,
        model: str,
        lease_ms: int,
    ) -> None:
        """Open a hold and set its amount aside."""
        self._opened.append(hold)
        self._holds.append(
            (
                hold.sequence,
                epoch,
                hold.receipt_id,
                hold.account,
                api_key,
                None if hold.draw is None else hold.draw.budget,
                None if hold.draw is None else hold.draw.window,
                None if attribution is None else attribution.model_dump_json(exclude_defaults=True),
                surface,
                model,
                self._database.money(hold.amount),
                self.now,
                lease_ms,
            )
        )
        self._reserve(hold.account, held=hold.amount)
        self._count(hold, hold.amount)
        for name, value in () if attribution is None else attribution.pairs:
            self._attributed.append({"name": name, "value": value, "sequence": hold.sequence})

    def opened(self, receipt_id: str) -> Hold | None:
        """The hold of a receipt that is opened in these books, which nobody can read yet."""
        return next((hold for hold in self._opened if hold.receipt_id == receipt_id), None)

    def end(self, hold: Hold, state: str, reason: str | None) -> None:
        """End a hold and give its amount back. That it was open shows when the books are written."""
        self._ends.append((state, reason, hold.sequence))
        self._ended.append(hold)
        self._reserve(hold.account, held=-hold.amount)
        self._count(hold, -hold.amount)

    def charge(self, hold: Hold, amount: int, excess: int, vendor_cost: int | None, *columns: Any) -> None:
        """Add the charge of a hold, which is owed from now on.

        Args:
            hold: its hold.
            amount: credit units; zero never goes to the chain.
            excess: credit units metered beyond the hold.
            vendor_cost: credit units that the call cost the platform; None: nobody knows.
            columns: `digest` to `complete` of its row, in the order of the table.
        """
        money = self._database.money
        state = "queued" if amount else "free"
        epoch = hold.charge_id >> SEQUENCE_BITS
        cost = None if vendor_cost is None else money(vendor_cost)
        row = (hold.sequence, epoch, hold.account, money(amount), money(excess), cost, *columns)
        row = (*row, state, self.now)
        self._charges.append(row)
        self._reserve(hold.account, unsettled=amount)
        self._count(hold, amount)

    def remember(self, once: Once, hold: Hold, *, again: bool = False) -> None:
        """Keep which hold an idempotency key stands for; `again`: from now on, and no more for an earlier one."""
        self._asked.append((once, hold))
        stands_for = {"sequence": hold.sequence, "created_at": self.now}
        if again:
            self._keys_again.append({"its_scope": once.scope, "its_key": once.key, **stands_for})
        else:
            row = {"scope": once.scope, "key": once.key, "body_hash": once.body_hash, **stands_for}
            self._keys.append(row)

    def asked_under(self, once: Once) -> tuple[Once, Hold] | None:
        """What was asked for under this key in these books, which nobody can read yet."""
        for earlier, hold in self._asked:
            if (earlier.scope, earlier.key) == (once.scope, once.key):
                return earlier, hold
        return None

    def keep_answer(self, once: Once, media_type: str, answer: bytes) -> None:
        """Keep the answer that a repeat is given."""
        row = {"its_scope": once.scope, "its_key": once.key, "media_type": media_type, "answer": answer}
        self._answers.append(row)

    def run(self, statement: sa.Executable) -> sa.CursorResult[Any]:
        """Execute a SQLAlchemy statement at once, for what is not gathered; a write, as the operation's last step."""
        return self._connection.execute(statement)

    def draw(self) -> int:
        """A new sequence."""
        return self._database.draw()

    def turn(self, budget: str, limits: KeyLimits, *, counts_call: bool) -> tuple[Draw, int]:
        """Let a key's budget go on to the window of now, and count a call; what the call draws on, and what is used of it.

        Raises:
            RateLimited
            InvalidApiKey: the key was erased.
        """
        its = self._budget(budget)
        if its is None:
            raise InvalidApiKey
        self._counted.append((its, replace(its)))
        draw = its.turn(limits, self.now)
        if counts_call:
            its.count_call(limits, self.now)
        return draw, its.used

    def _budget(self, id_: str) -> Budget | None:
        """A key's budget as the books have it now: nobody else changes it while the wallet of its account is locked."""
        if id_ not in self._budgets:
            found = budgets.find(self.run, id_)
            if found is None:
                return None
            self._budgets[id_] = found
        return self._budgets[id_]

    def _count(self, hold: Hold, amount: int) -> None:
        """Count an amount to the budget that a call draws on, if the window still is the call's."""
        budget = None if hold.draw is None else self._budget(hold.draw.budget)
        if budget is not None and hold.draw is not None and budget.window == hold.draw.window:
            self._counted.append((budget, replace(budget)))
            budget.used += amount

    def _reserve(self, account: str, *, held: int = 0, unsettled: int = 0) -> None:
        wallet = self.wallet(account)
        wallet.held += held
        wallet.unsettled += unsettled
        self._reserved.append((wallet, held, unsettled))

    # ── What the writer does ─────────────────────────────────────────────────────────────────────────

    def read(self, accounts: Collection[str]) -> None:
        """Lock these accounts' wallets, in the one order that everybody takes, and read them."""
        keys = self._database.keys(accounts)
        for row in self._raw.cursor().execute(self._statements.read_wallets, (keys,)).fetchall():
            self._wallets[row[0]] = wallet_of(*row)

    def attempt(self, operation: Callable[["Books"], Any]) -> Any:
        """Let one operation write, all of it or nothing.

        Raises:
            Exception: the operation's own.
        """
        gathered: tuple[list[Any], ...] = (
            self._opened,
            self._holds,
            self._ends,
            self._ended,
            self._charges,
            self._keys,
            self._keys_again,
            self._asked,
            self._answers,
            self._attributed,
            self._counted,
            self._reserved,
        )
        before = [len(rows) for rows in gathered]
        try:
            return operation(self)
        except Exception:
            for wallet, held, unsettled in self._reserved[before[-1] :]:
                wallet.held -= held
                wallet.unsettled -= unsettled
            for budget, earlier in reversed(self._counted[before[-2] :]):
                budget.window, budget.used = earlier.window, earlier.used
                budget.next_call_at = earlier.next_call_at
            for rows, length in zip(gathered, before, strict=True):
                del rows[length:]
            raise

    def write(self) -> None:
        """Write everything.

        Raises:
            HoldsChanged: a hold that was ended is not open; nothing may be committed.
        """
        statements, money = self._statements, self._database.money
        changed = {wallet.account: wallet for wallet, _, _ in self._reserved}
        reserved = [
            (money(wallet.held), money(wallet.unsettled), wallet.account) for wallet in changed.values()
        ]
        together: dict[tuple[str, str | None], list[int]] = {}
        for state, reason, sequence in self._ends:
            together.setdefault((state, reason), []).append(sequence)
        ends = [self._raw.cursor() for _ in together]
        with self._database.at_once(self._raw):
            if self._holds:
                self._database.insert(self._raw.cursor(), statements.insert_hold, self._holds)
            for cursor, (how, sequences) in zip(ends, together.items(), strict=True):
                cursor.execute(statements.end_holds, (*how, self.now, self._database.keys(sequences)))
            if reserved:
                self._raw.cursor().executemany(statements.reserve, reserved)
        if sum(cursor.rowcount for cursor in ends) != len(self._ends):
            raise HoldsChanged
        if self._charges:  # of holds that were open: no other has the same
            self._database.insert(self._raw.cursor(), statements.insert_charge, self._charges)
        self._write_rest()

    def _write_rest(self) -> None:
        """What few calls need."""
        if self._attributed:
            self._connection.execute(schema.attributed.insert(), self._attributed)
        if self._counted:
            counted = {budget.id: budget for budget, _ in self._counted}
            self._connection.execute(_ITS_BUDGET, [_row_of(budget) for budget in counted.values()])
        if self._keys:
            self._connection.execute(schema.idempotency.insert(), self._keys)
        if self._keys_again:
            self._connection.execute(_ITS_KEY_AGAIN, self._keys_again)
        if self._answers:
            self._connection.execute(_ITS_ANSWER, self._answers)

    def not_open(self) -> HoldNotOpen:
        """What the operation is told that ended a hold which is not open, alone in these books."""
        return HoldNotOpen(receipt=self._ended[0].receipt_id)
