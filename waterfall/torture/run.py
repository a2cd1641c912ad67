"""One torture run: load and faults, then quiet, then the books."""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog

from waterfall.chain.token import balance_of
from waterfall.torture.calls import Callers
from waterfall.torture.check import Evidence, Verdict, examine, shortfalls
from waterfall.torture.faults import Faults
from waterfall.torture.people import People
from waterfall.torture.plan import Step
from waterfall.torture.world import World

log = structlog.get_logger()

DRAIN_SECONDS = 150
"""How long after the last fault everything may take to come to rest."""
_CALLS_END_SECONDS = 45
_STILL = ("freeze", "database-locked", "locked-and-killed", "backends-ended")
"""Faults by which holds may run out of their leases, or captures not be written, though no process ends."""
_LOOK_SECONDS = 0.5
_QUIET_LOOKS = 4
"""So often in a row nothing must be under way."""


@dataclass(frozen=True)
class Options:
    """What to run."""

    folder: Path
    database: str = field(repr=False)
    seed: int
    seconds: float
    plan: Sequence[Step]
    accounts: int
    rate: float
    most_at_once: int


@dataclass
class Progress:
    """How far a run is."""

    phase: str
    callers: Callers | None = None
    faults: Faults | None = None
    totals: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a run came to."""

    seed: int
    seconds: float
    drained_in: float | None
    """Seconds until everything was at rest; None: it did not come to rest."""
    differences: list[str]
    """Of the books; and what no fault excuses. Empty: equal."""
    calls: dict[str, int]
    """By what their clients saw."""
    repeats: dict[str, int]
    states: dict[str, int]
    """The journal's calls by where they stand."""
    reasons: dict[str, int]
    """Why calls were lost or given back."""
    charged: int
    """Charges in the journal, all on the chain."""
    amount: int
    """In credit units."""
    transactions: dict[str, int]
    """Of the lanes: mined, reverted, and how many attempts that took."""
    faults: dict[str, int]
    harm: dict[str, int]
    ends: dict[str, int]
    """How processes ended."""
    provider: dict[str, int]
    people: dict[str, int]

    @property
    def equal(self) -> bool:
        """Whether the books are equal and nothing else was wrong."""
        return not self.differences

    def as_dict(self) -> dict[str, Any]:
        """For JSON; amounts in credit units, as text."""
        return {"equal": self.equal, **asdict(self), "amount": str(self.amount)}


Tell = Callable[[Progress], None]


async def run(options: Options, tell: Tell = lambda _: None) -> Outcome:
    """Run it, and hold the books against it.

    Raises:
        SettingsError: there is no anvil, or the database holds something.
        WaterfallError: it could not be run to its end, which says nothing of the books.
    """
    options.folder.mkdir(parents=True, exist_ok=True)
    plan = [step.as_dict() for step in options.plan]
    (options.folder / "plan.json").write_text(json.dumps({"seed": options.seed, "plan": plan}, indent=1))
    dice = random.Random(options.seed)  # noqa: S311
    progress = Progress("starting chain, provider and service")
    tell(progress)
    async with World(options.folder, options.database) as world:
        progress.phase = "opening accounts"
        people = People(world, options.seed, random.Random(dice.getrandbits(64)))  # noqa: S311
        payers = await people.open(options.accounts)
        callers = Callers(
            world,
            payers,
            options.rate,
            options.most_at_once,
            random.Random(dice.getrandbits(64)),  # noqa: S311
        )
        faults = Faults(world)
        progress.callers, progress.faults, progress.phase = callers, faults, "load and faults"
        looking = asyncio.create_task(_look(world, progress, tell))
        try:
            await _load(options, callers, people, faults)
            progress.phase = "quiet: what is under way comes to rest"
            drained = await _drain(world, callers)
            if drained is not None:
                await people.leave()
                progress.phase = "paying exits out"
                if await _drain(world, callers) is None:
                    drained = None
            progress.phase = "holding the books against each other"
            evidence = Evidence(
                world.vault,
                world.deployment,
                options.database,
                payers,
                callers.calls,
                world.upstream,
                options.most_at_once,
                _stops(world, faults),
            )
            verdict = await examine(evidence)
        finally:
            looking.cancel()
            await asyncio.wait([looking])
        progress.phase = "stopping"
        tell(progress)
        last = asyncio.get_running_loop().time()
    log.info("stopped", seconds=asyncio.get_running_loop().time() - last)
    return _outcome(options, drained, verdict, world, callers, people, faults)


