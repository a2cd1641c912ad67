"""What was seen from outside, held against journal and chain: the callers' answers, the provider's calls, the token."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from waterfall.chain.events import Charged, Deposited, ExitFinalized
from waterfall.chain.rpc import quantity
from waterfall.chain.token import balance_of
from waterfall.chain.vault import Vault
from waterfall.devnet.deploy import Deployment
from waterfall.errors import WaterfallError
from waterfall.ledger import views
from waterfall.ledger.snapshot import identity, snapshot
from waterfall.ledger.views import CallRecord
from waterfall.money import UNITS_PER_TOKEN_BASE_UNIT, format_usd
from waterfall.settlement.reconcile import reconcile
from waterfall.torture.calls import Call, Payer
from waterfall.torture.upstream import Upstream, usage
from waterfall.torture.world import UNITS_PER_TOKEN
from waterfall.types import ZERO_ADDRESS

_PAGE = 1000
_RANGE = 2000
_LEAST_ANSWERED = 0.05
"""Of all calls: half of the accounts run out of money and into limits, and some faults refuse everything for seconds."""
_ENDED = {"settled", "final", "released", "lost", "free"}


@dataclass(frozen=True)
class Evidence:
    """What was seen, and where to look."""

    vault: Vault
    deployment: Deployment
    database: str = field(repr=False)
    payers: Sequence[Payer]
    calls: Sequence[Call]
    upstream: Upstream
    most_at_once: int = 0
    """Calls that clients had under way at most at one time."""
    stops: int = 0
    """How often a process with a gateway ended, or it or the database stood still."""


@dataclass(frozen=True)
class Verdict:
    """What the comparison came to."""

    records: Sequence[CallRecord]
    """The journal's calls."""
    transactions: dict[str, int]
    """The lanes', by what became of them, and attempts."""
    differences: list[str]
    """What does not add up; empty: the books are equal."""


async def examine(evidence: Evidence) -> Verdict:
    """Compare everything with everything. Nothing may be under way any more.

    Raises:
        LedgerError: the journal cannot be read.
        ChainError
    """
    records, transactions = await _journal(evidence.database)
    found = await _reconcile(evidence)
    found += _unfinished(records)
    found += _answers(evidence.calls, records)
    found += _amounts(evidence.calls, records)
    found += _provider(evidence, records)
    found += _lost(evidence, records)
    found += await _chain(evidence, records)
    return Verdict(records, transactions, found)


async def _reconcile(evidence: Evidence) -> list[str]:
    try:
        report = await reconcile(
            evidence.vault, evidence.database, deployed_block=evidence.deployment.deployed_block
        )
    except WaterfallError as error:
        return [f"the books cannot be reconciled: {error.message}"]
    return [
        f"{one.subject}: {one.what} is {one.kept}, where it should be {one.expected}"
        for one in report.differences
    ]


async def _journal(database: str) -> tuple[list[CallRecord], dict[str, int]]:
    records: list[CallRecord] = []
    with snapshot(database) as view:
        of = await view.read(identity)
        while True:
            before = records[-1].charge_id if records else None
            page = await view.read(
                lambda c, before=before: views.calls(  # type: ignore[misc]
                    c, of.chain_id, of.vault, before=before, limit=_PAGE
                )
            )
            records += page
            if len(page) < _PAGE:
                return records, await view.read(views.transactions)


def _unfinished(records: Sequence[CallRecord]) -> Iterator[str]:
    for record in records:
        state, reason = record.settlement.state, record.settlement.reason
        if state not in _ENDED:
            yield f"call {record.receipt_id} is still {state}: {reason}"
        elif state in {"lost", "released"} and not reason:
            yield f"call {record.receipt_id} is {state} without a reason"
        if record.excess:
            yield f"call {record.receipt_id} was metered beyond its hold"


def _hash(record: CallRecord) -> str | None:
    return None if record.receipt is None else record.receipt.receipt.request_hash


def _answers(calls: Sequence[Call], records: Sequence[CallRecord]) -> Iterator[str]:
    """Each answered call is charged once, and each charge was asked for."""
    charged = Counter(found for record in records if (found := _hash(record)) is not None)
    receipts = {_hash(record): record.receipt_id for record in records}
    sent = {call.request_hash: call for call in calls}
    for request_hash, times in charged.items():
        if request_hash not in sent:
            yield f"a request nobody sent was charged: {request_hash}"
        elif times > 1:
            yield f"call {sent[request_hash].number} was charged {times} times"
    for call in calls:
        if call.is_answered and charged[call.request_hash] == 0:
            yield f"call {call.number} ({call.kind}) was answered and not charged"
        elif call.is_answered and call.receipt != receipts[call.request_hash]:
            yield f"call {call.number} was answered with receipt {call.receipt}, and charged under another"


def _amounts(calls: Sequence[Call], records: Sequence[CallRecord]) -> Iterator[str]:
    """Each complete charge costs what was used, to the last unit, and is on its own account."""
    sent = {call.request_hash: call for call in calls}
    for record in records:
        call = sent.get(_hash(record) or "")
        if record.receipt is None or call is None:
            continue
        receipt = record.receipt.receipt
        wanted = call.amount
        if wanted is None:
            wanted = sum(usage(call.number, call.most_tokens)) * UNITS_PER_TOKEN
        if receipt.complete and receipt.amount != wanted:
            yield f"call {call.number} costs {receipt.amount} units, where it used {wanted}"
        if receipt.account != call.account:
            yield f"call {call.number} of {call.account} was charged to {receipt.account}"
        if call.is_answered and not receipt.complete:
            yield f"call {call.number} was answered whole, and its receipt says that it was not"


