"""`python -m benchmarks.judges`; its flags are the fields of `command.Judges`."""

import sys

from benchmarks.judges import COMMAND, PROGRAM
from server.cli import run

if __name__ == "__main__":
    raise SystemExit(run(COMMAND, PROGRAM, sys.argv[1:]))
