"""Who is calling: an account by its own key, or the platform by an admin key for an account it names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from waterfall.errors import ApiKeyExpired, InvalidApiKey, InvalidRequest, NotPermitted, PermissionDenied
from waterfall.gateway.terms import attribution_of
from waterfall.ledger.journal import Caller, now_ms
from waterfall.ledger.keys import ApiKey, Keyring
from waterfall.types import Surface

_LONGEST_NAMED = 80
"""Of what a header names; longer than any id, so that what is cut off makes none."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a key that was shown may do."""

    key: ApiKey

    @property
    def is_admin(self) -> bool:
        """Whether this is the platform."""
        return self.key.account is None

    def require_admin(self) -> None:
        """Raises PermissionDenied for an account's key."""
        if not self.is_admin:
            raise PermissionDenied(reason="This needs the platform's key, not an account's.")

    def require_account(self, account: str) -> None:
        """Raises PermissionDenied for another account's key."""
        if self.key.account not in {None, account}:
            raise PermissionDenied(reason="This key belongs to another account.")


def authenticate(keys: Keyring, headers: Mapping[str, str]) -> Access:
    """Find the key that a request's headers show; their names are lower case.

    Raises:
        InvalidApiKey, ApiKeyExpired
    """
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        secret = headers.get("x-api-key", "")  # as Anthropic's clients send it
    key = keys.find(secret.strip())
    if key is None or key.revoked_at is not None:
        raise InvalidApiKey
    if key.expires_at is not None and key.expires_at <= now_ms():
        raise ApiKeyExpired(expired_at=datetime.fromtimestamp(key.expires_at / 1000, UTC).isoformat())
    return Access(key)


def payer(keys: Keyring, headers: Mapping[str, str]) -> Caller:
    """The account that pays for a call: the key's own, or the one a platform key names.

    Raises:
        InvalidApiKey, ApiKeyExpired, PermissionDenied, InvalidRequest
    """
    access = authenticate(keys, headers)
    named = headers.get("x-waterfall-account")
    if named is not None:
        named = named.lower()[:_LONGEST_NAMED]
        access.require_account(named)
    account = access.key.account or named
    if account is None:
        raise InvalidRequest(
            reason="A platform key needs the header X-Waterfall-Account: the account that pays."
        )
    return Caller(account, access.key.id, access.key.limits, access.key.budget, attribution_of(headers))


def permit(caller: Caller, surface: Surface, model: str) -> None:
    """Raises NotPermitted where the key that was shown is for other models or surfaces."""
    limits = caller.limits
    if limits is None:
        return
    if limits.surfaces is not None and surface not in limits.surfaces:
        raise NotPermitted(what=f"the surface {surface}", permitted=_listed(limits.surfaces))
    if limits.models is not None and model not in limits.models:
        raise NotPermitted(what=f"the model {model[:_LONGEST_NAMED]}", permitted=_listed(limits.models))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"
