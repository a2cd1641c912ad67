import asyncio
import base64
import copy
import json
import pickle
import stat
import threading

import pytest
from eth_account import Account
from eth_keys import keys
from hypothesis import given
from hypothesis import strategies as st

from waterfall import signers
from waterfall.errors import SettingsError, SignerUnavailable
from waterfall.signers import LocalSigner, Signer, signature_of

KEY = b"\x11" * 32
DIGEST = b"\x22" * 32
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


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_local_signer__copied_or_pickled__is_refused(take):
    with pytest.raises(TypeError, match="not copied or pickled") as refusal:
        take(LocalSigner(KEY))
    assert KEY.hex() not in str(refusal.value)


def test_spellings__key__is_in_each_of_its_usual_forms():
    key = bytes(range(1, 33))
    spellings = LocalSigner(key).spellings()
    texts = [key.hex(), base64.b64encode(key).decode(), base64.urlsafe_b64encode(key).decode(), str(key)]
    texts += [str(int.from_bytes(key, "big"))]
    assert all(any(spelling in text for spelling in spellings) for text in texts)
    assert all(any(spelling in text for text in texts) for spelling in spellings)


# ── On an event loop ─────────────────────────────────────────────────────────────────────────────────


class Remote:
    """A key elsewhere: its answer comes only while the event loop runs on."""

    address = "0x" + "ab" * 20

    def __init__(self):
        self.asked, self.answered = threading.Event(), threading.Event()

    def sign(self, digest):
        self.asked.set()
        assert self.answered.wait(10), "the event loop was blocked"
        return digest


async def test_signature_of__remote_key__leaves_the_event_loop_running():
    signer = Remote()
    signing = asyncio.ensure_future(signature_of(signer, DIGEST))
    while not signer.asked.is_set():
        await asyncio.sleep(0)
    signer.answered.set()
    assert await signing == DIGEST


async def test_signature_of__remote_keys_without_an_answer__leave_the_loops_own_threads_free():
    waiting = [Remote() for _ in range(40)]
    signing = [asyncio.ensure_future(signature_of(signer, DIGEST)) for signer in waiting]
    await asyncio.sleep(0)
    assert await asyncio.to_thread(lambda: "free") == "free"
    for signer in waiting:
        signer.answered.set()
    assert await asyncio.gather(*signing) == [DIGEST] * 40


async def test_signature_of__remote_key_that_fails__its_error():
    class Failing(Remote):
        def sign(self, digest):
            raise SignerUnavailable(reason="no answer")

    with pytest.raises(SignerUnavailable, match="no answer"):
        await signature_of(Failing(), DIGEST)


def test_signature_of__local_key__is_there_at_once():
    with pytest.raises(StopIteration) as signed:
        signature_of(LocalSigner(KEY), DIGEST).send(None)
    assert signed.value.value == LocalSigner(KEY).sign(DIGEST)


# ── From where ───────────────────────────────────────────────────────────────────────────────────────


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


# ── New keystores ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def quick_kdf(monkeypatch):
    """Few rounds: these passwords protect nothing."""
    encrypt = Account.encrypt
    monkeypatch.setattr(Account, "encrypt", lambda key, word: encrypt(key, word, kdf="pbkdf2", iterations=2))


def test_new_keystore__fresh_key__opens_again_and_is_its_owners_alone(tmp_path, quick_kdf):
    path = tmp_path / "gas.json"
    made = signers.new_keystore(path, "secret")
    assert signers.from_keystore(path, "secret").address == made.address
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert signers.new_keystore(tmp_path / "other.json", "secret").address != made.address
    assert not any(spelling in path.read_text() for spelling in made.spellings())


def test_new_keystore__as_it_is_by_default__takes_scrypt_or_as_long(tmp_path):
    path = tmp_path / "gas.json"
    signers.new_keystore(path, "secret")
    assert json.loads(path.read_text())["crypto"]["kdf"] == "scrypt"


def test_new_keystore__file_is_there__stays_as_it_is(tmp_path, quick_kdf):
    path = tmp_path / "gas.json"
    path.write_text("what was there")
    with pytest.raises(SettingsError, match=r"there is a file .*gas\.json already"):
        signers.new_keystore(path, "secret")
    assert path.read_text() == "what was there"


def test_new_keystore__link_to_a_file_that_is_not_there__is_not_followed(tmp_path, quick_kdf):
    path = tmp_path / "gas.json"
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(SettingsError, match="already"):
        signers.new_keystore(path, "secret")
    assert not (tmp_path / "elsewhere.json").exists()


def test_new_keystore__no_password__is_refused(tmp_path):
    with pytest.raises(SettingsError, match="needs a password"):
        signers.new_keystore(tmp_path / "gas.json", "")
    assert not (tmp_path / "gas.json").exists()


def test_new_keystore__no_such_folder__says_so(tmp_path, quick_kdf):
    with pytest.raises(SettingsError, match=r"cannot be written: No such file"):
        signers.new_keystore(tmp_path / "absent" / "gas.json", "secret")


def test_new_keystore__disk_full__leaves_no_half_of_one(tmp_path, quick_kdf, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SettingsError, match="cannot be written: No space left"):
        signers.new_keystore(tmp_path / "gas.json", "secret")
    assert not list(tmp_path.iterdir())
