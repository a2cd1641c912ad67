import pytest
from conftest import DAY, HOUR, ZERO_ADDRESS
from eth_utils import keccak
from reverts import reverts


def not_a_token(address):
    """The error as data: ape has no contract yet to decode it with."""
    selector = keccak(text="NotATokenWithSixDecimals(address)")[:4]
    return "0x" + selector.hex() + address.removeprefix("0x").lower().rjust(64, "0")


def test_constructor__token_with_six_decimals__kept(vault, token):
    assert vault.token() == token.address


@pytest.mark.parametrize("decimals", [0, 5, 7, 18, 255])
def test_constructor__other_decimals__reverts(project, admin, decimals):
    token = admin.deploy(project.PlainToken, decimals)
    with reverts(not_a_token(token.address)):
        admin.deploy(project.CreditVault, token)


@pytest.mark.parametrize("holder", ["zero", "key"])
def test_constructor__no_code_at_the_token__reverts(project, admin, user, holder):
    token = ZERO_ADDRESS if holder == "zero" else user.address
    with reverts(not_a_token(token)):
        admin.deploy(project.CreditVault, token)


def test_constructor__contract_that_is_no_token__reverts(project, admin, user):
    wallet = admin.deploy(project.ContractWallet, user)
    with reverts(None):
        admin.deploy(project.CreditVault, wallet)


def test_constants__are_what_the_interface_says(vault):
    assert (vault.LIMIT_PER_CHARGE(), vault.LIMIT_PER_WINDOW(), vault.LIMIT_EXPIRY()) == (1, 2, 4)
    assert vault.MIN_WINDOW() == 60
    assert vault.MIN_EXIT_DELAY() == HOUR
    assert vault.MAX_EXIT_DELAY() == 7 * DAY
    assert vault.MAX_DEADLINE() == HOUR
    assert vault.MAX_CHARGES() == 1_000


def test_domain__eip5267__names_the_vault(vault, chain):
    fields, name, version, chain_id, contract, salt, extensions = vault.eip712Domain()
    assert (bytes(fields), name, version, bytes(salt), list(extensions)) == (
        b"\x0f",
        "Waterfall CreditVault",
        "1",
        bytes(32),
        [],
    )
    assert (chain_id, contract) == (chain.chain_id, vault.address)


def test_code__size__is_below_the_limit_of_eip_170(vault):
    assert len(vault.code) <= 24_576
