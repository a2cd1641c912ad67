import asyncio
from contextlib import suppress

import pytest
from making import (
    ACCOUNT,
    BLOCK_TIME,
    FUNDED,
    GENESIS,
    METER,
    USD,
    Desk,
    block,
    charged,
    deposited,
    only_postgres,
    policy_set,
)

from waterfall.chain.events import Position
from waterfall.errors import LedgerError
from waterfall.ledger import projection, shared
from waterfall.types import Policy


async def test_recent_blocks__applied_and_not_final__newest_first(desk):
    for number in (2, 3):
        await desk.apply(block(number))
    assert await desk.ledger.view.recent_blocks() == [block(3), block(2), block(1, BLOCK_TIME), GENESIS]
    await desk.ledger.view.finalize(spendable=3, final=2)
    assert [b.number for b in await desk.ledger.view.recent_blocks()] == [3, 2]


async def test_apply__several_blocks__are_one_step(desk):
    await desk.ledger.view.apply([(block(2), []), (block(3), [])], spendable=3, final=0)
    assert desk.ledger.view.head.block == block(3)
    assert [b.number for b in await desk.ledger.view.recent_blocks()] == [3, 2, 1, 0]


async def test_apply__one_block_fails__none_is_projected(desk):
    position = Position(3, 0, "0x" + "11" * 32)
    twice = [(position, deposited(ACCOUNT, 1, entry=n)) for n in (2, 3)]
    with pytest.raises(LedgerError):
        await desk.ledger.view.apply([(block(2), []), (block(3), twice)], spendable=3, final=0)
    assert desk.ledger.view.head.block.number == 1
    assert [b.number for b in await desk.ledger.view.recent_blocks()] == [1, 0]
    assert (await desk.wallet()).balance == FUNDED


async def test_rewind__head_and_waiters__are_told(desk):
    await desk.apply(block(2))
    desk.ledger.captured.clear()
    await desk.ledger.view.rewind(block(1, BLOCK_TIME))
    assert desk.ledger.view.head.block.number == 1
    assert desk.ledger.captured.is_set()


async def test_rebuild__from_the_chain__same_balances_and_what_the_chain_does_not_know(desk):
    settled, waiting = await desk.charge(5), await desk.charge(7)
    policy = Policy(max_per_charge=100)
    await desk.apply(block(2), charged(settled), policy_set(ACCOUNT, policy))
    await desk.ledger.view.finalize(spendable=2, final=2)
    epoch = desk.ledger.epoch
    await desk.ledger.view.rebuild()
    assert desk.ledger.epoch != epoch
    assert desk.ledger.view.head is None
    wallet = await desk.wallet()
    assert (wallet.balance, wallet.unsettled, wallet.policies) == (0, 12, ())
    await desk.apply(block(1, BLOCK_TIME), deposited(ACCOUNT, FUNDED))
    await desk.apply(block(2), charged(settled), policy_set(ACCOUNT, policy))
    wallet = await desk.wallet()
    assert (wallet.balance, wallet.unsettled, wallet.policies) == (FUNDED - 5, 7, (policy,))
    assert await desk.states() == ["settled", "queued"]
    held = await desk.hold(1)
    assert held.charge_id >> 32 == desk.ledger.epoch
    assert held.charge_id != waiting.id


async def test_rebuild__epoch__is_the_one_it_opens_with_again(desk, open_ledger):
    await desk.ledger.view.rebuild()
    epoch = desk.ledger.epoch
    desk.ledger.close()
    assert open_ledger().epoch == epoch


@only_postgres
async def test_rebuild__another_process_works_with_it__is_refused_and_changes_nothing(desk, open_ledger):
    """As a relayer that leads nothing but a lane; the sessions of this process are none of another's."""
    other = open_ledger()
    assert await other.leads("a lane")
    assert await desk.ledger.leads("indexer")
    epoch, head = desk.ledger.epoch, desk.ledger.view.head
    with pytest.raises(LedgerError, match="stop every gateway and relayer"):
        await desk.ledger.view.rebuild()
    known = await desk.ledger.read(shared.read)
    assert (known.epoch, known.head) == (epoch, head.block)
    assert (await desk.wallet()).balance == FUNDED
    other.close()
    async with asyncio.timeout(10):
        while desk.ledger.epoch == epoch:  # the server takes a moment to see that a session has ended
            with suppress(LedgerError):
                await desk.ledger.view.rebuild()


async def test_mismatch__is_kept_over_a_restart_until_a_rebuild(desk, open_ledger):
    await desk.ledger.view.note_mismatch("first")
    await desk.ledger.view.note_mismatch("second")
    desk.ledger.close()
    again = open_ledger()
    assert again.view.mismatches == ["first"]
    await again.view.rebuild()
    assert again.view.mismatches == []
    again.close()
    assert open_ledger().view.mismatches == []


async def test_finalize__nothing_new__costs_no_write(desk, monkeypatch):
    await desk.ledger.view.finalize(spendable=1, final=1)
    written = []
    monkeypatch.setattr(
        projection, "finalize", lambda tx, spendable, final: written.append((spendable, final))
    )
    await desk.ledger.view.finalize(spendable=1, final=1)
    assert written == []
    await desk.ledger.view.finalize(spendable=1, final=0)
    assert written == [(1, 0)]


