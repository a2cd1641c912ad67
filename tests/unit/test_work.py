import pytest
from eth_abi.abi import decode
from fake_chain import SILENCE
from making import ACCOUNT, METER, OTHER, PLATFORM, USD, VAULT, block, charged, policy_set
from relaying import ADA, BOB, Clock, Relay

from waterfall.chain import vault
from waterfall.chain.vault import deposit_address
from waterfall.errors import ChainError, LaneHalted, LedgerError
from waterfall.ledger.slots import Slot
from waterfall.receipts import Domain, recover, settlement_digest
from waterfall.types import Charge, Policy


@pytest.fixture
def clock(monkeypatch):
    return Clock().install(monkeypatch)


@pytest.fixture
async def relay(ledger, clock):
    relay = Relay(ledger, clock)
    await relay.fund()
    return relay


def content(work):
    """Platform, charges and deadline of a batch, whose signature is the meter's over exactly these."""
    types = ["uint128", "(bytes32,uint64,uint96,bytes32)[]", "uint40", "bytes"]
    platform, rows, deadline, signature = decode(types, work.calldata[4:])
    charges = [
        Charge(account="0x" + a.hex(), id=i, amount=n, receipt_hash="0x" + h.hex()) for a, i, n, h in rows
    ]
    digest = settlement_digest(Domain(31337, VAULT), platform, charges, deadline)
    assert recover(digest, signature) == METER.address
    return platform, charges, deadline


# ── Batches ──────────────────────────────────────────────────────────────────────────────────────────


async def test_next_work__charges_wait__one_signed_batch(relay):
    charges = [await relay.desk.charge(n) for n in (1, 2)]
    work = await relay.batches.next_work()
    platform, carried, deadline = content(work)
    assert (platform, carried) == (PLATFORM, charges)
    assert (work.purpose, work.target, work.charges) == ("settle", VAULT, tuple(charges))
    assert work.gas == vault.settle_gas(2)
    assert deadline == work.deadline == relay.chain.head.timestamp + 1800


async def test_next_work__nothing_waits__is_none(relay):
    assert await relay.batches.next_work() is None


async def test_next_work__more_than_a_batch_takes__the_oldest(relay):
    relay.most_charges = 2
    relay.start()
    charges = [await relay.desk.charge(n) for n in range(1, 6)]
    assert list((await relay.batches.next_work()).charges) == charges[:2]


async def test_next_work__chain_charged_something_else__halts(relay):
    charge = await relay.desk.charge(5)
    await relay.desk.apply(block(2), charged(charge, amount=6))
    await relay.desk.charge(7)
    with pytest.raises(LaneHalted, match="in the journal as"):
        await relay.batches.next_work()


async def test_next_work__chain_not_read_yet__is_refused(ledger, clock):
    relay = Relay(ledger, clock)
    await relay.desk.ledger.write(lambda tx: None)
    with pytest.raises(LedgerError, match="not been read"):
        relay.batches._batch(())  # noqa: SLF001


async def test_renew_work__batch__same_charges_with_a_later_deadline(relay):
    charges = [await relay.desk.charge(n) for n in (1, 2)]
    await relay.lane.step()
    await relay.desk.charge(3)
    slot = await relay.in_flight()
    await relay.mine(seconds=100, transactions=False)
    work = await relay.batches.renew_work(slot)
    _, carried, deadline = content(work)
    assert carried == charges
    assert deadline == slot.deadline + 100


async def test_mined__reverted__next_batch_is_half_as_large_until_one_succeeds(relay):
    relay.most_charges = 4
    relay.start()
    for n in range(1, 9):
        await relay.desk.charge(n)
    slot = Slot("0x", 0, "settle", None, VAULT, b"????", 1, 0)
    sizes = []
    for _ in range(4):
        await relay.batches.mined(slot, succeeded=False)
        sizes.append(len((await relay.batches.next_work()).charges))
    assert sizes == [2, 1, 1, 1]
    await relay.batches.mined(slot, succeeded=True)
    assert len((await relay.batches.next_work()).charges) == 4


async def test_mined__meter_retired__halts_and_keeps_the_charges(relay):
    charge = await relay.desk.charge(1)
    relay.chain.meters.clear()
    await relay.lane.step()
    await relay.mine()
    with pytest.raises(LaneHalted, match="is not a meter of platform"):
        await relay.lane.step()
    assert await relay.desk.states() == ["queued"]
    assert charge.id not in relay.chain.state.used


# ── Deposit addresses ────────────────────────────────────────────────────────────────────────────────


async def open_bob(relay):
    assert await relay.desk.open("bob") == OTHER
    return deposit_address(VAULT, OTHER)


async def swept(relay, most=6):
    """Watch, send and mine for a while; how many sweeps were mined."""
    for _ in range(most):
        relay.clock.seconds += 6
        await relay.index()
        await relay.batches.watch_deposit_addresses()
        await relay.lane.step()
        relay.chain.mine()
    sweep = vault.sweep(PLATFORM, "0x" + "00" * 20, BOB)[:4]
    done = [t for b in relay.chain.blocks for t in b.transactions if t[0].calldata[:4] == sweep]
    assert all(succeeded for _, succeeded in done), "a sweep of nothing"
    return len(done)


async def test_watch__money_there_at_the_start__is_swept(relay):
    address = await open_bob(relay)
    await relay.mine(relay.chain.send_tokens(address, 5))
    assert await swept(relay) == 1
    assert (await relay.desk.wallet(OTHER)).balance == 5 * 10**6


