"""Keys that sign: one small protocol, whatever holds the key.

A signer never shows its key: not in repr, logs or errors.
"""

import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import coincurve

from waterfall.errors import SettingsError
from waterfall.keccak import keccak

_KEY_BYTES = 32


@runtime_checkable
class Signer(Protocol):
    """Something that signs 32-byte digests with one secp256k1 key."""

    @property
    def address(self) -> str:
        """Ethereum address, lower case."""

    def sign(self, digest: bytes) -> bytes:
        """Sign a digest: 65 bytes r ‖ s ‖ v, low s, v 27 or 28."""


class LocalSigner:
    """A key in this process's memory."""

    def __init__(self, private_key: bytes) -> None:
        self._key = coincurve.PrivateKey(private_key)
        self._address = address_of(self._key.public_key.format(compressed=False))

    @property
    def address(self) -> str:
        """Ethereum address, lower case."""
        return self._address

    def sign(self, digest: bytes) -> bytes:
        """Sign a digest: 65 bytes r ‖ s ‖ v, low s, v 27 or 28."""
        signature = self._key.sign_recoverable(digest, hasher=None)
        return signature[:64] + bytes([signature[64] + 27])

    def __repr__(self) -> str:
        return f"LocalSigner({self._address})"


def address_of(public_key: bytes) -> str:
    """Ethereum address of an uncompressed public key (65 bytes)."""
    return "0x" + keccak(public_key[1:])[12:].hex()


def from_hex(private_key: str, *, name: str) -> LocalSigner:
    """A signer from 32 bytes of hex. `name` says in errors where the key came from.

    Raises:
        SettingsError: not a valid private key. The key itself is not shown.
    """
    try:
        key = bytes.fromhex(private_key.strip().removeprefix("0x"))
        if len(key) != _KEY_BYTES:  # coincurve would take a key that was cut short for another key
            raise ValueError
        return LocalSigner(key)
    except ValueError:
        raise SettingsError(reason=f"{name} does not hold a private key (32 bytes of hex)") from None


def from_environment(variable: str) -> LocalSigner:
    """A signer from a private key in an environment variable.

    Raises:
        SettingsError: the variable is not set, or holds no valid key.
    """
    value = os.environ.get(variable)
    if not value:
        raise SettingsError(
            reason=f"the environment variable {variable}, which should hold a private key, is not set"
        )
    return from_hex(value, name=f"the environment variable {variable}")


def from_keystore(path: Path, password: str) -> LocalSigner:
    """A signer from an encrypted keystore file (Web3 Secret Storage, version 3).

    Raises:
        SettingsError: the file cannot be read or the password is wrong.
    """
    from eth_account import Account  # noqa: PLC0415 - the SDK imports this room without eth-account

    try:
        return LocalSigner(bytes(Account.decrypt(path.read_text(), password)))
    except (OSError, ValueError) as error:
        raise SettingsError(reason=f"the keystore {path} cannot be opened: {error}") from None
    except (AttributeError, KeyError, NotImplementedError, TypeError):  # what eth-keyfile makes of other JSON
        raise SettingsError(reason=f"the keystore {path} cannot be opened: it is no keystore") from None
