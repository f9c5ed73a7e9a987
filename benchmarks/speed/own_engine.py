"""Looks into our own engine: where the time of one decode step goes, and what weights of fewer bits cost in likelihood.

Each runs in a process of its own, `python -m benchmarks.speed.own_engine LOOK OPTIONS`, whose answer is its last line
as JSON. Enter at `profile` and `quantization_loss`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.peers import PEERS, child_env
from benchmarks.speed.process import PeerError
from benchmarks.speed.setup import Setup, Workload
from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines.embedded import drawing
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import load_model
from server.engines.heads import HeadSource
from server.kernels.linear import Bits
from server.types import GenerationChunk, GenerationRequest, SamplingParams

PARTS = ("layers", "LM head", "edit", "draw", "rest", "step")
"""Of a step. "edit" is the editor's time without the LM head's, "rest" what is left: scheduling, text, chunks."""
_KERNELS = {"torch's operations": "torch", "native kernels": ""}
"""Ways to compute a step, by what RECONTROL_KERNELS says."""
_TIMEOUT_S = 1800
_WARM_STEPS = 8
_STEPS = 40
_TEXTS = 48


def profile(setup: Setup, workload: Workload, *, rows: int) -> dict[str, Any]:
    """By way and by heads in use: milliseconds of a step's parts at `rows` rows. Raises PeerError."""
    heads = [[], list(setup.heads[:1]), list(setup.heads[:3])]
    options = {
        **setup.load_options(),
        "rows": rows,
        "steps": _STEPS,
        "heads": [names for number, names in enumerate(heads) if names or not number],
        "prompts": workload.prompts(rows, "profile"),
    }
    ways = {name: _look(setup, "profile", options, kernels) for name, kernels in _KERNELS.items()}
    return {"rows": rows, "parts_ms": ways}


def quantization_loss(setup: Setup, workload: Workload) -> dict[str, Any]:
    """Of 8 and 4 bits, in nats a token. Raises PeerError."""
    prompts = workload.prompts(_TEXTS, "quantization")
    options = {**setup.load_options(), "prompts": prompts, "new_tokens": workload.new_tokens}
    return _look(setup, "quantization", options, "")


def step_parts_ms(options: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By the heads that rows use in turns, joined by commas ("" for none): the median of each of PARTS over steps.

    The engine runs as it is, with a clock around the methods that do a step's parts.
    """
    loaded = load_model(options["model"], device=options["device"], dtype=options["dtype"])
    heads_dir = options["heads_dir"]
    registry = HeadSource.of(Path(heads_dir) if heads_dir else None, loaded.identity).load(loaded.model.device)
    core = EngineCore(loaded, registry, max_batch_size=options["rows"], max_model_len=options["max_len"])
    result = {}
    for heads in options["heads"]:
        _start(core, options, heads)
        for _ in range(_WARM_STEPS):
            core.step()
        steps = [timed_step_ms(core) for _ in range(options["steps"])]
        result[",".join(heads)] = {part: median(step[part] for step in steps) for part in PARTS}
        core.abort_all()
    return result


def timed_step_ms(core: EngineCore) -> dict[str, float]:
    """One step, by PARTS."""
    clock = _Clock()
    clock.watch(core.runner, "forward", "layers")
    clock.watch(core.lm_head, "project", "LM head")
    clock.watch(core.editor, "logits", "edit")
    clock.watch(drawing, "sample", "draw")
    clock.watch(core, "step", "step")
    core.step()
    clock.restore()
    spent_ms = clock.spent_ms
    spent_ms["edit"] -= spent_ms["LM head"]
    spent_ms["rest"] = spent_ms["step"] - sum(spent_ms[part] for part in ("layers", "LM head", "edit", "draw"))
    return spent_ms


def losses(options: dict[str, Any]) -> dict[str, Any]:
    """What 8 and 4 bits cost in likelihood, in nats: means over all tokens.

    The model draws texts in 16 bits. At each of their tokens the distribution in fewer bits is compared with the one in
    16: the divergence KL(16 bits || fewer), and how much less likely the drawn token has become.
    """
    plain = _core(options, 16)
    texts = [_text(plain, prompt, row, options["new_tokens"]) for row, prompt in enumerate(options["prompts"])]
    pairs = list(zip(options["prompts"], texts, strict=True))
    result: dict[str, Any] = {"num_tokens": sum(map(len, texts))}
    for bits in (8, 4):
        fewer = _core(options, bits)
        kl, loss = [], []
        for prompt, text in pairs:
            before_TV, after_TV = (_log_probs(core, prompt, text) for core in (plain, fewer))
            kl += (before_TV.exp() * (before_TV - after_TV)).sum(dim=-1).tolist()
            drawn_T1 = torch.tensor(text)[:, None]
            loss += (before_TV.gather(1, drawn_T1) - after_TV.gather(1, drawn_T1))[:, 0].tolist()
        result[str(bits)] = {"kl_nats": mean(kl), "nll_increase_nats": mean(loss)}
    return result


_LOOKS = {"profile": step_parts_ms, "quantization": losses}


def _look(setup: Setup, name: str, options: dict[str, Any], kernels: str) -> dict[str, Any]:
    python = Path(sys.executable)
    env = {**os.environ, **child_env(PEERS["recontrol"], setup, python), "RECONTROL_KERNELS": kernels}
    command = [str(python), "-m", __name__, name, json.dumps(options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise PeerError(f"the look at {name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


class _Clock:
    """Milliseconds in each of some methods."""

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


def _start(core: EngineCore, options: dict[str, Any], heads: list[str]) -> None:
    def drop(chunk: GenerationChunk) -> None:
        del chunk

    for row, prompt in enumerate(options["prompts"]):
        control = ControlParams.for_head(heads[row % len(heads)]) if heads else None
        sampling = SamplingParams(max_tokens=_WARM_STEPS + options["steps"] + 1, seed=row, ignore_eos=True)
        request = GenerationRequest(f"row-{row}", tuple(prompt), sampling, control)
        core.check(request)
        core.add(core.sequences(request, drop))


def _core(options: dict[str, Any], bits: Bits) -> EngineCore:
    loaded = load_model(options["model"], device="cpu", dtype="bfloat16")
    return EngineCore(loaded, HeadRegistry({}), max_batch_size=1, max_model_len=options["max_len"], bits=bits)


def _text(core: EngineCore, prompt: list[int], seed: int, num_tokens: int) -> list[int]:
    chunks: list[GenerationChunk] = []
    sampling = SamplingParams(max_tokens=num_tokens, seed=seed, ignore_eos=True)
    core.add(core.sequences(GenerationRequest("text", tuple(prompt), sampling), chunks.append))
    while core.has_work:
        core.step()
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


@torch.inference_mode()
def _log_probs(core: EngineCore, prompt: list[int], text: list[int]) -> Tensor:
    """[T, V] float64 behind each of the text's tokens."""
    states_TD = core.states([*prompt, *text[:-1]])[len(prompt) - 1 :]
    return core.lm_head.logits(states_TD).double().log_softmax(dim=-1)


if __name__ == "__main__":
    print(json.dumps(_LOOKS[sys.argv[1]](json.loads(sys.argv[2]))))
