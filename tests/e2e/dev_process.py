"""`waterfall dev` as a user starts it: a process in an empty folder."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

WATERFALL = Path(sys.executable).with_name("waterfall")
# A user has set none of ours.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("WATERFALL_")}


class DevProcess:
    """A running `waterfall dev` and what it says of itself."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self.process = process
        self.facts = json.loads((folder / ".waterfall/dev.json").read_text())

    def command(self, *arguments: str, fails: bool = False) -> str:
        """Run the command line in the same folder; what it printed."""
        done = subprocess.run(
            [WATERFALL, *arguments],
            cwd=self.folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=30)

    def children(self) -> set[int]:
        """Processes that work in this folder, besides the command itself: they started there."""
        return processes_in(self.folder) - {self.process.pid}


def processes_in(folder: Path) -> set[int]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
            if (process / "cwd").readlink() == folder and b"Z" not in state_of(process):
                found.add(int(process.name))
    return found


def state_of(process: Path) -> bytes:
    return (process / "stat").read_bytes().rpartition(b") ")[2].split()[0]


@contextlib.contextmanager
def waterfall_dev(folder: Path, *arguments: str, seconds: float = 60) -> Iterator[DevProcess]:
    written = folder / ".waterfall/dev.json"
    written.unlink(missing_ok=True)  # one that was killed leaves it behind
    command = [WATERFALL, "dev", "--port", "0", *arguments]
    with (folder / "dev.out").open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=output, stderr=output)
    try:
        end = time.monotonic() + seconds
        while not written.exists():
            assert process.poll() is None, (folder / "dev.out").read_text()
            assert time.monotonic() < end, "not up in time: " + (folder / "dev.out").read_text()
            time.sleep(0.05)
        yield DevProcess(folder, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def wait_until(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)
