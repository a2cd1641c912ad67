"""Reorgs below finality, with settled charges in the blocks that are gone, while calls go on."""

import asyncio
import contextlib
import signal

import pytest
import sqlalchemy as sa
from books import ALL, depose
from service import local_net

from waterfall.chain.events import Charged
from waterfall.devnet.proxy import result
from waterfall.ledger import schema

DEPTHS = range(1, 21) if ALL else (1, 2, 5, 20)


@pytest.fixture
async def net(tmp_path):
    """A chain whose blocks are final only 64 blocks later."""
    async with local_net(tmp_path / "chain", slots_in_an_epoch=32) as net:
        yield net


async def charged(site):
    """Where the chain has each charge."""
    logs = await site.net.vault.logs(fromBlock="0x0", toBlock="latest")
    return {event.id: position for position, event in logs if isinstance(event, Charged)}


async def settled_over(site, caller, url, blocks):
    """Charges in about every other one of the newest blocks; where they are."""
    rpc, first = site.net.anvil.rpc, await number(site) + 1
    while await number(site) < first + blocks - 1:
        assert await caller.call(url) == "answered"
        await site.until(lambda states: not states["queued"] + states["batched"] + states["open"])
        if await number(site) < first + blocks - 1:
            await rpc.call("evm_mine")
    places = await charged(site)
    assert min(place.block for place in places.values()) == first
    return places


async def number(site):
    return int(await site.net.anvil.rpc.call("eth_blockNumber"), 16)


async def attempts(site):
    return set(await site.rows(sa.select(schema.attempts.c.tx_hash, schema.attempts.c.nonce)))


async def reorg(site, back_to):
    """From this block on another branch without a transaction, a block longer, while calls go on."""
    rpc = site.net.anvil.rpc
    await rpc.call("evm_setAutomine", False)  # anvil loses blocks for good if it mines one meanwhile
    await rpc.call("anvil_reorg", await number(site) - back_to, [])
    await rpc.call("evm_setAutomine", True)
    await rpc.call("evm_mine")


@pytest.mark.parametrize("depth", DEPTHS)
async def test_reorg__charges_gone_with_it__the_same_transactions_go_out_again(either_site, depth):
    """What others settle is gone after a reorg or paid twice (x402 #2559, #3464)."""
    site, rpc = either_site, either_site.net.anvil.rpc
    async with site.serve() as service:
        caller = await site.open_account(service.url)
        before = await settled_over(site, caller, service.url, depth)
        sent = await attempts(site)
        await rpc.call("anvil_reorg", depth, [])
        async with caller.calling(service.url, at_once=1):
            await site.until_settled(len(before))
        await site.check_books()
        assert b'"event":"reorg"' in service.output
    after = await charged(site)
    assert {id_: place.tx_hash for id_, place in before.items()} == {
        id_: after[id_].tx_hash for id_ in before
    }
    assert sent <= await attempts(site)
    assert len({nonce for _, nonce in await attempts(site)}) == len(await attempts(site)), "signed again"


@pytest.mark.parametrize("depth", range(2, 21) if ALL else (5,))
async def test_reorg__charges_land_in_other_blocks__counted_once(either_site, depth):
    site, rpc = either_site, either_site.net.anvil.rpc
    async with site.serve() as service:
        caller = await site.open_account(service.url)
        before = await settled_over(site, caller, service.url, depth)
        raw = await site.rows(sa.select(schema.attempts.c.raw).order_by(schema.attempts.c.nonce))
        # All in the last block of the new branch, which is longer than the old one from its first block on.
        again = [["0x" + bytes(its).hex(), depth - 1] for (its,) in raw]
        await rpc.call("anvil_reorg", depth, again)
        await rpc.call("evm_mine")
        await site.check_books()
        assert await caller.call(service.url) == "answered"
        await site.check_books()
        assert b'"event":"reorg"' in service.output
    after = await charged(site)
    assert all(
        after[id_].block != place.block
        for id_, place in before.items()
        if place.block < max(p.block for p in before.values())
    )
    assert len({nonce for _, nonce in await attempts(site)}) == len(await attempts(site)), "signed again"


