"""Failpoints: they kill where they are told to, and nowhere else."""

import os
import signal
import subprocess
import sys

import pytest

SCRIPT = "from waterfall.failpoints import failpoint\nfor name in {names}: failpoint(name); print(name)"


def run(names, **environment):
    script = SCRIPT.format(names=names)
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_failpoint__not_named__does_nothing():
    ran = run(["lane.planned", "lane.mined"])

    assert (ran.returncode, ran.stdout.split()) == (0, ["lane.planned", "lane.mined"])


def test_failpoint__named__kills_there():
    ran = run(["lane.planned", "lane.mined"], WATERFALL_FAILPOINT="lane.mined")

    assert ran.returncode == -signal.SIGKILL
    assert "lane.mined" not in ran.stdout


def test_failpoint__named_for_the_third_pass__lets_two_pass():
    assert run(["lane.mined"] * 2, WATERFALL_FAILPOINT="lane.mined:3").returncode == 0
    assert run(["lane.mined"] * 3, WATERFALL_FAILPOINT="lane.mined:3").returncode == -signal.SIGKILL


def test_failpoint__freeze__stands_still_there_once_and_goes_on():
    script = SCRIPT.format(names=["lane.mined"] * 3)
    environment = {**os.environ, "WATERFALL_FAILPOINT": "lane.mined:2:freeze"}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate()
    assert (process.returncode, said.split()) == (0, [b"lane.mined"] * 3)


@pytest.mark.parametrize("value", ["lane", "lane.mined:x", "lane.mined:-1", "lane.mined:1:wait"])
def test_failpoint__unknown__is_refused_at_start(value):
    ran = run([], WATERFALL_FAILPOINT=value)

    assert ran.returncode == 1
    assert "WATERFALL_FAILPOINT" in ran.stderr
