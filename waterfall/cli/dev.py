"""`waterfall dev`: everything on this machine: a chain, a vault, a model, the gateway and its relayer."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from waterfall.cli import logs
from waterfall.cli.output import command, err, facts
from waterfall.cli.service import Running, Secrets, serve
from waterfall.devnet import deploy
from waterfall.devnet.anvil import Anvil
from waterfall.devnet.deploy import Deployment
from waterfall.devnet.llm import MODEL, LocalModel
from waterfall.errors import AccountExists, SettingsError
from waterfall.ledger import accounts, keys, views
from waterfall.ledger.store import Ledger
from waterfall.money import tokens_to_units
from waterfall.settings import ChainSettings, Settings, load
from waterfall.types import ZERO_ADDRESS

DEV_FOLDER = Path(".waterfall")
_LABEL_SALT = b"waterfall.devnet"
_ACCOUNT_LABEL = "dev"
_FIRST_DEPOSIT = 100 * 10**6
_BLOCK_SECONDS = 1
_POLL_SECONDS = 0.05
_MODEL_PRICES = {
    "input_usd_per_mtok": "0.10",
    "cached_input_usd_per_mtok": "0.025",
    "output_usd_per_mtok": "0.40",
}

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Dev:
    """What runs, as `dev.json` tells it."""

    gateway_url: str
    rpc_url: str
    chain_id: int
    vault: str
    token: str
    platform: str
    admin_key: str
    account: str
    account_key: str
    model: str | None
    """A model that can be called."""


def _secrets(admin_key: str) -> Secrets:
    return Secrets(deploy.METER, deploy.GAS, deploy.OWNER, _LABEL_SALT, admin_key)


def _chain(rpc_url: str, chain_id: int, deployment: Deployment) -> ChainSettings:
    return ChainSettings(
        rpc_url=rpc_url,
        chain_id=chain_id,
        vault=deployment.vault,
        platform=deployment.platform,
        deployed_block=deployment.deployed_block,
        finality="latest",  # nobody else mines here
        poll_seconds=0.1,
    )


def _database(folder: Path) -> str:
    return f"sqlite:///{folder / 'waterfall.db'}"


@contextlib.asynccontextmanager
async def local_chain(folder: Path) -> AsyncIterator[tuple[Settings, ChainSettings, Secrets]]:
    """The local chain of a folder alone, for commands that need no gateway.

    Raises:
        SettingsError, ProcessFailed, ChainError
    """
    async with Anvil(folder) as anvil:
        deployment = await deploy.deploy(anvil.rpc)
        chain = _chain(anvil.rpc_url, anvil.chain_id, deployment)
        yield Settings(database=_database(folder)), chain, _secrets("")


@contextlib.asynccontextmanager
async def running_dev(
    folder: Path,
    *,
    config: Path | None = None,
    llm: bool = True,
    port: int | None = None,
    tell: Tell = lambda _: None,
) -> AsyncIterator[tuple[Dev, "asyncio.Future[Any]"]]:
    """Everything, running; and a future that ends when any of it does.

    Args:
        folder: where chain, database and logs are.
        config: settings with other upstreams and models; None: the local model.
        llm: whether to run the local model where there is no `config`.
        port: the gateway's; None: the settings'.
        tell: told what is going on.

    Raises:
        SettingsError, ProcessFailed, ChainError, LedgerError: it cannot start.
    """
    settings = Settings(database=_database(folder)) if config is None else load(config)
    (folder / "dev.json").unlink(missing_ok=True)
    async with contextlib.AsyncExitStack() as stack:
        anvil = Anvil(folder)
        model = LocalModel(folder, progress=_assembling(tell)) if llm and config is None else None
        tell("Starting the chain …")
        await stack.enter_async_context(anvil)
        starting = asyncio.create_task(model.start()) if model is not None else None
        if model is not None:
            stack.push_async_callback(model.stop)
        deployment = await deploy.deploy(anvil.rpc)
        await anvil.mine_every(_BLOCK_SECONDS)
        if model is not None and starting is not None:
            tell("Loading the model …")
            await starting
            settings = _with_model(settings, model)
        if port is not None:
            settings = settings.model_copy(
                update={"gateway": settings.gateway.model_copy(update={"port": port})}
            )
        tell("Starting the gateway …")
        kept = _kept(folder)
        secrets = _secrets(kept.get("admin_key") or keys.new_secret())
        started: asyncio.Future[Running] = asyncio.get_running_loop().create_future()

        async def ready(running: Running) -> None:
            started.set_result(running)

        chain = _chain(anvil.rpc_url, anvil.chain_id, deployment)
        service = asyncio.create_task(serve(settings, chain, secrets, ready))
        stack.push_async_callback(_cancel, service)
        parts = [service, asyncio.create_task(anvil.child.watch())]
        if model is not None:
            parts.append(asyncio.create_task(model.child.watch()))
        for watch in parts[1:]:
            stack.push_async_callback(_cancel, watch)
        ended = asyncio.create_task(_first(parts))
        stack.push_async_callback(_cancel, ended)
        waiting: list[asyncio.Future[Any]] = [started, ended]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            await ended
            raise SettingsError(reason="it was stopped while it started")
        running = started.result()
        tell("Funding an account …")
        account, account_key = await _first_account(
            anvil, deployment, running.ledger, kept.get("account_key")
        )
        dev = Dev(
            gateway_url=running.url,
            rpc_url=anvil.rpc_url,
            chain_id=anvil.chain_id,
            vault=deployment.vault,
            token=deployment.token,
            platform=str(deployment.platform),
            admin_key=secrets.admin_key,
            account=account,
            account_key=account_key,
            model=next(iter(settings.models), None),
        )
        _write(folder / "keys.json", {"admin_key": dev.admin_key, "account_key": dev.account_key})
        _write(folder / "dev.json", asdict(dev))
        stack.callback((folder / "dev.json").unlink, missing_ok=True)
        yield dev, ended


def _assembling(tell: Tell) -> Callable[[int, int], None]:
    return lambda done, total: tell(f"Unpacking the model: {100 * done // total} % of {total // 2**20} MB …")


async def _first(parts: list["asyncio.Task[Any]"]) -> None:
    """Wait for the first part to end; its failure is ours."""
    done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
    for part in done:
        part.result()


async def _cancel(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # it was told already, or it is the reason why everything else stops


def _with_model(settings: Settings, model: LocalModel) -> Settings:
    upstreams = {"local": {"kind": "openai", "base_url": model.base_url, "max_choices": 1}}
    models = {MODEL: {"upstream": "local", "max_output_tokens": 256, **_MODEL_PRICES}}
    return Settings.model_validate(
        {**settings.model_dump(exclude_unset=True), "upstreams": upstreams, "models": models}
    )


def _kept(folder: Path) -> dict[str, str]:
    """The keys of earlier starts in this folder: they stay valid."""
    try:
        found: dict[str, str] = json.loads((folder / "keys.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def _write(file: Path, content: dict[str, Any]) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.touch(mode=0o600)
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(file)


async def _first_account(
    anvil: Anvil, deployment: Deployment, ledger: Ledger, known_key: str | None
) -> tuple[str, str]:
    """An account with 100 USD and a key of it."""
    try:
        account = await ledger.write(
            lambda tx: accounts.create_account(tx, ledger.platform, ZERO_ADDRESS, _LABEL_SALT, _ACCOUNT_LABEL)
        )
    except AccountExists as error:
        account = str(error.details["account"])
    secret = known_key or keys.new_secret()
    await ledger.add_key(secret, account=account, name=_ACCOUNT_LABEL)
    record = await ledger.read(lambda c: views.account(c, account))
    if record.entries == 0:
        await deploy.mint_and_deposit(
            anvil.rpc, deployment.vault, deployment.platform, record.owner, record.label_hash, _FIRST_DEPOSIT
        )
        while record.wallet.available < tokens_to_units(_FIRST_DEPOSIT):
            await asyncio.sleep(_POLL_SECONDS)
            record = await ledger.read(lambda c: views.account(c, account))
    return account, secret


@command
async def dev(
    config: Annotated[Path | None, typer.Option(help="Settings with your own upstreams and models.")] = None,
    port: Annotated[
        int | None, typer.Option(help="The gateway's port; 0 takes a free one.", min=0, max=65535)
    ] = None,
    llm: Annotated[bool, typer.Option("--llm/--no-llm", help="Run the local model.")] = True,
    fresh: Annotated[bool, typer.Option(help="Forget the chain and the ledger of earlier starts.")] = False,
) -> None:
    """Run everything on this machine until Ctrl-C: chain, vault, funded account, local model, gateway, relayer.

    What runs is told in .waterfall/dev.json, while it runs. Chain and ledger are kept for the next start.
    """
    if fresh:
        shutil.rmtree(DEV_FOLDER, ignore_errors=True)
    logs.configure(DEV_FOLDER / "gateway.log")
    with err.status("Starting …") as status:
        async with running_dev(DEV_FOLDER, config=config, llm=llm, port=port, tell=status.update) as (
            dev_,
            ended,
        ):
            status.stop()
            err.print(_summary(dev_))
            await ended
            err.print("Stopping …", style="dim")


def _summary(dev_: Dev) -> Any:
    pairs = [
        ("gateway", f"{dev_.gateway_url}/v1"),
        ("api key", f"{dev_.account_key}  (account {dev_.account[:10]}…, 100 USD to begin with)"),
        ("model", dev_.model or "none: give a settings file with --config"),
        ("chain", f"{dev_.rpc_url}, vault {dev_.vault}"),
        ("all of it", f"{DEV_FOLDER / 'dev.json'}; log in {DEV_FOLDER / 'gateway.log'}"),
        ("stop", "Ctrl-C"),
    ]
    return facts("Waterfall runs", pairs)
