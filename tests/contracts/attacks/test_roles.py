"""Roles out of bounds: a squatter, an owner of before, a platform that refunds, meters retired or stolen, a gas key."""

import pytest
from conftest import (
    ALLOWANCE_CAP,
    BALANCE,
    CENT,
    DAY,
    HOUR,
    LABEL,
    MAX_PER_CHARGE,
    MAX_PER_WINDOW,
    NO_CAP,
    NO_EXPIRY,
    POLICY_EXPIRED,
    SALT,
    TOKENS_PER_USD,
    USD,
    ZERO_ADDRESS,
)
from reverts import reverts
from typed_data import Charge, digest, settlement, sign

TOKENS = TOKENS_PER_USD
OTHER = b"\x0f" * 32


# ── A platform's number ──


def test_same_salt__by_an_attacker__is_another_platform(
    vault, token, admin, platform, user, operator, stranger, other_meter, moves
):
    """Sees the registration, and sends the same arguments: users would pay into his."""
    arguments = (SALT, stranger, other_meter.address, DAY)
    vault.registerPlatform(*arguments, sender=stranger)
    his = vault.platformId(stranger, SALT)
    assert his != platform
    assert vault.platformOf(platform).owner == operator
    assert vault.meterOf(platform, other_meter.address).addedAt == 0
    assert vault.inbox(his) != vault.inbox(platform)
    with reverts(vault.PlatformExists, platform=his):
        vault.registerPlatform(*arguments, sender=stranger)
    with reverts(vault.PlatformExists, platform=platform):
        vault.registerPlatform(SALT, stranger, other_meter.address, DAY, sender=operator)


def test_same_salt__by_an_attacker_on_another_chain__what_users_sent_waits_for_the_registrant(
    project, token, admin, user, operator, treasury, stranger, meter, other_meter, elsewhere
):
    """Users know the platform's number from one chain, and pay to its addresses on another before it is there."""
    with elsewhere():
        vault = admin.deploy(project.CreditVault, token)
        number = vault.platformId(operator, SALT)
        source, inbox = vault.depositAddress(number, user, LABEL), vault.inbox(number)
        for place in (source, inbox):
            token.mint(place, TOKENS, sender=admin)
        vault.registerPlatform(SALT, stranger, other_meter.address, DAY, sender=stranger)
        his = vault.platformId(stranger, SALT)
        assert his != number
        for arguments in ((his, user, LABEL), (his, stranger, LABEL)):
            with reverts(vault.ZeroAmount):
                vault.sweep(*arguments, sender=stranger)
        with reverts(vault.UnknownPlatform, platform=number):
            vault.sweep(number, user, LABEL, sender=stranger)
        with reverts(vault.UnknownPlatform, platform=number):
            vault.addMeter(number, other_meter.address, sender=stranger)
        assert [token.balanceOf(place) for place in (source, inbox)] == [TOKENS, TOKENS]
        vault.registerPlatform(SALT, treasury, meter.address, DAY, sender=operator)
        vault.sweep(number, user, LABEL, sender=stranger)
        assert vault.accountOf(number, vault.accountId(number, user, LABEL)).balance == USD


# ── An owner of before ──


@pytest.fixture
def handed_over(vault, platform, operator, treasury):
    """The platform is the treasury's, who held nothing of it before."""
    vault.transferPlatform(platform, treasury, sender=operator)
    vault.acceptPlatform(platform, sender=treasury)
    return treasury


