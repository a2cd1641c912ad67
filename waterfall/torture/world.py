"""All of Waterfall in one folder: its chain, nodes that can fail before it, a provider, and its processes."""

import asyncio
import json
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import psycopg

from waterfall.chain.rpc import Rpc
from waterfall.chain.vault import Vault
from waterfall.devnet import deploy
from waterfall.devnet.anvil import Anvil
from waterfall.devnet.deploy import Deployment
from waterfall.devnet.proxy import Proxy
from waterfall.errors import SettingsError, WaterfallError
from waterfall.keccak import keccak
from waterfall.signers import LocalSigner, from_hex
from waterfall.torture.plan import DEEPEST_REORG
from waterfall.torture.service import Service
from waterfall.torture.upstream import Upstream

ADMIN_KEY = "wf_torture_admin"
MODEL = "torture"
UNITS_PER_TOKEN = 10**6
"""A token of the model costs a micro-dollar, whichever way it goes."""
NODES = 2
BLOCK_SECONDS = 1
GAS_WEI = 10**22
MAX_FEE_GWEI = 100
EPOCH_BLOCKS = DEEPEST_REORG + 6
"""What is `safe` no reorg of ours undoes."""
_PROCESSES = {
    "sqlite": {"serve": "serve"},
    "postgresql": {
        "gateway-1": "gateway",
        "gateway-2": "gateway",
        "relayer-1": "relayer",
        "relayer-2": "relayer",
    },
}
_ANY_TABLE = (
    "SELECT 1 FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
    "WHERE relkind IN ('r', 'p', 'v', 'm', 'S') AND nspname NOT LIKE 'pg\\_%' AND nspname <> 'information_schema' LIMIT 1"
)


class TortureFailed(WaterfallError):
    """The run could not go on, which says nothing of the books: {reason}."""

    code = "torture_failed"


def kind_of(database: str) -> str:
    """The kind of a database: sqlite or postgresql."""
    return database.partition(":")[0]


def processes(database: str) -> list[str]:
    """Names of the processes that work on such a database."""
    return list(_PROCESSES[kind_of(database)])


def key_for(what: str) -> tuple[str, LocalSigner]:
    """A key of its own for something, which everybody could know."""
    private = "0x" + keccak(f"waterfall torture {what}".encode()).hex()
    return private, from_hex(private, name=what)


