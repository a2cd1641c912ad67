"""The vault's assembly against eth_account's encoder."""

from conftest import HOUR
from hypothesis import given
from hypothesis import strategies as st
from settings import few
from typed_data import Charge, digest, settlement

WORD = st.binary(min_size=32, max_size=32)
CHARGE = st.builds(Charge, WORD, st.integers(0, 2**64 - 1), st.integers(0, 2**96 - 1), WORD)


@few
@given(
    platform=st.integers(0, 2**128 - 1),
    charges=st.lists(CHARGE, max_size=12),
    deadline=st.integers(0, 2**40 - 1),
)
def test_hash_settlement__any_batch__is_the_typed_data_digest(vault, domain_of, platform, charges, deadline):
    expected = digest(domain_of(vault), "Settlement", settlement(platform, charges, deadline))
    assert vault.hashSettlement(platform, charges, deadline) == expected


def test_hash_settlement__thousand_charges__is_the_typed_data_digest(vault, domain_of):
    charges = [Charge(bytes([number % 256]) * 32, number, number * 10**9) for number in range(1_000)]
    expected = digest(domain_of(vault), "Settlement", settlement(1, charges, HOUR))
    assert vault.hashSettlement(1, charges, HOUR) == expected
