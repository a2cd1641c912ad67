"""One vault, one platform and one funded user; every test starts from the same chain state.

Everything is session-scoped: ape reverts the chain after each test, and hypothesis may use the fixtures.
"""

import pytest
from eth_account import Account
from typed_data import Charge, settlement, sign

HOUR = 3_600
DAY = 24 * HOUR
USD = 10**12  # credit
TOKEN = 10**6  # credit in one token base unit
SALT = b"\x01" * 32
LABEL = b"\x02" * 32
ZERO_ADDRESS = "0x" + "00" * 20


@pytest.fixture(scope="session")
def admin(accounts):
    """Issues the token."""
    return accounts[0]


@pytest.fixture(scope="session")
def operator(accounts):
    """Owns the platform."""
    return accounts[1]


@pytest.fixture(scope="session")
def treasury(accounts):
    """Receives the platform's earnings."""
    return accounts[2]


@pytest.fixture(scope="session")
def user(accounts):
    """Owns an account of the platform."""
    return accounts[3]


@pytest.fixture(scope="session")
def stranger(accounts):
    """Has no role."""
    return accounts[4]


@pytest.fixture(scope="session")
def relayer(accounts):
    """Submits batches; has no authority."""
    return accounts[5]


@pytest.fixture(scope="session")
def meter():
    """The platform's meter: a plain key that never sends a transaction."""
    return Account.from_key("0x" + "a1" * 32)


@pytest.fixture(scope="session")
def token(project, admin):
    return admin.deploy(project.TestUSDC, admin)


@pytest.fixture(scope="session")
def vault(project, admin, token):
    return admin.deploy(project.CreditVault, token)


@pytest.fixture(scope="session")
def domain(vault, chain):
    return {
        "name": "Waterfall CreditVault",
        "version": "1",
        "chainId": chain.chain_id,
        "verifyingContract": vault.address,
    }


@pytest.fixture(scope="session")
def register(vault, operator, treasury, meter):
    """Registers another platform and returns its number."""

    def register(salt, *, owner=operator, payout=treasury, meter=meter.address, exit_delay=DAY):
        return vault.registerPlatform(salt, payout, meter, exit_delay, sender=owner).return_value

    return register


@pytest.fixture(scope="session")
def platform(register):
    return register(SALT)


@pytest.fixture(scope="session")
def mint(token, vault, admin):
    """Gives tokens to a holder, who approves the vault."""

    def mint(holder, tokens):
        token.mint(holder, tokens, sender=admin)
        token.approve(vault, tokens, sender=holder)

    return mint


@pytest.fixture(scope="session")
def fund(vault, platform, user, mint):
    """Deposits into an account, the user's first one unless told otherwise, and returns its id."""

    def fund(tokens, *, platform=platform, owner=user, label=LABEL, payer=user):
        mint(payer, tokens)
        return vault.deposit(platform, owner, label, tokens, sender=payer).events.filter(vault.Deposited)[0].account

    return fund


@pytest.fixture(scope="session")
def now(chain):
    """Timestamp of the latest block."""
    return lambda: chain.blocks.head.timestamp


@pytest.fixture(scope="session")
def at(chain):
    """Sets the timestamp of the next block."""

    def at(timestamp):
        chain.pending_timestamp = timestamp

    return at


@pytest.fixture(scope="session")
def settle(vault, domain, platform, meter, relayer, now):
    """Signs a batch and submits it."""

    def settle(*charges, platform=platform, key=meter.key, deadline=None, signature=None, sender=relayer):
        deadline = now() + HOUR if deadline is None else deadline
        signature = signature or sign(key, domain, "Settlement", settlement(platform, charges, deadline))
        return vault.settle(platform, charges, deadline, signature, sender=sender)

    return settle