@dataclass
class World:
    """Everything, while it runs: `async with World(folder, database) as world`."""

    folder: Path
    database: str = field(repr=False)
    upstream: Upstream = field(default_factory=Upstream, init=False)
    nodes: list[Proxy] = field(default_factory=list, init=False)
    services: dict[str, Service] = field(default_factory=dict, init=False)
    session: aiohttp.ClientSession = field(init=False, repr=False)
    deployment: Deployment = field(init=False)
    mining: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    """Held while blocks or their times are meddled with."""
    gas_keys: list[str] = field(default_factory=list, init=False)
    """Addresses that pay for transactions."""

    async def __aenter__(self) -> Self:
        _require_empty(self.database)
        async with AsyncExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._anvil = await stack.enter_async_context(
                Anvil(self.folder / "chain", slots_in_an_epoch=EPOCH_BLOCKS)
            )
            self.deployment = await deploy.deploy(self.rpc)
            await self.mine_steadily()
            await self.rpc.call("anvil_mine", hex(2 * EPOCH_BLOCKS))
            await stack.enter_async_context(self.upstream)
            for _ in range(NODES):
                node = Proxy(self._anvil.rpc_url, epoch_blocks=EPOCH_BLOCKS, keeps_calls=False)
                self.nodes.append(await stack.enter_async_context(node))
            self.session = await stack.enter_async_context(
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=40)
                )
            )
            environment = await self._keys()
            config = self._write_config()
            for name, command in _PROCESSES[kind_of(self.database)].items():
                self.services[name] = service = Service(name, command, config, environment)
                stack.push_async_callback(service.stop)
                await service.start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def rpc(self) -> Rpc:
        """The chain itself, past all faults."""
        return self._anvil.rpc

    @property
    def vault(self) -> Vault:
        """Likewise."""
        return Vault(self.rpc, self.deployment.vault)

    async def mine_steadily(self) -> None:
        """A block every second."""
        await self.rpc.call("evm_setAutomine", False)
        await self.rpc.call("evm_setIntervalMining", BLOCK_SECONDS)

    def gateways(self) -> Sequence[str]:
        """URLs of the gateways that are up."""
        return [service.url for service in self.services.values() if service.url]

    async def ask(self, method: str, path: str, body: Any = None, *, tries: int = 60) -> Any:
        """The platform's own request to any gateway, tried until one answers it.

        Raises:
            TortureFailed: none does, or it is refused.
        """
        problem = "no gateway is up"
        for attempt in range(tries):
            for url in self.gateways():
                headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
                try:
                    async with self.session.request(method, url + path, json=body, headers=headers) as answer:
                        shown = await answer.json()
                        if answer.ok:
                            return shown
                        problem = f"{method} {path}: {answer.status} {json.dumps(shown)[:300]}"
                        if answer.status < 500:  # noqa: PLR2004 - it will not be otherwise
                            raise TortureFailed(reason=problem)
                except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                    problem = f"{method} {path}: {error!r}"
            await asyncio.sleep(min(1, 0.1 * 2**attempt))
        raise TortureFailed(reason=problem)

    async def _keys(self) -> dict[str, str]:
        known = deploy.PRIVATE_KEYS
        second, signer = key_for("second gas key")
        self.gas_keys = [deploy.GAS.address, signer.address]
        await self.rpc.call("anvil_setBalance", signer.address, hex(GAS_WEI))
        return {
            "WATERFALL_METER_KEY": known["meter"],
            "WATERFALL_GAS_KEY": known["gas"],
            "WATERFALL_SECOND_GAS_KEY": second,
            "WATERFALL_OWNER_KEY": known["owner"],
            "WATERFALL_LABEL_SALT": "torture",
            "WATERFALL_ADMIN_KEY": ADMIN_KEY,
            "WATERFALL_TORTURE_DATABASE": self.database,  # its password belongs in no file
        }

    def _write_config(self) -> Path:
        urls = ", ".join(json.dumps(node.url) for node in self.nodes)
        # TOML of JSON strings; a SQLite process has one port, so that clients find it again at once.
        config = self.folder / "waterfall.toml"
        config.write_text(f"""\
database = "env:WATERFALL_TORTURE_DATABASE"
[gateway]
port = {_free_port() if kind_of(self.database) == "sqlite" else 0}
max_projection_age_seconds = 10
lease_seconds = 5
drain_seconds = 10
[chain]
rpc_url = [{urls}]
rpc_timeout_seconds = 2
chain_id = {self._anvil.chain_id}
vault = "{self.deployment.vault}"
platform = {self.deployment.platform}
deployed_block = {self.deployment.deployed_block}
finality = "safe"
poll_seconds = 0.2
max_fee_gwei = {MAX_FEE_GWEI}
[keys]
gas = ["env:WATERFALL_GAS_KEY", "env:WATERFALL_SECOND_GAS_KEY"]
owner = "env:WATERFALL_OWNER_KEY"
[upstreams.scripted]
kind = "openai"
base_url = "{self.upstream.base_url}"
connect_seconds = 1
timeout_seconds = 4
max_call_seconds = 20
[models.{MODEL}]
upstream = "scripted"
input_usd_per_mtok = "1"
output_usd_per_mtok = "1"
""")
        return config


def _require_empty(database: str) -> None:
    """Raises SettingsError for a database that holds anything: it may be somebody's ledger."""
    if kind_of(database) == "sqlite":
        is_empty = not Path(database.removeprefix("sqlite:///")).exists()
    else:
        try:
            with psycopg.connect(database, connect_timeout=10) as connection:
                is_empty = connection.execute(_ANY_TABLE).fetchone() is None
        except psycopg.Error as error:
            raise SettingsError(reason=f"--database: it cannot be opened: {error}".strip()) from None
    if not is_empty:
        raise SettingsError(reason="--database: it is not empty, and this needs one that it may fill")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
