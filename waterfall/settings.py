"""waterfall.toml: read once, checked, and passed down. Secrets are named here, never written here."""

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from waterfall import signers
from waterfall.chain.deployment import DeploymentRecord
from waterfall.chain.jsonrpc import name_of
from waterfall.chain.vault import MOST_CHARGES
from waterfall.errors import SettingsError
from waterfall.gateway.config import (
    AccountTariff,
    GatewaySettings,
    MetricsSettings,
    ModelSettings,
    Tariff,
    Tariffs,
    TracingSettings,
    UpstreamSettings,
)
from waterfall.ledger.retention import RetentionSettings
from waterfall.signers import Signer
from waterfall.types import Address, Frozen, Hash32

DEFAULT_FILE = Path("waterfall.toml")
_SQLITE, _POSTGRES = "sqlite:///", "postgresql://"
_ENV = "env:"
_BLOCK_GAP_SECONDS = 120
_STEADY_CHAINS = {
    1: "Ethereum",
    10: "OP Mainnet",
    137: "Polygon",
    8453: "Base",
    42161: "Arbitrum One",
    84532: "Base Sepolia",
    11155111: "Sepolia",
    11155420: "OP Sepolia",
}


def _finality(value: Any) -> Any:
    if value in ("latest", "safe", "finalized") or (type(value) is int and value >= 1):
        return value
    raise ValueError('must be "latest", "safe", "finalized", or a depth in blocks')


def _database(url: str) -> str:
    is_file = url.startswith(_SQLITE) and url.removeprefix(_SQLITE) not in {"", ":memory:"}
    if not (is_file or url.startswith((_POSTGRES, _ENV))):
        raise ValueError(
            f"must be a file, such as {_SQLITE}.waterfall/waterfall.db, or a server, such as {_POSTGRES}user@host/name, "
            f"or {_ENV}VARIABLE"
        )
    return url


def _rpc_url(given: Any) -> Any:
    """One or several URLs or references to them, unread. No message shows a URL: it may hold a key."""
    urls = [given] if isinstance(given, str) else given
    if not isinstance(urls, list | tuple) or not urls or not all(isinstance(url, str) for url in urls):
        raise ValueError("must be a URL, or a list of URLs")
    for number, url in enumerate(urls, 1):
        variable = url.removeprefix(_ENV)
        if variable == url:
            try:
                name_of(url)
            except ValueError as error:
                raise ValueError(
                    str(error) if isinstance(given, str) else f"number {number} {error}"
                ) from None
        elif not variable.isidentifier():
            raise ValueError("env: must be followed by the name of an environment variable")
    if len(set(urls)) != len(urls):
        raise ValueError("names a node twice")
    return given


class ChainSettings(Frozen):
    """`[chain]`: the chain, the vault and the platform. `waterfall dev` brings its own."""

    rpc_url: Annotated[str | tuple[str, ...], BeforeValidator(_rpc_url)] = Field(repr=False)
    """The chain's node or nodes, preferred ones first: URLs, or `env:VARIABLE` for one that holds a key."""
    rpc_timeout_seconds: float = Field(default=10, gt=0, le=600)
    """How long a node may take to answer once."""
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
    max_block_gap_seconds: float | None = Field(default=None, gt=0)
    """How long the chain may have no new block before no call is authorised, as its nodes may be cut off; absent: two
    minutes on chains that are known to have one every few seconds, else for ever."""
    max_charges_per_batch: int = Field(default=500, ge=1, le=MOST_CHARGES, strict=True)
    max_fee_gwei: int = Field(default=100, ge=1, strict=True)
    """The most a transaction may offer per gas."""
    gas_batches: int = Field(default=3, ge=1, strict=True)
    """How many of the dearest transactions a gas key must be able to pay for; with less it sends nothing."""
    max_unsettled: int = Field(default=100_000, ge=1, strict=True)
    """How many charges may wait for settlement before new calls are refused."""
    gather_seconds: float | None = Field(default=None, ge=0, le=60)
    """How long a lane gathers charges while another has a batch on its way; absent: half a block."""

    @property
    def max_block_gap(self) -> float:
        """The same in seconds, whatever is configured."""
        if self.max_block_gap_seconds is not None:
            return self.max_block_gap_seconds
        return _BLOCK_GAP_SECONDS if self.chain_id in _STEADY_CHAINS else float("inf")

    def rpc_urls(self) -> tuple[str, ...]:
        """The nodes' URLs, those in environment variables too: secrets, never to be shown.

        Raises:
            SettingsError: a variable is not set, or holds no URL.
        """
        given = (self.rpc_url,) if isinstance(self.rpc_url, str) else self.rpc_url
        return tuple(
            _from_environment(url.removeprefix(_ENV)) if url.startswith(_ENV) else url for url in given
        )

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


def _from_environment(variable: str) -> str:
    url = os.environ.get(variable, "").strip()
    if not url:
        raise SettingsError(reason=f"chain.rpc_url: the environment variable {variable} is not set")
    try:
        name_of(url)
    except ValueError as error:
        raise SettingsError(reason=f"chain.rpc_url: {variable} {error}") from None
    return url


