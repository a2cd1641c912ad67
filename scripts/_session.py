"""What the scripts have in common: options, one transaction sent with care, and how they answer."""

import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from decimal import Decimal
from functools import wraps
from pathlib import Path
from typing import Any

import click
from ape import accounts
from ape.cli import account_option, verbosity_option
from ape.logging import LogLevel, logger
from eth_utils import is_checksum_address, to_checksum_address
from web3.exceptions import TimeExhausted, TransactionNotFound, Web3Exception

from scripts._compiler import ROOT
from scripts._refusals import AccountNeeded, ChainRefuses, InsufficientGas, NotMined, Refused, WrongChain
from waterfall.chain import vault
from waterfall.chain.deployment import DeploymentRecord
from waterfall.errors import WaterfallError
from waterfall.keccak import keccak
from waterfall.types import ZERO_ADDRESS

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_SALT = re.compile(r"0x[0-9a-fA-F]{64}")
_POLL_SECONDS = 0.5


# ── Options ──────────────────────────────────────────────────────────────────────────────────────────


class AddressType(click.ParamType):
    """An address; one in mixed case has to have the right checksum."""

    name = "0x…"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The address in lower case."""
        if not _ADDRESS.fullmatch(value):
            self.fail(f"{value!r} is not an address (0x and 40 hex digits)", param, ctx)
        if value[2:] not in {value[2:].lower(), value[2:].upper()} and not is_checksum_address(value):
            self.fail(f"{value} has a wrong checksum: there is a slip in it", param, ctx)
        return str(value.lower())


class AddressOrAlias(AddressType):
    """An address, or the alias of one of ape's accounts."""

    name = "0x…|ALIAS"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The address in lower case."""
        if value in accounts.aliases:
            return str(accounts.load(value).address).lower()
        return super().convert(value, param, ctx)


class Salt(click.ParamType):
    """32 bytes, or a text that stands for its keccak256."""

    name = "0x…|TEXT"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The 32 bytes in hex."""
        if _SALT.fullmatch(value):
            return str(value.lower())
        if value.startswith("0x"):
            self.fail(f"{value} is neither 32 bytes of hex nor a text", param, ctx)
        return "0x" + keccak(value.encode()).hex()


