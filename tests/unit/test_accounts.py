import pytest
from eth_hash.auto import keccak
from making import ACCOUNT, OTHER, PLATFORM, SALT, VAULT, block, deposited

from waterfall.chain.vault import account_id, deposit_address
from waterfall.errors import AccountExists, AccountNotFound
from waterfall.ledger import schema
from waterfall.ledger.accounts import label_hash
from waterfall.types import ZERO_ADDRESS, Policy

OWNER = "0x" + "ee" * 20


def test_label_hash__salted__differs_by_salt_and_label():
    assert label_hash(b"s", "ada") == "0x" + keccak(keccak(b"s") + b"ada").hex()
    assert len({label_hash(salt, label) for salt in (b"s", b"t") for label in ("ada", "bob", "ü")}) == 6
    assert label_hash(b"sa", "da") != label_hash(b"s", "ada"), "salt and label never run into each other"


async def test_create_account__new__opens_it_with_an_empty_wallet(desk):
    id_ = await desk.open("bob", OWNER)
    assert id_ == account_id(PLATFORM, OWNER, label_hash(SALT, "bob"))
    record = await desk.record(id_)
    assert (record.label, record.owner, record.label_hash) == ("bob", OWNER, label_hash(SALT, "bob"))
    assert (record.wallet.balance, record.wallet.available, record.policy) == (0, 0, Policy())
    assert record.deposit_address == deposit_address(VAULT, id_)


async def test_create_account__twice__is_refused_with_its_id(desk):
    await desk.open("bob")
    with pytest.raises(AccountExists) as refusal:
        await desk.open("bob")
    assert refusal.value.details["account"] == OTHER
    assert await desk.open("bob", OWNER) != OTHER, "another owner's is another account"


async def test_create_account__first_seen_on_the_chain__gets_its_label_and_keeps_its_money(desk):
    assert (await desk.record()).label is None
    assert await desk.open("ada") == ACCOUNT
    record = await desk.record()
    assert (record.label, record.owner) == ("ada", ZERO_ADDRESS)
    assert record.wallet.balance > 0
    with pytest.raises(AccountExists):
        await desk.open("ada")


async def test_create_account__deposit_comes_later__is_the_same_account(desk):
    await desk.open("bob")
    await desk.apply(block(2), deposited(OTHER, 5, label="bob"))
    record = await desk.record(OTHER)
    assert (record.label, record.wallet.balance) == ("bob", 5)


async def test_order_policy__unknown_account__is_refused_and_nothing_ordered(desk):
    with pytest.raises(AccountNotFound):
        await desk.order(Policy(max_per_charge=5), account=OTHER)
    assert await desk.table(schema.policy_orders) == []


async def test_order_policy__asked_for__is_wanted_and_waits_for_the_calls_before_it(desk):
    held = await desk.hold(5)
    await desk.order(Policy(max_per_charge=5))
    (row,) = await desk.table(schema.policy_orders)
    assert (row["state"], row["after_sequence"]) == ("waiting", held.sequence)
    assert (await desk.record()).wanted == Policy(max_per_charge=5)


async def test_order_policy__of_one_account__leaves_another_alone(desk):
    await desk.open("bob")
    await desk.order(Policy(max_per_charge=5))
    await desk.order(Policy(max_per_charge=6), account=OTHER)
    assert {row["state"] for row in await desk.table(schema.policy_orders)} == {"waiting"}
    assert (await desk.record()).wanted == Policy(max_per_charge=5)
