"""`waterfall serve`, `gateway`, `relayer` and `rebuild`."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from sqlalchemy import Connection

from waterfall.cli import logs
from waterfall.cli.dev import local_chain
from waterfall.cli.folder import DEV_FOLDER
from waterfall.cli.output import Json, command, err, facts, plain, show
from waterfall.cli.secrets import Secrets, secrets_of
from waterfall.cli.service import Running, open_ledger, relay, serve, serve_gateway, vault_of
from waterfall.errors import LedgerError, LossNotAccepted, SettingsError
from waterfall.ledger import reconciliation, views
from waterfall.ledger.store import Ledger
from waterfall.ledger.writer import Transaction
from waterfall.money import format_usd
from waterfall.settings import DEFAULT_FILE, ChainSettings, Settings, load
from waterfall.settlement.reconcile import loss
from waterfall.settlement.relayer import Relayer

_TOLD_EVERY_SECONDS = 0.5

Config = Annotated[Path, typer.Option(help="The settings file.")]


def _chain(settings: Settings, config: Path) -> ChainSettings:
    if settings.chain is None:
        raise SettingsError(reason=f"{config}: there is no [chain]; for a local one, run `waterfall dev`")
    return settings.chain


def _apart(settings: Settings, config: Path) -> ChainSettings:
    if not settings.database_url().startswith("postgresql"):
        raise SettingsError(
            reason=f"{config}: database: gateway and relayer apart share a PostgreSQL database; "
            "with a SQLite file, run `waterfall serve`"
        )
    return _chain(settings, config)


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
async def gateway(config: Config = DEFAULT_FILE) -> None:
    """Serve the gateway alone, one of many on one PostgreSQL database, until Ctrl-C or SIGTERM."""
    settings = load(config)
    chain = _apart(settings, config)
    logs.configure()

    async def ready(running: Running) -> None:
        err.print(plain(f"Waterfall serves platform {chain.platform} at {running.url}"))

    await serve_gateway(settings, chain, secrets_of(settings, chain, relayer=False), ready)


@command
async def relayer(config: Config = DEFAULT_FILE) -> None:
    """Settle what gateways on the same PostgreSQL database capture, until Ctrl-C or SIGTERM.

    Of several relayers one works on each lane; another takes over when it is gone.
    """
    settings = load(config)
    chain = _apart(settings, config)
    logs.configure()

    async def ready(watched_at: str) -> None:
        err.print(plain(f"Waterfall settles for platform {chain.platform}, watched at {watched_at}"))

    await relay(settings, chain, secrets_of(settings, chain, gateway=False), ready)


@command
async def rebuild(
    config: Annotated[
        Path | None, typer.Option(help="The settings file; left out: the local chain of `waterfall dev`.")
    ] = None,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go on without what a lost or older database knew.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Derive every balance anew from the chain, under a new ledger epoch.

    What the chain cannot know stays: keys, labels, receipts, and charges that are not settled yet. Where the database does
    not have it any more, `waterfall restore` brings it back from a backup; without one, only --accept-loss goes on, and
    nothing is changed before. No gateway and no relayer may use the database meanwhile.
    """
    logs.configure(Path(os.devnull))
    if config is None:
        async with local_chain(DEV_FOLDER) as (settings, chain, secrets):
            await _rebuild(settings, chain, secrets, accept_loss=accept_loss, as_json=as_json)
    else:
        settings = load(config)
        chain = _chain(settings, config)
        secrets = secrets_of(settings, chain)
        await _rebuild(settings, chain, secrets, accept_loss=accept_loss, as_json=as_json)


async def _rebuild(
    settings: Settings, chain: ChainSettings, secrets: Secrets, *, accept_loss: bool, as_json: bool
) -> None:
    async with open_ledger(settings, chain, secrets, catch_up=False) as (ledger, relayer):
        await ledger.write(
            Transaction.check_alone
        )  # again when it is rebuilt, but reading the chain takes time
        if not await ledger.leads("indexer"):
            raise LedgerError(reason="a relayer works with it: stop that first")
        with err.status("Reading the chain …") as status:
            if not accept_loss:
                await _refuse_loss(chain, ledger, status.update)
            before = ledger.epoch
            await ledger.view.rebuild()
            await _caught_up(relayer, ledger, status.update)
        is_lost = await ledger.read(reconciliation.is_journal_lost)
        if ledger.view.mismatches and not accept_loss:  # on the chain only since it was looked at
            raise LossNotAccepted(what=ledger.view.mismatches[0])
        written_off = await ledger.view.write_off_conflicts() if ledger.view.mismatches else 0
        unknown, unknown_amount = await ledger.read(reconciliation.unknown_charges)
        head = ledger.view.head.block.number if ledger.view.head else None
        totals = await ledger.read(_totals)
        result = {
            "epoch_before": before,
            "epoch": ledger.epoch,
            "head": head,
            **totals,
            "journal_lost": is_lost,
            "written_off": written_off,
            "unknown_charges": unknown,
            "unknown_amount": format_usd(unknown_amount),
        }
    show(result, as_json, _rebuilt)


async def _refuse_loss(chain: ChainSettings, ledger: Ledger, tell: Callable[[str], None]) -> None:
    """Raises LossNotAccepted if a rebuild would lose anything; nothing is changed by then.

    The chain is read twice for it. To project it first, and take that back on a refusal, would hold one transaction open
    for as long as nodes take to answer, which the database ends.
    """
    async with vault_of(chain) as vault:
        lost = await loss(vault, ledger, deployed_block=chain.deployed_block, tell=tell)
    if lost is not None:
        raise LossNotAccepted(what=lost)


async def _caught_up(relayer: Relayer, ledger: Ledger, tell: Callable[[str], None]) -> None:
    """Bring the projection to the chain's head, and say how far it is."""
    catching_up = asyncio.ensure_future(relayer.catch_up())
    try:
        while not (await asyncio.wait([catching_up], timeout=_TOLD_EVERY_SECONDS))[0]:
            if ledger.view.head is not None:
                tell(f"Reading the chain: block {ledger.view.head.block.number} …")
        catching_up.result()
    finally:
        catching_up.cancel()


def _totals(connection: Connection) -> dict[str, object]:
    totals = views.totals(connection)
    return {
        "accounts": len(views.accounts(connection)),
        "balance": format_usd(totals.balance),
        "unsettled": format_usd(totals.unsettled),
        "held": format_usd(totals.held),
        "calls": totals.calls,
    }


def _rebuilt(result: dict[str, Any]) -> Table:
    unknown = "nothing: the journal is whole"
    if result["unknown_charges"]:
        unknown = (
            f"the receipts of {result['unknown_charges']} charges ({result['unknown_amount']} USD): ledgers made them "
            "whose database is lost"
        )
    if result["journal_lost"]:
        unknown += (
            "; calls captured and not settled by then; API keys; labels, until the accounts are opened again; "
            "idempotency keys: a repeated charge would be a second one"
        )
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
            ("written off", f"{result['written_off']} charges, whose ids the chain has for others"),
            ("cannot be known", unknown),
        ],
    )
