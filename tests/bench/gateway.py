"""What a call costs that is held for, captured, signed and settled, beside one that nobody bills."""

import asyncio
import contextlib
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import uvloop
from processes import served, write_config
from service import Client, local_net

from bench.figures import Figure
from bench.load import Load, load, provide
from bench.passing import pass_through

_PATH = "/v1/chat/completions"
_SECONDS, _ROUNDS = 4, 3
_CALLERS = (1, 16, 64)
_CALLS_FOR_MEMORY = 20_000
# Three lanes, so that a block a second has room for what is called: keys of anvil's, which everybody knows.
_GAS = {
    "GAS_1": "0x7c852118294e51e653712a81e05800f419141751be58f605c371e15141b007a6",
    "GAS_2": "0x47e179ec197488593b187f80a00eb0da91f1b9d0b13f8733639f19c30a34926a",
    "GAS_3": "0x8b3a350cf5c34c9194ca85829a2df0ec3153be0318b5e2d3348e872092edffba",
}
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Place:
    """Where calls are sent, and the process that serves them."""

    port: int
    pid: int
    key: str = "none"

    def cpu(self) -> float:
        """Seconds it has worked so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory(self) -> float:
        """MiB it has now."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE / 2**20


@dataclass
class Measured:
    """All rounds of one place, way of answering and number of callers."""

    rates: list[float]
    p50: list[float]
    p99: list[float]
    first: list[float]
    cpu_ms: list[float]

    def of(self, name: str) -> float:
        """The median of the rounds."""
        return statistics.median(getattr(self, name))


def speed() -> list[Figure]:
    """Direct, passed through by a bare gateway, and through ours with everything on."""
    with tempfile.TemporaryDirectory(prefix="waterfall-bench-") as folder:
        measured, extra = uvloop.run(_speed(Path(folder)))
    figures = []
    for stream in (False, True):
        kind = "streams" if stream else "calls"
        for callers in _CALLERS:
            for place, words in (
                ("direct", "straight to the provider"),
                ("bare", "through a bare gateway, nothing billed"),
                ("still", "billed: held, captured, signed, while the chain stands still"),
                ("ours", "billed, a block a second, all of it settled meanwhile"),
            ):
                its = measured[place, stream, callers]
                figures.append(
                    Figure(
                        f"gateway.{kind}.{place}.{callers}",
                        its.of("rates"),
                        "/s",
                        f"{kind} {words}, {callers} caller{'s' if callers > 1 else ''}",
                        at_least=_TARGETS.get((place, stream, callers)),
                    )
                )
    facts: list[tuple[str, float, str, str, float | None]] = []
    for place, when in (("still", "while the chain stands still"), ("ours", "settlement in it")):
        one, direct = measured[place, False, 1], measured["direct", False, 1]
        first = measured[place, True, 1].of("first") - measured["direct", True, 1].of("first")
        cpu, cpu_16 = one.of("cpu_ms"), measured[place, False, 16].of("cpu_ms")
        is_still = place == "still"
        facts += [
            (
                f"added.p50.{place}",
                one.of("p50") - direct.of("p50"),
                "ms",
                f"added to a call, median, 1 caller, {when}",
                1.3,
            ),
            (
                f"added.p99.{place}",
                one.of("p99") - direct.of("p99"),
                "ms",
                f"added to a call, 99 of 100, 1 caller, {when}",
                3,
            ),
            (
                f"added.first.{place}",
                first,
                "ms",
                f"added to a stream's first byte, median, 1 caller, {when}",
                1.5,
            ),
            (f"cpu.1.{place}", cpu, "ms", f"CPU for a call, 1 caller, {when}", 1.6 if is_still else None),
            (
                f"cpu.16.{place}",
                cpu_16,
                "ms",
                f"CPU for a call, 16 callers, {when}",
                0.8 if is_still else None,
            ),
        ]
    facts += [
        ("memory", extra["memory"], "MiB", "memory of the service after all of this", 250),
        ("memory.growth", extra["growth"], "%", f"its growth over the last {_CALLS_FOR_MEMORY:,} calls", 5),
        ("unsettled", extra["unsettled"], "s", "until nothing waited for the chain, after all of this", 10),
        ("hold_ratio", extra["ratio"], "×", "held ÷ charged, of these calls", None),
    ]
    for name, value, unit, meaning, most in facts:
        figures.append(Figure(f"gateway.{name}", value, unit, meaning, at_most=most))
    return figures


_TARGETS = {
    ("still", False, 1): 650,
    ("still", False, 16): 1_500,
    ("still", True, 16): 700,
    ("ours", False, 16): 1_000,
}