def test_saw_head__nothing_read_yet__changes_nothing(ledger):
    ledger.view.saw_head()
    assert ledger.view.head is None


async def test_apply__its_commit_is_seen_before_its_answer__the_head_is_moved_once(desk, monkeypatch):
    """What `follow` reads in that moment is this process's own move, not another's."""
    ledger, run = desk.ledger, desk.ledger._writer.run  # noqa: SLF001

    async def read_before_answering(operation):
        result = await run(operation)
        await ledger.view.look()
        return result

    monkeypatch.setattr(ledger._writer, "run", read_before_answering)  # noqa: SLF001
    for number in (2, 3, 4):
        await desk.apply(block(number))
    await ledger.view.rewind(block(2))
    await desk.apply(block(3, fork="b"))
    assert ledger.view.head.block == block(3, fork="b")


@only_postgres
async def test_apply__head_moved_by_another_process__is_refused_and_nothing_of_it_kept(desk, open_ledger):
    other = Desk(open_ledger(), METER)
    await desk.apply(block(2), deposited(ACCOUNT, 5, entry=2))
    with pytest.raises(LedgerError, match="another process has moved"):
        await other.apply(block(2), deposited(ACCOUNT, 5, entry=2))
    assert (await desk.wallet()).balance == FUNDED + 5


@only_postgres
async def test_finalize__head_moved_by_another_process__nothing_counts(desk, open_ledger):
    other = open_ledger()
    await other.view.look()
    await desk.apply(block(2), deposited(ACCOUNT, USD), spendable=1)
    with pytest.raises(LedgerError, match="another process has moved"):
        await other.view.finalize(spendable=2, final=2)
    assert (await desk.wallet()).pending == USD
    await other.view.finalize(spendable=2, final=2)
    assert (await desk.wallet()).pending == 0


# ── What was read before this process itself changed it ──────────────────────────────────────────────


async def seen(desk):
    """What a look that begins now will have read when it is over."""
    return await desk.ledger.read(shared.read)


async def test_learn__read_before_a_mismatch_was_noted__does_not_take_it_back(desk):
    before = await seen(desk)
    await desk.ledger.view.note_mismatch("the chain has another")
    desk.ledger.view.learn(before)
    assert desk.ledger.view.mismatches == ["the chain has another"]
    desk.ledger.view.learn(await seen(desk))
    assert desk.ledger.view.mismatches == ["the chain has another"]


async def test_learn__read_before_a_block_showed_a_mismatch__does_not_take_it_back(desk):
    charge, before = await desk.charge(5), await seen(desk)
    await desk.apply(block(2), charged(charge, amount=6))
    (mismatch,) = desk.ledger.view.mismatches
    desk.ledger.view.learn(before)
    assert desk.ledger.view.mismatches == [mismatch]
    desk.ledger.view.learn(await seen(desk))
    assert desk.ledger.view.mismatches == [mismatch]


async def test_learn__read_before_conflicts_were_written_off__does_not_bring_the_mismatch_back(desk):
    await desk.ledger.view.note_mismatch("the chain has another")
    before = await seen(desk)
    await desk.ledger.view.write_off_conflicts()
    desk.ledger.view.learn(before)
    assert desk.ledger.view.mismatches == []
    desk.ledger.view.learn(await seen(desk))
    assert desk.ledger.view.mismatches == []


async def test_learn__read_before_a_rebuild__brings_neither_mismatch_nor_epoch_back(desk):
    await desk.ledger.view.note_mismatch("the chain has another")
    before = await seen(desk)
    await desk.ledger.view.rebuild()
    epoch = desk.ledger.epoch
    for known in before, await seen(desk):
        desk.ledger.view.learn(known)
        assert (desk.ledger.view.mismatches, desk.ledger.epoch, desk.ledger.view.head) == ([], epoch, None)


async def test_learn__read_between_commit_and_answer__names_a_mismatch_once(desk, monkeypatch):
    view, run = desk.ledger.view, desk.ledger._writer.run  # noqa: SLF001

    async def read_before_answering(operation):
        result = await run(operation)
        await view.look()
        return result

    monkeypatch.setattr(desk.ledger._writer, "run", read_before_answering)  # noqa: SLF001
    await view.note_mismatch("the chain has another")
    assert view.mismatches == ["the chain has another"]


async def test_learn__overtaken_by_a_later_look__says_nothing(desk):
    early = await seen(desk)
    await desk.ledger.write(lambda tx: shared.keep_mismatches(tx, ["another process's"]))
    desk.ledger.view.learn(await seen(desk))
    desk.ledger.view.learn(early)
    assert desk.ledger.view.mismatches == ["another process's"]


@only_postgres
async def test_learn__mismatch_of_another_process__is_known_here_until_it_takes_it_back(desk, open_ledger):
    other = open_ledger()
    await desk.ledger.view.note_mismatch("the chain has another")
    await other.view.look()
    assert other.view.mismatches == ["the chain has another"]
    await desk.ledger.view.write_off_conflicts()
    await other.view.look()
    assert other.view.mismatches == []
