"""`waterfall torture`: faults every few seconds under load, and then the books."""

import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from waterfall.cli import logs
from waterfall.cli.output import Json, command, err, facts, out, plain, show_table, table
from waterfall.errors import SettingsError, WaterfallError
from waterfall.money import format_usd
from waterfall.torture import plan as plans
from waterfall.torture.plan import Step
from waterfall.torture.run import Options, Outcome, Progress, run
from waterfall.torture.world import NODES, kind_of, processes

_SHOWN = 50
_KINDS = ("sqlite", "postgresql")
_SEED_BITS = 32


class BooksDiffer(WaterfallError):
    """The run with seed {seed} has {count} findings. Everything is kept in {folder}: logs, plan, chain, database."""

    code = "books_differ"


@command
async def torture(
    minutes: Annotated[float, typer.Option(help="How long load and faults last.", min=0.1, max=1440)] = 10,
    seed: Annotated[
        int | None, typer.Option(help="Draws the same faults and the same load again.", min=0)
    ] = None,
    every: Annotated[float, typer.Option(help="Seconds between faults, on average.", min=0.2, max=600)] = 3,
    database: Annotated[
        str | None,
        typer.Option(
            help="URL of an empty database; PostgreSQL is worked on by two gateways and two relayers, a new SQLite file "
            "(as without this) by one process."
        ),
    ] = None,
    accounts: Annotated[int, typer.Option(help="How many accounts call.", min=4, max=1000)] = 8,
    rate: Annotated[float, typer.Option(help="Calls a second.", min=0.1, max=1000)] = 20,
    concurrency: Annotated[int, typer.Option(help="Most calls at once.", min=1, max=1000)] = 48,
    only: Annotated[str, typer.Option(help="Only these faults: names with commas between; see --list.")] = "",
    keep: Annotated[
        Path | None, typer.Option(help="A new folder for everything; it is kept in any case.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Only list the faults there are.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan of a seed.")] = False,
    as_json: Json = False,
) -> None:
    """Put a whole Waterfall of its own under mixed load, with a random fault every few seconds, and check its books.

    Processes are killed, frozen and cut off from chain, provider and database; the chain reorganises. Then everything
    is healed, has to come to rest by itself, and journal, projection, chain, callers and provider must agree on every
    call. Exit code 0 only if they do. Touches nothing but its own folder, and the database that it is given.
    """
    if list_:
        _list(as_json=as_json)
        return
    seed = random.getrandbits(_SEED_BITS) if seed is None else seed
    folder = _folder(keep)
    url = database or f"sqlite:///{folder / 'waterfall.db'}"
    if kind_of(url) not in _KINDS or "://" not in url:
        raise SettingsError(reason="--database: must be sqlite:///FILE or postgresql://…")
    chosen = plans.choose([name for name in only.split(",") if name], kind_of(url))
    plan = plans.draw(
        seed, seconds=60 * minutes, every=every, faults=chosen, processes=processes(url), nodes=NODES
    )
    if dry_run:
        _dry_run(seed, plan, as_json=as_json)
        return
    if keep is None:
        folder = Path(tempfile.mkdtemp(prefix="waterfall-torture-"))
        url = database or f"sqlite:///{folder / 'waterfall.db'}"
    folder.mkdir(parents=True, exist_ok=True)
    logs.configure(folder / "torture.log")
    logs.conceal(*filter(None, [urlsplit(url).password]))
    options = Options(folder, url, seed, 60 * minutes, plan, accounts, rate, concurrency)
    outcome = await _watched(options)
    (folder / "outcome.json").write_text(json.dumps(outcome.as_dict(), indent=2))
    if as_json:
        typer.echo(json.dumps({**outcome.as_dict(), "folder": str(folder)}, indent=2))
    else:
        _report(outcome)
    if not outcome.equal:
        raise BooksDiffer(seed=seed, count=len(outcome.differences), folder=folder)
    if keep is None:
        shutil.rmtree(folder, ignore_errors=True)


