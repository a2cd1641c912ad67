"""One vault, one platform and its people; every test starts from the same chain state.

Everything but `next_window` is session-scoped: ape reverts the chain after each test, and hypothesis may use the
fixtures.
"""

from collections import Counter
from contextlib import contextmanager

import pytest
from eth_account import Account
from eth_utils import keccak, to_checksum_address
from typed_data import settlement, sign

HOUR = 3_600
DAY = 24 * HOUR
USD = 10**12  # credit
CENT = USD // 100
TOKENS_PER_USD = 10**6
CREDIT_PER_TOKEN = 10**6
MAX_TOKENS = (2**96 - 1) // CREDIT_PER_TOKEN

PER_CHARGE, PER_WINDOW, EXPIRY = 1, 2, 4  # limits
# Rejections.
ZERO_AMOUNT, BALANCE, MAX_PER_CHARGE, MAX_PER_WINDOW, POLICY_EXPIRED, ALLOWANCE_CAP, ALLOWANCE_EXPIRED = (
    range(7)
)
NO_CAP, NO_EXPIRY = 2**96 - 1, 2**40 - 1  # an allowance of both is none
MINUTE = 60
NONCE = b"\x0e" * 32
CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141

SALT = b"\x01" * 32
LABEL = b"\x02" * 32
ZERO_ADDRESS = "0x" + "00" * 20
REGISTERED = keccak(text="PlatformRegistered(uint128,address,address,uint32,bytes32)")
TRANSFER = keccak(text="Transfer(address,address,uint256)")


def pytest_addoption(parser):
    parser.addoption(
        "--write-gas", action="store_true", help="accept the measured gas as docs/gas.json and gas.md"
    )


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
def other_meter():
    return Account.from_key("0x" + "b2" * 32)


@pytest.fixture(scope="session")
def malformed(vault):
    """What a meter's good signature can be turned into, and what each reverts with."""

    def malformed(signature):
        r, s, v = signature[:32], int.from_bytes(signature[32:64], "big"), signature[64]
        high = (CURVE_ORDER - s).to_bytes(32, "big")
        return [
            (r + high + bytes([55 - v]), vault.ECDSAInvalidSignatureS, {"s": high}),
            (b"", vault.ECDSAInvalidSignatureLength, {"length": 0}),
            (signature[:64], vault.ECDSAInvalidSignatureLength, {"length": 64}),
            (signature + b"\x00", vault.ECDSAInvalidSignatureLength, {"length": 66}),
            (bytes(65), vault.ECDSAInvalidSignature, {}),
            (bytes(64) + b"\x1b", vault.ECDSAInvalidSignature, {}),
            (signature[:64] + bytes([v - 27]), vault.ECDSAInvalidSignature, {}),
        ]

    return malformed


@pytest.fixture(scope="session")
def hand_over(vault, platform, operator):
    """Makes somebody else the owner of the platform."""

    def hand_over(to):
        vault.transferPlatform(platform, to, sender=operator)
        vault.acceptPlatform(platform, sender=to)

    return hand_over


@pytest.fixture(scope="session")
def token(project, admin):
    return admin.deploy(project.TestUSDC, admin)


@pytest.fixture(scope="session")
def vault(project, admin, token):
    return admin.deploy(project.CreditVault, token)


@pytest.fixture(scope="session")
def domain_of(chain):
    """EIP-712 domain of a vault."""

    def domain_of(vault):
        return {
            "name": "Waterfall CreditVault",
            "version": "1",
            "chainId": chain.chain_id,
            "verifyingContract": vault.address,
        }

    return domain_of


@pytest.fixture(scope="session")
def token_domain(token, chain):
    return {
        "name": "USD Coin",
        "version": "2",
        "chainId": chain.chain_id,
        "verifyingContract": token.address,
    }