async def test_row_19__deposit_gone_with_a_reorg__nothing_is_spent_of_it(sqlite_site):
    """An unconfirmed deposit is spent, then reorged away (x402 #2559, #3464)."""
    site, rpc = sqlite_site, sqlite_site.net.anvil.rpc
    async with site.serve(chain={"finality": 3}) as service:
        caller = await site.open_account(service.url, 0)
        await site.net.deposit(caller.account, 1_000_000)
        await rpc.call("evm_mine")
        await site.caught_up()
        assert await caller.call(service.url) == "insufficient_funds"
        await rpc.call("anvil_reorg", 2, [])
        await rpc.call("anvil_mine", "0x5")
        await site.caught_up()
        assert await caller.call(service.url) == "insufficient_funds"
        await site.net.deposit(caller.account, 1_000_000)
        await rpc.call("anvil_mine", "0x5")
        await caller.until("answered", service.url)
        await site.check_books()


async def test_reorg__deposit_and_charges_gone_with_it__they_are_owed_until_it_is_paid_in_again(sqlite_site):
    """Who counts deposits at once takes that risk, and still loses no charge."""
    site, rpc = sqlite_site, sqlite_site.net.anvil.rpc
    async with site.serve() as service:
        caller = await site.open_account(service.url)
        for _ in range(3):
            assert await caller.call(service.url) == "answered"
        await site.until(lambda states: states["settled"] == 3)
        await rpc.call("anvil_reorg", int(await rpc.call("eth_blockNumber"), 16) - 5, [])
        await site.check_books(owed=3)
        assert await caller.call(service.url) == "insufficient_funds"
        await site.net.deposit(caller.account, 1_000_000)
        await site.check_books()


async def test_reorgs__one_after_another_while_calls_go_on__every_charge_once(site, chance):
    async with site.serve() as service:
        caller = await site.open_account(service.url)
        await site.net.anvil.rpc.call("anvil_mine", "0x6")  # the deposit stays
        async with caller.calling(service.url):
            for _ in range(20 if ALL else 6):
                await site.until_settled(2)
                await reorg(site, await number(site) - chance.randint(1, 6))
        await site.check_books()
    assert caller.outcomes.keys() == {"answered"}


async def test_reorg__leader_freezes_with_a_block_of_the_branch_that_goes__nothing_of_it_counts_when_it_wakes(
    postgres_site,
):
    """Where its place is empty on the other branch, the database has no row that would be there twice."""
    site = postgres_site
    async with contextlib.AsyncExitStack() as stack:
        leader, gateway = await asyncio.gather(
            stack.enter_async_context(site.serve("relayer", WATERFALL_FAILPOINT="indexer.read:9:freeze")),
            stack.enter_async_context(site.serve("gateway")),
        )
        caller = await site.open_account(gateway.url)
        async with site.serve("relayer") as other, caller.calling(gateway.url):
            await leader.frozen()
            ((read,),) = await site.rows(sa.select(sa.func.max(schema.blocks.c.number)))
            await depose(site.database)
            await site.until_settled(3)
            await reorg(site, read)
            await site.caught_up()
            leader.process.send_signal(signal.SIGCONT)
            await site.until_settled(3)
            await other.stop()  # whoever woke up leads again
            await site.until_settled(3)
        await site.check_books()


async def test_logs__node_answers_that_there_are_none__they_are_read_again(either_site, node):
    """Nodes answer so for blocks that they do not have (besu#8007); this one has it."""
    site = either_site
    async with site.under_load(rpc_url=node.url) as (service, caller):
        for _ in range(3):
            node.fault("eth_getLogs", result([]), times=1)
            await site.until_settled(3)
    assert b"events missing" in service.output
    assert caller.outcomes.keys() == {"answered"}
