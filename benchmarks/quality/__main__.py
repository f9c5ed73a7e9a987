"""`python -m benchmarks.quality`; its flags are the fields of `command.Quality`."""

import sys

from benchmarks.quality import COMMAND, PROGRAM
from server.cli import run

if __name__ == "__main__":
    raise SystemExit(run(COMMAND, PROGRAM, sys.argv[1:]))
