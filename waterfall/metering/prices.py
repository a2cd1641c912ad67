"""Rate cards applied to usage, and the one place where money is rounded."""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

from waterfall.money import UNITS_PER_USD
from waterfall.types import RateCard, Rates, Usage

_MTOK = 10**6
_UNITS_PER_MTOK_USD = Decimal(UNITS_PER_USD)
_FINEST_PRICE = Decimal(1).scaleb(-12)


def amount(usage: Usage, card: RateCard) -> int:
    """What a call costs, in credit units: what was used times rates, rounded up once to one unit (10**-12 USD).

    Like any price per token, crossing a threshold of input applies its rates to the whole call.
    """
    rates = [rates for rates in card.rates if rates.above_input_tokens < max(usage.input_tokens, 1)][-1]
    return max(
        _least(card),
        _round_up(
            usage.plain_input_tokens * _scaled(rates.input_usd_per_mtok)
            + usage.cached_input_tokens * _scaled(rates.cached_input_usd_per_mtok)
            + usage.cache_write_tokens * _scaled(rates.cache_write_usd_per_mtok)
            + usage.cache_write_1h_tokens * _scaled(rates.cache_write_1h_usd_per_mtok)
            + usage.image_tokens * _scaled(rates.image_usd_per_mtok)
            + usage.output_tokens * _scaled(rates.output_usd_per_mtok)
            + _apart(card, usage.web_searches)
        ),
    )


def marked_up(
    card: RateCard, percent: Decimal, usd_per_call: Decimal, least_usd_per_call: Decimal
) -> RateCard:
    """A card with a markup: every price by a percentage more, and so much on top of every call."""
    rates = tuple(
        rates.model_copy(
            update={
                name: price_up(getattr(rates, name), percent)
                for name in Rates.model_fields
                if name != "above_input_tokens"
            }
        )
        for rates in card.rates
    )
    return RateCard(
        model=card.model,
        source=card.source,
        rates=rates,
        usd_per_web_search=price_up(card.usd_per_web_search, percent),
        usd_per_call=usd_per_call,
        least_usd_per_call=least_usd_per_call,
    )


def price_up(price: Decimal, percent: Decimal) -> Decimal:
    """A price by a percentage more, rounded up once to the twelve decimals that a rate card has."""
    return (price * (100 + percent) / 100).quantize(_FINEST_PRICE, ROUND_CEILING)


def _scaled(price: Decimal) -> int:
    """USD per million tokens as credit units per million tokens: exact, as prices have at most 12 decimals."""
    return int(price * _UNITS_PER_MTOK_USD)


def _round_up(units_times_mtok: int) -> int:
    return -(-units_times_mtok // _MTOK)


def _apart(card: RateCard, web_searches: int) -> int:
    """What is not priced by the token, in credit units times a million."""
    return (_scaled(card.usd_per_call) + web_searches * _scaled(card.usd_per_web_search)) * _MTOK


def _least(card: RateCard) -> int:
    return _scaled(card.least_usd_per_call)


@dataclass(frozen=True, slots=True)
class Most:
    """What a call may use at most beside its output."""

    input_tokens: int
    cache_writes: bool = True
    """Whether input may be written to a cache that bills it."""
    images: bool = True
    """Whether there may be images in it."""
    web_searches: int = 0


@dataclass(frozen=True, slots=True)
class Bound:
    """The provable maximum of a call: what it may cost at most, as a function of how much it may put out."""

    output_tokens: int
    """Most output tokens that the upstream is told to produce, over all choices."""
    least_output_tokens: int
    """Down to here the output may be cut for a wallet that affords less; equal when the caller set it."""
    _fixed_scaled: int
    _output_scaled: int
    _least: int = 0

    def amount(self, output_tokens: int) -> int:
        """Credit units to hold for that many output tokens."""
        return max(self._least, _round_up(self._fixed_scaled + output_tokens * self._output_scaled))

    def affordable_output_tokens(self, available: int) -> int | None:
        """Most output tokens that `available` units pay for; None if not even the least."""
        if self.amount(self.output_tokens) <= available:
            return self.output_tokens
        if self.amount(self.least_output_tokens) > available:
            return None
        return (available * _MTOK - self._fixed_scaled) // self._output_scaled


def bound(card: RateCard, most: Most, output_tokens: int, least_output_tokens: int) -> Bound:
    """The bound of a call, at the dearest rates it may reach.

    Args:
        card: its prices.
        most: what it may use beside its output.
        output_tokens: what it may put out.
        least_output_tokens: down to here that may be cut.
    """
    reachable = [rates for rates in card.rates if rates.above_input_tokens < max(most.input_tokens, 1)]
    dearest_input = max(price for rates in reachable for price in _of_input(rates, most))
    dearest_output = max(rates.output_usd_per_mtok for rates in reachable)
    return Bound(
        output_tokens,
        least_output_tokens,
        most.input_tokens * _scaled(dearest_input) + _apart(card, most.web_searches),
        _scaled(dearest_output),
        _least(card),
    )


def _of_input(rates: Rates, most: Most) -> Iterator[Decimal]:
    yield rates.input_usd_per_mtok
    yield rates.cached_input_usd_per_mtok
    if most.cache_writes:
        yield rates.cache_write_usd_per_mtok
        yield rates.cache_write_1h_usd_per_mtok
    if most.images:
        yield rates.image_usd_per_mtok


def fixed(amount: int) -> Bound:
    """The bound of something whose price is known: `amount` credit units."""
    return Bound(0, 0, amount * _MTOK, 0)
