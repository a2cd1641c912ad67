"""The chain's view of accounts, derived only from the vault's events, block by block, and undone block by block.

What lowers an account counts at first sight; what raises it counts once its block is as final as configured.
One transaction applies a block's events and takes the charges they settle out of `unsettled`.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa

from waterfall.chain import events as chain
from waterfall.chain.vault import allowance_of, policy_of
from waterfall.errors import EventsMissing
from waterfall.ledger import schema
from waterfall.ledger.journal import (
    QUEUED_AGAIN,
    charge_id,
    epoch_of,
    lock_wallets,
    now_ms,
    recount,
    sequence_of,
)
from waterfall.ledger.writer import Transaction
from waterfall.money import UNITS_PER_TOKEN_BASE_UNIT
from waterfall.types import ZERO_ADDRESS, Allowance, Policy

UNKNOWN_LABEL = "0x" + "00" * 32
"""Stands for owner and label of an account of which the chain has shown a policy only, so far."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block's place in the chain; `timestamp` is block time."""

    number: int
    hash: str
    timestamp: int


_NAMES_AN_OWNER = chain.Deposited | chain.Refunded | chain.Allocated | chain.AllowanceSet | chain.PolicySet
"""Events that may be an account's first; of a policy's account, the chain does not tell the owner."""

_OF_A_CHARGE = chain.Charged | chain.ChargeRejected | chain.ChargeVoided

Events = Sequence[tuple[chain.Position, chain.Event]]


@dataclass(slots=True)
class _Known:
    """A charge as the journal has it."""

    account: str
    amount: int
    digest: str
    state: str
    captured_at: int


@dataclass(frozen=True, slots=True)
class Moved:
    """What an event has made of a charge."""

    charge: int
    state: str
    reason: str | None
    block: int
    tx_hash: str
    waited_ms: int
    """Since its capture, by the host's clock."""


