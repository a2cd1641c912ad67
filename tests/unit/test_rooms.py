"""Who may import whom: a room imports only rooms above it, and each dependency has its room."""

import ast
import sys
from pathlib import Path

import pytest

import waterfall

PACKAGE = Path(waterfall.__file__).parent

# From the vocabulary down to the command line; each may import what stands before it.
ROOMS = [
    *("keccak", "money", "errors", "types"),  # the vocabulary
    *("failpoints", "metrics", "signers", "receipts", "metering", "chain", "ledger", "settlement"),
    *("gateway", "x402", "console", "sdk", "devnet", "settings", "torture", "cli"),
]
VOCABULARY = {"keccak", "money", "errors", "types"}
ONLY = {"sdk": VOCABULARY | {"receipts"}}
NEVER = {"settlement": {"metering"}, "gateway": {"chain"}}
# Libraries with a room of their own; cli may import everything.
LIBRARIES = {
    "web3": {"chain"},
    "sqlalchemy": {"ledger"},
    "sqlite3": {"ledger", "torture"},  # torture gets in the ledger's way, as other programs might
    "alembic": {"ledger"},
    "psycopg": {"ledger", "torture"},
    "boto3": {"signers"},
    "prometheus_client": {"metrics"},
    "genai_prices": {"metering"},
    "aiohttp": {"chain", "gateway", "x402", "devnet", "torture"},
    "opentelemetry": {"gateway"},
    "fastapi": {"gateway", "x402", "console"},
    "starlette": {"gateway", "x402", "console"},
}
# What these import when they are imported, the SDK has to install: nothing heavier.
LIGHT = VOCABULARY | {"signers", "receipts", "sdk"}
LIGHT_LIBRARIES = {"coincurve", "eth_hash", "pydantic", "rfc8785"}


def violations(package):
    """Every import that breaks a rule, as `file:line: rule`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        room = parts[0]
        if room not in ROOMS:
            found.append(f"{path}:1: {room} has no place in the order of rooms")
            continue
        tree = ast.parse(path.read_text(), str(path))
        at_import = {id(node) for node in top_level(tree)}
        for node in ast.walk(tree):
            for library, other in imported(node, package.name, parts):
                rule = broken(room, library, other, at_import=id(node) in at_import, package=package.name)
                if rule is not None:
                    found.append(f"{path}:{node.lineno}: {rule}")
    return found


def top_level(tree):
    """The statements that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from top_level(node)


def imported(node, package, parts):
    """Library and room of everything that a statement imports; the room is None outside our package."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if node.level:
            here = (package, *parts)[: -node.level]
            module = ".".join((*here, module)).rstrip(".")
        names = [f"{module}.{alias.name}" for alias in node.names] if module == package else [module]
    else:
        return
    for name in names:
        library, _, rest = name.partition(".")
        room = rest.partition(".")[0] if library == package else None
        yield library, room if room in ROOMS or room is None else ""


def broken(room, library, other, *, at_import, package):
    """The rule that an import breaks, or None."""
    if library == package:
        return broken_between_rooms(room, other)
    if room in LIGHT and at_import and library not in LIGHT_LIBRARIES | sys.stdlib_module_names:
        return f"{room} is part of what the SDK installs, which goes without {library}"
    allowed = LIBRARIES.get(library)
    if allowed is not None and room not in allowed | {"cli"}:
        return f"{room} may not import {library}: only {', '.join(sorted(allowed))}"
    return None


def broken_between_rooms(room, other):
    if other in {"", room} or room == "cli":
        return None
    if room in ONLY and other not in ONLY[room]:
        return f"{room} may import only {', '.join(sorted(ONLY[room]))}, not {other}"
    if other in NEVER.get(room, ()):
        return f"{room} never imports {other}"
    if ROOMS.index(other) > ROOMS.index(room):
        return f"{room} imports {other}, which is below it"
    return None


def test_rooms__whole_package__import_only_rooms_above():
    found = violations(PACKAGE)
    assert not found, "\n" + "\n".join(found)


def test_rooms__package__is_read_at_all():
    assert len(list(PACKAGE.rglob("*.py"))) > 40
    assert {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()} >= {
        "money",
        "ledger",
        "cli",
    }


# ── The checker itself ───────────────────────────────────────────────────────────────────────────────


def module(tmp_path, path, text):
    file = tmp_path / "waterfall" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return tmp_path / "waterfall"


@pytest.mark.parametrize(
    ("path", "text", "rule"),
    [
        ("money.py", "\nfrom waterfall.types import Usage", "2: money imports types, which is below it"),
        ("chain/a.py", "import waterfall.ledger.store", "1: chain imports ledger, which is below it"),
        ("chain/a.py", "from waterfall import ledger", "1: chain imports ledger, which is below it"),
        ("chain/a.py", "from waterfall import __version__, ledger", "1: chain imports ledger"),
        ("chain/a.py", "from ..ledger import store", "1: chain imports ledger, which is below it"),
        ("chain/a.py", "from .. import ledger", "1: chain imports ledger, which is below it"),
        ("chain/a.py", "def f():\n    import waterfall.cli", "2: chain imports cli, which is below it"),
        ("ledger/a.py", "if x:\n  from waterfall.gateway import app", "2: ledger imports gateway"),
        ("settlement/a.py", "from waterfall.metering import prices", "1: settlement never imports metering"),
        ("gateway/a.py", "from waterfall.chain.rpc import Rpc", "1: gateway never imports chain"),
        ("sdk/a.py", "from waterfall.signers import Signer", "1: sdk may import only"),
        ("sdk/a.py", "from waterfall.gateway import app", "1: sdk may import only"),
        ("sdk/a.py", "import web3", "1: sdk is part of what the SDK installs, which goes without web3"),
        ("receipts.py", "import orjson", "1: receipts is part of what the SDK installs"),
        ("gateway/a.py", "import sqlalchemy as sa", "1: gateway may not import sqlalchemy: only ledger"),
        ("settlement/a.py", "from web3.types import X", "1: settlement may not import web3: only chain"),
        ("settlement/a.py", "import aiohttp", "1: settlement may not import aiohttp"),
        ("utils.py", "", "1: utils has no place in the order of rooms"),
    ],
)
def test_violations__import_against_a_rule__names_file_line_and_rule(tmp_path, path, text, rule):
    (found,) = violations(module(tmp_path, path, text))
    assert found.startswith(f"{tmp_path / 'waterfall' / path}:{rule}")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("__init__.py", "import anything"),
        ("types.py", "from waterfall.money import Usd\nimport pydantic, re"),
        ("signers.py", "def f():\n    from eth_account import Account"),
        ("chain/a.py", "from waterfall.chain.rpc import Rpc\nfrom . import rpc\nfrom .rpc import Rpc"),
        ("chain/a.py", "from waterfall import __version__\nimport web3\nimport eth_abi"),
        ("gateway/a.py", "from waterfall.ledger.store import Ledger\nimport aiohttp"),
        ("sdk/a.py", "from waterfall.receipts import Domain\nfrom waterfall.money import Usd\nimport json"),
        ("cli/a.py", "from waterfall.chain import rpc\nimport sqlalchemy\nimport web3"),
    ],
)
def test_violations__import_by_the_rules__is_none(tmp_path, path, text):
    assert violations(module(tmp_path, path, text)) == []
