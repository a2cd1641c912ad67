"""Does the harm of a plan, and undoes it."""

import asyncio
import signal
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import structlog

from waterfall.devnet.proxy import Proxy, drop, garbage, silence, status
from waterfall.errors import WaterfallError
from waterfall.torture.plan import Step
from waterfall.torture.world import BLOCK_SECONDS, GAS_WEI, MAX_FEE_GWEI, World, kind_of

log = structlog.get_logger()

_GWEI = 10**9
_SPIKE_GWEI, _USUAL_GWEI = 5 * MAX_FEE_GWEI, 1
_LOCK_SECONDS = 10
_DROP_TRIES, _DROP_SECONDS = 40, 0.05

Doing = AbstractAsyncContextManager[None]


@dataclass
class Faults:
    """Works through a plan."""

    world: World
    counts: Counter[str] = field(default_factory=Counter)
    """What else there is to tell: blocks replaced, transactions dropped, connections ended."""
    active: dict[int, Step] = field(default_factory=dict)
    """Those that are on."""
    findings: list[str] = field(default_factory=list)
    """Faults that could not be done: a run that is gentler than its plan proves less than it says."""
    _done: Counter[str] = field(default_factory=Counter, init=False)
    _gas_wei: int = field(default=GAS_WEI, init=False)

    @property
    def done(self) -> Counter[str]:
        """Faults by kind; of failpoints, those that a process has died at."""
        bitten = sum(service.died_at_failpoints for service in self.world.services.values())
        return self._done + Counter({"failpoint": bitten})

    async def run(self, plan: Sequence[Step], began: float) -> None:
        """Do every step at its time, counted from `began` on the loop's clock; all is healed at the end."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            for number, step in enumerate(plan):
                await asyncio.sleep(began + step.at - loop.time())
                tasks.create_task(self._do(number, step))

    async def _do(self, number: int, step: Step) -> None:
        self.active[number] = step
        log.info("fault", **step.as_dict())
        try:
            async with self._doing(step):
                await asyncio.sleep(step.seconds)
            if step.fault == "failpoint":  # it is done once somebody gets there
                self.counts["failpoints set"] += 1
            else:
                self._done[step.fault] += 1
        except (WaterfallError, sqlite3.Error, psycopg.Error, OSError) as error:
            self.findings.append(f"the fault {step.fault} of {step.target} could not be done: {error!r}")
            log.error("fault failed", fault=step.fault, reason=repr(error))
        finally:
            del self.active[number]

    def _doing(self, step: Step) -> Doing:
        family, _, what = step.fault.partition("-")
        if family == "node":
            return self._nodes(step)
        if family == "upstream":
            return self._upstream(what)
        does: dict[str, Callable[[Step], Doing]] = {
            "kill": self._kill,
            "failpoint": self._failpoint,
            "terminate": self._terminate,
            "freeze": self._freeze,
            "reorg": self._reorg,
            "no-blocks": self._no_blocks,
            "automine": self._automine,
            "dropped-transactions": self._dropped,
            "fee-spike": self._fee_spike,
            "gas-drained": self._gas_drained,
            "database-locked": self._locked,
            "locked-and-killed": self._locked_and_killed,
            "backends-ended": self._backends_ended,
        }
        return does[step.fault](step)

    # ── Processes ────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _kill(self, step: Step) -> AsyncIterator[None]:
        self.world.services[step.target].signal(signal.SIGKILL, "kill")
        yield

    @asynccontextmanager
    async def _failpoint(self, step: Step) -> AsyncIterator[None]:
        self.world.services[step.target].die_at(step.detail["point"])
        yield

    @asynccontextmanager
    async def _terminate(self, step: Step) -> AsyncIterator[None]:
        self.world.services[step.target].signal(signal.SIGTERM, "terminate")
        yield

    @asynccontextmanager
    async def _freeze(self, step: Step) -> AsyncIterator[None]:
        service = self.world.services[step.target]
        service.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            service.signal(signal.SIGCONT)

    # ── Nodes ────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _nodes(self, step: Step) -> AsyncIterator[None]:
        nodes = [self.world.nodes[int(name.removeprefix("node "))] for name in step.target.split(", ")]
        for node in nodes:
            await _break(node, step)
        try:
            yield
        finally:
            for node in nodes:
                node.clear()
                if step.fault == "node-refused":
                    await node.listen()

    # ── Chain ────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _reorg(self, step: Step) -> AsyncIterator[None]:
        rpc = self.world.rpc
        async with self.world.mining:
            await rpc.call("evm_setIntervalMining", 0)
            before = await self._block_time()
            await rpc.call("anvil_reorg", step.detail["depth"], [])
            # Anvil's clock has lost the time of these blocks; a chain's never goes back.
            behind = before - await self._block_time()
            if behind > 0:
                await rpc.call("evm_increaseTime", behind)
            await self._fill()  # what was sent to the gas keys lately, went with the blocks
            await rpc.call("evm_setIntervalMining", BLOCK_SECONDS)
        self.counts["blocks replaced"] += step.detail["depth"]
        yield

    async def _block_time(self) -> int:
        return int((await self.world.rpc.call("eth_getBlockByNumber", "latest", False))["timestamp"], 16)

    @asynccontextmanager
    async def _no_blocks(self, _: Step) -> AsyncIterator[None]:
        async with self.world.mining:
            await self.world.rpc.call("evm_setIntervalMining", 0)
            try:
                yield
            finally:
                await self.world.mine_steadily()

    @asynccontextmanager
    async def _automine(self, _: Step) -> AsyncIterator[None]:
        async with self.world.mining:
            await self.world.rpc.call("evm_setAutomine", True)
            try:
                yield
            finally:
                await self.world.mine_steadily()

    @asynccontextmanager
    async def _dropped(self, _: Step) -> AsyncIterator[None]:
        for _try in range(_DROP_TRIES):
            hashes = await self._waiting()
            for tx_hash in hashes:
                await self.world.rpc.call("anvil_dropTransaction", tx_hash)
            self.counts["transactions dropped"] += len(hashes)
            if hashes:
                break
            await asyncio.sleep(_DROP_SECONDS)
        yield

    async def _waiting(self) -> list[str]:
        """The relayer's transactions that are not mined yet."""
        pool = await self.world.rpc.call("txpool_content")
        senders = {address.lower() for address in self.world.gas_keys}
        return [
            transaction["hash"]
            for sender, transactions in pool["pending"].items()
            if sender.lower() in senders
            for transaction in transactions.values()
        ]

    @asynccontextmanager
    async def _fee_spike(self, _: Step) -> AsyncIterator[None]:
        await self._base_fee(_SPIKE_GWEI)
        try:
            yield
        finally:
            await self._base_fee(_USUAL_GWEI)

    async def _base_fee(self, gwei: int) -> None:
        await self.world.rpc.call("anvil_setNextBlockBaseFeePerGas", hex(gwei * _GWEI))

    @asynccontextmanager
    async def _gas_drained(self, _: Step) -> AsyncIterator[None]:
        self._gas_wei = 1
        try:
            await self._fill()
            yield
        finally:
            self._gas_wei = GAS_WEI
            await self._fill()

    async def _fill(self) -> None:
        """Give the gas keys what they should have."""
        for address in self.world.gas_keys:
            await self.world.rpc.call("anvil_setBalance", address, hex(self._gas_wei))

    # ── Provider ─────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _upstream(self, mode: str) -> AsyncIterator[None]:
        self.world.upstream.mode = mode
        try:
            yield
        finally:
            self.world.upstream.mode = None

    # ── Database ─────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _locked(self, _: Step) -> AsyncIterator[None]:
        database = self.world.database
        connection: sqlite3.Connection | psycopg.Connection[Any]
        if kind_of(database) == "sqlite":
            connection = await asyncio.to_thread(_lock_sqlite, database)
        else:
            connection = await asyncio.to_thread(_lock_postgres, database)
        try:
            yield
        finally:
            connection.close()

    @asynccontextmanager
    async def _locked_and_killed(self, step: Step) -> AsyncIterator[None]:
        async with self._locked(step):
            yield
            self.world.services[step.target.removeprefix("database, ")].signal(signal.SIGKILL, "kill")

    @asynccontextmanager
    async def _backends_ended(self, _: Step) -> AsyncIterator[None]:
        self.counts["connections ended"] += await asyncio.to_thread(_end_backends, self.world.database)
        yield