def test_old_owner__of_a_platform_held_account__can_do_nothing_more(
    vault, project, platform, operator, user, fund, consent, sign_allowance, handed_over, at, moves, stranger
):
    """Owner 0 means the platform's owner of now, not of when the account was opened."""
    account = fund(2 * TOKENS, owner=ZERO_ADDRESS)
    wrong = stranger.deploy(project.PlainToken, 18)
    source = vault.depositAddress(platform, ZERO_ADDRESS, LABEL)
    wrong.mint(source, 5, sender=stranger)
    vault.requestExit(platform, ZERO_ADDRESS, LABEL, TOKENS, sender=handed_over)
    at(vault.accountOf(platform, account).exitMaturesAt)
    held = (platform, ZERO_ADDRESS, LABEL)
    with moves():
        for call in (
            lambda: vault.requestExit(*held, TOKENS, sender=operator),
            lambda: vault.cancelExit(*held, sender=operator),
            lambda: vault.finalizeExit(*held, operator, sender=operator),
            lambda: vault.exitWithConsent(*consent(TOKENS, to=operator, owner=ZERO_ADDRESS), sender=operator),
            lambda: vault.setAllowance(*held, 0, 0, sender=operator),
            lambda: vault.rescue(*held, wrong, operator, sender=operator),
        ):
            with reverts(vault.NotAccountOwner, account=account, caller=operator.address):
                call()
        with reverts(vault.NotSignedByOwner, account=account, owner=handed_over.address):
            vault.setAllowanceBySignature(
                *sign_allowance(0, 0, owner=ZERO_ADDRESS, key=operator.private_key), sender=operator
            )
        for call in (
            lambda: vault.allocate(platform, LABEL, operator, LABEL, CENT, sender=operator),
            lambda: vault.refund(platform, 1, operator, LABEL, CENT, sender=operator),
            lambda: vault.withdrawEarnings(platform, 1, sender=operator),
            lambda: vault.setPayout(platform, operator, sender=operator),
            lambda: vault.addMeter(platform, operator, sender=operator),
            lambda: vault.transferPlatform(platform, operator, sender=operator),
            lambda: vault.rescueFromInbox(platform, wrong, operator, sender=operator),
        ):
            with reverts(vault.NotPlatformOwner, platform=platform, caller=operator.address):
                call()
        with reverts(vault.NotPendingOwner, platform=platform, caller=operator.address):
            vault.acceptPlatform(platform, sender=operator)
    assert wrong.balanceOf(source) == 5


def test_old_owner__signed_an_allowance_before_the_transfer__void_after(
    vault, platform, operator, treasury, stranger, fund, sign_allowance, moves
):
    """A lowering kept in hand, to bind what the next owner holds."""
    account = fund(TOKENS, owner=ZERO_ADDRESS)
    kept = sign_allowance(0, 0, owner=ZERO_ADDRESS, key=operator.private_key)
    vault.transferPlatform(platform, treasury, sender=operator)
    vault.acceptPlatform(platform, sender=treasury)
    with moves(), reverts(vault.NotSignedByOwner, account=account, owner=treasury.address):
        vault.setAllowanceBySignature(*kept, sender=stranger)


def test_transfer__offered_and_not_accepted__nothing_of_it_is_theirs(
    vault, platform, operator, stranger, user, fund, moves
):
    account = fund(TOKENS, owner=ZERO_ADDRESS)
    vault.transferPlatform(platform, stranger, sender=operator)
    vault.transferPlatform(platform, operator, sender=operator)
    with moves():
        with reverts(vault.NotPendingOwner, platform=platform, caller=stranger.address):
            vault.acceptPlatform(platform, sender=stranger)
        with reverts(vault.NotPlatformOwner):
            vault.allocate(platform, LABEL, stranger, LABEL, USD, sender=stranger)
        with reverts(vault.NotAccountOwner, account=account):
            vault.requestExit(platform, ZERO_ADDRESS, LABEL, TOKENS, sender=stranger)
        with reverts(vault.NotPendingOwner, platform=platform, caller=user.address):
            vault.acceptPlatform(platform, sender=user)


def test_platform_owner__of_a_users_account__can_take_nothing(
    vault, platform, user, operator, fund, request_exit, at, moves
):
    """Allocates from the user's account by its label; owner 0 has another id."""
    account = fund(TOKENS)
    with moves():
        with reverts(vault.ExceedsBalance, amount=CENT, available=0):
            vault.allocate(platform, LABEL, operator, LABEL, CENT, sender=operator)
        with reverts(vault.NotAccountOwner, account=account, caller=operator.address):
            vault.requestExit(platform, user, LABEL, TOKENS, sender=operator)