async def test_watch__money_arrives_later__is_swept_once(relay):
    address = await open_bob(relay)
    assert await swept(relay, 2) == 0
    relay.chain.mine(relay.chain.send_tokens(address, 5))
    assert await swept(relay) == 1
    relay.chain.mine(relay.chain.send_tokens(address, 7))
    assert await swept(relay) == 2
    assert (await relay.desk.wallet(OTHER)).balance == 12 * 10**6


async def test_watch__two_transfers_before_the_sweep__one_sweep(relay):
    address = await open_bob(relay)
    await relay.batches.watch_deposit_addresses()
    for _ in range(2):
        await relay.mine(relay.chain.send_tokens(address, 5))
        await relay.batches.watch_deposit_addresses()
    assert await swept(relay) == 1
    assert (await relay.desk.wallet(OTHER)).balance == 10 * 10**6


async def test_watch__transfers_to_others__are_left_alone(relay):
    await open_bob(relay)
    assert await swept(relay, 2) == 0
    relay.chain.mine(relay.chain.send_tokens("0x" + "ab" * 20, 5))
    assert await swept(relay) == 0


async def test_watch__charges_wait__go_before_the_sweep(relay):
    address = await open_bob(relay)
    await relay.mine(relay.chain.send_tokens(address, 5))
    await relay.batches.watch_deposit_addresses()
    await relay.desk.charge(1)
    assert (await relay.batches.next_work()).purpose == "settle"


@pytest.mark.parametrize("method", ["eth_getTransactionCount", "eth_maxPriorityFeePerGas"])
async def test_watch__sending_the_sweep_fails__it_is_not_forgotten(relay, method):
    address = await open_bob(relay)
    await relay.mine(relay.chain.send_tokens(address, 5))
    await relay.batches.watch_deposit_addresses()
    relay.chain.script(method, SILENCE)
    with pytest.raises(ChainError):
        await relay.lane.step()
    assert await swept(relay) == 1


async def test_watch__no_nonce_during_a_reorg__the_sweep_is_not_forgotten(relay):
    address = await open_bob(relay)
    await relay.desk.charge(1)
    await relay.settle()
    await relay.mine(relay.chain.send_tokens(address, 5))
    await relay.batches.watch_deposit_addresses()
    state, relay.chain.head.state.nonces = (
        relay.chain.head.state.nonces,
        dict.fromkeys(relay.chain.state.nonces, 0),
    )
    assert await relay.lane.step() is False
    relay.chain.head.state.nonces = state
    assert await swept(relay) == 1


@pytest.mark.parametrize("method", ["eth_getLogs", "eth_call"])
async def test_watch__node_does_not_answer__looks_again(relay, method):
    address = await open_bob(relay)
    await relay.batches.watch_deposit_addresses()
    await relay.mine(relay.chain.send_tokens(address, 5))
    relay.chain.script(method, SILENCE)
    with pytest.raises(ChainError):
        await relay.batches.watch_deposit_addresses()
    assert await swept(relay) == 1


async def test_watch__transfer_moved_by_a_reorg__is_swept(relay):
    """It was in no block, or in one that was looked at before, when it comes again."""
    address = await open_bob(relay)
    relay.chain.skip(5)
    assert await swept(relay, 1) == 0
    await relay.index()
    await relay.batches.watch_deposit_addresses()
    relay.chain.reorg(4)
    await relay.mine(relay.chain.send_tokens(address, 5))
    await relay.batches.watch_deposit_addresses()
    relay.chain.skip(10)
    assert await swept(relay) == 1


async def test_watch__sweep_reorged_away_with_its_transfer__the_slot_goes_on(relay):
    address = await open_bob(relay)
    await relay.mine(relay.chain.send_tokens(address, 5))
    assert await swept(relay) == 1
    relay.chain.reorg(4)
    relay.chain.skip(5)
    assert await swept(relay) == 1
    assert (await relay.desk.wallet(OTHER)).balance == 5 * 10**6


async def test_watch__account_known_by_its_policy_only__is_not_swept_in_vain(relay):
    address = deposit_address(VAULT, OTHER)
    await relay.desk.apply(block(2), policy_set(OTHER, Policy(max_per_charge=1)))
    relay.chain.mine(relay.chain.send_tokens(address, 5))
    await relay.batches.watch_deposit_addresses()
    assert await relay.batches.next_work() is None


async def test_watch__block_seen_already__asks_nothing(relay):
    await relay.batches.watch_deposit_addresses()
    relay.chain.asked.clear()
    await relay.batches.watch_deposit_addresses()
    assert relay.chain.asked == []


# ── Policies ─────────────────────────────────────────────────────────────────────────────────────────


async def test_policies__order_due__its_calldata(relay):
    policy = Policy(max_per_window=5, window_seconds=60)
    await relay.desk.order(policy)
    work = await relay.policies.next_work()
    assert work.calldata == vault.set_policy(PLATFORM, ACCOUNT, policy)
    assert (work.purpose, work.target, work.deadline, work.charges) == ("policy", VAULT, 0, ())
    slot = Slot("0x", 0, work.purpose, work.reference, work.target, work.calldata, work.gas, 0)
    assert await relay.policies.renew_work(slot) == work


async def test_policies__nothing_ordered__is_none(relay):
    assert await relay.policies.next_work() is None
    assert relay.balance() == 10 * USD
    assert ADA != BOB
