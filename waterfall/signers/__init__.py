"""Keys that sign: one small protocol, whatever holds the key.

A signer never shows its key: not in repr, logs, errors or a pickle.

Sign with `await signature_of(signer, digest)` on an event loop: a key in AWS KMS is tens of milliseconds away, and
nothing else runs on the loop meanwhile if it is asked there. `signer.sign(digest)` is for code that may wait: scripts,
threads, tests.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

from waterfall.signers.keystore import from_keystore, new_keystore
from waterfall.signers.kms import AT_ONCE, KmsSigner, from_kms
from waterfall.signers.local import LocalSigner, address_of, from_environment, from_hex

__all__ = [
    "KmsSigner",
    "LocalSigner",
    "Signer",
    "address_of",
    "from_environment",
    "from_hex",
    "from_keystore",
    "from_kms",
    "new_keystore",
    "signature_of",
]

# Threads of their own: while KMS does not answer, the loop's default ones still resolve names and read files.
_THREADS = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="signer")


@runtime_checkable
class Signer(Protocol):
    """Something that signs 32-byte digests with one secp256k1 key."""

    @property
    def address(self) -> str:
        """Ethereum address, lower case."""

    def sign(self, digest: bytes) -> bytes:
        """Sign a digest: 65 bytes r ‖ s ‖ v, low s, v 27 or 28. May wait for a network: see `signature_of`.

        Raises:
            SignerUnavailable: what holds the key gave no signature; the same digest may be tried again.
        """


async def signature_of(signer: Signer, digest: bytes) -> bytes:
    """A signature, without blocking the event loop: at once with a key in this process, in a thread otherwise.

    Raises:
        SignerUnavailable: what holds the key gave no signature; the same digest may be tried again.
    """
    if isinstance(signer, LocalSigner):  # 26 µs: less than it costs to change threads
        return signer.sign(digest)
    return await asyncio.get_running_loop().run_in_executor(_THREADS, signer.sign, digest)
