"""`python -m benchmarks.self_pairs`: whether pairs of the model's own answers make a head that steers.

Heads of one aim are made on three roads: rollouts and a reward (the shipped `positive`), an instruction distilled
against its opposite, and pairs of the model's own answers after the two. On held-out chat prompts each moves every
token by the whole of a budget, so that all are compared at the same divergence. The reward and two judges that no head
was trained on tell what that did. Enter at `main`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.markdown import header, replace_sections, row
from benchmarks.speed.system import facts
from server.cli import main as recontrol
from server.cli.arms import ArmFactory
from server.cli.command import read_prompts
from server.control.params import MAX_STEP_SIZE, ControlParams
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import load_model
from server.engines.heads import HeadSource
from server.settings import DEFAULT_MODEL
from value_models.evaluation import Arm, Scoring, evaluate_arms
from value_models.files import write_text
from value_models.generations import GenerationStore
from value_models.prompt_sets import RolloutPrompt, in_mixed_order, split_of
from value_models.rollouts import RolloutSettings
from value_models.store import shipped_heads_folder

SECTION = "bench-self-pairs"
GOOD = "You are a cheerful assistant. Always answer in a very positive, happy and enthusiastic way."
BAD = "You are a gloomy assistant. Always answer in a very negative, sad and hopeless way."
REWARD, JUDGES = "positive", ("afinn", "textblob_polarity")
_SHOWN = ("reward", *JUDGES, "win_over_base", "kl", "nll", "diversity", "coherence")
_TITLES = {
    "reward": "reward",
    "afinn": "AFINN",
    "textblob_polarity": "TextBlob",
    "win_over_base": "judges' wins",
    "kl": "KL, nats a token",
    "nll": "NLL",
    "diversity": "diversity",
    "coherence": "coherence",
}


def make_heads(work: Path, num_pairs: int) -> dict[str, dict[str, Any]]:
    """All heads below `work/heads`, with the seconds that each took and its label."""
    heads = work / "heads"
    if not (heads / "rollouts").exists():
        shutil.copytree(shipped_heads_folder(DEFAULT_MODEL) / REWARD, heads / "rollouts")
        _rename(heads / "rollouts")
    pairs = work / f"pairs-{num_pairs}.jsonl"
    making = ["pairs", "--good", GOOD, "--bad", BAD, "--num-prompts", str(num_pairs), "--out", str(pairs)]
    training = ["train", "--pairs", str(pairs), "--max-tokens", "64", "--cut-long", "--name", "self-pairs"]
    distilling = ["train", "--instruction", GOOD, "--contrast", BAD, "--name", "instruction"]
    return {
        "rollouts": {"label": "rollouts and the reward (shipped)", "seconds": None},
        "instruction": {
            "label": "instruction against its opposite",
            "seconds": _run(heads / "instruction", [[*distilling, "--out", str(heads)]]),
        },
        "self-pairs": {
            "label": f"pairs of its own answers, {num_pairs} prompts",
            "seconds": _run(
                heads / "self-pairs", [[*making, "--work", str(work / "answers")], [*training, "--out", str(heads)]]
            ),
        },
    }


def _rename(folder: Path) -> None:
    """A head's card names it, and a registry knows it by its folder."""
    card = json.loads((folder / "card.json").read_text())
    write_text(folder / "card.json", json.dumps({**card, "name": folder.name}))


def _run(head: Path, commands: Sequence[Sequence[str]]) -> float:
    """What making a head took; one that was made by an earlier run says it in a file beside it."""
    timing = head.with_suffix(".seconds")
    if not timing.exists():
        started_s = time.perf_counter()
        for words in commands:
            if recontrol(words):
                raise RuntimeError(f"recontrol {shlex.join(words)} failed")
        write_text(timing, str(round(time.perf_counter() - started_s, 1)))
    return float(timing.read_text())


def test_prompts(number: int) -> list[RolloutPrompt]:
    chats = [prompt for prompt in read_prompts(None, ["chat"]) if split_of(prompt.id) == "test"]
    return in_mixed_order(chats)[:number]


def measure(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    made = make_heads(work, args.num_pairs)
    loaded = load_model(DEFAULT_MODEL)
    registry = HeadSource.of(str(work / "heads"), loaded.identity).load(loaded.model.device)
    sampling = RolloutSettings(max_tokens=args.max_tokens, seed=args.seed)
    factory = ArmFactory(loaded, EngineCore(loaded, registry, max_batch_size=32), sampling)
    arms: dict[str, Arm] = {"base": factory.base(), "prompting": factory.prompting(GOOD)}
    for head in made:
        for budget in args.budgets:
            # So long a step that the budget alone ends it, at every token.
            control = ControlParams.for_head(head, step_size=MAX_STEP_SIZE, max_kl=budget)
            arms[f"{head}@{budget:g}"] = factory.control(control)
    prompts = test_prompts(args.num_prompts)
    figures = evaluate_arms(
        arms,
        prompts,
        Scoring.load(REWARD, JUDGES),
        num_samples=args.num_samples,
        store=GenerationStore(work / "responses"),
        on_arm=_told(),
    )
    kept = {
        name: {metric: one[metric] for metric in _SHOWN if metric in one} | {"examples": one["examples"]}
        for name, one in figures.items()
    }
    return {"made": made, "num_prompts": len(prompts), "arms_of_self_pairs": kept}


def _told() -> Callable[[str, int], None]:
    return lambda name, count: print(f"{name}: {count} responses", file=sys.stderr, flush=True)


def table(result: Mapping[str, Any]) -> str:
    made, arms = result["made"], result["arms_of_self_pairs"]
    lines = header(["made of", *_TITLES.values()])
    for name, figures in arms.items():
        head, _, budget = name.partition("@")
        label = {"base": "no control", "prompting": "no control, the instruction before the prompt"}.get(name)
        cells = [f"{figures[metric]['mean']:.2f}" if metric in figures else "" for metric in _TITLES]
        if label is None:
            label = f"{made[head]['label']}, {budget} nats"
        lines.append(row([label, *cells]))
    system = result["system"]
    where = f"{result['num_prompts']} held-out chat prompts, {system['cpu']}, {result['threads']} threads"
    return "\n".join([*lines, "", f"`{result['command']}`, {where}, {system['date'][:10]}."])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.self_pairs", description=__doc__)
    parser.add_argument("--num-pairs", type=int, default=200, help="prompts that are answered after both instructions")
    parser.add_argument("--num-prompts", type=int, default=40, help="held-out chat prompts")
    parser.add_argument("--num-samples", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--budgets", type=lambda text: [float(x) for x in text.split(",")], default=[0.1, 0.3])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/self-pairs"), help="folder for heads and responses")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--into", type=Path, help=f"page with a section {SECTION}")
    args = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.self_pairs", *given]),
        "system": facts(),
        "threads": torch.get_num_threads(),
        "instructions": {"good": GOOD, "bad": BAD},
        **measure(args.work, args),
    }
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    if args.into is not None:
        replace_sections(args.into, {SECTION: table(result)})


if __name__ == "__main__":
    main()
