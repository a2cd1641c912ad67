"""An owner's allowance: what it tightens binds at first sight, what it loosens once that is final."""

import pytest
from making import ACCOUNT, BLOCK_TIME, FUNDED, OTHER, USD, allowance_set, block, charged, deposited

from waterfall.errors import AllowanceExpired, LimitExceeded
from waterfall.types import Allowance

LATER = BLOCK_TIME + 10**6
NONE = Allowance(cap=0, expires_at=LATER)
DOLLAR = Allowance(cap=USD, expires_at=LATER)


async def test_allowance__first__binds_at_first_sight(desk):
    await desk.apply(block(2), allowance_set(ACCOUNT, DOLLAR), spendable=1)
    with pytest.raises(LimitExceeded) as refusal:
        await desk.hold(USD + 1)
    assert (refusal.value.details["scope"], refusal.value.details["limit"]) == ("allowance", "1.00")
    assert (await desk.hold(USD)).amount == USD
    assert (await desk.record()).allowance == DOLLAR


async def test_allowance__held_and_unsettled__count_against_it(desk):
    await desk.apply(block(2), allowance_set(ACCOUNT, DOLLAR))
    await desk.charge(USD // 2)
    await desk.hold(USD // 4)
    with pytest.raises(LimitExceeded) as refusal:
        await desk.hold(USD // 4 + 1)
    assert refusal.value.details["available"] == "0.25"


async def test_allowance__charges__are_counted_while_there_is_one(desk):
    first, second, third = [await desk.charge(USD) for _ in range(3)]
    await desk.apply(block(2), charged(first), allowance_set(ACCOUNT, DOLLAR))
    await desk.apply(block(3), charged(second), allowance_set(ACCOUNT, None), charged(third))
    assert ((await desk.wallet()).allowance_spent, (await desk.record()).allowance) == (USD, None)


async def test_allowance__higher__binds_once_it_is_final(desk):
    await desk.apply(block(2), allowance_set(ACCOUNT, DOLLAR))
    higher = Allowance(cap=2 * USD, expires_at=LATER)
    await desk.apply(block(3), allowance_set(ACCOUNT, higher), spendable=2)
    with pytest.raises(LimitExceeded):
        await desk.hold(USD + 1)
    await desk.ledger.view.finalize(spendable=3, final=0)
    assert (await desk.hold(2 * USD)).amount == 2 * USD


async def test_allowance__removed__binds_until_that_is_final(desk):
    await desk.apply(block(2), allowance_set(ACCOUNT, NONE))
    await desk.apply(block(3), allowance_set(ACCOUNT, None), spendable=2)
    with pytest.raises(LimitExceeded):
        await desk.hold(1)
    await desk.ledger.view.finalize(spendable=3, final=0)
    assert (await desk.hold(FUNDED)).amount == FUNDED


@pytest.mark.parametrize(
    "after", [Allowance(cap=0, expires_at=LATER + 1), Allowance(cap=2 * USD, expires_at=LATER - 1)]
)
async def test_allowance__loosened_in_one_way__both_bind_until_it_is_final(desk, after):
    await desk.apply(block(2), allowance_set(ACCOUNT, DOLLAR))
    await desk.apply(block(3), allowance_set(ACCOUNT, after), spendable=2)
    assert (await desk.wallet()).allowances == (after, DOLLAR)
    await desk.ledger.view.finalize(spendable=3, final=0)
    assert (await desk.wallet()).allowances == (after,)


async def test_allowance__set_before_the_first_deposit__is_not_forgotten(desk):
    await desk.apply(block(2), allowance_set(OTHER, NONE))
    await desk.apply(block(3), deposited(OTHER, USD, label="bob"))
    with pytest.raises(LimitExceeded):
        await desk.hold(1, account=OTHER)


async def test_allowance__about_to_expire__is_expired_by_the_margin(desk):
    await desk.apply(block(2), allowance_set(ACCOUNT, Allowance(cap=USD, expires_at=BLOCK_TIME + 100)))
    assert await desk.hold(1, expiry_margin=99)
    with pytest.raises(AllowanceExpired) as refusal:
        await desk.hold(1, expiry_margin=100)
    assert refusal.value.details["expires_at"] == BLOCK_TIME + 100


async def test_allowance__rewound__is_as_before(desk):
    await desk.apply(block(2), allowance_set(ACCOUNT, NONE))
    await desk.ledger.view.rewind(block(1))
    assert (await desk.hold(FUNDED)).amount == FUNDED