def test_allocation__of_what_is_on_its_way_out__refused(vault, platform, operator, user, fund, moves):
    """Taken out and given away at once."""
    fund(TOKENS, owner=ZERO_ADDRESS)
    vault.requestExit(platform, ZERO_ADDRESS, LABEL, TOKENS, sender=operator)
    with moves():
        with reverts(vault.ExceedsBalance, amount=1, available=0):
            vault.allocate(platform, LABEL, user, LABEL, 1, sender=operator)
        with reverts(vault.SameAccount):
            vault.allocate(platform, LABEL, ZERO_ADDRESS, LABEL, 1, sender=operator)


# ── Refunds ──


@pytest.fixture
def earned(vault, platform, fund, settle):
    """A user's account of which id 7 was charged 30 cents."""
    account = fund(TOKENS)
    settle(Charge(account, 7, 30 * CENT))
    return account


def test_refund__twice_for_an_id__reverts(vault, platform, user, operator, earned, settle, moves):
    """Also with another amount or account: once is once."""
    settle(Charge(earned, 8, 30 * CENT))
    with moves({earned: 10 * CENT, platform: -10 * CENT}):
        vault.refund(platform, 7, user, LABEL, 10 * CENT, sender=operator)
    with moves():
        for owner, amount in ((user, 10 * CENT), (user, 1), (operator, 10 * CENT)):
            with reverts(vault.AlreadyRefunded, platform=platform, id=7):
                vault.refund(platform, 7, owner, LABEL, amount, sender=operator)


def test_refund__by_a_meter_or_a_user__reverts(
    vault, accounts, chain, platform, user, stranger, meter, earned, moves
):
    chain.provider.make_request("anvil_setBalance", [meter.address, hex(10**18)])
    with moves():
        for caller in (user, stranger, accounts[meter.address]):
            with reverts(vault.NotPlatformOwner, platform=platform, caller=caller.address):
                vault.refund(platform, 7, caller, LABEL, CENT, sender=caller)


@pytest.mark.parametrize("id_", [0, 6, 8, 7 + 2**32, 2**64 - 1])
def test_refund__for_an_unused_id__reverts(vault, platform, user, operator, earned, moves, id_):
    with moves(), reverts(vault.IdNotUsed, platform=platform, id=id_):
        vault.refund(platform, id_, user, LABEL, CENT, sender=operator)


def test_refund__for_an_id_of_another_platform__reverts(
    vault, hostile, user, stranger, other_meter, fund, settle, earned, moves
):
    """His own earnings, given for an id that only the other platform used."""
    account = fund(TOKENS, platform=hostile)
    settle(Charge(account, 1, CENT), platform=hostile, key=other_meter.key)
    with moves(), reverts(vault.IdNotUsed, platform=hostile, id=7):
        vault.refund(hostile, 7, user, LABEL, CENT, sender=stranger)


def test_refund__for_a_voided_id__gives_of_the_platforms_own_earnings_only(
    vault, platform, hostile, user, operator, earned, fund, settle, other_meter, void, moves
):
    """Allowed: what is given is the platform's. It reaches neither users' credit nor another's earnings."""
    fund(5 * TOKENS, platform=hostile)
    account = vault.accountId(hostile, user, LABEL)
    settle(Charge(account, 1, USD), platform=hostile, key=other_meter.key)
    void(9, 10)
    with moves(), reverts(vault.ExceedsEarnings, amount=30 * CENT + 1, available=30 * CENT):
        vault.refund(platform, 9, user, LABEL, 30 * CENT + 1, sender=operator)
    with moves({earned: 30 * CENT, platform: -30 * CENT}):
        vault.refund(platform, 9, user, LABEL, 30 * CENT, sender=operator)
    with moves():
        with reverts(vault.AlreadyRefunded, platform=platform, id=9):
            vault.refund(platform, 9, user, LABEL, 1, sender=operator)
        with reverts(vault.ExceedsEarnings, amount=1, available=0):
            vault.refund(platform, 10, user, LABEL, 1, sender=operator)


# ── A meter of before ──


