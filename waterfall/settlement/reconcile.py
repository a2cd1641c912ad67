"""Journal, projection and chain held against each other, charge by charge, at one block.

The block is the newest that the projection has. And what a rebuild would lose. Everything is read: nothing is locked, and nothing is changed.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from waterfall.chain.events import Charged, Event, ExitDrawn, Position
from waterfall.chain.rpc import RpcError, quantity
from waterfall.chain.vault import AccountView, Vault
from waterfall.errors import ChainError
from waterfall.keccak import keccak
from waterfall.ledger import reconciliation, shared
from waterfall.ledger.projection import Block, row_of
from waterfall.ledger.reconciliation import REBUILD, Difference, Within, compare_within
from waterfall.ledger.snapshot import Identity, Snapshot, identity, snapshot
from waterfall.ledger.store import Ledger
from waterfall.money import UNITS_PER_TOKEN_BASE_UNIT
from waterfall.types import Allowance

_TRIES = 5
_PAUSE_SECONDS = 1
_AT_ONCE = 16
_RANGE = 2000
_FOREIGN = "its transactions are not this ledger's: no other program may use the key; see who has it"
_NOT_BACKED = "stop every service and look at the vault and its token: this must never be"

Tell = Callable[[str], None]
"""Told what is being compared."""


@dataclass
class Report:
    """What the comparison has found."""

    block: int
    """Where everything was compared."""
    block_hash: str
    first_block: int
    """Events were compared from here on."""
    behind: int
    """Blocks that the chain has and the projection has not read yet."""
    accounts: int = 0
    charges: int = 0
    """In the journal."""
    events: int = 0
    """Of the platform, since `first_block`."""
    waiting: int = 0
    """Charges that are owed and not on the chain yet."""
    waiting_amount: int = 0
    unknown: int = 0
    """Charges on the chain whose receipts are lost: ledgers made them of which this one knows nothing."""
    unknown_amount: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def as_dict(self) -> dict[str, Any]:
        """For JSON; amounts in credit units, and whatever differs, as text."""
        amounts = {name: str(getattr(self, name)) for name in ("waiting_amount", "unknown_amount")}
        differences = [
            {name: None if value is None else str(value) for name, value in asdict(difference).items()}
            for difference in self.differences
        ]
        return {"equal": self.equal, **asdict(self), **amounts, "differences": differences}


async def reconcile(
    vault: Vault,
    url: str,
    *,
    deployed_block: int = 0,
    since: int | None = None,
    tell: Tell = lambda _: None,
) -> Report:
    """Hold the ledger at a database URL against itself and the chain, beside whoever works with it.

    Args:
        vault: the chain's side.
        url: the database.
        deployed_block: block of the vault's deployment.
        since: compare only the events from this block on; None: all. Balances are always compared, all of them.
        tell: told what is being compared.

    Raises:
        LedgerError: the ledger cannot be read.
        ChainError: the chain cannot be, has nothing of that block any more, or never stood still.
    """
    first = deployed_block if since is None else max(since, deployed_block)
    for _ in range(_TRIES):
        with snapshot(url) as view:
            head = await view.read(reconciliation.head)
            if head is not None and await _is_canonical(vault, head):
                report = await _Comparison(vault, view, head, first, tell).run()
                if await _is_canonical(vault, head):
                    return report
        await asyncio.sleep(_PAUSE_SECONDS)
    if head is None:
        raise ChainError(reason="the ledger has not read the chain yet: start the service")
    raise ChainError(
        reason=f"it has no block {head.number} ({head.hash}), the newest of the ledger: start the service, so that it "
        "follows the chain, and try again"
    )


async def _is_canonical(vault: Vault, block: Block) -> bool:
    found = await vault.rpc.call("eth_getBlockByNumber", hex(block.number), False)
    return found is not None and found["hash"] == block.hash


async def loss(
    vault: Vault, ledger: Ledger, *, deployed_block: int = 0, tell: Tell = lambda _: None
) -> str | None:
    """What a ledger would lose that is rebuilt from the chain as that is now, in words; None: nothing.

    Everything is read, and nothing is changed.

    Raises:
        LedgerError: the ledger cannot be read.
        ChainError: the chain cannot be.
    """
    has_calls = await ledger.read(reconciliation.has_calls)
    kept = await ledger.read(reconciliation.known_charges)
    newest = quantity(await vault.rpc.call("eth_blockNumber"))
    async for _, last, events in _events(vault, ledger.platform, set(), deployed_block, newest):
        tell(f"Holding the journal against the chain: block {last} of {newest} …")
        for _, event in events:
            if not isinstance(event, Charged):
                continue
            if not has_calls:
                return "the database has not a single call, where the chain has charges of this platform"
            there = event.account, event.amount, event.receipt_hash
            if kept.get(event.id, there) != there:
                return f"the chain has another charge under the id of charge {event.id}"
    return None


async def _events(
    vault: Vault, platform: int, known: set[str], first: int, newest: int
) -> AsyncIterator[tuple[int, int, list[tuple[Position, Event]]]]:
    """A platform's events between two blocks, in parts: first block, last block, events.

    Args:
        vault: whose events.
        platform: whose events.
        known: its accounts as of the first block, to which those are added that the events show.
        first: where to begin.
        newest: the last block to read.
    """
    width = _RANGE
    while first <= newest:
        last = min(first + width - 1, newest)
        try:
            logs = await vault.logs(fromBlock=hex(first), toBlock=hex(last))
        except RpcError:
            if width == 1:
                raise
            width = max(1, width // 4)  # nodes limit ranges and answers, each in its own words
            continue
        yield first, last, [(position, event) for position, event in logs if _is_of(platform, known, event)]
        first = last + 1


def _is_of(platform: int, known: set[str], event: Event) -> bool:
    account = getattr(event, "account", None)
    if isinstance(event, Charged | ExitDrawn):
        return account in known
    if getattr(event, "platform", None) != platform:
        return False
    if account is not None:
        known.add(account)
    return True


class _Comparison:
    def __init__(self, vault: Vault, view: Snapshot, head: Block, first: int, tell: Tell) -> None:
        self._vault = vault
        self._view = view
        self._head = head
        self._at = hex(head.number)
        self._tell = tell
        self._of: Identity
        self._report = Report(head.number, head.hash, first, 0)
        self._known: set[str] = set()
        """Accounts of the platform."""

    async def run(self) -> Report:
        report, view = self._report, self._view
        self._of = await view.read(identity)
        known = await view.read(shared.read)
        if known.mismatch is not None:
            self._differ(
                "settlement",
                "stopped",
                known.mismatch,
                None,
                "see to this first; then run `waterfall rebuild`",
            )
        self._tell("Comparing journal and projection …")
        within = await view.read(lambda c: compare_within(c, self._of, known.epoch))
        report.charges, report.waiting, report.unknown = within.charges, within.waiting, within.unknown
        report.waiting_amount, report.unknown_amount = within.waiting_amount, within.unknown_amount
        report.differences += within.differences
        wallets = await view.read(reconciliation.wallets)
        report.accounts, self._known = len(wallets), set(wallets)
        await self._compare_events()
        await self._compare_money(wallets, within)
        await self._compare_nonces()
        latest = quantity(await self._vault.rpc.call("eth_blockNumber"))
        report.behind = max(0, latest - self._head.number)
        return report

    def _differ(self, subject: str, what: str, kept: Any, expected: Any, todo: str = REBUILD) -> None:
        if kept != expected:
            self._report.differences.append(Difference(subject, what, kept, expected, todo))

    # ── Events ───────────────────────────────────────────────────────────────────────────────────────

    async def _compare_events(self) -> None:
        reading = _events(
            self._vault, self._of.platform, self._known, self._report.first_block, self._head.number
        )
        async for first, last, events in reading:
            self._tell(f"Comparing events up to block {last} of {self._head.number} …")
            kept = await self._view.read(partial(reconciliation.events, first=first, last=last))
            for position, event in events:
                self._compare_event(kept.pop((position.block, position.log_index), None), position, event)
            for (block, index), row in kept.items():
                self._differ(f"event {index} of block {block}", "kept", row["name"], None)

    def _compare_event(self, kept: dict[str, Any] | None, position: Position, event: Event) -> None:
        self._report.events += 1
        subject = f"event {position.log_index} of block {position.block}"
        expected = row_of(position, event)
        if kept is None:
            self._differ(subject, "kept", None, expected["name"])
            return
        for name, value in expected.items():
            self._differ(subject, f"{expected['name']}.{name}", kept[name], value)

    # ── Money ────────────────────────────────────────────────────────────────────────────────────────

    async def _compare_money(self, wallets: dict[str, dict[str, Any]], within: Within) -> None:
        gate = asyncio.Semaphore(_AT_ONCE)
        done = 0

        async def compare(account: str, wallet: dict[str, Any]) -> int:
            nonlocal done
            async with gate:
                there = await self._vault.account(self._of.platform, account, self._at)
            self._compare_account(account, wallet, there)
            done += 1
            if done % 100 == 0:
                self._tell(f"Comparing accounts: {done} of {len(wallets)} …")
            return there.balance + there.exit_amount

        self._tell(f"Comparing {len(wallets)} accounts …")
        credit = sum(await asyncio.gather(*(compare(*its) for its in wallets.items())))
        earnings = await self._earnings()
        self._differ("platform", "earnings", within.earned, earnings)
        tokens = await self._tokens()
        if tokens * UNITS_PER_TOKEN_BASE_UNIT < credit + earnings:
            self._differ(
                "vault",
                "tokens behind the credit",
                tokens * UNITS_PER_TOKEN_BASE_UNIT,
                credit + earnings,
                _NOT_BACKED,
            )

    def _compare_account(self, account: str, wallet: dict[str, Any], there: AccountView) -> None:
        subject = f"account {account}"
        expected = {
            "balance": there.balance,
            "exit_amount": there.exit_amount,
            "entries": there.entries,
            "window": there.window,
            "spent": there.spent_in_window,
            **there.policy.model_dump(),
        }
        for name, value in expected.items():
            self._differ(subject, f"{name} on the chain", wallet[name], value)
        if there.exit_amount:
            kept = wallet["exit_matures_at"]
            self._differ(subject, "exit_matures_at on the chain", kept, there.exit_matures_at)
        asked_for = there.next_allowance if there.allowance_changes_at else there.allowance
        allowance = wallet["allowance"]
        kept_allowance = None if allowance is None else Allowance.model_validate_json(allowance)
        self._differ(subject, "allowance on the chain", kept_allowance, asked_for)
        if asked_for is not None:
            kept = wallet["allowance_spent"]
            self._differ(subject, "allowance_spent on the chain", kept, there.allowance_spent)

    async def _earnings(self) -> int:
        words = await self._words(self._vault.address, "platformOf(uint128)", self._of.platform)
        return words[3]

    async def _tokens(self) -> int:
        token = await self._vault.token()
        return (await self._words(token, "balanceOf(address)", int(self._vault.address, 16)))[0]

    async def _words(self, to: str, signature: str, argument: int) -> list[int]:
        """What a function of one argument answers at the block compared, in words."""
        data = keccak(signature.encode())[:4] + argument.to_bytes(32, "big")
        call = {"to": to, "data": "0x" + data.hex()}
        answer = bytes.fromhex((await self._vault.rpc.call("eth_call", call, self._at))[2:])
        return [int.from_bytes(answer[n : n + 32], "big") for n in range(0, len(answer), 32)]

    # ── Nonces ───────────────────────────────────────────────────────────────────────────────────────

    async def _compare_nonces(self) -> None:
        """Every transaction of our keys was journalled before it was sent: what is mined beyond is another's."""
        for signer, last in (await self._view.read(reconciliation.nonces)).items():
            used = quantity(await self._vault.rpc.call("eth_getTransactionCount", signer, self._at))
            if used > last + 1:
                self._differ(f"key {signer}", "transactions", last + 1, used, _FOREIGN)
