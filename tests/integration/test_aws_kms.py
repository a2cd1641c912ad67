"""Keys in AWS KMS: real boto3 against moto, within this process and over HTTP; and a service that has none but those."""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import boto3
import pytest
from aws import ACCOUNT as AWS_ACCOUNT
from aws import ENVIRONMENT, REGION, Server, digests_signed_as_they_are, held_by_aws, make_key
from eth_abi.abi import encode
from eth_account import Account
from moto import mock_aws
from moto.kms.models import kms_backends
from service import ADMIN_KEY, running, settings_for

from waterfall.chain import transactions
from waterfall.chain.transactions import transact
from waterfall.chain.verify import verify
from waterfall.cli.secrets import Secrets
from waterfall.devnet import deploy
from waterfall.errors import SettingsError, SignerUnavailable
from waterfall.keccak import keccak
from waterfall.receipts import Domain, check_signature, recover, settlement_digest
from waterfall.signers import Signer, from_kms, signature_of
from waterfall.types import Charge, SignedReceipt

ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
DIGEST = keccak(b"what is signed")
ACCOUNT, VAULT = "0x" + "ac" * 32, "0x" + "c0" * 20


@pytest.fixture
def aws(monkeypatch):
    """The environment of somebody who uses AWS."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with digests_signed_as_they_are(monkeypatch):
        yield


@pytest.fixture
def aws_server(aws, monkeypatch):
    """moto as a server, which real HTTP goes to."""
    with Server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"http://127.0.0.1:{server.port}")
        yield server


@pytest.fixture
def over_http(aws_server):
    return boto3.client("kms")


@pytest.fixture
def in_process(aws):
    with mock_aws():
        yield boto3.client("kms")


@pytest.fixture(params=["in_process", "over_http"])
def kms(request):
    """A client of our own, to prepare keys with."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def key(kms):
    return make_key(kms)


# ── What it signs ────────────────────────────────────────────────────────────────────────────────────


def test_from_kms__secp256k1_key__has_the_address_of_the_same_key_in_memory(key):
    signer = from_kms(key["KeyId"])
    assert isinstance(signer, Signer)
    assert signer.address == held_by_aws(key["KeyId"]).address


def test_sign__many_digests__each_recovers_to_the_key_with_low_s(key):
    """OpenSSL draws s anywhere: half of them have to be turned round, and half of all recover by either v."""
    signer = from_kms(key["KeyId"])
    seen = set()
    for number in range(32):
        digest = keccak(bytes([number]))
        signature = signer.sign(digest)
        assert len(signature) == 65
        assert int.from_bytes(signature[32:64], "big") <= ORDER // 2
        assert recover(digest, signature) == signer.address
        seen.add(signature[64])
    assert seen == {27, 28}


def test_sign__batch__verifies_as_one_of_the_same_key_in_memory(key):
    signer, same = from_kms(key["KeyId"]), held_by_aws(key["KeyId"])
    charges = [Charge(account=ACCOUNT, id=1, amount=5, receipt_hash="0x" + "ab" * 32)]
    digest = settlement_digest(Domain(31337, VAULT), 7, charges, 1_900_000_000)
    assert recover(digest, signer.sign(digest)) == recover(digest, same.sign(digest)) == same.address


def test_sign__transaction__eth_account_reads_its_sender(key):
    signer = from_kms(key["KeyId"])
    signed = transactions.sign(
        signer,
        chain_id=1,
        nonce=3,
        target=VAULT,
        calldata=b"\x01\x02",
        gas=21_000,
        fees=transactions.Fees(2, 1),
    )
    assert Account.recover_transaction(signed.raw).lower() == signer.address


# ── Which key ────────────────────────────────────────────────────────────────────────────────────────