@pytest.fixture
def receipt(platform, user, vault, now):
    """A receipt of the user's account."""

    def receipt(**changes):
        return {
            "platform": platform,
            "account": vault.accountId(platform, user, LABEL),
            "chargeId": 7,
            "requestHash": SALT,
            "responseHash": SALT,
            "model": "m",
            "inputTokens": 1,
            "cachedInputTokens": 0,
            "outputTokens": 1,
            "reasoningTokens": 0,
            "usageHash": SALT,
            "priceId": SALT,
            "amount": 30 * CENT,
            "issuedAt": now(),
            "complete": True,
        } | changes

    return receipt


def test_retired_meter__signs_anything__reverts(
    vault, platform, user, operator, meter, fund, settle, void, pay_inbox, front_run, book, consent, moves
):
    account = fund(TOKENS)
    front_run(pay_inbox())
    signed_before = consent(TOKENS)
    vault.retireMeter(platform, meter.address, 0, sender=operator)
    with moves():
        for call in (
            lambda: settle(Charge(account, 1, CENT)),
            lambda: void(1),
            book,
            lambda: vault.exitWithConsent(*consent(TOKENS), sender=user),
            lambda: vault.exitWithConsent(*signed_before, sender=user),
        ):
            with reverts(vault.NotAMeter, platform=platform, meter=meter.address):
                call()
    assert not vault.isSettled(platform, 1)


def test_retired_meter__added_again__reverts(vault, platform, operator, meter, fund, settle, moves):
    """Valid anew, it would make good all it signed in between, or before."""
    account = fund(TOKENS)
    vault.retireMeter(platform, meter.address, 0, sender=operator)
    before = vault.meterOf(platform, meter.address)
    with moves():
        with reverts(vault.MeterExists, platform=platform, meter=meter.address):
            vault.addMeter(platform, meter.address, sender=operator)
        with reverts(vault.NotAMeter, platform=platform, meter=meter.address):
            vault.retireMeter(platform, meter.address, 0, sender=operator)
        with reverts(vault.NotAMeter, platform=platform, meter=meter.address):
            settle(Charge(account, 1, CENT))
    assert vault.meterOf(platform, meter.address) == before


def test_retired_meter__dates_receipts_back__void_from_the_second_of_compromise_on(
    vault, chain, platform, operator, meter, domain_of, fund, settle, receipt, at, now, moves
):
    """The thief dates as he likes. What he dates before the compromise looks valid at issue: it proves no charge,
    for there is no `Charged` with its digest, and there cannot be one any more.
    """
    account, domain = fund(TOKENS), domain_of(vault)
    added_at = vault.meterOf(platform, meter.address).addedAt
    genuine = receipt(issuedAt=now())
    settle(Charge(account, 7, 30 * CENT, digest(domain, "UsageReceipt", genuine)))
    compromised_at = now() + HOUR
    at(compromised_at + DAY)
    vault.retireMeter(platform, meter.address, compromised_at, sender=operator)

    def check(message):
        signature = sign(meter.key, domain, "UsageReceipt", message)
        check = vault.verifyReceipt(message, signature)
        assert check.signer == meter.address
        return check.validAtIssue, check.validNow, check.used

    forged = receipt(amount=90 * CENT)
    assert check(genuine) == (True, False, True)
    for issued_at, valid in (
        (added_at - 1, False),
        (added_at, True),
        (compromised_at - 1, True),
        (compromised_at, False),
        (compromised_at + DAY, False),
        (now() + 1, False),
    ):
        assert check(forged | {"issuedAt": issued_at}) == (valid, False, True)
    charged = chain.provider.web3.eth.get_logs(
        {"fromBlock": 0, "address": vault.address, "topics": [None, account]}
    )
    for issued_at in (added_at, compromised_at - 1):
        back_dated = digest(domain, "UsageReceipt", forged | {"issuedAt": issued_at})
        assert all(back_dated not in bytes(log["data"]) for log in charged)
        with moves(), reverts(vault.NotAMeter, platform=platform, meter=meter.address):
            settle(Charge(account, 8, 90 * CENT, back_dated))


# ── A stolen meter ──


