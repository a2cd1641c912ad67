"""Which keys a service may start with, and that nothing shows them."""

import copy
import dataclasses
import io
import json
import pickle
import re
import traceback

import pytest
import structlog
from making import CHAIN_ID, GAS, METER, OWNER, PLATFORM, VAULT
from pydantic import BaseModel

from waterfall.chain.vault import Meter, PlatformView
from waterfall.cli import logs
from waterfall.cli.secrets import Secrets, secrets_of
from waterfall.cli.service import _check, _conceal
from waterfall.errors import SettingsError
from waterfall.settings import ChainSettings, Settings
from waterfall.signers import LocalSigner
from waterfall.types import ZERO_ADDRESS

SECOND_GAS = LocalSigner(b"\xd4" * 32)
ADMIN_KEY, SALT, UPSTREAM_KEY, PASSWORD = (
    "wf_admin-key-of-it",
    "salt-of-labels",
    'sk-up/stream"key',
    "pass\\wörd-1",
)
CHAIN = ChainSettings(rpc_url="http://node", chain_id=CHAIN_ID, vault=VAULT, platform=PLATFORM)


def secrets(meter=METER, gas=(GAS,), owner=OWNER):
    return Secrets(meter, gas, owner, SALT.encode(), ADMIN_KEY)


# ── Different keys ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("gas", [(GAS,), (GAS, SECOND_GAS)])
@pytest.mark.parametrize("owner", [OWNER, None])
def test_secrets__all_different__are_taken(gas, owner):
    assert secrets(gas=gas, owner=owner).gas == gas


@pytest.mark.parametrize(
    ("keys", "which", "why"),
    [
        ({"gas": (METER,)}, "keys.meter and keys.gas", "must have no authority"),
        ({"gas": (GAS, METER)}, "keys.meter and keys.gas", "must have no authority"),
        ({"gas": (OWNER,)}, "keys.gas and keys.owner", "must have no authority"),
        ({"gas": (GAS, OWNER)}, "keys.gas and keys.owner", "must have no authority"),
        ({"owner": METER}, "keys.meter and keys.owner", "can do everything"),
        ({"gas": (GAS, SECOND_GAS, GAS)}, "two of keys.gas", "nonces"),
    ],
)
def test_secrets__two_the_same__are_refused_with_which_and_why(keys, which, why):
    with pytest.raises(
        SettingsError, match=f"{which} are the same key, 0x[0-9a-f]{{40}}: .*{why}"
    ) as refusal:
        secrets(**keys)
    assert not leaks(str(refusal.value))


def test_secrets_of__same_key_under_two_names__is_refused(monkeypatch):
    for name in ("WATERFALL_METER_KEY", "WATERFALL_GAS_KEY"):
        monkeypatch.setenv(name, "a1" * 32)
    monkeypatch.setenv("WATERFALL_LABEL_SALT", SALT)
    monkeypatch.setenv("WATERFALL_ADMIN_KEY", ADMIN_KEY)
    with pytest.raises(SettingsError, match=r"keys\.meter and keys\.gas are the same"):
        secrets_of(Settings(), CHAIN)
    monkeypatch.setenv("SECOND_GAS", "d4" * 32)
    monkeypatch.setenv("WATERFALL_GAS_KEY", "b2" * 32)
    found = secrets_of(Settings(keys={"gas": ["env:WATERFALL_GAS_KEY", "env:SECOND_GAS"]}), CHAIN)
    assert [signer.address for signer in found.gas] == [GAS.address, SECOND_GAS.address]


class Vault:
    """What the vault holds of the platform."""

    def __init__(self, meters=(METER,), retired=(), **platform):
        view = {"owner": OWNER.address, "payout": OWNER.address, "pending_owner": ZERO_ADDRESS, **platform}
        self.view = PlatformView(exit_delay=3600, earnings=0, **view)
        self.meters = {signer.address: Meter(1, 0, 0) for signer in meters}
        self.meters |= {signer.address: Meter(1, 2, 0) for signer in retired}
        self.rpc = self

    async def call(self, method, *_):
        return {"eth_chainId": hex(CHAIN_ID), "eth_getCode": "0x60"}[method]

    async def platform(self, _):
        return self.view

    async def meter(self, _, address):
        return self.meters.get(address, Meter(0, 0, 0))

    async def token(self):
        return "0x" + "70" * 20


