"""What each objective and each search does to real text: the study behind `--study objectives`.

    floor        the first head is raised, and the second one stays at a level while it is
    search       the first head: by gradient, by the best of several continuations, and by both, with what each takes
    target       the last head: brought to several levels
    worst case   sets of heads named for it, or all: the lowest of what they gain over base, and of their rewards,
                 against a sum with equal shares, both of as much divergence

The heads' order says who plays what: raise one that pulls the second down, and end with one that is easy to raise. The
worst case has most to do where equal shares are spent on what is easy. Every arm is sampled on the same prompts and
seeds, kept in the `GenerationStore`, and measured by the true rewards of its text. Knows nothing of how figures are
shown (plots.py, report.py). Enter at `ObjectivesStudy`.

Shapes: P prompts, S responses to each, K heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.quality.plots import plot_objectives
from benchmarks.quality.rivals import blockwise
from server.cli.arms import ArmFactory
from server.control.objectives import Floor, Objective, Target, WeightedSum, WorstCase
from server.control.params import MAX_BLOCK_TOKENS, ControlParams
from value_models.evaluation import Arm
from value_models.files import write_text
from value_models.generations import EvalSample, GenerationStore
from value_models.intervals import bootstrap, mean_interval
from value_models.metrics import diversity
from value_models.prompt_sets import RolloutPrompt
from value_models.rewards import Reward, check_built_in, load_reward
from value_models.store import HeadCard

OBJECTIVES_FILE = "objectives.json"
_STEP_SIZE = 0.3
_TARGET_STEP_SIZE = 1.0
_WORST_CASE_STEP_SIZE = 1.0
"""So long that the budget of each token is what ends nearly every step, of heads that pull against each other too."""
_WORST_CASE_SAMPLES = 4
"""Times as many as of other arms: two mixtures of the same heads differ by less than two objectives do."""
_TARGETS = (-0.6, -0.3, 0.0, 0.3, 0.6)
"""In standard deviations of the head's training reward from its mean; values, being predictions, spread less."""
_BASE = "base"
_CANDIDATES, _BLOCK_TOKENS = 4, 8


@dataclass(slots=True, frozen=True)
class ObjectivesSetup:
    """Heads with everything they are measured with."""

    folder: Path
    """Of all heads."""
    cards: Mapping[str, HeadCard]
    heads: Sequence[str]
    """In the order that says who plays what."""
    worst_cases: Sequence[Sequence[str]]
    """Sets of heads."""
    factory: ArmFactory
    store: GenerationStore
    prompts: Sequence[RolloutPrompt]
    num_samples: int
    max_tokens: int


@dataclass(slots=True, frozen=True)
class _Measured:
    """One arm's responses: rewards and values by head, [P, S] each, and what else there is a sample."""

    samples: Sequence[EvalSample]
    rewards: dict[str, np.ndarray]
    standardised: dict[str, np.ndarray]
    figures: dict[str, Any]

    def worst(self, heads: Sequence[str]) -> np.ndarray:
        """[P, S]: the smallest standardised reward of each response."""
        return np.min([self.standardised[head] for head in heads], axis=0)

    def means(self, heads: Sequence[str]) -> np.ndarray:
        """[P, K]: standardised rewards of each prompt."""
        return np.stack([self.standardised[head].mean(axis=1) for head in heads], axis=1)


