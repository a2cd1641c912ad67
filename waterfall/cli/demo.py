"""`waterfall demo`: the whole of Waterfall once, on real parts, in a folder of its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from waterfall.chain.rpc import Rpc
from waterfall.chain.vault import Vault
from waterfall.cli import logs
from waterfall.cli.api import Api
from waterfall.cli.dev import running_dev, unless
from waterfall.cli.folder import Dev, Folder
from waterfall.cli.funding import wait_for_deposit
from waterfall.cli.output import command, err, out, plain, show_table, table
from waterfall.cli.receipts import prove
from waterfall.devnet.deploy import mint_and_deposit
from waterfall.errors import ChainError, WaterfallError
from waterfall.gateway.wire import AccountView, KeyView, ReceiptView
from waterfall.money import format_usd, parse_usd, units_to_tokens
from waterfall.settlement.reconcile import reconcile

DEMO_FOLDER = Path(".waterfall/demo")
_SETTLE_SECONDS = 60

_PROMPTS = (
    "Say hello in one short sentence.",
    "Name three colours.",
    "What is the capital of France?",
    "Count from one to five.",
    "Write one line about the sea.",
    "Which is larger, seven or nine?",
    "Name an animal that can fly.",
    "Finish the sentence: a penny saved is …",
    "What do bees make?",
    "Say goodbye politely.",
)
_WIDE = 120
_ONLY_WHERE_WIDE = ("model", "cached>", "transaction")
_AGENT_LIMIT = "0.00011"


class DemoFailed(WaterfallError):
    """The demo failed: {reason}."""


@dataclass(frozen=True)
class _Wallet:
    label: str
    account: str
    key: str


@dataclass
class _Call:
    wallet: _Wallet
    streamed: bool
    receipt: str
    shown: Any = None


@command
async def demo(
    keep: Annotated[bool, typer.Option(help="Keep the demo's chain and database afterwards.")] = False,
) -> None:
    """Run real calls of a real model through a wallet each, settle them on a local chain, and verify every receipt.

    A demo that fails leaves its logs in .waterfall/demo.
    """
    folder = Folder(DEMO_FOLDER)
    with folder.owned(fresh=True):
        logs.configure(DEMO_FOLDER / "gateway.log")
        with err.status("Starting a chain, a vault, a model and the gateway …") as status:
            async with running_dev(folder, port=0, tell=status.update) as (dev, ended):
                status.stop()
                await unless(ended, _run(dev, folder))
        if not keep:
            folder.clear()


async def _run(dev: Dev, folder: Folder) -> None:
    api = Api(dev.gateway_url, dev.admin_key)
    out.print(
        f"Gateway {dev.gateway_url} · vault {dev.vault} on chain {dev.chain_id} · model {dev.model}\n",
        highlight=False,
    )
    async with _node(dev) as vault:
        wallets = await _open_wallets(vault, dev, api)
        calls = await _make_calls(dev, wallets)
        await _run_into_the_limit(dev, api, wallets[1], calls)
        await _wait_until_settled(api, calls)
        show_table(_table(calls))
        await _verify(vault, dev, calls)
        await _compare(vault, dev, api, wallets)
        await _reconcile(vault, folder.database)
    out.print(
        "\nKeep it running with [bold]waterfall dev[/bold] (in this checkout: .venv/bin/waterfall dev), "
        "then point any OpenAI client at the gateway it prints.",
    )


async def _open_wallets(vault: Vault, dev: Dev, api: Api) -> list[_Wallet]:
    wallets = []
    for label, usd in (("user: ada", "1.00"), ("agent: scout", "0.50"), ("team: research", "5.00")):
        account = await api.request(AccountView, "POST", "/api/accounts", {"label": label})
        key = await api.request(KeyView, "POST", f"/api/accounts/{account['id']}/keys", {"name": "demo"})
        payee = int(dev.platform), account["owner"], account["label_hash"]
        transaction = await mint_and_deposit(vault.rpc, dev.vault, *payee, units_to_tokens(parse_usd(usd)))
        await wait_for_deposit(api, account["id"], transaction)
        wallets.append(_Wallet(label, account["id"], key["key"]))
        out.print(f"  {label:15} funded with {usd:>5} USDC  {account['id'][:18]}…", highlight=False)
    return wallets


async def _make_calls(dev: Dev, wallets: list[_Wallet]) -> list[_Call]:
    calls: list[_Call] = []
    columns = (
        SpinnerColumn(),
        TextColumn("Calls of the model"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("calls", total=len(_PROMPTS) + 2)
        for number, prompt in enumerate(_PROMPTS + _PROMPTS[:2]):
            wallet = wallets[(0, 2, 0, 1)[number % 4]]
            calls.append(await _call(dev, wallet, prompt, stream=number % 2 == 1))
            progress.advance(task)
    return calls


async def _call(dev: Dev, wallet: _Wallet, prompt: str, *, stream: bool) -> _Call:
    """One call with the stock client; nothing of Waterfall but the address and the key."""
    from openai import APIConnectionError, AsyncOpenAI  # noqa: PLC0415 - comes with the demo extra

    async with AsyncOpenAI(base_url=f"{dev.gateway_url}/v1", api_key=wallet.key, max_retries=0) as client:
        completions: Any = client.chat.completions.with_raw_response
        messages = [{"role": "user", "content": prompt}]
        try:
            answer = await completions.create(
                model=dev.model, messages=messages, max_tokens=24, stream=stream
            )
            if stream:
                async for _ in answer.parse():
                    pass
        except APIConnectionError as error:
            raise DemoFailed(reason=f"a call broke off: {error}") from error
        return _Call(wallet, stream, answer.headers["x-waterfall-receipt-id"])


async def _run_into_the_limit(dev: Dev, api: Api, agent: _Wallet, calls: list[_Call]) -> None:
    """Give the agent a small daily limit and let it work until the gateway says no."""
    from openai import APIStatusError  # noqa: PLC0415

    limit = {"max_per_window": _AGENT_LIMIT, "window_seconds": 86_400}
    await api.request(AccountView, "PUT", f"/api/accounts/{agent.account}/policy", limit)
    out.print(f"\n{agent.label} may now spend {_AGENT_LIMIT} USD a day. It works on …", highlight=False)
    for _ in range(50):
        try:
            calls.append(await _call(dev, agent, "Think of a word. " * 20, stream=False))
        except APIStatusError as refusal:
            error: Any = refusal.body
            refused = (f"{refusal.status_code} {error['code']}", "yellow")
            out.print(Text.assemble("  ", refused, ": ", plain(error["message"])))
            if refusal.status_code != 402:  # noqa: PLR2004
                raise DemoFailed(reason=error["message"]) from None
            return
    raise DemoFailed(reason="the agent never met its limit")


async def _wait_until_settled(api: Api, calls: list[_Call]) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("Settled on-chain"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=err, transient=True) as progress:
            task = progress.add_task("settled", total=len(calls))
            async with asyncio.timeout(_SETTLE_SECONDS):
                for call in calls:
                    while (call.shown or {}).get("status") not in {"settled", "final"}:
                        call.shown = await api.request(ReceiptView, "GET", f"/api/receipts/{call.receipt}")
                        await asyncio.sleep(0.05)
                    progress.advance(task)
    except TimeoutError:
        raise DemoFailed(reason=f"not everything was settled within {_SETTLE_SECONDS} s") from None


def _table(calls: list[_Call]) -> Table:
    """All of it, or on a narrow terminal what differs from call to call."""
    wide = out.width >= _WIDE
    rows = []
    for call in calls:
        shown = call.shown
        receipt = shown["receipt"]["receipt"]
        row = {
            "account~": call.wallet.label.partition(": ")[2] + ("≋" if call.streamed else ""),
            "model": receipt["model"],
            "in>": receipt["input_tokens"],
            "cached>": receipt["cached_input_tokens"],
            "out>": receipt["output_tokens"],
            "cost USD>": shown["cost"],
            "receipt": shown["id"],
            "transaction": shown["transaction"][:10] + "…",
            "block>": shown["block"],
            "settled in>": f"{shown['settled_at'] - shown['captured_at']} ms",
        }
        rows.append({name: value for name, value in row.items() if wide or name not in _ONLY_WHERE_WIDE})
    caption = "≋ streamed. " + _prices(calls[0].shown["receipt"]["rate_card"])
    names = list(rows[0])
    return table(
        names,
        [list(row.values()) for row in rows],
        title="\nEvery call",
        caption=caption,
        box=SIMPLE_HEAD,
        padding=(0, 1) if wide else 0,
    )


def _prices(card: Any) -> str:
    rates = card["rates"][0]
    parts = (("input", "input"), ("cached", "cached_input"), ("output", "output"))
    prices = ", ".join(f"{name} {rates[f'{key}_usd_per_mtok']}" for name, key in parts)
    return f"{card['model']}, USD per million tokens: {prices}"


@asynccontextmanager
async def _node(dev: Dev) -> AsyncIterator[Vault]:
    rpc = Rpc(dev.rpc_url, chain_id=dev.chain_id)
    try:
        yield Vault(rpc, dev.vault)
    finally:
        await rpc.close()


async def _verify(vault: Vault, dev: Dev, calls: list[_Call]) -> None:
    for call in calls:
        await prove(call.shown, vault, dev.chain_id)
    out.print(
        f"[green]✓[/green] {len(calls)} receipts verified: signature, meter, amount recomputed, charge on-chain"
    )


async def _compare(vault: Vault, dev: Dev, api: Api, wallets: list[_Wallet]) -> None:
    rows = []
    for wallet in wallets:
        on_chain = (await vault.account(int(dev.platform), wallet.account)).balance
        shown = await api.request(AccountView, "GET", f"/api/accounts/{wallet.account}")
        rows.append((wallet.label, format_usd(on_chain), shown["balance"], shown["held"], shown["unsettled"]))
        if rows[-1][1:] != (shown["balance"], shown["balance"], "0.00", "0.00"):
            raise ChainError(reason=f"{wallet.label}: chain and ledger differ")
    earned = (await vault.platform(int(dev.platform))).earnings
    show_table(
        table(
            ("account~", "on-chain USD>", "ledger USD>", "held>", "unsettled>"),
            rows,
            title="\nBalances, to the last unit (0.000000000001 USD)",
            caption=f"The platform has earned {format_usd(earned)} USD.",
            box=SIMPLE_HEAD,
        )
    )
    out.print("[green]✓[/green] on-chain and ledger are equal")


async def _reconcile(vault: Vault, database: str) -> None:
    report = await reconcile(vault, database)
    if not report.equal:
        found = report.differences[0]
        raise DemoFailed(
            reason=f"{found.subject}: {found.what} is {found.kept}, where it should be {found.expected}"
        )
    out.print(
        f"[green]✓[/green] reconciled: equal, charge by charge: {report.charges} charges, {report.events} events, "
        f"{report.accounts} accounts at block {report.block}"
    )
