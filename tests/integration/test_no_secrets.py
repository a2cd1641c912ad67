"""Nothing that the service writes anywhere holds a secret, however calls go: log, output, database, answers."""

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import structlog
from eth_account import Account
from service import MICRO, Client, Net, running
from upstream import ScriptedUpstream, answer, answers, stalls, stream_chunks, streams, writes

from waterfall.settings import load

WATERFALL = Path(sys.executable).with_name("waterfall")
# The keys of anvil's first accounts; the meter's is in a keystore.
METER_KEY = bytes.fromhex("59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d")
GAS_KEY = bytes.fromhex("5de4111afa1a4b94908f83103eb1f1706367c2e68ca870fc3fb9a804cdab365a")
OWNER_KEY = bytes.fromhex("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")
TEXTS = {
    "WATERFALL_KEYSTORE_PASSWORD": "pw-9fJq2LhXc7Rt-keystore-Vb4Ns8Ym",
    "WATERFALL_LABEL_SALT": "salt-Qe5Wz1Kd6Gp-labels-Uo3Ta0Ix",
    "WATERFALL_ADMIN_KEY": "wf_Hy7Bn4Mv2Cs-admin-Ej8Fl5Dk1Z",
    "UPSTREAM_KEY": "sk-Rw6Pg3Lx9Sa-upstream-Ni0Ov4Tb",
}
ENVIRONMENT = {"WATERFALL_GAS_KEY": "0x" + GAS_KEY.hex(), "WATERFALL_OWNER_KEY": OWNER_KEY.hex(), **TEXTS}
# What is shown of a long text is often its ends.
_ENOUGH = 14
RPC_KEY = "Yc2Hd8Kf5Zj-project-Mq1Wr7Ge"


