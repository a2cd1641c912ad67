"""The open ledger: one database, one writer, and what the process keeps in memory of it."""

import asyncio
import os
import secrets
from collections.abc import Sequence
from typing import Self, TypeVar

import structlog

from waterfall.chain.vault import deposit_address
from waterfall.errors import HoldNotOpen, LedgerError, Unavailable
from waterfall.ledger import figures, journal, opening, retention, shared
from waterfall.ledger.books import Hold, Once
from waterfall.ledger.chain_view import ChainView
from waterfall.ledger.database import DATABASE_ERRORS, Database, reason_of
from waterfall.ledger.figures import Figures
from waterfall.ledger.gate import Gate
from waterfall.ledger.journal import Answer, Caller, Captured
from waterfall.ledger.keys import Keyring
from waterfall.ledger.reader import Query, Reader
from waterfall.ledger.retention import Forgotten
from waterfall.ledger.writer import Operation, Writer
from waterfall.metering.prices import Bound
from waterfall.metrics import Metrics
from waterfall.types import RateCard, SignedReceipt, Surface

log = structlog.get_logger()

T = TypeVar("T")

_CHARGES = "charges"
"""Whose idempotency keys those of charges are: the platform's, whichever of its API keys it shows."""
_FOLLOW_SECONDS = 0.1


