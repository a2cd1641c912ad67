"""waterfall.toml: read once, checked, and passed down. Secrets are named here, never written here."""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from waterfall import signers
from waterfall.chain.deployment import DeploymentRecord
from waterfall.chain.vault import MAX_CHARGES
from waterfall.errors import SettingsError
from waterfall.gateway.config import GatewaySettings, ModelSettings, UpstreamSettings
from waterfall.signers import Signer
from waterfall.types import Address, Frozen

DEFAULT_FILE = Path("waterfall.toml")
_SQLITE = "sqlite:///"


def _finality(value: Any) -> Any:
    if value in ("latest", "safe", "finalized") or (type(value) is int and value >= 1):
        return value
    raise ValueError('must be "latest", "safe", "finalized", or a depth in blocks')


def _database(url: str) -> str:
    if not url.startswith(_SQLITE) or url.removeprefix(_SQLITE) in {"", ":memory:"}:
        raise ValueError(f"must be a file, such as {_SQLITE}.waterfall/waterfall.db")
    return url


class ChainSettings(Frozen):
    """`[chain]`: the chain, the vault and the platform. `waterfall dev` brings its own."""

    rpc_url: str
    deployment: Path | None = None
    """A record of `ape run deploy`, in the place of chain_id, vault and deployed_block."""
    chain_id: int = Field(ge=1, strict=True)
    vault: Address
    platform: int = Field(ge=1, lt=2**128, strict=True)
    deployed_block: int = Field(default=0, ge=0, strict=True)
    """Block of the vault's deployment: where indexing starts."""
    label_salt_env: str = "WATERFALL_LABEL_SALT"
    """Environment variable with the secret that keeps account labels unreadable on the chain. Never change it."""
    finality: Annotated[Literal["latest", "safe", "finalized"] | int, BeforeValidator(_finality)] = "safe"
    """From when on a deposit may be spent; a number is a depth in blocks."""
    final_depth: int = Field(default=64, ge=1, strict=True)
    """Depth at which a block is final where the chain has no `finalized` tag."""
    poll_seconds: float = Field(default=0.5, gt=0, le=60)
    max_charges_per_batch: int = Field(default=500, ge=1, le=MAX_CHARGES, strict=True)
    max_fee_gwei: int = Field(default=100, ge=1, strict=True)
    """The most a transaction may offer per gas."""

    @model_validator(mode="before")
    @classmethod
    def _as_deployed(cls, given: Any, info: ValidationInfo) -> Any:
        """Take from the record what it knows; a key that says otherwise is a mistake in one of the two."""
        if not isinstance(given, dict) or not isinstance(given.get("deployment"), str | Path):
            return given
        file = (info.context or {}).get("folder", Path()) / given["deployment"]
        try:
            record = DeploymentRecord.read(file)
        except SettingsError as error:
            raise ValueError(f"deployment: {error.message}") from None
        known = {"chain_id": record.chain_id, "vault": record.address, "deployed_block": record.block}
        for key, value in known.items():
            if key in given and str(given[key]).lower() != str(value):
                raise ValueError(
                    f"{key} = {given[key]!r}, but the record {given['deployment']} says {value}: "
                    f"leave {key} out, or correct one of the two"
                )
        return {**given, "deployment": file, **known}


class KeySettings(Frozen):
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


class Settings(Frozen):
    """The whole file."""

    database: Annotated[str, AfterValidator(_database)] = "sqlite:///.waterfall/waterfall.db"
    gateway: GatewaySettings = GatewaySettings()
    chain: ChainSettings | None = None
    keys: KeySettings = KeySettings()
    upstreams: dict[str, UpstreamSettings] = Field(default_factory=dict)
    models: dict[str, ModelSettings] = Field(default_factory=dict)

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
        return Settings.model_validate(tomllib.loads(path.read_text()), context={"folder": path.parent})
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
