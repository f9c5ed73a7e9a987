"""An instruction as the objective beside the same instruction in the prompt and distilled into a head.

python -m benchmarks.guidance --out benchmarks/results/guidance.json --into docs/quality.md

Every arm answers the same held-out chat prompts with the same seeds. The reward is VADER's sentiment, so the
instruction should ask for cheer; two judges that nothing here is fitted to score the same texts. The instruction in the
prompt is the objective at weight 1 without a budget, which draws the very same tokens and knows their divergence
exactly. Then steps of rows that decode are timed, the arms in turn. Enter at `main`.

Shapes: P prompts, S responses to each.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.markdown import header, replace_sections, row, with_range
from benchmarks.speed.system import facts
from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.instructed import EngineInstructedSource
from server.engines.embedded.model.loader import load_model
from server.settings import DEFAULT_MODEL
from server.types import GenerationRequest, SamplingParams
from value_models.distillation import DistilSettings, distil_head, read_texts
from value_models.generations import EvalSample
from value_models.heads import ValueHead
from value_models.intervals import mean_interval
from value_models.metrics import EVAL_METRICS
from value_models.prompt_sets import RolloutPrompt, load_prompts, own_prompts_file, split_of
from value_models.rewards import REWARDS
from value_models.rollouts import RolloutSettings

SECTION = "bench-guidance"
INSTRUCTION = "Always answer in a very positive, cheerful way."
WEIGHTS = (1.0, 2.0, 4.0)
MAX_KL = 0.3
_PROMPTED = "instruction in the prompt"
_HEAD = "cheerful"
_REWARD = "positive"
_JUDGES = ("textblob_polarity", "afinn")
_DISTILLED_PROMPTS = 100
_ROWS, _WARM_STEPS, _TIMED_STEPS, _TURNS = 8, 4, 24, 5


def arms(instruction: str) -> dict[str, ControlParams | None]:
    """The control of each arm, by its name."""

    def following(weight: float, **objective: Any) -> ControlParams:
        told = {"type": "instruction", "text": instruction, "weight": weight, **objective}
        return ControlParams.model_validate({"objective": told, "max_kl": MAX_KL})

    head = {"weights": {_HEAD: 1.0}}
    return {
        "base": None,
        _PROMPTED: ControlParams.without_limits(following(1.0).objective, step_size=1.0, steps=1),
        **{f"guidance, weight {weight:g}": following(weight) for weight in WEIGHTS},
        "distilled head": ControlParams.model_validate({"objective": head, "max_kl": MAX_KL}),
        "guidance, weight 2, and the head": following(2.0, beside=head),
    }


def figures(
    samples: Iterable[EvalSample], base: Iterable[EvalSample], prompts: Sequence[RolloutPrompt]
) -> dict[str, Any]:
    """Of an arm: means over prompts with 95% intervals, and the share of texts that judges put above the base's."""
    texts = {prompt.id: prompt.text for prompt in prompts}
    kept, bare = (sorted(some, key=lambda s: (s.prompt_id, s.sample)) for some in (samples, base))
    asked = [texts[sample.prompt_id] for sample in kept]

    def table(numbers: Sequence[float]) -> np.ndarray:
        return np.array(numbers, dtype=float).reshape(len(texts), -1)

    def wins(judge: str) -> np.ndarray:
        scores, others = (EVAL_METRICS[judge](asked, [sample.response for sample in some]) for some in (kept, bare))
        return (table(scores) > table(others)) + 0.5 * (table(scores) == table(others))

    return {
        "reward": mean_interval(table(REWARDS[_REWARD](asked, [sample.response for sample in kept]))),
        "judged_better": mean_interval(sum(map(wins, _JUDGES), np.zeros(1)) / len(_JUDGES)),
        "kl": mean_interval(table([sample.mean_kl for sample in kept])),
        "diversity": mean_interval(table(EVAL_METRICS["diversity"](asked, [sample.response for sample in kept]))),
    }


