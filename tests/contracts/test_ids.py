"""What is derived: platform and account numbers, deposit nonces, deposit addresses."""

from conftest import LABEL, SALT
from eth_abi import encode
from eth_utils import keccak, to_checksum_address
from hypothesis import given
from hypothesis import strategies as st
from settings import few

ADDRESS = st.binary(min_size=20, max_size=20).map(to_checksum_address)
WORD = st.binary(min_size=32, max_size=32)
PLATFORM = st.integers(0, 2**128 - 1)


@few
@given(registrant=ADDRESS, salt=WORD)
def test_platform_id__any_registrant__is_the_low_half_of_the_hash(vault, registrant, salt):
    expected = int.from_bytes(keccak(encode(["address", "bytes32"], [registrant, salt]))[16:], "big")
    assert vault.platformId(registrant, salt) == expected


@few
@given(platform=PLATFORM, owner=ADDRESS, label=WORD)
def test_account_id__any_owner__is_the_hash(vault, platform, owner, label):
    expected = keccak(encode(["uint128", "address", "bytes32"], [platform, owner, label]))
    assert vault.accountId(platform, owner, label) == expected


@few
@given(platform=PLATFORM, owner=ADDRESS, label=WORD, salt=WORD)
def test_deposit_nonce__any_deposit__is_the_hash(vault, platform, owner, label, salt):
    fields = encode(["uint128", "address", "bytes32", "bytes32"], [platform, owner, label, salt])
    assert vault.depositNonce(platform, owner, label, salt) == keccak(fields)


def test_deposit_address__one_field_differs__another_address(vault, platform, user, stranger):
    addresses = {
        vault.depositAddress(platform, user, LABEL),
        vault.depositAddress(platform + 1, user, LABEL),
        vault.depositAddress(platform, stranger, LABEL),
        vault.depositAddress(platform, user, SALT),
    }
    assert len(addresses) == 4


def test_deposit_address__another_vault__another_address(project, admin, token, vault, platform, user):
    other = admin.deploy(project.CreditVault, token)
    assert other.depositAddress(platform, user, LABEL) != vault.depositAddress(platform, user, LABEL)
