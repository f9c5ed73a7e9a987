"""pytest runs of a law, each on a path of its own: `python -m tests.engines.paths RUNS`.

RUNS is JSON: for each name the tests (as `-k` has them) and the environment that chooses the path. Kernels and oneDNN
choose once in a process, so each run is forked from this process, whose imports choose nothing yet and take longer than
the run. Prints a line of JSON a run: its name, pytest's exit status and what it printed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import IO, Any

import pytest
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig  # noqa: F401

import server.engines.embedded.core
import server.engines.embedded.model.loader  # noqa: F401

LAWS = "tests/engines/test_laws.py"


def main() -> None:
    for name, run in json.loads(sys.argv[1]).items():
        with tempfile.TemporaryFile("w+") as said:
            child = os.fork()
            if not child:
                _run(run, said)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            print(json.dumps({"name": name, "status": status, "said": said.read()}), flush=True)


def _run(run: dict[str, Any], said: IO[str]) -> None:
    """In the child, which ends with pytest's status."""
    status = 1
    try:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        os.environ.update(run["environment"])
        plugins = ["-p", "pytest_asyncio.plugin", "-p", "pytest_timeout", "--timeout", "800", "-p", "no:cacheprovider"]
        status = int(pytest.main(["-q", *plugins, LAWS, "-k", run["tests"]]))
        sys.stdout.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
