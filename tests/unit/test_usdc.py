import pytest
from eth_utils import is_checksum_address
from evmchains import PUBLIC_CHAIN_META

from waterfall.chain.usdc import USDC


@pytest.mark.parametrize("usdc", USDC.values(), ids=lambda usdc: usdc.network)
def test_usdc__entry__is_the_chain_that_ape_knows_by_that_name(usdc):
    ecosystem, network = usdc.network.split(":")
    assert PUBLIC_CHAIN_META[ecosystem][network]["chainId"] == usdc.chain_id
    assert USDC[usdc.chain_id] is usdc
    assert usdc.is_test is (network != "mainnet")


@pytest.mark.parametrize("usdc", USDC.values(), ids=lambda usdc: usdc.network)
def test_usdc__address__has_its_checksum_so_no_digit_slipped(usdc):
    assert is_checksum_address(usdc.address)


def test_usdc__table__each_chain_and_address_once():
    assert len({usdc.address for usdc in USDC.values()}) == len(USDC) == 10
