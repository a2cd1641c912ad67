"""Gateway and relayer, in one process or apart, until a signal.

A stop goes on by itself: no new calls, running ones end, their captures are written, the relayer ends the steps it is at.
"""

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

import structlog

from waterfall.chain.rpc import Rpc, WrongChain
from waterfall.chain.vault import Vault
from waterfall.cli import logs
from waterfall.cli.listening import Server, Stop, ended, first, listening, url_of
from waterfall.cli.secrets import Secrets
from waterfall.errors import SettingsError
from waterfall.gateway.app import Gateway
from waterfall.gateway.config import MetricsSettings
from waterfall.gateway.tracing import tracing
from waterfall.gateway.watch import Watch
from waterfall.ledger import reconciliation
from waterfall.ledger.store import Ledger
from waterfall.settings import ChainSettings, Settings
from waterfall.settlement.relayer import Relayer, RelayerSettings
from waterfall.settlement.watching import families
from waterfall.signers import Signer
from waterfall.types import ZERO_ADDRESS

log = structlog.get_logger()

_GWEI = 10**9
_FLUSH_SECONDS = 5
"""For answers that are whole, and whose clients still have to take them."""
_OBJECTS_BETWEEN_COLLECTIONS = 20_000
_STEP_SECONDS = 10
"""For the steps that the relayer is at."""


@dataclass(frozen=True)
class Running:
    """A service that accepts calls."""

    url: str
    ledger: Ledger


@contextlib.asynccontextmanager
async def _ledger(settings: Settings, chain: ChainSettings, secrets: Secrets) -> AsyncIterator[Ledger]:
    """The open ledger, which keeps up with what other processes do."""
    _conceal(settings, chain, secrets)
    ledger = Ledger.open(
        settings.database_url(),
        chain_id=chain.chain_id,
        vault=chain.vault,
        platform=chain.platform,
        lease_seconds=settings.gateway.lease_seconds,
    )
    for account in ledger.recounted_at_start:
        log.error("sums did not add up and were derived anew", account=account)
    if ledger.lost_at_start:
        log.error("calls lost", count=ledger.lost_at_start, see="GET /api/calls?status=lost")
    following = asyncio.create_task(ledger.follow())
    try:
        yield ledger
    finally:
        following.cancel()
        await ended(following)
        ledger.close()


@contextlib.asynccontextmanager
async def open_ledger(
    settings: Settings, chain: ChainSettings, secrets: Secrets, *, catch_up: bool = True
) -> AsyncIterator[tuple[Ledger, Relayer]]:
    """The ledger and its relayer, at the chain's head unless that is left to the caller.

    Raises:
        SettingsError: chain, vault, platform or keys are not what the settings say.
        ChainError, LedgerError
    """
    _conceal(settings, chain, secrets)
    async with vault_of(chain) as vault:
        token, exit_delay = await _check(vault, chain, secrets)
        async with _ledger(settings, chain, secrets) as ledger:
            relayer = Relayer(
                vault,
                ledger,
                RelayerSettings(
                    deployed_block=chain.deployed_block,
                    finality=chain.finality,
                    final_depth=chain.final_depth,
                    poll_seconds=chain.poll_seconds,
                    max_block_gap=chain.max_block_gap,
                    most_charges=chain.max_charges_per_batch,
                    max_fee_cap=chain.max_fee_gwei * _GWEI,
                    gas_batches=chain.gas_batches,
                    max_unsettled=chain.max_unsettled,
                    gather_seconds=chain.gather_seconds,
                    retention=settings.retention,
                ),
                token=token,
                exit_delay=exit_delay,
                meter=secrets.meter,
                gas=secrets.gas,
                owner=secrets.owner,
            )
            if catch_up:
                await relayer.catch_up()
                if await ledger.read(reconciliation.is_journal_lost):
                    log.error(
                        "the database is new and the platform is not: receipts, keys, labels and what had not settled are "
                        "lost",
                        see="waterfall restore",
                    )
            yield ledger, relayer


