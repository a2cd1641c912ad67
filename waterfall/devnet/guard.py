"""Turns into another program, which gets SIGTERM when this one's parent ends. Linux only.

    python guard.py PARENT COMMAND …

A program of its own, because a process with threads may not run Python between fork and exec. The parent is
the *thread* that started this. Source: PR_SET_PDEATHSIG(2const).
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask the kernel for the signal, then turn into the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit(f"process {parent} ended before {command[0]} could start")
    # Python ignores these, and what is ignored stays ignored in the command.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    os.execv(command[0], command)  # noqa: S606 - the command is the caller's


if __name__ == "__main__":
    main()
