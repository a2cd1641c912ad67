"""Gas of whole transactions in steady state: 21,000 and calldata included, no slot written for the first time.

Gas is deterministic, so the targets are assertions. Run with `-s` to see the figures.
"""

import pytest
from conftest import DAY, EXPIRY, PER_CHARGE, PER_WINDOW, TOKENS_PER_USD, USD
from eth_utils import keccak
from typed_data import Charge

# Charge ids: a random epoch, then a sequence. A word of 256 for each kind, used in part before it is measured.
EPOCH = 0x9D3F51C2 << 32
FIRST_ID = {"unlimited": EPOCH + 0x012300, "limited": EPOCH + 0x012400}
AMOUNT = 1_234_567_890  # credit, about a tenth of a cent


def batch(accounts, first_id):
    return [
        Charge(account, first_id + number, AMOUNT, keccak(number.to_bytes(2, "big")))
        for number, account in enumerate(accounts)
    ]


@pytest.fixture(scope="module")
def steady(vault, platform, user, operator, mint, settle, now):
    """A hundred accounts without limits and a hundred with all, each charged before."""
    mint(user, 200 * TOKENS_PER_USD)
    labels = [number.to_bytes(32, "big") for number in range(200)]
    for label in labels:
        vault.deposit(platform, user, label, TOKENS_PER_USD, sender=user)
    accounts = [vault.accountId(platform, user, label) for label in labels]
    unlimited, limited = accounts[:100], accounts[100:]

    policy = (USD, USD, 30 * DAY, now() + DAY)
    for account in limited:
        vault.setPolicy(platform, account, PER_CHARGE | PER_WINDOW | EXPIRY, policy, sender=operator)
    settle(*batch(unlimited, FIRST_ID["unlimited"]))
    settle(*batch(limited, FIRST_ID["limited"]))
    return {"unlimited": unlimited, "limited": limited}


@pytest.mark.parametrize(
    ("kind", "charges", "distinct", "target"),
    [
        ("unlimited", 1, 1, 56_000),
        ("unlimited", 100, 100, 10_500),
        ("unlimited", 100, 1, 6_000),
        ("limited", 1, 1, 56_000),
        ("limited", 100, 100, 12_700),
        ("limited", 100, 1, 6_000),
    ],
)
def test_settle__batch__costs_no_more_than_the_target(vault, settle, steady, kind, charges, distinct, target):
    charged = steady[kind][:distinct] * (charges // distinct)
    tx = settle(*batch(charged, FIRST_ID[kind] + 100))
    assert len(tx.events.filter(vault.Charged)) == charges
    gas = tx.gas_used / charges
    print(f"{gas:,.0f} gas a charge: {charges} of {distinct} {kind} accounts")  # noqa: T201
    assert gas <= target