class Projection:
    """Applies blocks within one transaction of the writer.

    Rows are read and written many at a time; what an event changes is kept in memory until `write`.
    """

    def __init__(self, tx: Transaction, platform: int, *, spendable: int, final: int) -> None:
        """A projection to write with.

        Args:
            tx: the transaction.
            platform: whose accounts these are.
            spendable: the newest block whose raises count already.
            final: the newest block that is never undone.
        """
        self._tx = tx
        self._platform = platform
        self._spendable = spendable
        self._final = final
        self._wallets: dict[str, dict[str, Any] | None] = {}
        self._before: dict[str, str] = {}
        """Of the wallets that this block has touched: as they were, JSON."""
        self._charges: dict[int, _Known] = {}
        """Charges of the journal that events are about, by id."""
        self._moved: dict[int, dict[str, Any]] = {}
        self.moved: list[Moved] = []
        """What has become of charges: to be counted and logged."""
        self._events: list[dict[str, Any]] = []
        self._undo: list[dict[str, Any]] = []
        self._epoch = int(
            tx.run(sa.select(schema.meta.c.value).where(schema.meta.c.key == "epoch")).scalar_one()
        )
        self.mismatches: list[str] = []
        """What the chain holds against the journal: to be shown to a person."""

    def read(self, blocks: Sequence[tuple[Block, Events]]) -> None:
        """Lock and read what the events of these blocks are about."""
        events = [event for _, placed in blocks for _, event in placed]
        names = {getattr(event, name, None) for event in events for name in ("account", "source")}
        for row in lock_wallets(self._tx, {name for name in names if isinstance(name, str)}):
            self._wallets[row.account] = dict(row._mapping)  # noqa: SLF001 - public in all but name
        ids = {event.id for event in events if isinstance(event, _OF_A_CHARGE)}
        table = schema.charges
        columns = (
            table.c.epoch,
            table.c.sequence,
            table.c.account,
            table.c.amount,
            table.c.digest,
            table.c.state,
            table.c.captured_at,
        )
        its = schema.among(table.c.sequence, (sequence_of(id_) for id_ in ids))
        for row in self._tx.run(sa.select(*columns).where(its)):
            known = _Known(row.account, row.amount, row.digest, row.state, row.captured_at)
            self._charges[charge_id(row.epoch, row.sequence)] = known

    def apply(self, block: Block, events: Events) -> None:
        """Apply one block's events, in their order.

        Raises:
            EventsMissing
        """
        self._before = {}
        for position, event in events:
            if getattr(event, "platform", self._platform) != self._platform:
                continue
            if isinstance(event, _NAMES_AN_OWNER):
                self._open_account(event)
            account = getattr(event, "account", None)
            wallet = None if account is None else self._wallet(account)
            if account is not None and wallet is None:
                continue  # another platform's: ours were opened by the first event that concerned them
            self._apply(block, position, event, wallet or {})
            self._keep(block, position, event)
        if block.number > self._final:
            self._undo += [
                {"block": block.number, "account": account, "before": before}
                for account, before in self._before.items()
            ]
        table = schema.blocks
        self._tx.run(table.delete().where(table.c.number == block.number))
        self._tx.run(
            table.insert(), {"number": block.number, "hash": block.hash, "timestamp": block.timestamp}
        )

    def write(self) -> None:
        """Write all that was gathered."""
        self._move_charges()
        wallets = schema.wallets
        changed = [
            {**wallet, "its_account": wallet["account"]} for wallet in self._wallets.values() if wallet
        ]
        if changed:
            columns: dict[str, Any] = {column.name: sa.bindparam(column.name) for column in wallets.c}
            del columns["account"]
            its = wallets.c.account == sa.bindparam("its_account")
            self._tx.run(wallets.update().where(its).values(columns), changed)
        for table, rows in ((schema.undo, self._undo), (schema.events, self._events)):
            if rows:
                self._tx.run(table.insert(), rows)

    def _apply(
        self, block: Block, position: chain.Position, event: chain.Event, wallet: dict[str, Any]
    ) -> None:
        """Apply one event; `wallet` is its account's."""
        match event:
            case chain.Charged():
                self._charge(block, position, event, wallet)
            case chain.ChargeRejected():
                self._settle(event.id, "rejected", block, position, reason=event.reason.name.lower())
            case chain.ChargeVoided():
                self._settle(event.id, "voided", block, position, reason="written off")
            case chain.PolicySet():
                self._set_policy(block, position, event, wallet)
            case chain.AllowanceSet():
                self._set_allowance(position, event, wallet)
            case chain.Deposited() | chain.Refunded() | chain.Allocated():
                self._receive(position, event, wallet)
            case _:
                self._move_exit(position, event, wallet)
        if hasattr(event, "entry"):
            self._next_line(wallet, event.entry)

    def _next_line(self, wallet: dict[str, Any], entry: int) -> None:
        """Every account's statement has a line for each event that moves its money, without gaps."""
        expected = wallet["entries"] + 1
        if entry != expected:
            account, events = wallet["account"], schema.events
            its = (events.c.account == account) & events.c.entry.is_not(None) | (events.c.source == account)
            last = self._tx.run(sa.select(sa.func.max(events.c.block)).where(its)).scalar()
            what = f"line {expected} of the statement of {account} was in no block, and line {entry} follows"
            raise EventsMissing(what=what, after=last or 0)
        wallet["entries"] = entry

    def _receive(
        self,
        position: chain.Position,
        event: chain.Deposited | chain.Refunded | chain.Allocated,
        wallet: dict[str, Any],
    ) -> None:
        if isinstance(event, chain.Allocated):
            source = self._known(event.source)
            source["balance"] -= event.amount
            self._next_line(source, event.source_entry)
        wallet["balance"] += event.amount
        self._raise(position, event.account, wallet, amount=event.amount)

    def _move_exit(self, position: chain.Position, event: chain.Event, wallet: dict[str, Any]) -> None:
        """Between balance, exit and the world outside; events that move nothing, pass."""
        match event:
            case chain.ExitRequested():
                wallet["balance"] -= event.amount
                wallet["exit_amount"] = event.total
                wallet["exit_matures_at"] = event.matures_at
            case chain.ExitDrawn():
                wallet["balance"] += event.amount
                wallet["exit_amount"] -= event.amount
            case chain.ExitCancelled():
                wallet["balance"] += event.amount
                wallet["exit_amount"] = wallet["exit_matures_at"] = 0
                self._raise(position, event.account, wallet, amount=event.amount)
            case chain.ExitFinalized():
                wallet["balance"] += event.remainder
                wallet["exit_amount"] = wallet["exit_matures_at"] = 0
            case chain.ExitedWithConsent():
                wallet["balance"] -= event.tokens * UNITS_PER_TOKEN_BASE_UNIT
            case _:
                pass

    def _charge(
        self, block: Block, position: chain.Position, event: chain.Charged, wallet: dict[str, Any]
    ) -> None:
        wallet["balance"] -= event.amount
        if wallet["window_seconds"] is not None:
            window = block.timestamp // wallet["window_seconds"]
            wallet["spent"] = event.amount + (wallet["spent"] if window == wallet["window"] else 0)
            wallet["window"] = window
        if wallet["allowance"] is not None:
            wallet["allowance_spent"] += event.amount
        meant = self._settle(event.id, "settled", block, position)
        if meant is None:
            if epoch_of(event.id) == self._epoch:
                self.mismatches.append(
                    f"charge {event.id} is on the chain and, though of this ledger's epoch, not in its journal: "
                    "the database is older than the chain; run `waterfall rebuild`"
                )
            return
        if (meant.account, meant.amount, meant.digest) != (event.account, event.amount, event.receipt_hash):
            self.mismatches.append(
                f"charge {event.id} is on the chain as {event.amount} of {event.account} with receipt "
                f"{event.receipt_hash}, in the journal as {meant.amount} of {meant.account} with {meant.digest}"
            )

    def _settle(
        self, id_: int, state: str, block: Block, position: chain.Position, reason: str | None = None
    ) -> "_Known | None":
        """Move the journal's charge of this id, and what it owes; None if this ledger never made it."""
        known = self._charges.get(id_)
        if known is None:
            return None
        owed = known.state in schema.UNSETTLED, state in schema.UNSETTLED
        if owed != (True, True):
            self._known(known.account)["unsettled"] += known.amount * (owed[1] - owed[0])
        known.state, now = state, now_ms()
        self._moved[id_] = {
            "its_sequence": sequence_of(id_),
            "state": state,
            "reason": reason,
            "block": block.number,
            "tx_hash": position.tx_hash,
            "settled_at": now,
        }
        waited = now - known.captured_at
        self.moved.append(Moved(id_, state, reason, block.number, position.tx_hash, waited))
        return known

    def _move_charges(self) -> None:
        if self._moved:
            table = schema.charges
            names = ("state", "reason", "block", "tx_hash", "settled_at")
            self._tx.run(
                table.update()
                .where(table.c.sequence == sa.bindparam("its_sequence"))
                .values({name: sa.bindparam(name) for name in names}),
                list(self._moved.values()),
            )
            self._moved = {}

    def _set_policy(
        self, block: Block, position: chain.Position, event: chain.PolicySet, wallet: dict[str, Any]
    ) -> None:
        before = _policy(wallet)
        after = policy_of(
            event.limits, event.max_per_charge, event.max_per_window, event.window_seconds, event.expires_at
        )
        # As the vault does: what was spent in the current window stays counted.
        spent = 0
        if before.window_seconds is not None and wallet["window"] == block.timestamp // before.window_seconds:
            spent = wallet["spent"]
        windowed = after.window_seconds is not None
        wallet["spent"] = spent if windowed else 0
        wallet["window"] = block.timestamp // after.window_seconds if after.window_seconds else 0
        wallet |= after.model_dump()
        self._raise(position, event.account, wallet, superseded=before if _loosens(before, after) else None)
        if wallet["wanted"] is not None and Policy.model_validate_json(wallet["wanted"]) == after:
            wallet["wanted"] = None

    def _set_allowance(
        self, position: chain.Position, event: chain.AllowanceSet, wallet: dict[str, Any]
    ) -> None:
        """What is asked for binds here at once; what it loosens, once it is final."""
        before = None if wallet["allowance"] is None else Allowance.model_validate_json(wallet["allowance"])
        after = allowance_of(event.cap, event.expires_at)
        wallet["allowance"] = None if after is None else after.model_dump_json()
        loosens = before is not None and (
            after is None or after.cap > before.cap or after.expires_at > before.expires_at
        )
        self._raise(position, event.account, wallet, superseded=before if loosens else None)

    def _raise(
        self,
        position: chain.Position,
        account: str,
        wallet: dict[str, Any],
        *,
        amount: int = 0,
        superseded: Policy | Allowance | None = None,
    ) -> None:
        """Something loosened the wallet: rejected charges may fit now, and it counts once it is final."""
        self._queue_rejected(account)
        if position.block <= self._spendable or (amount == 0 and superseded is None):
            return
        limit = None
        if superseded is not None:
            kind = "policy" if isinstance(superseded, Policy) else "allowance"
            limit = json.dumps({kind: superseded.model_dump(mode="json")})
        row = {"block": position.block, "log_index": position.log_index, "account": account}
        self._tx.run(schema.raises.insert(), {**row, "amount": amount, "superseded": limit})
        wallet |= _not_counting(self._tx, account)

    def _queue_rejected(self, account: str) -> None:
        """Try charges again that were rejected."""
        self._move_charges()
        table = schema.charges
        its = table.c.account == account, schema.is_unsettled, table.c.state == "rejected"
        if self._tx.run(table.update().where(*its).values(**QUEUED_AGAIN)).rowcount:
            for known in self._charges.values():
                if known.account == account and known.state == "rejected":
                    known.state = "queued"

    # ── Rows ─────────────────────────────────────────────────────────────────────────────────────────

    def _open_account(self, event: Any) -> None:
        known = self._wallets.get(event.account)
        if isinstance(event, chain.PolicySet):
            if known is None:
                open_account(self._tx, event.account, ZERO_ADDRESS, UNKNOWN_LABEL, label=None)
        else:
            if known is None:
                open_account(self._tx, event.account, event.owner, event.label, label=None)
            table = schema.accounts
            unnamed = table.c.id == event.account, table.c.label_hash == UNKNOWN_LABEL
            self._tx.run(table.update().where(*unnamed).values(owner=event.owner, label_hash=event.label))
        if known is None:
            self._wallets.pop(event.account, None)

    def _wallet(self, account: str) -> dict[str, Any] | None:
        """The account's wallet as its events have left it so far; None if it is none of this platform's."""
        if account not in self._wallets:
            rows = lock_wallets(self._tx, [account])
            self._wallets[account] = dict(rows[0]._mapping) if rows else None  # noqa: SLF001
        wallet = self._wallets[account]
        if wallet is not None and account not in self._before:
            self._before[account] = json.dumps({name: wallet[name] for name in schema.UNDONE})
        return wallet

    def _known(self, account: str) -> dict[str, Any]:
        wallet = self._wallet(account)
        if wallet is None:
            raise LookupError(account)  # the ledger has rows of an account that it never opened
        return wallet

    def _keep(self, block: Block, position: chain.Position, event: chain.Event) -> None:
        self._events.append({**row_of(position, event), "timestamp": block.timestamp})


