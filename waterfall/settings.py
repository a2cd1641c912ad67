"""waterfall.toml: read once, checked, and passed down. Secrets are named here, never written here."""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from waterfall import signers
from waterfall.errors import SettingsError
from waterfall.signers import Signer
from waterfall.types import Address, Price

DEFAULT_FILE = Path("waterfall.toml")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GatewaySettings(_Section):
    """`[gateway]`: the HTTP server."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free port."""
    admin_key_env: str = "WATERFALL_ADMIN_KEY"
    """Environment variable with the platform's first API key."""
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024)
    default_max_output_tokens: int = Field(default=4096, ge=1)
    """Output cap of a call that sets none."""
    max_projection_age_seconds: float = Field(default=60, gt=0)
    """No call is authorised on a view of the chain older than this."""
    drain_seconds: float = Field(default=60, gt=0)
    """How long the rest of a stream is read, for its usage, after its client has gone."""


class ChainSettings(_Section):
    """`[chain]`: the chain, the vault and the platform. `waterfall dev` brings its own."""

    rpc_url: str
    chain_id: int = Field(ge=1)
    vault: Address
    platform: int = Field(ge=1, lt=2**128)
    deployed_block: int = Field(default=0, ge=0)
    """Block of the vault's deployment: where indexing starts."""
    label_salt_env: str = "WATERFALL_LABEL_SALT"
    """Environment variable with the secret that keeps account labels unreadable on the chain. Never change it."""
    finality: Literal["latest", "safe", "finalized"] | Annotated[int, Field(ge=1)] = "safe"
    """From when on a deposit may be spent; a number is a depth in blocks."""
    final_depth: int = Field(default=64, ge=1)
    """Depth at which a block is final where the chain has no `finalized` tag."""
    poll_seconds: float = Field(default=0.5, gt=0)
    max_charges_per_batch: int = Field(default=500, ge=1, le=1000)
    max_fee_gwei: int = Field(default=100, ge=1)
    """The most a transaction may offer per gas."""


class KeySettings(_Section):
    """`[keys]`: where the keys are: `env:VARIABLE`, or `keystore:FILE` with its password in `password_env`."""

    meter: str = "env:WATERFALL_METER_KEY"
    """Signs receipts and batches."""
    gas: str = "env:WATERFALL_GAS_KEY"
    """Pays for transactions; has no other power."""
    owner: str | None = None
    """The platform owner's: sends spend policies. Absent: policies bind in the gateway only."""
    password_env: str = "WATERFALL_KEYSTORE_PASSWORD"  # noqa: S105 - the name of a variable

    def signer(self, reference: str) -> Signer:
        """The key behind a reference.

        Raises:
            SettingsError
        """
        scheme, _, rest = reference.partition(":")
        if scheme == "env" and rest:
            return signers.from_environment(rest)
        if scheme == "keystore" and rest:
            return signers.from_keystore(Path(rest), os.environ.get(self.password_env, ""))
        raise SettingsError(reason=f"keys: {reference!r} is neither env:VARIABLE nor keystore:FILE")


class UpstreamSettings(_Section):
    """`[upstreams.NAME]`: a provider."""

    kind: Literal["openai"]
    """What it speaks."""
    base_url: str = Field(pattern=r"^https?://[^\s/]+")
    """Up to and with /v1."""
    api_key_env: str | None = None
    output_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The request field by which this upstream limits output."""
    connect_seconds: float = Field(default=10, gt=0)
    timeout_seconds: float = Field(default=600, gt=0)
    """Longest silence before and within an answer."""

    @property
    def api_key(self) -> str | None:
        """The upstream's key, from the environment."""
        return os.environ.get(self.api_key_env) if self.api_key_env else None


def _price_text(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError('write the price in quotes, such as "0.15": a bare number would be rounded')  # noqa: TRY004
    return value


_PriceText = Annotated[Price, BeforeValidator(_price_text)]


class ModelSettings(_Section):
    """`[models."NAME"]`: a model that callers may use, by the name they use."""

    upstream: str
    model: str | None = None
    """The upstream's name for it; absent: the same."""
    provider: str | None = None
    """Whose published prices apply (an id of genai-prices); absent: found by the model's name."""
    max_output_tokens: int | None = Field(default=None, ge=1)
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


class Settings(_Section):
    """The whole file."""

    database: str = "sqlite:///.waterfall/waterfall.db"
    gateway: GatewaySettings = GatewaySettings()
    chain: ChainSettings | None = None
    keys: KeySettings = KeySettings()
    upstreams: dict[str, UpstreamSettings] = {}
    models: dict[str, ModelSettings] = {}

    @model_validator(mode="after")
    def _upstreams_exist(self) -> Self:
        for name, model in self.models.items():
            if model.upstream not in self.upstreams:
                raise ValueError(f'models."{name}".upstream: there is no [upstreams.{model.upstream}]')
        return self


def load(path: Path) -> Settings:
    """Read and check a settings file.

    Raises:
        SettingsError: names the file and the key.
    """
    try:
        return Settings.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise SettingsError(reason=f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(reason=f"{path}: {error}") from None
    except ValidationError as error:
        raise SettingsError(reason="; ".join(_problem(path, problem) for problem in error.errors())) from None


def _problem(path: Path, problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{path}: {key}: {message}" if key else f"{path}: {message}"
