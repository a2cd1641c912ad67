"""A real chain, a real vault, a real database, the real service; only the upstream does as it is told."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from eth_abi.abi import encode

from waterfall.chain.vault import Vault
from waterfall.cli.secrets import Secrets
from waterfall.cli.service import Running, serve
from waterfall.devnet import deploy
from waterfall.devnet.anvil import Anvil
from waterfall.keccak import keccak
from waterfall.ledger.store import Ledger
from waterfall.money import format_usd, parse_usd
from waterfall.settings import ChainSettings, Settings

ADMIN_KEY = "wf_admin"
# One token costs 0.000001 USD, so that ten provable maxima are a whole number of USDC's smallest unit.
MICRO = {"input_usd_per_mtok": "1", "output_usd_per_mtok": "1"}


_NUMBERS = itertools.count(1)


@dataclass
class Net:
    """A chain with a vault and a platform on it."""

    anvil: Anvil
    chain: ChainSettings
    token: str

    @property
    def vault(self) -> Vault:
        return Vault(self.anvil.rpc, self.chain.vault)

    async def deposit(self, account: dict, micro_usd: int) -> str:
        return await deploy.mint_and_deposit(
            self.anvil.rpc,
            self.chain.vault,
            self.chain.platform,
            account["owner"],
            account["label_hash"],
            micro_usd,
        )


def calldata(signature: str, *values: Any) -> bytes:
    """A call that only tests need; `bytes32` in hexadecimal."""
    types = signature[signature.index("(") + 1 : -1].split(",")
    read = [bytes.fromhex(v[2:]) if t == "bytes32" else v for t, v in zip(types, values, strict=True)]
    return keccak(signature.encode())[:4] + encode(types, read)


@contextlib.asynccontextmanager
async def local_net(folder: Path, **options: Any) -> AsyncIterator[Net]:
    """A chain of its own; options of `Anvil`."""
    async with Anvil(folder, **options) as anvil:
        deployment = await deploy.deploy(anvil.rpc)
        chain = ChainSettings(
            rpc_url=anvil.rpc_url,
            chain_id=anvil.chain_id,
            vault=deployment.vault,
            platform=deployment.platform,
            deployed_block=deployment.deployed_block,
            finality="latest",
            poll_seconds=0.02,
        )
        yield Net(anvil, chain, deployment.token)


@dataclass
class Client:
    """Speaks to a running gateway, as the platform unless told otherwise."""

    url: str
    ledger: Ledger
    net: Net
    session: aiohttp.ClientSession = field(repr=False)

    async def request(
        self, method: str, path: str, *, key: str = ADMIN_KEY, headers: dict | None = None, **options: Any
    ) -> tuple[int, Any, Any]:
        """Status, body (JSON where it is, else text) and headers."""
        sent = {"Authorization": f"Bearer {key}", **(headers or {})}
        async with self.session.request(method, self.url + path, headers=sent, **options) as response:
            is_json = response.content_type == "application/json"
            return response.status, await (response.json() if is_json else response.text()), response.headers

    async def open_account(self, label: str | None = None, micro_usd: int = 0) -> tuple[dict, str]:
        """A funded account and a key of it; without a label, one that no other test has."""
        label = label or f"account {next(_NUMBERS)}"
        status, account, _ = await self.request("POST", "/api/accounts", json={"label": label})
        assert status == 201, account
        _, made, _ = await self.request("POST", f"/api/accounts/{account['id']}/keys", json={"name": "test"})
        if micro_usd:
            await self.net.deposit(account, micro_usd)
            await self.until(account["id"], lambda a: a["balance"] != "0.00")
        return account, made["key"]

    async def account(self, account: str) -> dict:
        return (await self.request("GET", f"/api/accounts/{account}"))[1]

    async def until(self, account: str, condition: Any) -> dict:
        """The account once a condition holds."""
        async with asyncio.timeout(60):
            while not condition(shown := await self.account(account)):
                await asyncio.sleep(0.02)
        return shown

    async def settled(self, account: str) -> dict:
        """The account once nothing of it is held or waits for the chain."""
        return await self.until(account, lambda a: (a["held"], a["unsettled"]) == ("0.00", "0.00"))

    async def chat(self, key: str, *, headers: dict | None = None, **fields: Any) -> tuple[int, Any, Any]:
        body = {"model": "micro", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20} | fields
        return await self.request("POST", "/v1/chat/completions", key=key, headers=headers, json=body)

    @contextlib.asynccontextmanager
    async def streaming(self, key: str, **fields: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """A stream whose answer has begun; left before its end, its connection is closed."""
        body = {"model": "micro", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20} | fields
        headers = {"Authorization": f"Bearer {key}"}
        url = self.url + "/v1/chat/completions"
        async with self.session.post(url, headers=headers, json=body | {"stream": True}) as response:
            yield response

    async def receipt(self, receipt_id: str) -> dict:
        return (await self.request("GET", f"/api/receipts/{receipt_id}"))[1]

    async def calls(self, account: dict, **query: Any) -> list[dict]:
        """The account's calls, newest first."""
        return (await self.request("GET", "/api/calls", params={"account": account["id"], **query}))[1]

    async def ended(self, account: dict) -> dict:
        """The account's only call, once its hold is closed."""
        async with asyncio.timeout(20):
            while not (calls := await self.calls(account)) or calls[0]["status"] == "held":
                await asyncio.sleep(0.01)
        assert len(calls) == 1
        return calls[0]

    async def check_books(self, account: dict, micro_usd: int, charged: str) -> None:
        """Nothing is held anywhere; of this deposit exactly this was taken, here and on the chain."""
        settled = await self.settled(account["id"])
        left = micro_usd * 10**6 - parse_usd(charged)
        assert settled["balance"] == format_usd(left)
        on_chain = await self.net.vault.account(self.net.chain.platform, account["id"])
        assert on_chain.balance == left
        assert (await self.request("GET", "/api/totals"))[1]["held"] == "0.00"


