"""What one account can spend: pure arithmetic over one row, the check that keeps promise 1."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from waterfall.errors import AllowanceExpired, FundsHeld, InsufficientFunds, LimitExceeded, PolicyExpired
from waterfall.metering.prices import Bound
from waterfall.money import format_usd
from waterfall.types import Allowance, KeyLimits, Policy


@dataclass(slots=True)
class Wallet:
    """An account's money as the ledger knows it; amounts in credit units."""

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "balance",
        "pending",
        "held",
        "unsettled",
        "window",
        "spent",
        "max_per_charge",
        "max_per_window",
        "window_seconds",
        "expires_at",
        "allowance",
        "allowance_spent",
        "superseded",
        "wanted",
    )
    """What `wallet_of` makes one from, after its account."""

    account: str
    balance: int
    """On the chain."""
    pending: int
    """The part of `balance` whose arrival is not final yet."""
    held: int
    """Open holds."""
    unsettled: int
    """Captured, and not seen on the chain yet."""
    window_seconds: int | None
    """Length of the windows in which the chain counts; None: it does not."""
    window: int
    spent: int
    """Charged on the chain in window number `window`."""
    policies: tuple[Policy, ...]
    """All that bind: the one on the chain, one that is asked for, those whose loosening is not final."""
    allowances: tuple[Allowance, ...] = ()
    """The owner's, as last asked for; the vault lets what tightens bind later. And those whose loosening is not final."""
    allowance_spent: int = 0
    """Charged on the chain since the owner's first allowance, while there was one."""

    @property
    def available(self) -> int:
        """What a new call may use; never negative."""
        return max(0, self.balance - self.pending - self.unsettled - self.held)

    @property
    def after_charges(self) -> int:
        """The balance once everything captured has settled."""
        return self.balance - self.unsettled

    def left_in_window(self, policy: Policy, block_time: int) -> int | None:
        """What a policy's window still permits, or None where it has none.

        Windows follow block time. What is held or unsettled may land in this window or the next, so it
        counts against both. What was spent in the chain's current window counts whatever the length of the
        policy's own: the vault carries it over when a policy replaces another.
        """
        if policy.max_per_window is None:
            return None
        turned = self.window_seconds is None or block_time // self.window_seconds > self.window
        spent = 0 if turned else self.spent
        return max(0, policy.max_per_window - spent - self.unsettled - self.held)


