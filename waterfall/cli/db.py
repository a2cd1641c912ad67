"""`waterfall db`: the ledger's tables."""

from typing import Any

import typer
from rich.table import Table

from waterfall.cli.output import Json, command, facts, show
from waterfall.cli.serve import Config
from waterfall.ledger import migrations
from waterfall.settings import DEFAULT_FILE, load

db = typer.Typer(help="The ledger's tables.", no_args_is_help=True)


@db.command("upgrade")
@command
async def upgrade(config: Config = DEFAULT_FILE, as_json: Json = False) -> None:
    """Bring the ledger's tables to what this version of Waterfall needs. All processes on it are stopped for that.

    It is one transaction: what fails, changes nothing.
    """
    before, after = migrations.upgrade(load(config).database_url())
    show({"before": before, "after": after}, as_json, _upgraded)


def _upgraded(result: dict[str, Any]) -> Table:
    same = result["before"] == result["after"]
    return facts(
        "The tables were up to date" if same else "Upgraded",
        [("before", result["before"] or "no tables"), ("now", result["after"])],
    )