def test_compromised_meter__charges_all_it_can__takes_what_limits_leave_and_only_for_its_platform(
    vault, platform, hostile, user, stranger, fund, settle, set_policy, set_allowance, request_exit, at, moves
):
    """Every account, every amount, again and again in one hour."""
    free = fund(TOKENS)
    limited = fund(TOKENS, owner=stranger)
    allowed = fund(TOKENS, label=b"\x03" * 32)
    leaving = fund(TOKENS, label=b"\x04" * 32)
    expired = fund(TOKENS, label=b"\x05" * 32)
    fund(TOKENS, platform=hostile)
    elsewhere = vault.accountId(hostile, user, LABEL)
    allowed_at = set_allowance(30 * CENT, label=b"\x03" * 32)
    matures_at = request_exit(900_000, label=b"\x04" * 32)
    set_policy(limited, per_charge=10 * CENT, per_window=(25 * CENT, 2**32 - 1))
    set_policy(expired, expires_at=allowed_at)
    at(max(allowed_at, matures_at))
    taken = {free: -USD, limited: -25 * CENT, allowed: -30 * CENT, leaving: -10 * CENT}
    amounts = [2**96 - 1, USD, 50 * CENT, *[10 * CENT] * 12, *[5 * CENT] * 12, *[CENT] * 12, *[1] * 3]
    batch = [
        Charge(account, 1_000 * place + number, amount)
        for place, account in enumerate((free, limited, allowed, leaving, expired, elsewhere))
        for number, amount in enumerate(amounts)
    ]
    with moves(taken | {platform: -sum(taken.values())}):
        tx = settle(*batch)
    refused = {(log.account, log.reason) for log in tx.events.filter(vault.ChargeRejected)}
    assert refused >= {
        (limited, MAX_PER_CHARGE),
        (limited, MAX_PER_WINDOW),
        (allowed, ALLOWANCE_CAP),
        (leaving, BALANCE),
        (expired, POLICY_EXPIRED),
        (elsewhere, BALANCE),
    }


def test_compromised_meter__signs_for_an_accomplice__takes_no_users_credit(
    vault,
    platform,
    user,
    stranger,
    meter,
    fund,
    consent,
    settle,
    void,
    sign_allowance,
    set_allowance,
    at,
    moves,
):
    """Consents to exits of accounts that are not the accomplice's, raises what an owner allowed, voids at will."""
    account = fund(2 * TOKENS)
    at(set_allowance(CENT))
    with moves():
        with reverts(vault.NotAccountOwner, account=account, caller=stranger.address):
            vault.exitWithConsent(*consent(TOKENS, to=stranger), sender=stranger)
        own = vault.accountId(platform, stranger, LABEL)
        with reverts(vault.ExceedsBalance, amount=USD, available=0):
            vault.exitWithConsent(*consent(TOKENS, to=stranger, owner=stranger), sender=stranger)
        with reverts(vault.NotSignedByOwner, account=account):
            vault.setAllowanceBySignature(*sign_allowance(key=meter.key), sender=stranger)
        void(*range(50))
        assert settle(Charge(account, 1, CENT), Charge(own, 2, CENT)).events == []


