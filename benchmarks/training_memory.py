"""`python -m benchmarks.training_memory`: what training a head takes in memory, by the number of tokens.

States and gradients are made from a seed, so that millions of tokens need no disk: each group of responses is made anew
whenever a pass asks for it, through the interface by which files are read. `--files FOLDER` writes them as a run of
rollouts instead. Each length is trained on in a process of its own, whose peak resident memory is told. The direction
that the rewards were made with is known, so the fit is seen to be right. Enter at `main`, or at `made_data`.

Shapes: N tokens of a group's responses one after the other, B responses, D hidden size.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.markdown import header, replace_sections, row
from benchmarks.speed.system import facts
from value_models.files import write_text
from value_models.prefix_rewards import PrefixReport
from value_models.prompt_sets import split_of
from value_models.rollouts import FORMAT, Rollout, collect_shards
from value_models.token_blocks import BLOCK_NUMBERS, TokenBlock, blocks_of
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData, load_training_data

SECTION = "bench-training-memory"
_LENGTH = 64
"""Tokens of a response, as of the shipped heads' rollouts."""
_SAMPLES = 16
_SIGNAL = 0.1
"""Of a reward in a gradient, beside noise of 1."""
_TENSORS = ("states_ND", "logp_grads_ND", "prefix_rewards_N")
_MIB = 2**20


