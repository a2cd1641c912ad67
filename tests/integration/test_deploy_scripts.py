"""`ape run deploy`, `verify` and `register` on chains that are not ours, run as docs/deploy.md has them run."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from eth_account import Account

from scripts._compiler import standard_input
from waterfall.chain import artifacts, vault
from waterfall.chain.deployment import (
    DEFAULT_SALT,
    FACTORY,
    FACTORY_CODE,
    FACTORY_COST,
    FACTORY_SIGNER,
    FACTORY_TRANSACTION,
    DeploymentRecord,
    create2_address,
    vault_init_code,
)
from waterfall.chain.usdc import USDC
from waterfall.chain.vault import Vault
from waterfall.devnet.anvil import Anvil
from waterfall.keccak import keccak
from waterfall.settings import load

ROOT = Path(__file__).resolve().parents[2]
APE = str(Path(sys.executable).with_name("ape"))
PASSPHRASE = "correct horse battery staple"
BASE_SEPOLIA, NOBODY_KNOWS = 84532, 909_090
TOKEN = USDC[BASE_SEPOLIA].address.lower()
OTHER_TOKEN = "0x" + "cc" * 20
EIGHTEEN_DECIMALS = "0x" + "18" * 20
PAYOUT = "0x" + "aa" * 20
ADDRESS = create2_address(FACTORY, DEFAULT_SALT, vault_init_code(TOKEN))
ETHER = 10**18
CUSTOM_NETWORK = """
networks:
  custom:
    - name: mainnet
      ecosystem: mychain
      chain_id: 909090

node:
  mychain:
    mainnet:
      uri: {url}
"""


@dataclass
class Foreign:
    """A chain that belongs to others, and the loop that its calls run on."""

    anvil: Anvil
    runner: asyncio.Runner

    @property
    def network(self):
        return f"base:sepolia:{self.anvil.rpc_url}"

    def rpc(self, method, *parameters):
        return self.runner.run(self.anvil.rpc.call(method, *parameters))

    def read(self, method, *arguments, at=ADDRESS):
        return self.runner.run(getattr(Vault(self.anvil.rpc, at), method)(*arguments))

    def code(self, address):
        return bytes.fromhex(self.rpc("eth_getCode", address, "latest")[2:])

    def nonces(self, people):
        return [
            int(self.rpc("eth_getTransactionCount", address, "latest"), 16) for address in people.values()
        ]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Starts chains with a token, on ports of their own."""
    with asyncio.Runner() as runner:
        started = []

        def start(chain_id, token):
            anvil = Anvil(tmp_path_factory.mktemp("foreign"), chain_id=chain_id)
            runner.run(anvil.start())
            started.append(anvil)
            chain = Foreign(anvil, runner)
            chain.rpc("anvil_setCode", token, "0x" + artifacts.load("TestUSDC").deployed_bytecode.hex())
            return chain

        yield start
        for anvil in started:
            runner.run(anvil.stop())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with accounts of ape's; the first is made by its own command."""
    home = tmp_path_factory.mktemp("home")
    made = subprocess.run(
        [APE, "accounts", "generate", "deployer", "--hide-mnemonic"],
        input=f"some noise\n{PASSPHRASE}\n{PASSPHRASE}\n",
        **surroundings(home),
    )
    assert made.returncode == 0, made.stderr
    for number, alias in enumerate(("other", "meter", "poor"), start=1):
        keystore = Account.encrypt(bytes([number]) * 32, PASSPHRASE, kdf="pbkdf2", iterations=2)
        (home / ".ape" / "accounts" / f"{alias}.json").write_text(json.dumps(keystore))
    return home


@pytest.fixture(scope="module")
def people(home):
    """Addresses by alias."""
    files = (home / ".ape" / "accounts").glob("*.json")
    return {
        file.stem: "0x" + json.loads(file.read_text())["address"].lower().removeprefix("0x") for file in files
    }


