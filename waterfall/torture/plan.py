"""Which fault comes when: drawn from a seed before anything runs, so that a seed gives the same plan every time."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from waterfall import failpoints
from waterfall.errors import SettingsError

DEEPEST_REORG = 10
_RESTART_SECONDS = 5.0
_FAILPOINT_SECONDS = 8.0
_DRAWS = 50

Draw = Callable[[random.Random, str], dict[str, Any]]
"""Draws for a target."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault."""

    name: str
    what: str
    resource: str
    """What it takes for itself: no two faults have the same at one time. `process` and `node`: one of several; `both`: the
    database, and a process."""
    seconds: tuple[float, float] = (0, 0)
    """How long it lasts, at least and at most; 0: it is over at once."""
    rest: float = 0
    """For how long after it the resource is left alone."""
    draw: Draw = field(default=lambda *_: {}, repr=False)
    """What else is drawn for it."""
    database: str | None = None
    """The kind of database it needs."""


_PASSED_BY = {"gateway": ("call",), "relayer": ("indexer", "lane")}
"""Which failpoints a kind of process can get to, by how they begin; `serve` is both kinds, and gets to all."""


def _failpoint(dice: random.Random, process: str) -> dict[str, Any]:
    families = _PASSED_BY.get(process.partition("-")[0])
    names = [name for name in failpoints.NAMES if families is None or name.partition(".")[0] in families]
    name = dice.choice(sorted(names))
    return {"point": f"{name}:{dice.randint(1, 12 if name.startswith('indexer') else 4)}"}


def _method(dice: random.Random, _: str) -> dict[str, Any]:
    methods = ("*", "eth_sendRawTransaction", "eth_sendRawTransaction", "eth_getTransactionReceipt")
    return {"method": dice.choice(methods)}


FAULTS = (
    Fault("kill", "a process gets SIGKILL", "process", rest=_RESTART_SECONDS),
    Fault(
        "failpoint",
        "a process is started to die at a named place in the code",
        "process",
        rest=_FAILPOINT_SECONDS,
        draw=_failpoint,
    ),
    Fault("terminate", "a process gets SIGTERM and is started again", "process", rest=_RESTART_SECONDS),
    Fault("freeze", "a process gets SIGSTOP, and SIGCONT later", "process", (1, 8)),
    Fault(
        "node-storm",
        "random faults in a part of a node's answers",
        "node",
        (3, 8),
        draw=lambda dice, _: {"seed": dice.getrandbits(32), "rate": round(dice.uniform(0.1, 0.6), 2)},
    ),
    Fault("node-drops", "a node does what it is asked, and the answer is lost", "node", (1, 5), draw=_method),
    Fault("node-silent", "a node takes requests and never answers", "node", (1, 5), draw=_method),
    Fault("node-429", "a node has had too many requests", "node", (2, 8)),
    Fault("node-garbage", "a node answers with something else", "node", (1, 5)),
    Fault(
        "node-stale",
        "a node is blocks behind",
        "node",
        (2, 8),
        draw=lambda dice, _: {"blocks": dice.randint(1, 8)},
    ),
    Fault("node-refused", "nobody listens at a node's port", "node", (1, 6)),
    Fault(
        "reorg",
        "the newest blocks are replaced by empty ones",
        "mining",
        rest=1,
        draw=lambda dice, _: {"depth": dice.randint(1, DEEPEST_REORG)},
    ),
    Fault("no-blocks", "no block is mined", "mining", (2, 8)),
    Fault("automine", "a block is mined for every transaction", "mining", (2, 6)),
    Fault("dropped-transactions", "the mempool forgets the relayer's transactions", "pool"),
    Fault("fee-spike", "the base fee rises above the cap, and falls", "fees", (3, 9), rest=2),
    Fault("gas-drained", "the gas keys are empty, and filled again", "gas", (3, 9), rest=2),
    Fault("upstream-429", "the provider refuses calls", "upstream", (2, 6)),
    Fault("upstream-500", "the provider fails", "upstream", (2, 6)),
    Fault("upstream-cut", "the provider cuts its answers", "upstream", (2, 6)),
    Fault("upstream-stalled", "the provider stops in the middle of its answers", "upstream", (2, 5)),
    Fault("upstream-slow", "the provider takes its time", "upstream", (2, 6)),
    Fault("database-locked", "another program locks what is written to", "database", (1, 7)),
    Fault(
        "locked-and-killed",
        "the same, and a process gets SIGKILL while it waits",
        "both",
        (1, 3),
        rest=_RESTART_SECONDS,
    ),
    Fault("backends-ended", "PostgreSQL ends all connections", "database", rest=1, database="postgresql"),
)
BY_NAME = {fault.name: fault for fault in FAULTS}


@dataclass(frozen=True, slots=True)
class Step:
    """One fault of a plan."""

    at: float
    """Seconds after the load began."""
    fault: str
    seconds: float
    """How long it lasts."""
    target: str
    """What it hits."""
    detail: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def choose(names: Sequence[str], database: str) -> list[Fault]:
    """The faults of these names, or without any, all that are possible with this kind of database.

    Raises:
        SettingsError: a name is none, or its fault is not possible.
    """
    possible = [fault for fault in FAULTS if fault.database in {None, database}]
    for name in names:
        if name not in BY_NAME:
            raise SettingsError(reason=f"--only: there is no fault {name!r}: see --list")
        if BY_NAME[name] not in possible:
            raise SettingsError(reason=f"--only: {name} needs a {BY_NAME[name].database} database")
    return [fault for fault in possible if not names or fault.name in names]


def draw(
    seed: int, *, seconds: float, every: float, faults: Sequence[Fault], processes: Sequence[str], nodes: int
) -> list[Step]:
    """The plan of a seed.

    Args:
        seed: of all that is drawn.
        seconds: how long the load lasts; every fault is over by then.
        every: seconds between faults, on average.
        faults: what to choose from.
        processes: names of those that faults may hit.
        nodes: how many there are; a fault hits one or all.
    """
    dice = random.Random(seed)  # noqa: S311 - it must be repeatable
    targets = {
        "process": [[name] for name in processes],
        "both": [["database", name] for name in processes],
        "node": [*([f"node {n}"] for n in range(nodes)), *[[f"node {n}" for n in range(nodes)]] * 2],
    }
    free: dict[str, float] = {}
    steps: list[Step] = []
    at = dice.uniform(0.3, 1.7) * every
    while at < seconds:
        for _ in range(_DRAWS):
            fault = dice.choice(faults)
            hit = dice.choice(targets.get(fault.resource, [[fault.resource]]))
            lasts = round(dice.uniform(*fault.seconds), 2)
            target = ", ".join(hit)
            detail = fault.draw(dice, target)
            if at + lasts <= seconds and all(free.get(one, 0) <= at for one in hit):
                steps.append(Step(round(at, 2), fault.name, lasts, target, detail))
                free |= dict.fromkeys(hit, at + lasts + fault.rest)
                break
        at += dice.uniform(0.3, 1.7) * every
    return steps
