"""`python -m benchmarks.speed`; its flags are the fields of `command.Speed`."""

import sys

from benchmarks.speed import COMMAND, PROGRAM
from server.cli import run

if __name__ == "__main__":
    raise SystemExit(run(COMMAND, PROGRAM, sys.argv[1:]))