@dataclass(slots=True, frozen=True)
class Case:
    """One fit. With `folder` its tokens come from files there."""

    num_tokens: int
    hidden_size: int
    hidden_widths: tuple[int, ...] = ()
    seed: int = 0
    folder: str | None = None

    @property
    def num_responses(self) -> int:
        return max(self.num_tokens // _LENGTH // _SAMPLES, 40) * _SAMPLES


@dataclass(slots=True, frozen=True)
class MadeTokens:
    """Tokens that are made when they are asked for, the same ones every time."""

    case: Case
    reward_B: Tensor

    @property
    def goal_D(self) -> Tensor:
        """The direction along which gradients tell of rewards, of length 1."""
        goal_D = torch.randn(self.case.hidden_size, generator=torch.Generator().manual_seed(self.case.seed + 1))
        return goal_D / goal_D.square().sum().sqrt()

    @property
    def group_size(self) -> int:
        return max(1, BLOCK_NUMBERS // self.case.hidden_size // _LENGTH)

    def group(self, first: int) -> Mapping[str, Tensor]:
        """The tokens of a group of responses, the first of which is named, in bfloat16; each made when it is read."""
        reward_N = self.reward_B[first : first + self.group_size].repeat_interleave(_LENGTH)
        return _Group(self.case, self.goal_D, reward_N, first)

    def blocks(self, is_wanted_B: Tensor, *, device: str, order: torch.Generator | None = None) -> Iterator[TokenBlock]:
        starts = torch.arange(0, len(is_wanted_B), self.group_size)
        if order is not None:
            starts = starts[torch.randperm(len(starts), generator=order)]
        for first in starts.tolist():
            wanted = is_wanted_B[first : first + self.group_size]
            if wanted.any():
                offsets = torch.arange(len(wanted) + 1) * _LENGTH
                yield from blocks_of(self.group(first), offsets, wanted, device=device, first_response=first)


class _Group(dict[str, Tensor]):
    def __init__(self, case: Case, goal_D: Tensor, reward_N: Tensor, first: int) -> None:
        super().__init__()
        self._case, self._goal_D, self._reward_N, self._first = case, goal_D, reward_N, first

    def __missing__(self, name: str) -> Tensor:
        seed = (self._case.seed << 40) + 3 * self._first + _TENSORS.index(name)
        rng = torch.Generator().manual_seed(seed)
        if name == "prefix_rewards_N":
            self[name] = self._reward_N + torch.randn(len(self._reward_N), generator=rng)
        else:
            noise_ND = torch.randn(len(self._reward_N), self._case.hidden_size, generator=rng)
            self[name] = noise_ND.addr_(self._reward_N, self._goal_D, alpha=_SIGNAL).bfloat16()
        return self[name]


def made_data(case: Case) -> TrainingData:
    reward_B = torch.randn(case.num_responses, generator=torch.Generator().manual_seed(case.seed))
    prompt_B = torch.arange(case.num_responses) // _SAMPLES
    splits = [split_of(f"made-{number}") for number in range(case.num_responses // _SAMPLES)]
    return TrainingData(
        tokens=MadeTokens(case, reward_B),
        offsets=torch.arange(case.num_responses + 1) * _LENGTH,
        prompt_B=prompt_B,
        reward_B=reward_B,
        split=[splits[number] for number in prompt_B.tolist()],
        base_model={"name": "made", "hidden_size": case.hidden_size},
        manifest={},
        prefixes=PrefixReport(Path("nowhere"), stride=1),
    )


def write_files(case: Case) -> None:
    """The same tokens as a run of rollouts, whose responses are their rewards in words."""
    assert case.folder is not None
    data = made_data(case)
    tokens = data.tokens
    assert isinstance(tokens, MadeTokens)
    starts = range(0, case.num_responses, tokens.group_size)

    def make(index: int) -> list[Rollout]:
        first = starts[index]
        group = tokens.group(first)
        parts = [group[name].split(_LENGTH) for name in ("states_ND", "logp_grads_ND")]
        return [
            Rollout(
                prompt_id=f"made-{(first + at) // _SAMPLES}",
                sample=(first + at) % _SAMPLES,
                response=repr(float(tokens.reward_B[first + at])),
                token_ids=tuple(range(_LENGTH)),
                is_finished=True,
                states_TD=states_TD,
                logp_grads_TD=grads_TD,
                text_ends=_text_ends(repr(float(tokens.reward_B[first + at]))),
            )
            for at, (states_TD, grads_TD) in enumerate(zip(*parts, strict=True))
        ]

    manifest = {
        "format": FORMAT,
        "base_model": data.base_model,
        "settings": asdict(case),
        "prompts_sha256": "",
        "num_shards": len(starts),
    }
    collect_shards(Path(case.folder), manifest, [tokens.group_size] * len(starts), make, show_progress=False)


def _text_ends(response: str) -> tuple[int, ...]:
    """As if each of the first tokens wrote a character, and the others none."""
    return tuple(min(token, len(response)) for token in range(_LENGTH))


def in_words(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward that a response of `write_files` spells, as far as it goes."""
    del prompts
    return [_number(response) for response in responses]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        # A beginning such as "-".
        return 0.0


def fit(case: Case) -> dict[str, Any]:
    """Train on a case in this process, whose peak memory is told."""
    made = made_data(case)
    assert isinstance(made.tokens, MadeTokens)
    data = made
    if case.folder is not None:
        texts = {f"made-{number}": "" for number in range(case.num_responses // _SAMPLES)}
        reward = f"{__name__}:{in_words.__name__}"
        data = load_training_data(Path(case.folder), reward, texts, with_prefixes=True)
    before_mib = _peak_mib()
    settings = TrainSettings(hidden_widths=case.hidden_widths, max_epochs=1)
    started_s = time.process_time()
    trained = train_head([data], settings)
    direction_D = trained.head.folded_ascent()[0]
    return {
        "num_tokens": int(data.offsets[-1]),
        "source": "made" if case.folder is None else "files",
        "before_mib": round(before_mib, 1),
        "peak_mib": round(_peak_mib(), 1),
        "cpu_seconds": round(time.process_time() - started_s, 1),
        "cosine_with_goal": round(float(torch.cosine_similarity(direction_D, made.tokens.goal_D, dim=0)), 4),
        "ascent_gain": trained.figures[0].ascent_gain,
        "critics": [] if trained.critic is None else sorted(trained.critic.gains),
    }


def fit_apart(case: Case) -> dict[str, Any]:
    """`fit` in a process of its own. Raises RuntimeError with the end of what it printed."""
    code = "import json,sys; from benchmarks import training_memory as t; "
    code += "case = json.loads(sys.argv[1]); case['hidden_widths'] = tuple(case['hidden_widths']); "
    code += "print(json.dumps(t.fit(t.Case(**case))))"
    command = [sys.executable, "-c", code, json.dumps(asdict(case))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"training on {case.num_tokens} tokens failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    lines = header(["tokens", "hidden size", "head", "from", "states and gradients", "peak memory", "core seconds"])
    for one in (one for run in result["training_runs"] for one in run["fits"]):
        widths = one["hidden_widths"]
        cells = [
            f"{one['num_tokens']:,}",
            f"{one['hidden_size']:,}",
            f"hidden layers of {', '.join(map(str, widths))}" if widths else "linear",
            "files" if one["source"] == "files" else "a seed",
            f"{one['num_tokens'] * one['hidden_size'] * 4 / 2**30:.1f} GiB",
            f"{one['peak_mib']:,.0f} MiB",
            f"{one['cpu_seconds']:,.0f}",
        ]
        lines.append(row(cells))
    runs = [f"`{run['command']}` ({_where(run)})" for run in result["training_runs"]]
    return "\n".join([*lines, "", f"{'; '.join(runs)}."])


def _where(run: dict[str, Any]) -> str:
    system = run["system"]
    return f"{system['cpu']}, {run['threads']} threads, load {system['load_before']:.1f}, {system['date'][:10]}"


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MIB


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_memory", description=__doc__)
    parser.add_argument("--tokens", type=_numbers, default=[200_000, 500_000, 1_000_000])
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--hidden-widths", type=_numbers, default=[], help="of hidden layers; none by default")
    parser.add_argument("--files", action="store_true", help="write the tokens to files and read them from there")
    parser.add_argument("--work", type=Path, help="folder for the files; by default a temporary one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to put this run into")
    parser.add_argument("--into", type=Path, help=f"page with a section {SECTION}")
    args = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    system, fits = facts(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for num_tokens in args.tokens:
            files = str(Path(folder) / str(num_tokens)) if args.files else None
            case = Case(num_tokens, args.hidden_size, tuple(args.hidden_widths), args.seed, files)
            if files is not None:
                write_files(case)
            settings = {"hidden_size": case.hidden_size, "hidden_widths": list(case.hidden_widths)}
            fits.append({**settings, **fit_apart(case)})
            print(json.dumps(fits[-1]), flush=True)
    run = {
        "command": shlex.join(["python", "-m", "benchmarks.training_memory", *given]),
        "system": system,
        "threads": torch.get_num_threads(),
        "fits": fits,
    }
    kept = json.loads(args.out.read_text())["training_runs"] if args.out.exists() else []
    result = {"training_runs": [*(one for one in kept if one["command"] != run["command"]), run]}
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    if args.into is not None:
        replace_sections(args.into, {SECTION: table(result)})


if __name__ == "__main__":
    main()
