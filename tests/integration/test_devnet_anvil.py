"""The local chain, kept on disk: what the relayer's indexer reads is the same after every kind of end."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from waterfall.devnet import anvil as anvil_module
from waterfall.devnet.anvil import Anvil, find_anvil
from waterfall.devnet.processes import ProcessFailed
from waterfall.errors import SettingsError

# Creation code of a contract that logs (LOG0) on every call.
LOGGER = "0x" + "6005600c60003960056000f3" + "60006000a0"

PARENT = """
import asyncio, sys
from pathlib import Path
from waterfall.devnet.anvil import Anvil

async def main():
    async with Anvil(Path(sys.argv[1])) as anvil:
        sender = (await anvil.rpc.call("eth_accounts"))[0]
        tx = await anvil.rpc.call("eth_sendTransaction", {"from": sender, "to": sender, "value": "0x1"})
        while await anvil.rpc.call("eth_getTransactionReceipt", tx) is None:
            await asyncio.sleep(0.01)
        print(anvil.child.pid, tx, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def until(condition, seconds=30):
    async with asyncio.timeout(seconds):
        while not (result := await condition()):
            await asyncio.sleep(0.02)
    return result


async def mined(anvil, tx):
    return await until(lambda: anvil.rpc.call("eth_getTransactionReceipt", tx))


async def send(anvil, target=None, data="0x", sender=1):
    call = {"from": (await anvil.rpc.call("eth_accounts"))[sender], "data": data}
    return await anvil.rpc.call("eth_sendTransaction", call | ({"to": target} if target else {}))


async def height(anvil):
    return int(await anvil.rpc.call("eth_blockNumber"), 16)


async def history(anvil, last):
    """Everything an indexer may ask about the blocks up to `last`."""
    blocks = [await anvil.rpc.call("eth_getBlockByNumber", hex(number), True) for number in range(last + 1)]
    transactions = [tx["hash"] for block in blocks for tx in block["transactions"]]
    return {
        "blocks": blocks,
        "by_hash": [await anvil.rpc.call("eth_getBlockByHash", block["hash"], False) for block in blocks],
        "transactions": [await anvil.rpc.call("eth_getTransactionByHash", tx) for tx in transactions],
        "receipts": [await anvil.rpc.call("eth_getTransactionReceipt", tx) for tx in transactions],
        "logs": await anvil.rpc.call("eth_getLogs", {"fromBlock": "0x0", "toBlock": hex(last)}),
        "logs_by_hash": [
            await anvil.rpc.call("eth_getLogs", {"blockHash": block["hash"]}) for block in blocks
        ],
    }


async def test_anvil__port_0__takes_free_ports(tmp_path):
    async with Anvil(tmp_path / "one") as one, Anvil(tmp_path / "two") as two:
        assert one.rpc_url != two.rpc_url
        assert not one.rpc_url.endswith(":0")
        for anvil in (one, two):
            assert await anvil.rpc.call("eth_chainId") == hex(31337)


async def test_anvil__stopped__leaves_no_process(tmp_path):
    async with Anvil(tmp_path) as anvil:
        pid = anvil.child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anvil.log", "chain.json"]


async def test_anvil__other_chain_id__has_it(tmp_path):
    async with Anvil(tmp_path, chain_id=84532) as anvil:
        assert await anvil.rpc.call("eth_chainId") == hex(84532)


async def test_anvil__stopped_and_started__history_is_the_same(tmp_path):
    async with Anvil(tmp_path) as anvil:
        logger = (await mined(anvil, await send(anvil, data=LOGGER)))["contractAddress"]
        for _ in range(3):
            await mined(anvil, await send(anvil, logger))
        await anvil.rpc.call("anvil_mine", "0x3")
        last = await height(anvil)
        before = await history(anvil, last)
        nonce = await anvil.rpc.call(
            "eth_getTransactionCount", (await anvil.rpc.call("eth_accounts"))[1], "latest"
        )
    assert len(before["logs"]) == 3
    async with Anvil(tmp_path) as anvil:
        assert await history(anvil, last) == before
        sender = (await anvil.rpc.call("eth_accounts"))[1]
        assert await anvil.rpc.call("eth_getTransactionCount", sender, "latest") == nonce
        receipt = await mined(anvil, await send(anvil, logger))
        assert int(receipt["blockNumber"], 16) > last


@pytest.mark.parametrize("tag", ["latest", "safe", "finalized"])
async def test_anvil__started_again__answers_calls_at_every_tag(tmp_path, tag):
    async with Anvil(tmp_path) as anvil:
        await anvil.rpc.call("anvil_mine", "0x5")
    async with Anvil(tmp_path) as anvil:
        sender = (await anvil.rpc.call("eth_accounts"))[0]
        assert int(await anvil.rpc.call("eth_getBalance", sender, tag), 16) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next start cleans up")
async def test_anvil__parent_killed__ends_and_keeps_the_last_transaction(tmp_path):
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tmp_path), stdout=subprocess.PIPE
    )
    pid, tx = (await asyncio.wait_for(parent.stdout.readline(), 30)).decode().split()
    parent.send_signal(signal.SIGKILL)
    await parent.wait()

    async def ended():
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    await until(ended)
    async with Anvil(tmp_path) as anvil:
        assert (await anvil.rpc.call("eth_getTransactionReceipt", tx))["status"] == "0x1"


