"""`waterfall keystore` at a terminal."""

import os
import pty
import signal
import subprocess
import termios

from dev_process import ENVIRONMENT, WATERFALL, wait_until


def test_new__interrupted_at_the_prompt__leaves_the_terminal_as_it_was(tmp_path):
    controller, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    process = subprocess.Popen(
        [WATERFALL, "keystore", "new", "gas.json"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,  # without another terminal to ask at
    )
    try:
        wait_until(lambda: not termios.tcgetattr(terminal)[3] & termios.ECHO)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert termios.tcgetattr(terminal) == before
    finally:
        process.kill()
        process.wait()
        os.close(controller)
        os.close(terminal)
    assert not list(tmp_path.iterdir())