def row_of(position: chain.Position, event: chain.Event) -> dict[str, Any]:
    """What is kept of an event, but for its block's timestamp."""
    values = {name: str(getattr(event, name)) for name in event.__dataclass_fields__}
    return {
        "block": position.block,
        "log_index": position.log_index,
        "tx_hash": position.tx_hash,
        "name": type(event).__name__,
        "account": getattr(event, "account", None),
        "charge_id": values.get("id"),
        "amount": getattr(event, "amount", None),
        "entry": getattr(event, "entry", None),
        "source": event.source if isinstance(event, chain.Allocated) else None,
        "source_entry": getattr(event, "source_entry", None),
        "data": orjson.dumps(values).decode(),
    }


def open_account(tx: Transaction, account: str, owner: str, label_hash: str, label: str | None) -> None:
    """Make the rows of an account that has none yet."""
    row = {"id": account, "owner": owner, "label_hash": label_hash, "label": label, "created_at": now_ms()}
    tx.insert_new(schema.accounts, row)
    tx.insert_new(schema.wallets, {"account": account})


def finalize(tx: Transaction, spendable: int, final: int) -> int:
    """Let what is final count; how many charges have become so.

    Args:
        tx: the transaction.
        spendable: up to this block, raises count.
        final: up to this block, nothing is ever undone; it may be beyond what was read.
    """
    raises, undo, charges, blocks = schema.raises, schema.undo, schema.charges, schema.blocks
    counting = {row.account for row in tx.run(sa.select(raises.c.account).where(raises.c.block <= spendable))}
    if counting:
        lock_wallets(tx, counting)
        tx.run(raises.delete().where(raises.c.block <= spendable))
        _recount_raises(tx, counting)
    tx.run(undo.delete().where(undo.c.block <= final))
    head = tx.run(sa.select(sa.func.max(blocks.c.number))).scalar() or 0
    tx.run(blocks.delete().where(blocks.c.number < min(final, head)))  # where to go on is always known
    settled = charges.c.state == "settled", charges.c.block <= final
    return tx.run(charges.update().where(*settled).values(state="final")).rowcount


