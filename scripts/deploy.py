"""Deploy the vault to any EVM chain, at the address that its token and a salt determine, whoever deploys it.

    ape run deploy --network base:sepolia:https://… --account ALIAS --dry-run

docs/deploy.md goes through all of it.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from ape.cli import ConnectedProviderCommand, network_option
from eth_abi.abi import decode
from eth_abi.exceptions import DecodingError
from eth_utils import to_checksum_address
from web3.exceptions import Web3Exception

from scripts._compiler import NAME, ROOT, SOURCE, Compiled, committed
from scripts._refusals import FactoryMissing, RecordDiffers, Refused, TokenRefused, UnknownChain
from scripts._session import (
    AddressType,
    Salt,
    Session,
    agreed,
    answer,
    coins,
    command,
    sender,
    sending_options,
    show,
    shown_path,
)
from waterfall.chain import artifacts
from waterfall.chain.deployment import (
    DEFAULT_SALT,
    FACTORY,
    FACTORY_CODE,
    CodeDiffers,
    Compiler,
    ConstructorArguments,
    DeploymentRecord,
    check_code,
    create2_address,
    vault_init_code,
)
from waterfall.chain.usdc import USDC
from waterfall.keccak import keccak

_DECIMALS = 6
_WORD = 32


@click.command(cls=ConnectedProviderCommand)
@network_option(required=True)
@click.option("--token", type=AddressType(), help="The chain's USDC; left out: Circle's, where it is known.")
@click.option("--salt", type=Salt(), default=DEFAULT_SALT, help="Tells vaults of one token apart.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The record; left out: deployments/CHAIN_ID.json."
)
@sending_options
@command
def cli(
    provider: Any,
    token: str | None,
    salt: str,
    out: Path | None,
    account: Any,
    confirmations: int,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Deploy the vault, check it, and write its record."""
    session = Session(provider)
    token = _token(session, token)
    if session.code(FACTORY) != FACTORY_CODE:
        raise FactoryMissing(chain_id=session.chain_id, factory=to_checksum_address(FACTORY))
    init_code = vault_init_code(token)
    address = create2_address(FACTORY, salt, init_code)
    file = out or ROOT / "deployments" / f"{session.chain_id}.json"
    known = _known(file, session.chain_id, address)
    click.echo("Compiling the vault …", err=True)
    compiled = committed()
    calldata = bytes.fromhex(salt[2:]) + init_code
    facts = {
        "chain": _chain(session.chain_id),
        "token": _described(session, token),
        "vault": to_checksum_address(address),
        "salt": salt,
        "proxy": to_checksum_address(FACTORY),
        "code": f"solc {artifacts.load(NAME).compiler_version}, sources {artifacts.load(NAME).source_hash}",
        "record": shown_path(file),
    }
    if session.code(address):
        _check(session, address, token, compiled)
        show("The vault is there already, with the right code: nothing is sent.", facts, aside=as_json)
        record = known or _record(session, address, token, salt, *_creation(session, address, calldata))
    else:
        made = session.plan(account if dry_run else sender(account), FACTORY, calldata)
        facts["deployer"] = account.address if account else "(nobody yet: --account)"
        facts["gas"] = f"{made.gas:,}, at most {coins(made.cost)} of the chain's coin"
        show("To be deployed:", facts, aside=as_json)
        if dry_run:
            click.echo("Nothing was sent: this was a dry run.", err=as_json)
            if as_json:
                answer(
                    {"dry_run": True, "address": address, "chain_id": session.chain_id, "token": token}
                    | {"salt": salt, "gas": made.gas, "max_cost_wei": str(made.cost)}
                )
            return
        agreed(yes=yes, aside=as_json)
        receipt = session.send(account, made, confirmations)
        _check(session, address, token, compiled)
        record = _record(
            session,
            address,
            token,
            salt,
            receipt["blockNumber"],
            receipt["transactionHash"].to_0x_hex(),
            account.address,
        )
    if known is None and not dry_run:
        record.write(file)
    if as_json:
        answer(record.model_dump(mode="json"))
    else:
        click.echo(f"Deployed in block {record.block}; the record is {shown_path(file)}.")


