import json

import pytest
from eth_account import Account
from pydantic import ValidationError

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
        (("sqlite:///x/waterfall.db", "mysql://x"), "database"),
        (("sqlite:///x/waterfall.db", "sqlite:///:memory:"), "database"),
        (('"0.15"', "0.15"), "models.house-model.input_usd_per_mtok"),
        (('"0.15"', '"cheap"'), "models.house-model.input_usd_per_mtok"),
        (('"0.15"', '"-1"'), "models.house-model.input_usd_per_mtok"),
        (('"0.15"', '"0.0000000000001"'), "models.house-model.input_usd_per_mtok"),
        (('output_usd_per_mtok = "0.60"', ""), "models.house-model"),
        (('upstream = "local"', 'upstream = "other"'), 'models."house-model".upstream'),
        (("chain_id = 31337", "chain_id = 0"), "chain.chain_id"),
        (("0xC0C0", "0xZZC0"), "chain.vault"),
        (('rpc_url = "http://127.0.0.1:8545"', "rpc_url = []"), "chain.rpc_url"),
        (('rpc_url = "http://127.0.0.1:8545"', "rpc_url = 8545"), "chain.rpc_url"),
        (('rpc_url = "http://127.0.0.1:8545"', 'rpc_url = ["http://a", 1]'), "chain.rpc_url"),
        (('rpc_url = "http://127.0.0.1:8545"', 'rpc_url = ["http://a", "http://a"]'), "chain.rpc_url"),
        (('rpc_url = "http://127.0.0.1:8545"', 'rpc_url = ["http://a", "ws://secret"]'), "chain.rpc_url"),
        (('"http://127.0.0.1:8545"', '"localhost:8545/secret"'), "chain.rpc_url"),
        (('"http://127.0.0.1:8545"', '"env:"'), "chain.rpc_url"),
        (('"http://127.0.0.1:8545"', '"env:https://x/secret"'), "chain.rpc_url"),
        (("finality = 3", "finality = 3\nrpc_timeout_seconds = 0"), "chain.rpc_timeout_seconds"),
        (("finality = 3", "finality = 3\nrpc_timeout_seconds = inf"), "chain.rpc_timeout_seconds"),
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


# ── Nodes ────────────────────────────────────────────────────────────────────────────────────────────


def chain_with(rpc_url):
    return ChainSettings(rpc_url=rpc_url, chain_id=1, vault="0x" + "c0" * 20, platform=1)


@pytest.mark.parametrize(
    ("chain_id", "given", "gap"),
    [(8453, None, 120), (31337, None, float("inf")), (31337, 5, 5), (1, 600, 600)],
)
def test_chain_settings__block_gap__is_limited_where_blocks_are_known_to_come(chain_id, given, gap):
    settings = ChainSettings(
        rpc_url="http://x", chain_id=chain_id, vault="0x" + "c0" * 20, platform=1, max_block_gap_seconds=given
    )
    assert settings.max_block_gap == gap


def test_rpc_urls__one_or_several_or_by_reference__all_of_them_in_order(write, monkeypatch):
    monkeypatch.setenv("NODE_URL", " https://node.example/v3/a-secret\n")
    text = WHOLE.replace('"http://127.0.0.1:8545"', '["env:NODE_URL", "http://127.0.0.1:8545"]')
    chain = load(write(text)).chain
    assert chain.rpc_urls() == ("https://node.example/v3/a-secret", "http://127.0.0.1:8545")
    assert load(write(WHOLE)).chain.rpc_urls() == ("http://127.0.0.1:8545",)
    assert chain_with("env:NODE_URL").rpc_urls() == ("https://node.example/v3/a-secret",)