@pytest.fixture(scope="session")
def register(vault, operator, treasury, meter):
    """Registers another platform and returns its number."""

    def register(salt, *, vault=vault, owner=operator, payout=treasury, meter=meter.address, exit_delay=DAY):
        vault.registerPlatform(salt, payout, meter, exit_delay, sender=owner)
        return vault.platformId(owner, salt)

    return register


@pytest.fixture(scope="session", autouse=True)
def platform(register):
    return register(SALT)


@pytest.fixture
def hostile(register, stranger, other_meter):
    """A platform of the stranger's own: what is credited there, his meter can take."""
    return register(SALT, owner=stranger, payout=stranger, meter=other_meter.address)


@pytest.fixture(scope="session")
def account(vault, platform, user):
    """The user's account, empty."""
    return vault.accountId(platform, user, LABEL)


@pytest.fixture(scope="session")
def mint(token, vault, admin):
    """Gives tokens to a holder, who approves the vault."""

    def mint(holder, tokens):
        token.mint(holder, tokens, sender=admin)
        token.approve(vault, tokens, sender=holder)

    return mint


@pytest.fixture(scope="session")
def fund(vault, platform, user, mint):
    """Mints and deposits: into the user's account unless told otherwise. Returns the account."""

    def fund(tokens, *, platform=platform, owner=user, label=LABEL, payer=user):
        mint(payer, tokens)
        vault.deposit(platform, owner, label, tokens, sender=payer)
        return vault.accountId(platform, owner, label)

    return fund


@pytest.fixture(scope="session")
def now(chain):
    """Timestamp of the latest block."""
    return lambda: chain.blocks.head.timestamp


