"""Rate cards and the one place where money is rounded."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from importlib.metadata import version
from typing import Any

from genai_prices import data_snapshot
from genai_prices.types import TieredPrices, TimeOfDateConstraint
from pydantic import ValidationError

from waterfall.money import UNITS_PER_USD
from waterfall.types import RateCard, Rates, Usage

_MTOK = 10**6
_UNITS_PER_MTOK_USD = Decimal(UNITS_PER_USD)
# Prices of things that a text call never uses; any other name makes the model unpriced.
_NOT_IN_TEXT_CALLS = {
    "cache_write_mtok",  # OpenAI-compatible surfaces do not bill cache writes apart
    "cache_write_1h_mtok",
    "input_audio_mtok",
    "output_audio_mtok",
    "cache_audio_read_mtok",
    "input_image_mtok",
    "output_image_mtok",
    "cache_image_read_mtok",
    "input_video_mtok",
    "output_video_mtok",
    "web_searches_kcount",
    "storage_searches_kcount",
}


def published_card(model: str, provider_model: str, provider: str | None, at: datetime) -> RateCard | None:
    """The rate card that genai-prices publishes for a model at a time, or None where it has none.

    Args:
        model: the name callers use, which the card carries.
        provider_model: the provider's name for it.
        provider: genai-prices' id of the provider; None guesses it from the model's name.
        at: timezone-aware.

    A model with prices that a text call could incur and a `RateCard` cannot express has none: prices by the
    time of day, by the request, or with more than twelve decimals.
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
    input_, output = prices.pop("input_mtok", None), prices.pop("output_mtok", None)
    cached = prices.pop("cache_read_mtok", input_)
    if input_ is None or output is None or not prices.keys() <= _NOT_IN_TEXT_CALLS:
        return None
    steps = sorted({0, *_steps(input_), *_steps(cached), *_steps(output)})
    try:
        rates = tuple(
            Rates(
                above_input_tokens=step,
                input_usd_per_mtok=_at(input_, step),
                cached_input_usd_per_mtok=_at(cached, step),
                output_usd_per_mtok=_at(output, step),
            )
            for step in steps
        )
    except ValidationError:
        return None
    source = f"genai-prices {version('genai-prices')}: {found.id}/{info.id}"
    return RateCard(model=model, source=source, rates=rates)


def _steps(price: Any) -> list[int]:
    return [tier.start for tier in price.tiers] if isinstance(price, TieredPrices) else []


def _at(price: Any, above_input_tokens: int) -> Decimal:
    if not isinstance(price, TieredPrices):
        return Decimal(price)
    reached = [tier.price for tier in price.tiers if tier.start <= above_input_tokens]
    return Decimal(reached[-1] if reached else price.base)


def amount(usage: Usage, card: RateCard) -> int:
    """What a call costs, in credit units: tokens times rates, rounded up once to one unit (10**-12 USD).

    Like any price per token, crossing a threshold of input applies its rates to the whole call.
    """
    rates = [rates for rates in card.rates if rates.above_input_tokens < max(usage.input_tokens, 1)][-1]
    return _round_up(
        (usage.input_tokens - usage.cached_input_tokens) * _scaled(rates.input_usd_per_mtok)
        + usage.cached_input_tokens * _scaled(rates.cached_input_usd_per_mtok)
        + usage.output_tokens * _scaled(rates.output_usd_per_mtok)
    )


def _scaled(price: Decimal) -> int:
    """USD per million tokens as credit units per million tokens: exact, as prices have at most 12 decimals."""
    return int(price * _UNITS_PER_MTOK_USD)


def _round_up(units_times_mtok: int) -> int:
    return -(-units_times_mtok // _MTOK)


@dataclass(frozen=True, slots=True)
class Bound:
    """The provable maximum of a call: what it may cost at most, as a function of how much it may put out."""

    output_tokens: int
    """Most output tokens that the upstream is told to produce, over all choices."""
    least_output_tokens: int
    """Down to here the output may be cut for a wallet that affords less; equal when the caller set it."""
    _input_scaled: int
    _output_scaled: int

    def amount(self, output_tokens: int) -> int:
        """Credit units to hold for that many output tokens."""
        return _round_up(self._input_scaled + output_tokens * self._output_scaled)

    def affordable_output_tokens(self, available: int) -> int | None:
        """Most output tokens that `available` units pay for; None if not even the least."""
        if self.amount(self.output_tokens) <= available:
            return self.output_tokens
        if self.amount(self.least_output_tokens) > available:
            return None
        return (available * _MTOK - self._input_scaled) // self._output_scaled


def bound(card: RateCard, input_tokens: int, output_tokens: int, least_output_tokens: int) -> Bound:
    """The bound of a call with at most this much input and output, at the dearest rates it may reach."""
    reachable = [rates for rates in card.rates if rates.above_input_tokens < max(input_tokens, 1)]
    dearest_input = max(max(r.input_usd_per_mtok, r.cached_input_usd_per_mtok) for r in reachable)
    dearest_output = max(rates.output_usd_per_mtok for rates in reachable)
    return Bound(
        output_tokens, least_output_tokens, input_tokens * _scaled(dearest_input), _scaled(dearest_output)
    )


def fixed(amount: int) -> Bound:
    """The bound of something whose price is known: `amount` credit units."""
    return Bound(0, 0, amount * _MTOK, 0)
