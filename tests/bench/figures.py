"""What was measured, beside what it should be; the machine it was measured on."""

import importlib.metadata
import json
import os
import platform
import sqlite3
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_PACKAGES = ("sqlalchemy", "uvloop", "aiohttp", "psycopg", "coincurve")


@dataclass(frozen=True)
class Figure:
    """One measured value; with a target, at least or at most that."""

    name: str
    value: float
    unit: str
    meaning: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        """For people."""
        if self.at_least is not None:
            return f"≥ {shown(self.at_least)}"
        return "" if self.at_most is None else f"≤ {shown(self.at_most)}"

    @property
    def is_met(self) -> bool | None:
        """None: it has no target."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


def shown(value: float) -> str:
    """With three digits that say something."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def machine() -> dict[str, str]:
    """What this was measured on, without anything that names it."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or "unknown",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": f"{os.cpu_count()} × {cpu}",
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of what matters for the figures."""
    anvil = subprocess.run(["anvil", "--version"], capture_output=True, text=True, check=True)
    return {
        "waterfall": importlib.metadata.version("waterfall-credits"),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "anvil": anvil.stdout.splitlines()[0].split()[-1],
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _lines(file: str) -> Iterable[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return ()


# ── Written down ─────────────────────────────────────────────────────────────────────────────────────


def keep(figures: Sequence[Figure], date: str) -> None:
    """Write docs/benchmarks.json and docs/benchmarks.md; what was not measured now, stays as it was."""
    file = DOCS / "benchmarks.json"
    kept = json.loads(file.read_text())["figures"] if file.exists() else {}
    where = {"date": date, "machine": machine(), "versions": versions()}
    for figure in figures:
        row = asdict(figure) | {"target": figure.target, "met": figure.is_met, "measured": where}
        kept[row.pop("name")] = row
    file.write_text(
        json.dumps({"command": "make bench", "figures": kept}, indent=2, ensure_ascii=False) + "\n"
    )
    (DOCS / "benchmarks.md").write_text(_page(kept))


_HEAD = """\
# Benchmarks

Written by `make bench`, which prints the same; `make bench ONLY=ledger` measures a part. A figure is the median of
several runs where it says nothing else. Nothing here is a test: what must not get slower is compared within one run, as a share of
what the machine does at that moment.

| what | measured | target | |
|---|---:|---:|---|
"""


def _page(kept: dict[str, dict]) -> str:
    rows = [
        f"| {row['meaning']} | {shown(row['value'])} {row['unit']} | {row['target']} | {_mark(row['met'])} |"
        for row in kept.values()
    ]
    places = {json.dumps(row["measured"]): row["measured"] for row in kept.values()}
    about = [
        f"\n{at['date']}, on {at['machine']['cpu']}, {at['machine']['memory']}, {at['machine']['system']}; "
        + ", ".join(f"{name} {version}" for name, version in at["versions"].items())
        + ".\n"
        for at in places.values()
    ]
    notes = (Path(__file__).parent / "notes.md").read_text()
    return _HEAD + "\n".join(rows) + "\n" + "".join(about) + "\n" + notes


def _mark(met: bool | None) -> str:
    return {True: "met", False: "**missed**", None: ""}[met]
