"""The gateway's sections of waterfall.toml."""

import os
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from waterfall.errors import SettingsError
from waterfall.types import Frozen, Hash32, Price, Surface

_LONGEST_SECONDS = 86_400


class GatewaySettings(Frozen):
    """`[gateway]`: the HTTP server."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535, strict=True)
    """0 takes a free port."""
    admin_key_env: str = "WATERFALL_ADMIN_KEY"
    """Environment variable with the platform's first API key."""
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024, strict=True)
    default_max_output_tokens: int = Field(default=4096, ge=1, strict=True)
    """Output cap of a call that sets none."""
    max_projection_age_seconds: float = Field(default=60, gt=0, le=_LONGEST_SECONDS)
    """No call is authorised on a view of the chain older than this."""
    lease_seconds: float = Field(default=60, ge=1, le=_LONGEST_SECONDS)
    """With PostgreSQL: how long after a gateway has died the holds of its calls are kept. Calls that run renew them."""
    drain_seconds: float = Field(default=60, gt=0, le=_LONGEST_SECONDS)
    """How long a stop waits for running calls."""
    notice_seconds: float = Field(default=0, ge=0, le=_LONGEST_SECONDS)
    """How long at least a stop answers on with 503, so that load balancers see it."""


def _base_url(text: str) -> str:
    return _plain_url(text, "https://api.example.com/v1")


def _collector(text: str) -> str:
    return _plain_url(text, "http://127.0.0.1:4318")


def _plain_url(text: str, example: str) -> str:
    wrong = f"must be such as {example}, without credentials or query"
    try:
        url = urlsplit(text)
        port_is_one = url.port is None or url.port > 0
    except ValueError:
        raise ValueError(wrong) from None
    is_plain = url.username is None and not url.query and not url.fragment and text == "".join(text.split())
    if url.scheme not in {"http", "https"} or not url.hostname or not port_is_one or not is_plain:
        raise ValueError(wrong)
    return text


class MetricsSettings(Frozen):
    """`[metrics]`: a listener of their own for /metrics, /healthz and /readyz, which asks for no key."""

    host: str = "127.0.0.1"
    port: int | None = Field(default=None, ge=0, le=65535, strict=True)
    """0 takes a free port. Absent: a relayer without a gateway does that, and a gateway has no such listener."""


class TracingSettings(Frozen):
    """`[tracing]`: where traces of calls go."""

    otlp_endpoint: Annotated[str, AfterValidator(_collector)] | None = None
    """A collector that takes OTLP over HTTP, such as http://127.0.0.1:4318; absent: there are no traces."""


class UpstreamSettings(Frozen):
    """`[upstreams.NAME]`: a provider."""

    kind: Literal["openai", "anthropic"]
    """How it takes keys, and what it speaks where `surfaces` does not say it."""
    surfaces: tuple[Surface, ...] | None = Field(default=None, min_length=1)
    """Which it serves; absent: chat, responses and embeddings for openai, messages for anthropic."""
    base_url: Annotated[str, AfterValidator(_base_url)]
    """Up to and with /v1."""
    api_key_env: str | None = None
    """Environment variable with its key."""
    api_key_file: Path | None = None
    """A file with its key, in the place of `api_key_env`."""
    output_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The request field by which this upstream limits output."""
    max_choices: int = Field(default=128, ge=1, le=128, strict=True)
    """Most choices (`n`) of a call; 1 for servers such as llama.cpp's that report the usage of one choice only."""
    connect_seconds: float = Field(default=10, gt=0, le=_LONGEST_SECONDS)
    timeout_seconds: float = Field(default=600, gt=0, le=_LONGEST_SECONDS)
    """Longest silence before and within an answer."""
    max_call_seconds: float = Field(default=1200, gt=0, le=_LONGEST_SECONDS)
    """Longest call, from its request to its last byte. A policy counts as expired so long before it is."""

    @property
    def serves(self) -> tuple[Surface, ...]:
        """The surfaces that it has."""
        return self.surfaces or _SURFACES[self.kind]

    def api_key(self) -> str | None:
        """The upstream's key, from the environment or its file; None where it has none.

        Raises:
            SettingsError: the file cannot be read.
        """
        if self.api_key_file is None:
            return os.environ.get(self.api_key_env) if self.api_key_env else None
        try:
            return self.api_key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            what = error.strerror if isinstance(error, OSError) else "it is not text"
            raise SettingsError(reason=f"the key file {self.api_key_file} cannot be read: {what}") from None

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("has api_key_env and api_key_file: give one of them")
        return self


_SURFACES: dict[str, tuple[Surface, ...]] = {
    "openai": ("chat", "responses", "embeddings"),
    "anthropic": ("messages",),
}


