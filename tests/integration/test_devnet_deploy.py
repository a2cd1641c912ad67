"""A platform on the local chain: the same each time, found again, never mixed up with another version's."""

import asyncio

import pytest

from waterfall.chain import token
from waterfall.chain.rpc import Rpc
from waterfall.chain.vault import Vault, account_id
from waterfall.devnet import deploy
from waterfall.devnet.anvil import Anvil
from waterfall.errors import ChainError, SettingsError
from waterfall.money import tokens_to_units
from waterfall.types import ZERO_ADDRESS


def label(number):
    return f"0x{number:064x}"


async def height(anvil):
    return int(await anvil.rpc.call("eth_blockNumber"), 16)


async def test_deploy__new_chain__registers_a_platform(tmp_path):
    async with Anvil(tmp_path) as anvil:
        deployed = await deploy.deploy(anvil.rpc)
        vault = Vault(anvil.rpc, deployed.vault)
        assert await vault.token() == deployed.token
        platform = await vault.platform(deployed.platform)
        assert (platform.owner, platform.exit_delay) == (deploy.OWNER.address, 3600)
        meter = await vault.meter(deployed.platform, deploy.METER.address)
        assert meter.added_at > 0
        first = min(position.block for position, _ in await vault.logs(fromBlock="0x0"))
        assert deployed.deployed_block <= first


async def test_deploy__again__finds_everything_and_sends_nothing(tmp_path):
    async with Anvil(tmp_path) as anvil:
        deployed = await deploy.deploy(anvil.rpc)
        blocks = await height(anvil)
        assert await deploy.deploy(anvil.rpc) == deployed
        assert await height(anvil) == blocks
    async with Anvil(tmp_path) as anvil:
        blocks = await height(anvil)
        assert await deploy.deploy(anvil.rpc) == deployed
        assert await height(anvil) == blocks


@pytest.mark.parametrize("transactions", [1, 2, 3])
async def test_deploy__cut_short__is_completed(tmp_path, monkeypatch, transactions):
    left, transact = transactions, deploy.transact

    async def some(*arguments):
        nonlocal left
        if left == 0:
            raise ChainError(reason="cut short")
        left -= 1
        return await transact(*arguments)

    async with Anvil(tmp_path) as anvil:
        monkeypatch.setattr(deploy, "transact", some)
        with pytest.raises(ChainError, match="cut short"):
            await deploy.deploy(anvil.rpc)
        monkeypatch.undo()
        deployed = await deploy.deploy(anvil.rpc)
        await deploy.mint_and_deposit(
            anvil.rpc, deployed.vault, deployed.platform, ZERO_ADDRESS, label(1), 10**6
        )


@pytest.mark.parametrize("name", ["vault", "token"])
async def test_deploy__other_contract_there__is_refused(tmp_path, name):
    async with Anvil(tmp_path) as anvil:
        address = getattr(await deploy.deploy(anvil.rpc), name)
        code = bytearray.fromhex((await anvil.rpc.call("eth_getCode", address, "latest"))[2:])
        code[len(code) // 2] ^= 0xFF
        await anvil.rpc.call("anvil_setCode", address, "0x" + code.hex())
        with pytest.raises(SettingsError, match="is not this version's"):
            await deploy.deploy(anvil.rpc)


async def test_mint_and_deposit__many_at_once__each_credits_its_account(tmp_path):
    async with Anvil(tmp_path) as anvil:
        deployed = await deploy.deploy(anvil.rpc)
        await anvil.mine_every(1)

        async def fund(number):
            rpc = Rpc(anvil.rpc_url)
            try:
                return await deploy.mint_and_deposit(
                    rpc, deployed.vault, deployed.platform, ZERO_ADDRESS, label(number), 10**6 + number
                )
            finally:
                await rpc.close()

        hashes = await asyncio.gather(*(fund(number) for number in range(20)))
        assert len(set(hashes)) == 20
        vault = Vault(anvil.rpc, deployed.vault)
        for number in range(20):
            account = account_id(deployed.platform, ZERO_ADDRESS, label(number))
            found = await vault.account(deployed.platform, account)
            assert found.balance == tokens_to_units(10**6 + number)
        held = await token.balance_of(anvil.rpc, deployed.token, deployed.vault)
        assert held == sum(10**6 + number for number in range(20))


async def test_mint_and_deposit__vault_refuses__raises(tmp_path):
    async with Anvil(tmp_path) as anvil:
        deployed = await deploy.deploy(anvil.rpc)
        with pytest.raises(ChainError, match="mined and failed"):
            await deploy.mint_and_deposit(anvil.rpc, deployed.vault, 1, ZERO_ADDRESS, label(1), 10**6)