def rewind(tx: Transaction, to: int) -> None:
    """Undo every block above `to`: wallets as they were, settled charges unsettled again, slots open again."""
    undo, wallets, charges, slots = schema.undo, schema.wallets, schema.charges, schema.slots
    undone = tx.run(sa.select(undo).where(undo.c.block > to).order_by(undo.c.block.desc())).all()
    before = {row.account: row.before for row in undone}  # of each, the earliest
    lost = charges.c.block > to
    owed: dict[str, int] = {}
    for row in tx.run(
        sa.select(charges.c.account, charges.c.amount).where(lost, charges.c.state.in_(("settled", "voided")))
    ):
        owed[row.account] = owed.get(row.account, 0) + row.amount
    for wallet in lock_wallets(tx, {*before, *owed}):
        values = json.loads(before.get(wallet.account, "{}"))
        values["unsettled"] = wallet.unsettled + owed.get(wallet.account, 0)
        tx.run(wallets.update().where(wallets.c.account == wallet.account).values(**values))
    for table in (undo, schema.events, schema.raises):
        tx.run(table.delete().where(table.c.block > to))
    tx.run(schema.blocks.delete().where(schema.blocks.c.number > to))
    _recount_raises(tx, before)
    again = {**QUEUED_AGAIN, "state": "batched"}
    tx.run(
        charges.update().where(lost, charges.c.state.in_(("settled", "rejected", "voided"))).values(**again)
    )
    reopened = tx.run(sa.select(slots).where(slots.c.block > to)).all()
    tx.run(slots.update().where(slots.c.block > to).values(state="open", tx_hash=None, block=None))
    carried = sa.exists().where(
        slots.c.signer == charges.c.signer, slots.c.nonce == charges.c.nonce, slots.c.state == "open"
    )
    # What no slot carries (another ledger of ours did, see `backup`) would wait for one for ever.
    tx.run(charges.update().where(charges.c.state == "batched", ~carried).values(state="queued"))
    orders = [int(slot.reference) for slot in reopened if slot.purpose == "policy"]
    table = schema.policy_orders
    tx.run(
        table.update().where(schema.among(table.c.id, orders), table.c.state == "done").values(state="sent")
    )
    want_again(tx, before)


