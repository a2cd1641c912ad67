"""Child processes that do not outlive us.

On Linux the kernel ends them when we end, even by SIGKILL (see guard.py). Elsewhere a file holds the child's
process id, and the next start in the same folder ends what was left over.
"""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from waterfall.devnet import guard
from waterfall.errors import SettingsError, WaterfallError

_POLL_SECONDS = 0.01
_WATCH_SECONDS = 0.2
_KILL_SECONDS = 5
_LOG_LINES = 20

T = TypeVar("T")


class ProcessFailed(WaterfallError):
    """{process} {problem}. The end of {log}:{tail}"""  # noqa: D415 - the docstring is the message

    code = "process_failed"


class Child:
    """One child process; its output goes to a file.

    It leads a session of its own, so that Ctrl-C in a terminal reaches only us and we stop children in order.
    """

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Describe the child.

        Args:
            name: for people and file names.
            command: absolute path of the program, and its arguments.
            folder: where `<name>.log` (of the last start) and `<name>.pid` are.
            environment: variables it has beyond ours.
        """
        self.name = name
        self.log = folder / f"{name}.log"
        self._command = list(command)
        self._environment = dict(environment or {})
        self._pid_file = folder / f"{name}.pid"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def code(self) -> int | None:
        """Exit code once it has ended; negative: the signal that ended it."""
        return self._process.poll() if self._process else None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start it. Main thread only: the kernel ends children when the thread that started them ends.

        Raises:
            SettingsError: the folder is in use by another process of ours.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                f"{self.name} must be started from the main thread, which lives as long as we do"
            )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._end_leftover()
        command = self._command
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *command]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the command is the caller's
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self._environment},
            )
        self._pid_file.write_text(f"{self._process.pid} {os.getpid()}\n")

    async def wait_for(self, ready: Callable[[], T | None], *, seconds: float) -> T:
        """Poll until `ready` gives something.

        Raises:
            ProcessFailed: the child ended, or was not ready in time.
        """
        try:
            async with asyncio.timeout(seconds):
                while (result := ready()) is None:
                    self._check()
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise self._failed(f"was not ready within {seconds:g} seconds") from None
        return result

    async def watch(self) -> NoReturn:
        """Wait for the child to end, which it should not.

        Raises:
            ProcessFailed: it has ended.
        """
        while True:
            self._check()
            await asyncio.sleep(_WATCH_SECONDS)

    async def stop(self, *, seconds: float = 10) -> None:
        """End it: SIGTERM, and SIGKILL after `seconds`. Does nothing when it is not running."""
        if self.pid is not None:
            self.signal(signal.SIGTERM)
            if not await self._ended(seconds):
                self.signal(signal.SIGKILL)
                await self._ended(_KILL_SECONDS)
        if self._process is not None:
            self._pid_file.unlink(missing_ok=True)
            self._process = None

    def log_tail(self) -> str:
        """The last lines of its log."""
        try:
            lines = self.log.read_text("utf-8", "replace").rstrip().splitlines()
        except OSError:
            lines = []
        return "\n".join(lines[-_LOG_LINES:])

    def _check(self) -> None:
        if self._process is None:
            raise self._failed("is not running")
        code = self._process.poll()
        if code is not None:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise self._failed(how)

    def _failed(self, problem: str) -> ProcessFailed:
        tail = "".join(f"\n  {line}" for line in self.log_tail().splitlines()) or " (nothing)"
        return ProcessFailed(process=self.name, problem=problem, log=self.log, tail=tail)

    def signal(self, number: signal.Signals) -> None:
        """Signal the child and all that it started; it is not reaped, so its id is its own."""
        pid = self.pid
        if pid is not None:
            os.killpg(pid, number)

    async def _ended(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while self.pid is not None:
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            return False
        return True

    def _end_leftover(self) -> None:
        """End what an earlier process of ours has left running here.

        Raises:
            SettingsError: that process still runs.
        """
        try:
            pid, parent = map(int, self._pid_file.read_text().split())
        except (OSError, ValueError):
            return
        if not self._is_ours(pid):
            return
        if _ps(pid, "ppid") == str(parent):
            raise SettingsError(
                reason=f"process {parent} is using {self.log.parent}: stop it first, or choose another folder"
            )
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                return
            for _ in range(int(_KILL_SECONDS / _POLL_SECONDS)):
                if not self._is_ours(pid):
                    return
                threading.Event().wait(_POLL_SECONDS)

    def _is_ours(self, pid: int) -> bool:
        """Whether a process runs this child's command: a process id alone may have gone to somebody else."""
        return " ".join(self._command[1:]) in _ps(pid, "command")


def _ps(pid: int, column: str) -> str:
    try:
        return subprocess.run(  # noqa: S603
            ["ps", "-ww", "-o", f"{column}=", "-p", str(pid)],  # noqa: S607 - where ps is differs
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except FileNotFoundError:
        return ""
