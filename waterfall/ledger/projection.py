"""The chain's view of accounts, derived only from the vault's events, block by block, and undone block by block.

What lowers an account counts at first sight; what raises it counts once its block is as final as configured.
One transaction applies a block's events and takes the charges they settle out of `unsettled`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from waterfall.chain import events as chain
from waterfall.chain.vault import allowance_of, policy_of
from waterfall.ledger import schema
from waterfall.ledger.journal import QUEUED_AGAIN, epoch_of, now_ms, recount, sequence_of
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

Events = Sequence[tuple[chain.Position, chain.Event]]


class Projection:
    """Applies blocks within one transaction of the writer."""

    def __init__(self, tx: Transaction, platform: int, spendable: int) -> None:
        """A projection to write with.

        Args:
            tx: the transaction.
            platform: whose accounts these are.
            spendable: the newest block whose raises count already.
        """
        self._tx = tx
        self._platform = platform
        self._spendable = spendable
        self._wallets: dict[str, dict[str, Any]] = {}
        self.mismatches: list[str] = []
        """What the chain holds against the journal: to be shown to a person."""

    def apply(self, block: Block, events: Events) -> None:
        """Apply one block's events, in their order."""
        self._wallets = {}
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
        for account, wallet in self._wallets.items():
            self._write(block, account, wallet)
        self._tx.run(
            schema.blocks.insert().prefix_with("OR REPLACE"),
            {"number": block.number, "hash": block.hash, "timestamp": block.timestamp},
        )

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
                self._void(block, position, event)
            case chain.PolicySet():
                self._set_policy(block, position, event, wallet)
            case chain.AllowanceSet():
                self._set_allowance(position, event, wallet)
            case chain.Deposited() | chain.Refunded() | chain.Allocated():
                self._receive(position, event, wallet)
            case _:
                self._move_exit(position, event, wallet)
        if hasattr(event, "entry"):
            wallet["entries"] = event.entry

    def _receive(
        self,
        position: chain.Position,
        event: chain.Deposited | chain.Refunded | chain.Allocated,
        wallet: dict[str, Any],
    ) -> None:
        if isinstance(event, chain.Allocated):
            source = self._known(event.source)
            source["balance"] -= event.amount
            source["entries"] = event.source_entry
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
            if epoch_of(event.id) == self._epoch():
                self.mismatches.append(
                    f"charge {event.id} is on the chain and, though of this ledger's epoch, not in its journal: "
                    "the database is older than the chain; run `waterfall rebuild`"
                )
            return
        if meant.state in schema.UNSETTLED:
            wallet["unsettled"] -= meant.amount
        if (meant.account, meant.amount, meant.digest) != (event.account, event.amount, event.receipt_hash):
            self.mismatches.append(
                f"charge {event.id} is on the chain as {event.amount} of {event.account} with receipt "
                f"{event.receipt_hash}, in the journal as {meant.amount} of {meant.account} with {meant.digest}"
            )

    def _void(self, block: Block, position: chain.Position, event: chain.ChargeVoided) -> None:
        """The charge is written off: it binds no money any more."""
        meant = self._settle(event.id, "voided", block, position, reason="written off")
        if meant is not None and meant.state in schema.UNSETTLED:
            self._known(meant.account)["unsettled"] -= meant.amount

    def _settle(
        self, id_: int, state: str, block: Block, position: chain.Position, reason: str | None = None
    ) -> Any:
        """Move the journal's charge of this id; the row as it was, or None if this ledger never made it."""
        table = schema.charges
        row = self._tx.run(
            sa.select(table.c.account, table.c.amount, table.c.digest, table.c.state).where(
                table.c.sequence == sequence_of(id_), table.c.epoch == epoch_of(id_)
            )
        ).one_or_none()
        if row is not None:
            values = {
                "state": state,
                "reason": reason,
                "block": block.number,
                "tx_hash": position.tx_hash,
                "settled_at": now_ms(),
            }
            self._tx.run(table.update().where(table.c.sequence == sequence_of(id_)).values(**values))
        return row

    def _epoch(self) -> int:
        return int(
            self._tx.run(sa.select(schema.meta.c.value).where(schema.meta.c.key == "epoch")).scalar_one()
        )

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
        table = schema.charges
        self._tx.run(
            table.update()
            .where(table.c.account == account, table.c.state == "rejected")
            .values(**QUEUED_AGAIN)
        )
        if position.block <= self._spendable or (amount == 0 and superseded is None):
            return
        limit = None
        if superseded is not None:
            kind = "policy" if isinstance(superseded, Policy) else "allowance"
            limit = json.dumps({kind: superseded.model_dump(mode="json")})
        row = {"block": position.block, "log_index": position.log_index, "account": account}
        self._tx.run(schema.raises.insert(), {**row, "amount": amount, "superseded": limit})
        wallet |= _not_counting(self._tx, account)

    # ── Rows ─────────────────────────────────────────────────────────────────────────────────────────

    def _open_account(self, event: Any) -> None:
        if isinstance(event, chain.PolicySet):
            open_account(self._tx, event.account, ZERO_ADDRESS, UNKNOWN_LABEL, label=None)
            return
        open_account(self._tx, event.account, event.owner, event.label, label=None)
        table = schema.accounts
        unnamed = table.c.id == event.account, table.c.label_hash == UNKNOWN_LABEL
        self._tx.run(table.update().where(*unnamed).values(owner=event.owner, label_hash=event.label))

    def _wallet(self, account: str) -> dict[str, Any] | None:
        """The account's wallet as the block has left it so far; None if it is none of this platform's."""
        if account not in self._wallets and (found := self._read(account)) is not None:
            self._wallets[account] = found
        return self._wallets.get(account)

    def _known(self, account: str) -> dict[str, Any]:
        wallet = self._wallet(account)
        if wallet is None:
            raise LookupError(account)  # the ledger has rows of an account that it never opened
        return wallet

    def _read(self, account: str) -> dict[str, Any] | None:
        table = schema.wallets
        row = self._tx.run(sa.select(table).where(table.c.account == account)).mappings().one_or_none()
        return None if row is None else {**row, "_before": {name: row[name] for name in schema.UNDONE}}

    def _write(self, block: Block, account: str, wallet: dict[str, Any]) -> None:
        before = wallet.pop("_before")
        self._tx.run(
            schema.undo.insert(), {"block": block.number, "account": account, "before": json.dumps(before)}
        )
        self._tx.run(schema.wallets.update().where(schema.wallets.c.account == account).values(**wallet))

    def _keep(self, block: Block, position: chain.Position, event: chain.Event) -> None:
        id_ = getattr(event, "id", None)
        self._tx.run(
            schema.events.insert(),
            {
                "block": block.number,
                "log_index": position.log_index,
                "tx_hash": position.tx_hash,
                "timestamp": block.timestamp,
                "name": type(event).__name__,
                "account": getattr(event, "account", None),
                "charge_id": None if id_ is None else str(id_),
                "amount": getattr(event, "amount", None),
                "entry": getattr(event, "entry", None),
                "source": event.source if isinstance(event, chain.Allocated) else None,
                "source_entry": getattr(event, "source_entry", None),
                "data": json.dumps({name: str(value) for name, value in asdict(event).items()}),
            },
        )