def _folder(keep: Path | None) -> Path:
    """Where everything will be; nothing is made yet.

    Raises:
        SettingsError: something is there.
    """
    if keep is None:
        return Path(tempfile.gettempdir()) / "waterfall-torture"
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise SettingsError(reason=f"--keep: {keep} is there already, and not an empty folder")
    return keep.resolve()


# ── What is printed ──────────────────────────────────────────────────────────────────────────────────


def _list(*, as_json: bool) -> None:
    rows = [(fault.name, fault.what, fault.database) for fault in plans.FAULTS]
    if as_json:
        typer.echo(
            json.dumps([dict(zip(("name", "what", "database"), row, strict=True)) for row in rows], indent=2)
        )
    else:
        show_table(table(("fault", "what happens", "only on"), rows))


def _dry_run(seed: int, plan: list[Step], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"seed": seed, "plan": [step.as_dict() for step in plan]}, indent=2))
        return
    rows = [
        (f"{step.at:.1f}", step.fault, f"{step.seconds:.1f}", step.target, json.dumps(step.detail)[1:-1])
        for step in plan
    ]
    show_table(table(("at>", "fault", "for>", "of", "with"), rows, title=f"Seed {seed}"))


async def _watched(options: Options) -> Outcome:
    """Run it, and show how it goes."""
    began = time.monotonic()
    err.print(plain(f"Seed {options.seed}, {len(options.plan)} faults, everything in {options.folder}"))
    with Live(console=err, refresh_per_second=2, transient=True) as live:
        return await run(options, lambda progress: live.update(_progress(progress, time.monotonic() - began)))


def _progress(progress: Progress, seconds: float) -> Any:
    head = Text(f"{seconds:6.0f} s  {progress.phase} …", style="bold")
    if progress.callers is None or progress.faults is None:
        return head
    outcomes, calls = progress.callers.outcomes, progress.totals.get("calls", {})
    refused = sum(count for name, count in outcomes.items() if name.startswith("refused"))
    pairs = [
        ("calls", f"{sum(outcomes.values())} ended, {progress.callers.at_once} under way"),
        ("answered", outcomes["answered"]),
        ("refused", refused),
        ("broken, cut, left", sum(outcomes.values()) - outcomes["answered"] - refused),
        ("settled", calls.get("settled", 0) + calls.get("final", 0)),
        (
            "waiting",
            f"{progress.totals.get('unsettled', '?')} USD unsettled, {progress.totals.get('held', '?')} held",
        ),
        ("faults", sum(progress.faults.done.values())),
        ("now", ", ".join(step.fault for step in progress.faults.active.values()) or "–"),
    ]
    return Group(head, facts("", pairs))


def _report(outcome: Outcome) -> None:
    for title, counts in (
        ("Calls, as their clients saw them", outcome.calls),
        ("Charges asked for again", outcome.repeats),
        ("Calls, as the journal has them", outcome.states),
        ("Why calls were lost or given back", outcome.reasons),
        ("Answers of the provider", outcome.provider),
        ("Transactions of the lanes", outcome.transactions),
        ("Faults", outcome.faults),
        ("What they did", outcome.harm),
        ("How processes ended", outcome.ends),
        ("Beside the calls", outcome.people),
    ):
        rows = list(counts.items())
        if rows:
            out.print(Text(f"\n{title}", style="bold"))
            show_table(table(("what", "times>"), rows, show_header=False))
    rest = "never" if outcome.drained_in is None else f"{outcome.drained_in:g} s after the last fault"
    out.print()
    out.print(plain(f"Everything came to rest: {rest}."))
    if outcome.equal:
        charged = f"{outcome.charged} charges of {format_usd(outcome.amount)} USD"
        out.print(plain(f"Equal: {charged}, each once on the chain; seed {outcome.seed}."), style="green")
        return
    shown = [(difference,) for difference in outcome.differences[:_SHOWN]]
    show_table(table(("what~",), shown, title="\nWhat does not add up", show_header=False))
