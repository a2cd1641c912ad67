"""`waterfall receipts`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from waterfall.chain.rpc import Rpc
from waterfall.chain.vault import Vault
from waterfall.chain.verify import Proof, verify
from waterfall.cli.accounts import Key, Url
from waterfall.cli.api import connect, read_dev_file
from waterfall.cli.output import Json, command, facts, out, show
from waterfall.errors import SettingsError, VerificationFailed
from waterfall.money import format_usd
from waterfall.settings import load
from waterfall.types import SignedReceipt

receipts = typer.Typer(help="Signed receipts.", no_args_is_help=True)


@receipts.command("show")
@command
async def show_(
    receipt: Annotated[str, typer.Argument(help="The receipt's id.")],
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """One receipt and where its charge stands."""
    found = await connect(url, key).request("GET", f"/api/receipts/{receipt}")
    names = ("id", "status", "reason", "account", "model", "held", "cost", "transaction", "block")
    show(found, as_json, lambda r: facts("Receipt", [(name, r[name]) for name in names]))


@receipts.command("verify")
@command
async def verify_(
    receipt: Annotated[str, typer.Argument(help="A receipt's id, or a file with one.", metavar="ID|FILE")],
    config: Annotated[
        Path | None, typer.Option(help="The waterfall.toml whose chain and vault you trust.")
    ] = None,
    rpc: Annotated[
        str | None, typer.Option("--rpc", help="The node to ask [default: the configured one].")
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Prove a receipt: signature, meter, amount recomputed, charge on the chain. Exit code 1 if it does not hold."""
    if config is not None:
        chain = load(config).chain
        if chain is None:
            raise SettingsError(reason=f"{config}: there is no [chain]")
        rpc_url, chain_id, vault, first = (
            rpc or chain.rpc_url,
            chain.chain_id,
            chain.vault,
            chain.deployed_block,
        )
    else:
        dev = read_dev_file()
        rpc_url, chain_id, vault, first = rpc or dev["rpc_url"], dev["chain_id"], dev["vault"], 0
    signed = await _read(receipt, url, key)
    node = Rpc(rpc_url)
    try:
        proof = await verify(signed, Vault(node, vault), chain_id, from_block=first)
    finally:
        await node.close()
    if as_json:
        typer.echo(json.dumps({"valid": True, "transaction": proof.transaction, "block": proof.block}))
    else:
        _print(signed, proof)


async def _read(receipt: str, url: str | None, key: str | None) -> SignedReceipt:
    path = Path(receipt)
    if path.is_file():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise VerificationFailed(reason=f"{path} is not JSON: {error}") from None
    else:
        found = await connect(url, key).request("GET", f"/api/receipts/{receipt}")
    return parse(found)


def parse(found: Any) -> SignedReceipt:
    """A receipt as the gateway serves it, with or without its settlement around it.

    Raises:
        VerificationFailed: it is none.
    """
    if isinstance(found, dict) and "signature" not in found:
        if found.get("receipt") is None and "status" in found:
            raise VerificationFailed(
                reason=f"nothing was charged: the call is {found['status']}, {found['reason']}"
            )
        found = found.get("receipt")
    try:
        return SignedReceipt.model_validate_json(json.dumps(found))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "it"
        raise VerificationFailed(reason=f"{where}: {problem['msg']}") from None


def _print(signed: SignedReceipt, proof: Proof) -> None:
    out.print(
        f"Receipt {signed.id}: {format_usd(signed.receipt.amount)} USD for {signed.receipt.model}",
        highlight=False,
    )
    for step in proof.shown:
        out.print(f"  [green]✓[/green] {step}", highlight=False)
    out.print(f"  transaction {proof.transaction}, block {proof.block}", highlight=False)
    out.print("It cannot prove that the provider counted its tokens rightly.", style="dim")
