"""The vocabulary as frozen models: what rooms hand to each other, and what JSON shows.

Hex strings are lower case with 0x. Ids beyond 2**53 are decimal strings in JSON, as JavaScript would round them.
"""

import re
from decimal import Decimal
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from waterfall.money import MAX_UNITS, Usd, between

Hash32 = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{64}$")]
"""32 bytes: account ids, digests, hashes of transactions and blocks."""

Address = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-fA-F]{40}$", to_lower=True)]
"""20 bytes; any case is taken, lower case is kept."""

ZERO_ADDRESS: Address = "0x" + "00" * 20


def _int_from_text(value: Any) -> Any:
    if isinstance(value, str):
        if not (value.isascii() and value.isdecimal()):
            raise ValueError("write the integer as decimal digits")
        return int(value)
    return value


BigInt = Annotated[
    int,
    BeforeValidator(_int_from_text),
    PlainSerializer(str, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": r"^\d+$"}),
]
"""An integer that JSON carries as a decimal string."""

PlatformId = Annotated[BigInt, Field(ge=0, lt=2**128)]
ChargeId = Annotated[BigInt, Field(ge=0, lt=2**64)]
Credit = Annotated[Usd, Field(ge=0, le=MAX_UNITS)]
"""An amount as the vault stores it."""


_PLAIN_DECIMAL = re.compile(r"[0-9]+(\.[0-9]+)?")


def _decimal_from_text(value: Any) -> Any:
    if isinstance(value, Decimal):
        return value
    if isinstance(value, str) and _PLAIN_DECIMAL.fullmatch(value):
        return Decimal(value)
    raise ValueError('write a price as a decimal string such as "0.15"')


Price = Annotated[
    Decimal,
    BeforeValidator(_decimal_from_text),
    Field(ge=0, max_digits=24, decimal_places=12),
    PlainSerializer(lambda price: format(price.normalize(), "f"), return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^\d+(\.\d+)?$", "title": "USD"}),
]
"""USD, for a million tokens or for one of something else, exact to twelve decimals."""


class Frozen(BaseModel):
    """An immutable value."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# ── Metering ─────────────────────────────────────────────────────────────────────────────────────────

Surface = Literal["chat", "responses", "messages", "embeddings"]
"""In whose words a model is called: OpenAI's chat completions, responses and embeddings, Anthropic's messages."""

TokenCount = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class Usage(Frozen):
    """What one call used, as the provider reported it; in tokens where it says nothing else."""

    input_tokens: TokenCount
    """All input: cached, written to a cache and images included."""
    cached_input_tokens: TokenCount = 0
    """Read from a cache."""
    cache_write_tokens: TokenCount = 0
    """Written to a cache that keeps them for minutes."""
    cache_write_1h_tokens: TokenCount = 0
    """Written to a cache that keeps them for an hour."""
    image_tokens: TokenCount = 0
    """Input that is images and neither read from a cache nor written to one; 0 where the provider does not tell them apart."""
    output_tokens: TokenCount
    """All output, reasoning included."""
    reasoning_tokens: TokenCount = 0
    web_searches: TokenCount = 0
    """Searches that the provider made and bills by their number."""

    @property
    def plain_input_tokens(self) -> int:
        """Input with no price of its own."""
        return (
            self.input_tokens
            - self.cached_input_tokens
            - self.cache_write_tokens
            - self.cache_write_1h_tokens
            - self.image_tokens
        )

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.cached_input_tokens > self.input_tokens:
            raise ValueError("more cached than input tokens")
        if self.plain_input_tokens < 0:
            raise ValueError("more cached, written and image tokens than input tokens")
        if self.reasoning_tokens > self.output_tokens:
            raise ValueError("more reasoning than output tokens")
        return self


class Rates(Frozen):
    """Prices that apply to a whole call once its input is longer than `above_input_tokens`."""

    above_input_tokens: TokenCount = 0
    input_usd_per_mtok: Price
    cached_input_usd_per_mtok: Price
    cache_write_usd_per_mtok: Price
    cache_write_1h_usd_per_mtok: Price
    image_usd_per_mtok: Price
    output_usd_per_mtok: Price


class RateCard(Frozen):
    """What one model costs. Its hash is the receipt's `priceId`, so that anyone can recompute."""

    model: str
    """The name callers use."""
    source: str
    """Where the prices come from, for people."""
    rates: tuple[Rates, ...] = Field(min_length=1)
    """Ascending by `above_input_tokens`, from 0."""
    usd_per_web_search: Price = Decimal(0)
    usd_per_call: Price = Decimal(0)
    """On top of what was used."""
    least_usd_per_call: Price = Decimal(0)
    """What a call costs that would cost less."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        steps = [rates.above_input_tokens for rates in self.rates]
        if steps[0] != 0 or any(a >= b for a, b in pairwise(steps)):
            raise ValueError("rates must ascend from above_input_tokens = 0")
        return self


# ── Attribution ──────────────────────────────────────────────────────────────────────────────────────

Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[ -~]+$")]
"""Printable ASCII, as a header carries it."""
Tag = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[!-+\--~]+$")]
"""The same without blanks and commas."""


class Attribution(Frozen):
    """Whom and what a call was for, in the platform's own words: kept beside the call, never on the chain."""

    user: Name | None = None
    agent: Name | None = None
    team: Name | None = None
    session: Name | None = None
    tags: tuple[Tag, ...] = Field(default=(), max_length=20)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All of it by name; each tag under `tag`, once."""
        names = ("user", "agent", "team", "session")
        found = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        return found + [("tag", tag) for tag in dict.fromkeys(self.tags)]


# ── Receipts and charges ─────────────────────────────────────────────────────────────────────────────


class UsageReceipt(Frozen):
    """What the meter says of one call: the EIP-712 struct of the vault's interface, field by field."""

    platform: PlatformId
    account: Hash32
    charge_id: ChargeId
    request_hash: Hash32
    """keccak256 of the request body as the gateway received it."""
    response_hash: Hash32
    """keccak256 of the answer as the upstream sent it."""
    model: str
    input_tokens: TokenCount
    cached_input_tokens: TokenCount
    output_tokens: TokenCount
    reasoning_tokens: TokenCount
    usage_hash: Hash32
    """keccak256 of the provider's usage object as RFC 8785 JSON."""
    price_id: Hash32
    """keccak256 of the rate card as RFC 8785 JSON."""
    amount: Credit
    issued_at: int = Field(ge=0, lt=2**40)
    """Unix seconds."""
    complete: bool
    """False when the answer was cut, so that the usage is not the provider's last word."""


class SignedReceipt(Frozen):
    """A receipt with everything needed to check it: domain, signature, provider's usage and rate card."""

    id: str
    """Random, 128 bits, hex: the name under which the gateway serves it."""
    chain_id: int
    vault: Address
    receipt: UsageReceipt
    digest: Hash32
    """EIP-712 digest: the `receiptHash` of the charge."""
    meter: Address
    signature: Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{130}$")]
    surface: Surface | None
    """In whose words `usage` is; null where there was no call of a model, but an amount."""
    metered: Usage
    """What was used, as it was priced: the receipt's own counts and those that it has no field for."""
    usage: dict[str, Any] | None
    """The provider's usage object; null when the answer was cut before it, or `usage_removed`."""
    usage_removed: bool = False
    """Whether there was one and the platform keeps it no more: `usage_hash` still proves it to whoever does."""
    rate_card: RateCard | None
    """Null for charges whose amount the platform gave."""


class Charge(Frozen):
    """One debit of one account, as the vault settles it."""

    account: Hash32
    id: ChargeId
    amount: Credit
    receipt_hash: Hash32


LIMITS = between(0, 2**80 - 1)
"""What a policy's limit can be."""


class Allowance(Frozen):
    """Limit the account's owner puts on all its charges, whatever the policy."""

    cap: Annotated[Usd, between(0, 2**96 - 1)]
    """The most that may be spent in all since the account's first allowance; not what is left."""
    expires_at: int = Field(ge=0, lt=2**40)
    """Unix second from which nothing may be charged."""


class KeyLimits(Frozen):
    """Limits the platform puts on one API key, within its account's. An absent limit does not exist; one of 0 refuses."""

    models: tuple[Annotated[str, StringConstraints(min_length=1, max_length=200)], ...] | None = Field(
        default=None, max_length=100
    )
    """The models it may call, by the names callers use."""
    surfaces: tuple[Surface, ...] | None = None
    """Where it may call them."""
    max_per_call: Annotated[Usd, LIMITS] | None = None
    """What one call may cost at most, inclusive."""
    budget: Annotated[Usd, LIMITS] | None = None
    """What its calls may cost in each of its windows, or for ever, inclusive."""
    budget_seconds: int | None = Field(default=None, ge=60, lt=2**32)
    """Length of the fixed windows of the host's clock that `budget` counts in; absent: it is for ever."""
    calls_per_minute: int | None = Field(default=None, ge=1, le=60_000)
    """So many at once, then evenly."""

    @model_validator(mode="after")
    def _window_has_a_budget(self) -> Self:
        if self.budget_seconds is not None and self.budget is None:
            raise ValueError("budget_seconds needs a budget")
        return self

    @property
    def are_counted(self) -> bool:
        """Whether calls have to be counted for them."""
        return self.budget is not None or self.calls_per_minute is not None


class Policy(Frozen):
    """Limits the platform puts on an account. An absent limit does not exist; a limit of 0 refuses."""

    max_per_charge: Annotated[Usd, LIMITS] | None = None
    max_per_window: Annotated[Usd, LIMITS] | None = None
    window_seconds: int | None = Field(default=None, ge=60, lt=2**32)
    """Length of the fixed windows of block time that `max_per_window` counts in."""
    expires_at: int | None = Field(default=None, ge=0, lt=2**40)
    """Unix second from which nothing may be charged."""

    @model_validator(mode="after")
    def _window_is_whole(self) -> Self:
        if (self.max_per_window is None) != (self.window_seconds is None):
            raise ValueError("max_per_window and window_seconds belong together")
        return self
