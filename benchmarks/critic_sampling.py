"""Whether text bears out what the gains say: heads that were fitted by one critic and the other, at equal divergence.

    python -m benchmarks.critic_sampling positive,plain --out benchmarks/results/critic-sampling.json

The heads are fitted to the training prompts of the same rollouts, and answer the same test prompts with the same seeds.
The first one, whose critic is its own value, takes the step size that is asked for; that of the others is set on
validation prompts so that they diverge as far. Judges are those of `recontrol eval`, which no head was fitted to. What
--out holds of other rewards stays there. Enter at `CriticSampling`.

Shapes: P prompts, S responses to each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic_settings import CliPositionalArg

from benchmarks.markdown import header, row
from benchmarks.study import Study
from server.cli import run
from server.cli.command import read_prompts
from server.cli.evaluate import JUDGES, KNOWN_JUDGES
from server.cli.program import command_line
from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel, load_model
from server.engines.embedded.rollouts import EngineRolloutSource
from server.errors import ConfigurationError
from server.settings import DEFAULT_MODEL
from value_models.critic_choice import PREFIX_TRACE
from value_models.generations import EvalSample
from value_models.intervals import mean_interval
from value_models.prompt_sets import RolloutPrompt, load_prompts, own_prompts_file, split_of
from value_models.rewards import load_reward
from value_models.rollouts import RolloutSettings
from value_models.training import TrainSettings, train_head
from value_models.training_data import load_training_data

_CREDITS: dict[str, dict[str, Any]] = {
    "value": {"critic": "value"},
    "prefix_reward_1": {"critic": "prefix_reward", "advantage_trace": 1.0},
    f"prefix_reward_{PREFIX_TRACE:g}": {"critic": "prefix_reward", "advantage_trace": PREFIX_TRACE},
}
SETTINGS = {name: TrainSettings(**credit, field_features=0) for name, credit in _CREDITS.items()}
"""By the heads' names."""
_EQUAL_KL, _MAX_ROUNDS = 0.05, 3


class CriticSampling(Study):
    """Sample under heads of one reward that were fitted by different critics."""

    section: ClassVar[str] = "bench-critic-sampling"
    heads: ClassVar[Mapping[str, TrainSettings]] = SETTINGS
    """What is compared, by name; with the first one of them."""

    rewards: CliPositionalArg[str] = Field(description=f"comma-separated: {', '.join(JUDGES)}")
    rollouts: Path = Field(Path("runs/rollouts"), description="folder of a complete run")
    prompts: Path | None = Field(None, description="the prompts of that run; by default the project's own")
    model: str = DEFAULT_MODEL
    step_size: float = Field(0.12, gt=0, description="of the first head")
    num_prompts: Annotated[int, Field(ge=1)] = Field(40, description="of the test split")
    num_tuning_prompts: Annotated[int, Field(ge=1)] = Field(16, description="of the validation split")
    num_samples: Annotated[int, Field(ge=1)] = 2
    max_tokens: Annotated[int, Field(ge=1)] = 64

    def measure(self) -> dict[str, Any]:
        rewards = self.rewards.split(",")
        if unknown := [reward for reward in rewards if reward not in JUDGES]:
            raise ConfigurationError(f"rewards: {unknown[0]!r} has no judges; those that have are {', '.join(JUDGES)}")
        kept = self._read()["rewards"] if self.out is not None and self.out.exists() else {}
        loaded = load_model(self.model)
        return {"rewards": kept | {reward: self._sampled(loaded, reward) for reward in rewards}}

    def _sampled(self, loaded: LoadedModel, reward: str) -> dict[str, Any]:
        texts = {prompt.id: prompt.text for prompt in read_prompts(self.prompts)}
        data = load_training_data(self.rollouts, reward, texts, with_prefixes=True)
        trained = {name: train_head([data], settings) for name, settings in self.heads.items()}
        registry = HeadRegistry({name: one.head for name, one in trained.items()})
        source = EngineRolloutSource(loaded, EngineCore(loaded, registry, max_batch_size=64))
        sampler = _Sampler(
            source, RolloutSettings(num_samples=self.num_samples, max_tokens=self.max_tokens, top_p=0.95)
        )
        own = load_prompts(own_prompts_file())
        tuning, tested = ([prompt for prompt in own if split_of(prompt.id) == name] for name in ("validation", "test"))
        steps = self._step_sizes(sampler, tuning[: self.num_tuning_prompts])
        tested = tested[: self.num_prompts]
        arms = {"base": list(sampler.under(None, 0.0, tested))}
        arms |= {name: list(sampler.under(name, step, tested)) for name, step in steps.items()}
        return {
            "command": command_line(),
            "num_train_tokens": data.num_tokens("train"),
            "rollouts": data.manifest["settings"],
            "num_prompts": len(tested),
            "sampling": sampler.settings.model_dump(),
            "judges": JUDGES[reward],
            "ascent_gain": {name: one.figures[0].ascent_gain for name, one in trained.items()},
            "step_size": {name: round(step, 4) for name, step in steps.items()},
            "arms": figures(arms, tested, reward, next(iter(self.heads))),
        }

    def _step_sizes(self, sampler: _Sampler, prompts: Sequence[RolloutPrompt]) -> dict[str, float]:
        """Those at which heads diverge as far as the first. KL grows with the square of a small step."""
        first, *others = self.heads
        steps = dict.fromkeys(self.heads, self.step_size)
        wanted = _mean_kl(sampler.under(first, self.step_size, prompts))
        for name in others:
            for _ in range(_MAX_ROUNDS):
                kl = _mean_kl(sampler.under(name, steps[name], prompts))
                if abs(kl - wanted) <= _EQUAL_KL * wanted:
                    break
                steps[name] *= (wanted / kl) ** 0.5
        return steps

    def body(self, result: Mapping[str, Any]) -> str:
        return table(result)


