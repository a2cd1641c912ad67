import asyncio
from dataclasses import replace

import pytest
import sqlalchemy as sa
from making import (
    ACCOUNT,
    BLOCK_TIME,
    FUNDED,
    GAS,
    GAS_TOO,
    GENESIS,
    OTHER,
    OWNER,
    PLATFORM,
    USD,
    VAULT,
    block,
    charged,
    deposited,
    only_postgres,
    only_sqlite,
    rejected,
    word,
)

from waterfall.chain.events import ExitRequested, Rejection
from waterfall.chain.transactions import Broadcast, Fees, Signed
from waterfall.errors import LedgerError
from waterfall.ledger import journal, schema, slots
from waterfall.ledger.journal import now_ms
from waterfall.ledger.slots import Attempt, Backlog, Mined, Slot, WorkTaken
from waterfall.types import Policy


def slot(nonce=0, purpose="settle", reference=None, signer=GAS):
    return Slot(signer.address, nonce, purpose, reference, VAULT, b"\x01\x02", 150_000, BLOCK_TIME + 1800)


def attempt(number=1, max_fee=10, state="signed"):
    return Attempt(
        Signed(b"raw %d" % number, word(f"attempt {number}")), Fees(max_fee, max_fee // 2), state, number
    )


async def opened(desk, slot_, attempt_=None, charges=()):
    await desk.ledger.write(lambda tx: slots.open_slot(tx, slot_, attempt_ or attempt(), charges))


async def in_flight(desk, signer=GAS):
    return await desk.ledger.read(lambda c: slots.first_open_slot(c, signer.address))


async def queued(desk, limit=100):
    return await desk.ledger.read(lambda c: slots.queued_charges(c, limit))


# ── Choosing charges ─────────────────────────────────────────────────────────────────────────────────


async def test_queued_charges__oldest_first__as_many_as_asked_for(desk):
    charges = [await desk.charge(n) for n in range(1, 6)]
    assert await queued(desk) == charges
    assert await queued(desk, 2) == charges[:2]
    assert [await desk.ledger.read(lambda c, n=n: slots.count_queued(c, n)) for n in (2, 9)] == [2, 5]


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
    assert await desk.ledger.read(lambda c: slots.batched_charges(c.execute, found)) == charges
    assert await desk.states() == ["batched", "batched"]


async def test_open_slot__nonce_taken__is_refused_and_undone(desk):
    charge = await desk.charge(1)
    await opened(desk, slot())
    with pytest.raises(LedgerError, match=r"(?i)unique"):
        await opened(desk, slot(), attempt(2), [charge])
    assert await desk.states() == ["queued"]
    assert len(await desk.table(schema.attempts)) == 1


async def test_open_slot__some_charges_taken_by_another_lane__nothing_is_journalled(desk):
    charges = [await desk.charge(n) for n in (1, 2, 3)]
    await opened(desk, slot(), charges=charges[:1])
    with pytest.raises(WorkTaken, match="1 of 3"):
        await opened(desk, slot(signer=GAS_TOO), attempt(2), charges)
    assert await desk.states() == ["batched", "queued", "queued"]
    assert await in_flight(desk, GAS_TOO) is None
    assert len(await desk.table(schema.attempts)) == 1
    await opened(desk, slot(signer=GAS_TOO), attempt(2), charges[1:])
    assert await desk.states() == ["batched"] * 3


async def test_open_slot__two_lanes_at_once__every_charge_in_one_batch(desk):
    charges = [await desk.charge(n) for n in range(1, 11)]
    taken = await asyncio.gather(
        opened(desk, slot(), attempt(1), charges),
        opened(desk, slot(signer=GAS_TOO), attempt(2), charges),
        return_exceptions=True,
    )
    assert [type(result) for result in taken].count(WorkTaken) == 1


async def test_open_slot__policy_sent_by_another_process__nothing_is_journalled(desk):
    await desk.order(LOW)
    order, *_ = await due(desk)
    await opened(desk, slot(0, "policy", str(order), OWNER))
    with pytest.raises(WorkTaken):
        await opened(desk, slot(1, "policy", str(order), OWNER), attempt(2))
    assert len(await desk.table(schema.slots)) == 1


async def test_open_slot__sweep_in_flight__nothing_is_journalled_until_it_is_closed(desk):
    await opened(desk, slot(0, "sweep", ACCOUNT))
    assert await desk.ledger.read(lambda c: slots.in_flight(c, "sweep")) == {ACCOUNT}
    with pytest.raises(WorkTaken):
        await opened(desk, slot(0, "sweep", ACCOUNT, GAS_TOO), attempt(2))
    await opened(desk, slot(0, "sweep", OTHER, GAS_TOO), attempt(2))
    await desk.close(slot(0, "sweep", ACCOUNT))
    await opened(desk, slot(1, "sweep", ACCOUNT), attempt(3))


@only_sqlite
async def test_queued_charges__many_settled__are_found_by_the_index(desk):
    """Of a million charges, the few that wait must not be looked for among all."""
    plans = []

    def explain(connection):
        statements = []
        sa.event.listen(
            connection, "before_cursor_execute", lambda c, u, s, p, x, m: statements.append((s, p))
        )
        for query in (lambda: slots.queued_charges(connection, 5), lambda: slots.backlog(connection)):
            query()
        slots.batched_charges(connection.execute, slot())
        for statement, parameters in statements.copy():
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            plans.extend(row[3] for row in rows if "charges" in row[3])

    await desk.ledger.read(explain)
    assert len(plans) == 5
    assert all("charges_unsettled" in plan for plan in plans)


async def test_open_slot__same_nonce_of_another_key__is_another_slot(desk):
    await opened(desk, slot())
    await opened(desk, slot(signer=OWNER), attempt(2))
    assert (await in_flight(desk, OWNER)).attempts == (attempt(2),)


async def test_last_nonce__no_slot_yet__is_none(desk):
    assert await desk.ledger.read(lambda c: slots.last_nonce(c, GAS.address)) is None
    await opened(desk, slot(7))
    await desk.close(slot(7))
    assert await desk.ledger.read(lambda c: slots.last_nonce(c, GAS.address)) == 7


async def test_first_open_slot__several_open__the_lowest_nonce(desk):
    await opened(desk, slot(3))
    await opened(desk, slot(2), attempt(2))
    assert (await in_flight(desk)).nonce == 2
    await desk.close(slot(2))
    assert (await in_flight(desk)).nonce == 3
    await desk.close(slot(3))
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
    assert await desk.close(slot()) == 0
    assert await desk.states() == ["settled", "settled"]
    (row,) = await desk.table(schema.slots)
    assert (row["state"], row["tx_hash"], row["block"]) == ("mined", word("mined"), 2)


async def test_close_slot__reverted__everything_goes_back(desk):
    charges = [await desk.charge(n) for n in (1, 2)]
    await opened(desk, slot(), charges=charges)
    assert await desk.close(slot(), succeeded=False) == 2
    assert await queued(desk) == charges
    (row,) = await desk.table(schema.slots)
    assert row["state"] == "reverted"


@pytest.mark.parametrize(
    "mined",
    [
        Mined(word("mined"), 3, block(3, fork="b").hash, succeeded=True),
        Mined(word("mined"), 4, block(4).hash, succeeded=True),
    ],
    ids=["another fork's", "beyond the head"],
)
async def test_close_slot__block_that_is_not_projected__stays_open(desk, mined):
    """A reorg between the receipt and this: closed, its charges would wait for ever in a slot that nobody looks at."""
    charge = await desk.charge(1)
    await opened(desk, slot(), charges=[charge])
    await desk.apply(block(2))
    await desk.apply(block(3))
    assert await desk.ledger.write(lambda tx: slots.close_slot(tx, slot(), mined)) is None
    assert await in_flight(desk) is not None
    assert await desk.states() == ["batched"]


async def test_close_slot__block_is_final_and_not_kept_any_more__is_closed(desk):
    await opened(desk, slot())
    for number in range(2, 6):
        await desk.apply(block(number), final=number)
    assert await desk.close(slot(), number=3) == 0
    assert await in_flight(desk) is None


async def test_renew_slot__carries_less_then_a_reorg_between_its_attempts__all_go_on(desk):
    """The larger attempt is mined, taken back, and the smaller one mined in its place: the others are queued."""
    charges = [await desk.charge(n) for n in (1, 2, 3, 4)]
    await opened(desk, slot(), charges=charges)
    await desk.ledger.write(lambda tx: slots.renew_slot(tx, slot(), attempt(2, max_fee=20), charges[:2]))
    assert await desk.states() == ["batched", "batched", "queued", "queued"]
    await desk.apply(block(2), *(charged(charge) for charge in charges))
    await desk.ledger.view.rewind(desk.blocks[-2])
    assert await desk.states() == ["batched", "batched", "queued", "queued"]
    await desk.apply(block(2, fork="b"), *(charged(charge) for charge in charges[:2]))
    assert await desk.close(slot()) == 0


@only_postgres
async def test_close_slot__rewind_by_another_process_meanwhile__comes_after_it(desk, open_ledger):
    """Whichever is first, the slot is open afterwards: the rewind opens what was closed in its blocks."""
    await opened(desk, slot())
    await desk.apply(block(2))
    other = open_ledger()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(desk.close(slot()))
        tasks.create_task(other.view.rewind(GENESIS))
    assert await in_flight(desk) is not None


async def test_close_slot__one_rejected__stays_rejected(desk):
    charges = [await desk.charge(n) for n in (1, 2)]
    await opened(desk, slot(), charges=charges)
    await desk.apply(block(2), charged(charges[0]), rejected(charges[1], Rejection.MAX_PER_CHARGE))
    assert await desk.close(slot()) == 0
    assert await desk.states() == ["settled", "rejected"]


async def test_close_slot__charges_of_another_slot__are_left_alone(desk):
    charges = [await desk.charge(n) for n in (1, 2)]
    await opened(desk, slot(0), charges=charges[:1])
    await opened(desk, slot(1), attempt(2), charges[1:])
    assert await desk.close(slot(0), succeeded=False) == 1
    assert await desk.states() == ["queued", "batched"]


# ── Giving back ──────────────────────────────────────────────────────────────────────────────────────


async def test_give_back__what_a_key_has_in_flight__and_nothing_else(desk):
    charges = [await desk.charge(n) for n in range(1, 5)]
    await opened(desk, slot(0), charges=charges[:2])
    await opened(desk, slot(0, signer=GAS_TOO), attempt(2), charges[2:3])
    await desk.apply(block(2), charged(charges[0]))
    assert await desk.ledger.write(lambda tx: slots.give_back(tx, GAS.address)) == 1
    assert await desk.states() == ["settled", "queued", "batched", "queued"]
    assert (await in_flight(desk)).nonce == 0, "what was sent may still be mined"
    await opened(desk, slot(1, signer=GAS_TOO), attempt(3), charges[1:2])
    await desk.apply(block(3), charged(charges[1], 3))
    assert await desk.close(slot(0), number=3) == 0
    assert await desk.close(slot(1, signer=GAS_TOO), number=3) == 0


async def test_give_back_others__keys_that_are_gone__after_a_while(desk):
    charges = [await desk.charge(n) for n in (1, 2)]
    await opened(desk, slot(0), charges=charges[:1])
    await opened(desk, slot(0, signer=GAS_TOO), attempt(2), charges[1:])

    async def back(opened_before):
        keys = [GAS.address]
        return await desk.ledger.write(lambda tx: slots.give_back_others(tx, keys, opened_before))

    assert await back(now_ms() - 60_000) == 0
    assert await back(now_ms() + 1) == 1
    assert await desk.states() == ["batched", "queued"]


async def test_set_aside__charge__stays_a_debt_that_is_not_sent(desk):
    charges = [await desk.charge(n) for n in (1, 2)]
    await desk.ledger.write(lambda tx: slots.set_aside(tx, charges[0], "Panic"))
    assert await queued(desk) == charges[1:]
    assert (await desk.wallet()).unsettled == 3
    assert await desk.ledger.write(journal.recount) == []


async def test_backlog__queued_and_batched__not_what_is_rejected(desk):
    assert await desk.ledger.read(slots.backlog) == Backlog(0, None, None)
    charges = [await desk.charge(n) for n in (1, 2, 3)]
    await desk.ledger.write(lambda tx: slots.set_aside(tx, charges[0], "Panic"))
    await opened(desk, slot(), charges=charges[2:])
    found = await desk.ledger.read(slots.backlog)
    assert (found.count, found.oldest) == (2, 2)
    assert abs(found.captured_at - now_ms()) < 60_000


# ── Policies ─────────────────────────────────────────────────────────────────────────────────────────

LOW, LOWER = Policy(max_per_charge=10), Policy(max_per_charge=5)


async def due(desk, settled_by=100):
    return await desk.ledger.read(lambda c: slots.due_policy(c, settled_by))


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


async def test_due_policy__charge_settled_in_a_block_that_may_go__is_waited_for(desk):
    charge = await desk.charge(5)
    await desk.order(LOW)
    await desk.apply(block(2), charged(charge))
    assert await due(desk, settled_by=1) is None
    assert (await due(desk, settled_by=2))[2] == LOW


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
    await desk.close(its, succeeded=succeeded)
    (row,) = await desk.table(schema.policy_orders)
    assert row["state"] == state
