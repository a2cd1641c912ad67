"""The command line against what it does not expect: hostile text, strange servers, early signals, other owners."""

import io
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import typer
from making import ACCOUNT, VAULT, word
from rich.console import Console
from typer.testing import CliRunner

from waterfall.cli import funding, output
from waterfall.cli.api import Api
from waterfall.cli.app import app
from waterfall.cli.folder import Folder, Kept
from waterfall.cli.funding import DepositPending
from waterfall.cli.listening import listening
from waterfall.cli.output import plain, show_table, table
from waterfall.errors import SettingsError
from waterfall.types import ZERO_ADDRESS

NUMBERS = "0.000012345678"
VIEW = {
    **dict.fromkeys(("balance", "available", "held", "unsettled"), NUMBERS),
    "id": ACCOUNT,
    "label": "ada",
    "owner": ZERO_ADDRESS,
    "label_hash": word("label"),
    "deposit_address": VAULT,
    "pending": "0.00",
    "policy": {},
    "wanted_policy": None,
    "allowance": None,
    "exit": None,
    "created_at": 1,
}
STATEMENT = {"account": ACCOUNT, "lines": [], "unsettled": []}


@pytest.fixture
def server():
    """A real server that answers everything the same: set `status` and `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(served.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(served.body)))
            self.end_headers()
            self.wfile.write(served.body)

        do_POST = do_GET  # noqa: N815 - the library's name

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as served:
        served.status, served.url = 200, f"http://127.0.0.1:{served.server_port}"
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


@pytest.fixture
def terminal(monkeypatch):
    """What commands print, on a terminal this wide."""

    def of(width):
        console = Console(file=io.StringIO(), width=width)
        monkeypatch.setattr(output, "out", console)
        return console.file

    return of


def run(*arguments):
    """A command's exit code and what it printed; nothing may escape it."""
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done.exit_code, done.output


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("[/x] [bold]a", "[/x] [bold]a"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("two\nlines", "two\\nlines"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        ("Ada Löwe 模型", "Ada Löwe 模型"),
        (None, "–"),
        (5, "5"),
    ],
)
def test_plain__any_value__is_shown_and_steers_nothing(value, shown):
    assert plain(value).plain == shown


@pytest.mark.parametrize("label", ["[/x]", "[bold]", "\x1b[2J"])
@pytest.mark.parametrize("command", [("accounts", "list"), ("accounts", "create", "x")])
def test_command__hostile_label__is_printed_as_it_is(server, terminal, label, command):
    printed = terminal(140)
    view = {**VIEW, "label": label}
    server.body = json.dumps([view] if command[1] == "list" else view).encode()
    assert run(*command, "--url", server.url, "--key", "k") == (0, "")
    assert plain(label).plain in printed.getvalue()
    assert "\x1b" not in printed.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120, 160])
def test_accounts_list__any_width__amounts_and_ids_are_whole(server, terminal, width):
    printed = terminal(width)
    server.body = json.dumps([VIEW]).encode()
    assert run("accounts", "list", "--url", server.url, "--key", "k")[0] == 0
    assert printed.getvalue().count(NUMBERS) == 4
    assert ACCOUNT in printed.getvalue()


def test_show_table__narrow__only_columns_that_may_wrap_do(terminal):
    printed = terminal(20)
    show_table(table(("name~", "id"), [("several words of text", "0123456789")]))
    assert [line.split() for line in printed.getvalue().splitlines()] == [
        ["name", "id"],
        ["several", "0123456789"],
        ["words", "of"],
        ["text"],
    ]


# ── Servers that are no gateway ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b'{"detail": "Not Found"}'),
        (500, b'{"error": "x"}'),
        (500, b'{"error": null}'),
        (500, b"[]"),
        (200, b"null"),
        (200, b"[]"),
        (200, b"{}"),
        (200, b"5"),
        (200, b"<html>"),
        (200, b'"\xff\xfe"'),
        pytest.param(200, b"[" * 100_000, id="deep"),
        (200, b""),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ("accounts", "show", ACCOUNT),
        ("accounts", "statement", ACCOUNT),
        ("accounts", "fund", ACCOUNT, "1"),
        ("keys", "create", ACCOUNT),
        ("policy", "show", ACCOUNT),
        ("receipts", "show", "ab"),
    ],
)
def test_command__another_server__says_so_in_one_line(server, status, body, command):
    server.status, server.body = status, body
    code, printed = run(*command, "--url", server.url, "--key", "k")
    assert (code, printed.count("\n")) == (1, 1)
    assert f"{server.url} does not answer like a gateway: " in printed


def test_command__key_that_no_header_carries__says_so():
    code, printed = run("accounts", "list", "--url", "http://127.0.0.1:1", "--key", "a\nb")
    assert (code, "The key" in printed) == (1, True)


