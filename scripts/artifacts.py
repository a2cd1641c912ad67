"""Compile the contracts into the package's artifacts, so that an installed Waterfall needs no compiler.

    ape run artifacts

tests/contracts/test_artifacts.py holds the committed files against the sources.
"""

import json
from pathlib import Path
from typing import Any

import click
from ape import compilers, project

from scripts._compiler import source_hash, sources_of

SOURCES = {
    "CreditVault": "CreditVault.sol",
    "DepositAddress": "DepositAddress.sol",
    "TestUSDC": "mocks/TestUSDC.sol",
}
FOLDER = Path(__file__).resolve().parent.parent / "waterfall" / "chain" / "artifacts"


def build(name: str) -> dict[str, Any]:
    """The artifact of one contract, compiled from the sources as they are now.

    It is compiled alone with what it imports: through the IR, solc's code also depends on what else is compiled
    in the same run.
    """
    solidity = compilers.get_compiler("solidity")
    source = project.path / "contracts" / SOURCES[name]
    contract = next(found for found in solidity.compile([source], project=project) if found.name == name)
    ((version, settings),) = solidity.get_compiler_settings([source], project=project).items()
    return {
        "contractName": name,
        "sourceName": contract.source_id,
        "sourceHash": source_hash(sources_of(contract.source_id, settings["remappings"])),
        "compiler": {
            "name": "solc",
            "version": str(version),
            "settings": {key: settings[key] for key in sorted(settings) if key != "outputSelection"},
        },
        "abi": [item.model_dump(mode="json", by_alias=True, exclude_none=True) for item in contract.abi],
        "bytecode": _hex(contract.deployment_bytecode.bytecode),
        "deployedBytecode": _hex(contract.runtime_bytecode.bytecode),
    }


def text(artifact: dict[str, Any]) -> str:
    """An artifact as its file holds it; keys are in the order `build` gives them."""
    return json.dumps(artifact, indent=1, ensure_ascii=False) + "\n"


def _hex(code: str) -> str:
    return "0x" + code.removeprefix("0x")


@click.command()
def cli() -> None:
    """Write the artifacts."""
    for name in SOURCES:
        file = FOLDER / f"{name}.json"
        file.write_text(text(build(name)))
        print(file.relative_to(project.path))
