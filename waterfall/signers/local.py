"""Keys in this process's memory."""

import base64
import os
from typing import NoReturn

import coincurve

from waterfall.errors import SettingsError
from waterfall.keccak import keccak

_KEY_BYTES = 32


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

    def spellings(self) -> tuple[str, ...]:
        """How the key could be spelt in a text, for filters that let no such text through. Show them to nobody."""
        key = self._key.secret
        encoded = base64.b64encode(key).decode().rstrip("=")
        url_safe = encoded.translate(str.maketrans("+/", "-_"))
        return key.hex(), encoded, url_safe, str(int.from_bytes(key, "big")), repr(key)[2:-1]

    def __repr__(self) -> str:
        return f"LocalSigner({self._address})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not copied or pickled")


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