def _provider(evidence: Evidence, records: Sequence[CallRecord]) -> Iterator[str]:
    """Each call that reached the provider is charged, or listed as lost, or given back with a reason."""
    started, refused = evidence.upstream.started, evidence.upstream.refused
    numbers = {call.request_hash: call.number for call in evidence.calls if call.kind != "charge"}
    charged = {number for record in records if (number := numbers.get(_hash(record) or "")) is not None}
    states = Counter(record.settlement.state for record in records)
    lost, released = states["lost"], states["released"]
    for number, times in started.items():
        if times > 1:
            yield f"call {number} was sent to the provider {times} times"
    for number in charged - started.keys():
        yield f"call {number} was charged and never reached the provider"
    uncharged = len(started.keys() - charged)
    if uncharged > lost + released:
        yield f"{uncharged} calls reached the provider and were not charged; {lost} are listed as lost, {released} as given back"
    unpaid = len(started.keys() - refused - charged)
    if unpaid > lost:
        yield f"{unpaid} calls that the provider ran were not charged; only {lost} are listed as lost"


def _lost(evidence: Evidence, records: Sequence[CallRecord]) -> Iterator[str]:
    """No more calls are lost than can be explained.

    A call may be lost whose answer the provider did not bring to its end. Of the others, those may that were under way
    when a process or the database stopped: as many as clients make at once, and those that go on without their client.
    """
    lost = sum(record.settlement.state == "lost" for record in records)
    explained = len(evidence.upstream.started.keys() - evidence.upstream.whole)
    if evidence.stops:
        alone = sum(call.outcome in {"left", "timed out"} for call in evidence.calls)
        explained += evidence.stops * evidence.most_at_once + alone
    if lost > explained:
        yield f"{lost} calls are lost, where the provider's answers and {evidence.stops} stops explain {explained} at most"


def shortfalls(calls: Sequence[Call], faults: Mapping[str, int]) -> Iterator[str]:
    """Why a run proves nothing, whatever its books say: too few calls came through, or nothing was done to it."""
    answered = sum(call.is_answered for call in calls)
    if answered < max(1, _LEAST_ANSWERED * len(calls)):
        yield f"only {answered} of {len(calls)} calls were answered"
    if not sum(faults.values()):
        yield "no fault was done"


@dataclass
class _Chain:
    """What the vault's events come to."""

    charged: Counter[int] = field(default_factory=Counter)
    """How often, by charge id."""
    paid_in: Counter[str] = field(default_factory=Counter)
    """Credit units, by account."""
    paid_out: Counter[str] = field(default_factory=Counter)


async def _read(vault: Vault) -> _Chain:
    found = _Chain()
    last = quantity(await vault.rpc.call("eth_blockNumber"))
    for first in range(0, last + 1, _RANGE):
        for _, event in await vault.logs(fromBlock=hex(first), toBlock=hex(min(last, first + _RANGE - 1))):
            if isinstance(event, Charged):
                found.charged[event.id] += 1
            elif isinstance(event, Deposited):
                found.paid_in[event.account] += event.amount
            elif isinstance(event, ExitFinalized):
                found.paid_out[event.account] += event.tokens * UNITS_PER_TOKEN_BASE_UNIT
    return found


async def _chain(evidence: Evidence, records: Sequence[CallRecord]) -> list[str]:
    """Each charge is on the chain once, and each account has what came in less what went out and what was charged."""
    chain = await _read(evidence.vault)
    spent: Counter[str] = Counter()
    found: list[str] = []
    for record in records:
        amount = 0 if record.receipt is None else record.receipt.receipt.amount
        spent[record.account] += amount
        times = chain.charged.pop(record.charge_id, 0)
        if times != (1 if amount else 0):
            found.append(f"charge {record.charge_id} of {amount} units is {times} times on the chain")
    found += [f"charge {id_} is on the chain, and not in the journal" for id_ in chain.charged]
    for payer in evidence.payers:
        left = chain.paid_in[payer.id] - chain.paid_out[payer.id] - spent[payer.id]
        found += await _compare_account(evidence, payer, left, chain.paid_out[payer.id])
    return found


async def _compare_account(evidence: Evidence, payer: Payer, left: int, paid_out: int) -> list[str]:
    vault, found = evidence.vault, []
    there = await vault.account(evidence.deployment.platform, payer.id)
    has = there.balance + there.exit_amount
    if has != left:
        found.append(
            f"account {payer.label} has {format_usd(has)} USD on the chain, where {format_usd(left)} should be left"
        )
    if payer.owner != ZERO_ADDRESS:
        got = await balance_of(vault.rpc, evidence.deployment.token, payer.owner) * UNITS_PER_TOKEN_BASE_UNIT
        if got != paid_out:
            found.append(
                f"the owner of {payer.label} got {format_usd(got)} USD, where {format_usd(paid_out)} was paid out"
            )
    return found
