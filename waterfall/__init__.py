"""USDC-backed credit for LLM platforms: every call checked, metered, priced and settled on-chain."""

__version__ = "0.1.0"
