"""The `waterfall` command as processes of their own."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

ADMIN_KEY = "wf_admin"
WATERFALL = Path(sys.executable).with_name("waterfall")
# The keys of anvil's first accounts, which everybody knows.
KEYS = {
    "WATERFALL_METER_KEY": "0x59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d",
    "WATERFALL_GAS_KEY": "0x5de4111afa1a4b94908f83103eb1f1706367c2e68ca870fc3fb9a804cdab365a",
    "WATERFALL_OWNER_KEY": "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80",
    "WATERFALL_LABEL_SALT": "salt",
    "WATERFALL_ADMIN_KEY": ADMIN_KEY,
}


def write_config(
    folder: Path,
    net,
    upstream,
    database: str,
    rpc_url: str | list[str] | None = None,
    *,
    chain: dict | None = None,
    gateway: dict | None = None,
) -> Path:
    """Settings for these; `rpc_url` in the place of the chain's own; more of `[chain]` and `[gateway]`."""
    config = folder / "waterfall.toml"
    config.write_text(
        f"""
database = "{database}"
[gateway]
port = 0
lease_seconds = 1
{_lines(gateway or {})}
[chain]
rpc_url = {json.dumps(rpc_url or net.anvil.rpc_url)}
{_lines({"finality": "latest", "poll_seconds": 0.02, **(chain or {})})}
chain_id = {net.chain.chain_id}
vault = "{net.chain.vault}"
platform = {net.chain.platform}
[keys]
owner = "env:WATERFALL_OWNER_KEY"
[upstreams.local]
kind = "openai"
base_url = "{upstream.base_url}"
[models.micro]
upstream = "local"
input_usd_per_mtok = "1"
output_usd_per_mtok = "1"
"""
    )
    return config


def _lines(settings: dict) -> str:
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())


class Served:
    """A command that runs until it is stopped."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, output: bytearray) -> None:
        self.process = process
        self.url = url
        """Of a gateway; of a relayer, where it is watched."""
        self.output = output
        """What it has printed so far."""

    def events(self) -> list[dict]:
        """What it has logged so far."""
        return [json.loads(line) for line in self.output.splitlines() if line.startswith(b"{")]

    async def frozen(self) -> None:
        """Wait until it stands still."""
        async with asyncio.timeout(60):
            while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                await asyncio.sleep(0.02)

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> int:
        """End it as an operator does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def ended(self, seconds: float = 60) -> int:
        """Its exit code."""
        async with asyncio.timeout(seconds):
            return await self.process.wait()

    async def listen(self) -> None:
        """Read its log for as long as it runs: a pipe that is full would stop it."""
        while line := await self.process.stderr.readline():
            self.output += line


async def waterfall(*arguments: object) -> tuple[int, str, str]:
    """Run a command to its end; exit code, output and what it said beside."""
    process = await asyncio.create_subprocess_exec(
        WATERFALL,
        *map(str, arguments),
        env={**os.environ, **KEYS},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complained = await process.communicate()
    return process.returncode, said.decode(), complained.decode()


@contextlib.asynccontextmanager
async def served(config: Path, command: str = "serve", **environment: str) -> AsyncIterator[Served]:
    """`waterfall serve`, `gateway` or `relayer`, once it is ready; ended by SIGTERM."""
    process = await asyncio.create_subprocess_exec(
        WATERFALL,
        command,
        "--config",
        config,
        env={**os.environ, **KEYS, **environment},
        stderr=asyncio.subprocess.PIPE,
        limit=2**20,  # a line of the log may be long
    )
    listening = None
    try:
        async with asyncio.timeout(60):
            seen = bytearray()
            while not (found := re.search(rb"Waterfall (?:serves|settles) .* at (http://\S+)", seen)):
                line = await process.stderr.readline()
                assert line, f"it ended: {seen.decode()}"
                seen += line
        service = Served(process, found.group(1).decode(), seen)
        listening = asyncio.create_task(service.listen())
        yield service
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)  # it may be frozen
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(60):
                    await process.wait()
            except TimeoutError:
                process.kill()
                raise AssertionError("the service does not stop") from None
        if listening is not None:
            await listening