def figures(
    arms: Mapping[str, Sequence[EvalSample]], prompts: Sequence[RolloutPrompt], reward: str, first: str
) -> dict[str, Any]:
    """Means over prompts, and how far they are above those of the head named `first`."""
    texts = {prompt.id: prompt.text for prompt in prompts}
    names = [*JUDGES[reward], "diversity", "coherence"]
    metrics = {"reward": load_reward(reward), **{name: KNOWN_JUDGES[name] for name in names}}
    tables: dict[str, dict[str, np.ndarray]] = {}
    for arm, samples in arms.items():
        kept = sorted(samples, key=lambda sample: (sample.prompt_id, sample.sample))
        asked, answers = [texts[sample.prompt_id] for sample in kept], [sample.response for sample in kept]
        scores = {name: score(asked, answers) for name, score in metrics.items()}
        scores |= {"nll": [sample.nll for sample in kept], "kl": [sample.mean_kl for sample in kept]}
        scores["finished"] = [float(sample.is_finished) for sample in kept]
        tables[arm] = {name: np.array(found).reshape(len(texts), -1) for name, found in scores.items()}
    return {
        arm: {
            name: mean_interval(values_PS)
            | ({} if arm == first else {"above_value": mean_interval(values_PS - tables[first][name])})
            for name, values_PS in table.items()
        }
        for arm, table in tables.items()
    }


class _Sampler:
    """Answers under one head at a time."""

    def __init__(self, source: EngineRolloutSource, settings: RolloutSettings) -> None:
        self._source, self.settings = source, settings

    def under(self, head: str | None, step_size: float, prompts: Sequence[RolloutPrompt]) -> Iterable[EvalSample]:
        control = None
        if head is not None:
            control = ControlParams.model_validate({"objective": {"weights": {head: 1.0}}, "step_size": step_size})
        return self._source.evaluate(prompts, self.settings, control=control)


def _mean_kl(samples: Iterable[EvalSample]) -> float:
    return float(np.mean([sample.mean_kl for sample in samples]))


def table(result: Mapping[str, Any]) -> str:
    lines = header(
        ["reward", "head", "gain", "reward (above the first head's)", "judges (above)", "coherence", "nll", "KL"]
    )
    for reward, one in result["rewards"].items():
        for name, arm in one["arms"].items():
            gain = one["ascent_gain"].get(name)
            scores = [_score(arm[metric]) for metric in ("reward", *one["judges"])]
            rest = [f"{arm[metric]['mean']:.2f}" for metric in ("coherence", "nll", "kl")]
            cells = [f"`{reward}`", name, "" if gain is None else f"{gain:.3f}", scores[0], "; ".join(scores[1:])]
            lines.append(row([*cells, *rest]))
    told = [
        f"`{reward}`: {one['num_train_tokens']:,} training tokens, {one['num_prompts']} test prompts, "
        f"{one['sampling']['num_samples']} responses to each, judges {' and '.join(one['judges'])}."
        for reward, one in result["rewards"].items()
    ]
    commands = dict.fromkeys(one["command"] for one in result["rewards"].values())
    ran = "; ".join(f"`{command}`" for command in commands)
    return "\n".join([*lines, "", " ".join(told), "", f"{ran} ({result['system']['date'][:10]})."])


def _score(found: Mapping[str, Any]) -> str:
    text, above = f"{found['mean']:.2f}", found.get("above_value")
    return text if above is None else f"{text} ({above['mean']:+.2f} [{above['low']:+.2f}, {above['high']:+.2f}])"


if __name__ == "__main__":
    raise SystemExit(
        run("benchmarks.critic_sampling:CriticSampling", "python -m benchmarks.critic_sampling", sys.argv[1:])
    )
