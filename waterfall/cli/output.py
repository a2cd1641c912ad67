"""What commands print: tables for people, JSON for programs, and errors in one line."""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from functools import wraps
from typing import Annotated, Any, NoReturn, ParamSpec, TextIO

import typer
import uvloop
from pydantic import ValidationError
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from waterfall.cli import logs
from waterfall.errors import WaterfallError

P = ParamSpec("P")

_INTERRUPTED = 130

_PIPE_WIDTH = 140
_WIDEST = 10_000


def _width(stream: TextIO) -> int | None:
    """Tables are not folded to 80 columns where nobody looks at a terminal."""
    return None if stream.isatty() else _PIPE_WIDTH


out = Console(width=_width(sys.stdout))
err = Console(stderr=True, width=_width(sys.stderr))

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def plain(value: Any) -> Text:
    """A value as it is, "–" for None: no markup in it counts, and nothing in it steers the terminal."""
    text = "–" if value is None else str(value)
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], **style: Any) -> Table:
    """A table of plain values, whole at any width.

    Args:
        columns: their names; "name>" is aligned right, "name~" may wrap.
        rows: their values.
        style: as rich's Table takes it.
    """
    made = Table(**{"box": None, "pad_edge": False, "title_justify": "left", **style})
    cells = [[plain(value) for value in row] for row in rows]
    for number, name in enumerate(columns):
        if name.endswith("~"):
            made.add_column(name[:-1], overflow="fold")
        else:
            width = max((row[number].cell_len for row in cells), default=0)
            side: Any = "right" if name.endswith(">") else "left"
            made.add_column(name.removesuffix(">"), justify=side, no_wrap=True, min_width=width)
    for row in cells:
        made.add_row(*row)
    return made


def facts(title: str, pairs: Iterable[tuple[str, Any]]) -> Table:
    """A table of names and values."""
    return table(("name", "value"), pairs, title=plain(title), show_header=False)


def show(value: Any, as_json: bool, tabled: Callable[[Any], Table]) -> None:
    """Print a value as JSON or as a table."""
    if as_json:
        typer.echo(json.dumps(value, indent=2))
    else:
        show_table(tabled(value))


def show_table(shown: Table) -> None:
    """Print a table; what is wider than the terminal the terminal wraps, so that it can still be copied."""
    needed = Measurement.get(out, out.options.update(width=_WIDEST), shown).minimum
    shown.width = needed if needed > out.width else None
    out.print(shown, crop=False)


def first_problem(error: ValidationError) -> str:
    """Where something has not the shape it should have, and why."""
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"])) or "it"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}"


def command(function: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async command; a failure that was foreseen is one line and exit code 1, a signal exit code 130."""

    @wraps(function)
    @told()
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_cancelled_by_signals(function(*args, **kwargs)))

    return run


@contextlib.contextmanager
def told() -> Iterator[None]:
    """End the command at a failure: one that was foreseen is one line and exit code 1, a signal exit code 130."""
    try:
        yield
    except WaterfallError as error:
        _fail(error.message)
    except (asyncio.CancelledError, KeyboardInterrupt, typer.Abort):
        raise typer.Exit(_INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001 - whatever it is, its traceback is for us
        _fail(f"Waterfall failed, {type(error).__name__}: please report it with {logs.keep(error)}")


def _fail(message: str) -> NoReturn:
    err.print(Text("\n").join(map(plain, logs.redact(message).split("\n"))), style="red", soft_wrap=True)
    raise typer.Exit(1) from None


async def _cancelled_by_signals(work: Coroutine[Any, Any, None]) -> None:
    """Do it; the first SIGINT or SIGTERM cancels it, and no other disturbs it while it puts its things away."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)

    def handle(callback: Callable[[], Any]) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, callback)

    def stop() -> None:
        handle(lambda: None)
        task.cancel()

    handle(stop)
    await task
