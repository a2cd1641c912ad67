"""The running service as processes, calls to it that go on, and what every fault has to leave behind: the same check."""

import asyncio
import contextlib
import itertools
import json
import os
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import sqlalchemy as sa
from processes import ADMIN_KEY, Served, served, write_config
from service import Client, Net
from upstream import ScriptedUpstream

from waterfall.chain.events import Charged, Deposited
from waterfall.ledger import schema
from waterfall.ledger.journal import charge_id
from waterfall.ledger.snapshot import snapshot
from waterfall.receipts import bytes_hash
from waterfall.settlement.reconcile import reconcile
from waterfall.types import UsageReceipt

ALL = "WATERFALL_ALL_FAULTS" in os.environ
"""Faults at their full size, not the sample of them that fits into all tests: `make faults`."""
SEED = int(os.environ.get("WATERFALL_FAULT_SEED", "1"))
DRAIN_SECONDS = 90
"""Within which everything settles by itself; far more than it takes, as many tests share a machine."""
CALL = 17 * 10**6
"""Credit units of one call."""
_numbers = itertools.count(1)


@dataclass
class Caller:
    """One account's client: makes calls, and keeps what it sent and what became of it."""

    session: aiohttp.ClientSession = field(repr=False)
    account: dict
    key: str
    sent: set[str] = field(default_factory=set)
    """Hashes of the bodies, which all differ."""
    answered: set[str] = field(default_factory=set)
    """Of those that were answered with what they asked for."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """`answered`, `cut`, or the code of the refusal."""

    async def call(self, url: str) -> str:
        """One call; what became of it."""
        content = [{"role": "user", "content": f"call {next(_numbers)}"}]
        body = json.dumps({"model": "micro", "messages": content, "max_tokens": 20}).encode()
        return await self._post(f"{url}/v1/chat/completions", body, {"Authorization": f"Bearer {self.key}"})

    async def charge(self, url: str, idempotency_key: str, amount: str) -> tuple[int, dict]:
        """Charge a call that was metered elsewhere; status and answer."""
        body = json.dumps({"account": self.account["id"], "amount": amount}).encode()
        self.sent.add(bytes_hash(body))
        headers = {
            "Authorization": f"Bearer {ADMIN_KEY}",
            "Idempotency-Key": idempotency_key,
            "Content-Type": "application/json",
        }
        async with self.session.post(f"{url}/api/charges", data=body, headers=headers) as response:
            if response.status == 202:
                self.answered.add(bytes_hash(body))
            return response.status, await response.json()

    async def _post(self, url: str, body: bytes, headers: dict) -> str:
        request = bytes_hash(body)
        self.sent.add(request)
        outcome = "cut"
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self.session.post(url, data=body, headers=headers) as response:
                answer = await response.json()
                if response.status < 300:
                    self.answered.add(request)
                    outcome = "answered"
                else:
                    assert response.status < 500 or response.status in {502, 503, 504}, answer
                    outcome = answer["error"]["code"]
        self.outcomes[outcome] += 1
        return outcome

    async def until(self, outcome: str | Collection[str], *urls: str, seconds: float = 60) -> None:
        """Call until a call ends so, or in one of these ways."""
        outcomes = {outcome} if isinstance(outcome, str) else outcome
        async with asyncio.timeout(seconds):
            for url in itertools.cycle(urls):
                if await self.call(url) in outcomes:
                    return
                await asyncio.sleep(0.05)

    async def until_answered(self, more: int, seconds: float = 60) -> None:
        """Wait until so many more calls than now have been answered, of those that go on."""
        wanted = self.outcomes["answered"] + more
        async with asyncio.timeout(seconds):
            while self.outcomes["answered"] < wanted:
                await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def calling(self, *urls: str, at_once: int = 2, pause: float = 0.02) -> AsyncIterator[None]:
        """Calls go on, one after another in a few rows, until this is left; those under way end first."""
        done = asyncio.Event()

        async def row(urls: Any) -> None:
            while not done.is_set():
                await self.call(next(urls))
                await asyncio.sleep(pause)

        async with asyncio.TaskGroup() as rows:
            for _ in range(at_once):
                rows.create_task(row(itertools.cycle(urls)))
            try:
                yield
            finally:
                done.set()


@dataclass
class Site:
    """A chain, a database, an upstream; everything a service needs, and whoever calls it."""

    net: Net
    upstream: ScriptedUpstream
    database: str
    folder: Path
    session: aiohttp.ClientSession
    callers: list[Caller] = field(default_factory=list)

    def config(self, rpc_url: str | list[str] | None = None, **sections: dict) -> Path:
        """Write settings."""
        return write_config(self.folder, self.net, self.upstream, self.database, rpc_url, **sections)

    def serve(
        self,
        command: str = "serve",
        *,
        rpc_url: str | list[str] | None = None,
        chain: dict | None = None,
        gateway: dict | None = None,
        **environment: str,
    ) -> AbstractAsyncContextManager[Served]:
        """Run a service with these settings and variables."""
        return served(self.config(rpc_url, chain=chain, gateway=gateway), command, **environment)

    def client(self, url: str) -> Client:
        """Speaks to the service as the platform."""
        return Client(url, None, self.net, self.session)

    async def open_account(self, url: str, micro_usd: int = 1_000_000) -> Caller:
        """A funded account's client."""
        account, key = await self.client(url).open_account(micro_usd=micro_usd)
        self.callers.append(Caller(self.session, account, key))
        return self.callers[-1]

    @contextlib.asynccontextmanager
    async def under_load(self, **service: Any) -> AsyncIterator[tuple[Served, Caller]]:
        """A service, as `serve` runs it, with calls that go on and are settled; in the end, the books are checked."""
        async with self.serve(**service) as served:
            caller = await self.open_account(served.url)
            async with caller.calling(served.url):
                await self.until_settled(3)
                yield served, caller
            await self.check_books()

    # ── What is in the database ──────────────────────────────────────────────────────────────────────

    async def rows(self, query: sa.Select) -> list[Any]:
        """Read beside the service."""
        with snapshot(self.database) as view:
            return await view.read(lambda c: c.execute(query).all())

    async def states(self) -> Counter[str]:
        """How many charges are in each state, holds `held`, and slots `open`."""
        states: Counter[str] = Counter()
        for table, names in (
            (schema.charges, None),
            (schema.holds, ("held",)),
            (schema.slots, ("open",)),
        ):
            query = sa.select(table.c.state, sa.func.count()).group_by(table.c.state)
            query = query if names is None else query.where(table.c.state.in_(names))
            states.update(dict(iter(await self.rows(query))))
        return states

    async def until(self, condition: Callable[[Counter[str]], Any], seconds: float = DRAIN_SECONDS) -> None:
        """Wait until the states of charges, holds and slots are such."""
        states: Counter[str] | None = None
        try:
            async with asyncio.timeout(seconds):
                while not condition(states := await self.states()):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"not within {seconds} s: {states}") from None

    async def until_settled(self, more: int) -> None:
        """Wait until so many more charges are on the chain than now."""
        settled = _settled(await self.states())
        await self.until(lambda states: _settled(states) >= settled + more)

    async def caught_up(self) -> None:
        """Wait until the chain's newest block is read: before that the service knows nothing of a reorg."""
        async with asyncio.timeout(DRAIN_SECONDS):
            while True:
                newest = await self.net.anvil.rpc.call("eth_getBlockByNumber", "latest", False)
                if (newest["hash"],) in await self.rows(sa.select(schema.blocks.c.hash)):
                    return
                await asyncio.sleep(0.02)

    # ── The check ────────────────────────────────────────────────────────────────────────────────────

    async def check_books(self, *, owed: int = 0, foreign: bool = False, started: int | None = None) -> None:
        """All lanes drain without a hand, and then nothing is lost, nothing charged twice, and all books agree.

        Args:
            owed: charges that the chain has rejected, for a reason that is still there: they stay a debt.
            foreign: whether somebody else has sent transactions with our key, which `reconcile` has to find.
            started: how many calls reached the upstream; None: all that did are of this ledger.
        """
        await self.caught_up()
        await self.until(lambda states: not _unended(states) and states["rejected"] == owed)
        charges, holds = await self.rows(sa.select(schema.charges)), await self.rows(sa.select(schema.holds))
        logs = await self.net.vault.logs(fromBlock=hex(self.net.chain.deployed_block), toBlock="latest")
        taken = [event for _, event in logs if isinstance(event, Charged)]
        ours = {charge_id(charge.epoch, charge.sequence): charge for charge in charges}

        assert max(Counter(event.id for event in taken).values(), default=1) == 1, "debited twice"
        captured = Counter(
            UsageReceipt.model_validate_json(charge.receipt).request_hash for charge in charges
        )
        assert max(captured.values(), default=1) == 1, "one request charged twice"
        answered = set[str]().union(*(caller.answered for caller in self.callers))
        assert answered <= set(captured), "answered and not charged"
        assert set(captured) <= set[str]().union(*(caller.sent for caller in self.callers))
        lost = [hold for hold in holds if hold.state == "lost"]
        assert all(hold.reason for hold in lost)
        started = self.upstream.counts["started"] if started is None else started
        assert len(captured) + len(lost) >= started, "a call has vanished"

        settled = {id_: charge for id_, charge in ours.items() if charge.state in {"settled", "final"}}
        on_chain = {event.id: event for event in taken if event.id in ours}
        assert settled.keys() == on_chain.keys()
        assert len(settled) == len(charges) - owed
        assert all(charge.amount == on_chain[id_].amount for id_, charge in settled.items())
        for caller in self.callers:
            await self._check_sums(caller.account["id"], logs, charges)

        report = await reconcile(self.net.vault, self.database, deployed_block=self.net.chain.deployed_block)
        assert report.waiting == owed
        found = [difference.what for difference in report.differences]
        assert found == (["transactions"] if foreign else []), report.differences

    async def _check_sums(self, account: str, logs: list, charges: list) -> None:
        """What was paid in, less what was taken, is the balance, here and on the chain."""
        events = [event for _, event in logs if getattr(event, "account", None) == account]
        paid = sum(event.amount for event in events if isinstance(event, Deposited))
        taken = sum(event.amount for event in events if isinstance(event, Charged))
        owed = sum(c.amount for c in charges if c.account == account and c.state == "rejected")
        ((wallet,),) = [await self.rows(sa.select(schema.wallets).where(schema.wallets.c.account == account))]
        there = await self.net.vault.account(self.net.chain.platform, account)
        assert wallet.balance == there.balance == paid - taken
        assert (wallet.held, wallet.unsettled) == (0, owed)


def _settled(states: Counter[str]) -> int:
    return states["settled"] + states["final"]


def _unended(states: Counter[str]) -> int:
    return sum(states[name] for name in ("queued", "batched", "held", "open"))


# ── What else works on a database ────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def locked(database: str) -> Any:
    """Somebody else has the whole database to himself."""
    if database.startswith("sqlite"):
        with contextlib.closing(
            sqlite3.connect(database.removeprefix("sqlite:///"), isolation_level=None, timeout=60)
        ) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
            connection.execute("ROLLBACK")
    else:
        with psycopg.connect(database) as connection:
            tables = ", ".join(table.name for table in schema.metadata.sorted_tables)
            connection.execute(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE")
            yield
            connection.rollback()


async def depose(database: str) -> None:
    """The server takes the leader for dead and ends its session, as it does when its machine answers no more."""
    query = (
        "SELECT pg_terminate_backend(a.pid, 10000) FROM pg_stat_activity a JOIN pg_locks l USING (pid) "
        "WHERE a.application_name = 'waterfall leader' AND l.locktype = 'advisory' AND l.objsubid = 2"
    )
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute(query)
