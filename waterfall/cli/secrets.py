"""The secrets of a service: read once from where the settings say they are, and never shown."""

import os
from itertools import combinations
from typing import NoReturn

from waterfall.cli import logs
from waterfall.errors import SettingsError
from waterfall.settings import ChainSettings, Settings
from waterfall.signers import LocalSigner, Signer


class Secrets:
    """What a service needs and no file holds. Only addresses of it can be shown."""

    __slots__ = ("admin_key", "gas", "label_salt", "meter", "owner")

    def __init__(
        self,
        meter: Signer,
        gas: tuple[Signer, ...] = (),
        owner: Signer | None = None,
        label_salt: bytes = b"",
        admin_key: str = "",
    ) -> None:
        """Keys that are all different.

        Args:
            meter: signs receipts and batches.
            gas: pay for transactions, each in its own lane; a gateway without a relayer has none.
            owner: the platform owner's; sends policies.
            label_salt: keeps account labels unreadable on the chain; a relayer without a gateway has none.
            admin_key: the platform's first API key; likewise.

        Raises:
            SettingsError: two keys are one.
        """
        self.meter = meter
        self.gas = gas
        self.owner = owner
        self.label_salt = label_salt
        self.admin_key = admin_key
        self._check_that_all_differ()

    def _check_that_all_differ(self) -> None:
        named = [("meter", self.meter), *(("gas", signer) for signer in self.gas)]
        named += [] if self.owner is None else [("owner", self.owner)]
        for (one, first), (other, second) in combinations(named, 2):
            if first.address == second.address:
                which = "two of keys.gas" if one == other else f"keys.{one} and keys.{other}"
                reason = _WHY_DIFFERENT[one, other]
                raise SettingsError(reason=f"{which} are the same key, {first.address}: {reason}")

    def spellings(self) -> list[str]:
        """Every secret in here as a text could spell it: for a filter that keeps them out, and for nothing else."""
        held = [signer for signer in (self.meter, *self.gas, self.owner) if isinstance(signer, LocalSigner)]
        keys = [text for signer in held for text in signer.spellings()]
        return [text for text in (*keys, self.admin_key, self.label_salt.decode(errors="replace")) if text]

    def __repr__(self) -> str:
        owner = None if self.owner is None else self.owner.address
        gas = ", ".join(signer.address for signer in self.gas)
        return f"Secrets(meter={self.meter.address}, gas=({gas}), owner={owner})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("secrets are not copied or pickled")


_WHY_DIFFERENT = {
    (
        "meter",
        "gas",
    ): "a gas key is in use all day and must have no authority, and the meter's charges every account",
    (
        "meter",
        "owner",
    ): "the meter signs every call, where the platform's owner is needed rarely and can do everything",
    (
        "gas",
        "owner",
    ): "a gas key is in use all day and must have no authority, and the owner's can do everything",
    ("gas", "gas"): "each pays for a lane of its own, and two lanes on one key would fight over its nonces",
}


def secrets_of(
    settings: Settings, chain: ChainSettings, *, gateway: bool = True, relayer: bool = True
) -> Secrets:
    """The secrets that a settings file refers to. Read once, at the start: a new one needs a new start.

    Args:
        settings: the whole file.
        chain: its chain.
        gateway: whether a gateway will run, which needs the admin key and the label salt.
        relayer: whether a relayer will run, which needs the keys that send transactions.

    Raises:
        SettingsError: one is missing, or two keys are one; they are named.
    """
    keys = settings.keys
    senders = (*keys.gas, *([keys.owner] if keys.owner else [])) if relayer else ()
    if any(reference.startswith("keystore:") for reference in (keys.meter, *senders)):
        logs.conceal(keys.password())
    return Secrets(
        meter=keys.signer(keys.meter),
        gas=tuple(keys.signer(reference) for reference in keys.gas) if relayer else (),
        owner=keys.signer(keys.owner) if keys.owner and relayer else None,
        label_salt=_environment(chain.label_salt_env, "chain.label_salt_env").encode() if gateway else b"",
        admin_key=_environment(settings.gateway.admin_key_env, "gateway.admin_key_env") if gateway else "",
    )


def _environment(variable: str, key: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise SettingsError(reason=f"{key}: the environment variable {variable} is not set")
    return value