@pytest.mark.parametrize(
    "vault", [Vault(), Vault(retired=(GAS,)), Vault(payout="0x" + "99" * 20), Vault(meters=(METER, OWNER))]
)
async def test_check__gas_key_without_power__starts(vault):
    assert await _check(vault, CHAIN, secrets()) == ("0x" + "70" * 20, 3600)


@pytest.mark.parametrize(
    ("vault", "key", "power"),
    [
        (Vault(meters=(METER, GAS)), GAS, "a meter of it"),
        (Vault(meters=(METER, SECOND_GAS)), SECOND_GAS, "a meter of it"),
        (Vault(owner=GAS.address), GAS, "its owner"),
        (Vault(pending_owner=SECOND_GAS.address), SECOND_GAS, "its next owner"),
        (Vault(payout=GAS.address), GAS, "where its earnings go"),
        (Vault(owner=GAS.address, payout=GAS.address), GAS, "its owner and where its earnings go"),
    ],
)
async def test_check__gas_key_with_power__refuses_to_start(vault, key, power):
    with pytest.raises(SettingsError, match=f"keys.gas: {key.address} must have no power .* is {power}"):
        await _check(vault, CHAIN, secrets(gas=(GAS, SECOND_GAS), owner=None))


@pytest.mark.parametrize("part", ["owner", "pending_owner", "payout"])
async def test_check__meter_that_is_more__refuses_to_start(part):
    with pytest.raises(SettingsError, match=rf"keys\.meter: {METER.address} .* beyond metering"):
        await _check(Vault(**{part: METER.address}), CHAIN, secrets(owner=None))


# ── Nothing shows them ───────────────────────────────────────────────────────────────────────────────


def leaks(text):
    """The secrets of this file that are in a text."""
    spelt = [*secrets().spellings(), UPSTREAM_KEY, PASSWORD]
    return [secret for secret in spelt if secret.lower() in text.lower()]


def test_leaks__in_any_of_its_forms__are_seen():
    for key in ("a1" * 32, "0xA1" + "A1" * 31, str(b"\xb2" * 32), ADMIN_KEY, SALT):
        assert leaks(f"it is {key} here"), key


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r}".format, "%s".__mod__, lambda s: f"{[s]}"])
def test_secrets__shown__tell_addresses_only(show):
    text = show(secrets())
    assert not leaks(text)
    assert all(signer.address in text for signer in (METER, GAS, OWNER))


@pytest.mark.parametrize(
    "take", [pickle.dumps, copy.copy, copy.deepcopy, dataclasses.asdict, vars, json.dumps]
)
def test_secrets__taken_apart__are_refused(take):
    with pytest.raises(TypeError) as refusal:
        take(secrets())
    assert not leaks(str(refusal.value))


def test_secrets__in_a_model_or_dataclass__are_not_shown_by_it():
    class Model(BaseModel, arbitrary_types_allowed=True):
        secrets: Secrets
        meter: LocalSigner

    @dataclasses.dataclass
    class Holder:
        secrets: Secrets
        meter: LocalSigner

    model, holder = Model(secrets=secrets(), meter=METER), Holder(secrets(), METER)
    assert not leaks(f"{model} {model!r} {model.model_dump()} {holder}")


def test_secrets__in_a_failing_call__are_not_in_its_traceback():
    held = secrets()
    with pytest.raises(RuntimeError) as failure:
        raise RuntimeError(f"failed with {held}")
    assert not leaks("".join(traceback.format_exception(failure.value)))


def test_settings__with_every_secret_set__hold_none(monkeypatch, tmp_path):
    (tmp_path / "password").write_text(PASSWORD)
    monkeypatch.setenv("UP", UPSTREAM_KEY)
    settings = Settings.model_validate(
        {
            "keys": {"meter": "keystore:m.json", "password_file": tmp_path / "password"},
            "upstreams": {"u": {"kind": "openai", "base_url": "http://u/v1", "api_key_env": "UP"}},
        }
    )
    assert settings.upstreams["u"].api_key() == UPSTREAM_KEY
    assert settings.keys.password() == PASSWORD
    shown = f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()} {vars(settings)}"
    assert not leaks(shown + str(pickle.dumps(settings)))