@pytest.fixture(scope="module")
def chain(foreign, people):
    """Base Sepolia, as far as anybody can tell."""
    chain = foreign(BASE_SEPOLIA, TOKEN)
    for alias in ("deployer", "other"):
        chain.rpc("anvil_setBalance", people[alias], hex(ETHER))
    # Answers 18, whatever is asked.
    chain.rpc("anvil_setCode", EIGHTEEN_DECIMALS, "0x601260005260206000f3")
    chain.rpc("evm_setIntervalMining", 1)
    return chain


def surroundings(home, root=ROOT):
    environment = {
        **os.environ,
        "HOME": str(home),
        "SOLCX_BINARY_PATH": os.environ.get("SOLCX_BINARY_PATH", str(Path(sys.prefix) / "solcx")),
        "PYTHONPATH": str(root),
    }
    # In a session of its own, so that passphrases are read from standard input, not from a terminal.
    return {"cwd": root, "env": environment, "start_new_session": True, "capture_output": True, "text": True}


@pytest.fixture(scope="module")
def ape(home):
    """Runs one ape command as a user does, with the passphrases in the environment."""

    def ape(*arguments, typed=None, root=ROOT):
        around = surroundings(home, root)
        if typed is None:
            for alias in ("deployer", "other"):
                around["env"][f"APE_ACCOUNTS_{alias}_PASSPHRASE"] = PASSPHRASE
        return subprocess.run([APE, "run", *map(str, arguments)], input=typed or "", **around)

    return ape


@pytest.fixture(scope="module")
def refusals(home):
    """What ape commands are refused with, and what they print."""

    def refusals(*commands):
        commands = [["run", *map(str, command)] for command in commands]
        run = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "integration" / "ape_runs.py")],
            input=json.dumps(commands),
            **surroundings(home),
        )
        assert run.returncode == 0, run.stderr
        results = json.loads(run.stdout)
        for command, result in zip(commands, results, strict=True):
            assert result["exit_code"] != 0, (command, result)
        return [result["err"] + result["out"] for result in results]

    return refusals


@pytest.fixture(scope="module")
def record_file(tmp_path_factory):
    return tmp_path_factory.mktemp("deployments") / "84532.json"


@pytest.fixture(scope="module")
def dry_run(chain, ape, people, record_file):
    """A dry run on the chain without a vault: what it says, and what it left behind."""
    nonces = chain.nonces(people)
    run = ape(
        *("deploy", "--network", chain.network, "--account", "deployer", "--out", record_file),
        *("--dry-run", "--json"),
    )
    return run, nonces, chain.nonces(people), record_file.exists(), chain.code(ADDRESS)


@pytest.fixture(scope="module")
def deployed(dry_run, chain, ape, people, record_file):
    """The vault, deployed by one account after another had done so on the same chain, undone."""
    snapshot = chain.rpc("evm_snapshot")
    first = ape(
        *("deploy", "--network", chain.network, "--account", "deployer", "--out", record_file, "--yes"),
        *("--confirmations", "0"),
    )
    first_record = json.loads(record_file.read_text()) if record_file.exists() else None
    chain.rpc("evm_revert", snapshot)
    record_file.unlink(missing_ok=True)
    second = ape(
        *("deploy", "--network", chain.network, "--account", "other", "--out", record_file),
        typed=f"y\n{PASSPHRASE}\n",
    )
    assert first.returncode == second.returncode == 0, (
        first.stdout + first.stderr + second.stdout + second.stderr
    )
    return first, first_record, second, json.loads(record_file.read_text())


# ── deploy ───────────────────────────────────────────────────────────────────────────────────────────


def test_deploy__dry_run__shows_everything_and_sends_nothing(dry_run):
    run, before, after, wrote, code = dry_run
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["dry_run"] is True
    assert (told["address"], told["token"], told["chain_id"]) == (ADDRESS, TOKEN, BASE_SEPOLIA)
    assert 4_000_000 < told["gas"] < 8_000_000
    for shown in ("84532 (Base Sepolia)", "Circle's USDC", "Nothing was sent"):
        assert shown in run.stderr
    assert (after, wrote, code) == (before, False, b"")