async def _load(options: Options, callers: Callers, people: People, faults: Faults) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    living = asyncio.create_task(people.run(callers))
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(callers.run(began + options.seconds))
            tasks.create_task(faults.run(options.plan, began))
    finally:
        living.cancel()
        await asyncio.wait([living])
    if not living.cancelled():
        living.result()


async def _drain(world: World, callers: Callers) -> float | None:
    """Wait until nothing is under way any more; how long that took, None if it did not come to that."""
    loop = asyncio.get_running_loop()
    began, quiet = loop.time(), 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            await callers.finish(_CALLS_END_SECONDS)
            while quiet < _QUIET_LOOKS:
                await asyncio.sleep(_LOOK_SECONDS)
                quiet = quiet + 1 if await _is_at_rest(world) else 0
            return round(loop.time() - began, 1)
    return None


async def _is_at_rest(world: World) -> bool:
    """Nothing held, unsettled or unswept, no policy on its way, and the ledger at the chain's head."""
    head = int(await world.rpc.call("eth_blockNumber"), 16)
    totals = await world.ask("GET", "/api/totals")
    if (totals["held"], totals["unsettled"]) != ("0.00", "0.00"):
        return False
    accounts = await world.ask("GET", "/api/accounts")
    platform = await world.ask("GET", "/api/platform")
    if any(one["wanted_policy"] is not None for one in accounts) or (platform["head"] or 0) < head - 1:
        return False
    token = world.deployment.token
    addresses = [await balance_of(world.rpc, token, one["deposit_address"]) for one in accounts]
    return not any(addresses)


async def _look(world: World, progress: Progress, tell: Tell) -> None:
    while True:
        with contextlib.suppress(Exception):
            progress.totals = await world.ask("GET", "/api/totals", tries=1)
        tell(progress)
        await asyncio.sleep(_LOOK_SECONDS)


def _stops(world: World, faults: Faults) -> int:
    """How often a process with a gateway ended, or it or the database stood still."""
    gateways = [service for service in world.services.values() if service.command != "relayer"]
    return sum(service.starts - 1 for service in gateways) + sum(faults.done[name] for name in _STILL)


def _outcome(
    options: Options,
    drained: float | None,
    verdict: Verdict,
    world: World,
    callers: Callers,
    people: People,
    faults: Faults,
) -> Outcome:
    ends: Counter[str] = Counter()
    differences = [*verdict.differences, *callers.findings, *faults.findings]
    differences += shortfalls(callers.calls, faults.done)
    for service in world.services.values():
        ends += service.ends
        differences += service.findings
    if drained is None:
        differences.insert(0, f"it did not come to rest within {DRAIN_SECONDS} seconds after the last fault")
    records = verdict.records
    given_up = [one.settlement for one in records if one.settlement.state in {"lost", "released"}]
    receipts = [one.receipt for one in records if one.receipt is not None]
    return Outcome(
        seed=options.seed,
        seconds=options.seconds,
        drained_in=drained,
        differences=differences,
        calls=_sorted(callers.outcomes),
        repeats=_sorted(callers.repeats),
        states=_sorted(Counter(one.settlement.state for one in records)),
        reasons=_sorted(Counter(f"{one.state}: {one.reason}" for one in given_up)),
        charged=len(receipts),
        amount=sum(one.receipt.amount for one in receipts),
        transactions=verdict.transactions,
        faults=_sorted(faults.done),
        harm=_sorted(faults.counts),
        ends=_sorted(ends),
        provider=_sorted(world.upstream.outcomes),
        people=_sorted(people.counts),
    )


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(counts.most_common())
