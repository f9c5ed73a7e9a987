"""One engine in a process of its own: `python main.py ENGINE.py` reads a command a line, and answers with a line.

ENGINE.py holds a class `Engine`: made with the options of `load`; `generate(prompts, new_tokens, seed, objectives)`
returns once every row has its tokens, as a dictionary with `num_tokens`; `facts()` describes it; `gpu_peak_bytes()` is
None where there is no GPU to ask. Commands are JSON objects whose `do` is load, generate, memory or stop; an answer
has `ok`, and an `error` where that is false. Libraries print what they like: their stdout is this process's stderr.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from typing import Any, TextIO


def main(engine_file: str) -> None:
    commands, answers = _take_channel()
    # The folder of this file comes first otherwise, and its modules would hide libraries.
    sys.path.pop(0)
    session = _Session(engine_file)
    for line in commands:
        command = json.loads(line)
        name = command.pop("do")
        try:
            answer = {"ok": True, **session.handle(name, command)}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if name == "stop":
            break
    # An engine's threads may not want to end; there is nothing left that they could do.
    os._exit(0)


class _Session:
    def __init__(self, engine_file: str) -> None:
        self._engine_file = engine_file
        self._engine: Any = None

    def handle(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        if name == "load":
            self._engine = _engine_class(self._engine_file)(options)
            return {"facts": self._engine.facts()}
        if name == "generate":
            started_s = time.perf_counter()
            result = self._engine.generate(**options)
            return {"seconds": time.perf_counter() - started_s, **result}
        if name == "memory":
            return {"gpu_peak_bytes": self._engine.gpu_peak_bytes()}
        if name == "stop":
            return {}
        raise ValueError(f"there is no command {name!r}")


def _take_channel() -> tuple[TextIO, TextIO]:
    """Commands and answers, on descriptors that no library and no child of this process knows."""
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return commands, answers


def _engine_class(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("bench_engine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Engine


if __name__ == "__main__":
    main(sys.argv[1])