# ── The last line of defence ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A log that writes to a file; and what is in it."""
    monkeypatch.setattr(logs, "_concealed", set())
    monkeypatch.setattr(logs, "_pattern", re.compile("(?!)"))
    before = structlog.get_config()
    structlog.reset_defaults()  # the other unit tests log nothing
    file = tmp_path / "log"
    logs.configure(file)
    lines = structlog.get_logger().bind()._logger._file  # noqa: SLF001 - open until the process ends, but for tests

    def read():
        lines._write()  # noqa: SLF001 - what came thick waits for a moment
        return file.read_text()

    yield structlog.get_logger(), read
    lines._stream.close()  # noqa: SLF001
    structlog.configure(**before)


@pytest.fixture
def concealed(log, monkeypatch, tmp_path):
    """As `waterfall serve` starts."""
    monkeypatch.setenv("UP", UPSTREAM_KEY)
    upstream = {"kind": "openai", "base_url": "http://u/v1", "api_key_env": "UP"}
    chain = CHAIN.model_copy(
        update={"rpc_url": "https://user:rpc-password@node/v3/rpc-project-key?k=rpc-query-key"}
    )
    _conceal(Settings.model_validate({"upstreams": {"u": upstream}}), chain, secrets())
    return log


@pytest.mark.parametrize(
    "secret",
    [
        "a1" * 32,
        "0x" + "b2" * 32,
        "C3" * 32,
        str(b"\xa1" * 32),
        str(int("b2" * 32, 16)),
        ADMIN_KEY,
        SALT,
        UPSTREAM_KEY,
        "rpc-password",
        "rpc-project-key",
        "rpc-query-key",
    ],
)
def test_log__secret_in_an_event__is_concealed(concealed, secret):
    log, written = concealed
    log.info(secret, key=secret, nested={"in": [secret]}, error=ValueError(secret))
    try:
        raise ValueError(f"a {secret} of it")
    except ValueError:
        log.exception("failed")
    assert written().count("[concealed]") >= 5
    for form in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]):
        assert form.lower() not in written().lower()
    for line in written().splitlines():
        json.loads(line)


def test_log__everything_else__stays(concealed):
    log, written = concealed
    log.info("settled", account="0x" + "ac" * 32, meter=METER.address, text="salt, admin, http://node")
    event = json.loads(written())
    assert (event["account"], event["meter"]) == ("0x" + "ac" * 32, METER.address)
    assert event["text"] == "salt, admin, http://node"


def test_conceal__short_or_empty__blanks_nothing_out(log):
    logs.conceal("", "/rpc", "1234567")
    assert logs.redact("12345678 /rpc") == "12345678 /rpc"


@pytest.mark.parametrize("text", ["x SECRET-word y", "é Secret-Word", "secret-worD"])
def test_redact__in_any_case_and_among_any_letters__conceals(log, text):
    logs.conceal("secret-word")
    assert "[concealed]" in logs.redact(text)
    assert "word" not in logs.redact(text).lower()


def test_redact__secret_with_other_letters__is_concealed(log):
    logs.conceal("pässwörd-ß")
    assert logs.redact("PÄSSWÖRD-ß") == "[concealed]"


def test_conceal__one_within_another__conceals_the_whole(log):
    logs.conceal("abcdefgh", "abcdefgh-and-more")
    assert logs.redact("abcdefgh-and-more") == "[concealed]"


def test_secrets_of__keystores_password__is_concealed_before_it_is_used(log, monkeypatch, tmp_path):
    (tmp_path / "password").write_text(PASSWORD)
    keys = {"meter": f"keystore:{tmp_path / 'absent.json'}", "password_file": tmp_path / "password"}
    with pytest.raises(SettingsError):
        secrets_of(Settings.model_validate({"keys": keys}), CHAIN)
    assert logs.redact(f"with {PASSWORD}") == "with [concealed]"


def test_keep__traceback_with_a_secret__is_written_without_it(concealed, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    try:
        raise ValueError(ADMIN_KEY)
    except ValueError as error:
        kept = logs.keep(error).read_text()
    assert "ValueError: [concealed]" in kept
    assert "Traceback" in kept


def test_log__on_a_terminal__is_concealed_too(concealed, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    logs.configure()
    structlog.get_logger().info("it", key=ADMIN_KEY, other=UPSTREAM_KEY)
    assert terminal.getvalue().count("[concealed]") == 2
    assert not leaks(terminal.getvalue())
