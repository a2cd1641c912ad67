"""`waterfall serve` and `waterfall rebuild`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from sqlalchemy import Connection

from waterfall.cli import logs
from waterfall.cli.dev import local_chain
from waterfall.cli.folder import DEV_FOLDER
from waterfall.cli.output import Json, command, err, facts, plain, show
from waterfall.cli.service import Running, Secrets, open_ledger, serve
from waterfall.errors import LedgerError, SettingsError
from waterfall.ledger import views
from waterfall.money import format_usd
from waterfall.settings import DEFAULT_FILE, ChainSettings, Settings, load

Config = Annotated[Path, typer.Option(help="The settings file.")]


def secrets_of(settings: Settings, chain: ChainSettings) -> Secrets:
    """The secrets that a settings file refers to.

    Raises:
        SettingsError: one is missing; it is named.
    """
    return Secrets(
        meter=settings.keys.signer(settings.keys.meter),
        gas=settings.keys.signer(settings.keys.gas),
        owner=settings.keys.signer(settings.keys.owner) if settings.keys.owner else None,
        label_salt=_environment(chain.label_salt_env, "chain.label_salt_env").encode(),
        admin_key=_environment(settings.gateway.admin_key_env, "gateway.admin_key_env"),
    )


def _environment(variable: str, key: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise SettingsError(reason=f"{key}: the environment variable {variable} is not set")
    return value


def _chain(settings: Settings, config: Path) -> ChainSettings:
    if settings.chain is None:
        raise SettingsError(reason=f"{config}: there is no [chain]; for a local one, run `waterfall dev`")
    return settings.chain


@command
async def serve_(config: Config = DEFAULT_FILE) -> None:
    """Serve the gateway and settle its charges, until Ctrl-C or SIGTERM."""
    settings = load(config)
    chain = _chain(settings, config)
    logs.configure()

    async def ready(running: Running) -> None:
        err.print(plain(f"Waterfall serves platform {chain.platform} at {running.url}"))

    await serve(settings, chain, secrets_of(settings, chain), ready)


@command
async def rebuild(
    config: Annotated[
        Path | None, typer.Option(help="The settings file; left out: the local chain of `waterfall dev`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Derive every balance anew from the chain, under a new ledger epoch.

    What the chain cannot know stays: keys, labels, receipts, and charges that are not settled yet.
    """
    logs.configure(Path(os.devnull))
    if config is None:
        async with local_chain(DEV_FOLDER) as (settings, chain, secrets):
            await _rebuild(settings, chain, secrets, as_json=as_json)
    else:
        settings = load(config)
        chain = _chain(settings, config)
        await _rebuild(settings, chain, secrets_of(settings, chain), as_json=as_json)


async def _rebuild(settings: Settings, chain: ChainSettings, secrets: Secrets, *, as_json: bool) -> None:
    async with open_ledger(settings, chain, secrets, catch_up=False) as (ledger, relayer):
        before = ledger.epoch
        await ledger.rebuild()
        with err.status("Reading the chain …"):
            await relayer.catch_up()
        if ledger.mismatches:
            raise LedgerError(reason=ledger.mismatches[0])
        head = ledger.head.block.number if ledger.head else None
        totals = await ledger.read(_totals)
        result = {
            "epoch_before": before,
            "epoch": ledger.epoch,
            "head": head,
            **totals,
        }
    show(result, as_json, _rebuilt)


def _totals(connection: Connection) -> dict[str, object]:
    totals = views.totals(connection)
    return {
        "accounts": len(views.accounts(connection)),
        "balance": format_usd(totals.balance),
        "unsettled": format_usd(totals.unsettled),
        "held": format_usd(totals.held),
        "calls": totals.calls,
    }


def _rebuilt(result: dict[str, object]) -> Table:
    return facts(
        "Rebuilt from the chain",
        [
            ("up to block", result["head"]),
            ("accounts", result["accounts"]),
            ("balances", f"{result['balance']} USD"),
            (
                "unsettled",
                f"{result['unsettled']} USD: charges the chain does not have yet; they will be sent",
            ),
            ("epoch", f"{result['epoch']} (before: {result['epoch_before']})"),
        ],
    )
