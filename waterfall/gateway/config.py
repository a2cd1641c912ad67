"""The gateway's sections of waterfall.toml."""

import os
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from waterfall.types import Frozen, Price

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

    kind: Literal["openai"]
    """What it speaks."""
    base_url: Annotated[str, AfterValidator(_base_url)]
    """Up to and with /v1."""
    api_key_env: str | None = None
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
    def api_key(self) -> str | None:
        """The upstream's key, from the environment."""
        return os.environ.get(self.api_key_env) if self.api_key_env else None


def _price_text(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError('write the price in quotes, such as "0.15": a bare number would be rounded')  # noqa: TRY004
    return value


_PriceText = Annotated[Price, BeforeValidator(_price_text)]


class ModelSettings(Frozen):
    """`[models."NAME"]`: a model that callers may use, by the name they use."""

    upstream: str
    model: str | None = None
    """The upstream's name for it; absent: the same."""
    provider: str | None = None
    """Whose published prices apply (an id of genai-prices); absent: found by the model's name."""
    max_output_tokens: int | None = Field(default=None, ge=1, strict=True)
    """Output cap of a call that sets none; absent: the gateway's."""
    input_usd_per_mtok: _PriceText | None = None
    cached_input_usd_per_mtok: _PriceText | None = None
    """Absent: the input price."""
    output_usd_per_mtok: _PriceText | None = None

    @model_validator(mode="after")
    def _price_is_whole(self) -> Self:
        if (self.input_usd_per_mtok is None) != (self.output_usd_per_mtok is None):
            raise ValueError("input_usd_per_mtok and output_usd_per_mtok belong together")
        if self.cached_input_usd_per_mtok is not None and self.input_usd_per_mtok is None:
            raise ValueError("cached_input_usd_per_mtok needs input_usd_per_mtok")
        return self
