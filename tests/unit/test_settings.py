import json

import pytest
from eth_account import Account

from waterfall.errors import SettingsError
from waterfall.gateway.config import GatewaySettings, ModelSettings
from waterfall.settings import ChainSettings, KeySettings, Settings, load
from waterfall.signers import LocalSigner

KEY = b"\x11" * 32
WHOLE = """
database = "sqlite:///x/waterfall.db"

[gateway]
port = 0

[chain]
rpc_url = "http://127.0.0.1:8545"
chain_id = 31337
vault = "0xC0C0C0C0C0C0C0C0C0C0C0C0C0C0C0C0C0C0C0C0"
platform = 340282366920938463463374607431768211455
finality = 3

[keys]
meter = "keystore:meter.json"

[upstreams.local]
kind = "openai"
base_url = "http://127.0.0.1:9000/v1"

[models."house-model"]
upstream = "local"
input_usd_per_mtok = "0.15"
output_usd_per_mtok = "0.60"
"""


@pytest.fixture
def write(tmp_path):
    path = tmp_path / "waterfall.toml"

    def write(text):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_load__whole_file__typed_and_checked(write):
    settings = load(write(WHOLE))
    assert settings.chain.vault == "0x" + "c0" * 20, "any case is taken"
    assert settings.chain.platform == 2**128 - 1
    assert settings.chain.finality == 3
    assert settings.gateway == GatewaySettings(port=0)
    assert (
        settings.models["house-model"].input_usd_per_mtok
        == ModelSettings(
            upstream="local", input_usd_per_mtok="0.150", output_usd_per_mtok="1"
        ).input_usd_per_mtok
    )


def test_load__empty_file__is_all_defaults(write):
    assert load(write("")) == Settings()
    assert Settings().chain is None


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (('kind = "openai"', 'kind = "other"'), "upstreams.local.kind"),
        (("http://127.0.0.1:9000/v1", "127.0.0.1:9000"), "upstreams.local.base_url"),
        (("http://127.0.0.1:9000/v1", "http://127.0.0.1:99999/v1"), "upstreams.local.base_url"),
        (("http://127.0.0.1:9000/v1", "http://u:secret@127.0.0.1/v1"), "upstreams.local.base_url"),
        (("http://127.0.0.1:9000/v1", "http://127.0.0.1/v1?api-version=1"), "upstreams.local.base_url"),
        (('kind = "openai"', 'kind = "openai"\ntimeout_seconds = inf'), "upstreams.local.timeout_seconds"),
        (("port = 0", "port = 0\ndrain_seconds = nan"), "gateway.drain_seconds"),
        (("port = 0", "port = true"), "gateway.port"),
        (("sqlite:///x/waterfall.db", "postgresql://x"), "database"),
        (("sqlite:///x/waterfall.db", "sqlite:///:memory:"), "database"),
        (('"0.15"', "0.15"), "models.house-model.input_usd_per_mtok"),
        (('"0.15"', '"cheap"'), "models.house-model.input_usd_per_mtok"),
        (('"0.15"', '"-1"'), "models.house-model.input_usd_per_mtok"),
        (('"0.15"', '"0.0000000000001"'), "models.house-model.input_usd_per_mtok"),
        (('output_usd_per_mtok = "0.60"', ""), "models.house-model"),
        (('upstream = "local"', 'upstream = "other"'), 'models."house-model".upstream'),
        (("chain_id = 31337", "chain_id = 0"), "chain.chain_id"),
        (("0xC0C0", "0xZZC0"), "chain.vault"),
        (("finality = 3", "finality = 0"), "chain.finality"),
        (("finality = 3", 'finality = "soon"'), "chain.finality"),
        (("finality = 3", "depth = 3"), "chain.depth"),
        (("port = 0", "port = 70000"), "gateway.port"),
        (("port = 0", "prot = 0"), "gateway.prot"),
        (("[keys]", "[keyz]"), "keyz"),
        (("platform = 3402", "platform = 9402"), "chain.platform"),
    ],
)
def test_load__mistake__names_the_file_and_the_key(write, change, key):
    assert change[0] in WHOLE
    path = write(WHOLE.replace(*change, 1))
    with pytest.raises(SettingsError) as refusal:
        load(path)
    assert f"{path}: {key}" in refusal.value.message
    assert "secret" not in refusal.value.message


def test_load__cached_price_without_input_price__is_refused(write):
    text = WHOLE.replace('input_usd_per_mtok = "0.15"', 'cached_input_usd_per_mtok = "0.1"')
    text = text.replace('output_usd_per_mtok = "0.60"', "")
    with pytest.raises(SettingsError, match="needs input_usd_per_mtok"):
        load(write(text))


@pytest.mark.parametrize("text", ["[gateway", "port == 1", b"\xff\xfe"])
def test_load__not_toml__names_the_file(write, text):
    with pytest.raises(SettingsError, match=r"waterfall\.toml"):
        load(write(text))


def test_load__no_file__says_so(tmp_path):
    with pytest.raises(SettingsError, match=r"waterfall\.toml: No such file"):
        load(tmp_path / "waterfall.toml")


@pytest.mark.parametrize("finality", ["latest", "safe", "finalized", 1, 64])
def test_chain_settings__finality__a_tag_or_a_depth(finality):
    chain = ChainSettings(
        rpc_url="http://x", chain_id=1, vault="0x" + "c0" * 20, platform=1, finality=finality
    )
    assert chain.finality == finality


# ── Keys ─────────────────────────────────────────────────────────────────────────────────────────────


def test_signer__environment__its_key(monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY.hex())
    assert KeySettings().signer("env:SOME_KEY").address == LocalSigner(KEY).address


def test_signer__keystore__opened_with_the_password_of_the_environment(monkeypatch, tmp_path):
    path = tmp_path / "key.json"
    path.write_text(json.dumps(Account.encrypt(KEY, "secret", kdf="pbkdf2", iterations=2)))
    keys = KeySettings(password_env="SOME_PASSWORD")
    monkeypatch.setenv("SOME_PASSWORD", "secret")
    assert keys.signer(f"keystore:{path}").address == LocalSigner(KEY).address
    monkeypatch.delenv("SOME_PASSWORD")
    with pytest.raises(SettingsError, match="cannot be opened"):
        keys.signer(f"keystore:{path}")


@pytest.mark.parametrize("reference", ["", "env", "env:", "keystore:", "kms:x", KEY.hex()])
def test_signer__no_reference__is_refused(reference):
    with pytest.raises(SettingsError, match="neither env:VARIABLE nor keystore:FILE"):
        KeySettings().signer(reference)


def test_upstream_key__named_in_the_settings__comes_from_the_environment(write, monkeypatch):
    text = WHOLE.replace('kind = "openai"', 'kind = "openai"\napi_key_env = "SOME_API_KEY"')
    upstream = load(write(text)).upstreams["local"]
    monkeypatch.setenv("SOME_API_KEY", "sk-1")
    assert upstream.api_key == "sk-1"
    monkeypatch.delenv("SOME_API_KEY")
    assert upstream.api_key is None
    assert "sk-1" not in repr(upstream)
