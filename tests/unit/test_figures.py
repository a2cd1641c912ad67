"""The ledger at a glance, on both databases, and what it costs."""

import sqlalchemy as sa
from making import BLOCK_TIME, PLATFORM, USD, batch, block, charged, only_sqlite, rejected
from scrape import samples

from waterfall.chain import events as chain
from waterfall.ledger import figures
from waterfall.ledger.figures import Count


async def test_figures__empty_ledger__are_all_nothing(ledger):
    found = await ledger.figures()
    assert (found.charges, found.settled, found.oldest, found.final) == ({}, 0, None, None)
    assert {found.holds, found.lost, found.excess, found.voided} == {Count()}


async def test_figures__every_kind_of_call__is_counted_with_its_amount(desk):
    await desk.charge(1 * USD)
    queued = await desk.ledger.figures()
    sent, refused, settled, gone = [await desk.charge(n) for n in (2, 3, 4, 5)]
    await batch(desk, [sent, refused, settled, gone])
    voided = chain.ChargeVoided(PLATFORM, gone.id)
    await desk.apply(block(2), rejected(refused), charged(settled), voided, final=1)
    await desk.hold(6)
    await desk.ledger.lose(await desk.hold(7), "unknown")
    held = await desk.hold(8)
    await desk.capture(held, 8, excess=9)
    found = await desk.ledger.figures()
    assert found.charges == {
        "queued": Count(2, 1 * USD + 8),
        "batched": Count(1, 2),
        "rejected": Count(1, 3),
    }
    assert found.settled == 1
    assert found.oldest == queued.oldest is not None
    assert (found.holds, found.lost) == (Count(1, 6), Count(1, 7))
    assert (found.excess, found.voided) == (Count(1, 9), Count(1, 5))
    assert (found.final.number, found.final.timestamp) == (1, BLOCK_TIME)


async def test_figures__oldest_charge_rejected__does_not_count_as_waiting(desk):
    refused = await desk.charge(1)
    await batch(desk, [refused])
    await desk.apply(block(2), rejected(refused))
    assert (await desk.ledger.figures()).oldest is None


@only_sqlite
async def test_figures__however_many_calls_there_were__read_only_indices_of_what_is_counted(ledger):
    plans = []

    def explained(connection):
        statements = []
        sa.event.listen(
            connection, "before_cursor_execute", lambda *args: statements.append((args[2], args[3]))
        )
        figures.read(connection)
        for statement, parameters in statements[:]:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.extend(row.detail for row in rows)

    await ledger.read(explained)
    read = [plan for plan in plans if plan.startswith(("SCAN", "SEARCH"))]
    assert len(read) == 8
    assert {plan for plan in read if " USING " not in plan} == {"SCAN blocks"}, "its first row"


async def test_moved__settled_and_rejected__are_counted_once_with_how_long_they_waited(desk):
    metrics = desk.ledger.metrics
    one, other = await desk.charge(1), await desk.charge(2)
    await batch(desk, [one, other])
    await desk.apply(block(2), charged(one), rejected(other, chain.Rejection.BALANCE))
    await desk.ledger.view.finalize(spendable=2, final=2)
    seen = samples(metrics.render().decode())
    assert seen["waterfall_charges_finalized_total",] == 1
    assert seen["waterfall_charges_rejected_total", "balance"] == 1
    assert seen["waterfall_capture_to_inclusion_seconds_count",] == 1
    assert seen["waterfall_charges_captured_total",] == 2
    assert seen["waterfall_captured_credits_total",] == 3
