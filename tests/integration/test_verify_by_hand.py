"""docs/verify-a-receipt.md, run as it stands there, against a receipt of a real call that is settled on a real chain."""

import asyncio
import json
import re
import shlex
from pathlib import Path

import pytest

from waterfall.money import parse_usd

PAGE = Path(__file__).parents[2] / "docs" / "verify-a-receipt.md"
STEPS = re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
BODY = {"model": "micro", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
DEPOSIT = 1_000_000


@pytest.fixture
async def receipt(client, tmp_path):
    """A settled call's receipt, and its request, in a folder."""
    account, key = await client.open_account(micro_usd=DEPOSIT)
    (tmp_path / "request.json").write_text(json.dumps(BODY))
    headers = {"Content-Type": "application/json"}
    request = (tmp_path / "request.json").read_bytes()
    await client.request("POST", "/v1/chat/completions", key=key, headers=headers, data=request)
    await client.settled(account["id"])
    (call,) = await client.calls(account)
    shown = await client.receipt(call["id"])
    (tmp_path / "receipt.json").write_text(json.dumps(shown))
    return shown


@pytest.fixture
def follow(net, tmp_path):
    """Does what the page says, step by step; what each printed, by its heading."""

    async def follow():
        script = ["set -euo pipefail", f"RPC={net.chain.rpc_url} VAULT={net.chain.vault}"]
        for heading, text in STEPS:
            script += [
                f"echo {shlex.quote(f'### {heading}')}",
                *re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL),
            ]
        shell = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            "\n".join(script),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await shell.communicate()
        assert shell.returncode == 0, err.decode()
        printed = re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", out.decode(), flags=re.MULTILINE | re.DOTALL)
        return {heading: text.splitlines() for heading, text in printed}

    return follow


async def test_page__followed_by_hand__proves_a_real_receipt(receipt, follow):
    printed = await follow()
    signed, digest = receipt["receipt"], receipt["receipt"]["digest"]

    assert list(printed) == [heading for heading, _ in STEPS]
    for_explorer, found_digest, signer, at_issue, now, used = printed["The vault's word"]
    assert (found_digest, signer.lower(), at_issue, now, used) == (
        digest,
        signed["meter"],
        "true",
        "true",
        "true",
    )
    fields, signature = for_explorer.removeprefix("for an explorer: ").split(" and ")
    units = str(parse_usd(signed["receipt"]["amount"]))
    expected = {**signed["receipt"], "amount": units, "complete": True}
    assert json.loads(fields) == [value if value is True else str(value) for value in expected.values()]
    assert signature == signed["signature"]
    verified, added_at, *ended = printed["The signature, without the vault"]
    assert "succeeded" in verified
    assert int(added_at.split()[0]) <= signed["receipt"]["issued_at"]
    assert ended == ["0", "0"]
    amount, _, receipt_hash, expected = printed["The charge"]
    assert (amount.split()[0], receipt_hash) == (units, digest)
    assert expected == f"expected: {units}, any line number, {digest}"
    assert printed["The amount"] == [f"recomputed {units} units; charged {units}"]
    for line in printed["What it commits to"]:
        assert re.fullmatch(r"(usage    |rate card|request  ) (0x[0-9a-f]{64}) = \2", line)
    assert len(printed["What it commits to"]) == 3


async def test_page__altered_receipt__shows(receipt, follow, tmp_path):
    signed = receipt["receipt"]
    signed["receipt"]["output_tokens"] += 1
    (tmp_path / "receipt.json").write_text(json.dumps(signed))
    printed = await follow()
    _, digest, signer, *_ = printed["The vault's word"]
    assert digest != signed["digest"]
    assert signer.lower() != signed["meter"]
    recomputed = printed["The amount"][0].split()
    assert recomputed[1] != recomputed[4]