def _token(session: Session, given: str | None) -> str:
    """The token, if a vault can be backed by it.

    Raises:
        UnknownChain, TokenRefused
    """
    usdc = USDC.get(session.chain_id)
    if given is None and usdc is None:
        raise UnknownChain(chain_id=session.chain_id)
    token = given or usdc.address.lower()
    about = {"token": to_checksum_address(token), "chain_id": session.chain_id}
    if not session.code(token):
        raise TokenRefused(**about, reason="there is no contract")
    found = session.call(token, keccak(b"decimals()")[:4])
    decimals = int.from_bytes(found, "big") if len(found) == _WORD else None
    if decimals != _DECIMALS:
        says = "it tells no decimals" if decimals is None else f"it has {decimals} decimals"
        raise TokenRefused(**about, reason=f"{says}, and credit is counted on {_DECIMALS}")
    return token


def _chain(chain_id: int) -> str:
    usdc = USDC.get(chain_id)
    return f"{chain_id} ({usdc.chain})" if usdc else str(chain_id)


def _described(session: Session, token: str) -> str:
    usdc = USDC.get(session.chain_id)
    if usdc is not None and usdc.address.lower() == token:
        return f"{usdc.address} (Circle's USDC)"
    found = session.call(token, keccak(b"symbol()")[:4])
    try:
        symbol = repr(decode(("string",), found)[0])
    except (DecodingError, ValueError):  # a token may say anything
        symbol = "no readable symbol"
    warning = f"; NOT Circle's USDC of this chain, {usdc.address}" if usdc else ""
    return f"{to_checksum_address(token)} ({symbol}{warning})"


def _known(file: Path, chain_id: int, address: str) -> DeploymentRecord | None:
    """The record that is there already.

    Raises:
        RecordDiffers: it is another vault's, which must not be lost.
    """
    if not file.exists():
        return None
    known = DeploymentRecord.read(file)
    if (known.chain_id, known.address) != (chain_id, address):
        raise RecordDiffers(
            file=shown_path(file),
            reason=f"{known.address} on chain {known.chain_id} instead of {address} on chain {chain_id}",
        )
    return known


def _check(session: Session, address: str, token: str, compiled: Compiled) -> None:
    """Hold the vault on the chain against the sources, to the last byte.

    Raises:
        CodeDiffers
    """
    check_code(address, session.code(address), compiled.running_code(address, token, session.chain_id))
    answered = session.call(address, keccak(b"token()")[:4])
    if answered != bytes.fromhex(token[2:]).rjust(32, b"\0"):
        raise CodeDiffers(address=address, reason=f"its token() answers 0x{answered.hex()}")


def _creation(session: Session, address: str, calldata: bytes) -> tuple[int, str | None, str | None]:
    """Block, transaction and sender that made a vault which was there before us.

    Raises:
        Refused: the node cannot tell.
    """
    first, last = 0, int(session.web3.eth.block_number)
    try:
        while first < last:
            middle = (first + last) // 2
            first, last = (first, middle) if session.code(address, middle) else (middle + 1, last)
        transactions = session.web3.eth.get_block(first, full_transactions=True)["transactions"]
    except (Web3Exception, ValueError) as error:
        raise Refused(
            reason="This node does not keep old states, so it cannot tell when the vault was deployed: "
            f"ask an archive node once ({error})"
        ) from error
    for transaction in transactions:
        called = str(transaction.get("to") or "").lower(), bytes(transaction["input"])
        if called == (FACTORY, calldata):
            return first, transaction["hash"].to_0x_hex(), transaction["from"]
    return first, None, None


def _record(
    session: Session,
    address: str,
    token: str,
    salt: str,
    block: int,
    transaction: str | None,
    deployer: str | None,
) -> DeploymentRecord:
    artifact = artifacts.load(NAME)
    return DeploymentRecord(
        artifact=NAME,
        chain_id=session.chain_id,
        address=address,
        block=block,
        deployed_at=datetime.fromtimestamp(session.web3.eth.get_block(block)["timestamp"], UTC),
        transaction=transaction,
        deployer=deployer,
        factory=FACTORY,
        salt=salt,
        constructor_arguments=ConstructorArguments(token_=token),
        code_hash="0x" + keccak(session.code(address)).hex(),
        source_name=SOURCE,
        source_hash=artifact.source_hash,
        compiler=Compiler(
            name="solc", version=artifact.compiler_version, settings=artifact.compiler_settings
        ),
    )