@pytest.fixture
def next_window(now):
    """Start of a window of an hour that no test has reached."""
    return (now() // HOUR + 2) * HOUR


@pytest.fixture(scope="session")
def at(chain):
    """Sets the timestamp of the next block."""

    def at(timestamp):
        chain.pending_timestamp = timestamp

    return at


@pytest.fixture(scope="session")
def elsewhere(chain, domain_of):
    """Another chain, with the same contracts at the same addresses: gives a vault's domain there."""

    def become(chain_id):
        chain.provider.make_request("anvil_setChainId", [chain_id])
        chain.provider.cached_chain_id = chain_id

    @contextmanager
    def elsewhere():
        here = chain.chain_id
        become(here + 1)
        try:
            yield lambda vault: domain_of(vault) | {"chainId": here + 1}
        finally:
            become(here)

    return elsewhere


@pytest.fixture(scope="session")
def isolate(chain):
    """Undoes what happens within. (Ape's `chain.isolate` swallows every exception, failed assertions too.)"""

    @contextmanager
    def isolate():
        snapshot = chain.snapshot()
        try:
            yield
        finally:
            chain.restore(snapshot)

    return isolate


@pytest.fixture(scope="session")
def money(vault, token, chain):
    """All there is, by whose it is: tokens by holder, credit by account (what is in its exit by `("exit", account)`),
    earnings by platform. Found by the logs, so that nobody can be left out.
    """

    def topics(contract):
        logs = chain.provider.web3.eth.get_logs({"fromBlock": 0, "address": contract.address})
        return [log["topics"] for log in logs]

    def money():
        logs = topics(vault)
        platforms = {int.from_bytes(log[1], "big") for log in logs if log[0] == REGISTERED}
        accounts = {bytes(topic) for log in logs for topic in log[1:3]}
        holders = {topic[-20:] for name, *log in topics(token) if name == TRANSFER for topic in log}
        found = Counter({to_checksum_address(holder): token.balanceOf(holder) for holder in holders})
        for number in platforms:
            found[number] = vault.platformOf(number).earnings
            for account in accounts:
                view = vault.accountOf(number, account)
                found[account] += view.balance
                found["exit", account] += view.exitAmount
        return +found

    return money


@pytest.fixture(scope="session")
def moves(money, vault):
    """Whatever is done within moves just this, of all there is. What is not named must not move, and tokens back
    all credit.
    """

    @contextmanager
    def moves(changes=()):
        before = money()
        yield
        after = money()
        credit = sum(amount for whose, amount in after.items() if not isinstance(whose, str))
        assert credit <= after[vault.address] * CREDIT_PER_TOKEN
        after.subtract(before)
        moved = {whose: amount for whose, amount in after.items() if amount}
        assert moved == {getattr(whose, "address", whose): amount for whose, amount in dict(changes).items()}

    return moves


@pytest.fixture(scope="session")
def settle(vault, domain_of, platform, meter, relayer, chain):
    """Signs a batch and submits it."""

    def settle(
        *charges,
        vault=vault,
        platform=platform,
        key=meter.key,
        deadline=None,
        signature=None,
        sender=relayer,
        **kwargs,
    ):
        deadline = chain.pending_timestamp + HOUR // 2 if deadline is None else deadline
        signature = signature or sign(
            key, domain_of(vault), "Settlement", settlement(platform, charges, deadline)
        )
        return vault.settle(platform, charges, deadline, signature, sender=sender, **kwargs)

    return settle


@pytest.fixture(scope="session")
def void(vault, domain_of, platform, meter, relayer, chain):
    """Signs what voids ids and submits it."""

    def void(*ids, platform=platform, key=meter.key, deadline=None, signature=None, sender=relayer, **kwargs):
        deadline = chain.pending_timestamp + HOUR // 2 if deadline is None else deadline
        message = {"platform": platform, "ids": list(ids), "deadline": deadline}
        signature = signature or sign(key, domain_of(vault), "Voiding", message)
        return vault.voidCharges(platform, ids, deadline, signature, sender=sender, **kwargs)

    return void


@pytest.fixture(scope="session")
def consent(vault, domain_of, platform, meter, user, chain):
    """A meter's consent to an exit: the arguments of exitWithConsent."""

    def consent(
        tokens,
        *,
        to=user,
        vault=vault,
        platform=platform,
        owner=user,
        label=LABEL,
        nonce=NONCE,
        deadline=None,
        key=meter.key,
    ):
        deadline = chain.pending_timestamp + 5 * MINUTE if deadline is None else deadline
        message = {
            "platform": platform,
            "account": vault.accountId(platform, owner, label),
            "tokens": tokens,
            "to": str(to),
            "nonce": nonce,
            "deadline": deadline,
        }
        signature = sign(key, domain_of(vault), "ExitConsent", message)
        return [platform, owner, label, tokens, to, nonce, deadline, signature]

    return consent


@pytest.fixture(scope="session")
def payer():
    """Holds tokens and signs, but never sends a transaction."""
    return Account.from_key("0x" + "c3" * 32)


@pytest.fixture(scope="session")
def pay_inbox(vault, token, admin, token_domain, platform, payer, chain):
    """A payment as an x402 client signs it, of tokens the payer gets here: the arguments of depositFromInbox."""

    def pay_inbox(
        tokens=TOKENS_PER_USD,
        *,
        platform=platform,
        payer=payer.address,
        key=payer.key,
        to=None,
        nonce=NONCE,
        **times,
    ):
        token.mint(payer, tokens, sender=admin)
        after, before = times.get("after", 0), times.get("before", chain.pending_timestamp + HOUR)
        message = {
            "from": payer,
            "to": to or vault.inbox(platform),
            "value": tokens,
            "validAfter": after,
            "validBefore": before,
            "nonce": nonce,
        }
        signature = sign(key, token_domain, "TransferWithAuthorization", message)
        return [platform, payer, tokens, after, before, nonce, signature]

    return pay_inbox


@pytest.fixture(scope="session")
def front_run(vault, token, stranger):
    """Gives a payment to the token directly, so that the money reaches the inbox unbooked."""

    def front_run(arguments, sender=stranger):
        platform, payer, tokens, after, before, nonce, signature = arguments
        to = vault.inbox(platform)
        return token.transferWithAuthorization(
            payer, to, tokens, after, before, nonce, signature, sender=sender
        )

    return front_run


@pytest.fixture(scope="session")
def book(vault, domain_of, platform, meter, payer, relayer, chain):
    """Signs as the meter whose the money in the inbox is, and submits it."""

    def book(
        tokens=TOKENS_PER_USD,
        *,
        platform=platform,
        payer=payer.address,
        nonce=NONCE,
        deadline=None,
        key=meter.key,
        signature=None,
        sender=relayer,
    ):
        deadline = chain.pending_timestamp + HOUR // 2 if deadline is None else deadline
        message = {
            "platform": platform,
            "payer": payer,
            "nonce": nonce,
            "tokens": tokens,
            "deadline": deadline,
        }
        signature = signature or sign(key, domain_of(vault), "InboxBooking", message)
        return vault.bookInbox(platform, payer, nonce, tokens, deadline, signature, sender=sender)

    return book


@pytest.fixture(scope="session")
def sign_allowance(vault, domain_of, platform, user, chain):
    """What an account's owner signs to change its allowance: the arguments of setAllowanceBySignature."""

    def sign_allowance(
        cap=NO_CAP,
        expires_at=NO_EXPIRY,
        *,
        key=None,
        vault=vault,
        platform=platform,
        owner=user,
        label=LABEL,
        nonce=None,
        deadline=None,
    ):
        account = vault.accountId(platform, owner, label)
        nonce = vault.accountOf(platform, account).allowanceNonce if nonce is None else nonce
        deadline = chain.pending_timestamp + HOUR if deadline is None else deadline
        message = {
            "platform": platform,
            "account": account,
            "cap": cap,
            "expiresAt": expires_at,
            "nonce": nonce,
            "deadline": deadline,
        }
        signature = sign(key or user.private_key, domain_of(vault), "AllowanceChange", message)
        return [platform, owner, label, cap, expires_at, nonce, deadline, signature]

    return sign_allowance


@pytest.fixture(scope="session")
def set_allowance(vault, platform, user):
    """Sets the user's allowance. Returns the second from which on all of it binds."""

    def set_allowance(cap=NO_CAP, expires_at=NO_EXPIRY, *, label=LABEL):
        (log,) = vault.setAllowance(platform, user, label, cap, expires_at, sender=user).events
        return log.effectiveAt

    return set_allowance


@pytest.fixture(scope="session")
def set_policy(vault, platform, operator):
    """Sets an account's limits; those not named do not exist."""

    def set_policy(
        account, *, platform=platform, sender=operator, per_charge=None, per_window=None, expires_at=None
    ):
        limits, policy = 0, [0, 0, 0, 0]
        if per_charge is not None:
            limits, policy[0] = limits | PER_CHARGE, per_charge
        if per_window is not None:
            limits, policy[1:3] = limits | PER_WINDOW, per_window
        if expires_at is not None:
            limits, policy[3] = limits | EXPIRY, expires_at
        return vault.setPolicy(platform, account, limits, policy, sender=sender)

    return set_policy


@pytest.fixture(scope="session")
def request_exit(vault, platform, user):
    """Asks for the user's tokens back. Returns the second of maturity."""

    def request_exit(tokens, *, platform=platform, owner=user, label=LABEL):
        vault.requestExit(platform, owner, label, tokens, sender=owner)
        return vault.accountOf(platform, vault.accountId(platform, owner, label)).exitMaturesAt

    return request_exit


@pytest.fixture(scope="session")
def balance_of(vault, platform):
    def balance_of(account, platform=platform):
        return vault.accountOf(platform, account).balance

    return balance_of


@pytest.fixture(scope="session")
def earnings(vault, platform):
    def earnings(platform=platform):
        return vault.platformOf(platform).earnings

    return earnings
