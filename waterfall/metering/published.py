"""Rate cards as providers publish them, collected by genai-prices (https://github.com/pydantic/genai-prices)."""

from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from importlib.metadata import version
from typing import Any

from genai_prices import data_snapshot
from genai_prices.types import StartDateConstraint, TieredPrices, TimeOfDateConstraint
from pydantic import ValidationError

from waterfall.types import RateCard, Rates

# Prices of things that no call of ours uses; any other name that we do not read makes the model unpriced.
_NOT_IN_OUR_CALLS = {
    "input_audio_mtok",
    "output_audio_mtok",
    "cache_audio_read_mtok",
    "output_image_mtok",
    "cache_image_read_mtok",
    "input_video_mtok",
    "output_video_mtok",
    "storage_searches_kcount",
}
_KCOUNT = 1000


@dataclass(frozen=True, slots=True)
class Published:
    """What is known of a model."""

    card: RateCard
    provider: str
    """genai-prices' id."""
    context_tokens: int | None
    """The most input that the model reads."""
    has_output: bool
    """Whether it has a price for output; without one it is a model for embeddings."""


def published(model: str, provider_model: str, provider: str | None, at: datetime) -> Published | None:
    """What genai-prices publishes for a model at a time, or None where it has no price.

    Args:
        model: the name callers use, which the card carries.
        provider_model: the provider's name for it.
        provider: genai-prices' id of the provider; None guesses it from the model's name.
        at: timezone-aware.

    A model with prices that a call could incur and a `RateCard` cannot express has none: prices by the time of day,
    or with more than twelve decimals.
    """
    try:
        found, info = data_snapshot.get_snapshot().find_provider_model(provider_model, None, provider, None)
    except LookupError:
        return None
    if isinstance(info.prices, list) and any(
        isinstance(price.constraint, TimeOfDateConstraint) for price in info.prices
    ):
        return None
    prices = {name: value for name, value in vars(info.get_prices(at)).items() if value is not None}
    input_ = prices.pop("input_mtok", None)
    output = prices.pop("output_mtok", None)
    if input_ is None:
        return None
    write = prices.pop("cache_write_mtok", input_)
    of_tokens = {
        "input_usd_per_mtok": input_,
        "cached_input_usd_per_mtok": prices.pop("cache_read_mtok", input_),
        "cache_write_usd_per_mtok": write,
        "cache_write_1h_usd_per_mtok": prices.pop("cache_write_1h_mtok", write),
        "image_usd_per_mtok": prices.pop("input_image_mtok", input_),
        "output_usd_per_mtok": Decimal(0) if output is None else output,
    }
    searches = prices.pop("web_searches_kcount", Decimal(0))
    if not prices.keys() <= _NOT_IN_OUR_CALLS or isinstance(searches, TieredPrices):
        return None
    steps = sorted({0, *(step for price in of_tokens.values() for step in _steps(price))})
    try:
        card = RateCard(
            model=model,
            source=f"genai-prices {version('genai-prices')}: {found.id}/{info.id}",
            rates=tuple(
                Rates(
                    above_input_tokens=step, **{name: _at(price, step) for name, price in of_tokens.items()}
                )
                for step in steps
            ),
            usd_per_web_search=Decimal(searches) / _KCOUNT,
        )
    except ValidationError:
        return None
    return Published(card, found.id, info.context_window, output is not None)


def changes(provider_model: str, provider: str | None, after: datetime) -> list[date]:
    """The days from which other prices apply, as far as they are announced, beginning after a time."""
    try:
        _, info = data_snapshot.get_snapshot().find_provider_model(provider_model, None, provider, None)
    except LookupError:
        return []
    constraints = [price.constraint for price in info.prices] if isinstance(info.prices, list) else []
    days = {c.start_date for c in constraints if isinstance(c, StartDateConstraint)}
    return sorted(day for day in days if day > after.date())


def _steps(price: Any) -> list[int]:
    return [tier.start for tier in price.tiers] if isinstance(price, TieredPrices) else []


def _at(price: Any, above_input_tokens: int) -> Decimal:
    if not isinstance(price, TieredPrices):
        return Decimal(price)
    reached = [tier.price for tier in price.tiers if tier.start <= above_input_tokens]
    return Decimal(reached[-1] if reached else price.base)