def step_s(core: EngineCore, source: EngineInstructedSource, control: ControlParams | None) -> float:
    """Seconds of a step in which so many rows decode, each with its shadow where it follows an instruction."""
    prompt = RolloutPrompt(id="timed", prompt="Describe the weather in November.", format="chat")
    sampling = SamplingParams(max_tokens=_WARM_STEPS + _TIMED_STEPS + 8, ignore_eos=True, seed=0)
    request = GenerationRequest("timed", tuple(source.encode(prompt)), sampling, control, num_choices=_ROWS)
    sequences = core.sequences(source.guided(request, prompt, None), lambda _: None)
    core.add(sequences)
    while min(len(sequence.token_ids) for sequence in sequences) < _WARM_STEPS:
        core.step()
    started_s = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        core.step()
    taken_s = time.perf_counter() - started_s
    core.abort(sequences)
    return taken_s / _TIMED_STEPS


def measure(model: str, instruction: str, settings: RolloutSettings, num_prompts: int) -> dict[str, Any]:
    loaded = load_model(model)
    core = EngineCore(loaded, HeadRegistry({}), max_batch_size=32)
    source = EngineInstructedSource(loaded, core)
    chats = [prompt for prompt in load_prompts(own_prompts_file()) if prompt.format == "chat"]
    started_s = time.perf_counter()
    core.use(HeadRegistry({_HEAD: _distilled(source, chats, instruction)}))
    distilled_s = time.perf_counter() - started_s
    held_out = [prompt for prompt in chats if split_of(prompt.id) == "test"][:num_prompts]
    controls = arms(instruction)
    by_arm = {name: list(source.evaluate(held_out, settings, control=control)) for name, control in controls.items()}
    # To measure the instruction in the prompt takes two rows, and to use it one.
    timed = {name: control for name, control in controls.items() if name != _PROMPTED}
    turns = [{name: step_s(core, source, control) for name, control in timed.items()} for _ in range(_TURNS)]
    ratios = {name: statistics.median(turn[name] / turn["base"] for turn in turns) for name in timed}
    return {
        "num_prompts": len(held_out),
        "distilled_s": round(distilled_s, 1),
        "rows_timed": _ROWS,
        "arms": {
            name: figures(samples, by_arm["base"], held_out)
            | ({"step_ratio": round(ratios[name], 3)} if name in ratios else {})
            for name, samples in by_arm.items()
        },
    }


def _distilled(source: EngineInstructedSource, chats: Sequence[RolloutPrompt], instruction: str) -> ValueHead:
    settings = DistilSettings(max_prompts=_DISTILLED_PROMPTS)
    return distil_head(read_texts(source, chats, instruction, None, settings), source.output, settings).head


def table(result: Mapping[str, Any]) -> str:
    titles = ["arm", "reward", "judged better than the base", "KL, nats a token", "diversity", "time of a step"]
    lines = header(titles)
    for name, arm in result["arms"].items():
        reward, wins, kl = arm["reward"], arm["judged_better"], arm["kl"]
        ratio = f"{arm['step_ratio']:.2f}" if "step_ratio" in arm else "-"
        lines.append(
            row([name, with_range(reward), f"{wins['mean']:.0%}",
                 f"{kl['mean']:.3f}", f"{arm['diversity']['mean']:.2f}", ratio])
        )  # fmt: skip
    settings, system = result["settings"], result["system"]
    told = (
        f"{result['num_prompts']} held-out prompts, {settings['num_samples']} responses of at most "
        f"{settings['max_tokens']} tokens to each, `{result['instruction']}`, max_kl {MAX_KL:g}; steps of "
        f"{result['rows_timed']} rows, as a multiple of the base's."
    )
    return "\n".join([*lines, "", told, "", f"`{result['command']}`, {system['cpu']}, {system['date'][:10]}."])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guidance", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--instruction", default=INSTRUCTION)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--num-samples", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--into", type=Path, help=f"page with a section {SECTION}")
    args = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    settings = RolloutSettings(max_tokens=args.max_tokens, num_samples=args.num_samples, temperature=0.7, top_p=0.95)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.guidance", *given]),
        "model": Path(args.model).name,
        "instruction": args.instruction,
        "settings": settings.model_dump(),
        "system": facts(),
        **measure(args.model, args.instruction, settings, args.num_prompts),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.into is not None:
        replace_sections(args.into, {SECTION: table(result)})


if __name__ == "__main__":
    main()
