"""What the critic of training changes: the gain of directions that are fitted by one critic or another.

    python -m benchmarks.critic positive,plain --rollouts runs/rollouts --out benchmarks/results/critic.json

The prompts of a run are cut into two halves. Value, critic and directions are fitted to one half and judged on the
other, and the other way round. All directions are judged by Monte Carlo advantages less one and the same baseline, the
value that was fitted to the first half; that is `ascent_gain` of value_models/ascent.py, here summed by prompt, so that
differences have intervals (95%, bootstrap over prompts). Rollouts should be sampled with top_p 1, as they are by
default: a truncated policy's gradients have a mean that is not zero. Enter at `Critics`.

Shapes: P prompts, C ways to credit tokens, D hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg
from torch import Tensor

from benchmarks.markdown import header, row
from benchmarks.study import Study
from server.cli import run
from server.cli.command import read_prompts
from server.errors import ConfigurationError
from value_models.ascent import MONTE_CARLO, natural_directions
from value_models.critic import Credit, PrefixCritic
from value_models.critic_choice import PREFIX_TRACE
from value_models.heads import ValueHead
from value_models.prefix_rewards import PrefixReport
from value_models.sources import FitSource
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData, load_training_data

TRACES = (1.0, 0.95, 0.9, 0.8, 0.6)
_DRAWS = 2000


@dataclass(slots=True)
class PromptSums:
    """Of the directions on the tokens that judge them, by prompt."""

    earned_CP: Tensor
    paid_CP: Tensor
    tokens_P: Tensor

    def gains(self, prompts: Tensor | None = None) -> Tensor:
        """Of each way [C], over prompts that may be named more than once."""
        prompts = torch.arange(len(self.tokens_P)) if prompts is None else prompts
        num_tokens = self.tokens_P[prompts].sum()
        paid_C = self.paid_CP[:, prompts].sum(1) / num_tokens
        return self.earned_CP[:, prompts].sum(1) / num_tokens / paid_C.sqrt()


class Critics(Study):
    """Fit the direction of each reward by both critics and several lambdas, on halves of a run's prompts."""

    section: ClassVar[str] = "bench-critic"

    rewards: CliPositionalArg[str] = Field(description="comma-separated")
    rollouts: Path = Field(Path("runs/rollouts"), description="folder of a complete run")
    prompts: Path | None = Field(None, description="the prompts of that run; by default the project's own")

    def measure(self) -> dict[str, Any]:
        texts = {prompt.id: prompt.text for prompt in read_prompts(self.prompts)}
        results: dict[str, Any] = {}
        run: dict[str, Any] = {}
        for reward in self.rewards.split(","):
            data = load_training_data(self.rollouts, reward, texts, with_prefixes=True, show_progress=True)
            if not isinstance(data.prefixes, PrefixReport):
                raise ConfigurationError(f"rollouts: {data.prefixes}")
            run = {
                "rollouts": data.manifest["settings"],
                "model": data.base_model["name"],
                "num_prompts": int(data.prompt_B.max()) + 1,
                "num_responses": len(data.prompt_B),
                "num_tokens": int(data.offsets[-1]),
            }
            results[reward] = compared(data)
        return run | {"rewards": results}

    def body(self, result: Mapping[str, Any]) -> str:
        return table(result)


