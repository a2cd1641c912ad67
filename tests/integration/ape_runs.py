"""Run several `ape` commands, each in a copy of one process that has imported ape, which takes a second or two.

Reads a list of argument lists from standard input and prints, for each, what it exits with and prints.
"""

import json
import multiprocessing
import sys

from ape import networks
from ape._cli import cli
from click.testing import CliRunner


def run(arguments):
    result = CliRunner(mix_stderr=False).invoke(cli, arguments)
    return {"exit_code": result.exit_code, "out": result.stdout, "err": result.stderr}


if __name__ == "__main__":
    run(["run", "deploy", "--help"])
    networks.get_provider_from_choice(
        "base:sepolia:http://127.0.0.1"
    )  # imports what it needs, connects to nothing
    # Ape's providers do not survive a command: each has a process of its own.
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        json.dump(pool.map(run, json.load(sys.stdin), chunksize=1), sys.stdout)
