"""Keys in AWS KMS (spec ECC_SECG_P256K1): they never leave it, and each signature is a call.

Sources: https://docs.aws.amazon.com/kms/latest/APIReference/API_Sign.html and API_GetPublicKey.html, RFC 5480 (the
public key), RFC 3279 §2.2.3 (the signature), EIP-2 (low s).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import coincurve
from coincurve import der, ecdsa

from waterfall.errors import SettingsError, SignerUnavailable
from waterfall.signers.local import address_of

AT_ONCE = 32
"""Signatures that one process asks for at the same time."""

_CONNECT_SECONDS = 3
_READ_SECONDS = 5
_ATTEMPTS = 3
_DIGEST_BYTES, _POINT_BYTES = 32, 65
_ARN_PARTS = 6


class KmsSigner:
    """A key in AWS KMS. Signatures are checked before they are returned."""

    def __init__(self, client: Any, key_id: str, public_key: coincurve.PublicKey) -> None:
        """A key.

        Args:
            client: boto3's, for the key's region.
            key_id: the key's ARN or id; never an alias, which may come to mean another key.
            public_key: what its signatures are held against.
        """
        self._client = client
        self._key_id = key_id
        self._public_key = public_key
        self._address = address_of(public_key.format(compressed=False))

    @property
    def address(self) -> str:
        """Ethereum address, lower case."""
        return self._address

    def sign(self, digest: bytes) -> bytes:
        """Sign a digest: 65 bytes r ‖ s ‖ v, low s, v 27 or 28. Waits for AWS, half a minute at most.

        Raises:
            SignerUnavailable: no answer, a refusal, or not a signature of this key.
        """
        if len(digest) != _DIGEST_BYTES:
            raise ValueError("a digest has 32 bytes")
        with _failures("Sign", lambda reason: SignerUnavailable(reason=reason)):
            answer = self._client.sign(
                KeyId=self._key_id,
                Message=digest,
                MessageType="DIGEST",  # otherwise KMS hashes it once more
                SigningAlgorithm="ECDSA_SHA_256",  # the only one of this curve; the digest need not be SHA-256
            )
        return self._recoverable(answer.get("Signature", b""), digest)

    def _recoverable(self, signature: bytes, digest: bytes) -> bytes:
        """A DER signature as the vault and the chain take it. libsecp256k1 reads the DER, as strictly as consensus."""
        try:
            _, low = ecdsa.signature_normalize(ecdsa.der_to_cdata(signature))
            compact: bytes = ecdsa.serialize_compact(low)
        except ValueError:
            raise SignerUnavailable(reason="AWS KMS answered with something that is no signature") from None
        for v in (0, 1):
            # To recover our own public key from it is to verify it.
            with contextlib.suppress(ValueError):
                recoverable = compact + bytes([v])
                found = coincurve.PublicKey.from_signature_and_message(recoverable, digest, hasher=None)
                if found == self._public_key:
                    return compact + bytes([27 + v])
        raise SignerUnavailable(
            reason="AWS KMS answered with a signature that is not this key's of this digest"
        )

    def __repr__(self) -> str:
        return f"KmsSigner({self._address})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not copied or pickled")


def from_kms(key: str) -> KmsSigner:
    """A signer from a key in AWS KMS: its id, its ARN, `alias/NAME`, or the alias's ARN.

    Credentials come from where AWS's own tools take them, the region too where no ARN names it. An alias is followed
    once, here.

    Raises:
        SettingsError: boto3 is not installed, the key cannot be read, or it cannot sign for Ethereum.
    """
    try:
        import boto3  # type: ignore[import-untyped] # noqa: PLC0415 - an extra, and slow to import
        from botocore.config import Config  # type: ignore[import-untyped] # noqa: PLC0415
    except ModuleNotFoundError:
        raise SettingsError(
            reason=f"kms:{key} needs boto3: run `pip install 'waterfall-credits[kms]'`"
        ) from None

    def refuse(reason: str) -> SettingsError:
        return SettingsError(reason=f"kms:{key} cannot be used: {reason}")

    parts = key.split(":", _ARN_PARTS - 1)
    region = parts[3] if len(parts) == _ARN_PARTS else None
    config = Config(
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        max_pool_connections=AT_ONCE,
    )
    with _failures("GetPublicKey", refuse):
        client = boto3.session.Session().client("kms", region_name=region, config=config)
        answer = client.get_public_key(KeyId=key)
    spec = answer.get("KeySpec", answer.get("CustomerMasterKeySpec"))
    if (spec, answer.get("KeyUsage")) != ("ECC_SECG_P256K1", "SIGN_VERIFY"):
        raise refuse(
            f"it is a key for {answer.get('KeyUsage')} of spec {spec}, not for SIGN_VERIFY of spec ECC_SECG_P256K1"
        )
    try:
        return KmsSigner(client, answer["KeyId"], _public_key(answer["PublicKey"]))
    except (KeyError, ValueError):
        raise refuse("AWS KMS answered with something that is no public key of secp256k1") from None


def _public_key(encoded: bytes) -> coincurve.PublicKey:
    """The public key in a SubjectPublicKeyInfo.

    DER has one encoding for a value, and all of it but the point is the same for every key of this curve: it is
    compared whole, so nothing is parsed.

    Raises:
        ValueError: it is none of this curve.
    """
    point = encoded[-_POINT_BYTES:]
    content = der.EC_ALGORITHM_IDENTIFIER + der.encode_bit_string(point)
    if encoded != bytes([der.SEQUENCE_TAG]) + der.encode_length(len(content)) + content:
        raise ValueError
    return coincurve.PublicKey(point)


@contextlib.contextmanager
def _failures(operation: str, failed: Callable[[str], Exception]) -> Iterator[None]:
    """Turn what boto3 raises into our own error, with a code or a type's name only: its messages may quote headers."""
    from botocore.exceptions import ClientError  # type: ignore[import-untyped] # noqa: PLC0415

    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "an error")
        raise failed(f"AWS KMS answered {operation} with {code}") from None
    except Exception as error:  # noqa: BLE001 - boto3's own, and what it trips over where an answer is not AWS's
        raise failed(f"AWS KMS gave no usable answer to {operation}: {type(error).__name__}") from None
