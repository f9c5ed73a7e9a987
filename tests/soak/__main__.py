"""`python -m tests.soak`; its flags are the fields of `command.Soak`."""

import sys

from server.cli import run
from tests.soak import COMMAND, PROGRAM

if __name__ == "__main__":
    raise SystemExit(run(COMMAND, PROGRAM, sys.argv[1:]))
