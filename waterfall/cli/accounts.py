"""`waterfall accounts`, `keys` and `policy`."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table

from waterfall.cli import funding
from waterfall.cli.api import connect
from waterfall.cli.output import Json, command, facts, first_problem, out, show, table
from waterfall.errors import SettingsError
from waterfall.gateway.wire import AccountView, ForgottenView, KeyFacts, KeyView, PolicyBody, StatementView
from waterfall.money import parse_usd, units_to_tokens
from waterfall.types import ZERO_ADDRESS

accounts = typer.Typer(help="Accounts of users, agents and teams.", no_args_is_help=True)
keys = typer.Typer(help="API keys.", no_args_is_help=True)
policy = typer.Typer(help="Spend policies.", no_args_is_help=True)

Url = Annotated[
    str | None,
    typer.Option("--url", help="The gateway (WATERFALL_URL); left out: the running `waterfall dev`."),
]
Key = Annotated[str | None, typer.Option("--key", help="The platform's key (WATERFALL_ADMIN_KEY).")]
Id = Annotated[str, typer.Argument(help="The account's id, 0x… (64 digits).", metavar="ACCOUNT")]
KeyId = Annotated[str, typer.Argument(help="The key's id, key_…: see `waterfall keys list`.", metavar="KEY")]


@accounts.command("create")
@command
async def create(
    label: Annotated[str, typer.Argument(help="Your name for it; the chain sees only a salted hash.")],
    owner: Annotated[
        str, typer.Option(help="The user's wallet, who may take unspent credit out.")
    ] = ZERO_ADDRESS,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Open an account."""
    account = await connect(url, key).request(
        AccountView, "POST", "/api/accounts", {"label": label, "owner": owner}
    )
    show(account, as_json, _account)


