"""Register a platform on a deployed vault.

ape run register --network base:sepolia:https://… --account ALIAS --payout 0x… --meter 0x… --exit-delay 1d
"""

import re
from pathlib import Path
from typing import Any

import click
from ape.cli import ConnectedProviderCommand, network_option
from eth_abi.abi import decode
from eth_utils import to_checksum_address

from scripts._refusals import PlatformExists, Refused
from scripts._session import (
    AddressOrAlias,
    Salt,
    Session,
    agreed,
    answer,
    coins,
    command,
    record_of,
    sender,
    sending_options,
    show,
    shown_path,
)
from waterfall.chain import vault
from waterfall.chain.deployment import CodeDiffers, DeploymentRecord
from waterfall.keccak import keccak
from waterfall.types import ZERO_ADDRESS

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_SHORTEST, _LONGEST = _UNITS["h"], 7 * _UNITS["d"]
_DELAY = re.compile(r"(\d+)([smhd]?)")
_DEFAULT_SALT = "0x" + "00" * 32


class Delay(click.ParamType):
    """A time such as 1d, 6h, 90m or 3600."""

    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Its seconds."""
        found = _DELAY.fullmatch(value)
        if not found:
            self.fail(f"{value!r} is not a time such as 1d, 6h, 90m or 3600 (seconds)", param, ctx)
        seconds = int(found[1]) * _UNITS[found[2]]
        if not _SHORTEST <= seconds <= _LONGEST:
            self.fail(f"{value} is not within 1 hour and 7 days, as the vault demands", param, ctx)
        return seconds


@click.command(cls=ConnectedProviderCommand)
@network_option(required=True)
@click.option(
    "--deployment",
    type=click.Path(path_type=Path),
    help="The vault's record; left out: deployments/CHAIN_ID.json.",
)
@click.option("--payout", type=AddressOrAlias(), required=True, help="Where the platform's earnings go.")
@click.option(
    "--meter", type=AddressOrAlias(), required=True, help="The key that signs receipts and batches."
)
@click.option(
    "--exit-delay",
    type=Delay(),
    required=True,
    help="How long users wait for unspent credit, 1h to 7d. It can never be changed.",
)
@click.option("--salt", type=Salt(), default=_DEFAULT_SALT, help="Tells one owner's platforms apart.")
@sending_options
@command
def cli(
    provider: Any,
    deployment: Path | None,
    payout: str,
    meter: str,
    exit_delay: int,
    salt: str,
    account: Any,
    confirmations: int,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Register a platform, whose owner is --account, for good."""
    session = Session(provider)
    file, record = record_of(session, deployment)
    if keccak(session.code(record.address)) != bytes.fromhex(record.code_hash[2:]):
        raise CodeDiffers(address=record.address, reason="its hash is not the record's")
    for option, given in (("--payout", payout), ("--meter", meter)):
        if given in {ZERO_ADDRESS, record.address, record.constructor_arguments.token_}:
            raise Refused(reason=f"{option} cannot be zero, the vault or its token: {given}")
    owner = str(sender(account).address).lower()
    platform = vault.platform_id(owner, salt)
    existing = _platform(session, record, platform)
    if existing["owner"] != ZERO_ADDRESS:
        raise PlatformExists(platform=str(platform), **existing)
    calldata = vault.register_platform(salt, payout, meter, exit_delay)
    made = session.plan(account, record.address, calldata)
    show(
        "To be registered:",
        {
            "platform": platform,
            "chain": record.chain_id,
            "vault": to_checksum_address(record.address),
            "owner": to_checksum_address(owner),
            "payout": to_checksum_address(payout),
            "meter": to_checksum_address(meter),
            "exit delay": f"{exit_delay} s, for good",
            "salt": salt,
            "gas": f"{made.gas:,}, at most {coins(made.cost)} of the chain's coin",
        },
        aside=as_json,
    )
    result = {"platform": str(platform), "chain_id": record.chain_id, "vault": record.address, "owner": owner}
    result |= {"payout": payout, "meter": meter, "exit_delay_seconds": exit_delay, "salt": salt}
    if dry_run:
        click.echo("Nothing was sent: this was a dry run.", err=as_json)
    else:
        agreed(yes=yes, aside=as_json)
        receipt = session.send(account, made, confirmations)
        is_there = _platform(session, record, platform)
        if (is_there["owner"], is_there["payout"]) != (owner, payout):
            raise Refused(reason=f"the vault does not show platform {platform} as registered: {is_there}")
        result |= {"transaction": receipt["transactionHash"].to_0x_hex(), "block": receipt["blockNumber"]}
    if as_json:
        answer(result | {"dry_run": dry_run})
    elif not dry_run:
        click.echo(f"Registered platform {platform} in block {result['block']}. For waterfall.toml:\n")
        click.echo(_config(file, platform, meter))


def _config(file: Path, platform: int, meter: str) -> str:
    return f"""[chain]
rpc_url = "https://…"  # your node
deployment = "{shown_path(file)}"
platform = {platform}

[keys]
meter = "keystore:…"  # of {to_checksum_address(meter)}"""


def _platform(session: Session, record: DeploymentRecord, platform: int) -> dict[str, Any]:
    """A platform as the vault holds it."""
    calldata = keccak(b"platformOf(uint128)")[:4] + platform.to_bytes(32, "big")
    found = session.call(record.address, calldata)
    try:
        owner, payout, exit_delay, _, _ = decode(("address", "address", "uint32", "uint96", "address"), found)
    except Exception as error:
        raise CodeDiffers(address=record.address, reason=f"platformOf answers 0x{found.hex()}") from error
    return {"owner": owner, "payout": payout, "exit_delay_seconds": exit_delay}
