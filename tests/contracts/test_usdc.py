"""TestUSDC behaves like Circle's FiatTokenV2_2."""

import pytest
from conftest import CURVE_ORDER, HOUR, ZERO_ADDRESS
from eth_account import Account
from reverts import reverts
from typed_data import sign

NONCE = b"\x11" * 32
BEFORE = 2**40


def split(signature):
    return signature[64], signature[:32], signature[32:64]


@pytest.fixture(scope="session")
def holder():
    return Account.from_key("0x" + "d4" * 32)


@pytest.fixture
def authorization(token, admin, holder, user):
    """A dollar from the holder to the user."""
    token.mint(holder.address, 10**6, sender=admin)
    return [holder.address, user.address, 10**6, 0, BEFORE, NONCE]


@pytest.fixture
def signed(token_domain, holder):
    def signed(primary, *values, key=holder.key):
        names = {
            "Permit": ["owner", "spender", "value", "nonce", "deadline"],
            "CancelAuthorization": ["authorizer", "nonce"],
        }.get(primary, ["from", "to", "value", "validAfter", "validBefore", "nonce"])
        return sign(key, token_domain, primary, dict(zip(names, values, strict=True)))

    return signed


def test_metadata__like_circles(token, admin):
    assert (token.name(), token.symbol(), token.decimals(), token.version(), token.currency()) == (
        "USD Coin",
        "USDC",
        6,
        "2",
        "USD",
    )
    assert {token.masterMinter(), token.pauser(), token.blacklister()} == {admin.address}
    assert token.isMinter(admin)


def test_type_hashes__like_circles(token):
    assert token.TRANSFER_WITH_AUTHORIZATION_TYPEHASH().hex() == (
        "7c7c6cdb67a18743f49ec6fa9b35f50d52ed05cbed4cc592e13b44501c1a2267"
    )
    assert token.RECEIVE_WITH_AUTHORIZATION_TYPEHASH().hex() == (
        "d099cc98ef71107a616c4f0f941f04c322d8e254fe26b3c6668db87aae413de8"
    )
    assert token.CANCEL_AUTHORIZATION_TYPEHASH().hex() == (
        "158b0a9edf7a828aad02f63cd515c68ef2f50ba807396f6d12842833a1597429"
    )
    assert token.PERMIT_TYPEHASH().hex() == (
        "6e71edae12b1b97f4d1f60370fef10105fa2faae0126114a169c64845d6126c9"
    )


# ── ERC-20 and administration ──


def test_mint_and_burn__by_the_minter__move_the_supply(token, admin, user):
    tx = token.mint(admin, 10, sender=admin)
    assert tx.events == [
        token.Mint(minter=admin, to=admin, amount=10),
        token.Transfer(**{"from": ZERO_ADDRESS, "to": admin, "value": 10}),
    ]
    tx = token.burn(4, sender=admin)
    assert tx.events == [
        token.Burn(burner=admin, amount=4),
        token.Transfer(**{"from": admin, "to": ZERO_ADDRESS, "value": 4}),
    ]
    assert (token.totalSupply(), token.balanceOf(admin)) == (6, 6)


def test_mint_and_burn__not_allowed__revert(token, admin, user):
    with reverts("FiatToken: caller is not a minter"):
        token.mint(user, 1, sender=user)
    with reverts("FiatToken: mint to the zero address"):
        token.mint(ZERO_ADDRESS, 1, sender=admin)
    with reverts("FiatToken: mint amount not greater than 0"):
        token.mint(user, 0, sender=admin)
    with reverts("FiatToken: burn amount not greater than 0"):
        token.burn(0, sender=admin)
    with reverts("FiatToken: burn amount exceeds balance"):
        token.burn(1, sender=admin)


def test_transfer__more_than_there_is__reverts(token, admin, user):
    token.mint(user, 10, sender=admin)
    with reverts("ERC20: transfer amount exceeds balance"):
        token.transfer(admin, 11, sender=user)
    with reverts("ERC20: transfer to the zero address"):
        token.transfer(ZERO_ADDRESS, 1, sender=user)


def test_transfer_from__uses_up_even_the_largest_allowance(token, admin, user, stranger):
    token.mint(user, 10, sender=admin)
    token.approve(stranger, 2**256 - 1, sender=user)
    token.transferFrom(user, stranger, 4, sender=stranger)
    assert token.allowance(user, stranger) == 2**256 - 5
    token.approve(stranger, 3, sender=user)
    with reverts("ERC20: transfer amount exceeds allowance"):
        token.transferFrom(user, stranger, 4, sender=stranger)