def reset(tx: Transaction) -> None:
    """Forget everything that came from the chain; what did not, stays, and is unsettled until the chain says more."""
    for table in (schema.undo, schema.events, schema.raises, schema.blocks):
        tx.run(table.delete())
    wallets, charges = schema.wallets, schema.charges
    nothing = {
        name: None if wallets.c[name].nullable else 0 for name in (*schema.UNDONE, "pending", "superseded")
    }
    tx.run(wallets.update().values(**nothing))
    tx.run(charges.update().where(charges.c.state != "free").values(**QUEUED_AGAIN))
    recount(tx)


def forget_slots(tx: Transaction) -> None:
    """Know of no transaction any more: where they ended, the chain will show; what they carried, is sent again."""
    tx.run(schema.attempts.delete())
    tx.run(schema.slots.delete())
    charges, orders = schema.charges, schema.policy_orders
    tx.run(charges.update().where(charges.c.signer.is_not(None)).values(signer=None, nonce=None))
    tx.run(charges.update().where(schema.is_unsettled, charges.c.state == "batched").values(state="queued"))
    tx.run(orders.update().where(orders.c.state == "sent").values(state="waiting"))


def want_again(tx: Transaction, accounts: Collection[str] | None = None) -> None:
    """What is wanted of these accounts, or of all that wait for a policy: unless the chain has it, the newest order."""
    orders, wallets = schema.policy_orders, schema.wallets
    is_open = orders.c.state.in_(("waiting", "sent"))
    if accounts is None:
        accounts = tx.run(sa.select(orders.c.account).where(is_open).distinct()).scalars().all()
        lock_wallets(tx, accounts)  # an order that is being given now has its wallet, too
    for account in accounts:
        on_chain = tx.run(sa.select(wallets).where(wallets.c.account == account)).mappings().one()
        query = sa.select(orders.c.policy).where(orders.c.account == account, is_open)
        newest = tx.run(query.order_by(orders.c.id.desc()).limit(1)).scalar()
        arrived = newest is not None and Policy.model_validate_json(newest) == _policy(on_chain)
        tx.run(
            wallets.update().where(wallets.c.account == account).values(wanted=None if arrived else newest)
        )


