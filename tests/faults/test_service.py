"""What a service makes of its nodes before it starts."""

import pytest

from waterfall.cli.secrets import Secrets
from waterfall.cli.service import open_ledger
from waterfall.devnet import deploy
from waterfall.errors import ChainError, SettingsError
from waterfall.settings import ChainSettings, Settings

SECRETS = Secrets(deploy.METER, (deploy.GAS,), deploy.OWNER, b"salt", "wf_admin")


@pytest.fixture
def start(tmp_path):
    async def start(*, chain_id, vault="0x" + "c0" * 20, platform=1, **nodes):
        chain = ChainSettings(chain_id=chain_id, vault=vault, platform=platform, finality="latest", **nodes)
        settings = Settings(database=f"sqlite:///{tmp_path}/waterfall.db")
        async with open_ledger(settings, chain, SECRETS) as (ledger, _):
            return ledger.view.head.block.number

    return start


async def test_start__nodes_of_another_chain__is_a_mistake_in_the_settings(anvil, start):
    with pytest.raises(SettingsError, match=r"chain\.rpc_url: .*chain 31337, not of chain 1"):
        await start(chain_id=1, rpc_url=anvil.rpc_url)


async def test_start__nobody_there__is_no_mistake(proxy, start):
    await proxy.refuse()
    with pytest.raises(ChainError, match="cannot be reached"):
        await start(chain_id=31337, rpc_url=proxy.url)


async def test_start__first_node_down_second_by_reference__starts(anvil, proxy, start, monkeypatch):
    deployed = await deploy.deploy(anvil.rpc)
    await proxy.refuse()
    monkeypatch.setenv("NODE_URL", anvil.rpc_url)
    head = await start(
        chain_id=anvil.chain_id,
        vault=deployed.vault,
        platform=deployed.platform,
        rpc_url=[proxy.url, "env:NODE_URL"],
    )
    assert head == int(await anvil.rpc.call("eth_blockNumber"), 16)