_SCHEMES = {"env", "keystore", "kms"}
_VARIABLE = re.compile(r"(?!(0x)?[0-9a-fA-F]{64}$)[A-Za-z_][A-Za-z0-9_]*")


def _reference(text: str) -> str:
    """A reference to a key. One that is wrong is not shown: it may be the key itself."""
    scheme, _, rest = text.partition(":")
    if scheme not in _SCHEMES or not rest or (scheme == "env" and not _VARIABLE.fullmatch(rest)):
        raise ValueError("must be env:VARIABLE, keystore:FILE or kms:KEY; a key itself is never written here")
    return text


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


KeyReference = Annotated[str, AfterValidator(_reference)]


class KeySettings(Frozen):
    """`[keys]`: where the keys are; no two of them may be the same.

    `env:VARIABLE`, `keystore:FILE` with its password in `password_file` or `password_env`, or `kms:KEY`: id, ARN or
    alias of a key in AWS KMS.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    meter: KeyReference = "env:WATERFALL_METER_KEY"
    """Signs receipts and batches."""
    gas: Annotated[tuple[KeyReference, ...], BeforeValidator(_one_or_more), Field(min_length=1)] = (
        "env:WATERFALL_GAS_KEY",
    )
    """Pay for transactions, each in a lane of its own; have no other power. One, or a list."""
    owner: KeyReference | None = None
    """The platform owner's: sends spend policies. Absent: policies bind in the gateway only."""
    password_env: str = "WATERFALL_KEYSTORE_PASSWORD"  # noqa: S105 - the name of a variable
    password_file: Path | None = None
    """A file with the keystores' password, in the place of `password_env`; a line's end after it does not count."""

    def signer(self, reference: str) -> Signer:
        """The key behind a reference.

        Raises:
            SettingsError
        """
        scheme, _, rest = reference.partition(":")
        match scheme:
            case "env":
                return signers.from_environment(rest)
            case "keystore":
                return signers.from_keystore(Path(rest), self.password())
            case _:
                return signers.from_kms(rest)

    def password(self) -> str:
        """The keystores' password.

        Raises:
            SettingsError: there is none.
        """
        if self.password_file is not None:
            return read_password(self.password_file)
        password = os.environ.get(self.password_env)
        if password is None:
            raise SettingsError(
                reason=f"keys.password_env: the environment variable {self.password_env}, which should hold the "
                "keystores' password, is not set"
            )
        return password


def read_password(file: Path) -> str:
    """The password in a file; a line's end after it does not count.

    Raises:
        SettingsError: the file cannot be read.
    """
    try:
        return file.read_text().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise SettingsError(reason=f"the password file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(reason=f"the password file {file} is not text") from None


class Settings(Frozen):
    """The whole file."""

    model_config = ConfigDict(hide_input_in_errors=True)  # it may be a secret, where only its place belongs

    database: Annotated[str, AfterValidator(_database)] = Field(
        default="sqlite:///.waterfall/waterfall.db", repr=False
    )
    """A SQLite file, for one process; or PostgreSQL, for many. `env:VARIABLE` for a URL with a password in it."""
    gateway: GatewaySettings = GatewaySettings()
    chain: ChainSettings | None = None
    keys: KeySettings = KeySettings()
    retention: RetentionSettings = RetentionSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    upstreams: dict[str, UpstreamSettings] = Field(default_factory=dict)
    models: dict[str, ModelSettings] = Field(default_factory=dict)
    markup: Tariff = Tariff()
    """What the platform adds to prices."""
    plans: dict[str, Tariff] = Field(default_factory=dict)
    """The same for the accounts that are given a plan."""
    accounts: dict[Hash32, AccountTariff] = Field(default_factory=dict)
    """The same for single accounts."""

    @property
    def tariffs(self) -> Tariffs:
        """All of them."""
        return Tariffs(platform=self.markup, plans=self.plans, accounts=self.accounts)

    def database_url(self) -> str:
        """The database's URL, also where a variable of the environment has it.

        Raises:
            SettingsError: that is not set, or holds no such URL.
        """
        scheme, _, variable = self.database.partition(":")
        if scheme != "env":
            return self.database
        url = os.environ.get(variable, "")
        if not url.startswith((_SQLITE, _POSTGRES)):
            raise SettingsError(reason=f"database: the environment variable {variable} holds no database URL")
        return url

    @model_validator(mode="after")
    def _upstreams_exist(self) -> Self:
        for name, model in self.models.items():
            if model.upstream not in self.upstreams:
                raise ValueError(f'models."{name}".upstream: there is no [upstreams.{model.upstream}]')
        return self

    @model_validator(mode="after")
    def _tariffs_fit(self) -> Self:
        own = {f'accounts."{id_}".tariff': its.tariff for id_, its in self.accounts.items() if its.tariff}
        plans = {f"plans.{name}": plan for name, plan in self.plans.items()}
        for where, tariff in {"markup": self.markup, **plans, **own}.items():
            for name in tariff.models.keys() - self.models.keys():
                raise ValueError(f'{where}.models."{name}": there is no [models."{name}"]')
        for id_, account in self.accounts.items():
            if account.plan is not None and account.plan not in self.plans:
                raise ValueError(f'accounts."{id_}".plan: there is no [plans.{account.plan}]')
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
