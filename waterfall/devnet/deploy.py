"""The test token, the vault and one platform on the local chain, and test USDC for whoever asks.

The keys are anvil's own, which everybody knows: nothing here may ever touch another chain.
"""

import asyncio
import random
from dataclasses import dataclass

from eth_abi.abi import encode

from waterfall.chain import artifacts, token, vault
from waterfall.chain.artifacts import Artifact
from waterfall.chain.rpc import Rpc, RpcError
from waterfall.chain.transactions import transact
from waterfall.chain.vault import Vault
from waterfall.errors import ChainError, SettingsError
from waterfall.keccak import keccak
from waterfall.signers import from_hex
from waterfall.types import ZERO_ADDRESS

EXIT_DELAY_SECONDS = 3600
_SALT = "0x" + keccak(b"waterfall.devnet").hex()
_MINED_SECONDS = 60
_POLL_SECONDS = 0.05
_MINT_GAS, _DEPOSIT_GAS = 150_000, 250_000
_ALL = 2**256 - 1


PRIVATE_KEYS = {
    "owner": "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80",
    "meter": "0x59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d",
    "gas": "0x5de4111afa1a4b94908f83103eb1f1706367c2e68ca870fc3fb9a804cdab365a",
    "faucet": "0x7c852118294e51e653712a81e05800f419141751be58f605c371e15141b007a6",
}
"""The first accounts of anvil's mnemonic, "test test test test test test test test test test test junk"."""
OWNER, METER, GAS, FAUCET = (from_hex(key, name="anvil's key") for key in PRIVATE_KEYS.values())


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is on the local chain."""

    vault: str
    token: str
    platform: int
    deployed_block: int


async def deploy(rpc: Rpc) -> Deployment:
    """Deploy what is not there yet; addresses and the platform's id are the same on every local chain.

    Raises:
        SettingsError: the contracts there are not this version's.
        ChainError
    """
    usdc, contract = _first_contract(FAUCET.address), _first_contract(OWNER.address)
    if not await _is_there(rpc, usdc, artifacts.load("TestUSDC")):
        await transact(
            rpc, FAUCET, None, artifacts.load("TestUSDC").bytecode + encode(("address",), (FAUCET.address,))
        )
    if not await _is_there(rpc, contract, artifacts.load("CreditVault")):
        # Before the vault is there, so that where it is, this was done.
        await transact(rpc, FAUCET, usdc, token.approve(contract, _ALL))
        await transact(
            rpc, OWNER, None, artifacts.load("CreditVault").bytecode + encode(("address",), (usdc,))
        )
    platform = vault.platform_id(OWNER.address, _SALT)
    if (await Vault(rpc, contract).platform(platform)).owner == ZERO_ADDRESS:
        payload = vault.register_platform(_SALT, OWNER.address, METER.address, EXIT_DELAY_SECONDS)
        await transact(rpc, OWNER, contract, payload)
    # The second transaction of the chain. Nobody starts before the first: anvil does not keep its block 0 over a restart.
    return Deployment(contract, usdc, platform, deployed_block=2)


async def mint_and_deposit(
    rpc: Rpc, contract: str, platform: int, owner: str, label_hash: str, tokens: int
) -> str:
    """Mint test USDC and deposit it into an account; the hash of the deposit's transaction.

    Args:
        rpc: the local chain, which holds the faucet's key and numbers its transactions itself.
        contract: the vault.
        platform: the account's platform.
        owner: the account's owner.
        label_hash: the account's label, as the chain sees it.
        tokens: token base units.

    Raises:
        ChainError
    """
    usdc = await Vault(rpc, contract).token()
    await _send(rpc, usdc, _mint(FAUCET.address, tokens), _MINT_GAS)
    tx_hash = await _send(rpc, contract, vault.deposit(platform, owner, label_hash, tokens), _DEPOSIT_GAS)
    return await _mined(rpc, tx_hash)


async def mint(rpc: Rpc, usdc: str, holder: str, tokens: int) -> str:
    """Mint test USDC to anybody; the hash of the transaction, which is mined by then.

    Raises:
        ChainError
    """
    return await _mined(rpc, await _send(rpc, usdc, _mint(holder, tokens), _MINT_GAS))


def _mint(holder: str, tokens: int) -> bytes:
    return keccak(b"mint(address,uint256)")[:4] + encode(("address", "uint256"), (holder, tokens))


async def _mined(rpc: Rpc, tx_hash: str) -> str:
    async with asyncio.timeout(_MINED_SECONDS):
        while (receipt := await rpc.call("eth_getTransactionReceipt", tx_hash)) is None:
            await asyncio.sleep(_POLL_SECONDS)
    if receipt["status"] != "0x1":
        raise ChainError(reason=f"the transaction {tx_hash} was mined and failed")
    return tx_hash


async def _is_there(rpc: Rpc, address: str, artifact: Artifact) -> bool:
    """Whether a contract is deployed.

    Raises:
        SettingsError: another one is.
    """
    code = bytes.fromhex((await rpc.call("eth_getCode", address, "latest"))[2:])
    # What the constructor fills in is zero in the artifact.
    same = len(code) == len(artifact.deployed_bytecode) and all(
        wanted in (0, found) for wanted, found in zip(artifact.deployed_bytecode, code, strict=True)
    )
    if code and not same:
        raise SettingsError(
            reason=f"the {artifact.name} on the local chain is not this version's: start anew, with an empty folder"
        )
    return bool(code)


async def _send(rpc: Rpc, target: str, calldata: bytes, gas: int) -> str:
    call = {"from": FAUCET.address, "to": target, "data": "0x" + calldata.hex(), "gas": hex(gas)}
    async with asyncio.timeout(_MINED_SECONDS):
        while True:
            try:
                return str(await rpc.call("eth_sendTransaction", call))
            except RpcError as error:
                # Anvil gives the same number to two that ask at once, and refuses the second.
                if not any(words in str(error).lower() for words in ("underpriced", "nonce too low")):
                    raise
            await asyncio.sleep(_POLL_SECONDS * random.random())  # noqa: S311 - spreads those that ask at once


def _first_contract(deployer: str) -> str:
    """Address of the contract that an account's first transaction creates."""
    rlp = b"\xd6\x94" + bytes.fromhex(deployer[2:]) + b"\x80"  # of (deployer, nonce 0)
    return "0x" + keccak(rlp)[12:].hex()