def test_deploy__new_chain__vault_is_there_and_recorded(deployed, chain, people):
    _, _, _, record = deployed
    code = chain.code(ADDRESS)
    transaction = chain.rpc("eth_getTransactionByHash", record["transaction"])
    block = chain.rpc("eth_getBlockByNumber", hex(record["block"]), False)
    assert chain.read("token") == TOKEN
    assert (record["artifact"], record["chain_id"], record["address"]) == ("CreditVault", 84532, ADDRESS)
    assert record["constructor_arguments"] == {"token_": TOKEN}
    assert record["code_hash"] == "0x" + keccak(code).hex()
    assert (record["deployer"], transaction["from"]) == (people["other"], people["other"])
    assert int(transaction["blockNumber"], 16) == record["block"]
    assert transaction["to"] == record["factory"] == FACTORY
    assert transaction["input"] == DEFAULT_SALT + vault_init_code(TOKEN).hex()
    assert record["deployed_at"].startswith("20")
    assert record["source_hash"] == artifacts.load("CreditVault").source_hash
    assert record["compiler"]["version"] == artifacts.load("CreditVault").compiler_version
    assert int(block["timestamp"], 16) > 0


def test_deploy__other_deployer__same_address_and_code(deployed, people):
    first, first_record, second, second_record = deployed
    assert first_record["deployer"] == people["deployer"]
    assert second_record["deployer"] == people["other"]
    same = ("address", "code_hash", "salt", "constructor_arguments", "source_hash")
    assert [first_record[key] for key in same] == [second_record[key] for key in same]
    assert "Send it?" in second.stdout
    assert "Send it?" not in first.stdout


def test_deploy__again__sends_nothing_and_writes_the_record_that_was_lost(
    deployed, chain, ape, people, record_file
):
    written, nonces = record_file.read_text(), chain.nonces(people)
    record_file.unlink()
    run = ape("deploy", "--network", chain.network, "--out", record_file, "--json")
    assert run.returncode == 0, run.stderr
    assert "is there already" in run.stderr
    assert "nothing is sent" in run.stderr
    assert json.loads(run.stdout) == json.loads(written)
    assert record_file.read_text() == written
    assert chain.nonces(people) == nonces


def test_deploy__refused__says_why_and_sends_nothing(
    deployed, chain, people, refusals, record_file, tmp_path
):
    nonces = chain.nonces(people)
    deploy = ("deploy", "--network", chain.network, "--out", tmp_path / "new.json", "--salt", "another")
    # What another vault's constructor filled in is not what this one's would have.
    elsewhere = create2_address(FACTORY, "0x" + "77" * 32, vault_init_code(TOKEN))
    chain.rpc("anvil_setCode", elsewhere, "0x" + chain.code(ADDRESS).hex())
    (
        no_code,
        decimals,
        checksum,
        salt,
        account,
        gas,
        known,
        code,
        mismatch,
        network,
    ) = refusals(
        [*deploy, "--token", "0x" + "11" * 20],
        [*deploy, "--token", EIGHTEEN_DECIMALS, "--json"],
        [*deploy, "--token", USDC[BASE_SEPOLIA].address.replace("c", "C")],
        [*deploy, "--salt", "0x1234"],
        [*deploy, "--yes"],
        [*deploy, "--yes", "--account", "poor", "--json"],
        ["deploy", "--network", chain.network, "--out", record_file, "--salt", "another"],
        [*deploy, "--salt", "0x" + "77" * 32],
        ["deploy", "--network", f"base:mainnet:{chain.anvil.rpc_url}"],
        ["deploy"],
    )
    assert "there is no contract. (token_refused)" in no_code
    assert "it has 18 decimals" in decimals
    assert '"type": "token_refused"' in decimals
    assert "wrong checksum" in checksum
    assert "neither 32 bytes of hex nor a text" in salt
    assert "(account_needed)" in account
    assert '"type": "insufficient_gas"' in gas
    assert "has 0.0 of the chain's own coin" in gas
    assert f"{ADDRESS} on chain 84532" in known
    assert "(record_differs)" in known
    assert f"The code at {elsewhere} is not the vault's: byte " in code
    assert "(code_differs)" in code
    assert "chain ID '84532', which does not match network chain ID '8453'" in mismatch
    assert "--network" in network
    assert not (tmp_path / "new.json").exists()
    assert chain.nonces(people) == nonces


