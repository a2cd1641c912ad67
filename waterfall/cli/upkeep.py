"""`waterfall backup`, `restore` and `reconcile`."""

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from waterfall.chain.rpc import Rpc
from waterfall.chain.vault import Vault
from waterfall.cli import logs
from waterfall.cli.folder import DEV_FOLDER, Folder
from waterfall.cli.output import Json, command, err, facts, plain, show, show_table, table
from waterfall.cli.serve import Config
from waterfall.errors import SettingsError, WaterfallError
from waterfall.ledger import backup as backups
from waterfall.ledger.snapshot import Identity
from waterfall.money import format_usd
from waterfall.settings import DEFAULT_FILE, load
from waterfall.settlement.reconcile import Report
from waterfall.settlement.reconcile import reconcile as compare

_SHOWN = 50
ConfigOrDev = Annotated[
    Path | None, typer.Option(help="The settings file; left out: the local chain of `waterfall dev`.")
]
File = Annotated[Path, typer.Argument(help="The backup.", metavar="FILE")]


class LedgerDiffers(WaterfallError):
    """The ledger differs from the chain, or from itself, in {count} places (credit units, 10⁻¹² USD; --json shows all)."""

    code = "ledger_differs"


# ── Backup and restore ───────────────────────────────────────────────────────────────────────────────


@command
async def backup(
    file: File,
    config: ConfigOrDev = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Only read and check a backup.")] = False,
    as_json: Json = False,
) -> None:
    """Write the ledger into a file, while the service runs.

    It holds account labels, the hashes of API keys, and answers that are kept for repeats: keep it as you keep the
    database.
    """
    logs.configure(Path(os.devnull))
    if verify:
        made = await asyncio.to_thread(backups.verify, file)
    else:
        url = _database(config)
        with err.status("Reading the ledger …") as status:
            made = await asyncio.to_thread(
                backups.backup, url, file, overwrite=force, tell=_rows("Writing", status.update)
            )
    show({"file": str(file), **asdict(made)}, as_json, _header)


@command
async def restore(
    file: File,
    config: Config = DEFAULT_FILE,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the ledger that is in the database.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put a backup into the database of the settings, SQLite or PostgreSQL, whichever it was made from.

    Nothing may use the database. The ledger goes on under a new epoch; what has happened on the chain since the backup, it
    reads at its next start.
    """
    logs.configure(Path(os.devnull))
    settings = load(config)
    if settings.chain is None:
        raise SettingsError(reason=f"{config}: there is no [chain]")
    of = Identity(settings.chain.chain_id, settings.chain.vault, settings.chain.platform)
    with err.status("Reading the backup …") as status:
        restored = await asyncio.to_thread(
            backups.restore,
            settings.database_url(),
            file,
            of,
            overwrite=force,
            tell=_rows("Restoring", status.update),
        )
    show(asdict(restored), as_json, _restored)


def _database(config: Path | None) -> str:
    if config is not None:
        return load(config).database_url()
    kept = Folder(DEV_FOLDER).kept()
    if kept is None:
        raise SettingsError(
            reason=f"there is no local chain in {DEV_FOLDER}: name a settings file with --config"
        )
    return kept.database


def _rows(doing: str, tell: Callable[[str], None]) -> backups.Tell:
    return lambda done, total: tell(f"{doing} {done:,} of {total:,} rows …")


def _header(made: dict[str, Any]) -> Table:
    rows = made["rows"]
    return facts(
        "Backup, read again and whole",
        [
            ("file", made["file"]),
            ("of", Identity(made["chain_id"], made["vault"], made["platform"])),
            ("up to block", made["head"]),
            ("accounts", rows["accounts"]),
            ("calls", rows["holds"]),
            ("charges", rows["charges"]),
        ],
    )


def _restored(done: dict[str, Any]) -> Table:
    header = done["header"]
    waiting = done["open_policies"]
    return facts(
        "Restored",
        [
            ("up to block", f"{header['head']}; the next start reads the rest from the chain"),
            ("accounts", header["rows"]["accounts"]),
            ("calls", header["rows"]["holds"]),
            ("owed", f"{done['unsettled']} charges: sent again, unless the chain has them by now"),
            (
                "lost",
                f"{done['lost_holds']} calls that ran when the backup was made; see GET /api/calls?status=lost",
            ),
            (
                "policies to be sent",
                ", ".join(waiting) + ": check that they are the newest" if waiting else "none",
            ),
            ("epoch", f"{done['epoch']} (before: {header['epoch']})"),
            (
                "not known",
                "keys, labels, calls and idempotency keys since the backup; charges not settled by the loss",
            ),
            ("then", "start the service, and run `waterfall reconcile`"),
        ],
    )


# ── Reconcile ────────────────────────────────────────────────────────────────────────────────────────


@command
async def reconcile(
    config: ConfigOrDev = None,
    since: Annotated[
        int | None,
        typer.Option(help="Compare events from this block on only; all balances in any case.", min=0),
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold journal, projection and chain against each other, charge by charge, while the service runs.

    Exit code 1 if anything differs; what to do stands beside it.
    """
    logs.configure(Path(os.devnull))
    if config is None:
        dev = Folder(DEV_FOLDER).read()
        url, vault, first = _database(None), dev.vault, 0
        rpc = Rpc(dev.rpc_url, chain_id=dev.chain_id)
    else:
        settings = load(config)
        chain = settings.chain
        if chain is None:
            raise SettingsError(reason=f"{config}: there is no [chain]")
        url, vault, first = settings.database_url(), chain.vault, chain.deployed_block
        rpc = Rpc(chain.rpc_urls(), chain_id=chain.chain_id, timeout_seconds=chain.rpc_timeout_seconds)
    try:
        with err.status("Reading the ledger …") as status:
            report = await compare(
                Vault(rpc, vault), url, deployed_block=first, since=since, tell=status.update
            )
    finally:
        await rpc.close()
    show(report.as_dict(), as_json, lambda _: _reported(report))
    if not report.equal:
        for differences in () if as_json else _differences(report):
            show_table(differences)
        raise LedgerDiffers(count=len(report.differences))


def _reported(report: Report) -> Table:
    unknown = f"{report.unknown} ({format_usd(report.unknown_amount)} USD), whose receipts went with a lost database"
    return facts(
        "Journal, projection and chain are equal" if report.equal else "They differ",
        [
            ("at block", f"{report.block} ({report.block_hash})"),
            ("events since block", report.first_block),
            ("accounts", report.accounts),
            ("charges", report.charges),
            ("events", report.events),
            ("not on the chain yet", f"{report.waiting} charges ({format_usd(report.waiting_amount)} USD)"),
            ("of earlier ledgers", unknown if report.unknown else "none"),
            ("blocks not read yet", report.behind),
        ],
    )


def _differences(report: Report) -> Iterator[Table]:
    """What differs, by what there is to do about it."""
    shown = sorted(report.differences[:_SHOWN], key=lambda difference: difference.todo)
    for todo, its in groupby(shown, key=lambda difference: difference.todo):
        rows = [(d.subject, d.what, d.kept, d.expected) for d in its]
        yield table(("what", "of it", "ledger", "should be"), rows, title=plain(f"\n{todo}:"))
