"""Measure, print the figures beside their targets, and write them to docs/benchmarks.json and docs/benchmarks.md."""

import argparse
import datetime as dt
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console
from rich.table import Table

from bench import gateway, ledger, settlement
from bench.figures import Figure, keep, shown

PARTS: dict[str, tuple[Callable[[], list[Figure]], ...]] = {
    "ledger": (ledger.sqlite_pairs, ledger.postgresql_pairs),
    "settlement": (settlement.lane_rate, settlement.inclusion),
    "gateway": (gateway.speed,),
    "endurance": (settlement.memory, settlement.start),
}


def main() -> None:
    """A missed target is no failure: a figure on a busy or another machine says little by itself."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], help="what to measure (default: everything)"
    )
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    chosen = parser.parse_args()
    console, figures = Console(), []
    for part in chosen.parts or PARTS:
        for measure in PARTS[part]:
            with console.status(f"{part}: {measure.__doc__}"):
                figures += _alone(measure)
    console.print(_table(figures))
    if not chosen.dry_run:
        keep(figures, dt.datetime.now(tz=dt.UTC).date().isoformat())


def _alone(measure: Callable[[], list[Figure]]) -> list[Figure]:
    """In a process of its own: nothing of another measurement is in its memory, or on its way to the disk."""
    os.sync()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure).result()


def _table(figures: list[Figure]) -> Table:
    table = Table("what")
    for name in ("measured", "target"):
        table.add_column(name, justify="right")
    table.add_column("")
    for figure in figures:
        met = {True: "[green]met", False: "[red]missed", None: ""}[figure.is_met]
        table.add_row(figure.meaning, f"{shown(figure.value)} {figure.unit}", figure.target, met)
    return table


if __name__ == "__main__":
    main()
