"""Gateway and relayer in one process, until a signal."""

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import structlog
import uvicorn

from waterfall.chain.rpc import Rpc
from waterfall.chain.vault import Vault
from waterfall.errors import SettingsError
from waterfall.gateway.app import Gateway
from waterfall.ledger.store import Ledger
from waterfall.settings import ChainSettings, Settings
from waterfall.settlement.relayer import Relayer, RelayerSettings
from waterfall.signers import Signer
from waterfall.types import ZERO_ADDRESS

log = structlog.get_logger()

_GWEI = 10**9


@dataclass(frozen=True)
class Secrets:
    """What a service needs and no file holds."""

    meter: Signer
    gas: Signer
    owner: Signer | None
    label_salt: bytes
    admin_key: str


@dataclass(frozen=True)
class Running:
    """A service that accepts calls."""

    url: str
    ledger: Ledger
    relayer: Relayer


@contextlib.asynccontextmanager
async def open_ledger(
    settings: Settings, chain: ChainSettings, secrets: Secrets, *, catch_up: bool = True
) -> AsyncIterator[tuple[Ledger, Relayer]]:
    """The ledger and its relayer, at the chain's head unless that is left to the caller.

    Raises:
        SettingsError: chain, vault, platform or keys are not what the settings say.
        ChainError, LedgerError
    """
    rpc = Rpc(chain.rpc_url)
    try:
        vault = Vault(rpc, chain.vault)
        token, exit_delay = await _check(vault, chain, secrets)
        ledger = Ledger.open(
            settings.database, chain_id=chain.chain_id, vault=chain.vault, platform=chain.platform
        )
        try:
            for account in ledger.recounted_at_start:
                log.error("sums did not add up and were derived anew", account=account)
            if ledger.lost_at_start:
                log.error("calls lost", count=ledger.lost_at_start, see="GET /api/calls?status=lost")
            relayer = Relayer(
                vault,
                ledger,
                RelayerSettings(
                    deployed_block=chain.deployed_block,
                    finality=chain.finality,
                    final_depth=chain.final_depth,
                    poll_seconds=chain.poll_seconds,
                    most_charges=chain.max_charges_per_batch,
                    max_fee_cap=chain.max_fee_gwei * _GWEI,
                ),
                token=token,
                exit_delay=exit_delay,
                meter=secrets.meter,
                gas=secrets.gas,
                owner=secrets.owner,
            )
            if catch_up:
                await relayer.catch_up()
            yield ledger, relayer
        finally:
            ledger.close()
    finally:
        await rpc.close()


async def _check(vault: Vault, chain: ChainSettings, secrets: Secrets) -> tuple[str, int]:
    """The vault's token and the platform's exit delay, if everything is what it should be."""
    found = int(await vault.rpc.call("eth_chainId"), 16)
    if found != chain.chain_id:
        raise SettingsError(reason=f"chain.chain_id: {chain.rpc_url} is chain {found}, not {chain.chain_id}")
    if await vault.rpc.call("eth_getCode", chain.vault, "latest") == "0x":
        raise SettingsError(reason=f"chain.vault: there is no contract at {chain.vault}")
    platform = await vault.platform(chain.platform)
    if platform.owner == ZERO_ADDRESS:
        raise SettingsError(reason=f"chain.platform: the vault has no platform {chain.platform}")
    meter = await vault.meter(chain.platform, secrets.meter.address)
    if meter.added_at == 0 or meter.retired_at != 0:
        raise SettingsError(
            reason=f"keys.meter: {secrets.meter.address} is not a valid meter of the platform"
        )
    if secrets.owner is not None and secrets.owner.address != platform.owner:
        raise SettingsError(
            reason=f"keys.owner: the platform's owner is {platform.owner}, not {secrets.owner.address}"
        )
    return await vault.token(), platform.exit_delay


async def serve(
    settings: Settings,
    chain: ChainSettings,
    secrets: Secrets,
    ready: Callable[[Running], Awaitable[None]],
) -> None:
    """Serve until SIGINT or SIGTERM; then let running calls end.

    Args:
        settings: the whole file.
        chain: which chain, vault and platform.
        secrets: keys.
        ready: told once calls are accepted.

    Raises:
        SettingsError, ChainError, LedgerError: it cannot start.
    """
    listener = _listen(settings.gateway.host, settings.gateway.port)
    with listener:
        async with open_ledger(settings, chain, secrets) as (ledger, relayer):
            await ledger.set_platform_key(secrets.admin_key, "admin")
            gateway = Gateway(
                settings.gateway,
                settings.upstreams,
                settings.models,
                ledger,
                secrets.meter,
                secrets.label_salt,
                relayer.halted,
            )
            server = _Server(
                uvicorn.Config(
                    gateway.app,
                    loop="none",
                    log_config=None,
                    access_log=False,
                    timeout_keep_alive=75,
                    timeout_graceful_shutdown=int(settings.gateway.drain_seconds),
                )
            )
            relaying = asyncio.create_task(relayer.run())
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                await _until_started(server, serving)
                host, port = listener.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                await ready(Running(f"http://{host}:{port}", ledger, relayer))
                await asyncio.wait([relaying, serving], return_when=asyncio.FIRST_COMPLETED)
                if relaying.done():
                    server.should_exit = True
                    await serving
                    relaying.result()
                await serving
            finally:
                server.should_exit = True
                await _ended(serving)
                relaying.cancel()
                await _ended(relaying)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off: 40 ms a call otherwise.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno in {errno.EADDRINUSE, errno.EACCES}:
            reason = f"gateway.port: {host}:{port} cannot be listened on: {error.strerror}; port 0 takes a free one"
        else:
            reason = f"gateway.host: {host} cannot be listened on: {error.strerror or error}"
        raise SettingsError(reason=reason) from None
    return listener


class _Server(uvicorn.Server):
    """Stops on signals without raising them again: what surrounds it has to be put away first, undisturbed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, lambda: None)


async def _ended(task: "asyncio.Task[None]") -> None:
    """Wait for a task to end, cancelled or not: what it works with may be put away only then."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])


async def _until_started(server: uvicorn.Server, serving: "asyncio.Task[None]") -> None:
    while not server.started:
        if serving.done():
            serving.result()
            raise SettingsError(reason="the gateway stopped while it started")
        await asyncio.sleep(0.01)
