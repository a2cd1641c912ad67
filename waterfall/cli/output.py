"""What commands print: tables for people, JSON for programs, and errors in one line."""

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Annotated, Any, ParamSpec, TextIO

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from waterfall.errors import WaterfallError

P = ParamSpec("P")

_INTERRUPTED = 130

_PIPE_WIDTH = 140


def _console(stream: TextIO) -> Console:
    """A console that does not fold tables to 80 columns where nobody looks at a terminal."""
    return Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH)


out = _console(sys.stdout)
err = _console(sys.stderr)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def show(value: Any, as_json: bool, table: Callable[[Any], Table]) -> None:
    """Print a value as JSON or as a table."""
    if as_json:
        typer.echo(json.dumps(value, indent=2))
    else:
        out.print(table(value))


def facts(title: str, pairs: Sequence[tuple[str, Any]]) -> Table:
    """A table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, "–" if value is None else str(value))
    return table


def command(function: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async command; a failure that was foreseen is one line and exit code 1."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(function(*args, **kwargs))
        except WaterfallError as error:
            err.print(error.message, style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None

    return run
