"""`python -m benchmarks.pinned`; its flags are the fields of `command.Pinned`."""

import sys

from benchmarks.pinned import COMMAND, PROGRAM
from server.cli import run

if __name__ == "__main__":
    raise SystemExit(run(COMMAND, PROGRAM, sys.argv[1:]))
