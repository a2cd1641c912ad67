"""Runs the indexer and the lanes until told to stop."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from waterfall.chain.rpc import Rpc
from waterfall.chain.vault import Vault
from waterfall.errors import ChainError, LaneHalted, LedgerError
from waterfall.ledger import journal, views
from waterfall.ledger.journal import now_ms
from waterfall.ledger.store import Ledger
from waterfall.settlement.indexer import ChainStateLost, Indexer
from waterfall.settlement.lane import Lane, LaneSettings
from waterfall.settlement.work import Batches, Policies
from waterfall.signers import Signer

log = structlog.get_logger()

_SLOWEST_RETRY_SECONDS = 10
_MOST_DOUBLINGS = 20
_HOUSEKEEPING_SECONDS = 15


@dataclass(frozen=True)
class RelayerSettings:
    """How the relayer works; fees in wei per gas."""

    deployed_block: int
    finality: str | int
    final_depth: int
    poll_seconds: float
    most_charges: int
    max_fee_cap: int


class Relayer:
    """Everything that keeps one platform's ledger and its vault in step."""

    def __init__(
        self,
        vault: Vault,
        ledger: Ledger,
        settings: RelayerSettings,
        *,
        token: str,
        exit_delay: int,
        meter: Signer,
        gas: Signer,
        owner: Signer | None,
    ) -> None:
        """A relayer.

        Args:
            vault: the chain's side.
            ledger: this side.
            settings: how it works.
            token: address of the vault's token.
            exit_delay: the platform's, in seconds: nothing may stay unsettled for a quarter of it.
            meter: signs batches.
            gas: pays for their transactions; has no other power.
            owner: sends policies; None leaves those to somebody else.
        """
        self._ledger = ledger
        self._settings = settings
        self._exit_delay = exit_delay
        self.halted: dict[str, str] = {}
        """What has stopped and needs a person: part → reason."""
        self._indexer = Indexer(
            vault,
            ledger,
            deployed_block=settings.deployed_block,
            finality=settings.finality,
            final_depth=settings.final_depth,
        )
        self._batches = Batches(vault.rpc, ledger, meter, gas.address, token, settings.most_charges)
        self._settling = self._lane("settle", vault.rpc, gas, self._batches)
        self._policies = None if owner is None else self._lane("policy", vault.rpc, owner, Policies(ledger))

    def _lane(self, name: str, rpc: Rpc, signer: Signer, work: Batches | Policies) -> Lane:
        return Lane(
            name=name,
            rpc=rpc,
            ledger=self._ledger,
            signer=signer,
            next_work=work.next_work,
            renew_work=work.renew_work,
            mined=work.mined,
            settings=LaneSettings(max_fee_cap=self._settings.max_fee_cap),
        )

    async def catch_up(self) -> None:
        """Bring the projection to the chain's head.

        Raises:
            ChainError
        """
        while await self._indexer.step():
            pass
        await self._ledger.caught_up()

    async def run(self) -> None:
        """Work until cancelled. What fails for now is tried again; what needs a person is kept in `halted`."""
        poll = self._settings.poll_seconds
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._repeat("indexer", self._indexer.step, poll))
            tasks.create_task(self._repeat("settle", self._settling.step, poll, self._wait_for_charges))
            if self._policies is not None:
                tasks.create_task(self._repeat("policy", self._policies.step, poll))
            tasks.create_task(self._repeat("deposits", self._watch, poll))
            tasks.create_task(self._repeat("housekeeping", self._keep_house, _HOUSEKEEPING_SECONDS))

    async def _repeat(
        self,
        part: str,
        step: Callable[[], Awaitable[bool]],
        seconds: float,
        rest: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        failures = 0
        while True:
            pause = seconds
            try:
                if await step():
                    pause = 0
                failures = 0
            except (LaneHalted, ChainStateLost) as error:
                self.halted[part] = error.message
                self._ledger.refuse(error.message)
                log.error("halted", part=part, reason=error.message)
                return
            except (ChainError, LedgerError) as error:
                failures = min(failures + 1, _MOST_DOUBLINGS)
                pause = min(seconds * 2**failures, _SLOWEST_RETRY_SECONDS)
                log.warning("will be tried again", part=part, reason=error.message, seconds=pause)
            await rest(pause)

    async def _wait_for_charges(self, seconds: float) -> None:
        """Pause; while nothing is in flight, only until a charge is captured."""
        if self._settling.in_flight:
            await asyncio.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ledger.captured.wait()
        self._ledger.captured.clear()

    async def _watch(self) -> bool:
        await self._batches.watch_deposit_addresses()
        return False

    async def _keep_house(self) -> bool:
        """Close abandoned holds, and refuse new calls while settlement is too far behind."""
        lost = await self._ledger.write(
            lambda tx: journal.lose_open_holds(tx, "its call was abandoned", lease_before=now_ms())
        )
        head = self._ledger.head
        if head is not None:
            await self._ledger.write(lambda tx: journal.retry_rejected(tx, head.block.timestamp))
        if lost:
            log.error("holds lost", count=lost)
        if not self.halted:
            oldest = await self._ledger.read(views.oldest_unsettled)
            age = 0 if oldest is None else (now_ms() - oldest) / 1000
            late = age > self._exit_delay / 4
            self._ledger.refuse(f"settlement is {age:.0f} s behind" if late else None)
        return False
