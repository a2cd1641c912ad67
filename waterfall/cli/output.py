"""What commands print: tables for people, JSON for programs, and errors in one line."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.table import Table

from waterfall.errors import WaterfallError

P = ParamSpec("P")

out = Console()
err = Console(stderr=True)

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
            asyncio.run(function(*args, **kwargs))
        except WaterfallError as error:
            err.print(error.message, style="red", markup=False, highlight=False)
            raise typer.Exit(1) from None

    return run
