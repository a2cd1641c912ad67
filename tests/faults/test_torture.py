"""Torture ends with equal books, and would say so if they were not."""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import sqlite3
import sys
import time

import pytest
import sqlalchemy as sa

from waterfall.chain import vault as calls
from waterfall.chain.transactions import transact
from waterfall.devnet import deploy
from waterfall.errors import SettingsError
from waterfall.receipts import Domain, settlement_digest
from waterfall.torture.calls import Callers
from waterfall.torture.check import Evidence, examine
from waterfall.torture.people import People
from waterfall.torture.run import _drain
from waterfall.torture.world import World
from waterfall.types import Charge

WATERFALL = "from waterfall.cli import main; main()"


async def torture(*arguments):
    """The command's exit code, its JSON, and what it said beside."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WATERFALL, "torture", "--json", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200"},
    )
    out, err = await process.communicate()
    return process.returncode, json.loads(out) if out else None, err.decode()


@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.all_faults)], indirect=True
)
async def test_torture__faults_every_second__books_are_equal_and_it_exits_0(tmp_path, database):
    code, outcome, said = await torture(
        *("--minutes", "0.35", "--every", "1.5", "--rate", "12", "--seed", "11", "--keep", tmp_path / "run"),
        *("--database", database),
    )
    assert (code, outcome["differences"]) == (0, []), said
    assert outcome["equal"]
    assert outcome["drained_in"] is not None
    assert outcome["calls"]["answered"] > 30
    assert sum(outcome["faults"].values()) >= 8
    assert outcome["charged"] >= outcome["calls"]["answered"]
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["seed"] == 11


async def test_world__database_with_something_in_it__is_not_touched(tmp_path, database):
    engine = sa.create_engine(database.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE mine (it INTEGER)"))
    engine.dispose()
    with pytest.raises(SettingsError, match="not empty"):
        async with World(tmp_path / "run", database):
            pass


# ── The check itself ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def seen(tmp_path):
    """Evidence of some seconds of load without a fault, when everything is at rest."""
    async with World(tmp_path / "run", f"sqlite:///{tmp_path}/waterfall.db") as world:
        people = People(world, 1, random.Random(1))  # noqa: S311
        payers = await people.open(4)
        callers = Callers(world, payers, 40, 20, random.Random(2))  # noqa: S311
        await callers.run(asyncio.get_running_loop().time() + 4)
        assert await _drain(world, callers) is not None
        await people.leave()
        assert await _drain(world, callers) is not None
        yield Evidence(world.vault, world.deployment, world.database, payers, callers.calls, world.upstream)


def tampered(evidence, tmp_path, statement):
    """The same with a copy of the database in which this was done."""
    file = tmp_path / f"tampered-{time.monotonic_ns()}.db"
    with (
        contextlib.closing(sqlite3.connect(evidence.database.removeprefix("sqlite:///"))) as source,
        contextlib.closing(sqlite3.connect(file)) as copy,
    ):
        source.backup(copy)
        assert copy.execute(statement.format(one=ONE)).rowcount > 0, statement
        copy.commit()
    return dataclasses.replace(evidence, database=f"sqlite:///{file}")


# {one}: a charge that is on the chain
TAMPERING = {
    "an amount": "UPDATE charges SET amount = '1' WHERE {one}",
    "a charge that is gone": "DELETE FROM charges WHERE {one}",
    "another's receipt": "UPDATE charges SET receipt = (SELECT receipt FROM charges ORDER BY sequence DESC LIMIT 1) WHERE {one}",
    "a charge still queued": "UPDATE charges SET state = 'queued' WHERE {one}",
    "an open hold": "UPDATE holds SET state = 'held' WHERE {one}",
    "a call lost without a reason": "UPDATE holds SET state = 'lost', reason = NULL WHERE {one}",
    "a balance": "UPDATE wallets SET balance = '1'",
    "an event": "DELETE FROM events WHERE name = 'Charged'",
    "what is held": "UPDATE wallets SET held = '5'",
}
ONE = "sequence = (SELECT sequence FROM charges WHERE state IN ('settled', 'final') LIMIT 1)"


async def test_examine__books_and_evidence_that_were_changed__each_change_is_found(seen, tmp_path):
    assert (await examine(seen)).differences == []
    missed = [
        name
        for name, statement in TAMPERING.items()
        if not (await examine(tampered(seen, tmp_path, statement))).differences
    ]
    assert missed == []

    async def found(**changed):
        return (await examine(dataclasses.replace(seen, **changed))).differences

    answered = next(call for call in seen.calls if call.is_answered and call.kind == "whole")
    others = [call for call in seen.calls if call is not answered]
    assert any("nobody sent" in one for one in await found(calls=others))
    unheard = dataclasses.replace(answered, number=10**6, request_hash="0x" + "ab" * 32)
    assert any("answered and not charged" in one for one in await found(calls=[*seen.calls, unheard]))
    other = dataclasses.replace(answered, receipt="another")
    assert any("under another" in one for one in await found(calls=[*others, other]))
    cheaper = dataclasses.replace(answered, most_tokens=answered.most_tokens + 1000)
    assert any("where it used" in one for one in await found(calls=[*others, cheaper]))

    seen.upstream.started[answered.number] += 1
    assert any("sent to the provider 2 times" in one for one in await found())
    seen.upstream.started[answered.number] -= 1
    ran = dict.fromkeys(range(10**6, 10**6 + 500), 1)
    seen.upstream.started.update(ran)
    assert any("calls that the provider ran were not charged" in one for one in await found())
    seen.upstream.refused.update(ran)
    assert not any("provider ran" in one for one in await found())
    for number in ran:
        del seen.upstream.started[number]

    # A charge that somebody else makes on the chain with the meter's key.
    platform, payer = seen.deployment.platform, seen.payers[0]
    charge = Charge(account=payer.id, id=7, amount=10**6, receipt_hash="0x" + "cd" * 32)
    now = int((await seen.vault.rpc.call("eth_getBlockByNumber", "latest", False))["timestamp"], 16)
    domain = Domain(await chain_id(seen), seen.deployment.vault)
    signature = deploy.METER.sign(settlement_digest(domain, platform, [charge], now + 600))
    payload = calls.settle(platform, [charge], now + 600, signature)
    await transact(seen.vault.rpc, deploy.FAUCET, seen.deployment.vault, payload)
    differences = await found()
    assert any("charge 7 is on the chain, and not in the journal" in one for one in differences)
    assert any(f"account {payer.label} has" in one for one in differences)


async def chain_id(seen):
    return int(await seen.vault.rpc.call("eth_chainId"), 16)
