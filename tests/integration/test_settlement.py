"""The relayer on a real chain and a real vault: several keys, reorgs, too little gas, too little money."""

import asyncio

import pytest
import sqlalchemy as sa
from settling import GAS, METER, Settlement

from waterfall.chain import vault as calls
from waterfall.ledger import schema


@pytest.fixture
async def settlement(tmp_path):
    async with Settlement.running(tmp_path) as settlement:
        yield settlement


async def mine_now_and_then(rpc, seconds):
    await rpc.call("evm_setAutomine", False)
    await rpc.call("evm_setIntervalMining", seconds)


async def test_relayer__two_keys__settle_everything_once_over_a_reorg(settlement):
    rpc = settlement.net.anvil.rpc
    await mine_now_and_then(rpc, 1)
    for _ in range(60):
        await settlement.charge()
    async with asyncio.timeout(20):
        while (await settlement.states()).get("settled", 0) < 40:
            await asyncio.sleep(0.02)
    await rpc.call("anvil_reorg", 1, [])
    for _ in range(30):
        await settlement.charge()
    await settlement.settled()
    await settlement.check_books(90 * 10**6)
    assert settlement.relayer.indexer.facts.reorgs == 1
    nonces = [int(await rpc.call("eth_getTransactionCount", s.address, "latest"), 16) for s in GAS]
    assert min(nonces) >= 1, "both have worked"


async def test_relayer__gas_limit_too_low_for_a_full_batch__smaller_ones_settle(settlement, monkeypatch):
    """The formula's limit is never too low; here it is, and the vault runs out of gas."""
    gas = calls.settle_gas
    monkeypatch.setattr(calls, "settle_gas", lambda charges: min(gas(charges), 100_000))
    await mine_now_and_then(settlement.net.anvil.rpc, 1)
    for _ in range(40):
        await settlement.charge()
    await settlement.settled()
    ends = await settlement.ledger.read(lambda c: c.execute(sa.select(schema.slots.c.state)).scalars().all())
    assert "reverted" in ends
    assert ends.count("reverted") < 10
    await settlement.check_books(40 * 10**6)


async def test_relayer__keys_run_out_of_money__go_on_when_refilled(settlement):
    rpc = settlement.net.anvil.rpc
    for signer in GAS:
        await rpc.call("anvil_setBalance", signer.address, "0x1")
    await settlement.charge()
    await settlement.until(lambda: [settlement.state(signer) for signer in GAS] == ["low_on_gas"] * 2)
    assert settlement.ledger.block_time(60), "calls go on"
    await rpc.call("anvil_setBalance", GAS[1].address, hex(10**18))
    await settlement.settled()
    await settlement.check_books(10**6)


async def test_relayer__base_fee_above_the_cap__waits_and_goes_on(settlement):
    rpc = settlement.net.anvil.rpc
    await mine_now_and_then(rpc, 1)
    await rpc.call("anvil_setNextBlockBaseFeePerGas", hex(10**12))
    await rpc.call("evm_mine")
    await settlement.charge()
    await settlement.until(lambda: [settlement.state(signer) for signer in GAS] == ["waiting"] * 2)
    await rpc.call("anvil_setNextBlockBaseFeePerGas", hex(10**9))
    await settlement.settled()
    await settlement.check_books(10**6)


async def test_relayer__somebody_else_has_one_key__it_halts_and_the_other_goes_on(settlement):
    rpc = settlement.net.anvil.rpc
    await settlement.charge()
    await settlement.settled()
    (used,) = await settlement.ledger.read(
        lambda c: c.execute(sa.select(schema.slots.c.signer)).scalars().all()
    )
    for _ in range(2):
        transfer = {"from": used, "to": METER.address, "value": "0x1"}
        await rpc.call("eth_sendTransaction", transfer)
    made = 1
    async with asyncio.timeout(20):
        while not settlement.relayer.halted:
            await settlement.charge()
            made += 1
            await asyncio.sleep(0.02)
    ((part, reason),) = settlement.relayer.halted.items()
    assert part == f"settle {used}"
    assert "not in the journal" in reason
    assert settlement.ledger.block_time(60), "calls go on"
    await settlement.charge()
    await settlement.settled()
    settlement.relayer.halted.clear()
    await settlement.check_books((made + 1) * 10**6)
