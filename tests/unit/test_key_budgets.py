"""What an API key's own limits let through, on both databases: exact, whatever comes at once, and whatever fails."""

import asyncio
import threading

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from making import ACCOUNT, BLOCK_TIME, sign

from waterfall.errors import InsufficientFunds, InvalidApiKey, LimitExceeded, RateLimited
from waterfall.ledger import journal, keys, schema
from waterfall.ledger.budgets import Budget, Draw
from waterfall.ledger.journal import Caller
from waterfall.metering import prices
from waterfall.types import KeyLimits

DAY = 86_400


async def make(desk, **limits):
    """A key with limits; whoever calls with it."""
    key = await desk.ledger.keys.add("wf_ada", account=ACCOUNT, name="ada", limits=KeyLimits(**limits))
    return Caller(ACCOUNT, key.id, key.limits, key.budget)


def hold(desk, caller, amount, **more):
    return desk.ledger.hold(
        caller, "small", prices.fixed(amount), block_time=BLOCK_TIME, expiry_margin=0, surface="chat", **more
    )


async def capture(desk, held, amount):
    return await desk.ledger.capture(held, sign(held, amount, meter=desk.meter))


async def spent(desk, caller):
    (key,) = (key for key in desk.ledger.keys.of(ACCOUNT) if key.id == caller.api_key)
    return await desk.ledger.read(lambda c: keys.spent(c, key, journal.now_ms()))


async def test_budget__sixty_calls_at_once_on_room_for_ten__exactly_ten_run(desk):
    caller = await make(desk, budget=100)
    outcomes = await asyncio.gather(*(hold(desk, caller, 10) for _ in range(60)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, LimitExceeded)]
    assert (len(refused), len(outcomes) - len(refused)) == (50, 10)
    assert await spent(desk, caller) == 100
    assert (await desk.wallet()).held == 100
    assert {error.details["scope"] for error in refused} == {"key_budget"}


async def test_budget__call_that_cost_less__leaves_the_rest(desk):
    caller = await make(desk, budget=100)
    held = await hold(desk, caller, 100)
    with pytest.raises(LimitExceeded) as refused:
        await hold(desk, caller, 1)
    assert refused.value.details["available"] == "0.00"
    await capture(desk, held, 30)
    assert await spent(desk, caller) == 30
    again = await hold(desk, caller, 70)
    await desk.ledger.release(again, "nothing came")
    assert await spent(desk, caller) == 30


async def test_budget__hold_and_capture_in_one_commit_with_others__count_once(desk):
    caller = await make(desk, budget=1000)
    first = await hold(desk, caller, 100)
    await asyncio.gather(capture(desk, first, 40), *(hold(desk, caller, 100) for _ in range(5)))
    assert await spent(desk, caller) == 540


