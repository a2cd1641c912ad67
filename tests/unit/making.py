"""The figures and the hands of the unit tests: one platform, its meter, accounts, receipts, blocks."""

import hashlib
import time
from dataclasses import dataclass, field, replace
from decimal import Decimal
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from waterfall.chain import events as chain
from waterfall.chain.transactions import Fees, Signed
from waterfall.chain.vault import NO_CAP, NO_EXPIRY, account_id
from waterfall.ledger import accounts, journal, schema, slots, views
from waterfall.ledger.journal import Caller
from waterfall.ledger.projection import Block
from waterfall.ledger.slots import Attempt, Mined, Slot
from waterfall.metering import prices
from waterfall.receipts import Domain, canonical_hash, receipt_digest
from waterfall.signers import LocalSigner
from waterfall.types import ZERO_ADDRESS, Charge, RateCard, Rates, SignedReceipt, Usage, UsageReceipt

only_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
only_postgres = pytest.mark.parametrize("url", ["postgresql"], indirect=True)

USD = 10**12
CHAIN_ID = 31337
VAULT = "0x" + "c0" * 20
TOKEN = "0x" + "70" * 20
PLATFORM = 2**127 + 5
METER = LocalSigner(b"\xa1" * 32)
GAS = LocalSigner(b"\xb2" * 32)
GAS_TOO = LocalSigner(b"\xb3" * 32)
OWNER = LocalSigner(b"\xc3" * 32)
SALT = b"salt"
DOMAIN = Domain(CHAIN_ID, VAULT)

BLOCK_TIME = 1_700_000_000
FUNDED = 10 * USD
EMPTY_HASH = canonical_hash("")


def word(text):
    """Any 32 bytes that stand for something."""
    return "0x" + hashlib.sha256(text.encode()).hexdigest()


GENESIS = Block(0, word("block 0"), BLOCK_TIME - 100)


def account(label, owner=ZERO_ADDRESS):
    """The id of the account that the platform calls by this label."""
    return account_id(PLATFORM, owner, accounts.label_hash(SALT, label))


ACCOUNT = account("ada")
OTHER = account("bob")


def card(model="small", inputs="1", outputs="2", cached=None):
    """A rate card, in USD per million tokens."""
    rates = Rates(
        input_usd_per_mtok=Decimal(inputs),
        cached_input_usd_per_mtok=Decimal(cached or inputs),
        cache_write_usd_per_mtok=Decimal(inputs),
        cache_write_1h_usd_per_mtok=Decimal(inputs),
        image_usd_per_mtok=Decimal(inputs),
        output_usd_per_mtok=Decimal(outputs),
    )
    return RateCard(model=model, source="test", rates=(rates,))


def served(
    tariff, *, field="max_tokens", default=4096, most_choices=128, image_tokens=None, context_tokens=None
):
    """A model as surfaces know it."""
    settings = SimpleNamespace(output_limit_field=field, max_choices=most_choices)
    return SimpleNamespace(
        name="small",
        card=tariff,
        default_max_output_tokens=default,
        upstream=SimpleNamespace(settings=settings),
        upstream_model="provider/small",
        image_tokens=image_tokens,
        context_tokens=context_tokens,
    )


def held_tokens(request, its):
    """What a request is held for, at a micro-dollar a token."""
    bound = request.bound(its)
    return bound.amount(bound.output_tokens) / 10**6


# ── What the chain shows ─────────────────────────────────────────────────────────────────────────────


def block(number, timestamp=None, fork=""):
    """A block; another fork's has another hash."""
    return Block(
        number, word(f"block {number}{fork}"), BLOCK_TIME + 12 * number if timestamp is None else timestamp
    )


def deposited(account, amount, entry=None, label="ada", owner=ZERO_ADDRESS):
    """Credit that arrived for an account; as a line of its own in the statement: the next, unless told otherwise."""
    return chain.Deposited(
        PLATFORM, account, "0x" + "99" * 20, owner, accounts.label_hash(SALT, label), amount, entry
    )


def charged(charge, entry=None, **changed):
    """A charge that was settled as it was meant, or not; the statement's next line unless told otherwise."""
    fields = {
        "account": charge.account,
        "id": charge.id,
        "amount": charge.amount,
        "receipt_hash": charge.receipt_hash,
    }
    return chain.Charged(entry=entry, **{**fields, **changed})


def _numbered(event, lines):
    """The event with its line in the statement; `lines` are how many each account has."""
    for account, entry in (("source", "source_entry"), ("account", "entry")):
        if hasattr(event, entry):
            of, given = getattr(event, account), getattr(event, entry)
            lines[of] = lines.get(of, 0) + 1 if given is None else given
            event = replace(event, **{entry: lines[of]})
    return event


def rejected(charge, reason=chain.Rejection.BALANCE):
    """A charge that was left out of its batch."""
    return chain.ChargeRejected(PLATFORM, charge.account, charge.id, reason)


def policy_words(policy):
    """Limits as the vault takes and shows them: which there are, and each; what is not there is 0."""
    limits = (
        1 * (policy.max_per_charge is not None)
        | 2 * (policy.max_per_window is not None)
        | 4 * (policy.expires_at is not None)
    )
    return (
        limits,
        policy.max_per_charge or 0,
        policy.max_per_window or 0,
        policy.window_seconds or 0,
        policy.expires_at or 0,
    )


def policy_set(account, policy):
    """The limits of an account from now on."""
    return chain.PolicySet(PLATFORM, account, *policy_words(policy))


def allowance_set(account, allowance):
    """What an account's owner allows from now on; None: anything."""
    cap, expires_at = (NO_CAP, NO_EXPIRY) if allowance is None else (allowance.cap, allowance.expires_at)
    return chain.AllowanceSet(
        PLATFORM, account, "0x" + "55" * 20, word("label"), cap, expires_at, BLOCK_TIME, 0
    )