def test_allowance__increased_and_decreased(token, user, stranger):
    token.increaseAllowance(stranger, 5, sender=user)
    tx = token.decreaseAllowance(stranger, 2, sender=user)
    assert tx.events == [token.Approval(owner=user, spender=stranger, value=3)]
    with reverts("ERC20: decreased allowance below zero"):
        token.decreaseAllowance(stranger, 4, sender=user)
    with reverts("ERC20: approve to the zero address"):
        token.approve(ZERO_ADDRESS, 1, sender=user)


def test_pause__stops_everything_that_moves_or_promises(token, admin, user, holder, signed, authorization):
    assert token.pause(sender=admin).events == [token.Pause()]
    for call in (
        lambda: token.transfer(user, 0, sender=user),
        lambda: token.transferFrom(user, user, 0, sender=user),
        lambda: token.approve(user, 0, sender=user),
        lambda: token.increaseAllowance(user, 0, sender=user),
        lambda: token.mint(user, 1, sender=admin),
        lambda: token.burn(1, sender=admin),
        lambda: token.permit(holder.address, user, 1, BEFORE, bytes(65), sender=user),
        lambda: token.transferWithAuthorization(*authorization, bytes(65), sender=user),
        lambda: token.receiveWithAuthorization(*authorization, bytes(65), sender=user),
        lambda: token.cancelAuthorization(holder.address, NONCE, bytes(65), sender=user),
    ):
        with reverts("Pausable: paused"):
            call()
    assert token.unpause(sender=admin).events == [token.Unpause()]
    with reverts("Pausable: caller is not the pauser"):
        token.pause(sender=user)


def test_blacklist__stops_transfers_either_way_but_no_approval(token, admin, user, stranger):
    token.mint(user, 10, sender=admin)
    assert token.blacklist(user, sender=admin).events == [token.Blacklisted(account=user)]
    token.approve(stranger, 10, sender=user)
    for call in (
        lambda: token.transfer(stranger, 1, sender=user),
        lambda: token.transfer(user, 0, sender=stranger),
        lambda: token.transferFrom(user, stranger, 1, sender=stranger),
        lambda: token.mint(user, 1, sender=admin),
        lambda: token.transfer(token, 0, sender=stranger),
    ):
        with reverts("Blacklistable: account is blacklisted"):
            call()
    assert token.unBlacklist(user, sender=admin).events == [token.UnBlacklisted(account=user)]
    token.transfer(stranger, 1, sender=user)
    with reverts("Blacklistable: caller is not the blacklister"):
        token.blacklist(stranger, sender=user)


# ── EIP-3009 ──


@pytest.mark.parametrize("form", ["bytes", "v, r, s"])
def test_transfer_with_authorization__anybody_submits(
    token, holder, user, stranger, authorization, signed, form
):
    signature = signed("TransferWithAuthorization", *authorization)
    signature = (signature,) if form == "bytes" else split(signature)
    tx = token.transferWithAuthorization(*authorization, *signature, sender=stranger)
    assert tx.events == [
        token.AuthorizationUsed(authorizer=holder.address, nonce=NONCE),
        token.Transfer(**{"from": holder.address, "to": user, "value": 10**6}),
    ]
    assert token.authorizationState(holder.address, NONCE)
    with reverts("FiatTokenV2: authorization is used or canceled"):
        token.transferWithAuthorization(*authorization, *signature, sender=stranger)


@pytest.mark.parametrize("form", ["bytes", "v, r, s"])
def test_receive_with_authorization__only_the_payee_submits(
    token, user, stranger, authorization, signed, form
):
    signature = signed("ReceiveWithAuthorization", *authorization)
    signature = (signature,) if form == "bytes" else split(signature)
    with reverts("FiatTokenV2: caller must be the payee"):
        token.receiveWithAuthorization(*authorization, *signature, sender=stranger)
    token.receiveWithAuthorization(*authorization, *signature, sender=user)
    assert token.balanceOf(user) == 10**6


