"""`waterfall accounts fund`: USDC into an account, minted on the local chain or from a wallet."""

import asyncio
from pathlib import Path
from typing import Any

from waterfall.chain import token, vault
from waterfall.chain.rpc import Rpc, RpcError
from waterfall.chain.transactions import transact
from waterfall.chain.vault import Vault
from waterfall.cli.api import Api
from waterfall.cli.folder import DEV_FOLDER, Folder
from waterfall.devnet import deploy
from waterfall.errors import ChainError, SettingsError
from waterfall.gateway.wire import AccountView, StatementView
from waterfall.money import format_usd, tokens_to_units
from waterfall.settings import KeySettings, load
from waterfall.types import ZERO_ADDRESS

_POLL_SECONDS = 0.2


class DepositPending(ChainError):
    """The deposit {transaction} is on the chain, but not final after {minutes} minutes: it will count once it is."""

    code = "deposit_pending"


async def deposit(account: Any, tokens: int, *, wallet: str | None, config: Path | None) -> str:
    """Deposit into an account; the transaction's hash.

    Args:
        account: the account as the gateway shows it.
        tokens: how much, in token base units.
        wallet: whose tokens, `env:VARIABLE` or `keystore:FILE`; None mints them, on the local chain.
        config: the settings file that names the chain; None: the running `waterfall dev`.

    Raises:
        SettingsError, ChainError
    """
    if config is None:
        dev = Folder(DEV_FOLDER).read()
        rpc = Rpc(dev.rpc_url, chain_id=dev.chain_id)
        address, platform, keys = dev.vault, int(dev.platform), KeySettings()
    else:
        settings = load(config)
        if settings.chain is None:
            raise SettingsError(reason=f"{config}: there is no [chain]")
        chain = settings.chain
        rpc = Rpc(chain.rpc_urls(), chain_id=chain.chain_id, timeout_seconds=chain.rpc_timeout_seconds)
        address, platform, keys = chain.vault, chain.platform, settings.keys
    try:
        payee = platform, account["owner"], account["label_hash"]
        if wallet is None:
            if config is not None:
                raise SettingsError(reason="say whose USDC with --wallet: only the local chain can mint")
            return await deploy.mint_and_deposit(rpc, address, *payee, tokens)
        payer, contract = keys.signer(wallet), Vault(rpc, address)
        if (await contract.platform(platform)).owner == ZERO_ADDRESS:
            raise SettingsError(reason=f"chain.platform: the vault has no platform {platform}")
        usdc = await contract.token()
        funds = await token.balance_of(rpc, usdc, payer.address)
        if funds < tokens:
            raise ChainError(reason=f"{payer.address} has only {format_usd(tokens_to_units(funds))} USDC")
        await transact(rpc, payer, usdc, token.approve(address, tokens))
        receipt = await transact(rpc, payer, address, vault.deposit(*payee, tokens))
        return str(receipt["transactionHash"])
    except RpcError as error:
        refused = vault.refusal(error.details["data"])
        if refused is None:
            raise
        raise ChainError(reason=f"the vault refuses: {refused}") from error
    finally:
        await rpc.close()


async def wait_for_deposit(api: Api, account: str, transaction: str, *, patience_seconds: float = 600) -> Any:
    """The account, once a deposit of it can be spent.

    Raises:
        DepositPending: that takes longer than our patience.
    """
    seen, path = 0, f"/api/accounts/{account}"
    try:
        async with asyncio.timeout(patience_seconds):
            while True:
                page = await api.request(StatementView, "GET", f"{path}/statement?after={seen}&limit=1000")
                if any(line["transaction"] == transaction for line in page["lines"]):
                    shown = await api.request(AccountView, "GET", path)
                    if shown["pending"] == "0.00":
                        return shown
                elif page["lines"]:
                    seen = page["lines"][-1]["entry"]
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        raise DepositPending(transaction=transaction, minutes=f"{patience_seconds / 60:g}") from None
