"""Sweeps of deposit addresses: tokens sent to an account's address become its credit."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import structlog

from waterfall.chain import vault as calls
from waterfall.chain.rpc import Rpc
from waterfall.chain.token import TRANSFER_TOPIC, balance_of
from waterfall.errors import ChainError
from waterfall.ledger import slots
from waterfall.ledger.projection import UNKNOWN_LABEL, Block
from waterfall.ledger.slots import Slot, Sweepable
from waterfall.ledger.store import Ledger
from waterfall.settlement.pace import gather
from waterfall.settlement.work import Later, Outcome, Work

log = structlog.get_logger()

_TOPICS = 500
"""Addresses asked for at once: nodes take a thousand or so."""
_MOST_BLOCKS = 1000
"""Logs asked for at once; whoever was away for longer asks every address for its balance instead."""
_WATCH_SECONDS = 1
_OVERDUE_SECONDS = 10


@dataclass
class Sweeps:
    """Which deposit addresses hold money, and what brings it in."""

    rpc: Rpc
    ledger: Ledger
    token: str
    purpose: ClassVar[str] = "sweep"
    _addresses: dict[str, Sweepable] = field(default_factory=dict, init=False)
    """Every account, by its deposit address."""
    _accounts: dict[str, str] = field(default_factory=dict, init=False)
    """Every deposit address, by its account."""
    _waiting: dict[str, float] = field(default_factory=dict, init=False)
    """Since when (monotonic): addresses that held money when last asked: until a sweep is mined, so that one that was not sent is tried again."""
    _unasked: set[str] = field(default_factory=set, init=False)
    """Addresses that may hold money and have not answered."""
    _watched: Block | None = field(default=None, init=False)
    _watched_at: float = field(default=float("-inf"), init=False)

    # ── What lanes ask ───────────────────────────────────────────────────────────────────────────────

    @property
    def overdue(self) -> "Overdue":
        """The same, as far as it has waited too long, for a lane to ask before anything else."""
        return Overdue(self)

    async def next_work(self, waited: float = 0) -> Work | Later | None:
        """A sweep of the first address that holds money, has for so many seconds, and has none in flight."""
        if not self._waiting:
            return None
        in_flight = await self.ledger.read(lambda c: slots.in_flight(c, self.purpose))
        for address, since in self._waiting.items():
            account = self._addresses[address]
            if account.account not in in_flight and time.monotonic() - since >= waited:
                return Work(
                    purpose=self.purpose,
                    reference=account.account,
                    target=self.ledger.vault,
                    calldata=calls.sweep(self.ledger.platform, account.owner, account.label_hash),
                    gas=calls.SWEEP_GAS,
                )
        return None

    async def renew_work(self, slot: Slot) -> Work:
        """The same call."""
        return Work(slot.purpose, slot.target, slot.calldata, slot.gas, slot.reference)

    async def smaller_work(self, slot: Slot) -> Work | None:  # noqa: ARG002
        """There is no less of it."""
        return None

    async def mined(self, slot: Slot, outcome: Outcome) -> None:
        """A sweep was mined: done with, unless more has arrived since. One that failed waits for more to arrive."""
        address = self._accounts.get(str(slot.reference))
        if address is None:
            return
        self._waiting.pop(address, None)
        if outcome.succeeded:
            self._unasked.add(address)
            self._watched_at = float("-inf")
        else:
            log.error("sweep reverted", account=slot.reference, address=address)

    # ── Watching ─────────────────────────────────────────────────────────────────────────────────────

    async def watch(self) -> None:
        """Find deposit addresses that hold money: by the token's logs; new ones and at start, by asking each.

        Raises:
            ChainError, LedgerError: it is looked for again.
        """
        head, now = self.ledger.view.head, time.monotonic()
        if head is None or (head.block == self._watched and not self._unasked):
            return
        if now - self._watched_at < _WATCH_SECONDS:
            return
        await self._learn_accounts()
        if head.block != self._watched:
            self._unasked.update(await self._paid(head.block))
            self._watched = head.block
        await self._ask()
        self._watched_at = now

    async def _learn_accounts(self) -> None:
        """Accounts are never taken away, so that their number says whether there are new ones."""
        count = await self.ledger.read(lambda c: slots.count_accounts(c, UNKNOWN_LABEL))
        if count == len(self._accounts):
            return
        for account in await self.ledger.read(lambda c: slots.sweepable_accounts(c, UNKNOWN_LABEL)):
            if account.account not in self._accounts:
                address = self.ledger.deposit_address(account.account)
                self._accounts[account.account] = address
                self._addresses[address] = account
                self._unasked.add(address)  # it may have been paid before it was opened

    async def _paid(self, head: Block) -> Iterable[str]:
        """The deposit addresses that may have been paid since the last look."""
        watched = self._watched
        if watched is None:
            return ()  # all of them are new
        if head.number - watched.number > _MOST_BLOCKS or await self._is_reorged(watched, head):
            return self._addresses
        criteria = {
            "address": self.token,
            "fromBlock": hex(watched.number + 1),
            "toBlock": hex(head.number),
        }
        words = ("0x" + address[2:].rjust(64, "0") for address in self._addresses)

        async def transfers(receivers: list[str]) -> Any:
            topics = [TRANSFER_TOPIC, None, receivers]
            return await self.rpc.call("eth_getLogs", {**criteria, "topics": topics})

        found = await gather(transfers, _chunks(words, _TOPICS))
        try:
            paid = {"0x" + entry["topics"][2][26:] for logs in found for entry in logs}
        except (TypeError, LookupError):
            raise ChainError(reason=f"the logs of {self.token} cannot be read") from None
        return paid & self._addresses.keys()  # whatever else a node tells of

    async def _ask(self) -> None:
        """Ask what may hold money whether it does; what does not answer is asked again."""

        async def ask(address: str) -> None:
            tokens = await balance_of(self.rpc, self.token, address)
            self._unasked.discard(address)
            if tokens > 0:
                self._waiting.setdefault(address, time.monotonic())

        await gather(ask, list(self._unasked))

    async def _is_reorged(self, block: Block, head: Block) -> bool:
        others = [known for known in await self.ledger.view.recent_blocks() if known.number == block.number]
        return block.number >= head.number or (others != [] and block not in others)


@dataclass
class Overdue:
    """Now and then one sweep goes before all charges, or under load none ever would."""

    sweeps: Sweeps
    purpose: ClassVar[str] = "sweep"
    _last: float = field(default=float("-inf"), init=False)

    async def next_work(self) -> Work | Later | None:
        """A sweep that has waited for long."""
        now = time.monotonic()
        if now - self._last < _OVERDUE_SECONDS:
            return None
        work = await self.sweeps.next_work(_OVERDUE_SECONDS)
        if work is not None:
            self._last = now
        return work

    async def renew_work(self, slot: Slot) -> Work:
        """The same call."""
        return await self.sweeps.renew_work(slot)

    async def smaller_work(self, slot: Slot) -> Work | None:
        """There is no less of it."""
        return await self.sweeps.smaller_work(slot)

    async def mined(self, slot: Slot, outcome: Outcome) -> None:
        """A sweep was mined."""
        await self.sweeps.mined(slot, outcome)


def _chunks(values: Iterable[str], size: int) -> Iterator[list[str]]:
    remaining = iter(values)
    while chunk := list(islice(remaining, size)):
        yield chunk
