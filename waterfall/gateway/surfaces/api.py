"""What a surface has to know, and what is read of a request, whatever the surface."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import orjson

from waterfall.errors import WaterfallError
from waterfall.gateway.models import Model
from waterfall.gateway.render import error_body
from waterfall.gateway.surfaces.bodies import invalid
from waterfall.gateway.surfaces.streams import StreamMeter
from waterfall.metering import prices
from waterfall.metering.prices import Bound, Most
from waterfall.types import Surface

LEAST_OUTPUT_TOKENS = 16
"""A call without a limit of its own is not cut below this for a wallet that affords less."""
OURS = frozenset({"models"})
"""Fields of a request that are for the gateway alone."""


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A request that can be bounded."""

    body: bytes
    fields: dict[str, Any]
    models: tuple[str, ...]
    """The models that may serve it, in the order in which they are tried."""
    text_tokens: int
    """Tokens of its input at most, but for images and what is not in the request."""
    stream: bool = False
    shows_usage: bool = True
    """Whether the caller asked to see the usage at the end of a stream."""
    has_output: bool = True
    choices: int = 1
    max_tokens: int | None = None
    """Output of each choice; None: the caller set no limit."""
    images: int = 0
    first_image: str | None = None
    """Where the first one is."""
    reads_elsewhere: str | None = None
    """The field that has the model read what is not in the request."""
    web_searches: int = 0
    """Searches that the provider may make; it reads what they find."""
    cache_writes: bool = True
    """Whether the provider may bill what it writes to a cache."""

    def bound(self, model: Model) -> Bound:
        """What the call may cost at most.

        Raises:
            InvalidRequest: it cannot be said.
        """
        most = model.upstream.settings.max_choices
        if self.choices > most:
            raise invalid("n", f"must be at most {most} for this model")
        rounds = 1 + self.web_searches
        per_choice = 0
        if self.has_output:
            per_choice = self.max_tokens or model.default_max_output_tokens
        least = per_choice if self.max_tokens else min(LEAST_OUTPUT_TOKENS, per_choice)
        times = self.choices * rounds
        return prices.bound(
            model.card,
            Most(
                input_tokens=self._input_tokens(model) * rounds,
                cache_writes=self.cache_writes,
                images=self.images > 0 or self.reads_elsewhere is not None,
                web_searches=self.web_searches,
            ),
            per_choice * times,
            least * times,
        )

    def _input_tokens(self, model: Model) -> int:
        if self.web_searches and not model.card.usd_per_web_search:
            raise invalid("tools", f"may have no web search: it is not priced for {model.name}")
        if self.reads_elsewhere is not None or self.web_searches:
            if model.context_tokens is None:
                raise invalid(
                    self.reads_elsewhere or "tools",
                    f"is not supported for {model.name}: its input is not in the request, and the model has no "
                    "context_tokens in waterfall.toml to hold for it",
                )
            return model.context_tokens
        if not self.images:
            return self.text_tokens
        if model.image_tokens is None:
            raise invalid(
                self.first_image,
                f"has an image: how many tokens it may come to is not known for {model.name}, which has no "
                "image_tokens in waterfall.toml",
            )
        return self.text_tokens + self.images * model.image_tokens

    def limit_of_a_choice(self, output_tokens: int) -> int:
        """What each choice may put out, of what the hold pays for."""
        return output_tokens // (self.choices * (1 + self.web_searches))


class Api(ABC):
    """One surface."""

    surface: ClassVar[Surface]
    route: ClassVar[str]
    """Where callers find it."""
    upstream_path: ClassVar[str]
    """Where it is below an upstream's base URL."""
    passed_on: ClassVar[tuple[str, ...]] = ()
    """Headers of the caller that are for the upstream."""
    request_schema: ClassVar[dict[str, Any]]
    """What OpenAPI says of its body."""

    @abstractmethod
    def read(self, body: bytes) -> ModelCall:
        """Check a request as far as its cost depends on it. What it does not know passes on untouched.

        Raises:
            InvalidRequest: what is wrong with which field.
        """

    @abstractmethod
    def upstream_fields(self, call: ModelCall, model: Model, output_tokens: int) -> dict[str, Any]:
        """What is changed of a request for the upstream, beside the model's name; None leaves a field out."""

    def upstream_body(self, call: ModelCall, model: Model, output_tokens: int) -> bytes:
        """The request as the upstream gets it: untouched but for the model's name, the limit and the usage."""
        changed = {"model": model.upstream_model, **self.upstream_fields(call, model, output_tokens)}
        kept = {
            name: value for name, value in call.fields.items() if name not in changed and name not in OURS
        }
        return orjson.dumps(kept | {name: value for name, value in changed.items() if value is not None})

    def usage_in(self, answer: Mapping[str, Any]) -> Any:
        """The usage object of a whole answer; None where it has none."""
        return answer.get("usage")

    @abstractmethod
    def stream_meter(self, call: ModelCall) -> StreamMeter:
        """Reads one stream."""

    def error_body(self, error: WaterfallError, *, to_platform: bool = False) -> dict[str, Any]:
        """An error as this surface's clients read it."""
        return error_body(error, to_platform=to_platform)

    def error_event(self, error: WaterfallError) -> bytes:
        """An error in the middle of a stream. The blank line before it ends what the upstream may have left unfinished."""
        return b"\n\ndata: " + orjson.dumps(self.error_body(error)) + b"\n\n"
