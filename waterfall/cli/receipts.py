"""`waterfall receipts`."""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from waterfall.chain.rpc import Rpc, quantity
from waterfall.chain.vault import Vault
from waterfall.chain.verify import Proof, verify
from waterfall.cli.accounts import Key, Url
from waterfall.cli.api import connect
from waterfall.cli.folder import DEV_FOLDER, Folder
from waterfall.cli.output import Json, command, facts, first_problem, out, plain, show, table
from waterfall.errors import SettingsError, VerificationFailed
from waterfall.gateway.wire import ReceiptView
from waterfall.money import format_usd
from waterfall.settings import load
from waterfall.types import Attribution, SignedReceipt

_ON_CHAIN = {"settled", "final"}
_CHARGED = {"queued", "batched", *_ON_CHAIN}

receipts = typer.Typer(help="Signed receipts.", no_args_is_help=True)


@receipts.command("list")
@command
async def list_(
    account: Annotated[str | None, typer.Option(help="Whose; left out: everybody's.")] = None,
    status: Annotated[str | None, typer.Option(help="Where they stand, such as settled or lost.")] = None,
    user: Annotated[str | None, typer.Option(help="Made for this user.")] = None,
    agent: Annotated[str | None, typer.Option(help="Made by this agent.")] = None,
    team: Annotated[str | None, typer.Option(help="Made for this team.")] = None,
    session: Annotated[str | None, typer.Option(help="Made in this session.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="With this tag; again for others.")] = None,
    limit: Annotated[int, typer.Option(help="How many.")] = 20,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Calls, newest first, and what they cost."""
    asked = {
        "account": account,
        "status": status,
        "user": user,
        "agent": agent,
        "team": team,
        "session": session,
        "limit": limit,
    }
    given = {name: value for name, value in asked.items() if value is not None} | {"tag": tag or []}
    path = f"/api/calls?{urlencode(given, doseq=True)}"
    show(await connect(url, key).request(list[ReceiptView], "GET", path), as_json, _calls)


@receipts.command("show")
@command
async def show_(
    receipt: Annotated[str, typer.Argument(help="The receipt's id.")],
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """One receipt and where its charge stands."""
    found = await connect(url, key).request(ReceiptView, "GET", f"/api/receipts/{receipt}")
    show(found, as_json, _call)


def _call(found: Any) -> Table:
    names = ("id", "status", "reason", "account", "model", "held", "cost", "transaction", "block")
    pairs = [(name, found[name]) for name in names]
    return facts("Receipt", [*pairs, *Attribution.model_validate(found["attribution"]).pairs])


def _calls(found: Any) -> Table:
    return table(
        ("id", "made", "status", "model~", "cost>", "for~"),
        (
            [
                call["id"],
                datetime.fromtimestamp(call["created_at"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S"),
                call["status"],
                call["model"],
                call["cost"],
                ", ".join(f"{n} {v}" for n, v in Attribution.model_validate(call["attribution"]).pairs),
            ]
            for call in found
        ),
    )


@receipts.command("verify")
@command
async def verify_(
    receipt: Annotated[str, typer.Argument(help="A receipt's id, or a file with one.", metavar="ID|FILE")],
    config: Annotated[
        Path | None, typer.Option(help="The waterfall.toml whose chain and vault you trust.")
    ] = None,
    rpc: Annotated[
        str | None, typer.Option("--rpc", help="The node to ask; left out: the configured one.")
    ] = None,
    vault: Annotated[
        str | None, typer.Option(help="The vault you trust, 0x…: with --rpc, all it takes to prove a file.")
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Prove a receipt: signature, meter, amount recomputed, charge on the chain. Exit code 1 if it does not hold."""
    trusted = _trusted(config, rpc, vault)
    found = await _read(receipt, url, key)
    node = Rpc(trusted.rpc_urls, chain_id=trusted.chain_id)
    try:
        chain_id = trusted.chain_id or quantity(await node.call("eth_chainId"))
        signed, proof = await prove(found, Vault(node, trusted.vault), chain_id, from_block=trusted.first)
    finally:
        await node.close()
    if as_json:
        typer.echo(
            json.dumps(
                {"valid": True, "shown": proof.shown, "transaction": proof.transaction, "block": proof.block}
            )
        )
    else:
        _print(signed, proof)


@dataclass(frozen=True)
class _Trusted:
    """What a proof rests on."""

    rpc_urls: tuple[str, ...] = field(repr=False)
    vault: str
    chain_id: int | None
    """None: the node's."""
    first: int
    """No charge is in an earlier block."""


def _trusted(config: Path | None, rpc: str | None, vault: str | None) -> _Trusted:
    given = (rpc,) if rpc is not None else ()
    if config is not None:
        chain = load(config).chain
        if chain is None:
            raise SettingsError(reason=f"{config}: there is no [chain]")
        return _Trusted(given or chain.rpc_urls(), vault or chain.vault, chain.chain_id, chain.deployed_block)
    if rpc is not None and vault is not None:
        return _Trusted(given, vault.lower(), None, 0)
    if not Folder(DEV_FOLDER).is_told:
        raise SettingsError(
            reason="Which chain and vault? Give --rpc URL and --vault 0x…, or --config FILE with a [chain]; "
            "where `waterfall dev` runs, its own are taken."
        )
    dev = Folder(DEV_FOLDER).read()
    return _Trusted(given or (dev.rpc_url,), vault or dev.vault, dev.chain_id, 0)


async def _read(receipt: str, url: str | None, key: str | None) -> Any:
    path = Path(receipt)
    if not path.is_file():
        found = await connect(url, key).request(ReceiptView, "GET", f"/api/receipts/{receipt}")
        if found["id"] != receipt:
            raise VerificationFailed(reason=f"the gateway answered with {found['id']}")
        return found
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise VerificationFailed(reason=f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise VerificationFailed(reason=f"{path} is not JSON: {error}") from None


def parse(found: Any) -> SignedReceipt:
    """A receipt as the gateway serves it, with or without its settlement around it.

    Raises:
        VerificationFailed: it is none.
    """
    return _parse(found)[0]


async def prove(
    found: Any, vault: Vault, chain_id: int, *, from_block: int = 0
) -> tuple[SignedReceipt, Proof]:
    """Prove a receipt as `verify` does, and that what stands around it is true where anything can tell.

    Raises:
        VerificationFailed: the first thing that differs.
        ChainError: the chain cannot be read.
    """
    signed, view = _parse(found)
    if view is not None:
        of = signed.receipt
        _same("id", view.id, signed.id)
        _same("charge_id", view.charge_id, of.charge_id)
        _same("account", view.account, of.account)
        _same("model", view.model, of.model)
        _same("cost", format_usd(view.cost or 0), format_usd(of.amount))
    proof = await verify(signed, vault, chain_id, from_block=from_block)
    if view is not None:
        if view.status not in _CHARGED:
            raise VerificationFailed(reason=f"around it the call is {view.status}, but it was charged")
        if view.status in _ON_CHAIN or (view.transaction, view.block) != (None, None):
            _same("transaction", view.transaction, proof.transaction)
            _same("block", view.block, proof.block)
    return signed, proof


def _same(name: str, around: Any, proven: Any) -> None:
    if around != proven:
        raise VerificationFailed(reason=f"around it the {name} is {around}, in truth it is {proven}")


def _parse(found: Any) -> tuple[SignedReceipt, ReceiptView | None]:
    try:
        if not isinstance(found, dict) or "signature" in found:
            return SignedReceipt.model_validate_json(json.dumps(found)), None
        if found.get("receipt") is None:
            facts = ", ".join(str(found[name]) for name in ("status", "reason") if found.get(name))
            raise VerificationFailed(reason="there is no signed receipt in it" + (facts and f": {facts}"))
        view = ReceiptView.model_validate_json(json.dumps(found))
    except ValidationError as error:
        raise VerificationFailed(reason=first_problem(error)) from None
    except RecursionError:
        raise VerificationFailed(reason="it is nested too deeply") from None
    assert view.receipt is not None  # noqa: S101 - seen above
    return view.receipt, view


def _print(signed: SignedReceipt, proof: Proof) -> None:
    receipt = signed.receipt
    out.print(
        plain(f"Charge {receipt.charge_id}: {format_usd(receipt.amount)} USD for {receipt.model}"),
        plain(f"  account {receipt.account}"),
        *(Text.assemble("  ", ("✓", "green"), " ", plain(step)) for step in proof.shown),
        plain(f"  transaction {proof.transaction}, block {proof.block}"),
        Text("It cannot prove that the provider counted its tokens rightly.", "dim"),
        sep="\n",
        soft_wrap=True,
    )