def test_deploy__artifact_is_not_what_the_sources_are__is_refused(deployed, chain, ape, tmp_path):
    root = tmp_path / "checkout"
    for folder in ("contracts", "scripts", "waterfall", "build/solc"):
        shutil.copytree(ROOT / folder, root / folder)
    (root / "ape-config.yaml").write_text((ROOT / "ape-config.yaml").read_text())
    (root / "node_modules").symlink_to(ROOT / "node_modules")
    deploy = ("deploy", "--network", chain.network, "--salt", "another", "--dry-run")
    artifact = root / "waterfall/chain/artifacts/CreditVault.json"
    held = json.loads(artifact.read_text())
    slip = held["bytecode"][:-2] + ("00" if held["bytecode"][-2:] != "00" else "01")
    artifact.write_text(json.dumps({**held, "bytecode": slip}))
    changed_code = ape(*deploy, root=root)
    artifact.write_text(json.dumps(held))
    source = root / "contracts" / "DepositAddress.sol"
    source.write_text(source.read_text() + "\n")
    changed_source = ape(*deploy, root=root)
    assert "the bytes of its code differ" in changed_code.stderr
    assert "the sources differ" in changed_source.stderr
    for run in (changed_code, changed_source):
        assert run.returncode == 1
        assert "(artifact_stale)" in run.stderr


def test_deploy__unknown_chain__needs_a_token_and_the_proxy(foreign, people, ape, home, tmp_path):
    chain, file = foreign(NOBODY_KNOWS, OTHER_TOKEN), tmp_path / "record.json"
    chain.rpc("anvil_setBalance", people["deployer"], hex(ETHER))
    chain.rpc("anvil_setCode", FACTORY, "0x")
    deploy = ("deploy", "--network", chain.anvil.rpc_url, "--account", "deployer", "--out", file, "--yes")
    assert "knows no USDC on chain 909090" in ape(*deploy).stderr
    assert "(factory_missing)" in ape(*deploy, "--token", OTHER_TOKEN).stderr
    chain.rpc("anvil_setNonce", FACTORY, "0x0")
    chain.rpc("anvil_setBalance", FACTORY_SIGNER, hex(FACTORY_COST))
    chain.rpc("eth_sendRawTransaction", "0x" + FACTORY_TRANSACTION.hex())
    assert chain.code(FACTORY) == FACTORY_CODE
    (home / ".ape" / "ape-config.yaml").write_text(CUSTOM_NETWORK.format(url=chain.anvil.rpc_url))
    named = ("deploy", "--network", "mychain:mainnet", *deploy[3:], "--token", OTHER_TOKEN)
    run = ape(*named, "--confirmations", "0", "--json")
    assert run.returncode == 0, run.stderr
    record = DeploymentRecord.read(file)
    assert (record.chain_id, record.constructor_arguments.token_) == (NOBODY_KNOWS, OTHER_TOKEN)
    assert chain.read("token", at=record.address) == OTHER_TOKEN
    assert record.model_dump(mode="json") == json.loads(run.stdout)


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────


def test_verify__deployed_vault__recompiles_and_a_changed_byte_does_not(
    deployed, chain, home, record_file, tmp_path
):
    def verify(*arguments):
        around = surroundings(home)
        del around["capture_output"]
        command = [APE, "run", "verify", "--network", chain.network, "--deployment", record_file, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **around)

    # A comment: the code is the same but for the hash of the sources in it.
    changed = standard_input()
    source = changed["sources"]["contracts/DepositAddress.sol"]
    source["content"] = source["content"].replace("It can do nothing else.", "It can do nothing else!")
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    # Both at once: each compiles for ten seconds.
    running = [
        verify("--out", tmp_path / "right"),
        verify("--input", tmp_path / "changed.json", "--out", tmp_path / "wrong", "--json"),
    ]
    (right, right_errors), (wrong, _) = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 1], right_errors
    assert json.loads(wrong)["error"]["type"] == "sources_differ"
    assert not (tmp_path / "wrong").exists()

    written = tmp_path / "right"
    given = json.loads((written / "standard-input.json").read_text())
    assert given == standard_input()
    assert all(set(source) == {"content"} for source in given["sources"].values())
    assert set(json.loads((written / "metadata.json").read_text())["sources"]) == set(given["sources"])
    assert (written / "constructor-arguments.txt").read_text() == "00" * 12 + TOKEN[2:]
    for step in (
        "Standard-Json-Input",
        "v0.8.37+commit.",
        "basescan.org/verifyContract",
        "verify.sourcify.dev",
    ):
        assert step in right