@contextlib.asynccontextmanager
async def vault_of(chain: ChainSettings) -> AsyncIterator[Vault]:
    """The vault that the settings name, to be asked."""
    rpc = Rpc(chain.rpc_urls(), chain_id=chain.chain_id, timeout_seconds=chain.rpc_timeout_seconds)
    try:
        yield Vault(rpc, chain.vault)
    finally:
        await rpc.close()


async def _check(vault: Vault, chain: ChainSettings, secrets: Secrets) -> tuple[str, int]:
    """The vault's token and the platform's exit delay, if everything is what it should be."""
    try:
        code = await vault.rpc.call("eth_getCode", chain.vault, "latest")
    except WrongChain as error:
        raise SettingsError(reason=f"chain.rpc_url: {error.details['reason']}") from None
    if code == "0x":
        raise SettingsError(reason=f"chain.vault: there is no contract at {chain.vault}")
    platform = await vault.platform(chain.platform)
    if platform.owner == ZERO_ADDRESS:
        raise SettingsError(reason=f"chain.platform: the vault has no platform {chain.platform}")
    if not await _is_meter(vault, chain, secrets.meter):
        raise SettingsError(
            reason=f"keys.meter: {secrets.meter.address} is not a valid meter of the platform"
        )
    if secrets.owner is not None and secrets.owner.address != platform.owner:
        raise SettingsError(
            reason=f"keys.owner: the platform's owner is {platform.owner}, not {secrets.owner.address}"
        )
    parts = {
        "its owner": platform.owner,
        "its next owner": platform.pending_owner,
        "where its earnings go": platform.payout,
    }
    for name, signer in [("meter", secrets.meter), *(("gas", gas) for gas in secrets.gas)]:
        powers = [part for part, address in parts.items() if address == signer.address]
        if name == "gas" and await _is_meter(vault, chain, signer):
            powers.append("a meter of it")
        if powers:
            other = "beyond metering" if name == "meter" else "at all"
            raise SettingsError(
                reason=f"keys.{name}: {signer.address} must have no power over the platform {other}, and is "
                f"{' and '.join(powers)}: use another key"
            )
    return await vault.token(), platform.exit_delay


async def _is_meter(vault: Vault, chain: ChainSettings, signer: Signer) -> bool:
    meter = await vault.meter(chain.platform, signer.address)
    return meter.added_at != 0 and meter.retired_at == 0


def _conceal(settings: Settings, chain: ChainSettings, secrets: Secrets) -> None:
    """Keep every secret out of the logs, and what a node's URL may carry beyond its host."""
    nodes = [urlsplit(url) for url in chain.rpc_urls()]
    upstream_keys = (upstream.api_key() for upstream in settings.upstreams.values())
    passwords = (url.password for url in (*nodes, urlsplit(settings.database_url())))
    logs.conceal(*secrets.spellings(), *filter(None, upstream_keys), *filter(None, passwords))
    for node in nodes:
        logs.conceal(*node.path.split("/"), *(value for _, value in parse_qsl(node.query)))


async def serve(
    settings: Settings,
    chain: ChainSettings,
    secrets: Secrets,
    ready: Callable[[Running], Awaitable[None]],
) -> None:
    """Serve calls and settle their charges until SIGINT or SIGTERM; then let running calls end.

    Args:
        settings: the whole file.
        chain: which chain, vault and platform.
        secrets: keys.
        ready: told once calls are accepted.

    Raises:
        SettingsError, ChainError, LedgerError: it cannot start.
    """
    with listening("gateway", settings.gateway.host, settings.gateway.port) as listener:
        async with open_ledger(settings, chain, secrets) as (ledger, relayer):
            watch = Watch(
                ledger,
                max_age_seconds=settings.gateway.max_projection_age_seconds,
                parts=relayer.parts,
                families=lambda: families(relayer),
            )
            relaying = asyncio.create_task(relayer.run())
            try:
                await _serve_calls(settings, secrets, ledger, watch, listener, ready, beside=relaying)
            finally:
                await _stop(relayer, relaying)


