"""Credit that moves without a deposit or a charge: refunds, allocations, exits by consent, charges written off."""

from making import ACCOUNT, FUNDED, METER, OTHER, PLATFORM, SALT, USD, batch, block, deposited, rejected, word

from waterfall.chain.events import Allocated, ChargeVoided, ExitedWithConsent, Refunded, Rejection
from waterfall.ledger import accounts, views
from waterfall.types import ZERO_ADDRESS

BOB = accounts.label_hash(SALT, "bob")


def refunded(account, amount, label=BOB):
    return Refunded(PLATFORM, account, 7, ZERO_ADDRESS, label, amount, None)


def allocated(amount):
    return Allocated(PLATFORM, ACCOUNT, OTHER, ZERO_ADDRESS, BOB, amount, None, None)


async def test_refund__not_final_yet__is_not_spendable(desk):
    await desk.apply(block(2), refunded(ACCOUNT, USD), spendable=1)
    wallet = await desk.wallet()
    assert (wallet.balance, wallet.pending, (await desk.record()).entries) == (FUNDED + USD, USD, 2)
    await desk.ledger.view.finalize(spendable=2, final=0)
    assert (await desk.wallet()).available == FUNDED + USD


async def test_refund__unknown_account__is_opened(desk):
    await desk.apply(block(2), refunded(OTHER, 5))
    record = await desk.record(OTHER)
    assert (record.wallet.balance, record.label_hash) == (5, BOB)


async def test_allocation__not_final_yet__has_left_and_not_arrived(desk):
    await desk.apply(block(2), allocated(3 * USD), spendable=1)
    source, wallet = await desk.wallet(), await desk.wallet(OTHER)
    assert (source.available, wallet.balance, wallet.available) == (FUNDED - 3 * USD, 3 * USD, 0)
    assert ((await desk.record()).entries, (await desk.record(OTHER)).entries) == (2, 1)
    await desk.ledger.view.finalize(spendable=2, final=0)
    assert (await desk.wallet(OTHER)).available == 3 * USD


async def test_allocation__applied__is_a_line_of_both_statements(desk):
    await desk.apply(block(2), allocated(3 * USD))
    lines = [
        (
            await desk.ledger.read(
                lambda connection, of=account, after=after: views.statement(connection, of, after, 10)
            )
        )[0]
        for account, after in ((ACCOUNT, 1), (OTHER, 0))
    ]
    assert [(line.event, line.entry, line.amount) for line in lines] == [
        ("AllocatedAway", 2, 3 * USD),
        ("Allocated", 1, 3 * USD),
    ]


async def test_allocation__rewound__both_are_as_before(desk):
    await desk.apply(block(2), deposited(OTHER, 5, label="bob"))
    await desk.apply(block(3), allocated(3 * USD))
    await desk.ledger.view.rewind(block(2))
    assert ((await desk.wallet()).balance, (await desk.wallet(OTHER)).balance) == (FUNDED, 5)


async def test_exit_with_consent__applied__has_left_at_first_sight(desk):
    await desk.apply(
        block(2), ExitedWithConsent(PLATFORM, ACCOUNT, METER.address, 2, word("n"), None), spendable=1
    )
    assert (await desk.wallet()).available == FUNDED - 2 * 10**6


async def test_voided__rejected_charge__is_owed_no_more_and_never_charged_again(desk):
    charge = await desk.charge(3 * USD)
    await batch(desk, [charge])
    await desk.apply(block(2), rejected(charge, Rejection.BALANCE))
    await desk.apply(block(3), ChargeVoided(PLATFORM, charge.id))
    wallet = await desk.wallet()
    assert (wallet.balance, wallet.unsettled, wallet.available) == (FUNDED, 0, FUNDED)
    await desk.apply(block(4), deposited(ACCOUNT, USD))
    assert await desk.states() == ["voided"]


async def test_voided__id_that_this_ledger_never_made__changes_nothing(desk):
    await desk.apply(block(2), ChargeVoided(PLATFORM, 2**63))
    assert (await desk.wallet()).available == FUNDED


async def test_voided__rewound__is_owed_again(desk):
    charge = await desk.charge(3 * USD)
    await batch(desk, [charge])
    await desk.apply(block(2), ChargeVoided(PLATFORM, charge.id))
    await desk.ledger.view.rewind(block(1))
    assert ((await desk.wallet()).unsettled, await desk.states()) == (3 * USD, ["batched"])