def settings_for(
    upstream_url: str,
    database: str,
    sections: dict | None = None,
    *,
    timeout_seconds: float = 5,
    connect_seconds: float = 10,
    max_call_seconds: float = 600,
    **gateway: Any,
) -> Settings:
    """Settings with a database, one upstream, a model at a micro-dollar a token, a published one, and one without a price.

    `sections` are more of them, `gateway` more of that one.
    """
    local = {
        "kind": "openai",
        "surfaces": ["chat", "responses", "messages", "embeddings"],
        "base_url": upstream_url,
        "timeout_seconds": timeout_seconds,
        "max_call_seconds": max_call_seconds,
        "connect_seconds": connect_seconds,
    }
    return Settings.model_validate(
        {
            "database": database,
            "gateway": {"port": 0, "drain_seconds": 5, **gateway},
            "upstreams": {"local": local},
            "models": {
                "micro": {"upstream": "local", **MICRO},
                "gpt-4o-mini": {"upstream": "local"},
                "unpriced": {"upstream": "local"},
            },
            **(sections or {}),
        }
    )


@contextlib.asynccontextmanager
async def running(net: Net, settings: Settings, secrets: Secrets | None = None) -> AsyncIterator[Client]:
    """The service, in this process, with the local chain's own keys unless it is given others."""
    secrets = secrets or Secrets(deploy.METER, (deploy.GAS,), deploy.OWNER, b"salt", ADMIN_KEY)
    started: asyncio.Future[Running] = asyncio.get_running_loop().create_future()

    async def ready(service: Running) -> None:
        started.set_result(service)

    service = asyncio.create_task(serve(settings, net.chain, secrets, ready))
    try:
        await asyncio.wait([started, service], return_when=asyncio.FIRST_COMPLETED)
        if service.done():
            service.result()
        # More connections than the default hundred: some tests open many at once.
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=30)
        ) as session:
            yield Client(started.result().url, started.result().ledger, net, session)
    finally:
        service.cancel()
        await asyncio.wait([service], timeout=30)
        assert service.done(), "the service does not stop"