def _price_text(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError('write the price in quotes, such as "0.15": a bare number would be rounded')  # noqa: TRY004
    return value


_PriceText = Annotated[Price, BeforeValidator(_price_text)]


class Prices(Frozen):
    """Prices in USD per million tokens, and of what is not tokens."""

    input_usd_per_mtok: _PriceText | None = None
    cached_input_usd_per_mtok: _PriceText | None = None
    """Absent: the input price."""
    cache_write_usd_per_mtok: _PriceText | None = None
    """Absent: the input price."""
    cache_write_1h_usd_per_mtok: _PriceText | None = None
    """Absent: the price of other cache writes."""
    image_usd_per_mtok: _PriceText | None = None
    """Absent: the input price."""
    output_usd_per_mtok: _PriceText | None = None
    usd_per_web_search: _PriceText | None = None

    @property
    def are_given(self) -> bool:
        """Whether there are any."""
        return self.input_usd_per_mtok is not None

    @model_validator(mode="after")
    def _are_whole(self) -> Self:
        if (self.input_usd_per_mtok is None) != (self.output_usd_per_mtok is None):
            raise ValueError("input_usd_per_mtok and output_usd_per_mtok belong together")
        for name in Prices.model_fields:
            if getattr(self, name) is not None and self.input_usd_per_mtok is None:
                raise ValueError(f"{name} needs input_usd_per_mtok")
        return self


class DatedPrices(Prices):
    """`[[models."NAME".later]]`: prices from a time on."""

    starts_at: datetime
    """With its offset from UTC."""

    @model_validator(mode="after")
    def _is_dated(self) -> Self:
        if self.starts_at.tzinfo is None:
            raise ValueError("starts_at needs an offset, such as 2027-01-01T00:00:00Z")
        if not self.are_given:
            raise ValueError("input_usd_per_mtok is missing")
        return self


class ModelSettings(Prices):
    """`[models."NAME"]`: a model that callers may use, by the name they use; with prices of its own, or published ones."""

    upstream: str
    model: str | None = None
    """The upstream's name for it; absent: the same."""
    provider: str | None = None
    """Whose published prices apply (an id of genai-prices); absent: found by the model's name."""
    max_output_tokens: int | None = Field(default=None, ge=1, strict=True)
    """Output cap of a call that sets none; absent: the gateway's."""
    context_tokens: int | None = Field(default=None, ge=1, strict=True)
    """The most input it reads, held for calls whose input is not all in the request; absent: as published."""
    image_tokens: int | None = Field(default=None, ge=1, strict=True)
    """The most tokens that one image comes to; absent: known for OpenAI's and Anthropic's, else images are refused."""
    later: tuple[DatedPrices, ...] = ()
    """Prices that take the place of these, each from its time on."""

    @model_validator(mode="after")
    def _follow_each_other(self) -> Self:
        times = [prices.starts_at.astimezone(UTC) for prices in self.later]
        if times != sorted(set(times)):
            raise ValueError("later must ascend by starts_at")
        return self

    def prices_at(self, now: datetime) -> Prices:
        """The prices of a moment."""
        begun = [prices for prices in self.later if prices.starts_at <= now]
        return begun[-1] if begun else self


def _percent(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError('write the percentage in quotes, such as "12.5"')  # noqa: TRY004
    return value


class Markup(Frozen):
    """What the platform adds to a model's price."""

    percent: Annotated[
        Decimal, BeforeValidator(_percent), Field(ge=-100, le=10_000, max_digits=9, decimal_places=4)
    ] = Decimal(0)
    """Of every price; negative: a discount."""
    usd_per_call: _PriceText = Decimal(0)
    """On top of every call."""
    least_usd_per_call: _PriceText = Decimal(0)
    """What a call costs that would cost less."""


class ModelTariff(Prices, Markup):
    """`[….models."NAME"]`: what a tariff takes for one model: prices in the place of the model's own, and a markup."""


class Tariff(Markup):
    """`[markup]` and `[plans.NAME]`: a markup on all models, and what differs for some."""

    models: dict[str, ModelTariff] = Field(default_factory=dict)

    def of(self, model: str) -> tuple[Prices | None, Markup]:
        """Prices that take the place of a model's own, and its markup."""
        its = self.models.get(model)
        return (None, self) if its is None else (its if its.are_given else None, its)


class AccountTariff(Frozen):
    """`[accounts."ID"]`: the tariff of one account."""

    plan: str | None = None
    """One of `[plans]`."""
    tariff: Tariff | None = None
    """Its own, in the place of a plan's."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.plan is None) == (self.tariff is None):
            raise ValueError("needs either a plan or a tariff")
        return self


class Tariffs(Frozen):
    """Whose tariff is which: the account's own, else its plan's, else the platform's."""

    platform: Tariff = Tariff()
    plans: dict[str, Tariff] = Field(default_factory=dict)
    accounts: dict[Hash32, AccountTariff] = Field(default_factory=dict)

    def of(self, account: str | None) -> tuple[str, Tariff]:
        """An account's tariff, and a name for it; None: anybody's."""
        its = None if account is None else self.accounts.get(account)
        if its is None:
            return "platform", self.platform
        if its.tariff is not None:
            return f"account {account}", its.tariff
        return f"plan {its.plan}", self.plans[its.plan or ""]