async def test_mine_every__transactions__become_final_and_are_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(anvil_module, "_SAVE_SECONDS", 0.2)
    async with Anvil(tmp_path) as anvil:
        await anvil.mine_every(1, idle_seconds=3600)
        tx = await send(anvil, "0x" + "11" * 20)
        receipt = await mined(anvil, tx)

        async def final():
            block = await anvil.rpc.call("eth_getBlockByNumber", "finalized", False)
            return int(block["number"], 16) >= int(receipt["blockNumber"], 16)

        await until(final)

        async def saved():
            return anvil.state_file.exists() and tx in anvil.state_file.read_text()

        await until(saved)
        # Ends without a chance to write anything.
        os.kill(anvil.child.pid, signal.SIGKILL)
        with pytest.raises(ProcessFailed):
            await asyncio.wait_for(anvil.child.watch(), 20)
    async with Anvil(tmp_path) as anvil:
        found = await anvil.rpc.call("eth_getTransactionReceipt", tx)
        assert found["blockHash"] == receipt["blockHash"]


async def test_mine_every__nothing_to_do__mines_slowly(tmp_path):
    async with Anvil(tmp_path) as anvil:
        await anvil.mine_every(1, idle_seconds=3600)
        await mined(anvil, await send(anvil, "0x" + "11" * 20))
        await until(lambda: reached(anvil, 4))
        # The block that ended the rush; from then on, none for an hour.
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await until(lambda: reached(anvil, 6), seconds=3)
        assert time.monotonic() - started >= 3
        # And at once again when there is something to mine.
        await asyncio.wait_for(mined(anvil, await send(anvil, "0x" + "11" * 20)), 10)


async def reached(anvil, number):
    return await height(anvil) >= number


async def test_anvil__state_cut_short__says_what_to_do(tmp_path):
    async with Anvil(tmp_path) as anvil:
        await anvil.rpc.call("anvil_mine", "0x5")
        state_file = anvil.state_file
    state_file.write_text(state_file.read_text()[:1000])
    with pytest.raises(SettingsError, match="cannot be read"):
        await Anvil(tmp_path).start()
    assert state_file.read_text() != ""
    assert not (tmp_path / "anvil.pid").exists()


async def test_anvil__port_taken__error_shows_why(tmp_path):
    async with Anvil(tmp_path / "one") as one:
        port = int(one.rpc_url.rpartition(":")[2])
        with pytest.raises(ProcessFailed, match=r"(?i)address already in use"):
            await Anvil(tmp_path / "two", port=port).start()


def test_find_anvil__not_installed__says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="npm install --global @foundry-rs/anvil"):
        find_anvil()
