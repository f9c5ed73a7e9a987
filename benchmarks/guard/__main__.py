"""`python -m benchmarks.guard`; its flags are the fields of `command.Guard`."""

import sys

from benchmarks.guard import COMMAND, PROGRAM
from server.cli import run

if __name__ == "__main__":
    raise SystemExit(run(COMMAND, PROGRAM, sys.argv[1:]))