def wallet_of(account: str, *columns: Any) -> Wallet:
    """A wallet from its row, as the driver or SQLAlchemy gives it."""
    (
        balance,
        pending,
        held,
        unsettled,
        window,
        spent,
        max_per_charge,
        max_per_window,
        window_seconds,
        expires_at,
        allowance,
        allowance_spent,
        superseded,
        wanted,
    ) = columns
    policies, allowances = [], []
    if max_per_charge is not None or max_per_window is not None or expires_at is not None:
        policies.append(
            Policy(
                max_per_charge=None if max_per_charge is None else int(max_per_charge),
                max_per_window=None if max_per_window is None else int(max_per_window),
                window_seconds=window_seconds,
                expires_at=expires_at,
            )
        )
    if allowance is not None:
        allowances.append(Allowance.model_validate_json(allowance))
    for entry in [] if superseded is None else json.loads(superseded):
        if "policy" in entry:
            policies.append(Policy.model_validate(entry["policy"]))
        else:
            allowances.append(Allowance.model_validate(entry["allowance"]))
    if wanted is not None:
        policies.append(Policy.model_validate_json(wanted))
    return Wallet(
        account=account,
        balance=int(balance),
        pending=int(pending),
        held=int(held),
        unsettled=int(unsettled),
        window_seconds=window_seconds,
        window=window,
        spent=int(spent),
        policies=tuple(policies),
        allowances=tuple(allowances),
        allowance_spent=int(allowance_spent),
    )


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit on what calls may cost."""

    scope: str
    limit: int
    left: int
    """What it leaves, credit units."""
    window: Mapping[str, int] = field(default_factory=dict)
    """Of one that counts in windows: their length, and when the next one begins, Unix seconds."""


def key_limits(limits: KeyLimits | None, left: int | None, now_ms: int) -> list[Limit]:
    """A key's limits on what a call may cost; `left` is what its budget leaves."""
    found = []
    if limits is not None and limits.max_per_call is not None:
        found.append(Limit("key_per_call", limits.max_per_call, limits.max_per_call))
    if limits is not None and limits.budget is not None and left is not None:
        window = {} if limits.budget_seconds is None else _turns(limits.budget_seconds, now_ms // 1000)
        found.append(Limit("key_budget", limits.budget, left, window))
    return found


def authorise(
    wallet: Wallet, bound: Bound, block_time: int, expiry_margin: int, *, key: Sequence[Limit] = ()
) -> tuple[int, int]:
    """Decide whether a call may run.

    Args:
        wallet: the account, read in the same transaction that will write the hold.
        bound: the call's provable maximum.
        block_time: timestamp of the newest block known.
        expiry_margin: seconds before a policy's expiry in which it counts as expired, so that what is
            held now still settles in time.
        key: the limits of the API key that was shown.

    Returns:
        How much output the call may produce, in tokens, and the amount to hold.

    Raises:
        PaymentRequired: what was exceeded, by how much.
    """
    tokens = bound.affordable_output_tokens(wallet.available)
    if tokens is None:
        raise _short_of_funds(wallet, bound)
    for its in (*_limits(wallet, bound, block_time, expiry_margin), *key):
        within = bound.affordable_output_tokens(its.left)
        if within is None:
            facts = _facts(wallet, bound) | {"available": format_usd(its.left)}
            raise LimitExceeded(**facts, scope=its.scope, limit=format_usd(its.limit), **its.window)
        tokens = min(tokens, within)
    return tokens, bound.amount(tokens)


def _limits(wallet: Wallet, bound: Bound, block_time: int, expiry_margin: int) -> Iterator[Limit]:
    """The account's own limits.

    Raises:
        PolicyExpired, AllowanceExpired
    """
    for policy in wallet.policies:
        if policy.expires_at is not None and block_time + expiry_margin >= policy.expires_at:
            raise PolicyExpired(**_facts(wallet, bound), expires_at=policy.expires_at)
        if policy.max_per_charge is not None:
            yield Limit("per_charge", policy.max_per_charge, policy.max_per_charge)
        left = wallet.left_in_window(policy, block_time)
        if policy.max_per_window is not None and policy.window_seconds is not None and left is not None:
            yield Limit("per_window", policy.max_per_window, left, _turns(policy.window_seconds, block_time))
    for allowance in wallet.allowances:
        if block_time + expiry_margin >= allowance.expires_at:
            raise AllowanceExpired(**_facts(wallet, bound), expires_at=allowance.expires_at)
        left = max(0, allowance.cap - wallet.allowance_spent - wallet.unsettled - wallet.held)
        yield Limit("allowance", allowance.cap, left)


def _short_of_funds(wallet: Wallet, bound: Bound) -> InsufficientFunds | FundsHeld:
    required = bound.amount(bound.least_output_tokens)
    is_there = required <= wallet.balance - wallet.pending - wallet.unsettled
    return (FundsHeld if is_there else InsufficientFunds)(**_facts(wallet, bound))


def _facts(wallet: Wallet, bound: Bound) -> dict[str, str]:
    """What every refusal tells, in USD."""
    return {
        "account": wallet.account,
        "required": format_usd(bound.amount(bound.least_output_tokens)),
        "maximum": format_usd(bound.amount(bound.output_tokens)),
        "available": format_usd(wallet.available),
        "balance": format_usd(wallet.after_charges),
        "held": format_usd(wallet.held),
    }


def _turns(seconds: int, now: int) -> dict[str, int]:
    """A window's length, and when the next one begins."""
    return {"window_seconds": seconds, "next_window_at": (now // seconds + 1) * seconds}