def test_from_kms__arn__names_the_region(key, monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert from_kms(key["Arn"]).address == held_by_aws(key["KeyId"]).address
    with pytest.raises(SettingsError, match="NotFoundException"):
        from_kms(key["KeyId"])


def test_from_kms__alias__is_followed_once(kms, key):
    kms.create_alias(AliasName="alias/meter", TargetKeyId=key["KeyId"])
    signer = from_kms("alias/meter")
    assert signer.address == held_by_aws(key["KeyId"]).address
    kms.update_alias(AliasName="alias/meter", TargetKeyId=make_key(kms)["KeyId"])
    assert recover(DIGEST, signer.sign(DIGEST)) == signer.address


@pytest.mark.parametrize(
    ("spec", "usage"),
    [
        ("ECC_NIST_P256", "SIGN_VERIFY"),
        ("RSA_2048", "SIGN_VERIFY"),
        ("RSA_2048", "ENCRYPT_DECRYPT"),
    ],
)
def test_from_kms__key_of_another_kind__is_refused(kms, spec, usage):
    key = make_key(kms, spec, usage)["KeyId"]
    with pytest.raises(
        SettingsError, match=f"kms:{key} cannot be used: it is a key for {usage} of spec {spec}"
    ):
        from_kms(key)


@pytest.mark.parametrize(
    ("unset", "key", "problem"),
    [
        ((), "00000000-0000-0000-0000-000000000000", "with NotFoundException"),
        ((), "alias/absent", "with NotFoundException"),
        (("AWS_DEFAULT_REGION",), "1", "NoRegionError"),
    ],
)
def test_from_kms__cannot_be_asked__says_why(kms, monkeypatch, unset, key, problem):
    for name in unset:
        monkeypatch.delenv(name)
    with pytest.raises(SettingsError, match=f"kms:{key} cannot be used: .*{problem}") as refusal:
        from_kms(key)
    assert refusal.value.__suppress_context__
    assert not [value for name, value in ENVIRONMENT.items() if "KEY" in name and value in str(refusal.value)]


# ── What goes wrong ──────────────────────────────────────────────────────────────────────────────────


def test_sign__key_gone__is_unavailable_and_names_the_code(key):
    signer = from_kms(key["KeyId"])
    del kms_backends[AWS_ACCOUNT][REGION].keys[key["KeyId"]]
    with pytest.raises(SignerUnavailable, match="AWS KMS answered Sign with NotFoundException") as failure:
        signer.sign(DIGEST)
    assert failure.value.__suppress_context__
    assert failure.value.status == 503


@pytest.fixture
def server(aws, monkeypatch):
    """An endpoint that answers everything with `status` and `body`, once `served` has been set up."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(served.status)
            self.send_header("Content-Length", str(len(served.body)))
            self.end_headers()
            self.wfile.write(served.body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as served:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"http://127.0.0.1:{served.server_port}")
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield served
        served.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (200, b"not json", "it is a key for None of spec None"),
        (200, b"[]", "gave no usable answer to GetPublicKey: AttributeError"),
        (200, b'{"PublicKey": 5}', "gave no usable answer to GetPublicKey: TypeError"),
        (200, b'{"PublicKey": "A"}', "gave no usable answer to GetPublicKey"),
        (200, b"{}", "it is a key for None of spec None"),
        (200, b'{"KeySpec": "ECC_SECG_P256K1", "KeyUsage": "SIGN_VERIFY"}', "no public key"),
        (400, b'{"__type": "AccessDeniedException", "message": "aws/secret"}', "with AccessDeniedException"),
        (403, b"<html>", "cannot be used: AWS KMS"),
    ],
)
def test_from_kms__strange_answer__is_refused_in_our_words(server, status, body, problem):
    server.status, server.body = status, body
    with pytest.raises(SettingsError, match=problem) as refusal:
        from_kms("1")
    assert "aws/secret" not in str(refusal.value)


async def test_signature_of__kms_gone_for_a_while__is_unavailable_meanwhile(over_http, aws_server):
    signer = from_kms(make_key(over_http)["KeyId"])
    assert recover(DIGEST, await signature_of(signer, DIGEST)) == signer.address
    aws_server.stop()
    with pytest.raises(SignerUnavailable, match="gave no usable answer to Sign: EndpointConnectionError"):
        await signature_of(signer, DIGEST)
    aws_server.start()
    assert recover(DIGEST, await signature_of(signer, DIGEST)) == signer.address


async def test_signature_of__many_at_once__are_all_signed(over_http):
    signer = from_kms(make_key(over_http)["KeyId"])
    digests = [keccak(bytes([number])) for number in range(50)]
    signatures = await asyncio.gather(*(signature_of(signer, digest) for digest in digests))
    assert {recover(*pair) for pair in zip(digests, signatures, strict=True)} == {signer.address}


# ── A service whose keys are all in KMS ──────────────────────────────────────────────────────────────


async def test_service__meter_and_gas_in_kms__charges_settle_and_receipts_verify(
    over_http, net, upstream, database
):
    meter, gas = (from_kms(make_key(over_http)["KeyId"]) for _ in range(2))
    rpc = net.anvil.rpc
    add_meter = keccak(b"addMeter(uint128,address)")[:4] + encode(
        ("uint128", "address"), (net.chain.platform, meter.address)
    )
    await transact(rpc, deploy.OWNER, net.chain.vault, add_meter)
    await rpc.call("anvil_setBalance", gas.address, hex(10**18))
    secrets = Secrets(meter, (gas,), deploy.OWNER, b"salt", ADMIN_KEY)
    settings = settings_for(upstream.base_url, database)
    async with running(net, settings, secrets) as client:
        account, key = await client.open_account(micro_usd=1_000_000)
        status, _, headers = await client.chat(key)
        assert status == 200
        await client.settled(account["id"])
        shown = await client.receipt(headers["X-Waterfall-Receipt-Id"])
    signed = SignedReceipt.model_validate(shown["receipt"])
    assert signed.meter == meter.address
    check_signature(signed)
    proof = await verify(signed, net.vault, net.chain.chain_id)
    sent = await rpc.call("eth_getTransactionByHash", proof.transaction)
    assert sent["from"] == gas.address
