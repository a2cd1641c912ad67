"""Opening accounts and asking for policies."""

import sqlalchemy as sa

from waterfall.chain import vault
from waterfall.errors import AccountExists, AccountNotFound
from waterfall.keccak import keccak
from waterfall.ledger import schema
from waterfall.ledger.journal import now_ms
from waterfall.ledger.projection import open_account
from waterfall.ledger.writer import Transaction
from waterfall.types import Policy


def label_hash(salt: bytes, label: str) -> str:
    """What the chain sees of a label: nothing that can be read without the platform's salt."""
    return "0x" + keccak(keccak(salt) + label.encode()).hex()


def create_account(tx: Transaction, platform: int, owner: str, salt: bytes, label: str) -> str:
    """Open an account and return its id; one first seen on the chain gets its label back.

    Raises:
        AccountExists: with that owner and label.
    """
    hashed = label_hash(salt, label)
    id_ = vault.account_id(platform, owner, hashed)
    table = schema.accounts
    known = tx.run(sa.select(table.c.label).where(table.c.id == id_)).one_or_none()
    if known is None:
        open_account(tx, id_, owner, hashed, label)
    elif known.label is None:
        tx.run(table.update().where(table.c.id == id_).values(owner=owner, label_hash=hashed, label=label))
    else:
        raise AccountExists(account=id_)
    return id_


def order_policy(tx: Transaction, account: str, policy: Policy) -> None:
    """Ask for a policy: it binds here at once, beside the one on the chain until it has replaced that.

    Its transaction waits for the calls made under the old one, so that none of their charges is rejected.

    Raises:
        AccountNotFound
    """
    orders, wallets = schema.policy_orders, schema.wallets
    wanted = wallets.update().where(wallets.c.account == account).values(wanted=policy.model_dump_json())
    if tx.run(wanted).rowcount == 0:
        raise AccountNotFound(account=account)
    earlier = orders.c.account == account, orders.c.state == "waiting"
    tx.run(orders.update().where(*earlier).values(state="replaced"))
    newest = tx.run(sa.select(sa.func.coalesce(sa.func.max(schema.holds.c.sequence), 0))).scalar_one()
    tx.run(
        orders.insert(),
        {
            "account": account,
            "policy": policy.model_dump_json(),
            "after_sequence": newest,
            "state": "waiting",
            "created_at": now_ms(),
        },
    )