def _recount_raises(tx: Transaction, accounts: Collection[str]) -> None:
    lock_wallets(tx, accounts)  # first: what another process raises now comes before or after all of this
    for account in accounts:
        tx.run(
            schema.wallets.update()
            .where(schema.wallets.c.account == account)
            .values(**_not_counting(tx, account))
        )


def _not_counting(tx: Transaction, account: str) -> dict[str, Any]:
    """`pending` and `superseded` of a wallet: what its raises say that are not final yet."""
    rows = tx.run(sa.select(schema.raises).where(schema.raises.c.account == account)).all()
    superseded = [json.loads(row.superseded) for row in rows if row.superseded is not None]
    return {
        "pending": sum(row.amount for row in rows),
        "superseded": json.dumps(superseded) if superseded else None,
    }


def _policy(wallet: Mapping[Any, Any]) -> Policy:
    return Policy(**{name: wallet[name] for name in Policy.model_fields})


def _loosens(before: Policy, after: Policy) -> bool:
    """Whether anything that `before` forbade is allowed by `after`."""
    infinity = 2**256

    def limits(policy: Policy) -> tuple[int, int, int]:
        values = (policy.max_per_charge, policy.max_per_window, policy.expires_at)
        a, b, c = (infinity if value is None else value for value in values)
        return a, b, c

    looser = any(new > old for old, new in zip(limits(before), limits(after), strict=True))
    return looser or (before.window_seconds is not None and before.window_seconds != after.window_seconds)
