import asyncio

import pytest
from eth_abi.abi import decode
from fake_chain import SILENCE, FakeChain
from making import ACCOUNT, GAS, GAS_TOO, METER, OTHER, PLATFORM, USD, VAULT, block, charged, policy_set
from relaying import ADA, BOB, Clock, Relay

from waterfall.chain import vault
from waterfall.chain.rpc import RpcError
from waterfall.chain.vault import deposit_address
from waterfall.errors import ChainError, LaneHalted, LedgerError
from waterfall.ledger import schema, slots
from waterfall.ledger.slots import Slot
from waterfall.receipts import Domain, recover, settlement_digest
from waterfall.settlement import sweeps
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
    with pytest.raises(LedgerError, match="not been read"):
        await relay.batches._batch(())  # noqa: SLF001


async def two_lanes(ledger, clock, **options):
    relay = Relay(ledger, clock, signers=(GAS, GAS_TOO), interval=2, **options)
    await relay.fund()
    return relay


async def gathering(ledger, clock, **options):
    """The first lane has a charge in flight, the second waits for more of them."""
    relay = await two_lanes(ledger, clock, **options)
    first, second = relay.lanes
    await relay.desk.charge(1)
    await first.step()
    await relay.desk.charge(2)
    assert await second.step() is False
    return relay


async def test_next_work__nothing_in_flight__goes_at_once(ledger, clock):
    relay = await two_lanes(ledger, clock)
    await relay.desk.charge(1)
    assert await relay.lanes[1].step() is True


async def test_next_work__another_lane_in_flight__gathers_for_half_a_block(ledger, clock):
    relay = await gathering(ledger, clock)
    _, second = relay.lanes
    assert 0 < second.pause <= 1
    assert second.patient
    clock.seconds += 0.9
    await relay.desk.charge(3)
    assert await second.step() is False
    assert second.pause == pytest.approx(0.1)
    clock.seconds += 0.11
    assert await second.step() is True
    assert [len(vault_batch(t)) for t in relay.pending(GAS_TOO)] == [2]
    relay.chain.mine()
    await relay.index()
    assert await relay.desk.states() == ["settled"] * 3


async def test_next_work__batch_full__is_not_gathered_any_longer(ledger, clock):
    relay = await gathering(ledger, clock, most_charges=2)
    _, second = relay.lanes
    await relay.desk.charge(3)
    assert await second.step() is True


async def test_next_work__other_lane_lands__the_rest_goes_at_once(ledger, clock):
    relay = await gathering(ledger, clock)
    first, second = relay.lanes
    await relay.mine()
    assert await first.step() is True
    assert await second.step() is True


async def test_next_work__seconds_configured__are_what_it_gathers(ledger, clock):
    relay = await two_lanes(ledger, clock)
    relay.batches.gather_seconds = 0
    for lane in relay.lanes:
        await relay.desk.charge(1)
        assert await lane.step() is True


async def test_next_work__projection_far_behind__the_deadline_is_by_the_chain(relay):
    """Else every batch of a lane that starts before the indexer has caught up would revert."""
    await relay.desk.charge(1)
    relay.chain.skip(3, seconds=3600)
    work = await relay.batches.next_work()
    assert work.deadline == relay.chain.head.timestamp + 1800


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


async def work_through(relay, most=60):
    """Settle what can be settled; the sizes of the batches that were mined, reverted ones negative."""
    for _ in range(most):
        relay.clock.seconds += 6
        await relay.index()
        if not await relay.lane.step() and await relay.in_flight() is None:
            break
        relay.chain.mine()
    else:
        raise AssertionError("it never ends")
    mined = [done for block in relay.chain.blocks for done in block.transactions]
    return [len(vault_batch(t)) if succeeded else -len(vault_batch(t)) for t, succeeded in mined]


def vault_batch(transaction):
    types = ["uint128", "(bytes32,uint64,uint96,bytes32)[]", "uint40", "bytes"]
    return decode(types, transaction.calldata[4:])[1]