class ObjectivesStudy:
    def __init__(self, setup: ObjectivesSetup) -> None:
        self._setup = setup
        self._heads = tuple(setup.heads)
        # A library that is missing is missed now, and not after the sampling.
        self._rewards: dict[str, Reward] = {
            name: load_reward(check_built_in(card.reward, f"the card of {name}")) for name, card in setup.cards.items()
        }
        for reward in self._rewards.values():
            reward(["Is it?"], ["It is."])

    def run(self) -> dict[str, Any]:
        arms = {_BASE: self._setup.factory.base(read=self._heads)}
        worst_cases = [self._worst_case(arms, heads) for heads in self._setup.worst_cases]
        parts: dict[str, dict[str, Any]] = {
            "target": self._target(arms),
            "floor": self._floor(arms),
            "search": self._search(arms),
        }
        measured = self._measure(
            arms, {name: int(part["num_samples"]) for part in worst_cases for name in part["arms"]}
        )
        for part in worst_cases:
            self._compare_worst_case(part, measured)
        self._compare(parts, measured)
        return {
            "heads": list(self._heads),
            "worst_cases": worst_cases,
            **parts,
            "arms": {name: arm.figures for name, arm in measured.items()},
            "num_prompts": len(self._setup.prompts),
        }

    def save(self, result: dict[str, Any]) -> None:
        """Figures and plot beside the heads."""
        path = self._setup.folder / OBJECTIVES_FILE
        write_text(path, json.dumps(result, indent=1) + "\n")
        plot_objectives(result, path.with_suffix(".svg"))

    def show(self, result: dict[str, Any]) -> None:
        for name, arm in result["arms"].items():
            rewards = "  ".join(f"{head} {figure['mean']:.3f}" for head, figure in arm["rewards"].items())
            print(f"{name:30}{rewards}  kl {arm['kl']['mean']:.3f}  {arm['response_s']:.2f} s")

    def _worst_case(self, arms: dict[str, Arm], heads: Sequence[str]) -> dict[str, Any]:
        names = [f"{way}, {' + '.join(heads)}" for way in ("equal shares", "worst case")]
        equal = WeightedSum(weights=dict.fromkeys(heads, 1.0 / len(heads)))
        arms[names[0]] = self._arm(equal, step_size=_WORST_CASE_STEP_SIZE)
        worst = WorstCase(type="worst_case", weights=dict.fromkeys(heads, 1.0))
        arms[names[1]] = self._arm(worst, step_size=_WORST_CASE_STEP_SIZE)
        return {
            "heads": list(heads),
            "arms": [_BASE, *names],
            "num_samples": _WORST_CASE_SAMPLES * self._setup.num_samples,
        }

    def _target(self, arms: dict[str, Arm]) -> dict[str, Any]:
        head = self._heads[-1]
        mean, scale = self._moments(head)
        levels = {f"target {round(mean + s * scale, 3):g}": round(mean + s * scale, 3) for s in _TARGETS}
        for name, level in levels.items():
            arms[name] = self._arm(Target(type="target", values={head: level}), step_size=_TARGET_STEP_SIZE)
        return {"head": head, "levels": levels}

    def _floor(self, arms: dict[str, Arm]) -> dict[str, Any]:
        raised, kept = self._heads[:2]
        level = round(self._moments(kept)[0], 3)
        names = [_BASE, f"raise {raised}", f"raise {raised}, floor {kept}"]
        arms[names[1]] = self._arm(WeightedSum(weights={raised: 1.0}), step_size=_STEP_SIZE)
        floor = Floor(type="floor", weights={raised: 1.0}, floors={kept: level})
        arms[names[2]] = self._arm(floor, step_size=_STEP_SIZE)
        return {"raised": raised, "kept": kept, "level": level, "arms": names}

    def _search(self, arms: dict[str, Arm]) -> dict[str, Any]:
        head = self._heads[0]
        objective = WeightedSum(weights={head: 1.0})
        of, whole = f"of {_CANDIDATES}", min(self._setup.max_tokens, MAX_BLOCK_TOKENS)
        names = ["gradient", "blocks of 2", f"whole best {of}", f"gradient, whole best {of}", f"blocks {of}",
                 f"gradient, blocks {of}"]  # fmt: skip
        ways: list[dict[str, Any]] = [
            {},
            {"steps": 0, "search": blockwise(2, _BLOCK_TOKENS)},
            {"steps": 0, "search": blockwise(_CANDIDATES, whole)},
            {"search": blockwise(_CANDIDATES, whole)},
            {"steps": 0, "search": blockwise(_CANDIDATES, _BLOCK_TOKENS)},
            {"search": blockwise(_CANDIDATES, _BLOCK_TOKENS)},
        ]
        arms |= {name: self._arm(objective, **way) for name, way in zip(names, ways, strict=True)}
        return {"head": head, "arms": [_BASE, *names], "equal_time": names[2:]}

    def _arm(self, objective: Objective, **options: Any) -> Arm:
        return self._setup.factory.control(ControlParams(objective=objective, **options), read=self._heads)

    def _moments(self, head: str) -> tuple[float, float]:
        card = self._setup.cards[head]
        return card.reward_mean, card.reward_scale

    def _measure(self, arms: Mapping[str, Arm], num_samples: Mapping[str, int]) -> dict[str, _Measured]:
        """With as many samples as an arm is said to need."""
        setup = self._setup
        numbers = {name: num_samples.get(name, setup.num_samples) for name in arms}
        measured: dict[str, _Measured] = {}
        with tqdm(total=sum(numbers.values()) * len(setup.prompts), unit="response", leave=False) as bar:
            for name, arm in arms.items():
                bar.set_description(name)
                drawn = setup.store.samples(arm.spec, setup.prompts, numbers[name], arm.sampler, on_sample=bar.update)
                measured[name] = self._measured(drawn)
        return measured

    def _measured(self, samples: Sequence[EvalSample]) -> _Measured:
        texts = {prompt.id: prompt.text for prompt in self._setup.prompts}
        prompts, responses = [texts[s.prompt_id] for s in samples], [s.response for s in samples]
        rewards = {name: self._table(reward(prompts, responses)) for name, reward in self._rewards.items()}
        standardised = {
            name: (table - mean) / scale for name, table in rewards.items() for mean, scale in [self._moments(name)]
        }
        measured = _Measured(samples, rewards, standardised, {})
        plain = {
            "kl": [s.mean_kl for s in samples],
            "nll": [s.nll for s in samples],
            "diversity": [diversity(response) for response in responses],
            "tokens": [float(s.num_tokens) for s in samples],
        }
        measured.figures.update(
            rewards={name: mean_interval(table) for name, table in rewards.items()},
            standardised={name: mean_interval(table) for name, table in standardised.items()},
            values={name: mean_interval(self._table([s.values[name] for s in samples])) for name in self._heads},
            steered={
                name: mean_interval(self._table([s.steered[name] for s in samples])) for name in samples[0].steered
            },
            response_s=round(sum(s.wall_s for s in samples) / len(samples), 4),
            **{name: mean_interval(self._table(values)) for name, values in plain.items()},
        )
        return measured

    def _compare_worst_case(self, part: dict[str, Any], measured: Mapping[str, _Measured]) -> None:
        names = part["arms"]
        _, equal, worst = names
        tables = {name: measured[name].worst(part["heads"]) for name in names}
        means = {name: measured[name].means(part["heads"]) for name in names}
        gains = {name: table - means[_BASE] for name, table in means.items()}
        part["of_the_gains"] = {name: _lowest(table) for name, table in gains.items()}
        part["of_the_means"] = {name: _lowest(table) for name, table in means.items()}
        part["of_a_response"] = {name: mean_interval(table) for name, table in tables.items()}
        part["gain_of_the_gains"] = _lowest(gains[worst], gains[equal])
        part["gain_of_the_means"] = _lowest(means[worst], means[equal])
        part["gain_of_a_response"] = mean_interval(tables[worst] - tables[equal])

    def _compare(self, parts: dict[str, dict[str, Any]], measured: Mapping[str, _Measured]) -> None:
        """What the study is asked: differences prompt by prompt, errors and orders."""
        target, head = parts["target"], parts["target"]["head"]
        scale = self._moments(head)[1]
        missed = {
            name: self._table([abs(s.steered[head] - level) / scale for s in measured[name].samples])
            for name, level in target["levels"].items()
        }
        target["missed_by"] = {name: mean_interval(table) for name, table in missed.items()}
        for what in ("steered", "rewards"):
            means = [measured[name].figures[what][head]["mean"] for name in target["levels"]]
            target[f"is_monotone_{what}"] = all(low < high for low, high in pairwise(means))
        floor = parts["floor"]
        alone, held = (measured[name] for name in floor["arms"][1:])
        for role in ("raised", "kept"):
            name = floor[role]
            floor[f"{role}_over_base"] = _difference(held.rewards[name], measured[_BASE].rewards[name])
            floor[f"{role}_over_alone"] = _difference(held.rewards[name], alone.rewards[name])
        search = parts["search"]
        both = measured[search["equal_time"][-1]].rewards[search["head"]]
        search["both_over"] = {
            name: _difference(both, measured[name].rewards[search["head"]]) for name in search["arms"][:-1]
        }

    def _table(self, values: Sequence[float]) -> np.ndarray:
        return np.asarray(values).reshape(len(self._setup.prompts), -1)


def _difference(table: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Of the means over prompts of [P, S] figures; S may differ."""
    return mean_interval((table.mean(axis=1) - other.mean(axis=1))[:, None])


def _lowest(means_PK: np.ndarray, others_PK: np.ndarray | None = None) -> dict[str, float]:
    """The lowest of the heads' mean rewards, or how much higher it is than another arm's; bootstrapped over prompts."""

    def figure(rows: np.ndarray) -> np.ndarray:
        lowest = means_PK[rows].mean(axis=-2).min(axis=-1)
        return lowest if others_PK is None else lowest - others_PK[rows].mean(axis=-2).min(axis=-1)

    return bootstrap(figure, len(means_PK))