async def _speed(folder: Path) -> tuple[dict[tuple[str, bool, int], Measured], dict[str, float]]:
    async with contextlib.AsyncExitStack() as stack:
        places, mine_every = await _places(folder, stack)
        measured = {
            (name, stream, callers): Measured([], [], [], [], [])
            for name in places
            for stream in (False, True)
            for callers in _CALLERS
        }
        for place in places.values():
            await _load(place, callers=16, seconds=1, stream=False)
        for _ in range(_ROUNDS):  # in turns, so that what disturbs the machine disturbs all
            for (name, stream, callers), its in measured.items():
                await mine_every(0 if name == "still" else 1)
                await _round(places[name], its, callers=callers, stream=stream)
                if name == "still":  # else the next round would settle what this one has left
                    await mine_every(1)
                    await _until_settled(places[name])
        return measured, await _ends(places["ours"])


async def _places(
    folder: Path, stack: contextlib.AsyncExitStack
) -> tuple[dict[str, Place], Callable[[int], Awaitable[None]]]:
    """By name, and what has the chain make a block every so many seconds, or none for 0."""
    upstream, provider = stack.enter_context(_process(_provider))
    base = f"http://127.0.0.1:{upstream}/v1"
    bare, passing = stack.enter_context(_process(_bare, base))
    await _until_open(bare)
    net = await stack.enter_async_context(local_net(folder))
    config = write_config(
        folder,
        net,
        SimpleNamespace(base_url=base),
        f"sqlite:///{folder}/waterfall.db",
        chain={"poll_seconds": 0.5, "max_charges_per_batch": 692},
        gateway={"drain_seconds": 5},
    )
    lanes = ", ".join(f'"env:{name}"' for name in _GAS)
    config.write_text(config.read_text().replace("[keys]", f"[keys]\ngas = [{lanes}]"))
    service = await stack.enter_async_context(served(config, **_GAS))
    session = await stack.enter_async_context(aiohttp.ClientSession())
    _, key = await Client(service.url, None, net, session).open_account(micro_usd=10**12)

    async def mine_every(seconds: int) -> None:
        await net.anvil.rpc.call("evm_setIntervalMining", seconds)

    ours = Place(urlsplit(service.url).port, service.process.pid, key)
    places = {
        "direct": Place(upstream, provider),
        "bare": Place(bare, passing),
        "still": ours,
        "ours": ours,
    }
    return places, mine_every


async def _load(place: Place, *, callers: int, seconds: float, stream: bool) -> Load:
    return await load(place.port, path=_PATH, key=place.key, callers=callers, seconds=seconds, stream=stream)


async def _round(place: Place, its: Measured, *, callers: int, stream: bool) -> None:
    worked = place.cpu()
    seen = await _load(place, callers=callers, seconds=_SECONDS, stream=stream)
    its.cpu_ms.append(1000 * (place.cpu() - worked) / len(seen.times))
    its.rates.append(seen.rate)
    its.p50.append(seen.time(0.5))
    its.p99.append(seen.time(0.99))
    its.first.append(seen.first_byte(0.5))


def _session(place: Place) -> aiohttp.ClientSession:
    headers = {"Authorization": "Bearer wf_admin"}
    return aiohttp.ClientSession(f"http://127.0.0.1:{place.port}", headers=headers)


async def _until_settled(place: Place) -> float:
    """How many seconds it took."""
    began = time.perf_counter()
    async with _session(place) as session:
        while True:
            async with session.get("/api/totals") as response:
                if (await response.json())["unsettled"] == "0.00":
                    return time.perf_counter() - began
            await asyncio.sleep(0.1)


async def _ends(place: Place) -> dict[str, float]:
    unsettled = await _until_settled(place)
    async with _session(place) as session:
        before, done = place.memory(), 0
        while done < _CALLS_FOR_MEMORY:
            done += len((await _load(place, callers=16, seconds=2, stream=False)).times)
        after = place.memory()
        async with session.get("/api/calls", params={"limit": 1}) as response:
            (call,) = await response.json()
    return {
        "unsettled": unsettled,
        "memory": after,
        "growth": 100 * (after / before - 1),
        "ratio": float(call["held"]) / float(call["cost"]),
    }


# ── Processes ────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _process(run: Callable[..., None], *arguments: Any) -> Any:
    """A process that tells its port; that, and its number."""
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    process = context.Process(target=run, args=(ports, *arguments), daemon=True)
    process.start()
    try:
        yield ports.get(timeout=30), process.pid
    finally:
        process.terminate()
        process.join()


def _provider(ports: Any) -> None:
    uvloop.run(provide(ports))


def _bare(ports: Any, upstream: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ports.put(port)
    pass_through(port, upstream)


async def _until_open(port: int) -> None:
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.05)
