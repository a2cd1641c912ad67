"""What is made of KMS's answers, which a script gives here: what AWS's own are like, integration/test_aws_kms.py knows."""

import hashlib
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import boto3
import coincurve
import pytest
from coincurve import ecdsa

from waterfall.errors import SettingsError, SignerUnavailable
from waterfall.keccak import keccak
from waterfall.signers import KmsSigner, LocalSigner, from_kms

ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
DIGEST = keccak(b"what is signed")
KEY = coincurve.PrivateKey(b"\x11" * 32)
POINT = KEY.public_key.format(compressed=False)
OTHER = coincurve.PrivateKey(b"\x22" * 32)


@pytest.mark.parametrize("digest", [b"", b"\x01" * 31, b"\x01" * 33])
def test_sign__not_a_digest__is_refused_here(digest):
    with pytest.raises(ValueError, match="32 bytes"):
        signer_with({}).sign(digest)


def test_sign__digest__is_sent_as_one():
    sent = {}
    client = SimpleNamespace(sign=lambda **o: sent.update(o) or {"Signature": KEY.sign(DIGEST, hasher=None)})
    KmsSigner(client, "arn", KEY.public_key).sign(DIGEST)
    assert sent == {
        "KeyId": "arn",
        "Message": DIGEST,
        "MessageType": "DIGEST",
        "SigningAlgorithm": "ECDSA_SHA_256",
    }


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Somebody's who uses AWS, from a machine that is not in it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIATESTINGTESTING00",
        "AWS_SECRET_ACCESS_KEY": "aws/secret/of/the/tests",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "absent"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "absent"),
    }.items():
        monkeypatch.setenv(name, value)


# ── Which key ────────────────────────────────────────────────────────────────────────────────────────


def answers(monkeypatch, **fields):
    """KMS answers GetPublicKey so."""
    client = SimpleNamespace(get_public_key=lambda **_: {"KeyUsage": "SIGN_VERIFY", **fields})
    monkeypatch.setattr(boto3.session.Session, "client", lambda *_, **__: client)


def spki(point=POINT):
    head = bytes.fromhex("3056301006072a8648ce3d020106052b8104000a034200")
    return head + point


def test_from_kms__both_names_of_the_spec__the_current_one_counts(monkeypatch):
    fields = {"KeyId": "1", "PublicKey": spki(), "KeySpec": "ECC_SECG_P256K1"}
    answers(monkeypatch, **fields, CustomerMasterKeySpec="ECC_NIST_P256")
    assert from_kms("1").address == LocalSigner(KEY.secret).address


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        spki()[:-1],
        spki() + b"\0",
        spki(b"\4" + b"\1" * 64),  # not on the curve
        spki(KEY.public_key.format(compressed=True)),
        spki().replace(bytes.fromhex("2b8104000a"), bytes.fromhex("2b81040022")),  # of another curve
        b"\x31" + spki()[1:],
    ],
)
def test_from_kms__not_a_public_key_of_the_curve__is_refused(monkeypatch, encoded):
    answers(monkeypatch, KeyId="1", PublicKey=encoded, KeySpec="ECC_SECG_P256K1")
    with pytest.raises(SettingsError, match="no public key of secp256k1"):
        from_kms("1")


def test_from_kms__no_credentials__says_so(environment, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(SettingsError, match="NoCredentialsError"):
        from_kms("1")


def test_from_kms__endpoint_that_is_no_url__says_so(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "nowhere")
    with pytest.raises(SettingsError, match="kms:1 cannot be used"):
        from_kms("1")


def test_from_kms__boto3_not_installed__says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(
        SettingsError, match=r"kms:1 needs boto3: run `pip install 'waterfall-credits\[kms\]'`"
    ):
        from_kms("1")


def test_signers__without_kms__never_import_boto3():
    code = "import sys, waterfall.settings; assert not {'boto3', 'botocore'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_from_kms__client__waits_no_longer_than_it_should(monkeypatch):
    made = {}
    client = SimpleNamespace(
        get_public_key=lambda **_: {
            "KeyId": "1",
            "PublicKey": spki(),
            "KeySpec": "ECC_SECG_P256K1",
            "KeyUsage": "SIGN_VERIFY",
        }
    )
    monkeypatch.setattr(boto3.session.Session, "client", lambda *_, **options: made.update(options) or client)
    from_kms("arn:aws:kms:us-west-2:123456789012:key/1")
    assert (made["config"].connect_timeout, made["config"].read_timeout) == (3, 5)
    assert made["config"].retries == {"mode": "standard", "total_max_attempts": 3}
    assert made["region_name"] == "us-west-2"


# ── What goes wrong ──────────────────────────────────────────────────────────────────────────────────


def signer_with(answer):
    """A key whose KMS answers Sign with this."""
    return KmsSigner(SimpleNamespace(sign=lambda **_: answer), "1", KEY.public_key)


def turned_round(signature):
    """The same DER signature with its other s."""
    compact = ecdsa.serialize_compact(ecdsa.der_to_cdata(signature))
    high = ORDER - int.from_bytes(compact[32:], "big")
    return ecdsa.cdata_to_der(ecdsa.deserialize_compact(compact[:32] + high.to_bytes(32, "big")))


def test_sign__either_s__gives_the_same_signature_as_in_memory():
    expected = LocalSigner(KEY.secret).sign(DIGEST)
    low = KEY.sign(DIGEST, hasher=None)
    high = turned_round(low)
    assert low != high
    assert signer_with({"Signature": low}).sign(DIGEST) == expected
    assert signer_with({"Signature": high}).sign(DIGEST) == expected


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({}, "no signature"),
        ({"Signature": b""}, "no signature"),
        ({"Signature": b"nonsense"}, "no signature"),
        ({"Signature": KEY.sign(DIGEST, hasher=None) + b"\0"}, "no signature"),
        ({"Signature": OTHER.sign(DIGEST, hasher=None)}, "not this key's"),
        ({"Signature": KEY.sign(keccak(b"another"), hasher=None)}, "not this key's"),
        ({"Signature": KEY.sign(DIGEST, hasher=lambda d: hashlib.sha256(d).digest())}, "not this key's"),
        ({"Signature": bytes.fromhex("3006020100020100")}, "not this key's"),  # r = s = 0
    ],
)
def test_sign__anything_but_its_signature__never_leaves(answer, problem):
    with pytest.raises(SignerUnavailable, match=problem):
        signer_with(answer).sign(DIGEST)


def test_kms_signer__shown__tells_its_address_only():
    signer = signer_with({})
    assert f"{signer} {signer!r}" == f"KmsSigner({signer.address}) KmsSigner({signer.address})"
    with pytest.raises(TypeError, match="not copied or pickled"):
        pickle.dumps(signer)
