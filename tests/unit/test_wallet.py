import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import ACCOUNT, BLOCK_TIME, card

from waterfall.errors import FundsHeld, InsufficientFunds, LimitExceeded, PaymentRequired, PolicyExpired
from waterfall.ledger.wallet import Wallet, authorise
from waterfall.metering import prices
from waterfall.metering.prices import Most
from waterfall.money import format_usd
from waterfall.types import Policy

MINUTE, DAY = 60, 86_400


def wallet(balance=100, *policies, pending=0, held=0, unsettled=0, spent=0, window=0, window_seconds=None):
    return Wallet(
        account=ACCOUNT,
        balance=balance,
        pending=pending,
        held=held,
        unsettled=unsettled,
        window=window,
        window_seconds=window_seconds,
        spent=spent,
        policies=policies,
    )


def allow(wallet, amount, block_time=BLOCK_TIME, margin=0):
    return authorise(wallet, prices.fixed(amount), block_time, margin)[1]


# ── Funds ────────────────────────────────────────────────────────────────────────────────────────────


def test_authorise__all_that_is_available__is_held():
    assert allow(wallet(100), 100) == 100
    assert allow(wallet(100, pending=10, held=20, unsettled=30), 40) == 40


@pytest.mark.parametrize("part", ["pending", "held", "unsettled"])
def test_authorise__a_unit_more_than_available__is_refused(part):
    with pytest.raises(PaymentRequired):
        allow(wallet(100, **{part: 10}), 91)


def test_authorise__twenty_million__exact():
    balance = 20_000_000 * 10**12
    assert allow(wallet(balance), balance) == balance
    with pytest.raises(InsufficientFunds) as refusal:
        allow(wallet(balance), balance + 1)
    assert refusal.value.details["available"] == "20000000.00"
    assert refusal.value.details["required"] == "20000000.000000000001"


def test_authorise__running_calls_hold_it__is_told_apart_from_an_empty_wallet():
    with pytest.raises(FundsHeld) as refusal:
        allow(wallet(100, held=50), 60)
    assert refusal.value.details["held"] == "0.00000000005"
    with pytest.raises(InsufficientFunds):
        allow(wallet(100, held=50), 101)
    with pytest.raises(InsufficientFunds):
        allow(wallet(100, held=50, pending=50), 60)


def test_available__more_unsettled_than_there_is__never_negative():
    assert wallet(10, unsettled=30).available == 0
    assert wallet(10, unsettled=30).after_charges == -20


def test_authorise__wallet_affords_less__cuts_the_output_down_to_the_least():
    bound = prices.bound(card(inputs="1", outputs="1"), Most(10), 100, 20)
    unit = 10**6
    assert authorise(wallet(110 * unit), bound, BLOCK_TIME, 0) == (100, 110 * unit)
    assert authorise(wallet(50 * unit), bound, BLOCK_TIME, 0) == (40, 50 * unit)
    assert authorise(wallet(51 * unit - 1), bound, BLOCK_TIME, 0) == (40, 50 * unit)
    assert authorise(wallet(30 * unit), bound, BLOCK_TIME, 0) == (20, 30 * unit)
    with pytest.raises(InsufficientFunds) as refusal:
        authorise(wallet(30 * unit - 1), bound, BLOCK_TIME, 0)
    assert refusal.value.details["required"] == "0.00003"
    assert refusal.value.details["maximum"] == "0.00011"


# ── Limits ───────────────────────────────────────────────────────────────────────────────────────────


def test_authorise__per_charge__inclusive():
    assert allow(wallet(100, Policy(max_per_charge=10)), 10) == 10
    with pytest.raises(LimitExceeded) as refusal:
        allow(wallet(100, Policy(max_per_charge=10)), 11)
    assert refusal.value.details["scope"] == "per_charge"


def test_authorise__limit_of_zero__refuses():
    with pytest.raises(LimitExceeded):
        allow(wallet(100, Policy(max_per_charge=0)), 1)


def test_authorise__limit__cuts_the_output_too():
    bound = prices.bound(card(inputs="0", outputs="1"), Most(10), 100, 1)
    policies = Policy(max_per_charge=50 * 10**6), Policy(max_per_charge=30 * 10**6)
    for order in (policies, policies[::-1]):
        assert authorise(wallet(10**12, *order), bound, BLOCK_TIME, 0) == (30, 30 * 10**6)


DAILY = Policy(max_per_window=50, window_seconds=DAY)
TODAY = BLOCK_TIME // DAY


def test_authorise__window__counts_spent_held_and_unsettled():
    busy = wallet(1000, DAILY, spent=20, window=TODAY, window_seconds=DAY, held=5, unsettled=10)
    assert allow(busy, 15) == 15
    with pytest.raises(LimitExceeded) as refusal:
        allow(busy, 16)
    assert refusal.value.details["scope"] == "per_window"
    assert refusal.value.details["available"] == "0.000000000015"


def test_authorise__window_turned__only_what_may_still_land_counts():
    busy = wallet(1000, DAILY, spent=50, window=TODAY - 1, window_seconds=DAY, held=5, unsettled=10)
    assert allow(busy, 35) == 35
    with pytest.raises(LimitExceeded):
        allow(busy, 36)