def forms(secret: bytes) -> set[bytes]:
    """A secret as it is, in hex, base64, as Python shows bytes and as a number; each also cut off at either end."""
    number = str(int.from_bytes(secret, "big")).encode()
    triples = secret[: len(secret) // 3 * 3]  # whose base64 is the same whatever follows
    whole = {
        *(secret, secret.hex().encode(), secret.hex().upper().encode(), number, repr(secret)[2:-1].encode()),
        *(encode(triples) for encode in (base64.b64encode, base64.urlsafe_b64encode)),
    }
    return whole | {form[:_ENOUGH] for form in whole} | {form[-_ENOUGH:] for form in whole}


SECRETS = {
    "meter key": forms(METER_KEY),
    "gas key": forms(GAS_KEY),
    "owner key": forms(OWNER_KEY),
    **{name: forms(text.encode()) for name, text in TEXTS.items()},
}


def leaks(written: bytes, more: dict[str, set[bytes]] | None = None) -> list[str]:
    """Which secrets are in what was written."""
    return sorted(
        name for name, forms in {**SECRETS, **(more or {})}.items() if any(f in written for f in forms)
    )


def write_config(folder: Path, net: Net, upstream: ScriptedUpstream) -> Path:
    (folder / "meter.json").write_text(
        json.dumps(
            Account.encrypt(METER_KEY, TEXTS["WATERFALL_KEYSTORE_PASSWORD"], kdf="pbkdf2", iterations=2)
        )
    )
    config = folder / "waterfall.toml"
    config.write_text(
        f"""
database = "sqlite:///{folder / "waterfall.db"}"
[gateway]
port = 0
[chain]
rpc_url = "{net.anvil.rpc_url}/?key={RPC_KEY}"
chain_id = {net.chain.chain_id}
vault = "{net.chain.vault}"
platform = {net.chain.platform}
finality = "latest"
poll_seconds = 0.02
[keys]
meter = "keystore:{folder / "meter.json"}"
owner = "env:WATERFALL_OWNER_KEY"
[upstreams.local]
kind = "openai"
base_url = "{upstream.base_url}"
api_key_env = "UPSTREAM_KEY"
timeout_seconds = 0.3
[upstreams.gone]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"
api_key_env = "UPSTREAM_KEY"
"""
        + "".join(
            f"[models.{name}]\nupstream = {upstream!r}\n"
            f'input_usd_per_mtok = "{MICRO["input_usd_per_mtok"]}"\n'
            f'output_usd_per_mtok = "{MICRO["output_usd_per_mtok"]}"\n'
            for name, upstream in {"micro": "local", "gone": "gone"}.items()
        )
    )
    return config


BEHAVIOURS = {
    "refuses our key and repeats it": answers(
        {"error": {"message": f"Incorrect API key provided: {TEXTS['UPSTREAM_KEY']}"}}, status=401
    ),
    "refuses the request": answers({"error": {"message": "no such field"}}, status=400),
    "fails": answers(b"<html>oops</html>", status=500, content_type="text/html"),
    "fails in between": answers({"error": {"message": "bad gateway"}}, status=502),
    "redirects": answers(b"", status=307, headers={"Location": "http://127.0.0.1:9/"}),
    "does not speak HTTP": writes(b"NOT HTTP AT ALL\r\n\r\n"),
    "sends a header that is none": writes(b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n"),
    "sends no JSON": answers(b"not json"),
    "reports no usage": answers({"choices": []}),
    "breaks off": answers(b'{"usage"', end="closed"),
    "stalls": stalls,
    "breaks its stream off": streams(lambda body: stream_chunks(body)[:2], end="reset"),
}


class Recording(Client):
    """Keeps every answer."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.answers: list[bytes] = []

    async def request(self, method, path, *, key=TEXTS["WATERFALL_ADMIN_KEY"], headers=None, **options):
        sent = {"Authorization": f"Bearer {key}", **(headers or {})}
        async with self.session.request(method, self.url + path, headers=sent, **options) as response:
            raw = b""
            with contextlib.suppress(aiohttp.ClientPayloadError):
                raw = await response.read()
        self.answers.append(repr(response.raw_headers).encode() + raw)
        is_json = response.content_type == "application/json"
        return response.status, json.loads(raw) if is_json and raw else raw.decode(), response.headers


async def use(client: Recording, net: Net, upstream: ScriptedUpstream) -> str:
    """Everything that the service does, done well and done badly; the key of the account it was done with."""
    account, key = await client.open_account("ada", micro_usd=1_000_000)
    made = [kept for kept in client.answers if key.encode() in kept]
    assert len(made) == 1, "a key is shown once"
    client.answers.remove(made[0])
    _, poor_key = await client.open_account("poor")
    client.answers = [kept for kept in client.answers if poor_key.encode() not in kept]

    status, _, headers = await client.chat(key)
    assert status == 200
    assert upstream.headers[-1]["Authorization"] == f"Bearer {TEXTS['UPSTREAM_KEY']}"
    assert (await client.chat(key, stream=True))[0] == 200
    await client.request("PUT", f"/api/accounts/{account['id']}/policy", json={"max_per_charge": "0.5"})
    await client.until(account["id"], lambda a: a["wanted_policy"] is None)
    await client.settled(account["id"])

    refused = [await client.chat(wrong) for wrong in ("wf_wrong", key + "x", TEXTS["UPSTREAM_KEY"])]
    refused.append(await client.chat(poor_key))
    refused.append(await client.chat(key, model="absent"))
    refused.append(await client.chat(key, model="gone"))
    refused.append(await client.chat(key, n_predict=5))
    refused.append(await client.request("GET", "/api/accounts", key=key))
    refused.append(await client.request("POST", "/v1/chat/completions", key=key, data=b"{"))
    refused.append(await client.request("POST", "/v1/absent", key=key, json={}))
    refused.append(await client.request("POST", "/api/accounts", json={"label": "ada"}))
    refused.append(await client.request("POST", "/api/accounts", data=b"\xff"))
    for status, body, _ in refused:
        assert status >= 400, body
    for behaviour in BEHAVIOURS.values():
        upstream.behaviour = behaviour
        assert (await client.chat(key))[0] >= 400
        await client.chat(key, stream=True)
    upstream.behaviour = answer

    receipt = headers["X-Waterfall-Receipt-Id"]
    for path in (
        *("/healthz", "/openapi.json", "/v1/models", "/metrics", "/docs"),
        *("/api/accounts", "/api/calls?limit=1000", "/api/totals", f"/api/receipts/{receipt}"),
        *(f"/api/accounts/{account['id']}{part}" for part in ("", "/statement", "/keys")),
    ):
        await client.request("GET", path)
    return key


async def lose_the_chain(client: Recording, net: Net, key: str) -> None:
    """The chain goes away, and the service goes on for a while."""
    await net.anvil.stop()
    for _ in range(20):
        await asyncio.sleep(0.02)
        await client.chat(key)
        await client.request("GET", "/healthz")


@pytest.fixture
def config(net, upstream, tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return write_config(tmp_path, net, upstream)


@contextlib.asynccontextmanager
async def served(config: Path, output: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """`waterfall serve` as a process, with all that it prints in a file; and where it serves."""
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            WATERFALL, "serve", "--config", config, stdout=file, stderr=file, env=os.environ
        )
    try:
        async with asyncio.timeout(30):
            while not (found := re.search(r"at (http://\S+)", output.read_text())):
                assert process.returncode is None, output.read_text()
                await asyncio.sleep(0.05)
        yield process, found.group(1)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                await process.wait()


def test_leaks__every_secret_in_every_form__is_seen():
    for name, spelt in SECRETS.items():
        for form in spelt:
            assert leaks(b"\0before " + form + b" after") == [name]
    for text in TEXTS.values():
        assert leaks(base64.b64encode(text.encode()))


async def test_service__used_and_misused__writes_no_secret_anywhere(net, upstream, config, tmp_path):
    output = tmp_path / "output"
    async with served(config, output) as (process, url), aiohttp.ClientSession() as session:
        client = Recording(url, None, net, session)
        key = await use(client, net, upstream)
        await lose_the_chain(client, net, key)
        # While it runs, so that what is on its way into the database is looked at, too.
        files = {file.name: file.read_bytes() for file in tmp_path.glob("waterfall.db*")}
        process.kill()
        await process.wait()
    files |= {f"{file.name} afterwards": file.read_bytes() for file in tmp_path.glob("waterfall.db*")}
    account_key = {"account key": forms(key.encode()), "rpc key": forms(RPC_KEY.encode())}

    said = output.read_bytes()
    assert b"upstream broke off" in said, "the log is not there"
    assert b"will be tried again" in said
    assert leaks(said, account_key) == []
    assert {"waterfall.db", "waterfall.db-wal"} <= set(files)
    assert b"ada" in b"".join(files.values()), "the database is not there"
    for name, content in files.items():
        assert leaks(content, account_key) == [], name
    assert len(client.answers) > 60
    for kept in client.answers:
        assert leaks(kept, account_key) == [], kept


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"WATERFALL_GAS_KEY": OWNER_KEY.hex()}, "keys.gas and keys.owner are the same key"),
        ({"WATERFALL_GAS_KEY": METER_KEY.hex()}, "keys.meter and keys.gas are the same key"),
        ({"WATERFALL_OWNER_KEY": "77" * 32}, "keys.owner: the platform's owner is"),
        ({"WATERFALL_OWNER_KEY": OWNER_KEY.hex()[:-1]}, "does not hold a private key"),
        ({"WATERFALL_KEYSTORE_PASSWORD": TEXTS["WATERFALL_KEYSTORE_PASSWORD"] + "?"}, "cannot be opened"),
        ({"WATERFALL_ADMIN_KEY": ""}, "WATERFALL_ADMIN_KEY is not set"),
    ],
)
async def test_service__that_cannot_start__says_why_without_a_secret(config, change, problem):
    process = await asyncio.create_subprocess_exec(
        *(WATERFALL, "serve", "--config", config),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **change},
    )
    said, _ = await process.communicate()
    assert process.returncode == 1
    assert problem in said.decode()
    assert said.count(b"\n") == 1
    more = {
        "rpc key": forms(RPC_KEY.encode()),
        "changed": {value.encode() for value in change.values() if value},
    }
    assert leaks(said, more) == []


@pytest.fixture
def events():
    """What is logged, before it is rendered."""
    before = structlog.get_config()
    structlog.reset_defaults()  # the unit tests log nothing
    with structlog.testing.capture_logs() as captured:
        yield captured
    structlog.configure(**before)


async def test_events__before_anything_is_concealed__hold_no_secret(net, upstream, config, events):
    """The filter is the last line of defence: nothing should ever reach it."""
    async with running(net, load(config)) as inner:
        await inner.ledger.keys.set_platform_key(TEXTS["WATERFALL_ADMIN_KEY"], "admin")
        client = Recording(inner.url, inner.ledger, net, inner.session)
        key = await use(client, net, upstream)
        await lose_the_chain(client, net, key)
    assert "upstream broke off" in {event["event"] for event in events}
    assert leaks(repr(events).encode(), {"account key": forms(key.encode())}) == []