@accounts.command("list")
@command
async def list_(url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """All accounts."""
    show(await connect(url, key).request(list[AccountView], "GET", "/api/accounts"), as_json, _accounts)


@accounts.command("show")
@command
async def show_(account: Id, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """One account and its money."""
    show(await connect(url, key).request(AccountView, "GET", f"/api/accounts/{account}"), as_json, _account)


@accounts.command("statement")
@command
async def statement(
    account: Id,
    after: Annotated[int, typer.Option(help="Lines after this number.")] = 0,
    limit: Annotated[int, typer.Option(help="How many lines.")] = 100,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """What happened to an account on the chain."""
    path = f"/api/accounts/{account}/statement?after={after}&limit={limit}"
    show(await connect(url, key).request(StatementView, "GET", path), as_json, _statement)


@accounts.command("fund")
@command
async def fund(
    account: Id,
    usd: Annotated[str, typer.Argument(help="How much, such as 12.50.")],
    wallet: Annotated[
        str | None,
        typer.Option(help="Whose USDC: env:VARIABLE or keystore:FILE; left out: minted, on the local chain."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The waterfall.toml that names the chain; left out: the local one.")
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Deposit USDC into an account and wait until it can be spent."""
    try:
        tokens = units_to_tokens(parse_usd(usd))
    except ValueError as error:
        raise SettingsError(reason=str(error)) from None
    if tokens <= 0:
        raise SettingsError(reason="fund with a positive amount")
    api = connect(url, key)
    before = await api.request(AccountView, "GET", f"/api/accounts/{account}")
    transaction = await funding.deposit(before, tokens, wallet=wallet, config=config)
    with out.status("Waiting until it can be spent …"):
        after = await funding.wait_for_deposit(api, account, transaction)
    show({**after, "transaction": transaction}, as_json, _account)


@accounts.command("forget")
@command
async def forget(
    account: Id,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Erase all that only the gateway knows of an account: label, API keys, usage objects, keys and words of its calls."""
    if not yes:
        typer.confirm(f"Erase label, API keys and request data of {account}, for ever?", abort=True, err=True)
    done = await connect(url, key).request(ForgottenView, "DELETE", f"/api/accounts/{account}/data")
    show(done, as_json, _forgotten)


@keys.command("create")
@command
async def create_key(
    account: Id,
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    expires_at: Annotated[int | None, typer.Option(help="Unix second; left out: never.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model it may call; again for others.")] = None,
    surface: Annotated[
        list[str] | None, typer.Option(help="chat, responses, messages or embeddings; again for others.")
    ] = None,
    max_per_call: Annotated[str | None, typer.Option(help="USD that one call may cost at most.")] = None,
    budget: Annotated[str | None, typer.Option(help="USD that its calls may cost.")] = None,
    budget_seconds: Annotated[
        int | None, typer.Option(help="In each window of so long; left out: for ever.")
    ] = None,
    calls_per_minute: Annotated[int | None, typer.Option(help="So many at once, then evenly.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make an API key of an account, within the account's own limits; it is shown once."""
    limits = {
        "models": model or None,
        "surfaces": surface or None,
        "max_per_call": max_per_call,
        "budget": budget,
        "budget_seconds": budget_seconds,
        "calls_per_minute": calls_per_minute,
    }
    body = {"name": name, "expires_at": expires_at, "limits": limits}
    made = await connect(url, key).request(KeyView, "POST", f"/api/accounts/{account}/keys", body)
    show(made, as_json, _new_key)


@keys.command("list")
@command
async def list_keys(account: Id, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """The API keys of an account, without their secrets."""
    path = f"/api/accounts/{account}/keys"
    show(await connect(url, key).request(list[KeyFacts], "GET", path), as_json, _keys)


@keys.command("revoke")
@command
async def revoke_key(id_: KeyId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Revoke an API key: it opens nothing any more."""
    ended = await connect(url, key).request(KeyFacts, "DELETE", f"/api/keys/{id_}")
    show(ended, as_json, lambda k: _keys([k]))


@keys.command("rotate")
@command
async def rotate_key(
    id_: KeyId,
    grace_seconds: Annotated[int, typer.Option(help="For how long the old one stays valid.")] = 0,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Put a fresh API key in the place of one; it is shown once."""
    body = {"grace_seconds": grace_seconds}
    made = await connect(url, key).request(KeyView, "POST", f"/api/keys/{id_}/rotate", body)
    show(made, as_json, _new_key)


@policy.command("set")
@command
async def set_policy(
    account: Id,
    max_per_charge: Annotated[str | None, typer.Option(help="USD; 0 refuses every call.")] = None,
    max_per_window: Annotated[str | None, typer.Option(help="USD per window.")] = None,
    window_seconds: Annotated[int | None, typer.Option(help="Length of a window, at least 60.")] = None,
    expires_at: Annotated[
        int | None, typer.Option(help="Unix second from which nothing may be charged.")
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Set an account's limits, all of them: those not given are removed. They bind at once here, and soon on the chain."""
    body = {
        "max_per_charge": max_per_charge,
        "max_per_window": max_per_window,
        "window_seconds": window_seconds,
        "expires_at": expires_at,
    }
    try:
        PolicyBody.model_validate(body)
    except ValidationError as error:
        raise SettingsError(reason=first_problem(error)) from None
    show(
        await connect(url, key).request(AccountView, "PUT", f"/api/accounts/{account}/policy", body),
        as_json,
        _account,
    )


@policy.command("show")
@command
async def show_policy(account: Id, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """An account's limits: on the chain, and asked for."""
    found = await connect(url, key).request(AccountView, "GET", f"/api/accounts/{account}")
    show({name: found[name] for name in ("policy", "wanted_policy")}, as_json, _policies)


def _new_key(made: Any) -> Table:
    pairs = [(name, made[name]) for name in ("key", "id", "account")]
    return facts("API key (shown only now)", pairs)


def _keys(found: Any) -> Table:
    return table(
        ("name~", "id", "made", "valid until", "limits~"),
        (
            [key["name"], key["id"], _day(key["created_at"] // 1000), _ends(key), _key_limits(key)]
            for key in found
        ),
    )


def _key_limits(key: Any) -> str | None:
    limits = key["limits"]
    parts = [", ".join(limits[names]) for names in ("models", "surfaces") if limits[names] is not None]
    if limits["max_per_call"] is not None:
        parts.append(f"{limits['max_per_call']} USD a call")
    if limits["budget"] is not None:
        window = "" if limits["budget_seconds"] is None else f" in {limits['budget_seconds']} s"
        parts.append(f"{key['spent']} of {limits['budget']} USD spent{window}")
    if limits["calls_per_minute"] is not None:
        parts.append(f"{limits['calls_per_minute']} calls a minute")
    return "; ".join(parts) or None


def _ends(key: Any) -> str:
    if key["revoked_at"] is not None:
        return f"revoked {_day(key['revoked_at'] // 1000)}"
    return "for ever" if key["expires_at"] is None else _day(key["expires_at"])


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _policies(found: Any) -> Table:
    return facts(
        "Policy", [("on the chain", _limits(found["policy"])), ("asked for", _limits(found["wanted_policy"]))]
    )


def _limits(found: Any) -> str | None:
    if found is None:
        return None
    parts = []
    if found["max_per_charge"] is not None:
        parts.append(f"{found['max_per_charge']} USD per charge")
    if found["max_per_window"] is not None:
        parts.append(f"{found['max_per_window']} USD per {found['window_seconds']} s")
    if found["expires_at"] is not None:
        parts.append(f"until {found['expires_at']}")
    return ", ".join(parts) or "no limits"


def _forgotten(done: Any) -> Table:
    return facts(
        "Erased",
        [
            ("label", "yes" if done["label"] else "there was none"),
            ("API keys", done["keys"]),
            ("usage objects", f"{done['usage']} calls; their receipts keep the hash"),
            ("API key and words", f"{done['details']} calls"),
            ("idempotency keys", done["idempotency"]),
            ("stays here", "amounts, receipts (hashes, token counts, model), policies"),
            (
                "stays on the chain",
                "deposits, charges, exits, under a salted hash of the label: no chain forgets",
            ),
            ("stays elsewhere", "backups made before; keep them no longer than you may"),
            ("the same label again", "gives the same account on the chain, with its money and its history"),
        ],
    )


def _account(account: Any) -> Table:
    pairs = [
        ("id", account["id"]),
        ("owner", "the platform" if account["owner"] == ZERO_ADDRESS else account["owner"]),
        ("deposit address", account["deposit_address"]),
        ("balance", f"{account['balance']} USD on-chain"),
        ("available", f"{account['available']} USD"),
        ("held", f"{account['held']} USD"),
        ("unsettled", f"{account['unsettled']} USD"),
        ("policy", _limits(account["policy"])),
    ]
    if account["allowance"] is not None:
        pairs.append(
            ("owner's allowance", "{spent} of {cap} USD, until {expires_at}".format(**account["allowance"]))
        )
    if account["wanted_policy"] is not None:
        pairs.append(("policy asked for", _limits(account["wanted_policy"])))
    if "transaction" in account:
        pairs.append(("deposited by", account["transaction"]))
    return facts(account["label"] or "(label unknown)", pairs)


def _accounts(found: Any) -> Table:
    money = ("balance", "available", "held", "unsettled")
    return table(
        ("label~", *(f"{name}>" for name in money), "id"),
        ([account[name] for name in ("label", *money, "id")] for account in found),
    )


def _statement(found: Any) -> Table:
    lines = [
        (line["entry"], line["event"], _signed(line), line["block"], line["receipt_id"])
        for line in found["lines"]
    ]
    lines += [("", f"({call['status']})", f"-{call['cost']}", "", call["id"]) for call in found["unsettled"]]
    return table(("line>", "event", "USD>", "block>", "receipt"), lines)


def _signed(line: Any) -> str | None:
    return f"-{line['amount']}" if line["event"] in {"Charged", "AllocatedAway"} else line["amount"]