async def test_mined__one_charge_reverts_its_batch__only_it_is_left_and_the_chain_sees_one_revert(relay):
    charges = [await relay.desk.charge(n) for n in range(1, 10)]
    relay.chain.poison.add(charges[5].id)
    sizes = await work_through(relay)
    assert sizes[0] == -9
    assert all(size > 0 for size in sizes[1:]), "what would revert is found by trying it out"
    assert relay.chain.state.used == {charge.id for charge in charges} - {charges[5].id}
    states = await relay.desk.states()
    assert (states.count("settled"), states[5]) == (8, "rejected")
    (row,) = [row for row in await relay.desk.table(schema.charges) if row["state"] == "rejected"]
    assert row["reason"].startswith("reverted: ")
    assert (await relay.desk.wallet()).unsettled == charges[5].amount, "it stays a debt"
    sent = len(relay.sent())
    for _ in range(10):
        relay.clock.seconds += 60
        await relay.mine()
        assert await relay.lane.step() is False
    assert len(relay.sent()) == sent, "and is not tried again and again"


async def test_mined__set_aside_and_then_money_arrives__has_another_chance(relay):
    charge = await relay.desk.charge(1)
    relay.chain.poison.add(charge.id)
    await work_through(relay)
    assert await relay.desk.states() == ["rejected"]
    relay.chain.poison.clear()
    await relay.fund(1)
    await work_through(relay)
    assert await relay.desk.states() == ["settled"]


async def test_mined__reverts_only_when_it_is_mined__is_split_down_to_the_one_charge(relay):
    """Trying out shows nothing: the node's state is not what the block saw."""
    charges = [await relay.desk.charge(n) for n in range(1, 9)]
    relay.chain.poison.add(charges[2].id)
    relay.chain.deceives = True
    sizes = await work_through(relay)
    assert (await relay.desk.states()).count("settled") == 7
    assert (await relay.desk.states())[2] == "rejected"
    assert sizes.count(-1) == 3, "alone it has three chances"
    assert min(sizes) == -8


async def test_mined__another_lane_is_free__does_not_send_what_reverted_before_that_is_understood(
    ledger, clock
):
    relay = await two_lanes(ledger, clock)
    charges = [await relay.desk.charge(n) for n in range(1, 5)]
    relay.chain.poison.add(charges[3].id)
    await relay.lane.step()
    await relay.mine()
    answer, others = relay.chain.call, []

    async def call(method, *parameters):
        if method == "eth_call" and not others:
            others.append(asyncio.create_task(relay.lanes[1].step()))
            await asyncio.wait(others, timeout=0.3)
        return await answer(method, *parameters)

    relay.chain.call = call
    await relay.lane.step()
    assert await others[0] is True
    await relay.mine()
    (sent,) = (transaction for transaction, _ in relay.chain.head.transactions)
    assert len(vault_batch(sent)) == 2
    assert (await relay.desk.states())[:2] == ["settled", "settled"]


async def test_mined__out_of_gas__smaller_batches(relay):
    for n in range(1, 9):
        await relay.desk.charge(n)
    relay.chain.most_charges = 3
    sizes = await work_through(relay)
    assert sizes[0] == -8
    assert all(0 < size <= 3 for size in sizes[1:])
    assert await relay.desk.states() == ["settled"] * 8


async def test_mined__refused_for_their_gas_before__batches_double_again_up_to_the_most(relay):
    relay.most_charges = 8
    relay.start()
    for n in range(1, 24):
        await relay.desk.charge(n)
    too_large = RpcError(method="eth_sendRawTransaction", reason="exceeds block gas limit", data=None)
    relay.chain.script("eth_sendRawTransaction", too_large, too_large)
    assert await work_through(relay) == [2, 4, 8, 8, 1]


