"""The `waterfall` command."""

import os
import signal
import sys


def main() -> None:
    """Run the command line."""
    # Importing it all takes a second, and what is left at the end a moment: Ctrl-C then has nothing to put away.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        from waterfall.cli.app import app  # noqa: PLC0415 - needs the server extra
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("waterfall"):
            raise
        sys.exit(f"{error.msg}: run `pip install 'waterfall-credits[server]'`")
    try:
        app()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