@pytest.mark.parametrize("value", [None, "", " ", "wss://a-secret", "a-secret"])
def test_rpc_urls__variable_without_a_url__names_it_and_not_its_value(monkeypatch, value):
    monkeypatch.delenv("NODE_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("NODE_URL", value)
    with pytest.raises(SettingsError, match=r"chain\.rpc_url: .*NODE_URL") as refusal:
        chain_with("env:NODE_URL").rpc_urls()
    assert "a-secret" not in refusal.value.message


def test_chain_settings__url_with_a_key__is_not_in_its_repr():
    assert "a-secret" not in repr(chain_with("https://node.example/v3/a-secret"))
    assert "a-secret" not in str(chain_with(["https://node.example/v3/a-secret", "http://x"]))


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
    monkeypatch.setenv("SOME_PASSWORD", "guess")
    with pytest.raises(SettingsError, match="cannot be opened") as refusal:
        keys.signer(f"keystore:{path}")
    assert "guess" not in str(refusal.value)
    monkeypatch.delenv("SOME_PASSWORD")
    with pytest.raises(SettingsError, match=r"keys\.password_env: .* SOME_PASSWORD, .* is not set"):
        keys.signer(f"keystore:{path}")


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_signer__keystore__opened_with_the_password_in_a_file(monkeypatch, tmp_path, end):
    path, word = tmp_path / "key.json", tmp_path / "password"
    path.write_text(json.dumps(Account.encrypt(KEY, " secret ", kdf="pbkdf2", iterations=2)))
    word.write_bytes(b" secret " + end.encode())
    monkeypatch.setenv("WATERFALL_KEYSTORE_PASSWORD", "another")
    assert KeySettings(password_file=word).signer(f"keystore:{path}").address == LocalSigner(KEY).address


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_password__file_that_cannot_be_read__is_named(tmp_path, content):
    word = tmp_path / "password"
    if content is not None:
        word.write_bytes(content)
    with pytest.raises(SettingsError, match=f"the password file {word} "):
        KeySettings(password_file=word).password()


@pytest.mark.parametrize(
    ("gas", "references"),
    [
        ('"env:A"', ("env:A",)),
        ('["env:A"]', ("env:A",)),
        ('["env:A", "kms:alias/gas", "keystore:x.json"]', ("env:A", "kms:alias/gas", "keystore:x.json")),
    ],
)
def test_gas__one_or_a_list__each_is_a_key(write, gas, references):
    assert load(write(f"[keys]\ngas = {gas}")).keys.gas == references


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("gas = []", "keys.gas"),
        ("gas = 5", "keys.gas"),
        ('gas = ["env:A", ""]', "keys.gas.1"),
        ('meter = ""', "keys.meter"),
        ('meter = "env"', "keys.meter"),
        ('meter = "env:"', "keys.meter"),
        ('meter = "keystore:"', "keys.meter"),
        ('meter = "kms:"', "keys.meter"),
        ('meter = "vault:x"', "keys.meter"),
        ('meter = "env:A B"', "keys.meter"),
        (f'meter = "{KEY.hex()}"', "keys.meter"),
        (f'meter = "0x{KEY.hex()}"', "keys.meter"),
        (f'meter = "env:0x{KEY.hex()}"', "keys.meter"),
        (f'meter = "env:{"ab" * 32}"', "keys.meter"),  # hex that could be a variable's name
        (f'owner = "key:{KEY.hex()}"', "keys.owner"),
        (f'meter_key = "{KEY.hex()}"', "keys.meter_key"),
    ],
)
def test_keys__no_reference__is_refused_and_not_shown(write, line, key):
    path = write(f"[keys]\n{line}")
    with pytest.raises(SettingsError) as refusal:
        load(path)
    assert f"{path}: {key}" in refusal.value.message
    assert KEY.hex() not in refusal.value.message
    assert "ab" * 32 not in refusal.value.message


def test_keys__validated_directly__the_error_shows_no_input():
    for model, given in [(KeySettings, {"meter": KEY.hex()}), (Settings, {"keys": {"gas": [KEY.hex()]}})]:
        with pytest.raises(ValidationError) as refusal:
            model.model_validate(given)
        assert KEY.hex()[:8] not in str(refusal.value), "pydantic shows the ends of what is long"