async def test_mined__reverts_with_nothing_left_that_it_carried__is_closed_so_and_batches_stay_as_large(
    ledger, clock
):
    """What a key has in flight others may settle; its transaction goes once more, for its nonce alone."""
    relay = await two_lanes(ledger, clock)
    relay.batches.gather_seconds = 0
    first, second = relay.lanes
    charges = [await relay.desk.charge(n) for n in (1, 2)]
    await first.step()
    (sent,) = relay.pending()
    relay.chain.pending.clear()
    await ledger.write(lambda tx: slots.give_back(tx, GAS.address))
    await second.step()
    await relay.mine()
    await second.step()
    assert relay.chain.state.used == {charge.id for charge in charges}
    await relay.mine(seconds=2000)  # past its deadline
    await first.step()
    (again,) = relay.pending()
    assert (again.nonce, again.calldata) == (sent.nonce, sent.calldata)
    await relay.mine()
    relay.chain.script(
        "eth_call", SILENCE
    )  # nobody says why, which of a batch with charges would halve the next
    assert await first.step() is True
    (closed,) = [row for row in await relay.desk.table(schema.slots) if row["signer"] == GAS.address]
    assert (closed["state"], closed["tx_hash"]) == ("reverted", again.hash)
    later = [await relay.desk.charge(n) for n in (3, 4)]
    assert list((await relay.batches.next_work()).charges) == later


async def test_mined__too_late__the_same_charges_go_again_at_once(relay):
    await relay.desk.charge(1)
    await relay.desk.charge(2)
    await relay.lane.step()
    await relay.mine(seconds=2000)
    relay.clock.seconds += 6
    assert await relay.lane.step() is True
    relay.chain.asked.clear()
    assert await relay.lane.step() is True
    assert relay.chain.sent("eth_call") == [], "nothing is wrong with them"
    await relay.settle()
    assert await relay.desk.states() == ["settled", "settled"]


@pytest.mark.parametrize(
    "limit", [SILENCE, RpcError(method="eth_call", reason="daily quota reached", data=None)], ids=repr
)
async def test_try_out__node_runs_no_calls__the_chain_itself_has_the_say(relay, limit):
    """Words that nobody knows must neither stop settlement nor condemn a charge."""
    charges = [await relay.desk.charge(n) for n in range(1, 5)]
    relay.chain.poison.add(charges[1].id)
    relay.chain.script("eth_call", *[limit] * 100)
    sizes = await work_through(relay)
    assert await relay.desk.states() == ["settled", "rejected", "settled", "settled"]
    assert sizes.count(-1) == 3


async def test_mined__node_silent_after_a_revert__what_it_taught_is_kept(relay):
    charges = [await relay.desk.charge(n) for n in range(1, 9)]
    relay.chain.poison.add(charges[1].id)
    await relay.lane.step()
    await relay.mine()
    relay.chain.script("eth_call", SILENCE)
    await relay.lane.step()
    sizes = await work_through(relay)
    assert [size for size in sizes if size < 0] == [-8]
    assert (await relay.desk.states()).count("settled") == 7


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
        await relay.sweeps.watch()
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
    await relay.sweeps.watch()
    for _ in range(2):
        await relay.mine(relay.chain.send_tokens(address, 5))
        relay.clock.seconds += 1
        await relay.sweeps.watch()
    assert await swept(relay) == 1
    assert (await relay.desk.wallet(OTHER)).balance == 10 * 10**6


async def test_watch__transfers_to_others__are_left_alone(relay):
    await open_bob(relay)
    assert await swept(relay, 2) == 0
    relay.chain.mine(relay.chain.send_tokens("0x" + "ab" * 20, 5))
    assert await swept(relay) == 0


async def test_watch__node_tells_of_transfers_to_others__are_left_alone(relay):
    await open_bob(relay)
    assert await swept(relay, 2) == 0
    stranger = "0x" + "ab" * 20
    relay.chain.mine(relay.chain.send_tokens(stranger, 5))
    answer = relay.chain._eth_getLogs  # noqa: SLF001
    relay.chain._eth_getLogs = lambda criteria: answer({**criteria, "topics": []})  # noqa: SLF001
    assert await swept(relay) == 0


async def test_watch__charges_wait__go_before_the_sweep(relay):
    address = await open_bob(relay)
    await relay.mine(relay.chain.send_tokens(address, 5))
    await relay.sweeps.watch()
    await relay.desk.charge(1)
    assert (await relay.batches.next_work()).purpose == "settle"


