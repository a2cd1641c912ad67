"""`waterfall dev`: everything on this machine: a chain, a vault, a model, the gateway and its relayer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from waterfall.cli import logs
from waterfall.cli.folder import DEV_FOLDER, Dev, Folder, Kept
from waterfall.cli.output import command, err, facts
from waterfall.cli.secrets import Secrets
from waterfall.cli.service import Running, serve
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
T = TypeVar("T")


def _secrets(admin_key: str) -> Secrets:
    return Secrets(deploy.METER, (deploy.GAS,), deploy.OWNER, _LABEL_SALT, admin_key)


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


@contextlib.asynccontextmanager
async def local_chain(path: Path) -> AsyncIterator[tuple[Settings, ChainSettings, Secrets]]:
    """The local chain of a folder alone, with its ledger, for commands that need no gateway.

    Raises:
        SettingsError: there is none, or it is in use.
        ProcessFailed, ChainError
    """
    folder, anvil = Folder(path), Anvil(path)
    kept = folder.kept()
    if kept is None:
        raise SettingsError(reason=f"there is no local chain in {path}: name a settings file with --config")
    with folder.owned():
        if not anvil.state_file.exists():
            raise SettingsError(reason=f"the local chain in {path} was lost: there is nothing to read again")
        async with anvil:
            deployment = await deploy.deploy(anvil.rpc)
            chain = _chain(anvil.rpc_url, anvil.chain_id, deployment)
            yield Settings(database=kept.database), chain, _secrets("")


@contextlib.asynccontextmanager
async def running_dev(
    folder: Folder,
    *,
    config: Path | None = None,
    llm: bool = True,
    port: int | None = None,
    tell: Tell = lambda _: None,
) -> AsyncIterator[tuple[Dev, "asyncio.Task[None]"]]:
    """Everything, running; and a task that ends when any of it does.

    Args:
        folder: where chain, database and logs are; the caller owns it.
        config: settings with other upstreams and models; None: the local model.
        llm: whether to run the local model where there is no `config`.
        port: the gateway's; None: the settings'.
        tell: told what is going on.

    Raises:
        SettingsError, ProcessFailed, ChainError, LedgerError: it cannot start.
    """
    settings = Settings(database=folder.database) if config is None else load(config)
    folder.untell()
    async with contextlib.AsyncExitStack() as stack:
        anvil = Anvil(folder.path)
        model = LocalModel(folder.path, progress=_assembling(tell)) if llm and config is None else None
        tell("Starting the chain …")
        await stack.enter_async_context(anvil)
        if model is not None:
            stack.push_async_callback(model.stop)
            starting = asyncio.create_task(model.start())
            stack.push_async_callback(_cancel, starting)
        deployment = await deploy.deploy(anvil.rpc)
        await anvil.mine_every(_BLOCK_SECONDS)
        if model is not None:
            tell("Loading the model …")
            await starting
            settings = _with_model(settings, model)
        if port is not None:
            settings = settings.model_copy(
                update={"gateway": settings.gateway.model_copy(update={"port": port})}
            )
        tell("Starting the gateway …")
        kept = folder.kept() or Kept(
            admin_key=keys.new_secret(), account_key=keys.new_secret(), database=settings.database_url()
        )
        started: asyncio.Future[Running] = asyncio.get_running_loop().create_future()

        async def ready(running: Running) -> None:
            if not started.done():  # a signal may have come first
                started.set_result(running)

        chain = _chain(anvil.rpc_url, anvil.chain_id, deployment)
        parts = [
            asyncio.create_task(serve(settings, chain, _secrets(kept.admin_key), ready)),
            asyncio.create_task(anvil.child.watch()),
        ]
        if model is not None:
            parts.append(asyncio.create_task(model.child.watch()))
        for part in parts:
            stack.push_async_callback(_cancel, part)
        ended = asyncio.create_task(_first(parts))
        stack.push_async_callback(_cancel, ended)
        running = await unless(ended, started)
        # Only now, as the ledger has said that it is this chain's.
        folder.keep(kept.model_copy(update={"database": settings.database_url()}))
        tell("Funding an account …")
        account = await unless(ended, _first_account(anvil, deployment, running.ledger, kept.account_key))
        dev = Dev(
            gateway_url=running.url,
            rpc_url=anvil.rpc_url,
            chain_id=anvil.chain_id,
            vault=deployment.vault,
            token=deployment.token,
            platform=str(deployment.platform),
            admin_key=kept.admin_key,
            account=account,
            account_key=kept.account_key,
            model=next(iter(settings.models), None),
        )
        with folder.told(dev):
            yield dev, ended


async def unless(ended: "asyncio.Task[None]", step: Awaitable[T]) -> T:
    """What a step gives, if `ended` does not end before it; that one's failure is ours.

    Raises:
        CancelledError: it ended without failure, by a signal that came to it instead of to us.
    """
    working = asyncio.ensure_future(step)
    try:
        await asyncio.wait((working, ended), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            ended.result()
            raise asyncio.CancelledError
        return working.result()
    finally:
        await _cancel(working)


def _assembling(tell: Tell) -> Callable[[int, int], None]:
    return lambda done, total: tell(f"Unpacking the model: {100 * done // total} % of {total // 2**20} MB …")


async def _first(parts: list["asyncio.Task[Any]"]) -> None:
    """Wait for the first part to end; its failure is ours."""
    done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
    for part in done:
        part.result()


async def _cancel(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # it was told already, or it is the reason why everything else stops


def _with_model(settings: Settings, model: LocalModel) -> Settings:
    served = ["chat", "responses", "messages"]
    upstreams = {
        "local": {"kind": "openai", "surfaces": served, "base_url": model.base_url, "max_choices": 1}
    }
    models = {MODEL: {"upstream": "local", "max_output_tokens": 256, **_MODEL_PRICES}}
    return Settings.model_validate(
        {**settings.model_dump(exclude_unset=True), "upstreams": upstreams, "models": models}
    )


async def _first_account(anvil: Anvil, deployment: Deployment, ledger: Ledger, secret: str) -> str:
    """An account with 100 USD that the key belongs to."""
    try:
        account = await ledger.write(
            lambda tx: accounts.create_account(tx, ledger.platform, ZERO_ADDRESS, _LABEL_SALT, _ACCOUNT_LABEL)
        )
    except AccountExists as error:
        account = str(error.details["account"])
    await ledger.keys.add(secret, account=account, name=_ACCOUNT_LABEL)
    record = await ledger.read(lambda c: views.account(c, account))
    if record.entries == 0:
        await deploy.mint_and_deposit(
            anvil.rpc, deployment.vault, deployment.platform, record.owner, record.label_hash, _FIRST_DEPOSIT
        )
        while record.wallet.available < tokens_to_units(_FIRST_DEPOSIT):
            await asyncio.sleep(_POLL_SECONDS)
            record = await ledger.read(lambda c: views.account(c, account))
    return account


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
    folder = Folder(DEV_FOLDER)
    with folder.owned(fresh=fresh):
        logs.configure(DEV_FOLDER / "gateway.log")
        with err.status("Starting …") as status:
            async with running_dev(folder, config=config, llm=llm, port=port, tell=status.update) as (
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
