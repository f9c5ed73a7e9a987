"""Where the time of one decode step goes: `python profile_step.py OPTIONS` prints milliseconds by part as JSON.

Runs the engine as it is, with a clock around the methods that do a step's parts. "edit" is the editor's time without
the LM head's, "rest" what is left of the step: scheduling, text, chunks.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median
from typing import Any

from server.control.params import ControlParams
from server.engines.embedded import core as core_module
from server.engines.embedded.core import EngineCore
from server.engines.embedded.heads import load_registry
from server.engines.embedded.model.loader import load_model
from server.types import GenerationChunk, GenerationRequest, SamplingParams

_WARM_STEPS = 8
PARTS = ("layers", "LM head", "edit", "draw", "rest", "step")


class _Clock:
    """Milliseconds in each of some methods, step by step."""

    def __init__(self) -> None:
        self.spent_ms: dict[str, float] = {}
        self._replaced: list[tuple[Any, str, Any]] = []

    def watch(self, owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)
        self._replaced.append((owner, method, original))

        def timed(*args: Any, **kwargs: Any) -> Any:
            started_s = time.perf_counter()
            result = original(*args, **kwargs)
            self.spent_ms[name] = self.spent_ms.get(name, 0.0) + 1000 * (time.perf_counter() - started_s)
            return result

        setattr(owner, method, timed)

    def restore(self) -> None:
        for owner, method, original in self._replaced:
            setattr(owner, method, original)


def profile(options: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By the heads that rows use in turns, joined by commas ("" for none): the median of each of PARTS."""
    loaded = load_model(options["model"], device=options["device"], dtype=options["dtype"])
    registry = load_registry(None, loaded)
    core = EngineCore(loaded, registry, max_batch_size=options["rows"], max_model_len=options["max_len"])
    result = {}
    for heads in options["heads"]:
        _start(core, options, heads)
        for _ in range(_WARM_STEPS):
            core.step()
        steps = [_step(core) for _ in range(options["steps"])]
        result[",".join(heads)] = {part: median(step[part] for step in steps) for part in PARTS}
        core.abort_all()
    return result


def _start(core: EngineCore, options: dict[str, Any], heads: list[str]) -> None:
    def drop(chunk: GenerationChunk) -> None:
        del chunk

    for row, prompt in enumerate(options["prompts"]):
        control = ControlParams.for_head(heads[row % len(heads)]) if heads else None
        sampling = SamplingParams(max_tokens=_WARM_STEPS + options["steps"] + 1, seed=row, ignore_eos=True)
        core.add(core.sequences(GenerationRequest(f"row-{row}", tuple(prompt), sampling, control), drop))


def _step(core: EngineCore) -> dict[str, float]:
    clock = _Clock()
    clock.watch(core.runner, "forward", "layers")
    clock.watch(core.lm_head, "project", "LM head")
    clock.watch(core.editor, "logits", "edit")
    clock.watch(core_module, "sample", "draw")
    clock.watch(core, "step", "step")
    core.step()
    clock.restore()
    spent_ms = clock.spent_ms
    spent_ms["edit"] -= spent_ms["LM head"]
    spent_ms["rest"] = spent_ms["step"] - sum(spent_ms[part] for part in ("layers", "LM head", "edit", "draw"))
    return spent_ms


if __name__ == "__main__":
    print(json.dumps(profile(json.loads(sys.argv[1]))))
