"""Whatever keeps a transaction from being mined, or what it carries from being taken; and that it passes by itself."""

import asyncio
import itertools

import sqlalchemy as sa
from eth_abi.abi import encode
from service import running, settings_for

from waterfall.chain import vault as calls
from waterfall.chain.transactions import transact
from waterfall.devnet import deploy
from waterfall.devnet.proxy import error
from waterfall.keccak import keccak
from waterfall.ledger import schema
from waterfall.types import Policy

SPARE_METER = "0x7c852118294e51e653712a81e05800f419141751be58f605c371e15141b007a6"
"""Of anvil's fourth account, which everybody knows."""
SPARE_METER_ADDRESS = "0x90f79bf6eb2c4f870365e785982e1f101e93b906"


def call(signature, *arguments):
    """Calldata that only these tests need."""
    types = signature.partition("(")[2][:-1].split(",")
    return keccak(signature.encode())[:4] + encode(types, arguments)


async def halted(site, url):
    """Why parts of the relayer have halted, once one has."""
    async with asyncio.timeout(60):
        while (health := await site.client(url).request("GET", "/healthz"))[0] == 200:
            await asyncio.sleep(0.05)
    return " ".join(health[1]["halted"].values())


async def said(service, words):
    """Once its log has these words."""
    async with asyncio.timeout(60):
        while words not in service.output:
            await asyncio.sleep(0.02)


async def test_base_fee__far_above_the_cap_and_back__waits_and_then_settles(sqlite_site):
    site, rpc = sqlite_site, sqlite_site.net.anvil.rpc
    async with site.serve(chain={"max_fee_gwei": 50}) as service:
        caller = await site.open_account(service.url)
        await rpc.call("evm_setAutomine", False)
        await caller.call(service.url)  # is sent for a base fee that the next block does not have
        await site.until(lambda states: states["open"] == 1)
        await rpc.call("anvil_setNextBlockBaseFeePerGas", hex(200 * 10**9))
        await rpc.call("evm_mine")
        await rpc.call("evm_setIntervalMining", 1)
        async with caller.calling(service.url):
            await said(service, b"at most 50000000000 may be offered")
        states = await site.states()
        assert (states["open"], states["settled"], states["final"]) == (1, 0, 0)
        await rpc.call("anvil_setNextBlockBaseFeePerGas", hex(10**9))
        await site.check_books()
    assert caller.outcomes.keys() == {"answered"}, "calls do not wait for the chain"


async def test_key__out_of_money_until_the_queue_is_full__calls_are_refused_until_it_is_refilled(sqlite_site):
    site, rpc = sqlite_site, sqlite_site.net.anvil.rpc
    async with site.serve(chain={"max_unsettled": 20}) as service:
        caller = await site.open_account(service.url)
        await rpc.call("anvil_setBalance", deploy.GAS.address, "0x0")
        await caller.until("unavailable", service.url)
        assert caller.outcomes["answered"] > 20, "calls go on without it for a while"
        assert b"send it some" in service.output
        assert (await site.states())["open"] == 0, "nothing was sent that could not be paid for"
        await rpc.call("anvil_setBalance", deploy.GAS.address, hex(10**19))
        await caller.until("answered", service.url)
        await site.check_books()
    refused = caller.outcomes.keys() - {"answered"}
    assert refused == {"unavailable"}


async def test_replacement__underpriced__is_raised_until_it_is_not(sqlite_site, node):
    site, rpc = sqlite_site, sqlite_site.net.anvil.rpc
    async with site.serve(rpc_url=node.url) as service:
        caller = await site.open_account(service.url)
        node.fault("eth_sendRawTransaction", error(-32000, "replacement transaction underpriced"), times=3)
        await caller.call(service.url)
        await site.check_books()
    attempts = await site.rows(sa.select(schema.attempts).order_by(schema.attempts.c.max_fee))
    assert len({attempt.nonce for attempt in attempts}) == 1
    assert len(attempts) > 1
    for before, after in itertools.pairwise(attempts):
        assert after.max_fee * 10 >= before.max_fee * 11
        assert after.priority_fee * 10 >= before.priority_fee * 11
    assert int(await rpc.call("eth_getTransactionCount", deploy.GAS.address, "latest"), 16) == 1