async def test_watch__charges_never_cease__a_sweep_goes_before_them_now_and_then(relay):
    address = await open_bob(relay)
    await relay.mine(relay.chain.send_tokens(address, 5))
    relay.clock.seconds += 1
    await relay.sweeps.watch()
    sent = []
    for _ in range(12):
        await relay.desk.charge(1)
        await relay.lane.step()
        sent.append((await relay.in_flight()).purpose)
        relay.clock.seconds += 2
        await relay.mine()
        await relay.lane.step()
    assert sent.index("sweep") == 5
    assert sent.count("settle") == 11


@pytest.mark.parametrize("method", ["eth_getTransactionCount", "eth_maxPriorityFeePerGas"])
async def test_watch__sending_the_sweep_fails__it_is_not_forgotten(relay, method):
    address = await open_bob(relay)
    await relay.mine(relay.chain.send_tokens(address, 5))
    await relay.sweeps.watch()
    relay.chain.script(method, SILENCE)
    with pytest.raises(ChainError):
        await relay.lane.step()
    assert await swept(relay) == 1


async def test_watch__no_nonce_during_a_reorg__the_sweep_is_not_forgotten(relay):
    address = await open_bob(relay)
    await relay.desk.charge(1)
    await relay.settle()
    await relay.mine(relay.chain.send_tokens(address, 5))
    await relay.sweeps.watch()
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
    await relay.sweeps.watch()
    await relay.mine(relay.chain.send_tokens(address, 5))
    relay.chain.script(method, SILENCE)
    relay.clock.seconds += 1
    with pytest.raises(ChainError):
        await relay.sweeps.watch()
    assert await swept(relay) == 1


async def test_watch__transfer_moved_by_a_reorg__is_swept(relay):
    """It was in no block, or in one that was looked at before, when it comes again."""
    address = await open_bob(relay)
    relay.chain.skip(5)
    assert await swept(relay, 1) == 0
    await relay.index()
    await relay.sweeps.watch()
    relay.chain.reorg(4)
    await relay.mine(relay.chain.send_tokens(address, 5))
    await relay.sweeps.watch()
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
    await relay.sweeps.watch()
    assert await relay.sweeps.next_work() is None


async def test_watch__block_seen_already__asks_nothing(relay):
    await relay.sweeps.watch()
    relay.chain.asked.clear()
    relay.clock.seconds += 5
    await relay.sweeps.watch()
    assert relay.chain.asked == []


async def test_watch__blocks_come_fast__looks_once_a_second(relay):
    await relay.sweeps.watch()
    relay.chain.asked.clear()
    for _ in range(10):
        relay.clock.seconds += 0.25
        relay.chain.mine()
        await relay.index()
        await relay.sweeps.watch()
    assert len([c for (c,) in relay.chain.sent("eth_getLogs") if "fromBlock" in c]) == 2


async def test_watch__sweep_reverts__waits_for_more_to_arrive(relay):
    address = await open_bob(relay)
    await relay.mine(relay.chain.send_tokens(address, 5))
    relay.chain.refuses_sweeps = True
    for _ in range(10):
        relay.clock.seconds += 6
        await relay.index()
        await relay.sweeps.watch()
        await relay.lane.step()
        relay.chain.mine()
    sweeps = [done for block in relay.chain.blocks for done in block.transactions]
    assert [succeeded for _, succeeded in sweeps] == [False]
    relay.chain.refuses_sweeps = False
    relay.chain.mine(relay.chain.send_tokens(address, 7))
    for _ in range(3):
        relay.clock.seconds += 6
        await relay.index()
        await relay.sweeps.watch()
        await relay.lane.step()
        await relay.mine()
    assert (await relay.desk.wallet(OTHER)).balance == 12 * 10**6


async def test_watch__paid_before_the_account_was_opened__is_swept(relay):
    await swept(relay, 2)
    relay.chain.mine(relay.chain.send_tokens(deposit_address(VAULT, OTHER), 5))
    assert await swept(relay, 3) == 0
    await open_bob(relay)
    relay.chain.skip()
    assert await swept(relay) == 1


