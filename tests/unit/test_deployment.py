"""The deployment record, alone and in waterfall.toml, and what a vault's address and code must be."""

import json
from pathlib import Path

import pytest
from eth_account import Account

from waterfall.chain.deployment import (
    DEFAULT_SALT,
    FACTORY,
    FACTORY_SIGNER,
    FACTORY_TRANSACTION,
    CodeDiffers,
    DeploymentRecord,
    check_code,
    create2_address,
    fill_in,
    vault_immutables,
)
from waterfall.errors import SettingsError
from waterfall.keccak import keccak
from waterfall.settings import ChainSettings, load

VAULT, TOKEN = "0x" + "c0" * 20, "0x" + "70" * 20
RECORD = {
    "artifact": "CreditVault",
    "chain_id": 8453,
    "address": VAULT,
    "block": 123,
    "deployed_at": "2026-01-02T03:04:05Z",
    "transaction": "0x" + "01" * 32,
    "deployer": "0x" + "de" * 20,
    "factory": FACTORY,
    "salt": DEFAULT_SALT,
    "constructor_arguments": {"token_": TOKEN},
    "code_hash": "0x" + "02" * 32,
    "source_name": "contracts/CreditVault.sol",
    "source_hash": "03" * 32,
    "compiler": {"name": "solc", "version": "0.8.37+commit.f401782d", "settings": {"viaIR": True}},
}
CHAIN = '[chain]\nrpc_url = "http://x"\nplatform = 7\n'


@pytest.fixture
def folder(tmp_path):
    """A folder with a record in it, which is not the working directory."""
    (tmp_path / "deployments").mkdir()
    (tmp_path / "deployments" / "8453.json").write_text(json.dumps(RECORD))
    return tmp_path


def settings(folder, *keys):
    file = folder / "waterfall.toml"
    file.write_text("\n".join([CHAIN, 'deployment = "deployments/8453.json"', *keys]))
    return load(file)


# ── waterfall.toml ───────────────────────────────────────────────────────────────────────────────────


def test_settings__deployment__stands_in_the_place_of_three_keys(folder):
    chain = settings(folder).chain
    assert (chain.chain_id, chain.vault, chain.deployed_block) == (8453, VAULT, 123)
    assert chain.deployment == folder / "deployments" / "8453.json"


def test_settings__deployment_and_keys_that_agree__are_taken(folder):
    chain = settings(folder, "chain_id = 8453", f'vault = "{VAULT.upper().replace("X", "x")}"').chain
    assert chain.vault == VAULT


@pytest.mark.parametrize(
    ("key", "record_says"),
    [
        ("chain_id = 1", "8453"),
        (f'vault = "{TOKEN}"', VAULT),
        ("deployed_block = 0", "123"),
    ],
)
def test_settings__deployment_and_a_key_that_differs__names_both(folder, key, record_says):
    with pytest.raises(SettingsError) as refusal:
        settings(folder, key)
    assert f"waterfall.toml: chain: {key.partition(' ')[0]} = " in refusal.value.message
    assert f"the record deployments/8453.json says {record_says}" in refusal.value.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "8453.json: No such file"),
        ("{", "is not a deployment record"),
        (json.dumps({**RECORD, "block": -1}), "is not a deployment record: block"),
        (json.dumps({**RECORD, "address": "0x1"}), "is not a deployment record: address"),
        (json.dumps({**RECORD, "private_key": "0x1"}), "is not a deployment record: private_key"),
    ],
)
def test_settings__no_such_record__names_the_file(folder, content, reason):
    file = folder / "deployments" / "8453.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(SettingsError, match=r"waterfall\.toml: chain: deployment:") as refusal:
        settings(folder)
    assert reason in refusal.value.message


def test_settings__deployment_is_no_text__names_the_key(folder):
    (folder / "waterfall.toml").write_text(CHAIN + "deployment = 1\n")
    with pytest.raises(SettingsError, match=r"chain\.deployment"):
        load(folder / "waterfall.toml")


def test_settings__no_deployment__keys_are_needed_as_before(folder):
    (folder / "waterfall.toml").write_text(CHAIN)
    with pytest.raises(SettingsError, match=r"chain\.chain_id: Field required"):
        load(folder / "waterfall.toml")
    given = ChainSettings(rpc_url="http://x", chain_id=1, vault=VAULT, platform=7)
    assert (given.deployment, given.deployed_block) == (None, 0)


# ── The record ───────────────────────────────────────────────────────────────────────────────────────


def test_record__written__is_read_as_it_was(tmp_path):
    record = DeploymentRecord.model_validate_json(json.dumps(RECORD))
    file = tmp_path / "new" / "8453.json"
    record.write(file)
    assert DeploymentRecord.read(file) == record
    assert json.loads(file.read_text()) == RECORD
    assert [path.name for path in file.parent.iterdir()] == ["8453.json"]


# ── Address and code ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("factory", "salt", "init_code", "address"),
    [  # from EIP-1014
        ("0x" + "00" * 20, "0x" + "00" * 32, "00", "0x4d1a2e2bb4f88f0250f26ffff098b0b30b26bf38"),
        (
            "0x00000000000000000000000000000000deadbeef",
            "0x00000000000000000000000000000000000000000000000000000000cafebabe",
            "deadbeef",
            "0x60f3f640a8508fc6a86d45df051962668e1e8ac7",
        ),
    ],
)
def test_create2_address__examples_of_the_standard(factory, salt, init_code, address):
    assert create2_address(factory, salt, bytes.fromhex(init_code)) == address


def test_factory__its_transaction__makes_it_at_its_address():
    assert Account.recover_transaction(FACTORY_TRANSACTION).lower() == FACTORY_SIGNER
    first_contract = keccak(b"\xd6\x94" + bytes.fromhex(FACTORY_SIGNER[2:]) + b"\x80")[12:]
    assert "0x" + first_contract.hex() == FACTORY


def test_vault_immutables__each_is_one_word():
    values = vault_immutables(VAULT, TOKEN, 8453)
    assert {len(value) for value in values.values()} == {32}
    assert values["token"].hex() == "00" * 12 + TOKEN[2:]
    assert values["_name"] == b"Waterfall CreditVault".ljust(31, b"\0") + b"\x15"


def test_fill_in__each_place__gets_its_value():
    code = b"\xfe" + bytes(32) + b"\xfd" + bytes(64)
    filled = fill_in(code, {"a": [1, 66], "b": [34]}, {"a": b"A" * 32, "b": b"B" * 32})
    assert filled == b"\xfe" + b"A" * 32 + b"\xfd" + b"B" * 32 + b"A" * 32


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (b"", "there is none"),
        (b"\x01\x02", "it has 2 bytes instead of 3"),
        (b"\x01\xff\x03", "byte 1 is 0xff instead of 0x02"),
    ],
)
def test_check_code__differs__says_where(found, reason):
    check_code(VAULT, b"\x01\x02\x03", b"\x01\x02\x03")
    with pytest.raises(CodeDiffers, match=reason):
        check_code(VAULT, found, b"\x01\x02\x03")


def test_records__of_the_repository__are_in_order():
    for file in (Path(__file__).resolve().parents[2] / "deployments").glob("*.json"):
        assert DeploymentRecord.read(file).chain_id == int(file.stem)
