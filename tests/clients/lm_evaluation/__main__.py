"""`python -m tests.clients.lm_evaluation`; its flags are the fields of `command.LmEvaluation`."""

import sys

from server.cli import run
from tests.clients.lm_evaluation import COMMAND, PROGRAM

if __name__ == "__main__":
    raise SystemExit(run(COMMAND, PROGRAM, sys.argv[1:]))
