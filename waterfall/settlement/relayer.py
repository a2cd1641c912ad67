"""Runs the indexer and the lanes until told to stop."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import structlog

from waterfall.chain import vault as calls
from waterfall.chain.endpoint import Endpoint
from waterfall.chain.vault import Vault
from waterfall.errors import ChainError, LaneHalted, LedgerError, SignerUnavailable, WaterfallError
from waterfall.ledger import journal, retention, slots
from waterfall.ledger.journal import now_ms
from waterfall.ledger.retention import RetentionSettings
from waterfall.ledger.store import Ledger
from waterfall.settlement.batches import Batches
from waterfall.settlement.finality import Finality
from waterfall.settlement.indexer import ChainStateLost, Indexer
from waterfall.settlement.lane import Lane, LaneSettings
from waterfall.settlement.parts import PartState, State
from waterfall.settlement.policies import Policies
from waterfall.settlement.sweeps import Sweeps
from waterfall.settlement.work import Source
from waterfall.signers import Signer

log = structlog.get_logger()

_SLOWEST_RETRY_SECONDS = 10
_MOST_DOUBLINGS = 20
_HOUSEKEEPING_SECONDS = 15
_GATE, _DEPOSITS, _HOUSEKEEPING = "gate", "deposits", "housekeeping"
_GATE_SECONDS = _WATCH_SECONDS = 1
_GIVE_BACK_SECONDS = 5
_FORGOTTEN_MS = 10 * 60 * 1000
_BETWEEN_WAKES_SECONDS = 0.01


@dataclass(frozen=True)
class RelayerSettings:
    """How the relayer works; fees in wei per gas."""

    deployed_block: int
    finality: str | int
    final_depth: int
    poll_seconds: float
    most_charges: int
    max_fee_cap: int
    max_block_gap: float = float("inf")
    """Seconds without a new block after which the chain counts as not seen any more."""
    gas_batches: int = 3
    """How many of the dearest transactions a gas key must be able to pay for; with less it sends nothing."""
    max_unsettled: int = 100_000
    """How many charges may wait for settlement before new calls are refused."""
    gather_seconds: float | None = None
    """How long a lane gathers charges while another has a batch on its way; None: half a block."""
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    """How long request data is kept."""


class _Part:
    """Something that is done step by step."""

    def __init__(self, name: str, step: Callable[[], Awaitable[bool]], pause: Callable[[], float]) -> None:
        """A part.

        Args:
            name: in `Relayer.parts`, and what processes elect a leader for.
            step: does what can be done now; whether anything was.
            pause: seconds until the next step, after one that did nothing.
        """
        self.name = name
        self.step = step
        self.pause = pause
        self.wake = asyncio.Event()
        """Ends the pause."""


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
        gas: Sequence[Signer],
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
            gas: pay for their transactions, one lane each; they have no other power.
            owner: sends policies; None leaves those to somebody else.
        """
        self._ledger = ledger
        self._settings = settings
        self._rpc = vault.rpc
        self._exit_delay = exit_delay
        self._oldest: tuple[int | None, float] = None, 0
        self._started = now_ms(), time.monotonic()
        self._keeps_gate, self._backlog = False, slots.Backlog(0, None, None)
        self._stopping = asyncio.Event()
        self.halted: dict[str, str] = {}
        """What has stopped and needs a person: part → reason."""
        finality = Finality(vault.rpc, settings.finality, settings.final_depth)
        self.indexer = Indexer(
            vault,
            ledger,
            finality,
            deployed_block=settings.deployed_block,
            poll_seconds=settings.poll_seconds,
            max_block_gap=settings.max_block_gap,
        )
        self._indexing = _Part("indexer", self.indexer.step, self.indexer.pace.pause)
        batches = Batches(
            vault.rpc,
            ledger,
            meter,
            settings.most_charges,
            is_in_flight=self._is_batch_in_flight,
            block_interval=lambda: self.indexer.pace.interval,
            gather_seconds=settings.gather_seconds,
        )
        self._sweeps = Sweeps(vault.rpc, ledger, token)
        sources = self._sweeps.overdue, batches, self._sweeps
        turn = asyncio.Lock()
        worst = calls.settle_gas(settings.most_charges)
        self._settling = {
            f"settle {signer.address}": self._lane(f"settle {signer.address}", signer, sources, worst, turn)
            for signer in gas
        }
        self.lanes: dict[str, Lane] = dict(self._settling)
        """By part; each has its `facts`."""
        if owner is not None:
            policies = (Policies(self._rpc, ledger, finality),)
            self.lanes["policy"] = self._lane("policy", owner, policies, calls.SET_POLICY_GAS, asyncio.Lock())
        self.parts: dict[str, PartState] = {
            name: PartState(State.WAITING, "it has not begun", time.time())
            for name in (self._indexing.name, *self.lanes, _DEPOSITS, _HOUSEKEEPING)
        }
        """How each part is."""
        self._sending = {
            name: _Part(name, lane.step, lambda lane=lane: lane.pause)  # type: ignore[misc]
            for name, lane in self.lanes.items()
        }

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """The chain's nodes, and how they have done."""
        return self._rpc.endpoints

    def _lane(
        self, name: str, signer: Signer, sources: Sequence[Source], worst_gas: int, turn: asyncio.Lock
    ) -> Lane:
        return Lane(
            name=name,
            rpc=self._rpc,
            ledger=self._ledger,
            signer=signer,
            sources=sources,
            settings=LaneSettings(
                max_fee_cap=self._settings.max_fee_cap,
                worst_gas=worst_gas,
                gas_batches=self._settings.gas_batches,
                poll_seconds=self._settings.poll_seconds,
            ),
            turn=turn,
            saw_receipt=self._indexing.wake.set,
            read_again=self.indexer.read_again,
        )

    async def catch_up(self) -> None:
        """Bring the projection to the chain's head, unless that is another process's part.

        Raises:
            ChainError
        """
        while await self._ledger.leads(self._indexing.name):
            if not await self.indexer.step():
                await self._ledger.view.caught_up()
                return

    def stop(self) -> None:
        """Let `run` end once the steps under way have: no transaction is left between the journal and the nodes."""
        self._stopping.set()
        for part in (self._indexing, *self._sending.values()):
            part.wake.set()

    async def run(self) -> None:
        """Work until stopped or cancelled.

        What fails for now is tried again; what needs a person is kept in `halted`.
        """
        watching = _Part(_DEPOSITS, self._watch, lambda: _WATCH_SECONDS)
        keeping = _Part(_HOUSEKEEPING, self._keep_house, lambda: _HOUSEKEEPING_SECONDS)
        async with asyncio.TaskGroup() as tasks:
            steps = [
                tasks.create_task(self._repeat(part)) for part in (self._indexing, *self._sending.values())
            ]
            others = [
                tasks.create_task(work)
                for work in (
                    self._repeat(watching),
                    self._repeat(keeping),
                    self._wake_for_charges(),
                    self._keep_gate(),
                )
            ]
            await self._stopping.wait()
            await asyncio.wait(steps)
            for other in others:
                other.cancel()

    def _is_batch_in_flight(self) -> bool:
        """Whether a lane that works has a batch on its way: what one that does not has there, may never land."""
        idle = {State.HALTED, State.NOT_LEADING}
        return any(
            lane.slot is not None
            and lane.slot.purpose == Batches.purpose
            and self.parts[name].state not in idle
            for name, lane in self._settling.items()
        )

    # ── One part ─────────────────────────────────────────────────────────────────────────────────────

    async def _repeat(self, part: _Part) -> None:
        failures = 0
        while not self._stopping.is_set():
            part.wake.clear()
            pause = self._settings.poll_seconds
            try:
                if not await self._ledger.leads(part.name):
                    self._show(part.name, State.NOT_LEADING)
                elif part.name in self.lanes and self._indexing.name in self.halted:
                    self._show(part.name, State.WAITING, "nothing is sent to a chain that is not read")
                elif await part.step():
                    pause = 0
                    self._show_step(part.name)
                    self._pass_on(part)
                else:
                    pause = part.pause()
                    self._show_step(part.name)
                failures = 0
            except (LaneHalted, ChainStateLost) as error:
                await self._halt(part.name, error.message)
                return
            except (ChainError, LedgerError, SignerUnavailable) as error:
                failures = min(failures + 1, _MOST_DOUBLINGS)
                self._ledger.metrics.part_failures.labels(part.name, error.code).inc()
                pause = min(self._settings.poll_seconds * 2**failures, _SLOWEST_RETRY_SECONDS)
                self._show(part.name, State.RETRYING, error.message, failures)
                log.warning("will be tried again", part=part.name, reason=error.message, seconds=pause)
            except Exception as error:  # one part's mistake stops neither the others nor the gateway
                failures = min(failures + 1, _MOST_DOUBLINGS)
                self._ledger.metrics.part_failures.labels(part.name, WaterfallError.code).inc()
                pause = _SLOWEST_RETRY_SECONDS
                self._show(part.name, State.RETRYING, f"unexpected {error!r}: see the log", failures)
                log.exception("unexpected", part=part.name, seconds=pause)
            await self._rest(part, pause, in_error=failures > 0)

    async def _rest(self, part: _Part, seconds: float, *, in_error: bool = False) -> None:
        """Pause; but for what failed, only until it is woken."""
        if seconds == 0:
            await asyncio.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await (self._stopping if in_error else part.wake).wait()

    def _pass_on(self, part: _Part) -> None:
        """A block was read: lanes may have something to close, and so to send."""
        if part is self._indexing:
            for sending in self._sending.values():
                sending.wake.set()

    async def _wake_for_charges(self) -> None:
        """Wake the lanes that have nothing to do whenever a charge is captured."""
        while True:
            await self._ledger.captured.wait()
            self._ledger.captured.clear()
            for name, lane in self._settling.items():
                if lane.slot is None and not lane.patient:
                    self._sending[name].wake.set()
            await asyncio.sleep(_BETWEEN_WAKES_SECONDS)

    # ── How the parts are ────────────────────────────────────────────────────────────────────────────

    def _show(self, part: str, state: State, reason: str | None = None, failures: int = 0) -> None:
        self.parts[part] = self.parts[part].become(state, reason, failures)

    def _show_step(self, part: str) -> None:
        lane = self.lanes.get(part)
        if lane is None:
            self._show(part, State.OK)
        else:
            self._show(part, lane.state, lane.reason)

    async def _halt(self, part: str, reason: str) -> None:
        """Stop a part for good, and let the other lanes settle what it had taken."""
        self.halted[part] = reason
        self._show(part, State.HALTED, reason)
        if self._keeps_gate:  # before anybody can see that it has halted
            self._ledger.gate.refuse(self._reason_to_refuse(self._backlog))
        log.error("halted", part=part, reason=reason)
        lane = self._settling.get(part)
        # Again and again: a reorg may give its charges back to it.
        while lane is not None and not self._stopping.is_set():
            try:
                signer = lane.signer.address
                back = await self._ledger.write(lambda tx, signer=signer: slots.give_back(tx, signer))  # type: ignore[misc]
                if back:
                    log.warning("given to other lanes", part=part, charges=back)
                    self._ledger.captured.set()
            except LedgerError as error:
                log.warning("will be tried again", part=part, reason=error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GIVE_BACK_SECONDS):
                    await self._stopping.wait()

    # ── Whether to go on accepting calls ─────────────────────────────────────────────────────────────

    async def _keep_gate(self) -> None:
        while True:
            await self._check_gate()
            await asyncio.sleep(_GATE_SECONDS)

    async def _check_gate(self) -> None:
        """Refuse new calls while what they would cost might not be settled. One process says so for all.

        What has halted in another process, this one notices by its effects: the queue grows old, the chain is not read.
        """
        try:
            if not await self._ledger.leads(_GATE):
                self._keeps_gate = False
                self._ledger.gate.step_down()
                return
            self._keeps_gate, self._backlog = True, await self._ledger.read(slots.backlog)
        except LedgerError:
            return  # nobody knows better than what was said last; and without its database no gateway holds anything
        self._ledger.gate.refuse(self._reason_to_refuse(self._backlog))

    def _reason_to_refuse(self, backlog: slots.Backlog) -> str | None:
        if self._indexing.name in self.halted:
            return self.halted[self._indexing.name]
        if self._ledger.view.mismatches:
            return self._ledger.view.mismatches[0]
        halted = [self.halted[name] for name in self._settling if name in self.halted]
        if len(halted) == len(self._settling):
            return halted[0] if halted else "there is no key to settle with"
        if backlog.count > self._settings.max_unsettled:
            return f"{backlog.count} charges wait for settlement"
        age = self._age(backlog)
        return f"settlement is {age:.0f} s behind" if age > self._exit_delay / 4 else None

    def _age(self, backlog: slots.Backlog) -> float:
        """Seconds that the oldest charge has waited: by the host's clock unless it jumps, and since this process saw it."""
        now = time.monotonic()
        if backlog.oldest is None or backlog.captured_at is None:
            self._oldest = None, now
            return 0
        if backlog.oldest != self._oldest[0]:
            self._oldest = backlog.oldest, now
        return max((self._surely_past() - backlog.captured_at) / 1000, now - self._oldest[1])

    # ── Chores ───────────────────────────────────────────────────────────────────────────────────────

    async def _watch(self) -> bool:
        await self._sweeps.watch()
        return False

    async def _keep_house(self) -> bool:
        """Close abandoned holds; give what was rejected, or taken by a key that is gone, another chance."""
        lost = await self._ledger.write(journal.lose_abandoned_holds)
        if lost:
            log.error("holds lost", count=lost)
        await self._ledger.write(
            lambda tx: retention.sweep(tx, self._settings.retention, self._surely_past())
        )
        head = self._ledger.view.head
        if head is not None:
            await self._ledger.write(lambda tx: journal.retry_rejected(tx, head.block.timestamp))
        keys = [lane.signer.address for lane in self.lanes.values()]
        before = self._surely_past() - _FORGOTTEN_MS
        back = await self._ledger.write(lambda tx: slots.give_back_others(tx, keys, before))
        if back:
            log.warning("given to other lanes", charges=back)
        for lane in self.lanes.values():  # an idle key's money is watched, too
            await lane.purse.look()
        return False

    def _surely_past(self) -> int:
        """Unix milliseconds that have passed even if the host's clock was set forward since we started."""
        started, then = self._started
        return min(now_ms(), started + int(1000 * (time.monotonic() - then)))
