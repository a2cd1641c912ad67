"""The models that callers may use: where each is served, what it costs its platform, and what it costs them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, time

from waterfall.errors import InvalidRequest, ModelNotFound, ModelNotPriced
from waterfall.gateway.config import GatewaySettings, ModelSettings, Prices, Tariffs
from waterfall.gateway.upstreams import Upstream
from waterfall.metering import prices
from waterfall.metering.published import changes, published
from waterfall.receipts import price_id
from waterfall.types import RateCard, Rates, Surface

_IMAGE_TOKENS = {"anthropic": 5_000, "openai": 50_000}
"""The most tokens that an image comes to with any model of a provider: a tall one in full detail with gpt-4o-mini is 48,169.

Sources: https://platform.openai.com/docs/guides/images-vision, https://platform.claude.com/docs/en/build-with-claude/vision
"""


@dataclass(frozen=True)
class Model:
    """One model, ready to be called and billed."""

    name: str
    upstream: Upstream
    upstream_model: str
    card: RateCard
    """What its callers pay."""
    price_id: str
    """Of `card`."""
    vendor_card: RateCard
    """What it costs the platform."""
    default_max_output_tokens: int
    surfaces: tuple[Surface, ...]
    """Over which it may be called."""
    context_tokens: int | None = None
    """The most input that it reads; None: not known."""
    image_tokens: int | None = None
    """The most tokens that one image comes to; None: not known."""


@dataclass(frozen=True)
class _Base:
    """A model before its tariff."""

    card: RateCard
    provider: str | None
    context_tokens: int | None
    has_output: bool
    until: datetime | None
    """When it changes; None: it is not known to."""


class Models:
    """All models by the names callers use."""

    def __init__(
        self,
        models: Mapping[str, ModelSettings],
        upstreams: Mapping[str, Upstream],
        settings: GatewaySettings,
        tariffs: Tariffs | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._settings = models
        self._upstreams = upstreams
        self._default_max_output_tokens = settings.default_max_output_tokens
        self._tariffs = tariffs or Tariffs()
        self._now = now
        self._bases: dict[str, _Base | None] = {}
        self._priced: dict[tuple[str, str], tuple[Model, datetime | None]] = {}

    @property
    def unpriced(self) -> list[str]:
        """Configured, but refused: no price is known."""
        return [name for name in self._settings if self._base(name) is None]

    def all(self, account: str | None = None) -> Iterator[Model]:
        """Every model that has a price, with those of an account's tariff."""
        for name in self._settings:
            if self._base(name) is not None:
                yield self.find(name, account)

    def find(self, name: str, account: str | None = None) -> Model:
        """The model of this name, with the prices of an account's tariff.

        Args:
            name: as callers say it.
            account: who pays; None: anybody.

        Raises:
            ModelNotFound, ModelNotPriced
        """
        tariff_name, tariff = self._tariffs.of(account)
        found = self._priced.get((name, tariff_name))
        if found is not None and (found[1] is None or self._now() < found[1]):
            return found[0]
        if name not in self._settings:
            raise ModelNotFound(model=name[:100])
        base = self._base(name)
        if base is None:
            raise ModelNotPriced(model=name[:100])
        model = self._settings[name]
        own_prices, markup = tariff.of(name)
        card = base.card if own_prices is None else _card(name, own_prices)
        card = prices.marked_up(card, markup.percent, markup.usd_per_call, markup.least_usd_per_call)
        made = Model(
            name=name,
            upstream=self._upstreams[model.upstream],
            upstream_model=model.model or name,
            card=card,
            price_id=price_id(card),
            vendor_card=base.card,
            default_max_output_tokens=model.max_output_tokens or self._default_max_output_tokens,
            surfaces=tuple(
                surface
                for surface in self._upstreams[model.upstream].settings.serves
                if base.has_output or surface == "embeddings"
            ),
            context_tokens=model.context_tokens or base.context_tokens,
            image_tokens=model.image_tokens or _IMAGE_TOKENS.get(base.provider or ""),
        )
        self._priced[name, tariff_name] = made, base.until
        return made

    def serving(self, name: str, surface: Surface, account: str | None = None) -> Model:
        """The same, where it is called over this surface.

        Raises:
            ModelNotFound, ModelNotPriced
            InvalidRequest: its upstream does not have this surface.
        """
        model = self.find(name, account)
        if surface not in model.surfaces:
            served = ", ".join(model.surfaces) or "nothing"
            raise InvalidRequest(reason=f"{name} is not served as {surface}, but as {served}.", param="model")
        return model

    def _base(self, name: str) -> _Base | None:
        now = self._now()
        known = self._bases.get(name)
        if name not in self._bases or (known is not None and known.until is not None and known.until <= now):
            known = self._bases[name] = self._read_base(name, now)
        return known

    def _read_base(self, name: str, now: datetime) -> _Base | None:
        model = self._settings[name]
        theirs = model.model or name
        own = model.prices_at(now)
        later = [each.starts_at for each in model.later if each.starts_at > now]
        if own.are_given:
            # A name alone may be another model's: what is known of it counts only where its provider is said.
            known = published(name, theirs, model.provider, now) if model.provider else None
            provider, context = (known.provider, known.context_tokens) if known else (None, None)
            return _Base(_card(name, own), provider, context, has_output=True, until=min(later, default=None))
        known = published(name, theirs, model.provider, now)
        if known is None:
            return None
        days = [datetime.combine(day, time(), UTC) for day in changes(theirs, model.provider, now)]
        until = min([*days, *later], default=None)
        return _Base(known.card, known.provider, known.context_tokens, known.has_output, until)


def _card(name: str, own: Prices) -> RateCard:
    input_, output = own.input_usd_per_mtok, own.output_usd_per_mtok
    assert input_ is not None  # noqa: S101 - they are given
    assert output is not None  # noqa: S101
    write = input_ if own.cache_write_usd_per_mtok is None else own.cache_write_usd_per_mtok
    write_1h, cached, image = (
        own.cache_write_1h_usd_per_mtok,
        own.cached_input_usd_per_mtok,
        own.image_usd_per_mtok,
    )
    rates = Rates(
        input_usd_per_mtok=input_,
        cached_input_usd_per_mtok=input_ if cached is None else cached,
        cache_write_usd_per_mtok=write,
        cache_write_1h_usd_per_mtok=write if write_1h is None else write_1h,
        image_usd_per_mtok=input_ if image is None else image,
        output_usd_per_mtok=output,
    )
    searches = {} if own.usd_per_web_search is None else {"usd_per_web_search": own.usd_per_web_search}
    return RateCard(model=name, source="waterfall.toml", rates=(rates,), **searches)