def test_authorise__last_second_of_a_window__still_counts():
    spent = wallet(1000, DAILY, spent=50, window=TODAY, window_seconds=DAY)
    with pytest.raises(LimitExceeded):
        allow(spent, 1, block_time=(TODAY + 1) * DAY - 1)
    assert allow(spent, 1, block_time=(TODAY + 1) * DAY) == 1


@pytest.mark.parametrize(
    ("on_chain", "wanted"), [(DAY, MINUTE), (MINUTE, DAY), (DAY, DAY)], ids=["shorter", "longer", "same"]
)
def test_authorise__wanted_policy_with_another_window__what_was_spent_counts_as_the_vault_will_count_it(
    on_chain, wanted
):
    """setPolicy carries what was spent in the current window over, whatever the new window's length."""
    policies = (
        Policy(max_per_window=1000, window_seconds=on_chain),
        Policy(max_per_window=50, window_seconds=wanted),
    )
    now = BLOCK_TIME // on_chain
    with pytest.raises(LimitExceeded):
        allow(wallet(1000, *policies, spent=40, window=now, window_seconds=on_chain), 11)
    assert allow(wallet(1000, *policies, spent=40, window=now, window_seconds=on_chain), 10) == 10
    assert allow(wallet(1000, *policies, spent=40, window=now - 1, window_seconds=on_chain), 50) == 50


def test_authorise__wanted_window_where_the_chain_has_none__nothing_is_spent_yet():
    assert allow(wallet(1000, DAILY), 50) == 50


def test_authorise__policy_about_to_expire__is_expired_by_the_margin():
    expiring = wallet(100, Policy(expires_at=BLOCK_TIME + 100))
    assert allow(expiring, 1, margin=99) == 1
    with pytest.raises(PolicyExpired) as refusal:
        allow(expiring, 1, margin=100)
    assert refusal.value.details["expires_at"] == BLOCK_TIME + 100


# ── What a refusal tells ─────────────────────────────────────────────────────────────────────────────

BOUND = prices.bound(card(inputs="1", outputs="1"), Most(10), 100, 20)
UNIT = 10**6
REFUSALS = {
    "insufficient": (wallet(29 * UNIT, unsettled=UNIT), InsufficientFunds, {}),
    "held": (wallet(100 * UNIT, held=80 * UNIT), FundsHeld, {}),
    "per charge": (
        wallet(100 * UNIT, Policy(max_per_charge=29 * UNIT)),
        LimitExceeded,
        {"scope": "per_charge", "limit": "0.000029", "available": "0.000029"},
    ),
    "per window": (
        wallet(
            100 * UNIT,
            Policy(max_per_window=49 * UNIT, window_seconds=DAY),
            spent=20 * UNIT,
            window=TODAY,
            window_seconds=DAY,
        ),
        LimitExceeded,
        {
            "scope": "per_window",
            "limit": "0.000049",
            "available": "0.000029",
            "window_seconds": DAY,
            "next_window_at": (TODAY + 1) * DAY,
        },
    ),
    "expired": (
        wallet(100 * UNIT, Policy(expires_at=BLOCK_TIME)),
        PolicyExpired,
        {"expires_at": BLOCK_TIME},
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_authorise__any_refusal__tells_least_and_maximum_and_what_there_is(case):
    poor, kind, more = REFUSALS[case]
    with pytest.raises(kind) as refusal:
        authorise(poor, BOUND, BLOCK_TIME, 0)
    assert type(refusal.value) is kind
    assert refusal.value.details == {
        "account": ACCOUNT,
        "required": "0.00003",
        "maximum": "0.00011",
        "available": format_usd(poor.available),
        "balance": format_usd(poor.balance - poor.unsettled),
        "held": format_usd(poor.held),
        **more,
    }


# ── Whatever the wallet ──────────────────────────────────────────────────────────────────────────────

AMOUNTS = st.integers(0, 2**70)
POLICIES = st.builds(
    Policy,
    max_per_charge=st.none() | AMOUNTS,
    expires_at=st.none() | st.integers(BLOCK_TIME - 9, BLOCK_TIME + 9),
) | st.builds(Policy, max_per_window=AMOUNTS, window_seconds=st.sampled_from([MINUTE, DAY]))
WALLETS = st.builds(
    Wallet,
    account=st.just(ACCOUNT),
    balance=AMOUNTS,
    pending=AMOUNTS,
    held=AMOUNTS,
    unsettled=AMOUNTS,
    window=st.sampled_from([0, TODAY - 1, TODAY]),
    window_seconds=st.just(DAY),
    spent=AMOUNTS,
    policies=st.lists(POLICIES, max_size=3).map(tuple),
)


@given(WALLETS, st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_authorise__any_wallet__never_beyond_balance_or_any_limit(wallet, input_tokens, most, least):
    bound = prices.bound(card(inputs="3", outputs="5"), Most(input_tokens), max(most, least), least)
    try:
        tokens, amount = authorise(wallet, bound, BLOCK_TIME, 0)
    except PaymentRequired:
        return
    assert least <= tokens <= max(most, least)
    assert amount == bound.amount(tokens)
    assert amount <= wallet.available
    for policy in wallet.policies:
        assert policy.expires_at is None or policy.expires_at > BLOCK_TIME
        assert policy.max_per_charge is None or amount <= policy.max_per_charge
        if policy.max_per_window is not None:
            spent = wallet.spent if wallet.window == TODAY else 0
            committed = spent + wallet.held + wallet.unsettled
            assert amount == 0 or committed + amount <= policy.max_per_window
