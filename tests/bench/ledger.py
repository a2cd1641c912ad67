"""How fast a hold and its capture are, each durable before it is answered."""

import asyncio
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from threading import Barrier

import uvloop
from postgres import Server
from settling import METER, NO_HASH, signed_receipt

from bench.figures import Figure
from waterfall.chain.events import Deposited, Position
from waterfall.chain.vault import account_id
from waterfall.errors import PaymentRequired
from waterfall.ledger.journal import Caller
from waterfall.ledger.projection import Block
from waterfall.ledger.store import Ledger
from waterfall.metering import prices
from waterfall.receipts import Domain
from waterfall.types import ZERO_ADDRESS

_USD = 10**12
_DOMAIN = Domain(31337, "0x" + "c0" * 20)
_PLATFORM = 7
_ACCOUNT = account_id(_PLATFORM, ZERO_ADDRESS, NO_HASH)
_HOLD, _COST = 1_000_000, 10_000
_ROUNDS, _SECONDS = 5, 2
_WAITERS = (1, 16, 64)
_PROCESSES, _SHARED_ROUNDS = 4, 3


def sqlite_pairs() -> list[Figure]:
    """On SQLite, by how many callers wait at the same time."""
    rates: dict[int, list[float]] = {waiters: [] for waiters in _WAITERS}
    for _ in range(_ROUNDS):  # in turns, so that what disturbs the machine disturbs all
        for waiters in _WAITERS:
            with tempfile.TemporaryDirectory(prefix="waterfall-bench-") as folder:
                url = f"sqlite:///{folder}/w.db"
                rates[waiters].append(uvloop.run(_sqlite(url, waiters)))
    targets = {1: 1_200, 16: 10_000, 64: None}
    return [
        Figure(
            f"ledger.sqlite.pairs.{waiters}",
            statistics.median(rates[waiters]),
            "/s",
            f"hold + capture on SQLite, synchronous=FULL, {waiters} waiting",
            at_least=targets[waiters],
        )
        for waiters in _WAITERS
    ]


def postgresql_pairs() -> list[Figure]:
    """On PostgreSQL, one account, from several processes."""
    folder = Path(tempfile.mkdtemp(prefix="waterfall-bench-"))
    server = Server(folder)
    try:
        rates = []
        for _ in range(_SHARED_ROUNDS):
            counts = _at_once(_funded(server, 10**6 * _USD), None)
            rates.append(sum(counts) / _SECONDS)
        money = 1_000 * _HOLD
        spent = sum(_at_once(_funded(server, money), _HOLD)) * _HOLD
        assert spent >= money, "something was left"
    finally:
        server.close()
    return [
        Figure(
            "ledger.postgresql.pairs.4x16",
            statistics.median(rates),
            "/s",
            f"hold + capture on PostgreSQL, {_PROCESSES} processes × 16 waiting, one account",
            at_least=2_000,
        ),
        Figure(
            "ledger.postgresql.overspent",
            spent - money,
            "units",
            "the same, until the account is empty: what was spent beyond it",
            at_most=0,
        ),
    ]


def _funded(server: Server, amount: int) -> str:
    """URL of a new ledger with one funded account."""
    url = server.new_database()
    ledger = _open(url)
    asyncio.run(_fund(ledger, amount))
    ledger.close()
    return url


def _at_once(url: str, cost: int | None) -> list[int]:
    """How many pairs each of the processes does; with a cost, until nothing is left."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(_PROCESSES) as pool:
        together = manager.Barrier(_PROCESSES)
        return pool.starmap(_process, [(url, cost, together)] * _PROCESSES, chunksize=1)


def _process(url: str, cost: int | None, together: Barrier) -> int:
    ledger = _open(url)
    try:
        together.wait(60)
        return uvloop.run(_pairs(ledger, 16, cost))
    finally:
        ledger.close()


async def _sqlite(url: str, waiters: int) -> float:
    ledger = _open(url)
    try:
        await _fund(ledger, 10**6 * _USD)
        began = time.perf_counter()
        return await _pairs(ledger, waiters, None) / (time.perf_counter() - began)
    finally:
        ledger.close()


async def _pairs(ledger: Ledger, waiters: int, cost: int | None) -> int:
    """How many were done, in the time there is or, with a cost, until the account is empty."""
    caller, bound, done = Caller(_ACCOUNT, None), prices.fixed(_HOLD), 0
    until = time.perf_counter() + (_SECONDS if cost is None else 60)
    drawn = await ledger.draw(caller, _HOLD)
    signed = signed_receipt(drawn, cost or _COST, _DOMAIN, _PLATFORM)  # signing is measured elsewhere

    async def call() -> None:
        nonlocal done
        while time.perf_counter() < until:
            try:
                held = await ledger.hold(caller, "m", bound, block_time=1, expiry_margin=0)
            except PaymentRequired:
                return
            await ledger.capture(held, signed)
            done += 1

    await asyncio.gather(*(call() for _ in range(waiters)))
    return done


def _open(url: str) -> Ledger:
    return Ledger.open(url, chain_id=_DOMAIN.chain_id, vault=_DOMAIN.vault, platform=_PLATFORM)


async def _fund(ledger: Ledger, amount: int) -> None:
    block = Block(1, "0x" + "01" * 32, 1)
    deposit = Deposited(_PLATFORM, _ACCOUNT, METER.address, ZERO_ADDRESS, NO_HASH, amount, 1)
    await ledger.view.apply([(block, [(Position(1, 0, NO_HASH), deposit)])], spendable=1, final=1)
