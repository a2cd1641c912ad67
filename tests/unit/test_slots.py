from dataclasses import replace

import pytest
from making import (
    ACCOUNT,
    BLOCK_TIME,
    FUNDED,
    GAS,
    OTHER,
    OWNER,
    PLATFORM,
    USD,
    VAULT,
    block,
    charged,
    deposited,
    rejected,
    word,
)

from waterfall.chain.events import ExitRequested, Rejection
from waterfall.chain.transactions import Broadcast, Fees, Signed
from waterfall.errors import LedgerError
from waterfall.ledger import schema, slots
from waterfall.ledger.slots import Attempt, Slot
from waterfall.types import Policy


def slot(nonce=0, purpose="settle", reference=None, signer=GAS):
    return Slot(signer.address, nonce, purpose, reference, VAULT, b"\x01\x02", 150_000, BLOCK_TIME + 1800)


def attempt(number=1, max_fee=10, state="signed"):
    return Attempt(
        Signed(b"raw %d" % number, word(f"attempt {number}")), Fees(max_fee, max_fee // 2), state, number
    )


async def opened(desk, slot_, attempt_=None, charges=()):
    await desk.ledger.write(lambda tx: slots.open_slot(tx, slot_, attempt_ or attempt(), charges))


async def closed(desk, slot_, *, succeeded=True, number=2):
    return await desk.ledger.write(
        lambda tx: slots.close_slot(tx, slot_, tx_hash=word("mined"), block=number, succeeded=succeeded)
    )


async def in_flight(desk, signer=GAS):
    return await desk.ledger.read(lambda c: slots.first_open_slot(c, signer.address))


async def queued(desk, limit=100):
    return await desk.ledger.read(lambda c: slots.queued_charges(c, limit))


# ── Choosing charges ─────────────────────────────────────────────────────────────────────────────────


async def test_queued_charges__oldest_first__as_many_as_asked_for(desk):
    charges = [await desk.charge(n) for n in range(1, 6)]
    assert await queued(desk) == charges
    assert await queued(desk, 2) == charges[:2]


async def test_queued_charges__pending_exit__comes_first(desk):
    await desk.apply(block(2), deposited(OTHER, FUNDED, label="bob"))
    first, second = await desk.charge(1), await desk.charge(2, account=OTHER)
    await desk.apply(block(3), ExitRequested(PLATFORM, OTHER, USD, USD, 2**39, 2))
    assert await queued(desk) == [second, first]


async def test_queued_charges__free_batched_settled_or_rejected__are_not_among_them(desk):
    free = await desk.hold(5)
    await desk.capture(free, 0)
    charges = [await desk.charge(n) for n in range(1, 5)]
    await opened(desk, slot(), charges=[charges[0]])
    await desk.apply(block(2), charged(charges[1]), rejected(charges[2]))
    assert await queued(desk) == [charges[3]]


# ── The journal ──────────────────────────────────────────────────────────────────────────────────────


async def test_open_slot__read_back__is_the_slot_with_its_attempt(desk):
    charges = [await desk.charge(n) for n in (1, 2)]
    await opened(desk, slot(), charges=charges)
    found = await in_flight(desk)
    assert found == Slot(**{**{f: getattr(slot(), f) for f in slot().__slots__}, "attempts": (attempt(),)})
    assert await desk.ledger.read(lambda c: slots.batched_charges(c, found)) == charges
    assert await desk.states() == ["batched", "batched"]


async def test_open_slot__nonce_taken__is_refused_and_undone(desk):
    charge = await desk.charge(1)
    await opened(desk, slot())
    with pytest.raises(LedgerError, match="UNIQUE"):
        await opened(desk, slot(), attempt(2), [charge])
    assert await desk.states() == ["queued"]
    assert len(await desk.table(schema.attempts)) == 1


async def test_open_slot__same_nonce_of_another_key__is_another_slot(desk):
    await opened(desk, slot())
    await opened(desk, slot(signer=OWNER), attempt(2))
    assert (await in_flight(desk, OWNER)).attempts == (attempt(2),)


async def test_last_nonce__no_slot_yet__is_none(desk):
    assert await desk.ledger.read(lambda c: slots.last_nonce(c, GAS.address)) is None
    await opened(desk, slot(7))
    await closed(desk, slot(7))
    assert await desk.ledger.read(lambda c: slots.last_nonce(c, GAS.address)) == 7


async def test_first_open_slot__several_open__the_lowest_nonce(desk):
    await opened(desk, slot(3))
    await opened(desk, slot(2), attempt(2))
    assert (await in_flight(desk)).nonce == 2
    await closed(desk, slot(2))
    assert (await in_flight(desk)).nonce == 3
    await closed(desk, slot(3))
    assert await in_flight(desk) is None


async def test_first_open_slot__attempts__dearest_first_whatever_their_size(desk):
    await opened(desk, slot())
    for another in (attempt(2, 2**70), attempt(3, 9), attempt(4, 100)):
        await desk.ledger.write(lambda tx, a=another: slots.renew_slot(tx, slot(), a))
    assert [a.fees.max_fee for a in (await in_flight(desk)).attempts] == [2**70, 100, 10, 9]


async def test_renew_slot__replacement__the_slot_stands_for_it(desk):
    await opened(desk, slot())
    renewed = replace(slot(), calldata=b"later", gas=7, deadline=BLOCK_TIME + 3600)
    await desk.ledger.write(lambda tx: slots.renew_slot(tx, renewed, attempt(2, 20)))
    found = await in_flight(desk)
    assert (found.calldata, found.gas, found.deadline) == (b"later", 7, BLOCK_TIME + 3600)
    assert found.attempts == (attempt(2, 20), attempt())


async def test_note_broadcast__accepted__stays_so_whatever_is_said_later(desk):
    await opened(desk, slot())
    for outcome in (
        Broadcast.UNKNOWN,
        Broadcast.REFUSED,
        Broadcast.ACCEPTED,
        Broadcast.REFUSED,
        Broadcast.UNKNOWN,
    ):
        await desk.ledger.write(lambda tx, o=outcome: slots.note_broadcast(tx, attempt(), o, f"said {o}"))
    (row,) = await desk.table(schema.attempts)
    assert (row["state"], row["detail"]) == ("accepted", "said accepted")


# ── Closing ──────────────────────────────────────────────────────────────────────────────────────────


async def test_close_slot__all_settled__nothing_goes_back(desk):
    charges = [await desk.charge(n) for n in (1, 2)]
    await opened(desk, slot(), charges=charges)
    await desk.apply(block(2), *map(charged, charges))
    assert await closed(desk, slot()) == 0
    assert await desk.states() == ["settled", "settled"]
    (row,) = await desk.table(schema.slots)
    assert (row["state"], row["tx_hash"], row["block"]) == ("mined", word("mined"), 2)


async def test_close_slot__reverted__everything_goes_back(desk):
    charges = [await desk.charge(n) for n in (1, 2)]
    await opened(desk, slot(), charges=charges)
    assert await closed(desk, slot(), succeeded=False) == 2
    assert await queued(desk) == charges
    (row,) = await desk.table(schema.slots)
    assert row["state"] == "reverted"


async def test_close_slot__one_rejected__stays_rejected(desk):
    charges = [await desk.charge(n) for n in (1, 2)]
    await opened(desk, slot(), charges=charges)
    await desk.apply(block(2), charged(charges[0]), rejected(charges[1], Rejection.MAX_PER_CHARGE))
    assert await closed(desk, slot()) == 0
    assert await desk.states() == ["settled", "rejected"]


async def test_close_slot__charges_of_another_slot__are_left_alone(desk):
    charges = [await desk.charge(n) for n in (1, 2)]
    await opened(desk, slot(0), charges=charges[:1])
    await opened(desk, slot(1), attempt(2), charges[1:])
    assert await closed(desk, slot(0), succeeded=False) == 1
    assert await desk.states() == ["queued", "batched"]


# ── Policies ─────────────────────────────────────────────────────────────────────────────────────────

LOW, LOWER = Policy(max_per_charge=10), Policy(max_per_charge=5)


async def due(desk):
    return await desk.ledger.read(slots.due_policy)


async def test_due_policy__nothing_before_it__is_due(desk):
    await desk.order(LOW)
    order, account, policy = await due(desk)
    assert (account, policy) == (ACCOUNT, LOW)
    await opened(desk, slot(0, "policy", str(order), OWNER))
    assert await due(desk) is None


async def test_due_policy__calls_made_before_it__are_waited_for(desk):
    held = await desk.hold(5)
    await desk.order(LOW)
    assert await due(desk) is None
    await desk.capture(held, 5)
    assert await due(desk) is None
    (charge,) = await desk.charges()
    await opened(desk, slot(), charges=[charge])
    assert await due(desk) is None
    await desk.apply(block(2), charged(charge))
    assert (await due(desk))[2] == LOW


async def test_due_policy__calls_made_after_it__are_not_waited_for(desk):
    await desk.order(LOW)
    await desk.hold(5)
    await desk.charge(5)
    assert (await due(desk))[2] == LOW


async def test_due_policy__calls_of_another_account__are_not_waited_for(desk):
    await desk.apply(block(2), deposited(OTHER, FUNDED, label="bob"))
    await desk.hold(5, account=OTHER)
    await desk.order(LOW)
    assert (await due(desk))[1] == ACCOUNT


async def test_due_policy__rejected_charge__is_not_waited_for_as_it_may_need_the_policy(desk):
    charge = await desk.charge(5)
    await desk.apply(block(2), rejected(charge, Rejection.POLICY_EXPIRED))
    await desk.order(LOW)
    assert (await due(desk))[2] == LOW


async def test_order_policy__a_newer_one__replaces_what_still_waits(desk):
    await desk.hold(5)
    await desk.order(LOW)
    await desk.order(LOWER)
    assert [row["state"] for row in await desk.table(schema.policy_orders)].count("replaced") == 1
    assert (await desk.record()).wanted == LOWER


@pytest.mark.parametrize(("succeeded", "state"), [(True, "done"), (False, "waiting")])
async def test_close_slot__policy__is_done_or_waits_again(desk, succeeded, state):
    await desk.order(LOW)
    order, *_ = await due(desk)
    its = slot(0, "policy", str(order), OWNER)
    await opened(desk, its)
    await closed(desk, its, succeeded=succeeded)
    (row,) = await desk.table(schema.policy_orders)
    assert row["state"] == state
