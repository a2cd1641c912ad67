"""The vault's sources as one standard-JSON input, and what solc makes of it."""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import solcx
from solcx.exceptions import SolcError

from scripts._refusals import ArtifactStale, CannotCompile
from waterfall.chain import artifacts
from waterfall.chain.deployment import fill_in, vault_immutables

ROOT = Path(__file__).resolve().parent.parent
NAME = "CreditVault"
SOURCE = "contracts/CreditVault.sol"

_CACHE = ROOT / "build" / "solc"
_IMPORT = re.compile(r"""^import\b[^;"']*["']([^"']+)["']""", re.MULTILINE)
# Explorers ask for all of everything; which outputs are asked for does not change the code.
_SHOWN_OUTPUTS = {"*": {"*": ["abi", "metadata", "evm.bytecode", "evm.deployedBytecode"]}}
_OUTPUTS = {
    SOURCE: {
        NAME: [
            "metadata",
            "evm.bytecode.object",
            "evm.deployedBytecode.object",
            "evm.deployedBytecode.immutableReferences",
        ]
    },
    "*": {"": ["ast"]},  # names the immutable variables
}


@dataclass(frozen=True)
class Compiled:
    """What solc made of an input."""

    bytecode: str
    deployed_bytecode: str
    immutables: dict[str, list[int]]
    """Where in the deployed code each immutable variable goes."""
    metadata: str
    """Exactly as solc wrote it: its hash is in the code."""

    def running_code(self, address: str, token: str, chain_id: int) -> bytes:
        """The code of a vault on a chain, with what its constructor filled in."""
        values = vault_immutables(address, token, chain_id)
        return fill_in(bytes.fromhex(self.deployed_bytecode), self.immutables, values)


def standard_input() -> dict[str, Any]:
    """Everything that solc needs to make the vault as the artifact has it, in the form explorers take."""
    settings = artifacts.load(NAME).compiler_settings
    return {
        "language": "Solidity",
        "sources": sources_of(SOURCE, settings["remappings"]),
        "settings": {**settings, "outputSelection": _SHOWN_OUTPUTS},
    }


def sources_of(source: str, remappings: list[str]) -> dict[str, dict[str, str]]:
    """A source and all it imports, by path, as a standard-JSON input holds them."""
    contents, todo = {}, [source]
    while todo:
        path = todo.pop()
        if path not in contents:
            contents[path] = (ROOT / path).read_text()
            todo += _imports(path, contents[path], remappings)
    return {path: {"content": contents[path]} for path in sorted(contents)}


def compile_input(given: dict[str, Any], *, fresh: bool) -> Compiled:
    """Compile an input, or take what the same compiler made of the same input before.

    Args:
        given: the input; its own choice of outputs does not matter.
        fresh: never take an earlier result.

    Raises:
        CannotCompile: it is not in order, or does not contain all it needs.
    """
    version = artifacts.load(NAME).compiler_version
    wanted = {**given, "settings": {**given.get("settings", {}), "outputSelection": _OUTPUTS}}
    key = hashlib.sha256(json.dumps([version, wanted], sort_keys=True).encode()).hexdigest()
    cached = _CACHE / f"{key}.json"
    if not fresh and cached.exists():
        return Compiled(**json.loads(cached.read_text()))
    try:
        output = solcx.compile_standard(wanted, solc_version=version.partition("+")[0])
        contract = output["contracts"][SOURCE][NAME]
    except (SolcError, LookupError) as error:
        raise CannotCompile(reason=str(error).strip().partition("\n")[0]) from error
    evm, metadata = contract["evm"], json.loads(contract["metadata"])
    if metadata["compiler"]["version"] != version:
        raise CannotCompile(reason=f"this is solc {metadata['compiler']['version']}, not {version}")
    if set(metadata["sources"]) - set(given["sources"]):
        missing = min(set(metadata["sources"]) - set(given["sources"]))
        raise CannotCompile(reason=f"{missing} is not among them")
    names = {node["id"]: node["name"] for source in output["sources"].values() for node in _variables(source)}
    places = evm["deployedBytecode"]["immutableReferences"]
    made = Compiled(
        bytecode=evm["bytecode"]["object"],
        deployed_bytecode=evm["deployedBytecode"]["object"],
        immutables={names[int(id_)]: [place["start"] for place in found] for id_, found in places.items()},
        metadata=contract["metadata"],
    )
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_name(f"{key}.{os.getpid()}")
    partial.write_text(json.dumps(asdict(made)))
    partial.replace(cached)
    return made


def committed() -> Compiled:
    """The vault, compiled from the sources, if the committed artifact is the same.

    Raises:
        ArtifactStale: it is not.
    """
    artifact, given = artifacts.load(NAME), standard_input()
    if source_hash(given["sources"]) != artifact.source_hash:
        raise ArtifactStale(name=NAME, what="the sources")
    made = compile_input(given, fresh=False)
    if (made.bytecode, made.deployed_bytecode) != (artifact.bytecode.hex(), artifact.deployed_bytecode.hex()):
        raise ArtifactStale(name=NAME, what="the bytes of its code")
    return made


def source_hash(sources: dict[str, dict[str, str]]) -> str:
    """SHA-256 of what `sha256sum` prints for the sources in path order."""
    lines = (
        f"{hashlib.sha256(source['content'].encode()).hexdigest()}  {path}\n"
        for path, source in sorted(sources.items())
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _imports(source: str, content: str, remappings: list[str]) -> Iterator[str]:
    prefixes = sorted((remapping.split("=", 1) for remapping in remappings), reverse=True)
    for path in _IMPORT.findall(content):
        if path.startswith("."):
            yield posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        else:
            yield next((target + path[len(p) :] for p, target in prefixes if path.startswith(p)), path)


def _variables(node: Any) -> Iterator[dict[str, Any]]:
    """Every declaration of a variable in a syntax tree."""
    if isinstance(node, dict):
        if node.get("nodeType") == "VariableDeclaration":
            yield node
        for child in node.values():
            yield from _variables(child)
    elif isinstance(node, list):
        for child in node:
            yield from _variables(child)