def sending_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a command that sends a transaction."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--dry-run", is_flag=True, help="Check and show everything, send nothing."),
        click.option("--yes", is_flag=True, help="Send without asking."),
        click.option(
            "--confirmations",
            type=click.IntRange(min=0),
            default=2,
            show_default=True,
            help="Blocks to wait for on top of the transaction's.",
        ),
        account_option(prompt=None),
    ):
        function = option(function)
    return function


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Answer a foreseen failure with one line (with --json, as JSON) and exit code 1."""

    @verbosity_option(default="WARNING")  # what ape tells beside would be in the way of JSON
    @wraps(function)
    def run(*args: Any, as_json: bool, **kwargs: Any) -> None:
        try:
            function(*args, as_json=as_json, **kwargs)
        except WaterfallError as error:
            if as_json:
                facts = {name: value for name, value in error.details.items() if name != "type"}
                answer({"error": {"type": error.code, "message": error.message, **facts}})
            raise click.ClickException(f"{error.message} ({error.code})") from error

    return run


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────


def show(title: str, facts: dict[str, Any], *, aside: bool) -> None:
    """Print facts for people; aside where JSON is the answer."""
    width = max(map(len, facts))
    click.echo(
        "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in facts.items())]), err=aside
    )


def answer(value: Any) -> None:
    """Print an answer for programs."""
    click.echo(json.dumps(value, indent=2))


def coins(wei: int) -> str:
    """Wei as coins of the chain."""
    text = f"{Decimal(wei) / 10**18:.9f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


def shown_path(file: Path) -> Path:
    """A file as people would name it here."""
    here = Path.cwd()
    return file.relative_to(here) if file.is_relative_to(here) else file


# ── The chain ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Plan:
    """One transaction, checked and priced, not sent."""

    target: str
    calldata: bytes
    gas: int
    max_fee: int
    priority_fee: int

    @property
    def cost(self) -> int:
        """The most it can cost, in wei."""
        return self.gas * self.max_fee


class Session:
    """One chain, through ape's provider."""

    def __init__(self, provider: Any) -> None:
        self.web3 = provider.web3
        self.chain_id = int(self.web3.eth.chain_id)
        self._network = provider.network
        # Ape knows that networks of those names claim nothing, and has checked the others when it connected.
        if provider.network.name not in {"local", "custom"} and provider.network.chain_id != self.chain_id:
            raise WrongChain(
                found=self.chain_id,
                claimant=f"the network {provider.network.choice}",
                claimed=provider.network.chain_id,
            )

    def code(self, address: str, block: int | None = None) -> bytes:
        """The code at an address, now or at the end of a block."""
        return bytes(self.web3.eth.get_code(to_checksum_address(address), block))

    def call(self, address: str, calldata: bytes) -> bytes:
        """What a call answers; nothing if it reverts."""
        try:
            return bytes(
                self.web3.eth.call({"to": to_checksum_address(address), "data": "0x" + calldata.hex()})
            )
        except Web3Exception:
            return b""

    def plan(self, account: Any | None, target: str, calldata: bytes) -> Plan:
        """Price a transaction.

        Raises:
            ChainRefuses: it would fail.
            InsufficientGas: the account cannot pay for it.
        """
        call = {
            "from": account.address if account else to_checksum_address(ZERO_ADDRESS),
            "to": to_checksum_address(target),
            "data": "0x" + calldata.hex(),
        }
        try:
            gas = int(self.web3.eth.estimate_gas(call))
        except Web3Exception as error:
            data = getattr(error, "data", None)
            raise ChainRefuses(reason=vault.refusal(data) or str(error)) from error
        tip = int(self.web3.eth.max_priority_fee)
        base = int(self.web3.eth.get_block("latest").get("baseFeePerGas", 0))
        made = Plan(target, calldata, gas + gas // 5, 2 * base + tip, tip)
        if account is not None:
            balance = int(self.web3.eth.get_balance(account.address))
            if balance < made.cost:
                raise InsufficientGas(
                    account=account.address, balance=coins(balance), needed=coins(made.cost)
                )
        return made

    def send(self, account: Any, made: Plan, confirmations: int) -> dict[str, Any]:
        """Sign, send and wait; the receipt.

        Raises:
            ChainRefuses: the node did not take it, or it was mined and failed.
            NotMined: it was sent; nobody knows yet.
        """
        transaction = self._network.ecosystem.create_transaction(
            chainId=self.chain_id,
            sender=account.address,
            receiver=to_checksum_address(made.target),
            data=made.calldata,
            gas=made.gas,
            max_fee=made.max_fee,
            max_priority_fee=made.priority_fee,
            nonce=self.web3.eth.get_transaction_count(account.address, "pending"),
        )
        try:
            transaction_hash = self.web3.eth.send_raw_transaction(_signed(account, transaction))
        except Web3Exception as error:
            raise ChainRefuses(reason=str(error)) from error
        seconds = self._network.transaction_acceptance_timeout
        deadline = time.monotonic() + seconds
        try:
            receipt = self.web3.eth.wait_for_transaction_receipt(transaction_hash, timeout=seconds)
            while self.web3.eth.block_number < receipt["blockNumber"] + confirmations:
                if time.monotonic() > deadline:
                    raise TimeExhausted
                time.sleep(_POLL_SECONDS)
            # The chain may have been reorganised meanwhile.
            receipt = self.web3.eth.get_transaction_receipt(transaction_hash)
        except (TimeExhausted, TransactionNotFound) as error:
            raise NotMined(transaction=transaction_hash.to_0x_hex(), seconds=seconds) from error
        if receipt["status"] != 1:
            raise ChainRefuses(reason=f"{transaction_hash.to_0x_hex()} was mined and failed")
        return dict(receipt)


def _signed(account: Any, transaction: Any) -> bytes:
    """A transaction, signed: what it does was shown and agreed to, so ape need not ask again."""
    signs_once = hasattr(account, "set_autosign")
    # Ape asks for the passphrase and warns where the answer goes: that may have to be JSON.
    with redirect_stdout(sys.stderr), logger.at_level(LogLevel.ERROR):
        if signs_once:
            account.set_autosign(True)
        try:
            signed = account.sign_transaction(transaction)
        finally:
            if signs_once:
                account.set_autosign(False)
    if signed is None:
        raise Refused(reason="It was not signed: nothing was sent")
    return bytes(signed.serialize_transaction())


def sender(account: Any | None) -> Any:
    """The account that was named.

    Raises:
        AccountNeeded: none was.
    """
    if account is None:
        raise AccountNeeded
    return account


def agreed(*, yes: bool, aside: bool) -> None:
    """Ask whether to send."""
    if not yes:
        click.confirm("Send it?", abort=True, err=aside)


def record_of(session: Session, file: Path | None) -> tuple[Path, DeploymentRecord]:
    """The record of the vault on a chain, and where it is.

    Raises:
        SettingsError: there is none.
        WrongChain: it tells of another chain.
    """
    file = file or ROOT / "deployments" / f"{session.chain_id}.json"
    record = DeploymentRecord.read(file)
    if record.chain_id != session.chain_id:
        raise WrongChain(
            found=session.chain_id, claimant=f"the record {shown_path(file)}", claimed=record.chain_id
        )
    return file, record