class Ledger:
    """The ledger of one platform on one vault."""

    def __init__(self, database: Database, *, chain_id: int, vault: str, platform: int, epoch: int) -> None:
        """Use `Ledger.open`."""
        self.chain_id = chain_id
        self.vault = vault
        self.platform = platform
        self.lease_seconds = 60.0
        """A hold whose call has not renewed it for this long is taken for abandoned."""
        self.is_shared = database.is_shared
        """Whether other processes work with it too; then `follow` has to run."""
        self.lost_at_start = 0
        self.recounted_at_start: list[str] = []
        self.metrics = Metrics()
        """What this process counts of its work."""
        self.captured = asyncio.Event()
        """Set whenever there is something new to settle."""
        self._database = database
        self._writer = Writer(database, self.metrics)
        self._reader = Reader(database)
        self._price_ids: set[str] = set()
        self.keys = Keyring(self._writer, self._reader)
        """Who may ask for what."""
        self.view = ChainView(
            database,
            self._writer,
            self._reader,
            self.metrics,
            platform=platform,
            epoch=epoch,
            captured=self.captured,
        )
        """The chain, as far as it was read."""
        self.gate = Gate()
        """Whether new calls are refused."""

    @property
    def epoch(self) -> int:
        """Of the charge ids given out from now on."""
        return self.view.epoch

    # ── Opening ──────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def open(cls, url: str, *, chain_id: int, vault: str, platform: int, lease_seconds: float = 60) -> Self:
        """Open the ledger at a database URL, or make it.

        Where no other process uses it, holds that a dead one left open are closed as lost, and all sums are derived
        anew. In a shared one, holds of dead processes are closed when their leases run out.

        Raises:
            LedgerError: in use by another process, of another chain, vault or platform, or unreadable.
        """
        database = Database.open(url)
        try:
            identity = {"chain_id": str(chain_id), "vault": vault, "platform": str(platform)}
            epoch = opening.open_schema(database, identity)
            ledger = cls(database, chain_id=chain_id, vault=vault, platform=platform, epoch=epoch)
            ledger.lease_seconds = lease_seconds
            ledger._recover()
        except DATABASE_ERRORS as error:
            database.close()
            raise LedgerError(reason=reason_of(error)) from error
        except LedgerError:
            database.close()
            raise
        return ledger

    def _recover(self) -> None:
        if not self.is_shared:
            reason = "the gateway stopped between the hold and the capture"
            self.lost_at_start = self._writer.run_sync(lambda tx: journal.lose_open_holds(tx, reason))
            self.recounted_at_start = self._writer.run_sync(journal.recount)
        known = self.read_sync(shared.read)
        self.view.learn(known)
        self.gate.learn(known)
        self.keys.open(known)

    @property
    def _lease_ms(self) -> int:
        return int(self.lease_seconds * 1000)

    def close(self) -> None:
        """Finish what is queued and close."""
        self._writer.close()
        self._reader.close()
        self._database.close()

    # ── Other processes ──────────────────────────────────────────────────────────────────────────────

    async def follow(self) -> None:
        """Keep up with what other processes do, and tell them. Runs until cancelled; at once where there are none.

        What could not be read is not seen: the chain's view ages, until no call is authorised on it any more.
        """
        while self.is_shared:
            try:
                await self._tell_and_learn()
            except LedgerError as error:
                log.warning("the ledger cannot be followed", reason=error.message)
            await asyncio.sleep(_FOLLOW_SECONDS)

    async def _tell_and_learn(self) -> None:
        news = self.view.take_news() | self.gate.take_news()
        if news:
            await self._writer.run(lambda tx: shared.publish(tx, news))
        known = await self.read(shared.read)
        self.view.learn(known)
        self.gate.learn(known)
        await self.keys.learn(known)

    async def leads(self, part: str) -> bool:
        """Whether this process is the one that works on a part of the relayer (a lane, the indexer) now.

        To be asked before every step of that part. Who leads may change at any time, so it only keeps two from
        getting in each other's way: what keeps money safe is the vault, and each nonce's one row in the journal.

        Raises:
            LedgerError: nobody can say.
        """
        return await self._reader.run(lambda: self._database.leads(part)) if self.is_shared else True

    async def is_led(self, part: str) -> bool:
        """Whether any process works on a part of the relayer; of a ledger that is not shared, this one does.

        Raises:
            LedgerError
        """
        return await self.read(lambda c: self._database.is_led(c, part))

    # ── Calls ────────────────────────────────────────────────────────────────────────────────────────

    async def hold(
        self,
        caller: Caller,
        model: str,
        bound: Bound,
        *,
        block_time: int,
        expiry_margin: int,
        surface: Surface | None = None,
        receipt_id: str | None = None,
        once: Once | None = None,
        after: int | None = None,
    ) -> Hold:
        """Set a call's provable maximum aside; durable when this returns.

        Raises:
            AccountNotFound, PaymentRequired
            CallRepeated, IdempotencyConflict: by the key in `once`.
            LedgerError: it may be durable all the same: `release_unanswered`.
        """
        receipt_id = new_receipt_id() if receipt_id is None else receipt_id
        return await self._writer.enter(
            lambda books: journal.hold(
                books,
                epoch=self.epoch,
                caller=caller,
                surface=surface,
                model=model,
                bound=bound,
                block_time=block_time,
                expiry_margin=expiry_margin,
                lease_ms=self._lease_ms,
                receipt_id=receipt_id,
                once=once,
                after=after,
            ),
            (caller.account,),
        )

    async def capture(
        self,
        held: Hold,
        signed: SignedReceipt,
        excess: int = 0,
        *,
        vendor_cost: int | None = None,
        answer: Answer | None = None,
        expiry_margin: int = 0,
    ) -> Captured:
        """Turn a hold into a charge; durable when this returns, and done once however often it is asked for.

        Args:
            held: the hold.
            signed: the receipt of the call.
            excess: credit units metered beyond the hold, which the platform bears.
            vendor_cost: credit units that the call cost the platform; None: nobody knows.
            answer: what a repeat of the call is given.
            expiry_margin: seconds before a limit's expiry in which it counts as expired, where the hold is open no more
                and the account is asked again.

        Raises:
            HoldNotOpen: it was closed meanwhile as one that nobody works on, and its account may not pay any more.
            LedgerError: it may be durable all the same: ask again.
        """
        try:
            captured = await self._writer.enter(
                lambda books: journal.capture(books, held, signed, excess, vendor_cost, answer),
                (held.account,),
            )
        except HoldNotOpen:
            head = self.view.head  # however old: the call has run, and its charge is owed
            block_time = None if head is None else head.block.timestamp
            captured = await self._writer.enter(
                lambda books: journal.capture_again(
                    books,
                    held,
                    signed,
                    excess,
                    vendor_cost,
                    block_time=block_time,
                    expiry_margin=expiry_margin,
                ),
                (held.account,),
            )
        self._count(captured.amount)
        return captured

    def _count(self, amount: int) -> None:
        """Something was captured."""
        self.metrics.captured.inc()
        self.metrics.captured_credits.inc(amount)
        self.captured.set()

    async def release(self, held: Hold, reason: str) -> None:
        """Give a hold back whose call cost nothing."""
        await self._writer.enter(lambda books: journal.release(books, held, reason), (held.account,))

    async def release_unanswered(self, receipt_id: str, account: str, reason: str) -> None:
        """Give a hold back of which nobody knows whether it was, or is going to be, written."""
        await self._writer.enter(
            lambda books: journal.release_unanswered(books, receipt_id, account, reason), (account,)
        )

    async def lose(self, held: Hold, reason: str) -> None:
        """Give a hold back whose call cannot be metered: listed and counted."""
        await self._writer.enter(lambda books: journal.lose(books, held, reason), (held.account,))

    async def renew(self, running: Sequence[Hold]) -> None:
        """Say that calls are still running."""
        sequences = [held.sequence for held in running]
        await self._writer.run(lambda tx: journal.renew(tx, sequences, self._lease_ms))

    async def keep_rate_card(self, price_id: str, card: RateCard) -> None:
        """Keep a rate card before the first receipt names it."""
        if price_id not in self._price_ids:
            await self._writer.run(lambda tx: journal.keep_rate_card(tx, price_id, card))
            self._price_ids.add(price_id)

    async def draw(self, caller: Caller, amount: int) -> Hold:
        """The hold that `charge` will make: its ids are what a receipt can be signed for.

        Raises:
            LedgerError
        """
        sequence = await self._reader.run(self._database.draw) if self.is_shared else self._database.draw()
        return Hold(
            sequence, journal.charge_id(self.epoch, sequence), new_receipt_id(), caller.account, amount, 0
        )

    async def charge(
        self,
        caller: Caller,
        model: str,
        bound: Bound,
        drawn: Hold,
        signed: SignedReceipt,
        *,
        block_time: int,
        expiry_margin: int,
        idempotency_key: str,
        body_hash: str,
        surface: Surface | None = None,
        vendor_cost: int | None = None,
    ) -> str:
        """Hold and capture at once, once per idempotency key; the receipt's id.

        Raises:
            AccountNotFound, PaymentRequired, IdempotencyConflict, LedgerError
        """
        receipt_id = await self._writer.enter(
            lambda books: journal.charge(
                books,
                once=Once(_CHARGES, idempotency_key, body_hash),
                order=lambda books: journal.hold(
                    books,
                    epoch=journal.epoch_of(drawn.charge_id),
                    caller=caller,
                    surface=surface,
                    model=model,
                    bound=bound,
                    block_time=block_time,
                    expiry_margin=expiry_margin,
                    lease_ms=self._lease_ms,
                    receipt_id=drawn.receipt_id,
                    sequence=drawn.sequence,
                ),
                signed=signed,
                vendor_cost=vendor_cost,
            ),
            (caller.account,),
        )
        self._count(signed.receipt.amount)
        return receipt_id

    async def find_charge(self, *, idempotency_key: str, body_hash: str) -> str | None:
        """The receipt's id of an earlier `charge` under this key, if there is one.

        Raises:
            IdempotencyConflict, LedgerError
        """
        return await self.read(
            lambda c: journal.find_charge(c.execute, Once(_CHARGES, idempotency_key, body_hash))
        )

    async def find_answer(self, once: Once) -> Answer | None:
        """What a repeat under an idempotency key is given, if it is kept.

        Raises:
            LedgerError
        """
        return await self.read(lambda c: journal.find_answer(c.execute, once))

    def block_time(self, max_age_seconds: float) -> int:
        """Timestamp of the newest block, for a decision about money.

        Raises:
            Unavailable: the projection is older than `max_age_seconds`, or settlement has stopped or is late.
        """
        if self.gate.refusal is not None:
            raise Unavailable(reason=self.gate.refusal)
        return self.view.block_time(max_age_seconds)

    # ── Watching it ──────────────────────────────────────────────────────────────────────────────────

    @property
    def waiting(self) -> int:
        """How many operations wait for a commit."""
        return self._writer.waiting

    async def figures(self) -> Figures:
        """The ledger at a glance.

        Raises:
            LedgerError
        """
        return await self.read(figures.read)

    async def probe(self) -> None:
        """See that it can write.

        Raises:
            LedgerError
        """
        await self._writer.run(lambda tx: shared.publish(tx, {shared.PROBE: secrets.token_hex(8)}))

    def deposit_address(self, account: str) -> str:
        """Where tokens sent are credited to an account."""
        return deposit_address(self.vault, account)

    async def forget(self, account: str) -> Forgotten:
        """Erase all that only this ledger knows of an account; its keys open nothing any more.

        Raises:
            AccountNotFound, AccountBusy, LedgerError
        """
        return await self.keys.change(lambda tx: retention.forget(tx, account))

    # ── Everything else ──────────────────────────────────────────────────────────────────────────────

    async def write(self, operation: Operation[T]) -> T:
        """Run one operation of this room durably."""
        return await self._writer.run(operation)

    async def read(self, query: Query[T]) -> T:
        """Run one query of this room in a thread, on what is committed."""
        return await self._reader.read(query)

    def read_sync(self, query: Query[T]) -> T:
        """The same, blocking."""
        return self._reader.read_sync(query)


def new_receipt_id() -> str:
    """48 bits of Unix milliseconds and 80 random ones, as in a ULID; in hexadecimal.

    Those of one commit are beside each other in their index, where random ones would each write a page of their own.
    """
    return f"{journal.now_ms():012x}{os.urandom(10).hex()}"
