import asyncio

import pytest
from relaying import Clock

from waterfall.settlement.pace import Alerts, Pace, gather


@pytest.fixture
def clock(monkeypatch):
    return Clock().install(monkeypatch)


def seen(clock, interval, blocks=20, poll=0.5):
    """A pace that has seen a chain for a while; a block has just come."""
    pace = Pace(poll)
    for number in range(blocks):
        pace.saw(number)
        clock.seconds += interval
    pace.saw(blocks)
    return pace


async def test_pause__nothing_known__polls(clock):
    pace = Pace(0.5)
    pace.saw(7)
    assert (pace.pause(), pace.interval) == (0.5, None)


@pytest.mark.parametrize("interval", [0.2, 0.25, 0.5, 1, 2])
def test_pause__chain_of_steady_pace__rests_after_a_block_and_looks_often_when_one_is_due(clock, interval):
    pace = seen(clock, interval)
    assert pace.interval == pytest.approx(interval)
    looks, waited = 0, 0
    while waited < interval:
        pause = pace.pause()
        waited += pause
        clock.seconds += pause
        looks += 1
    assert waited - interval <= max(0.01, interval / 20) + 1e-6, "noticed soon"
    assert waited - interval < 0.05 or interval > 1
    assert looks <= 4 + interval / 0.5, "and not looked for all the time"


def test_pause__slow_chain__never_more_often_than_the_poll(clock):
    pace = seen(clock, 12)
    for _ in range(50):
        assert pace.pause() == 0.5
        clock.seconds += 0.5


def test_pause__block_does_not_come__goes_back_to_the_poll(clock):
    pace = seen(clock, 0.2)
    clock.seconds += 0.19
    assert pace.pause() < 0.02
    clock.seconds += 0.3
    assert pace.pause() == 0.5


def test_saw__several_blocks_at_once__are_counted(clock):
    pace = seen(clock, 1)
    for number in range(23, 60, 3):
        clock.seconds += 3
        pace.saw(number)
    assert pace.interval == pytest.approx(1)


def test_saw__chain_of_another_pace__follows(clock):
    pace = seen(clock, 1)
    for number in range(21, 60):
        clock.seconds += 0.2
        pace.saw(number)
    assert pace.interval == pytest.approx(0.2, rel=0.05)


def test_saw__fewer_blocks_after_a_reorg__is_no_interval(clock):
    pace = seen(clock, 1)
    clock.seconds += 5
    pace.saw(3)
    assert pace.interval == pytest.approx(1)


def test_alerts__the_same_again__once_a_minute(clock):
    alerts = Alerts()
    raised = 0
    for _ in range(600):
        raised += alerts.due("low")
        clock.seconds += 0.5
    assert raised == 5
    assert alerts.due("another")


async def test_gather__many__in_order_and_few_at_once():
    running, most = 0, 0

    async def double(number):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return 2 * number

    assert await gather(double, range(100), at_once=7) == list(range(0, 200, 2))
    assert most == 7
