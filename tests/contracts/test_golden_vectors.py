"""The digests that Python and the vault share: tests/vectors/digests.json.

The file's domain is a fixed address on chain 31337. The vault's code is put there: an address other than the one
it was deployed at makes it derive its domain anew. At its own address, only the domain differs.
"""

import json
from pathlib import Path

import pytest
from eth_utils import keccak, to_checksum_address
from hypothesis import given
from hypothesis import strategies as st
from settings import few

from waterfall.chain.vault import account_id, deposit_address
from waterfall.receipts import Domain

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "digests.json").read_text())
DOMAIN = VECTORS["domain"]


def values(message):
    """A message of the file as ape takes it: a tuple, in the struct's order."""
    return tuple(
        [values(item) for item in value]
        if isinstance(value, list)
        else bytes.fromhex(value[2:])
        if isinstance(value, str) and value.startswith("0x") and name != "model"
        else value
        if isinstance(value, bool) or name == "model"
        else int(value)
        for name, value in message.items()
    )


def hexed(text):
    return bytes.fromhex(text[2:])


def about(vector):
    return vector["about"]


@pytest.fixture(scope="session")
def vault_of_the_file(chain, project, vault):
    """The vault's code at the address that the file names."""
    assert chain.chain_id == DOMAIN["chainId"]
    chain.provider.set_code(DOMAIN["verifyingContract"], chain.provider.get_code(vault.address))
    return project.CreditVault.at(to_checksum_address(DOMAIN["verifyingContract"]))


@pytest.mark.parametrize("vector", VECTORS["receipts"], ids=about)
def test_verify_receipt__golden_vector__same_digest_and_signer(vault_of_the_file, vector):
    check = vault_of_the_file.verifyReceipt(values(vector["message"]), hexed(vector["signature"]))
    assert check.digest == hexed(vector["digest"])
    assert check.signer.lower() == VECTORS["meter"]


@pytest.mark.parametrize("vector", VECTORS["settlements"], ids=about)
def test_hash_settlement__golden_vector__same_digest(vault_of_the_file, vector):
    assert vault_of_the_file.hashSettlement(*values(vector["message"])) == hexed(vector["digest"])


@pytest.mark.parametrize("vector", VECTORS["receipts"], ids=about)
def test_verify_receipt__golden_vector_in_another_domain__same_struct(vault, vector):
    digest = vault.verifyReceipt(values(vector["message"]), hexed(vector["signature"])).digest
    assert digest == in_domain_of(vault, vector["structHash"])


@pytest.mark.parametrize("vector", VECTORS["settlements"], ids=about)
def test_hash_settlement__golden_vector_in_another_domain__same_struct(vault, vector):
    digest = vault.hashSettlement(*values(vector["message"]))
    assert digest == in_domain_of(vault, vector["structHash"])


def in_domain_of(vault, struct_hash):
    separator = Domain(DOMAIN["chainId"], vault.address).separator
    return keccak(b"\x19\x01" + separator + hexed(struct_hash))


@few
@given(
    platform=st.integers(0, 2**128 - 1),
    owner=st.binary(min_size=20, max_size=20),
    label=st.binary(min_size=32, max_size=32),
)
def test_ids__any_account__python_and_the_vault_agree(vault, platform, owner, label):
    account = account_id(platform, "0x" + owner.hex(), "0x" + label.hex())
    assert "0x" + vault.accountId(platform, owner, label).hex() == account
    address = deposit_address(vault.address.lower(), account)
    assert vault.depositAddress(platform, to_checksum_address(owner), label).lower() == address