async def _break(node: Proxy, step: Step) -> None:
    detail: Any = step.detail
    match step.fault:
        case "node-storm":
            node.storm(detail["seed"], detail["rate"])
        case "node-drops":
            node.fault(detail["method"], drop(forward=True))
        case "node-silent":
            node.fault(detail["method"], silence(forward=detail["method"] != "*"))
        case "node-429":
            node.fault("*", status(429, retry_after=1))
        case "node-garbage":
            node.fault("*", garbage())
        case "node-stale":
            node.stale_by = detail["blocks"]
        case "node-refused":
            await node.refuse()


def _lock_sqlite(database: str) -> sqlite3.Connection:
    """Take the write lock."""
    file = database.removeprefix("sqlite:///")
    connection = sqlite3.connect(file, isolation_level=None, timeout=_LOCK_SECONDS, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def _lock_postgres(database: str) -> psycopg.Connection[Any]:
    """Let nobody write to what every call writes to."""
    connection = psycopg.connect(database)
    connection.execute(f"SET lock_timeout = '{_LOCK_SECONDS}s'")
    connection.execute("LOCK TABLE wallets, holds, charges IN EXCLUSIVE MODE")
    return connection


def _end_backends(database: str) -> int:
    with psycopg.connect(database, autocommit=True) as connection:
        ended = connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        return len(ended.fetchall())
