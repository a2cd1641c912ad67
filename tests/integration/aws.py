"""AWS KMS as moto plays it, but for one thing: moto hashes a digest once more, where AWS signs it (getmoto/moto#10202)."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Self

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from moto.core.request import Request
from moto.kms.models import kms_backends
from moto.kms.responses import KmsResponse
from moto.kms.utils import ECDSAPrivateKey
from werkzeug import Response
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server

from waterfall.signers import LocalSigner

REGION = "eu-central-1"
ACCOUNT = "123456789012"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIATESTINGTESTING00",
    "AWS_SECRET_ACCESS_KEY": "aws/secret/of/the/tests/0123456789+",
    "AWS_SESSION_TOKEN": "aws-session-token-of-the-tests",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}

_is_digest: ContextVar[bool] = ContextVar("_is_digest", default=False)


@contextlib.contextmanager
def digests_signed_as_they_are(monkeypatch) -> Iterator[None]:
    """What AWS does with `MessageType=DIGEST`."""
    respond, sign = KmsResponse.sign, ECDSAPrivateKey.sign

    def responding(self):
        token = _is_digest.set(self._get_param("MessageType") == "DIGEST")
        try:
            return respond(self)
        finally:
            _is_digest.reset(token)

    def signing(self, message, signing_algorithm):
        if not _is_digest.get():
            return sign(self, message, signing_algorithm)
        return self.private_key.sign(message, ec.ECDSA(utils.Prehashed(hashes.SHA256())))

    with monkeypatch.context() as patch:
        patch.setattr(KmsResponse, "sign", responding)
        patch.setattr(ECDSAPrivateKey, "sign", signing)
        yield


def make_key(client, spec: str = "ECC_SECG_P256K1", usage: str = "SIGN_VERIFY") -> dict:
    return client.create_key(KeySpec=spec, KeyUsage=usage)["KeyMetadata"]


def held_by_aws(key_id: str) -> LocalSigner:
    """The same key in memory, which real AWS gives to nobody."""
    private = kms_backends[ACCOUNT][REGION].keys[key_id].private_key.private_key
    return LocalSigner(private.private_numbers().private_value.to_bytes(32, "big"))


class Server:
    """KMS over real HTTP, in threads of this process. moto's own server would want Flask for it."""

    port = 0

    def __enter__(self) -> Self:
        kms_backends.reset()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serve, on the same port as before."""
        self._server = make_server("127.0.0.1", self.port, _respond, threaded=True)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """Take no connection any more."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Received(Request):
    from_wsgi_server = True


def _respond(environ: dict, start_response: Callable) -> Iterable[bytes]:
    request = _Received(environ)
    try:
        status, headers, body = KmsResponse.dispatch(request, request.url, request.headers)
    except HTTPException as refusal:  # a moto error is one of werkzeug's
        return refusal(environ, start_response)
    return Response(body, status, headers)(environ, start_response)
