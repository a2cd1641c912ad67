"""The service's node fails in every way a node can, while calls go on; then it is healthy again.

What the pool makes of several nodes: test_failover, test_broadcast. A node of another chain at the start: test_service.
"""

import asyncio

import pytest
import sqlalchemy as sa
from books import ALL

from waterfall.devnet.proxy import error, forget, garbage, result, silence, status, truncated
from waterfall.ledger import schema

SENDING = "eth_sendRawTransaction"


FAULTS = {
    "takes transactions and never answers": (SENDING, silence(forward=True)),
    "never answers": ("*", silence()),
    "429": ("*", status(429, retry_after=1)),
    "garbage": ("*", garbage()),
    "forgets a transaction": (SENDING, forget()),
    "underpriced": (SENDING, error(-32000, "replacement transaction underpriced")),
}
if ALL:
    FAULTS |= {
        "502": ("*", status(502)),
        "half an answer": ("*", truncated()),
        "pool is full": (SENDING, error(-32000, "txpool is full")),
    }


async def felt(node, method, times=2):
    """Once the node has been asked so often from now on."""
    before = len(node.calls)
    async with asyncio.timeout(60):
        while sum(method in {"*", asked} for asked, _ in node.calls[before:]) < times:
            await asyncio.sleep(0.02)


async def attempts(site):
    query = sa.select(schema.attempts.c.tx_hash, schema.attempts.c.nonce)
    return await site.rows(query)


@pytest.mark.parametrize("name", FAULTS)
async def test_node__fails_while_calls_go_on__all_settles_once_it_is_healthy(sqlite_site, node, name):
    """Relayers drift, stick and double-spend (OpenZeppelin relayer #683, #818, #843; alto #747; rrelayer #36)."""
    site, (method, fault) = sqlite_site, FAULTS[name]
    async with site.under_load(rpc_url=node.url, chain={"rpc_timeout_seconds": 1}) as (_, caller):
        node.fault(method, fault)
        await felt(node, method)
        node.clear()
        await site.until_settled(1)
    assert caller.outcomes.keys() == {"answered"}, "calls do not wait for the chain"


async def test_node__refuses_connections__all_settles_once_it_is_back(sqlite_site, node):
    async with sqlite_site.under_load(rpc_url=node.url) as (_, caller):
        await node.refuse()
        await caller.until_answered(20)
        await node.listen()
    assert caller.outcomes.keys() == {"answered"}


async def test_node__gone_for_longer_than_its_view_may_age__calls_are_refused_until_it_is_back(
    sqlite_site, node
):
    """Peers fail open when they cannot look (LiteLLM #33923)."""
    site = sqlite_site
    async with site.serve(rpc_url=node.url, gateway={"max_projection_age_seconds": 1}) as service:
        caller = await site.open_account(service.url)
        await node.refuse()
        await caller.until("unavailable", service.url)
        await node.listen()
        await caller.until("answered", service.url)
        await site.check_books()


async def test_node__of_another_chain_all_of_a_sudden__is_shunned_and_says_why(sqlite_site, node):
    async with sqlite_site.under_load(rpc_url=node.url) as (service, _):
        node.fault("eth_chainId", result("0x1"))
        node.fault("*", garbage(), times=1)  # a node that failed is asked for its chain again
        await felt(node, "eth_chainId", 1)
        asked = len(node.calls)
        await felt(node, "eth_chainId", 2)
        assert {method for method, _ in node.calls[asked:]} == {"eth_chainId"}, "nothing else is asked of it"
        node.clear()
    assert b"it is a node of chain 1, not of chain 31337" in service.output


async def test_node__falls_behind__all_settles_once_it_has_caught_up(sqlite_site, node):
    site = sqlite_site
    async with site.under_load(rpc_url=node.url) as (service, caller):
        for node.stale_by in (1, 2, 3):
            await felt(node, "eth_getBlockByNumber", 20)
        node.clear()
        await site.until_settled(3)
    reorgs = [line for line in service.output.splitlines() if b'"reorg"' in line]
    assert reorgs == [], "a node that is behind is no reorg"
    assert caller.outcomes.keys() == {"answered"}


async def test_node__preferred_one_is_cut_off_from_the_chain__the_other_is_read(either_site, node):
    site = either_site
    async with site.under_load(rpc_url=[node.url, site.net.anvil.rpc_url]) as (service, caller):
        node.stands_at = int(await site.net.anvil.rpc.call("eth_blockNumber"), 16)
        await site.until_settled(5)
    assert b"node is behind" in service.output
    assert caller.outcomes.keys() == {"answered"}


async def test_transaction__dropped_by_the_node__goes_out_again_as_it_was(sqlite_site):
    site, rpc = sqlite_site, sqlite_site.net.anvil.rpc
    async with site.serve() as service:
        caller = await site.open_account(service.url)
        await rpc.call("evm_setAutomine", False)
        assert await caller.call(service.url) == "answered"
        async with asyncio.timeout(60):
            while not (pending := (await rpc.call("txpool_content"))["pending"]):
                await asyncio.sleep(0.02)
        ((sent,),) = [its.values() for its in pending.values()]
        await rpc.call("anvil_dropTransaction", sent["hash"])
        await rpc.call("evm_setAutomine", True)
        await site.check_books()
    ((nonce, mined),) = await site.rows(sa.select(schema.slots.c.nonce, schema.slots.c.tx_hash))
    assert (mined, nonce) == (sent["hash"], int(sent["nonce"], 16))
    assert await attempts(site) == [(mined, nonce)], "it was never signed again"


@pytest.mark.parametrize("rate", [0.2, 0.5] if ALL else [0.3])
async def test_node__fails_at_random__all_settles_in_the_end(either_site, node, chance, rate):
    async with either_site.under_load(rpc_url=node.url, chain={"rpc_timeout_seconds": 1}):
        node.storm(chance.randrange(2**32), rate)
        await felt(node, "*", int(10 / rate**2))  # the more it fails, the less it is asked
        node.clear()
