"""The models that callers may use: where each is served and what it costs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from waterfall.errors import ModelNotFound, ModelNotPriced
from waterfall.gateway.config import GatewaySettings, ModelSettings
from waterfall.gateway.upstreams import Upstream
from waterfall.metering.prices import published_card
from waterfall.receipts import price_id
from waterfall.types import RateCard, Rates


@dataclass(frozen=True)
class Model:
    """One model, ready to be called and billed."""

    name: str
    upstream: Upstream
    upstream_model: str
    card: RateCard
    price_id: str
    default_max_output_tokens: int


class Models:
    """All models by the names callers use."""

    def __init__(
        self,
        models: Mapping[str, ModelSettings],
        upstreams: Mapping[str, Upstream],
        settings: GatewaySettings,
    ) -> None:
        self._models: dict[str, Model] = {}
        self.unpriced: list[str] = []
        """Configured, but refused: no price is known."""
        for name, model in models.items():
            card = _card(name, model)
            if card is None:
                self.unpriced.append(name)
                continue
            self._models[name] = Model(
                name=name,
                upstream=upstreams[model.upstream],
                upstream_model=model.model or name,
                card=card,
                price_id=price_id(card),
                default_max_output_tokens=model.max_output_tokens or settings.default_max_output_tokens,
            )

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def find(self, name: str) -> Model:
        """The model of this name.

        Raises:
            ModelNotFound, ModelNotPriced
        """
        model = self._models.get(name)
        if model is None:
            shown = name[:100]
            raise ModelNotPriced(model=shown) if name in self.unpriced else ModelNotFound(model=shown)
        return model


def _card(name: str, model: ModelSettings) -> RateCard | None:
    if model.input_usd_per_mtok is None or model.output_usd_per_mtok is None:
        return published_card(name, model.model or name, model.provider, datetime.now(UTC))
    cached = model.cached_input_usd_per_mtok
    rates = Rates(
        input_usd_per_mtok=model.input_usd_per_mtok,
        cached_input_usd_per_mtok=model.input_usd_per_mtok if cached is None else cached,
        output_usd_per_mtok=model.output_usd_per_mtok,
    )
    return RateCard(model=name, source="waterfall.toml", rates=(rates,))
