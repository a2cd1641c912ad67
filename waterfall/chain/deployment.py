"""A vault's deployment: the address CREATE2 gives it, the code it must have, and the record that tells of it.

`ape run deploy` writes the record; `waterfall serve`, `ape run verify` and `ape run register` read it.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from eth_abi.abi import encode
from pydantic import AwareDatetime, Field, StringConstraints, ValidationError

from waterfall.chain import artifacts
from waterfall.errors import ChainError, SettingsError
from waterfall.keccak import keccak
from waterfall.receipts import DOMAIN_NAME, DOMAIN_VERSION, Domain
from waterfall.types import Address, Frozen, Hash32

FACTORY: Address = "0x4e59b44847b379578588920ca78fbf26c0b4956c"
"""Arachnid's deterministic deployment proxy, at this address on nearly every chain: calldata is salt ‖ init code.

Source: https://github.com/Arachnid/deterministic-deployment-proxy
"""
FACTORY_CODE = bytes.fromhex(
    "7fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffe0360160008160208237803582823"
    "4f58015156039578182fd5b8082525050506014600cf3"
)
FACTORY_SIGNER: Address = "0x3fab184622dc19b6109349b94811493bf2a45362"
"""Whose one transaction, `FACTORY_TRANSACTION`, makes the factory on a chain without it. Nobody has its key."""
FACTORY_COST = 10**16
"""Wei that the signer spends on it."""
FACTORY_TRANSACTION = bytes.fromhex(
    "f8a58085174876e800830186a08080b853604580600e600039806000f350fe"
    + FACTORY_CODE.hex()
    + "1ba0"
    + "22" * 32
    + "a0"
    + "22" * 32
)

DEFAULT_SALT: Hash32 = "0x" + keccak(b"waterfall.CreditVault").hex()

_DIGEST = r"^[0-9a-f]{64}$"
_WORD = 32
_SHORT_STRING_BYTES = 31


class CodeDiffers(ChainError):
    """The code at {address} is not the vault's: {reason}."""

    code = "code_differs"


class Compiler(Frozen):
    """What compiled the contract."""

    name: Literal["solc"]
    version: str
    """With the commit, such as 0.8.37+commit.f401782d."""
    settings: dict[str, Any]


class ConstructorArguments(Frozen):
    """The arguments of the vault's constructor, by their names in the source."""

    token_: Address


class DeploymentRecord(Frozen):
    """One vault on one chain, and how it came there."""

    artifact: Literal["CreditVault"]
    chain_id: int = Field(ge=1, strict=True)
    address: Address
    block: int = Field(ge=0, strict=True)
    """From here on the vault is there: nothing of it is in an earlier block."""
    deployed_at: AwareDatetime
    """Time of that block."""
    transaction: Hash32 | None
    """None: another contract called the factory, so that no transaction tells of the vault by itself."""
    deployer: Address | None
    """Who sent the transaction; it has no power over the vault, as nobody has."""
    factory: Address
    salt: Hash32
    constructor_arguments: ConstructorArguments
    code_hash: Hash32
    """keccak256 of the code on the chain."""
    source_name: str
    source_hash: Annotated[str, StringConstraints(pattern=_DIGEST)]
    """SHA-256 over the sources, as in the artifact."""
    compiler: Compiler

    @classmethod
    def read(cls, file: Path) -> Self:
        """The record in a file.

        Raises:
            SettingsError: there is none.
        """
        try:
            return cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise SettingsError(reason=f"the deployment record {file}: {error.strerror}") from None
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "it"
            raise SettingsError(
                reason=f"{file} is not a deployment record: {where}: {problem['msg']}"
            ) from None

    def write(self, file: Path) -> None:
        """Write the record, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        with partial.open("w") as target:
            target.write(self.model_dump_json(indent=2) + "\n")
            target.flush()
            os.fsync(target.fileno())
        partial.replace(file)


def create2_address(factory: str, salt: str, init_code: bytes) -> Address:
    """Where a factory puts a contract. Source: EIP-1014."""
    parts = (b"\xff", bytes.fromhex(factory[2:]), bytes.fromhex(salt[2:]), keccak(init_code))
    return "0x" + keccak(b"".join(parts))[12:].hex()


def vault_init_code(token: str) -> bytes:
    """What creates a vault of a token."""
    return artifacts.load("CreditVault").bytecode + encode(("address",), (token,))


def vault_immutables(vault: str, token: str, chain_id: int) -> dict[str, bytes]:
    """What the vault's constructor writes into its code: 32 bytes for each immutable variable's name.

    Sources: contracts/CreditVault.sol, and of OpenZeppelin EIP712.sol and ShortStrings.sol.
    """
    implementation = keccak(b"\xd6\x94" + bytes.fromhex(vault[2:]) + b"\x01")[12:]  # RLP of (vault, nonce 1)
    return {
        "token": _word(bytes.fromhex(token[2:])),
        "_depositAddressImplementation": _word(implementation),
        "_cachedDomainSeparator": Domain(chain_id, vault).separator,
        "_cachedChainId": chain_id.to_bytes(_WORD, "big"),
        "_cachedThis": _word(bytes.fromhex(vault[2:])),
        "_hashedName": keccak(DOMAIN_NAME.encode()),
        "_hashedVersion": keccak(DOMAIN_VERSION.encode()),
        "_name": _short_string(DOMAIN_NAME),
        "_version": _short_string(DOMAIN_VERSION),
    }


def fill_in(code: bytes, places: Mapping[str, Iterable[int]], values: Mapping[str, bytes]) -> bytes:
    """The code that runs, from the compiler's, which has zeros where immutable values go.

    Args:
        code: the compiler's.
        places: where in the code each immutable variable goes.
        values: 32 bytes for each of them.
    """
    filled = bytearray(code)
    for name, offsets in places.items():
        for offset in offsets:
            filled[offset : offset + _WORD] = values[name]
    return bytes(filled)


def check_code(address: str, found: bytes, expected: bytes) -> None:
    """Hold code from the chain against what it must be, to the last byte.

    Raises:
        CodeDiffers: where, and how.
    """
    if not found:
        raise CodeDiffers(address=address, reason="there is none")
    if len(found) != len(expected):
        raise CodeDiffers(address=address, reason=f"it has {len(found)} bytes instead of {len(expected)}")
    for offset, (is_, must_be) in enumerate(zip(found, expected, strict=True)):
        if is_ != must_be:
            reason = f"byte {offset} is 0x{is_:02x} instead of 0x{must_be:02x}"
            raise CodeDiffers(address=address, reason=reason)


def _word(value: bytes) -> bytes:
    return value.rjust(_WORD, b"\0")


def _short_string(text: str) -> bytes:
    """A string as OpenZeppelin's ShortString: left-aligned, its length in the last byte."""
    encoded = text.encode()
    return encoded.ljust(_SHORT_STRING_BYTES, b"\0") + bytes([len(encoded)])
