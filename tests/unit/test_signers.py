import json

import pytest
from eth_account import Account
from eth_keys import keys
from hypothesis import given
from hypothesis import strategies as st

from waterfall import signers
from waterfall.errors import SettingsError
from waterfall.signers import LocalSigner, Signer

KEY = b"\x11" * 32
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
KEYS = st.integers(1, ORDER - 1).map(lambda number: number.to_bytes(32, "big"))


@given(KEYS)
def test_local_signer__any_key__address_is_that_of_eth_account(key):
    assert LocalSigner(key).address == Account.from_key(key).address.lower()


@given(KEYS, st.binary(min_size=32, max_size=32))
def test_local_signer__signature__recovers_to_its_address_with_low_s(key, digest):
    signature = LocalSigner(key).sign(digest)
    assert len(signature) == 65
    assert signature[64] in (27, 28)
    assert int.from_bytes(signature[32:64], "big") <= ORDER // 2
    expected = keys.PrivateKey(key).sign_msg_hash(digest)
    assert signature[:64] == expected.to_bytes()[:64]
    assert signature[64] - 27 == expected.v


def test_local_signer__any_key__is_a_signer():
    assert isinstance(LocalSigner(KEY), Signer)


def test_local_signer__shown__never_shows_its_key():
    signer = LocalSigner(KEY)
    assert repr(signer) == f"LocalSigner({signer.address})"
    assert KEY.hex() not in f"{signer} {signer!r} {vars(signer)}"


@pytest.mark.parametrize("text", [KEY.hex(), "0x" + KEY.hex(), f" {KEY.hex()}\n", KEY.hex().upper()])
def test_from_hex__thirty_two_bytes__signer(text):
    assert signers.from_hex(text, name="it").address == LocalSigner(KEY).address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0x",
        "zz" * 32,
        "01",  # a key cut short would be another key
        "11" * 31,
        "11" * 33,
        "00" + "11" * 32,
        "00" * 32,
        "ff" * 32,
        f"{ORDER:064x}",
    ],
)
def test_from_hex__not_a_private_key__is_refused_and_not_shown(text):
    with pytest.raises(SettingsError, match="the test does not hold a private key") as refusal:
        signers.from_hex(text, name="the test")
    assert refusal.value.__cause__ is None
    assert not text.strip("0x") or text not in str(refusal.value)


def test_from_environment__set__signer(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "0x" + KEY.hex())
    assert signers.from_environment("TEST_KEY").address == LocalSigner(KEY).address


@pytest.mark.parametrize("value", [None, ""])
def test_from_environment__absent_or_empty__names_the_variable(monkeypatch, value):
    monkeypatch.delenv("TEST_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(SettingsError, match="TEST_KEY"):
        signers.from_environment("TEST_KEY")


@pytest.fixture(scope="module")
def keystore(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "meter.json"
    path.write_text(json.dumps(Account.encrypt(KEY, "secret", kdf="pbkdf2", iterations=2)))
    return path


def test_from_keystore__right_password__signer(keystore):
    assert signers.from_keystore(keystore, "secret").address == LocalSigner(KEY).address


def test_from_keystore__wrong_password__is_refused_without_the_password(keystore):
    with pytest.raises(SettingsError, match="cannot be opened") as refusal:
        signers.from_keystore(keystore, "guess")
    assert "guess" not in str(refusal.value)


@pytest.mark.parametrize(
    "text", [None, "", "nope", "{}", "[]", '"x"', '{"version": 3}', '{"version": 3, "crypto": {}}']
)
def test_from_keystore__not_a_keystore__is_refused(tmp_path, text):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=r"bad\.json cannot be opened"):
        signers.from_keystore(path, "secret")


def test_from_keystore__bytes_that_are_not_text__is_refused(tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="cannot be opened"):
        signers.from_keystore(path, "secret")
