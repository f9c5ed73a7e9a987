"""`python -m benchmarks.dialogues`; its flags are the fields of `command.Dialogues`."""

import sys

from benchmarks.dialogues import COMMAND, PROGRAM
from server.cli import run

if __name__ == "__main__":
    raise SystemExit(run(COMMAND, PROGRAM, sys.argv[1:]))
