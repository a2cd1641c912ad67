"""A local chain: anvil, started for us alone, kept on disk between starts.

What a restart keeps and loses, seen with anvil 1.7.1: blocks, their hashes, transactions, receipts, logs and
the latest state are kept; transactions waiting to be mined and the state at older blocks are not.
"""

import asyncio
import contextlib
import gzip
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Self

from waterfall.chain.rpc import Rpc
from waterfall.devnet.processes import Child, ProcessFailed
from waterfall.errors import ChainError, SettingsError

CHAIN_ID = 31337
_READY_SECONDS = 30
_LARGEST_DUMP = 2**30
_TICK_SECONDS = 0.5
_SAVE_SECONDS = 5
_SAVE_SHARE = 20
"""A save may take one part in so many of the time."""
_BUSY_BLOCKS = 3
"""Empty blocks after a transaction until it is final: one for `safe`, two for `finalized`, one to spare."""
_STATES = 64
"""Past states kept in memory, for calls at `safe` and `finalized`; blocks, receipts and logs are all kept."""
_LISTENING = re.compile(r"^Listening on .*:(\d+)$", re.MULTILINE)


def find_anvil() -> str:
    """Path of anvil: beside our Python, or on PATH.

    Raises:
        SettingsError: there is none.
    """
    beside = Path(sys.executable).with_name("anvil")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("anvil")
    if found is None:
        raise SettingsError(
            reason="the local chain needs anvil: install it with `npm install --global @foundry-rs/anvil`, "
            "or run `make setup` in a checkout of Waterfall"
        )
    return str(Path(found).absolute())


