"""Run several `ape` commands in one process, as ape takes a second or two to start.

Reads a list of argument lists from standard input and prints, for each, what it exits with and prints.
"""

import json
import sys

from ape._cli import cli
from click.testing import CliRunner

results = []
for arguments in json.load(sys.stdin):
    result = CliRunner(mix_stderr=False).invoke(cli, arguments)
    results.append(
        {"exit_code": result.exit_code, "out": result.stdout, "err": result.stderr or repr(result.exception)}
    )
json.dump(results, sys.stdout)
