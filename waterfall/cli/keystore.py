"""`waterfall keystore`."""

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from waterfall.cli.output import told
from waterfall.errors import SettingsError
from waterfall.settings import KeySettings, read_password
from waterfall.signers import from_keystore, new_keystore

keystore = typer.Typer(help="Signing keys in encrypted files.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="The keystore, a JSON file.")]
PasswordEnv = Annotated[
    str, typer.Option(help="Environment variable with the password; you are asked where it is not set.")
]
PasswordFile = Annotated[Path | None, typer.Option(help="File with the password.")]
_DEFAULT_ENV = KeySettings().password_env


@keystore.command("new")
@told()
def new(file: File, password_env: PasswordEnv = _DEFAULT_ENV, password_file: PasswordFile = None) -> None:
    """Make a fresh key, keep it encrypted in FILE, and print its address. No file is overwritten.

    There is no other copy: whoever has neither the file nor the password has no key.
    """
    if file.exists():  # before anybody thinks of a password
        raise SettingsError(reason=f"there is a file {file} already: it may hold a key, so it stays")
    typer.echo(new_keystore(file, _password(password_env, password_file, new=True)).address)


@keystore.command("address")
@told()
def address(file: File, password_env: PasswordEnv = _DEFAULT_ENV, password_file: PasswordFile = None) -> None:
    """Print the address of the key in FILE, which the password opens."""
    typer.echo(from_keystore(file, _password(password_env, password_file)).address)


def _password(variable: str, file: Path | None, *, new: bool = False) -> str:
    if file is not None:
        return read_password(file)
    if variable in os.environ:
        return os.environ[variable]
    # The command line's own answer to Ctrl-C would leave the terminal without echo.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return str(typer.prompt("Password", hide_input=True, confirmation_prompt=new, err=True))
    finally:
        signal.signal(signal.SIGINT, before)