def test_compromised_meter__books_a_stranded_payment_to_an_accomplice__is_charged_back_before_it_can_leave(
    vault,
    platform,
    operator,
    stranger,
    payer,
    other_meter,
    fund,
    settle,
    pay_inbox,
    front_run,
    book,
    consent,
    relayer,
    at,
    isolate,
    moves,
):
    """Gives payments to the token directly, says they are his, and consents to his own exit."""
    fund(100 * TOKENS)
    vault.depositFromInbox(*pay_inbox(50 * TOKENS, nonce=OTHER), sender=relayer)
    front_run(pay_inbox())
    his = vault.accountId(platform, stranger, bytes(32))
    with moves(), reverts(vault.ExceedsInbox, tokens=TOKENS + 1, available=TOKENS):
        book(TOKENS + 1, payer=stranger.address)
    opens = book(payer=stranger.address).timestamp + DAY
    leaves = (platform, stranger, bytes(32))
    with moves():
        at(opens - 1)
        arguments = consent(TOKENS, to=stranger, owner=stranger, label=bytes(32))
        with reverts(vault.ConsentTooEarly, **{"from": opens, "timestamp": opens - 1}):
            vault.exitWithConsent(*arguments, sender=stranger)
    with isolate():  # nobody has seen it for a day
        at(opens)
        arguments = consent(TOKENS, to=stranger, owner=stranger, label=bytes(32))
        vault.exitWithConsent(*arguments, sender=stranger)
        assert vault.accountOf(platform, his).balance == 0

    # Even from an exit that he has asked for in the meantime, the owner has it back, and gives it to the payer.
    vault.requestExit(*leaves, TOKENS, sender=stranger)
    vault.addMeter(platform, other_meter.address, sender=operator)
    settle(Charge(his, 7, USD), key=other_meter.key)
    vault.refund(platform, 7, payer.address, bytes(32), USD, sender=operator)
    record = vault.accountOf(platform, his)
    assert (record.balance, record.exitAmount) == (0, 0)
    assert vault.accountOf(platform, vault.accountId(platform, payer.address, bytes(32))).balance == 51 * USD


def test_compromised_meter__calls_what_owners_call__reverts(
    vault, accounts, chain, platform, user, meter, fund, settle, moves
):
    """With coin for gas, and the platform's earnings before its eyes."""
    chain.provider.make_request("anvil_setBalance", [meter.address, hex(10**18)])
    thief = accounts[meter.address]
    settle(Charge(fund(TOKENS), 1, CENT))
    with moves():
        for call in (
            lambda: vault.withdrawEarnings(platform, 10_000, sender=thief),
            lambda: vault.setPayout(platform, thief, sender=thief),
            lambda: vault.addMeter(platform, user, sender=thief),
            lambda: vault.retireMeter(platform, thief, 0, sender=thief),
            lambda: vault.setPolicy(platform, SALT, 0, [0, 0, 0, 0], sender=thief),
            lambda: vault.allocate(platform, LABEL, thief, LABEL, CENT, sender=thief),
            lambda: vault.refund(platform, 1, thief, LABEL, CENT, sender=thief),
            lambda: vault.transferPlatform(platform, thief, sender=thief),
            lambda: vault.rescueFromInbox(platform, ZERO_ADDRESS, thief, sender=thief),
        ):
            with reverts(vault.NotPlatformOwner, platform=platform, caller=thief.address):
                call()


# ── A stolen gas key ──