async def test_watch__many_accounts__topics_in_pieces_and_no_balance_asked_twice(relay, monkeypatch):
    monkeypatch.setattr(sweeps, "_TOPICS", 4)
    for number in range(9):
        await relay.desk.open(f"account {number}")
    address = await open_bob(relay)
    await relay.sweeps.watch()
    assert len(relay.chain.sent("eth_call")) == 11, "at start each is asked"
    relay.chain.asked.clear()
    relay.clock.seconds += 1
    await relay.mine(relay.chain.send_tokens(address, 5))
    await relay.sweeps.watch()
    asked = [c["topics"][2] for (c,) in relay.chain.sent("eth_getLogs") if "fromBlock" in c]
    assert [len(topics) for topics in asked] == [4, 4, 3]
    assert len(relay.chain.sent("eth_call")) == 1, "then only who was paid"
    assert (await relay.sweeps.next_work()).reference == OTHER


async def test_watch__away_for_long__asks_each_instead_of_reading_it_all(relay, monkeypatch):
    monkeypatch.setattr(sweeps, "_MOST_BLOCKS", 3)
    address = await open_bob(relay)
    await relay.sweeps.watch()
    await relay.mine(relay.chain.send_tokens(address, 5))
    relay.chain.skip(4)
    await relay.index()
    relay.chain.asked.clear()
    assert await swept(relay) == 1
    ranges = [c for (c,) in relay.chain.sent("eth_getLogs") if "fromBlock" in c]
    assert all(int(c["toBlock"], 16) - int(c["fromBlock"], 16) < 3 for c in ranges)


async def test_next_work__sweep_in_flight_on_another_lane__is_not_sent_twice(ledger, clock):
    relay = Relay(ledger, clock, signers=(GAS, GAS_TOO))
    await relay.fund()
    address = await open_bob(relay)
    await relay.mine(relay.chain.send_tokens(address, 5))
    await relay.sweeps.watch()
    assert [await lane.step() for lane in relay.lanes] == [True, False]
    relay.chain.mine()
    await relay.index()
    assert (await relay.desk.wallet(OTHER)).balance == 5 * 10**6


# ── Policies ─────────────────────────────────────────────────────────────────────────────────────────


async def test_policies__order_due__its_calldata(relay):
    policy = Policy(max_per_window=5, window_seconds=60)
    await relay.desk.order(policy)
    work = await relay.policies.next_work()
    assert work.calldata == vault.set_policy(PLATFORM, ACCOUNT, policy)
    assert (work.purpose, work.target, work.deadline, work.charges) == ("policy", VAULT, 0, ())
    slot = Slot("0x", 0, work.purpose, work.reference, work.target, work.calldata, work.gas, 0)
    assert await relay.policies.renew_work(slot) == work


@pytest.mark.parametrize(
    ("finality", "blocks"), [("latest", 0), ("safe", 3), ("finalized", 6), (4, 4)], ids=str
)
async def test_policies__charge_before_it__must_be_as_final_as_a_spendable_deposit(
    ledger, clock, finality, blocks
):
    """A reorg could else put the policy before the charge, which the vault would then reject."""
    relay = Relay(ledger, clock, FakeChain(safe_depth=3, final_depth=6), finality=finality)
    relay.chain.skip(6)
    await relay.fund()
    relay.chain.skip(6)
    await relay.index()
    await relay.desk.charge(5)
    await relay.desk.order(Policy(max_per_charge=1))
    assert await relay.policies.next_work() is None
    await relay.lane.step()
    await relay.mine()
    for _ in range(blocks):
        assert await relay.policies.next_work() is None
        relay.chain.skip()
        await relay.index()
    assert (await relay.policies.next_work()).purpose == "policy"


async def test_policies__none_waits__the_chain_is_asked_nothing(relay):
    relay.chain.asked.clear()
    assert await relay.policies.next_work() is None
    assert relay.chain.asked == []


async def test_policies__nothing_ordered__is_none(relay):
    assert await relay.policies.next_work() is None
    assert relay.balance() == 10 * USD
    assert ADA != BOB
