"""How fast charges come to the chain, and what a relayer needs for it. On anvil, a real vault, a real database."""

import asyncio
import contextlib
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import sqlalchemy as sa
import uvloop
from service import local_net
from settling import GAS, METER, Settlement

from bench.figures import Figure
from waterfall.chain import vault as calls
from waterfall.chain.events import Charged
from waterfall.chain.transactions import Fees, sign
from waterfall.ledger import reconciliation, schema
from waterfall.receipts import settlement_digest
from waterfall.types import Charge

_CHARGES, _BATCH = 50_000, 500
_LABELS = [f"user {number}" for number in range(100)]
_AT_ONCE = 64
_CALLS = 200
"""Calls whose way to the chain is measured, for each figure."""
_SETTLED_FOR_MEMORY = 200_000
_EVENTS = 100_000


# ── Charges a second ─────────────────────────────────────────────────────────────────────────────────


def lane_rate() -> list[Figure]:
    """One lane with a full queue, and anvil fed with batches that were ready."""
    with tempfile.TemporaryDirectory(prefix="waterfall-bench-") as folder:
        bare = uvloop.run(_prepared(Path(folder) / "bare"))
        lane = uvloop.run(_lane(Path(folder) / "lane"))
    return [
        Figure(
            "settlement.anvil", bare, "/s", f"charges a second that anvil takes in ready batches of {_BATCH}"
        ),
        Figure(
            "settlement.lane",
            lane,
            "/s",
            f"charges a second through one lane, {_CHARGES:,} in a row",
            at_least=2_500,
        ),
        Figure(
            "settlement.lane_share",
            100 * lane / bare,
            "%",
            "the lane's share of what anvil takes",
            at_least=40,
        ),
    ]