def compared(data: TrainingData) -> dict[str, Any]:
    """The gains of each way and what they are above the value's, over both halves, with what the critics explain."""
    assert isinstance(data.prefixes, PrefixReport)
    halves, explained = list[PromptSums](), list[float]()
    names: list[str] = []
    for half in (0, 1):
        split = ["train" if prompt % 2 == half else "validation" for prompt in data.prompt_B.tolist()]
        source = FitSource.of(replace(data, split=split), is_centred=True)
        settings = TrainSettings(critic="value", field_features=0)
        head = train_head([source.data], settings).head
        critic = PrefixCritic.fit(source, ridge=settings.ridge)
        credits = [MONTE_CARLO, *(Credit(trace, critic) for trace in TRACES)]
        names = [f"{credit.name} {credit.trace:g}" for credit in credits]
        directions = natural_directions(head, [source], credits, damping=settings.damping)
        halves.append(_prompt_sums(head, source, torch.cat(directions)))
        explained.append(critic.explained)
    gains_HC = torch.stack([half.gains() for half in halves])
    low_C, high_C = _intervals(halves)
    return {
        "explained": [round(share, 4) for share in explained],
        "prefix_stride": data.prefixes.stride,
        "ways": {
            name: {
                "gains": [round(float(gain), 4) for gain in gains_HC[:, way]],
                "above_value": round(float((gains_HC[:, way] - gains_HC[:, 0]).mean()), 4),
                "above_value_interval": [round(float(low_C[way]), 4), round(float(high_C[way]), 4)],
            }
            for way, name in enumerate(names)
        },
    }


def _prompt_sums(head: ValueHead, source: FitSource, directions_CD: Tensor) -> PromptSums:
    """On validation tokens, whose advantages are the reward less the head's value."""
    data = source.data
    num_prompts = int(data.prompt_B.max()) + 1
    shape = (len(directions_CD), num_prompts)
    sums = PromptSums(torch.zeros(shape).double(), torch.zeros(shape).double(), torch.zeros(num_prompts).double())
    for block in data.blocks("validation"):
        prompt_N = block.of_tokens(data.prompt_B)
        advantage_N = block.of_tokens(source.standard_B) - head.readout(head.units(block.states_ND))[0]
        along_CN = directions_CD @ block.logp_grads_ND.T
        sums.earned_CP.index_add_(1, prompt_N, (advantage_N * along_CN).double())
        sums.paid_CP.index_add_(1, prompt_N, 0.5 * along_CN.square().double())
        sums.tokens_P.index_add_(0, prompt_N, torch.ones(len(prompt_N)).double())
    judged = sums.tokens_P > 0
    return PromptSums(sums.earned_CP[:, judged], sums.paid_CP[:, judged], sums.tokens_P[judged])


def _intervals(halves: Sequence[PromptSums]) -> tuple[np.ndarray, np.ndarray]:
    """95% of what each way's gain is above the first's, the mean of both halves, by bootstrap over prompts."""
    rng = torch.Generator().manual_seed(0)
    draws: list[Tensor] = []
    for _ in range(_DRAWS):
        gains = [half.gains(torch.randint(len(half.tokens_P), half.tokens_P.shape, generator=rng)) for half in halves]
        draws.append(torch.stack([gains_C - gains_C[0] for gains_C in gains]).mean(0))
    low_C, high_C = np.quantile(torch.stack(draws).numpy(), [0.025, 0.975], axis=0)
    return low_C, high_C


def table(result: Mapping[str, Any]) -> str:
    ways = list(next(iter(result["rewards"].values()))["ways"])
    best = f"prefix_reward {PREFIX_TRACE:g}"
    lines = header(["reward", *ways, f"{best} above {ways[0]}, 95%", "explained"])
    for reward, one in result["rewards"].items():
        gains = [", ".join(f"{gain:.3f}" for gain in one["ways"][way]["gains"]) for way in ways]
        low, high = one["ways"][best]["above_value_interval"]
        above = f"{one['ways'][best]['above_value']:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(row([f"`{reward}`", *gains, above, ", ".join(f"{share:.2f}" for share in one["explained"])]))
    told = (
        f"{result['num_prompts']:,} prompts, {result['num_responses']:,} responses, {result['num_tokens']:,} tokens of "
        f"{result['model']}, top_p {result['rollouts']['top_p']:g}."
    )
    return "\n".join([*lines, "", told, "", f"`{result['command']}` ({result['system']['date'][:10]})."])


if __name__ == "__main__":
    raise SystemExit(run("benchmarks.critic:Critics", "python -m benchmarks.critic", sys.argv[1:]))
