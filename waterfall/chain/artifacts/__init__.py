"""The compiled contracts: written by `ape run artifacts`, so that nobody who installs Waterfall needs a compiler."""

import json
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

Name = Literal["CreditVault", "DepositAddress", "TestUSDC"]


@dataclass(frozen=True, slots=True)
class Artifact:
    """One compiled contract."""

    name: str
    abi: tuple[dict[str, Any], ...] = field(repr=False)
    bytecode: bytes = field(repr=False)
    """What creates the contract, without the constructor's arguments."""
    deployed_bytecode: bytes = field(repr=False)
    """What runs, with zeros where the constructor puts immutable values."""
    source_hash: str
    """SHA-256, hex: see scripts/artifacts.py."""
    compiler_version: str
    compiler_settings: dict[str, Any] = field(repr=False)


@cache
def load(name: Name) -> Artifact:
    """The artifact of a contract."""
    content = json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text("utf-8"))
    return Artifact(
        name=content["contractName"],
        abi=tuple(content["abi"]),
        bytecode=bytes.fromhex(content["bytecode"][2:]),
        deployed_bytecode=bytes.fromhex(content["deployedBytecode"][2:]),
        source_hash=content["sourceHash"],
        compiler_version=content["compiler"]["version"],
        compiler_settings=content["compiler"]["settings"],
    )