async def _prepared(folder: Path) -> float:
    async with _settlement(folder) as settlement:
        rpc, chain = settlement.net.anvil.rpc, settlement.net.chain
        latest = await rpc.call("eth_getBlockByNumber", "latest", False)
        deadline = int(latest["timestamp"], 16) + 3000
        ids = itertools.count(1)
        raws = []
        for nonce in range(_CHARGES // _BATCH):
            charges = [
                Charge(
                    account=settlement.accounts[id_ % len(settlement.accounts)],
                    id=id_,
                    amount=10**6,
                    receipt_hash=f"0x{id_:064x}",
                )
                for id_ in itertools.islice(ids, _BATCH)
            ]
            digest = settlement_digest(settlement.domain, chain.platform, charges, deadline)
            signed = sign(
                GAS[0],
                chain_id=chain.chain_id,
                nonce=nonce,
                target=chain.vault,
                calldata=calls.settle(chain.platform, charges, deadline, METER.sign(digest)),
                gas=calls.settle_gas(_BATCH),
                fees=Fees(10**11, 10**9),
            )
            raws.append("0x" + signed.raw.hex())
        began = time.perf_counter()
        for raw in raws:
            sent = await rpc.call("eth_sendRawTransaction", raw)
            while (receipt := await rpc.call("eth_getTransactionReceipt", sent)) is None:
                await asyncio.sleep(0.001)
            assert receipt["status"] == "0x1"
        took = time.perf_counter() - began
        events = [event for _, event in await settlement.net.vault.logs(fromBlock="0x0")]
        assert len([event for event in events if isinstance(event, Charged)]) == _CHARGES, events[-1]
        return _CHARGES / took


async def _lane(folder: Path) -> float:
    async with _settlement(folder) as settlement:
        await _charge(settlement, _CHARGES)
        began = time.perf_counter()
        async with settlement.relaying():
            await settlement.settled(600)
        took = time.perf_counter() - began
        assert sum((await settlement.states()).values()) == _CHARGES
        return _CHARGES / took


# ── From capture to inclusion ────────────────────────────────────────────────────────────────────────


def inclusion() -> list[Figure]:
    """The median time from a capture to the block with its charge."""
    figures = []
    for block_ms, lanes in itertools.product((1000, 200), (1, 2)):
        with tempfile.TemporaryDirectory(prefix="waterfall-bench-") as folder:
            times = uvloop.run(_inclusion(Path(folder), block_ms / 1000, lanes))
        most = (1.5 if lanes == 1 else 1) * block_ms + 100
        figures.append(
            Figure(
                f"settlement.inclusion.{block_ms}ms.{lanes}",
                1000 * statistics.median(times),
                "ms",
                f"from capture to inclusion, median of {len(times)} calls, blocks of {block_ms} ms, {lanes} lane(s)",
                at_most=most,
            )
        )
    return figures


async def _inclusion(folder: Path, block_seconds: float, lanes: int) -> list[float]:
    chance = random.Random(1)  # noqa: S311 - the same arrivals every time
    async with (
        _settlement(folder, lanes=lanes) as settlement,
        settlement.relaying(),
        _blocks(settlement, block_seconds) as seen,
    ):
        captured: dict[int, float] = {}

        async def call() -> None:
            sequence = await settlement.charge(account=chance.choice(settlement.accounts))
            captured[sequence] = time.perf_counter()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(_CALLS):
                tasks.create_task(call())
                await asyncio.sleep(chance.expovariate(5 / block_seconds))
        await settlement.settled(60)
        columns = schema.charges.c.sequence, schema.charges.c.block
        rows = await settlement.ledger.read(lambda c: c.execute(sa.select(*columns)).all())
        return [seen[row.block] - captured[row.sequence] for row in rows]


@contextlib.asynccontextmanager
async def _blocks(settlement: Settlement, seconds: float) -> AsyncIterator[dict[int, float]]:
    """Mine at a steady pace; when each block was there."""
    rpc, seen = settlement.net.anvil.rpc, {}
    await rpc.call("evm_setAutomine", False)

    async def mine() -> None:
        due = time.perf_counter()
        while True:
            due += seconds
            await asyncio.sleep(due - time.perf_counter())
            await rpc.call("evm_mine")
            seen[int(await rpc.call("eth_blockNumber"), 16)] = time.perf_counter()

    mining = asyncio.create_task(mine())
    try:
        yield seen
    finally:
        mining.cancel()


# ── Memory, start-up, rebuild ────────────────────────────────────────────────────────────────────────


def memory() -> list[Figure]:
    """A relayer's memory over many charges."""
    with tempfile.TemporaryDirectory(prefix="waterfall-bench-") as folder:
        sizes = uvloop.run(_memory(Path(folder)))
    return [
        Figure(
            "relayer.memory",
            sizes[-1],
            "MiB",
            f"memory of gateway's ledger and relayer after {_SETTLED_FOR_MEMORY:,} charges",
        ),
        Figure(
            "relayer.memory_growth",
            100 * (sizes[-1] / sizes[0] - 1),
            "%",
            f"its growth from {_CHARGES:,} charges to {_SETTLED_FOR_MEMORY:,}",
            at_most=10,
        ),
    ]


async def _memory(folder: Path) -> list[float]:
    sizes = []
    async with _settlement(folder) as settlement, settlement.relaying():
        for _ in range(_SETTLED_FOR_MEMORY // _CHARGES):
            await _charge(settlement, _CHARGES)
            await settlement.settled(600)
            sizes.append(_resident())
    return sizes


def start() -> list[Figure]:
    """How long a large ledger takes to start, and to be rebuilt from the chain."""
    with tempfile.TemporaryDirectory(prefix="waterfall-bench-") as folder:
        started, rebuilt, read = uvloop.run(_start(Path(folder)))
    charges = f"{_EVENTS:,} charges on the chain"
    return [
        Figure("ledger.start", started, "s", f"start-up with {_EVENTS:,} settled charges", at_most=30),
        Figure("ledger.rebuild", rebuilt, "s", f"`rebuild` from {charges}", at_most=30),
        Figure("ledger.first_start", read, "s", f"start-up with an empty database and {charges}", at_most=30),
    ]


async def _start(folder: Path) -> tuple[float, float, float]:
    async with _settlement(folder, beside=True) as settlement:
        async with settlement.relaying():
            await _charge(settlement, _EVENTS)
            await settlement.settled(600)
        settlement.ledger.close()
        again, started = await _opened(settlement, folder)
        began = time.perf_counter()
        await again.ledger.view.rebuild()
        await again.relayer.catch_up()
        rebuilt = time.perf_counter() - began
        states = await again.states()
        again.ledger.close()
        assert set(states) <= {"settled", "final"}, states
        empty, read = await _opened(settlement, folder / "empty")
        assert await empty.ledger.read(reconciliation.is_journal_lost), "the chain was read"
        empty.ledger.close()
        return started, rebuilt, read


async def _opened(settlement: Settlement, folder: Path) -> tuple[Settlement, float]:
    """Beside it, on the ledger of a folder; and how many seconds it took to be at the head."""
    began = time.perf_counter()
    ledger = Settlement.open_ledger(folder, settlement.net)
    again = Settlement(settlement.net, ledger, gas=GAS[:1], most_charges=_BATCH)
    await again.relayer.catch_up()
    return again, time.perf_counter() - began


def _resident() -> float:
    """MiB of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# ── Places ───────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def _settlement(folder: Path, *, lanes: int = 1, beside: bool = False) -> AsyncIterator[Settlement]:
    """One that is not at work yet, with many accounts; `beside`: its ledger is closed elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    async with local_net(folder / "chain") as net:
        ledger = Settlement.open_ledger(folder, net)
        settlement = Settlement(net, ledger, gas=GAS[:lanes], most_charges=_BATCH)
        await settlement.open_accounts(_LABELS)
        try:
            yield settlement
        finally:
            if not beside:
                ledger.close()


async def _charge(settlement: Settlement, count: int) -> None:
    """So many calls, spread over the accounts."""
    numbers = iter(range(count))

    async def call() -> None:
        for number in numbers:
            await settlement.charge(account=settlement.accounts[number % len(settlement.accounts)])

    await asyncio.gather(*(call() for _ in range(_AT_ONCE)))
