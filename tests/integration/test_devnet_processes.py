"""Children end with us, however we end; and none of them writes to our terminal."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from waterfall.devnet.processes import Child, ProcessFailed
from waterfall.errors import SettingsError

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]

# Starts a child and waits to be killed.
PARENT = """
import asyncio, sys
from pathlib import Path
from waterfall.devnet.processes import Child

async def main():
    child = Child("child", sys.argv[2:], Path(sys.argv[1]))
    child.start()
    await child.wait_for(lambda: "up" in child.log_tail() or None, seconds=20)
    print(child.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def is_up(child):
    return lambda: "up" in child.log_tail() or None


def alive(pid):
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def spawn(*command, **options):
    return subprocess.Popen(command, text=True, **options)


def parent_of(folder, command):
    """A process of ours that has started a child; and the child's id."""
    parent = spawn(sys.executable, "-c", PARENT, str(folder), *command, stdout=subprocess.PIPE)
    return parent, int(parent.stdout.readline())


def kill(parent):
    parent.kill()
    parent.wait()
    parent.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next start cleans up")
def test_child__parent_killed__gets_sigterm(tmp_path):
    told = tmp_path / "told"
    script = f"""
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path({str(told)!r}).write_text("SIGTERM")
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(600)
"""
    parent, pid = parent_of(tmp_path, [sys.executable, "-c", script])
    kill(parent)
    wait_until(lambda: not alive(pid))
    assert told.read_text() == "SIGTERM"


async def test_child__started__leads_its_own_session(tmp_path):
    child = Child("child", SLEEP, tmp_path)
    child.start()
    try:
        await child.wait_for(is_up(child), seconds=20)
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
    finally:
        await child.stop()


async def test_child__writes__only_to_its_log(tmp_path, capfd):
    child = Child(
        "child", [sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr)"], tmp_path
    )
    child.start()
    with pytest.raises(ProcessFailed):
        await asyncio.wait_for(child.watch(), 20)
    await child.stop()
    assert sorted(child.log_tail().split()) == ["err", "out"]
    assert capfd.readouterr() == ("", "")


async def test_child__dies_early__error_shows_the_end_of_its_log(tmp_path):
    script = "import sys; [print('line', n, flush=True) for n in range(100)]; sys.exit('no such port')"
    child = Child("child", [sys.executable, "-c", script], tmp_path)
    child.start()
    with pytest.raises(ProcessFailed, match="child ended with code 1") as failed:
        await child.wait_for(lambda: None, seconds=20)
    await child.stop()
    assert "no such port" in str(failed.value)
    assert "line 99" in str(failed.value)
    assert "line 1\n" not in str(failed.value)
    assert str(child.log) in str(failed.value)


async def test_child__not_ready_in_time__says_so(tmp_path):
    child = Child("child", SLEEP, tmp_path)
    child.start()
    try:
        with pytest.raises(ProcessFailed, match=r"was not ready within 0\.1 seconds"):
            await child.wait_for(lambda: None, seconds=0.1)
    finally:
        await child.stop()


async def test_stop__child_ignores_sigterm__is_killed(tmp_path):
    child = Child("child", STUBBORN, tmp_path)
    child.start()
    await child.wait_for(is_up(child), seconds=20)
    pid = child.pid
    await child.stop(seconds=0.2)
    assert not alive(pid)
    assert child.pid is None
    assert [path.name for path in tmp_path.iterdir()] == ["child.log"]


async def test_stop__twice_or_never_started__does_nothing(tmp_path):
    child = Child("child", SLEEP, tmp_path)
    await child.stop()
    child.start()
    await child.stop()
    await child.stop()
    assert child.pid is None


async def test_start__left_over_child__is_ended_first(tmp_path):
    # As where the kernel does not end children: its parent is gone, its id is in the file.
    script = (
        "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True, stdout=2).pid)"
    )
    starter = spawn(sys.executable, "-c", script, *SLEEP, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    pid = int(starter.communicate(timeout=20)[0])
    assert alive(pid)
    (tmp_path / "child.pid").write_text(f"{pid} {starter.pid}\n")
    child = Child("child", SLEEP, tmp_path)
    child.start()
    try:
        assert not alive(pid)
        await child.wait_for(is_up(child), seconds=20)
    finally:
        await child.stop()


async def test_start__pid_of_somebody_else__is_left_alone(tmp_path):
    other = spawn(sys.executable, "-c", "input()", stdin=subprocess.PIPE)
    (tmp_path / "child.pid").write_text(f"{other.pid} 1\n")
    child = Child("child", SLEEP, tmp_path)
    child.start()
    await child.stop()
    assert alive(other.pid)
    other.communicate("\n", timeout=20)


def test_start__folder_of_a_running_process__is_refused(tmp_path):
    parent, pid = parent_of(tmp_path, SLEEP)
    try:
        with pytest.raises(SettingsError, match=f"process {parent.pid} is using"):
            Child("child", SLEEP, tmp_path).start()
        assert alive(pid)
    finally:
        kill(parent)


def test_start__not_the_main_thread__is_refused(tmp_path):
    errors = []

    def start():
        try:
            Child("child", SLEEP, tmp_path).start()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]


async def test_watch__child_killed__names_the_signal(tmp_path):
    child = Child("child", SLEEP, tmp_path)
    child.start()
    await child.wait_for(is_up(child), seconds=20)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ProcessFailed, match="was ended by SIGKILL"):
        await asyncio.wait_for(child.watch(), 20)
    await child.stop()
