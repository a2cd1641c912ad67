"""Gas of whole transactions in steady state: 21,000 and calldata included, no slot written for the first time.

Gas is deterministic, so the targets are assertions. Run with `-s` to see the figures.
"""

import pytest
from conftest import DAY, EXPIRY, PER_CHARGE, PER_WINDOW, TOKENS_PER_USD, USD
from eth_utils import keccak
from typed_data import Charge

# Charge ids: a random epoch, then a sequence. The first of a word, as its next ones are measured.
UNLIMITED_ID = (0x9D3F51C2 << 32) + 0x012300
LIMITED_ID = UNLIMITED_ID + 0x0100
AMOUNT = 1_234_567_890  # credit, about a tenth of a cent


def batch(accounts, first_id):
    return [
        Charge(account, first_id + number, AMOUNT, keccak(number.to_bytes(2, "big")))
        for number, account in enumerate(accounts)
    ]


@pytest.fixture(scope="module")
def opened(vault, platform, user, mint):
    """Opens a hundred accounts with a dollar each."""

    def opened(first_label):
        mint(user, 100 * TOKENS_PER_USD)
        labels = [number.to_bytes(32, "big") for number in range(first_label, first_label + 100)]
        for label in labels:
            vault.deposit(platform, user, label, TOKENS_PER_USD, sender=user)
        return [vault.accountId(platform, user, label) for label in labels]

    return opened


@pytest.fixture(scope="module")
def unlimited(opened, settle):
    accounts = opened(0)
    settle(*batch(accounts, UNLIMITED_ID))
    return accounts


@pytest.fixture(scope="module")
def limited(vault, platform, operator, opened, settle, now):
    accounts = opened(100)
    policy = (USD, USD, 30 * DAY, now() + DAY)
    for account in accounts:
        vault.setPolicy(platform, account, PER_CHARGE | PER_WINDOW | EXPIRY, policy, sender=operator)
    settle(*batch(accounts, LIMITED_ID))
    return accounts


@pytest.fixture
def gas_per_charge(vault, settle):
    def gas_per_charge(accounts, first_id):
        tx = settle(*batch(accounts, first_id + 100))
        assert len(tx.events.filter(vault.Charged)) == len(accounts)
        gas = tx.gas_used / len(accounts)
        print(f"{gas:,.0f} gas a charge")  # noqa: T201
        return gas

    return gas_per_charge


def test_settle__single_charge__56000(gas_per_charge, unlimited):
    assert gas_per_charge(unlimited[:1], UNLIMITED_ID) <= 56_000


def test_settle__100_accounts__10500_a_charge(gas_per_charge, unlimited):
    assert gas_per_charge(unlimited, UNLIMITED_ID) <= 10_500


def test_settle__100_charges_of_one_account__6000_a_charge(gas_per_charge, unlimited):
    assert gas_per_charge(unlimited[:1] * 100, UNLIMITED_ID) <= 6_000


def test_settle__single_charge_with_all_limits__56000(gas_per_charge, limited):
    assert gas_per_charge(limited[:1], LIMITED_ID) <= 56_000


def test_settle__100_accounts_with_all_limits__12700_a_charge(gas_per_charge, limited):
    assert gas_per_charge(limited, LIMITED_ID) <= 12_700


def test_settle__100_charges_of_one_account_with_all_limits__6000_a_charge(gas_per_charge, limited):
    assert gas_per_charge(limited[:1] * 100, LIMITED_ID) <= 6_000