class Anvil:
    """One local chain. It mines a block for every transaction until `mine_every` is called.

    Blocks become `safe` one block later and `finalized` two blocks later, or so many times later as an epoch has slots.
    """

    def __init__(
        self, folder: Path, *, port: int = 0, chain_id: int = CHAIN_ID, slots_in_an_epoch: int = 1
    ) -> None:
        """Describe the chain.

        Args:
            folder: where its state and log are; a chain that is there already goes on.
            port: on 127.0.0.1; 0 takes a free one.
            chain_id: fixed for the life of the folder.
            slots_in_an_epoch: how many blocks it takes to be `safe`; twice as many, to be `finalized`.
        """
        self.folder = folder
        self.chain_id = chain_id
        self._slots_in_an_epoch = slots_in_an_epoch
        self.state_file = folder / "chain.json"
        self._wanted_port = port
        self._child: Child | None = None
        self._url: str | None = None
        self._rpc: Rpc | None = None
        self._tending: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    @property
    def rpc(self) -> Rpc:
        """Calls to the chain, while it runs."""
        if self._rpc is None:
            raise ChainError(reason="the local chain is not running")
        return self._rpc

    @property
    def rpc_url(self) -> str:
        """Where the chain answers."""
        if self._url is None:
            raise ChainError(reason="the local chain is not running")
        return self._url

    @property
    def child(self) -> Child:
        """Anvil's process."""
        if self._child is None:
            raise ChainError(reason="the local chain is not running")
        return self._child

    async def start(self) -> None:
        """Start anvil and wait until it answers. Main thread only.

        Raises:
            SettingsError: there is no anvil, the folder is in use, or the chain in it cannot be continued.
            ProcessFailed: anvil ended, or did not answer in time.
        """
        known = self.state_file.exists()
        # Anvil writes its state in place, so it does so only at its end; in between we do, see `save`.
        command = [
            find_anvil(),
            *("--host", "127.0.0.1", "--port", str(self._wanted_port)),
            *("--chain-id", str(self.chain_id), "--slots-in-an-epoch", str(self._slots_in_an_epoch)),
            *("--state", str(self.state_file), "--state-interval", str(10**9)),
            *("--prune-history", str(_STATES), "--color", "never"),
        ]
        self._child = Child("anvil", command, self.folder)
        try:
            self._child.start()
            port = await self._child.wait_for(self._listening_port, seconds=_READY_SECONDS)
            self._url = f"http://127.0.0.1:{port}"
            self._rpc = Rpc(self._url, timeout_seconds=_READY_SECONDS, most_bytes=_LARGEST_DUMP)
            await self._greet(known=known)
        except ProcessFailed as error:
            await self.stop()
            if "--state <PATH>" in str(error):
                raise SettingsError(
                    reason=f"the local chain in {self.state_file} cannot be read: delete {self.folder} to start anew"
                ) from error
            raise
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the chain, which writes its state. Does nothing when it is not running."""
        if self._tending is not None:
            self._stopping.set()
            await asyncio.wait([self._tending], timeout=_SAVE_SECONDS)
            self._tending.cancel()
            self._tending = None
        if self._child is not None:
            await self._child.stop()
            self._child = None
        if self._rpc is not None:
            await self._rpc.close()
            self._url = self._rpc = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.stop()

    async def mine_every(self, seconds: int, *, idle_seconds: int = 12) -> None:
        """Mine as chains do, instead of at once; from now on the state is also saved while the chain runs.

        Args:
            seconds: between blocks while there are transactions, and until they are final.
            idle_seconds: between blocks otherwise: every block is kept for ever (1.6 kB each), so that a
                chain that is kept up for days should not mine many for nothing.
        """
        if self._tending is not None:
            raise RuntimeError("mine_every is called once")
        await self.rpc.call("evm_setAutomine", False)
        await self.rpc.call("evm_setIntervalMining", seconds)
        self._stopping.clear()
        self._tending = asyncio.create_task(self._tend(seconds, idle_seconds))

    async def save(self) -> None:
        """Write the chain to disk, whole or not at all."""
        dump = await self.rpc.call("anvil_dumpState")
        await asyncio.to_thread(_replace, self.state_file, dump)

    async def _tend(self, busy_seconds: int, idle_seconds: int) -> None:
        interval, busy_until, unsaved = busy_seconds, 0, True
        saved_at, save_took = time.monotonic(), 0.0
        while not self._stopping.is_set():
            # When anvil has ended, `Child.watch` says so; a busy one is asked again.
            with contextlib.suppress(ChainError):
                head = await self.rpc.call("eth_getBlockByNumber", "latest", False)
                pool = await self.rpc.call("txpool_status")
                number, mined = int(head["number"], 16), bool(head["transactions"])
                if mined or int(pool["pending"], 16):
                    busy_until, unsaved = number + _BUSY_BLOCKS, True
                wanted = busy_seconds if number < busy_until else idle_seconds
                if wanted != interval:
                    await self.rpc.call("evm_setIntervalMining", wanted)
                    interval = wanted
                now = time.monotonic()
                if unsaved and now - saved_at > max(_SAVE_SECONDS, _SAVE_SHARE * save_took):
                    await self.save()
                    unsaved, saved_at, save_took = False, time.monotonic(), time.monotonic() - now
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _TICK_SECONDS)

    async def _greet(self, *, known: bool) -> None:
        chain_id = int(await self.rpc.call("eth_chainId"), 16)
        if chain_id != self.chain_id:
            raise ChainError(reason=f"the local chain has id {chain_id} instead of {self.chain_id}")
        await self.rpc.call("anvil_setLoggingEnabled", False)  # the log would grow with every call
        if known:
            # Of a chain read from disk only the latest state is there: let that one become `finalized`.
            await self.rpc.call("anvil_mine", hex(2 * self._slots_in_an_epoch))

    def _listening_port(self) -> int | None:
        found = _LISTENING.search(self.child.log.read_text("utf-8", "replace"))
        return int(found.group(1)) if found else None


def _replace(file: Path, dump: str) -> None:
    """Write a state as `anvil_dumpState` gives it (hex of gzip of JSON) as anvil's --state reads it."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as target:
        target.write(gzip.decompress(bytes.fromhex(dump[2:])))
        target.flush()
        os.fsync(target.fileno())
    partial.replace(file)
