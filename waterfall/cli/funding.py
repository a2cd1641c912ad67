"""`waterfall accounts fund`: USDC into an account, minted on the local chain or from a wallet."""

import asyncio
from pathlib import Path
from typing import Any

from waterfall.chain import token, vault
from waterfall.chain.rpc import Rpc
from waterfall.chain.transactions import transact
from waterfall.chain.vault import Vault
from waterfall.cli.api import Api, read_dev_file
from waterfall.devnet import deploy
from waterfall.errors import ChainError, SettingsError
from waterfall.money import format_usd, tokens_to_units
from waterfall.settings import KeySettings, load

_PATIENCE_SECONDS = 600
_POLL_SECONDS = 0.2


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
        dev = read_dev_file()
        rpc_url, address, platform, keys = dev["rpc_url"], dev["vault"], int(dev["platform"]), KeySettings()
    else:
        settings = load(config)
        if settings.chain is None:
            raise SettingsError(reason=f"{config}: there is no [chain]")
        chain = settings.chain
        rpc_url, address, platform, keys = chain.rpc_url, chain.vault, chain.platform, settings.keys
    rpc = Rpc(rpc_url)
    try:
        payee = platform, account["owner"], account["label_hash"]
        if wallet is None:
            if config is not None:
                raise SettingsError(reason="say whose USDC with --wallet: only the local chain can mint")
            return await deploy.mint_and_deposit(rpc, address, *payee, tokens)
        payer = keys.signer(wallet)
        usdc = await Vault(rpc, address).token()
        funds = await token.balance_of(rpc, usdc, payer.address)
        if funds < tokens:
            raise ChainError(reason=f"{payer.address} has only {format_usd(tokens_to_units(funds))} USDC")
        await transact(rpc, payer, usdc, token.approve(address, tokens))
        receipt = await transact(rpc, payer, address, vault.deposit(*payee, tokens))
        return str(receipt["transactionHash"])
    finally:
        await rpc.close()


async def wait_for_deposit(api: Api, account: str, transaction: str) -> Any:
    """The account, once a deposit of it can be spent.

    Raises:
        ChainError: it takes longer than ten minutes.
    """
    seen = 0
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while True:
            page = await api.request("GET", f"/api/accounts/{account}/statement?after={seen}&limit=1000")
            if any(line["transaction"] == transaction for line in page["lines"]):
                shown = await api.request("GET", f"/api/accounts/{account}")
                if shown["pending"] == "0.00":
                    return shown
            elif page["lines"]:
                seen = page["lines"][-1]["entry"]
            await asyncio.sleep(_POLL_SECONDS)