async def test_row_16__policy_lowered_behind_our_back__one_is_rejected_and_the_others_settle(
    either_site,
):
    """One bad item bricks a batch (x402 #2559)."""
    site = either_site
    rpc = site.net.anvil.rpc
    async with site.serve(chain={"gas_batches": 1}) as service:
        bad, good = [await site.open_account(service.url) for _ in range(2)]
        await rpc.call("anvil_setBalance", deploy.GAS.address, "0x0")
        for caller in (good, bad, good, bad):
            assert await caller.call(service.url) == "answered"
        await set_policy(site, bad, Policy(max_per_charge=1))
        await bad.until("limit_exceeded", service.url)
        await rpc.call("anvil_setBalance", deploy.GAS.address, hex(10**19))
        await site.check_books(owed=bad.outcomes["answered"])
        ends = await site.rows(
            sa.select(schema.charges.c.state, schema.charges.c.reason, schema.charges.c.tx_hash)
        )
        assert len({tx_hash for _, _, tx_hash in ends}) == 1, "one batch"
        assert {reason for state, reason, _ in ends if state == "rejected"} == {"max_per_charge"}
        assert await good.call(service.url) == "answered"
        await set_policy(site, bad, Policy())
        await site.check_books()  # they were tried again, under their own ids


async def set_policy(site, caller, policy):
    chain, rpc = site.net.chain, site.net.anvil.rpc
    await transact(
        rpc, deploy.OWNER, chain.vault, calls.set_policy(chain.platform, caller.account["id"], policy)
    )


async def test_meter__retired_in_the_middle__halts_says_why_and_goes_on_under_its_successor(either_site):
    site = either_site
    chain, rpc = site.net.chain, site.net.anvil.rpc
    async with site.serve() as service:
        caller = await site.open_account(service.url)
        async with caller.calling(service.url):
            await site.until_settled(3)
            await transact(
                rpc,
                deploy.OWNER,
                chain.vault,
                call("retireMeter(uint128,address,uint40)", chain.platform, deploy.METER.address, 0),
            )
            reason = await halted(site, service.url)
        assert f"{deploy.METER.address} is not a meter" in reason
        assert await caller.call(service.url) == "unavailable"
        states = await site.states()
        assert states["settled"] + states["final"] >= 3
        assert states["queued"] > 0
        assert states["open"] == 0
    await transact(
        rpc, deploy.OWNER, chain.vault, call("addMeter(uint128,address)", chain.platform, SPARE_METER_ADDRESS)
    )
    async with site.serve(WATERFALL_METER_KEY=SPARE_METER) as service:
        await caller.until("answered", service.url)
        await site.check_books()


async def test_batch__out_of_gas__is_split_until_it_goes_through(either_site, monkeypatch):
    """The formula never gives too little; here it does, though more than the calldata alone takes."""
    site = either_site
    gas = calls.settle_gas
    monkeypatch.setattr(calls, "settle_gas", lambda charges: min(gas(charges), 170_000))
    settings = settings_for(site.upstream.base_url, site.database)
    async with running(site.net, settings) as client:
        caller = await site.open_account(client.url)
        await site.net.anvil.rpc.call("evm_setAutomine", False)
        await site.net.anvil.rpc.call("evm_setIntervalMining", 1)
        for _ in range(30):
            assert await caller.call(client.url) == "answered"
        await site.check_books()
    ends = [state for (state,) in await site.rows(sa.select(schema.slots.c.state))]
    assert 0 < ends.count("reverted") < 10


async def test_batch__larger_than_a_block__is_split_until_it_fits(sqlite_site):
    """Rejected by the node before it is mined: nothing of it is on the chain, and it holds the lane's only nonce."""
    site, rpc = sqlite_site, sqlite_site.net.anvil.rpc
    async with site.serve(chain={"gas_batches": 1}) as service:
        caller = await site.open_account(service.url)
        await rpc.call("anvil_setBalance", deploy.GAS.address, "0x0")
        async with caller.calling(service.url, at_once=8, pause=0):
            await site.until(lambda states: states["queued"] >= 100)
        await rpc.call("evm_setBlockGasLimit", hex(1_000_000))
        await rpc.call("anvil_setBalance", deploy.GAS.address, hex(10**19))
        await site.check_books()
