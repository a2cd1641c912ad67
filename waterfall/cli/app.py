"""What `waterfall` can do."""

from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from waterfall.cli import accounts, accuracy, db, demo, dev, keystore, receipts, serve, torture, upkeep

app = typer.Typer(
    help="USDC-backed credit for LLM platforms: every call checked, metered, priced and settled on-chain.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # they may be keys
)
app.command("dev")(dev.dev)
app.command("serve")(serve.serve_)
app.command("gateway")(serve.gateway)
app.command("relayer")(serve.relayer)
app.command("rebuild")(serve.rebuild)
app.command("backup")(upkeep.backup)
app.command("restore")(upkeep.restore)
app.command("reconcile")(upkeep.reconcile)
app.command("accuracy")(accuracy.accuracy)
app.command("demo")(demo.demo)
app.command("torture")(torture.torture)
app.add_typer(db.db, name="db")
app.add_typer(accounts.accounts, name="accounts")
app.add_typer(accounts.keys, name="keys")
app.add_typer(accounts.policy, name="policy")
app.add_typer(receipts.receipts, name="receipts")
app.add_typer(keystore.keystore, name="keystore")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"waterfall {installed_version('waterfall-credits')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