def test_command__failure_nobody_foresaw__is_one_line_that_names_the_traceback(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(funding, "deposit", None)

    @output.command
    async def broken() -> None:
        await funding.deposit()

    with pytest.raises(typer.Exit) as ended:
        broken()
    assert ended.value.exit_code == 1
    said = capsys.readouterr().err
    assert said.startswith("Waterfall failed, TypeError: ")
    assert str(tmp_path) in said
    (log,) = tmp_path.iterdir()
    assert "TypeError" in log.read_text()


async def test_wait_for_deposit__not_final_in_time__names_the_transaction(server):
    server.body = json.dumps(STATEMENT).encode()
    with pytest.raises(DepositPending, match=f"The deposit {word('tx')} is on the chain"):
        await funding.wait_for_deposit(Api(server.url, "k"), ACCOUNT, word("tx"), patience_seconds=0.05)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--max-per-charge", "99999999999999"),
            "max_per_charge: must be from 0.00 to 1208925819614.629174706175 USD",
        ),
        (("--max-per-window", "1"), "window_seconds: must be given if, and only if, max_per_window is"),
        (("--max-per-charge", "-1"), "max_per_charge: must be from 0.00 to 1208925819614.629174706175 USD"),
    ],
)
def test_policy__impossible__says_what_is_possible(arguments, says):
    code, printed = run("policy", "set", ACCOUNT, *arguments, "--url", "http://127.0.0.1:1", "--key", "k")
    assert code == 1
    assert says in printed
    assert "Value error" not in printed


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("[" * 5_000, id="deep"),
        '{"status": "x"}',
        "null",
        "",
        "[/x]",
        "\ufeff{}",
        '{"id": "[/x]\\u001b"}',
        pytest.param("1" * 5_000, id="long"),
    ],
)
def test_receipts_verify__file_with_something_else__is_one_line(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    dev_json(tmp_path, model=None)
    (tmp_path / "r.json").write_text(content)
    code, printed = run("receipts", "verify", "r.json")
    assert (code, printed.count("\n")) == (1, 1)
    assert printed.startswith("The receipt does not hold: ")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"gateway_url": 5}', "\x00"])
def test_dev_file__damaged__is_named(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".waterfall").mkdir()
    (tmp_path / ".waterfall/dev.json").write_text(content)
    code, printed = run("accounts", "list")
    assert (code, printed.count("\n")) == (1, 1)
    assert printed.startswith(".waterfall/dev.json is damaged: ")


def dev_json(folder, **changed):
    names = ("gateway_url", "rpc_url", "vault", "token", "platform", "admin_key", "account", "account_key")
    content = {**dict.fromkeys(names, "http://127.0.0.1:1"), "chain_id": 1, **changed}
    (folder / ".waterfall").mkdir()
    (folder / ".waterfall/dev.json").write_text(json.dumps(content))


def test_owned__twice__second_is_refused_before_it_deletes(tmp_path):
    folder = Folder(tmp_path / "f")
    with folder.owned():
        (tmp_path / "f/chain.json").touch()
        with (
            pytest.raises(SettingsError, match=r"process \d+ is using"),
            Folder(folder.path).owned(fresh=True),
        ):
            pass
        assert (tmp_path / "f/chain.json").exists()
    with folder.owned(fresh=True):
        assert not (tmp_path / "f/chain.json").exists()


def test_clear__ledger_elsewhere__goes_and_folders_stay(tmp_path):
    folder, ledger = Folder(tmp_path / "f"), tmp_path / "own.db"
    (tmp_path / "f/demo").mkdir(parents=True)
    ledger.touch()
    with folder.owned():
        folder.keep(Kept(admin_key="a", account_key="b", database=f"sqlite:///{ledger}"))
        folder.clear()
        assert not ledger.exists()
        assert folder.kept() is None
        assert (tmp_path / "f/demo").exists()


# ── Before the command ───────────────────────────────────────────────────────────────────────────────


def python(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def test_main__without_the_server_extra__says_what_to_install():
    done = python("import sys; sys.modules['typer'] = None; from waterfall.cli import main; main()")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "pip install 'waterfall-credits[server]'" in done.stderr


def test_main__ctrl_c_while_importing__ends_quietly():
    done = python("""
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from waterfall.cli import main
main()
""")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# ── Where the gateway listens ────────────────────────────────────────────────────────────────────────


def test_listen__port_in_use__names_the_port():
    with listening("gateway", "127.0.0.1", 0) as other:
        other.listen()
        with pytest.raises(SettingsError) as refusal, listening("gateway", *other.getsockname()):
            pass
    assert refusal.value.message.startswith("gateway.port: ")
    assert refusal.value.message.endswith("port 0 takes a free one")


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no.such.host.invalid"])
def test_listen__address_of_another__names_the_host(host):
    with pytest.raises(SettingsError, match=r"metrics\.host: .* cannot be listened on: \w+"):
        listening("metrics", host, 0).__enter__()


# ── Help ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "command",
    [
        ("accounts", "fund"),
        ("accounts", "list"),
        ("keys", "create"),
        ("receipts", "verify"),
        ("rebuild",),
        ("dev",),
        ("serve",),
    ],
    ids=" ".join,
)
def test_help__any_command__has_lost_no_word_to_markup(command):
    code, printed = run(*command, "--help")
    assert code == 0
    assert re.search(r" \.\s|\(\)", printed) is None


def test_receipts_verify__no_chain_named__asks_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text("{}")
    for given in ((), ("--url", "http://127.0.0.1:1", "--key", "wf_x"), ("--rpc", "http://127.0.0.1:1")):
        code, printed = run("receipts", "verify", "r.json", *given)
        assert (code, printed.count("\n")) == (1, 1)
        assert "--rpc URL and --vault" in printed