def test_upstream_key__named_in_the_settings__comes_from_the_environment(write, monkeypatch):
    text = WHOLE.replace('kind = "openai"', 'kind = "openai"\napi_key_env = "SOME_API_KEY"')
    upstream = load(write(text)).upstreams["local"]
    monkeypatch.setenv("SOME_API_KEY", "sk-1")
    assert upstream.api_key() == "sk-1"
    monkeypatch.delenv("SOME_API_KEY")
    assert upstream.api_key() is None
    assert "sk-1" not in repr(upstream)


def test_upstream_key__in_a_file__comes_from_it(write, tmp_path):
    file = tmp_path / "key"
    text = WHOLE.replace('kind = "openai"', f'kind = "anthropic"\napi_key_file = "{file}"')
    upstream = load(write(text)).upstreams["local"]
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        upstream.api_key()
    file.write_text("sk-2\n")
    assert upstream.api_key() == "sk-2"
    assert upstream.serves == ("messages",)


def test_upstream_key__in_two_places__is_refused(write):
    text = WHOLE.replace('kind = "openai"', 'kind = "openai"\napi_key_env = "A"\napi_key_file = "b"')
    with pytest.raises(SettingsError, match="give one of them"):
        load(write(text))


ACCOUNT = "0x" + "11" * 32


def test_tariffs__platform_plan_and_account__are_read(write):
    text = f"""
[markup]
percent = "20"
[markup.models.house-model]
percent = "30"
least_usd_per_call = "0.0001"
[plans.pro]
percent = "10"
[accounts."{ACCOUNT}"]
plan = "pro"
"""
    tariffs = load(write(WHOLE + text)).tariffs
    assert tariffs.of(None)[1].of("house-model")[1].percent == 30
    assert tariffs.of(ACCOUNT)[1].of("house-model")[1].percent == 10
    assert load(write(WHOLE)).tariffs.of(ACCOUNT)[1].percent == 0


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[markup]\npercent = 20", "markup.percent"),
        ('[markup]\npercent = "-101"', "markup.percent"),
        ('[markup]\npercent = "0.00001"', "markup.percent"),
        ("[markup]\nusd_per_call = 1", "markup.usd_per_call"),
        ('[markup.models.other]\npercent = "1"', 'markup.models."other"'),
        ('[plans.pro.models.other]\npercent = "1"', 'plans.pro.models."other"'),
        ('[accounts.me]\nplan = "pro"', "accounts.me"),
        (f'[accounts."{ACCOUNT}"]\nplan = "gold"', f'accounts."{ACCOUNT}".plan'),
        (f'[accounts."{ACCOUNT}"]', f"accounts.{ACCOUNT}"),
        (
            '[[models.house-model.later]]\nstarts_at = 2027-01-01T00:00:00\ninput_usd_per_mtok = "1"\noutput_usd_per_mtok = "1"',
            "models.house-model.later.0",
        ),
        ("[[models.house-model.later]]\nstarts_at = 2027-01-01T00:00:00Z", "models.house-model.later.0"),
    ],
)
def test_tariffs__mistake__names_the_key(write, text, key):
    with pytest.raises(SettingsError) as refusal:
        load(write(f"{WHOLE}\n{text}\n"))
    assert f": {key}" in refusal.value.message


def test_retention__left_out__keeps_everything(write):
    kept = load(write(WHOLE)).retention
    assert (kept.usage_days, kept.details_days, kept.idempotency_days) == (None, None, None)
    some = load(write(WHOLE + "[retention]\nusage_days = 90\n")).retention
    assert (some.usage_days, some.details_days) == (90, None)


@pytest.mark.parametrize(
    "line", ["usage_days = 0", "details_days = -1", 'idempotency_days = "9"', "days = 3"]
)
def test_retention__no_number_of_days__is_refused_and_named(write, line):
    with pytest.raises(SettingsError, match=f"retention.{line.split(' ')[0]}"):
        load(write(WHOLE + "[retention]\n" + line))