@pytest.mark.parametrize("form", ["bytes", "v, r, s"])
def test_cancel_authorization__sets_the_state_and_moves_nothing(
    token, holder, stranger, authorization, signed, form
):
    signature = signed("CancelAuthorization", holder.address, NONCE)
    signature = (signature,) if form == "bytes" else split(signature)
    tx = token.cancelAuthorization(holder.address, NONCE, *signature, sender=stranger)
    assert tx.events == [token.AuthorizationCanceled(authorizer=holder.address, nonce=NONCE)]
    assert token.authorizationState(holder.address, NONCE)
    assert token.balanceOf(holder.address) == 10**6
    with reverts("FiatTokenV2: authorization is used or canceled"):
        token.cancelAuthorization(holder.address, NONCE, *signature, sender=stranger)


def test_transfer_with_authorization__contract_wallet__its_word_counts(
    project, token, admin, user, holder, signed
):
    wallet = admin.deploy(project.ContractWallet, holder.address)
    token.mint(wallet, 10**6, sender=admin)
    authorization = [wallet.address, user.address, 10**6, 0, BEFORE, NONCE]
    with reverts("FiatTokenV2: invalid signature"):
        token.transferWithAuthorization(*authorization, bytes(65), sender=user)
    signature = signed("TransferWithAuthorization", *authorization)
    token.transferWithAuthorization(*authorization, signature, sender=user)
    assert token.balanceOf(user) == 10**6


def test_transfer_with_authorization__wrong_signature__reverts(token, user, stranger, authorization, signed):
    signature = signed("TransferWithAuthorization", *authorization)
    s = int.from_bytes(signature[32:64], "big")
    high_s = signature[:32] + (CURVE_ORDER - s).to_bytes(32, "big") + bytes([55 - signature[64]])
    for wrong, reason in (
        (signature[:64], "ECRecover: invalid signature length"),
        (high_s, "ECRecover: invalid signature 's' value"),
        (signature[:64] + b"\x00", "ECRecover: invalid signature 'v' value"),
        (bytes(64) + b"\x1b", "ECRecover: invalid signature"),
        (signed("ReceiveWithAuthorization", *authorization), "FiatTokenV2: invalid signature"),
        (
            signed("TransferWithAuthorization", *authorization, key=stranger.private_key),
            "FiatTokenV2: invalid signature",
        ),
    ):
        with reverts(reason):
            token.transferWithAuthorization(*authorization, wrong, sender=user)


# ── EIP-2612 ──


@pytest.mark.parametrize("form", ["bytes", "v, r, s"])
def test_permit__approves_once(token, holder, user, stranger, signed, now, form):
    deadline = now() + HOUR
    signature = signed("Permit", holder.address, user.address, 5, 0, deadline)
    signature = (signature,) if form == "bytes" else split(signature)
    permit = (holder.address, user.address, 5, deadline, *signature)
    tx = token.permit(*permit, sender=stranger)
    assert tx.events == [token.Approval(owner=holder.address, spender=user, value=5)]
    assert (token.allowance(holder.address, user), token.nonces(holder.address)) == (5, 1)
    with reverts("EIP2612: invalid signature"):
        token.permit(*permit, sender=stranger)


def test_permit__at_its_deadline__approves_and_a_second_later_reverts(
    token, holder, user, signed, at, now, isolate
):
    deadline = now() + 100
    signature = signed("Permit", holder.address, user.address, 5, 0, deadline)
    with isolate():
        at(deadline + 1)
        with reverts("FiatTokenV2: permit is expired"):
            token.permit(holder.address, user, 5, deadline, signature, sender=user)
    at(deadline)
    token.permit(holder.address, user, 5, deadline, signature, sender=user)
    assert token.allowance(holder.address, user) == 5


def test_permit__largest_deadline__never_expires(token, holder, user, signed):
    signature = signed("Permit", holder.address, user.address, 5, 0, 2**256 - 1)
    token.permit(holder.address, user, 5, 2**256 - 1, signature, sender=user)
    assert token.allowance(holder.address, user) == 5


# ── The code alone ──


def test_code__placed_at_another_address__knows_its_admin_and_its_domain(token, admin, user, chain, project):
    place = "0x036CbD53842c5426634e7929541eC2318f3dCF7e"  # USDC of Base Sepolia
    chain.provider.make_request("anvil_setCode", [place, chain.provider.get_code(token.address).to_0x_hex()])
    placed = project.TestUSDC.at(place)
    placed.mint(user, 5, sender=admin)
    assert (placed.name(), placed.balanceOf(user)) == ("USD Coin", 5)
    assert placed.DOMAIN_SEPARATOR() != token.DOMAIN_SEPARATOR()