# ── register ─────────────────────────────────────────────────────────────────────────────────────────


def test_register__new_platform__is_what_waterfall_toml_then_names(
    deployed, chain, ape, people, home, refusals, record_file, tmp_path
):
    register = (
        *("register", "--network", chain.network, "--deployment", record_file, "--account", "deployer"),
        *("--payout", PAYOUT, "--meter", "meter", "--exit-delay", "1d"),
    )
    platform = vault.platform_id(people["deployer"], "0x" + "00" * 32)
    nonces = chain.nonces(people)
    dry = ape(*register, "--dry-run", "--json")
    assert json.loads(dry.stdout)["platform"] == str(platform), dry.stderr
    assert chain.nonces(people) == nonces

    run = ape(*register, "--yes", "--confirmations", "0")
    assert run.returncode == 0, run.stderr
    found = chain.read("platform", platform)
    assert (found.owner, found.payout, found.exit_delay) == (people["deployer"], PAYOUT, 86_400)
    assert chain.read("meter", platform, people["meter"]).added_at > 0

    toml = run.stdout.partition("For waterfall.toml:\n")[2]
    toml = toml.replace("https://…", chain.anvil.rpc_url)
    toml = toml.replace("keystore:…", f"keystore:{home / '.ape' / 'accounts' / 'meter.json'}")
    (tmp_path / "waterfall.toml").write_text(f'database = "sqlite:///{tmp_path / "ledger.db"}"\n{toml}')
    settings = load(tmp_path / "waterfall.toml")
    assert (settings.chain.vault, settings.chain.chain_id, settings.chain.platform) == (
        ADDRESS,
        84532,
        platform,
    )
    rebuilt = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("waterfall")), "rebuild"),
            *("--config", str(tmp_path / "waterfall.toml"), "--json"),
        ],
        env={
            **surroundings(home)["env"],
            "WATERFALL_KEYSTORE_PASSWORD": PASSPHRASE,
            "WATERFALL_GAS_KEY": "0x" + "07" * 32,
            "WATERFALL_LABEL_SALT": "salt",
            "WATERFALL_ADMIN_KEY": "admin",
        },
        capture_output=True,
        text=True,
    )
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert json.loads(rebuilt.stdout)["head"] >= settings.chain.deployed_block

    again, too_long, too_short, to_vault, no_record, other_chain, no_publisher = refusals(
        [*register, "--json"],
        [*register, "--exit-delay", "8d"],
        [*register, "--exit-delay", "59m"],
        [*register, "--payout", ADDRESS],
        ["register", "--network", chain.network, *register[5:], "--deployment", tmp_path / "none.json"],
        [*register, "--network", chain.network, "--deployment", other_chain_record(record_file, tmp_path)],
        ["verify", "--network", chain.network, "--deployment", record_file, "--publish", "sourcify"],
    )
    assert '"type": "platform_exists"' in again
    assert PAYOUT in again
    assert '"exit_delay_seconds": 86400' in again
    assert "not within 1 hour and 7 days" in too_long
    assert "not within 1 hour and 7 days" in too_short
    assert "cannot be zero, the vault or its token" in to_vault
    assert "none.json: No such file" in no_record
    assert "chain 8453. (wrong_chain)" in other_chain
    assert 'pip install "ape-sourcify==' in no_publisher


def other_chain_record(record_file, tmp_path):
    file = tmp_path / "8453.json"
    file.write_text(json.dumps({**json.loads(record_file.read_text()), "chain_id": 8453}))
    return file