# ── A ledger at work ─────────────────────────────────────────────────────────────────────────────────


def sign(held, amount, *, meter=METER, usage=None, **changed):
    """The meter's receipt for a hold."""
    receipt = UsageReceipt(
        **{
            "platform": PLATFORM,
            "account": held.account,
            "charge_id": held.charge_id,
            "request_hash": word("request"),
            "response_hash": word("response"),
            "model": "small",
            "input_tokens": 1,
            "cached_input_tokens": 0,
            "output_tokens": 1,
            "reasoning_tokens": 0,
            "usage_hash": canonical_hash(usage),
            "price_id": canonical_hash(None),
            "amount": amount,
            "issued_at": BLOCK_TIME,
            "complete": usage is not None,
            **changed,
        }
    )
    digest = receipt_digest(DOMAIN, receipt)
    return SignedReceipt(
        id=held.receipt_id,
        chain_id=CHAIN_ID,
        vault=VAULT,
        receipt=receipt,
        digest="0x" + digest.hex(),
        meter=meter.address,
        signature="0x" + meter.sign(digest).hex(),
        surface="chat",
        metered=Usage(
            input_tokens=receipt.input_tokens,
            cached_input_tokens=min(receipt.cached_input_tokens, receipt.input_tokens),
            output_tokens=receipt.output_tokens,
            reasoning_tokens=receipt.reasoning_tokens,
        ),
        usage=usage,
        rate_card=None,
    )


@dataclass
class Desk:
    """A ledger and what a test does with it."""

    ledger: object
    meter: LocalSigner
    account: str = ACCOUNT
    blocks: list = field(default_factory=lambda: [GENESIS])

    async def apply(self, block, *events, spendable=None, final=0):
        """Project one block; everything in it counts at once unless told otherwise."""
        lines = {row["account"]: row["entries"] for row in await self.table(schema.wallets)}
        placed = [
            (chain.Position(block.number, index, word(f"tx {block.hash} {index}")), _numbered(event, lines))
            for index, event in enumerate(events)
        ]
        spendable = block.number if spendable is None else spendable
        await self.ledger.view.apply(
            [(block, placed)], spendable=spendable, final=final, seen_at=time.monotonic()
        )
        self.blocks.append(block)

    async def close(self, slot, *, number=2, succeeded=True):
        """A slot's transaction was mined in a block, which is projected; how many charges go back."""
        if all(block.number != number for block in self.blocks):
            await self.apply(block(number))
        its = next(block for block in reversed(self.blocks) if block.number == number)
        mined = Mined(word("mined"), its.number, its.hash, succeeded)
        return await self.ledger.write(lambda tx: slots.close_slot(tx, slot, mined))

    async def hold(self, amount, *, account=None, model="small", block_time=BLOCK_TIME, expiry_margin=0):
        """Set an amount aside."""
        return await self.ledger.hold(
            Caller(account or self.account, None),
            model,
            prices.fixed(amount),
            block_time=block_time,
            expiry_margin=expiry_margin,
            surface="chat",
        )

    async def capture(self, held, amount, excess=0, **changed):
        """Charge a hold."""
        return await self.ledger.capture(held, sign(held, amount, meter=self.meter, **changed), excess)

    async def charge(self, amount, account=None):
        """Hold and capture; the charge as a batch would carry it."""
        held = await self.hold(amount, account=account)
        await self.capture(held, amount)
        return next(charge for charge in await self.charges() if charge.id == held.charge_id)

    async def charges(self):
        """Every charge that was ever captured, as batches carry them."""
        return await self.ledger.read(_charges)

    async def open(self, label, owner=ZERO_ADDRESS):
        """Open an account."""
        return await self.ledger.write(lambda tx: accounts.create_account(tx, PLATFORM, owner, SALT, label))

    async def order(self, policy, account=None):
        """Ask for a policy."""
        await self.ledger.write(lambda tx: accounts.order_policy(tx, account or self.account, policy))

    async def record(self, account=None):
        """The account as the ledger shows it."""
        return await self.ledger.read(lambda c: views.account(c, account or self.account))

    async def wallet(self, account=None):
        """Its wallet."""
        return (await self.record(account)).wallet

    async def call(self, held):
        """A call as the ledger shows it."""
        return await self.ledger.read(lambda c: views.call(c, held.receipt_id, CHAIN_ID, VAULT))

    async def states(self):
        """The state of each charge, by sequence."""
        table = schema.charges
        rows = await self.ledger.read(
            lambda c: c.execute(sa.select(table.c.sequence, table.c.state).order_by(table.c.sequence)).all()
        )
        return [row.state for row in rows]

    async def table(self, table):
        """Every row of a table, for comparison."""
        rows = await self.ledger.read(lambda c: c.execute(sa.select(table)).mappings().all())
        return sorted((dict(row) for row in rows), key=repr)


def _charges(connection):
    return [
        Charge(
            account=row.account,
            id=journal.charge_id(row.epoch, row.sequence),
            amount=row.amount,
            receipt_hash=row.digest,
        )
        for row in connection.execute(sa.select(schema.charges).order_by(schema.charges.c.sequence))
    ]


async def batch(desk, charges, nonce=0):
    """Put charges into a slot, as a lane does."""
    slot = Slot(GAS.address, nonce, "settle", None, VAULT, b"", 1, 0)
    attempt = Attempt(Signed(b"%d" % nonce, word(f"attempt {nonce}")), Fees(1, 1), "signed", 0)
    await desk.ledger.write(lambda tx: slots.open_slot(tx, slot, attempt, charges))
    return slot
