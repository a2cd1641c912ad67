"""Circle's own USDC on the chains that Waterfall knows.

Source: https://developers.circle.com/stablecoins/usdc-contract-addresses. Native USDC only: what a bridge issues
under a like name (USDC.e, USDbC) is another token, with other promises.
"""

from dataclasses import dataclass

from waterfall.types import Address


@dataclass(frozen=True, slots=True)
class Usdc:
    """Native USDC of one chain."""

    chain_id: int
    chain: str
    """The chain's name, for people."""
    network: str
    """What ape calls the chain: `ecosystem:network`."""
    address: Address
    """With the checksum of EIP-55, as Circle publishes it."""
    is_test: bool = False
    """The chain is a test network: its USDC is worth nothing."""


USDC = {
    usdc.chain_id: usdc
    for usdc in (
        Usdc(1, "Ethereum", "ethereum:mainnet", "0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48"),
        Usdc(8453, "Base", "base:mainnet", "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913"),
        Usdc(42161, "Arbitrum One", "arbitrum:mainnet", "0xaf88d065e77c8cC2239327C5EDb3A432268e5831"),
        Usdc(10, "OP Mainnet", "optimism:mainnet", "0x0b2C639c533813f4Aa9D7837CAf62653d097Ff85"),
        Usdc(137, "Polygon PoS", "polygon:mainnet", "0x3c499c542cEF5E3811e1192ce70d8cC03d5c3359"),
        Usdc(
            11155111,
            "Sepolia",
            "ethereum:sepolia",
            "0x1c7D4B196Cb0C7B01d743Fbc6116a902379C7238",
            is_test=True,
        ),
        Usdc(
            84532, "Base Sepolia", "base:sepolia", "0x036CbD53842c5426634e7929541eC2318f3dCF7e", is_test=True
        ),
        Usdc(
            421614,
            "Arbitrum Sepolia",
            "arbitrum:sepolia",
            "0x75faf114eafb1BDbe2F0316DF893fd58CE46AA4d",
            is_test=True,
        ),
        Usdc(
            11155420,
            "OP Sepolia",
            "optimism:sepolia",
            "0x5fd84259d66Cd46123540766Be93DFE6D43130D7",
            is_test=True,
        ),
        Usdc(
            80002, "Polygon Amoy", "polygon:amoy", "0x41E94Eb019C0762f9Bfcf9Fb1E58725BfB0e7582", is_test=True
        ),
    )
}
"""By chain id."""
