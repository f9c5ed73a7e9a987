"""`python -m benchmarks.roads`; its flags are the fields of `command.Roads`."""

import sys

from benchmarks.roads import COMMAND, PROGRAM
from server.cli import run

if __name__ == "__main__":
    raise SystemExit(run(COMMAND, PROGRAM, sys.argv[1:]))