def open_account(tx: Transaction, account: str, owner: str, label_hash: str, label: str | None) -> None:
    """Make the rows of an account that has none yet."""
    row = {"id": account, "owner": owner, "label_hash": label_hash, "label": label, "created_at": now_ms()}
    tx.run(schema.accounts.insert().prefix_with("OR IGNORE"), row)
    tx.run(schema.wallets.insert().prefix_with("OR IGNORE"), {"account": account})


def finalize(tx: Transaction, spendable: int, final: int) -> None:
    """Let what is final count.

    Args:
        tx: the transaction.
        spendable: up to this block, raises count.
        final: up to this block, nothing is ever undone.
    """
    raises, undo, charges, blocks = schema.raises, schema.undo, schema.charges, schema.blocks
    counting = {row.account for row in tx.run(sa.select(raises.c.account).where(raises.c.block <= spendable))}
    if counting:
        tx.run(raises.delete().where(raises.c.block <= spendable))
        _recount_raises(tx, counting)
    tx.run(undo.delete().where(undo.c.block <= final))
    tx.run(blocks.delete().where(blocks.c.number < final))
    tx.run(
        charges.update().where(charges.c.state == "settled", charges.c.block <= final).values(state="final")
    )


def rewind(tx: Transaction, to: int) -> None:
    """Undo every block above `to`: wallets as they were, settled charges unsettled again, slots open again."""
    undo, wallets, charges, slots = schema.undo, schema.wallets, schema.charges, schema.slots
    restored: set[str] = set()
    for row in tx.run(sa.select(undo).where(undo.c.block > to).order_by(undo.c.block)).all():
        if row.account not in restored:
            restored.add(row.account)
            tx.run(wallets.update().where(wallets.c.account == row.account).values(**json.loads(row.before)))
    for table in (undo, schema.events, schema.raises):
        tx.run(table.delete().where(table.c.block > to))
    tx.run(schema.blocks.delete().where(schema.blocks.c.number > to))
    _recount_raises(tx, restored)

    lost = charges.c.block > to
    for row in tx.run(
        sa.select(charges.c.account, charges.c.amount).where(lost, charges.c.state.in_(("settled", "voided")))
    ).all():
        unsettled = tx.run(
            sa.select(wallets.c.unsettled).where(wallets.c.account == row.account)
        ).scalar_one()
        tx.run(
            wallets.update().where(wallets.c.account == row.account).values(unsettled=unsettled + row.amount)
        )
    again = {**QUEUED_AGAIN, "state": "batched"}
    tx.run(
        charges.update().where(lost, charges.c.state.in_(("settled", "rejected", "voided"))).values(**again)
    )
    reopened = tx.run(sa.select(slots).where(slots.c.block > to)).all()
    tx.run(slots.update().where(slots.c.block > to).values(state="open", tx_hash=None, block=None))
    orders = [int(slot.reference) for slot in reopened if slot.purpose == "policy"]
    table = schema.policy_orders
    tx.run(table.update().where(table.c.id.in_(orders), table.c.state == "done").values(state="sent"))
    want_again(tx, restored)


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


def want_again(tx: Transaction, accounts: Iterable[str] | None = None) -> None:
    """What is wanted of these accounts, or of all that wait for a policy: unless the chain has it, the newest order."""
    orders, wallets = schema.policy_orders, schema.wallets
    is_open = orders.c.state.in_(("waiting", "sent"))
    if accounts is None:
        accounts = tx.run(sa.select(orders.c.account).where(is_open).distinct()).scalars().all()
    for account in accounts:
        on_chain = tx.run(sa.select(wallets).where(wallets.c.account == account)).mappings().one()
        query = sa.select(orders.c.policy).where(orders.c.account == account, is_open)
        newest = tx.run(query.order_by(orders.c.id.desc()).limit(1)).scalar()
        arrived = newest is not None and Policy.model_validate_json(newest) == _policy(on_chain)
        tx.run(
            wallets.update().where(wallets.c.account == account).values(wanted=None if arrived else newest)
        )


def _recount_raises(tx: Transaction, accounts: Iterable[str]) -> None:
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
