"""From a provider's answer to a price: usage, rate cards, amounts, and the bound that is held before a call.

Nothing here does I/O. Every rounding of the product is `prices.amount`.
"""