async def test_budget__refused_for_the_accounts_money__counts_nothing(desk):
    caller = await make(desk, budget=10**30 // 10**10, calls_per_minute=2)
    for _ in range(5):
        with pytest.raises(Exception, match="needs at least"):
            await hold(desk, caller, 10**18)
    assert await spent(desk, caller) == 0
    await hold(desk, caller, 1)
    await hold(desk, caller, 1)
    with pytest.raises(RateLimited):
        await hold(desk, caller, 1)


async def test_budget__refused_among_others_of_one_commit__counts_nothing(desk):
    caller = await make(desk, budget=10**20, calls_per_minute=2)
    goes_on = threading.Event()
    busy = asyncio.create_task(desk.ledger.write(lambda tx: goes_on.wait(10)))
    asked = [asyncio.create_task(hold(desk, caller, amount)) for amount in (1, 10**18, 1)]
    await asyncio.sleep(0)
    goes_on.set()
    await busy
    first, refused, second = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(refused, InsufficientFunds)
    assert (first.amount, second.amount, await spent(desk, caller)) == (1, 1, 2)


async def test_budget__call_that_ends_in_a_later_window__is_not_counted_there(desk):
    caller = await make(desk, budget=100, budget_seconds=DAY)
    charged, released = await hold(desk, caller, 30), await hold(desk, caller, 40)
    turned = schema.key_budgets.update().values(window=schema.key_budgets.c.window + DAY, used=7)
    await desk.ledger.write(lambda tx: tx.run(turned))
    await capture(desk, charged, 20)
    await desk.ledger.release(released, "nothing came")
    assert await spent(desk, caller) == 7


@pytest.mark.parametrize("way", ["lost", "unanswered", "abandoned", "at start"])
async def test_budget__hold_that_ended_without_its_call__is_given_back(desk, way):
    caller = await make(desk, budget=100, budget_seconds=DAY)
    held = await hold(desk, caller, 60, receipt_id="ab" * 16)
    await capture(desk, await hold(desk, caller, 40), 25)
    if way == "lost":
        await desk.ledger.lose(held, "it was cut")
    elif way == "unanswered":
        await desk.ledger.release_unanswered(held.receipt_id, ACCOUNT, "nobody was told")
    elif way == "abandoned":
        await desk.ledger.write(lambda tx: tx.run(schema.holds.update().values(lease_until=0)))
        assert await desk.ledger.write(journal.lose_abandoned_holds) == 1
    else:
        assert await desk.ledger.write(lambda tx: journal.lose_open_holds(tx, "it stopped")) == 1
    assert await spent(desk, caller) == 25


async def test_budget__hold_cancelled_before_it_is_written__is_given_back(desk):
    caller = await make(desk, budget=100)
    asking = asyncio.create_task(hold(desk, caller, 60, receipt_id="cd" * 16))
    await asyncio.sleep(0)
    asking.cancel()
    await desk.ledger.release_unanswered("cd" * 16, ACCOUNT, "its caller is gone")
    assert (await spent(desk, caller), (await desk.wallet()).held) == (0, 0)


async def test_budget__call_of_an_earlier_window__leaves_this_one_alone(desk):
    caller = await make(desk, budget=100, budget_seconds=DAY)
    held = await hold(desk, caller, 60)
    table = schema.key_budgets
    earlier = table.update().values(window=table.c.window - DAY)
    await desk.ledger.write(lambda tx: tx.run(earlier))
    await desk.ledger.write(
        lambda tx: tx.run(schema.holds.update().values(budget_window=schema.holds.c.budget_window - DAY))
    )
    assert await spent(desk, caller) == 0
    await hold(desk, caller, 100)
    assert await desk.ledger.write(lambda tx: journal.lose_open_holds(tx, "it stopped")) == 2
    assert await spent(desk, caller) == 0
    assert held.draw is not None


def test_budget__clock_set_back_over_a_windows_end__forgets_nothing():
    limits, budget = KeyLimits(budget=100, budget_seconds=60), Budget("k", 0, 0, 0)
    drawn = budget.turn(limits, 120_000)
    budget.used = 70
    assert budget.turn(limits, 119_999) == drawn == Draw("k", 120)
    assert budget.used == 70
    assert (budget.turn(limits, 180_000).window, budget.used) == (180, 0)


async def test_budget__fresh_key_in_the_place_of_one__goes_on_with_it(desk):
    caller = await make(desk, budget=100)
    await capture(desk, await hold(desk, caller, 80), 80)
    fresh = await desk.ledger.keys.rotate(caller.api_key, "wf_fresh", grace_ms=60_000)
    assert (fresh.limits, fresh.budget) == (caller.limits, caller.budget)
    after = Caller(ACCOUNT, fresh.id, fresh.limits, fresh.budget)
    with pytest.raises(LimitExceeded):
        await hold(desk, after, 21)
    await hold(desk, after, 20)
    with pytest.raises(LimitExceeded):
        await hold(desk, caller, 1)


async def test_budget__of_an_erased_account__opens_nothing(desk):
    caller = await make(desk, budget=100)
    await desk.ledger.forget(ACCOUNT)
    with pytest.raises(InvalidApiKey):
        await hold(desk, caller, 1)
    assert await desk.table(schema.key_budgets) == []
    (row,) = await desk.table(schema.wallets)
    assert row["held"] == 0


async def test_max_per_call__dearer_call__is_refused_by_its_scope(desk):
    caller = await make(desk, max_per_call=10)
    await hold(desk, caller, 10)
    with pytest.raises(LimitExceeded) as refused:
        await hold(desk, caller, 11)
    assert (refused.value.details["scope"], refused.value.details["limit"]) == (
        "key_per_call",
        "0.00000000001",
    )
    assert await desk.ledger.read(lambda c: c.execute(sa.select(schema.key_budgets)).all()) == []


async def test_rate__attempt_by_another_model__is_the_same_call(desk):
    caller = await make(desk, calls_per_minute=1)
    first = await hold(desk, caller, 1)
    await hold(desk, caller, 1, after=first.sequence)
    with pytest.raises(RateLimited) as refused:
        await hold(desk, caller, 1)
    assert 59_000 < refused.value.details["retry_after_ms"] <= 60_001


@given(st.integers(1, 60_000), st.lists(st.integers(0, 20_000), max_size=200))
def test_rate__whenever_calls_come__no_minute_has_twice_its_number_and_a_pause_lets_all_in(most, pauses):
    limits, budget, now, came = KeyLimits(calls_per_minute=most), Budget("k", 0, 0, 0), 10**12, []
    for pause in pauses:
        now += pause
        try:
            budget.count_call(limits, now)
        except RateLimited as refused:
            later = now + refused.details["retry_after_ms"]
            Budget("k", 0, 0, budget.next_call_at).count_call(limits, later)  # as it was told
        else:
            came.append(now)
    for begin in came:
        assert len([at for at in came if begin <= at < begin + 60_000]) <= 2 * most
    budget.count_call(limits, now + 60_000)


def test_rate__many_at_once__so_many_and_no_more():
    limits, budget = KeyLimits(calls_per_minute=7), Budget("k", 0, 0, 0)
    for _ in range(7):
        budget.count_call(limits, 10**12)
    with pytest.raises(RateLimited):
        budget.count_call(limits, 10**12)