async def serve_gateway(
    settings: Settings,
    chain: ChainSettings,
    secrets: Secrets,
    ready: Callable[[Running], Awaitable[None]],
) -> None:
    """Serve calls whose charges a relayer in another process settles, until SIGINT or SIGTERM.

    Raises:
        SettingsError, LedgerError: it cannot start.
    """
    with listening("gateway", settings.gateway.host, settings.gateway.port) as listener:
        async with _ledger(settings, chain, secrets) as ledger:
            watch = Watch(ledger, max_age_seconds=settings.gateway.max_projection_age_seconds)
            await _serve_calls(settings, secrets, ledger, watch, listener, ready)


async def relay(
    settings: Settings, chain: ChainSettings, secrets: Secrets, ready: Callable[[str], Awaitable[None]]
) -> None:
    """Settle the charges of gateways in other processes, until SIGINT or SIGTERM.

    Args:
        settings: the whole file.
        chain: which chain, vault and platform.
        secrets: keys.
        ready: told where it is watched, once it works.

    Raises:
        SettingsError, ChainError, LedgerError: it cannot start.
    """
    with listening("metrics", settings.metrics.host, settings.metrics.port or 0) as listener:
        async with open_ledger(settings, chain, secrets, catch_up=False) as (ledger, relayer):
            watch = Watch(
                ledger, max_age_seconds=None, parts=relayer.parts, families=lambda: families(relayer)
            )
            server, stop = Server(watch.app(), listener, _FLUSH_SECONDS), Stop()
            relaying = asyncio.create_task(relayer.run())
            try:
                with stop.on_signals():
                    async with server.serving() as serving:
                        await ready(url_of(listener))
                        await first(relaying, serving, stop.asked)
                        watch.is_stopping = True
                        await _stop(relayer, relaying)
            finally:
                await _stop(relayer, relaying)


async def _serve_calls(
    settings: Settings,
    secrets: Secrets,
    ledger: Ledger,
    watch: Watch,
    listener: socket.socket,
    ready: Callable[[Running], Awaitable[None]],
    *,
    beside: "asyncio.Task[None] | None" = None,
) -> None:
    """Run the gateway until a signal, or until what runs beside it has ended."""
    await ledger.keys.set_platform_key(secrets.admin_key, "admin")
    traces = tracing(settings.tracing)
    gateway = Gateway(
        settings.gateway,
        settings.upstreams,
        settings.models,
        ledger,
        secrets.meter,
        secrets.label_salt,
        watch,
        traces,
        settings.tariffs,
        keeps_answers=settings.retention.answer_hours > 0,
    )
    server = Server(gateway.app, listener, int(settings.gateway.drain_seconds))
    stop = Stop()
    try:
        with stop.on_signals():
            async with _watched(watch, settings.metrics), server.serving() as serving:
                _collect_less()
                await ready(Running(url_of(listener), ledger))
                await first(serving, stop.asked, beside)
                gateway.stop()
                notice = asyncio.sleep(settings.gateway.notice_seconds)
                draining = asyncio.gather(gateway.drain(), notice)
                await first(draining, stop.asked_again)
                draining.cancel()
                await gateway.cut()
                server.config.timeout_graceful_shutdown = _FLUSH_SECONDS
    finally:
        await traces.close()


def _collect_less() -> None:
    """Leave what the process has made to start out of every collection to come, and collect once in many calls.

    What calls leave behind has no cycles, but for a failed one's: looking for them took a twentieth of all time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, 10, 10)


@contextlib.asynccontextmanager
async def _watched(watch: Watch, settings: MetricsSettings) -> AsyncIterator[None]:
    """Listen for those who watch, where the settings ask for a listener of their own."""
    if settings.port is None:
        yield
        return
    with listening("metrics", settings.host, settings.port) as listener:
        async with Server(watch.app(), listener, _FLUSH_SECONDS).serving():
            log.info("watched", url=url_of(listener))
            yield


async def _stop(relayer: Relayer, relaying: "asyncio.Task[None]") -> None:
    """End the relayer after the steps it is at.

    Raises:
        Exception: what it had failed with.
    """
    relayer.stop()
    try:
        await asyncio.wait([relaying], timeout=_STEP_SECONDS)
    finally:
        relaying.cancel()
        await ended(relaying)
    if not relaying.cancelled():
        relaying.result()