def test_compromised_gas_key__calls_everything_with_all_it_ever_saw__moves_nothing(
    vault,
    token,
    admin,
    token_domain,
    domain_of,
    platform,
    user,
    relayer,
    payer,
    meter,
    account,
    fund,
    pay_inbox,
    front_run,
    consent,
    sign_allowance,
    request_exit,
    now,
    moves,
):
    """What was signed, it may submit again; what was called, call itself. Nothing it does goes through and moves
    anything: what it registers is its own, and empty.
    """
    fund(5 * TOKENS)
    deadline = now() + HOUR // 2
    charges = (Charge(account, 1, CENT), Charge(account, 2, 9 * USD))
    batch = sign(meter.key, domain_of(vault), "Settlement", settlement(platform, charges, deadline))
    ids = [3, 4]
    voiding = sign(
        meter.key,
        domain_of(vault),
        "Voiding",
        {"platform": platform, "ids": ids, "deadline": deadline},
    )
    booking = {"payer": payer.address, "nonce": OTHER, "tokens": TOKENS, "deadline": deadline}
    booked = sign(meter.key, domain_of(vault), "InboxBooking", {"platform": platform} | booking)
    payment = pay_inbox()
    front_run(pay_inbox(nonce=OTHER))
    token.mint(payer.address, TOKENS, sender=admin)
    before = now() + HOUR
    authorization = {
        "from": payer.address,
        "to": vault.address,
        "value": TOKENS,
        "validAfter": 0,
        "validBefore": before,
        "nonce": vault.depositNonce(platform, user, LABEL, SALT),
    }
    authorized = sign(payer.key, token_domain, "ReceiveWithAuthorization", authorization)
    change, agreed = sign_allowance(50 * CENT, NO_EXPIRY), consent(TOKENS)
    saw = {
        "settle": (platform, charges, deadline, batch),
        "voidCharges": (platform, ids, deadline, voiding),
        "bookInbox": (platform, *booking.values(), booked),
        "depositFromInbox": payment,
        "depositWithAuthorization": (
            *(platform, user, LABEL, payer.address, TOKENS, 0, before, SALT),
            authorized,
        ),
        "setAllowanceBySignature": change,
    }
    for name, arguments in saw.items():
        assert getattr(vault, name)(*arguments, sender=relayer).events, name
    vault.exitWithConsent(*agreed, sender=user)
    request_exit(TOKENS)

    mine = {"sender": relayer}
    tries = {name: lambda name=name: getattr(vault, name)(*saw[name], **mine) for name in saw} | {
        "registerPlatform": lambda: vault.registerPlatform(SALT, relayer, relayer, DAY, **mine),
        "transferPlatform": lambda: vault.transferPlatform(platform, relayer, **mine),
        "acceptPlatform": lambda: vault.acceptPlatform(platform, **mine),
        "setPayout": lambda: vault.setPayout(platform, relayer, **mine),
        "addMeter": lambda: vault.addMeter(platform, relayer, **mine),
        "retireMeter": lambda: vault.retireMeter(platform, meter.address, 0, **mine),
        "setPolicy": lambda: vault.setPolicy(platform, account, 1, [0, 0, 0, 0], **mine),
        "deposit": lambda: vault.deposit(platform, relayer, LABEL, TOKENS, **mine),
        "sweep": lambda: vault.sweep(platform, relayer, LABEL, **mine),
        "rescue": lambda: vault.rescue(platform, user, LABEL, ZERO_ADDRESS, relayer, **mine),
        "rescueFromInbox": lambda: vault.rescueFromInbox(platform, ZERO_ADDRESS, relayer, **mine),
        "setAllowance": lambda: vault.setAllowance(platform, user, LABEL, NO_CAP, NO_EXPIRY, **mine),
        "refund": lambda: vault.refund(platform, 1, relayer, LABEL, CENT, **mine),
        "allocate": lambda: vault.allocate(platform, LABEL, relayer, LABEL, CENT, **mine),
        "requestExit": lambda: vault.requestExit(platform, user, LABEL, TOKENS, **mine),
        "cancelExit": lambda: vault.cancelExit(platform, user, LABEL, **mine),
        "finalizeExit": lambda: vault.finalizeExit(platform, user, LABEL, relayer, **mine),
        "exitWithConsent": lambda: vault.exitWithConsent(*agreed, **mine),
        "withdrawEarnings": lambda: vault.withdrawEarnings(platform, 1, **mine),
    }
    functions = {method.name for method in vault.contract_type.mutable_methods}
    assert set(tries) == functions, "a function that is not tried here"

    errors = {
        "bookInbox": vault.AlreadyBooked,
        "depositFromInbox": vault.AlreadyBooked,
        "depositWithAuthorization": "FiatTokenV2: authorization is used or canceled",
        "setAllowanceBySignature": vault.WrongAllowanceNonce,
        "acceptPlatform": vault.NotPendingOwner,
        "deposit": "ERC20: transfer amount exceeds allowance",
        "sweep": vault.ZeroAmount,
        **dict.fromkeys(
            ["rescue", "setAllowance", "requestExit", "cancelExit", "finalizeExit", "exitWithConsent"],
            vault.NotAccountOwner,
        ),
    }
    harmless = {
        "settle": 1,
        "voidCharges": 0,
        "registerPlatform": 2,
    }  # events: a refusal again; a platform, empty
    with moves():
        for name, attempt in tries.items():
            if name in harmless:
                assert len(attempt().events) == harmless[name], name
            else:
                with reverts(errors.get(name, vault.NotPlatformOwner)):
                    attempt()
    assert not vault.isSettled(platform, 2)
    view = vault.accountOf(platform, account)
    assert (view.allowanceNonce, view.exitAmount) == (1, USD)
