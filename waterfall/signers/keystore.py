"""Keys in encrypted files: Web3 Secret Storage, version 3, as geth, Foundry and eth-account write it.

Source: https://ethereum.org/en/developers/docs/data-structures-and-encoding/web3-secret-storage/
"""

import json
import os
from pathlib import Path

import coincurve

from waterfall.errors import SettingsError
from waterfall.signers.local import LocalSigner


def from_keystore(path: Path, password: str) -> LocalSigner:
    """A signer from an encrypted keystore file.

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


def new_keystore(path: Path, password: str) -> LocalSigner:
    """Write a fresh key to an encrypted keystore file that only its owner may read; nothing is overwritten.

    Raises:
        SettingsError: there is a file already, it cannot be written, or the password is empty.
    """
    from eth_account import Account  # noqa: PLC0415 - the SDK imports this room without eth-account

    if not password:
        raise SettingsError(reason="a keystore needs a password")
    content = json.dumps(Account.encrypt(coincurve.PrivateKey().secret, password), indent=2) + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SettingsError(
            reason=f"there is a file {path} already: it may hold a key, so it stays"
        ) from None
    except OSError as error:
        raise SettingsError(reason=f"the keystore {path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise SettingsError(reason=f"the keystore {path} cannot be written: {error.strerror}") from None
    return from_keystore(path, password)  # what cannot be opened again must not be given an address
