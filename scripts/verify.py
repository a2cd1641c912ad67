"""Show that the vault on a chain is compiled from these sources, and write down what lets anybody else show it.

ape run verify --network base:sepolia:https://…
"""

import json
from pathlib import Path
from typing import Any

import click
from ape.cli import ConnectedProviderCommand, network_option
from eth_abi.abi import encode
from evmchains import PUBLIC_CHAIN_META

from scripts._compiler import ROOT, Compiled, compile_input, standard_input
from scripts._publishing import SERVICES, Publication, by_hand, publish
from scripts._refusals import Refused, SourcesDiffer
from scripts._session import Session, answer, command, record_of, shown_path
from waterfall.chain.deployment import CodeDiffers, DeploymentRecord, check_code, create2_address


@click.command(cls=ConnectedProviderCommand)
@network_option(required=True)
@click.option(
    "--deployment",
    type=click.Path(path_type=Path),
    help="The vault's record; left out: deployments/CHAIN_ID.json.",
)
@click.option(
    "--input",
    "given",
    type=click.Path(path_type=Path),
    help="Check this standard-JSON input instead of these sources.",
)
@click.option("--out", type=click.Path(path_type=Path), help="A folder; left out: build/verify/CHAIN_ID.")
@click.option(
    "--publish",
    "services",
    type=click.Choice(sorted(SERVICES)),
    multiple=True,
    help="Publish there; more than once for both.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@command
def cli(
    provider: Any,
    deployment: Path | None,
    given: Path | None,
    out: Path | None,
    services: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compile the sources anew and hold them against the vault on the chain."""
    for service in services:
        SERVICES[service].require()
    session = Session(provider)
    _, record = record_of(session, deployment)
    contents = _read(given) if given else standard_input()
    click.echo("Compiling the vault anew …", err=True)
    compiled = compile_input(contents, fresh=True)
    arguments = encode(("address",), (record.constructor_arguments.token_,))
    _check(session, record, compiled, arguments)
    if not as_json:
        click.echo(
            f"The vault {record.address} on chain {record.chain_id} is what these sources compile to:\n"
            "  what created it (its address commits to that) and the code that runs, to the last byte."
        )
    out = out or ROOT / "build" / "verify" / str(record.chain_id)
    files = {
        "standard-input.json": json.dumps(contents, indent=2, ensure_ascii=False),
        "metadata.json": compiled.metadata,
        "constructor-arguments.txt": arguments.hex(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_text(content)
        if not as_json:
            click.echo(f"  wrote {shown_path(out / name)}")
    publication = Publication(record, contents, arguments.hex())
    published = {}
    for service in services:
        published[service] = publish(service, publication, provider.network)
        click.echo(f"  published: {published[service]}", err=as_json)
    if as_json:
        answer(
            {"verified": True, "address": record.address, "chain_id": record.chain_id}
            | {"files": [str(shown_path(out / name)) for name in files], "published": published}
        )
    elif not services:
        click.echo(by_hand(publication, _explorer(record.chain_id)))


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
        _ = found["sources"].items(), found["settings"].items()
    except OSError as error:
        raise Refused(reason=f"{file}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Refused(reason=f"{file} is not a standard-JSON input of solc") from None
    return dict(found)


def _check(session: Session, record: DeploymentRecord, compiled: Compiled, arguments: bytes) -> None:
    """Hold what was compiled against the chain.

    Raises:
        SourcesDiffer
    """
    token = record.constructor_arguments.token_
    init_code = bytes.fromhex(compiled.bytecode) + arguments
    address = create2_address(record.factory, record.salt, init_code)
    try:
        running = compiled.running_code(record.address, token, record.chain_id)
        check_code(record.address, session.code(record.address), running)
    except CodeDiffers as error:
        raise SourcesDiffer(address=record.address, reason=error.details["reason"]) from error
    if address != record.address:
        raise SourcesDiffer(address=record.address, reason=f"with token and salt they make {address}")


def _explorer(chain_id: int) -> str | None:
    for networks in PUBLIC_CHAIN_META.values():
        for meta in networks.values():
            if meta["chainId"] == chain_id:
                return next((str(found["url"]) for found in meta.get("explorers") or ()), None)
    return None
