"""The committed artifacts are what the sources compile to, and both tool chains compile alike."""

import importlib.util
import json
import tomllib
from pathlib import Path

import pytest
import yaml

from waterfall.chain import artifacts

ROOT = Path(__file__).resolve().parents[2]
STALE = "the artifact is not what the sources compile to: run `make artifacts`"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("artifacts_script", ROOT / "scripts" / "artifacts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["CreditVault", "DepositAddress", "TestUSDC"])
def test_artifact__recompiled__is_the_committed_one(script, name):
    built = script.build(name)
    committed = json.loads((script.FOLDER / f"{name}.json").read_text())
    for key in built:
        assert committed[key] == built[key], f"{name}.json: {key}: {STALE}"
    assert (script.FOLDER / f"{name}.json").read_text() == script.text(built), STALE


def test_artifact__loaded__holds_what_the_file_says(script):
    vault = artifacts.load("CreditVault")
    committed = json.loads((script.FOLDER / "CreditVault.json").read_text())
    assert vault.name == "CreditVault"
    assert "0x" + vault.bytecode.hex() == committed["bytecode"]
    assert vault.abi[0]["type"] == "constructor"


def test_compiler_settings__foundry_and_ape__agree():
    foundry = tomllib.loads((ROOT / "foundry.toml").read_text())["profile"]["default"]
    ape = yaml.safe_load((ROOT / "ape-config.yaml").read_text())["solidity"]
    npm = json.loads((ROOT / "package.json").read_text())["dependencies"]
    assert foundry["solc"] == "scripts/solc.mjs"  # which is npm's compiler
    assert npm["solc"] == ape["version"]
    assert foundry["evm_version"] == ape["evm_version"]
    assert foundry["via_ir"] is ape["via_ir"]
    assert foundry["optimizer"] is ape["optimize"]
    assert foundry["optimizer_runs"] == ape["optimization_runs"]
    assert sorted(line.rstrip("/").replace("/=", "=") for line in foundry["remappings"]) == sorted(
        ape["import_remapping"]
    )


def test_compiler_settings__ape_and_artifacts__agree():
    ape = yaml.safe_load((ROOT / "ape-config.yaml").read_text())["solidity"]
    for name in ("CreditVault", "DepositAddress", "TestUSDC"):
        settings = artifacts.load(name).compiler_settings
        assert artifacts.load(name).compiler_version.startswith(ape["version"] + "+commit.")
        assert settings["evmVersion"] == ape["evm_version"]
        assert settings["viaIR"] is ape["via_ir"]
        assert settings["optimizer"] == {"enabled": ape["optimize"], "runs": ape["optimization_runs"]}
