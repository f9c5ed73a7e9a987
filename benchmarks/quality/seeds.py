"""How much of a head's gain is the luck of what it was trained on: the same training with several seeds.

A seed draws the training prompts anew (value_models/resampled.py), and a head and a static vector are fitted to what it
drew, by today's defaults. All heads meet the same test prompts at the same strength, each beside its own vector, which
diverges as far as it does on validation prompts. Intervals draw prompts and seeds again. Enter at `SeedsStudy`.

Shapes: F seeds, P prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load, save

from server.cli.comparison import EvalSetup, for_card, show_arms
from server.cli.methods import STATIC_VECTOR, Method
from server.control.params import MAX_STEP_SIZE
from value_models.baselines import static_vector_head
from value_models.evaluation import Arm
from value_models.files import write_bytes
from value_models.heads import ValueHead, head_from_tensors
from value_models.intervals import mean_over_fits
from value_models.kept_fits import fit_key
from value_models.resampled import resampled
from value_models.rollouts import open_rollouts
from value_models.store import save_card
from value_models.training import TrainSettings, train_head
from value_models.training_data import load_training_data

# Part of what tells kept heads apart: raise it when the way they are fitted changes.
_VERSION = 1
_TRAINING = TrainSettings()


@dataclass(slots=True, frozen=True)
class SeededHeads:
    """A head and a static vector that were fitted to the same prompts."""

    seed: int
    head: ValueHead
    vector: ValueHead

    @property
    def head_name(self) -> str:
        return f"head-{self.seed}"

    @property
    def vector_name(self) -> str:
        return f"static-vector-{self.seed}"

    @property
    def heads(self) -> Mapping[str, ValueHead]:
        """As a registry knows them."""
        return {self.head_name: self.head, self.vector_name: self.vector}


def seeded_heads(
    folder: Path, rollouts: Path, reward_name: str, prompt_texts: dict[str, str], seeds: Iterable[int]
) -> list[SeededHeads]:
    """Fitted to a run where `folder` does not hold them yet. Raises RolloutError, RewardError, TrainingDataError."""
    manifest = open_rollouts(rollouts).manifest
    told = {"version": _VERSION, "rollouts": manifest, "reward": reward_name, "settings": _TRAINING.model_dump()}
    key = fit_key(told)
    data = functools.cache(
        lambda: load_training_data(rollouts, reward_name, prompt_texts, with_prefixes=_TRAINING.wants_prefix_rewards)
    )

    def fitted(seed: int) -> SeededHeads:
        fits = {
            "head": lambda: train_head([resampled(data(), seed)], _TRAINING).head,
            "vector": lambda: static_vector_head(resampled(data(), seed)),
        }
        return SeededHeads(seed, *(_kept(folder, f"{key}-{seed}-{what}", fit) for what, fit in fits.items()))

    return [fitted(seed) for seed in seeds]


def _kept(folder: Path, name: str, fit: Callable[[], ValueHead]) -> ValueHead:
    """From a file whose suffix tells the head's type, or fitted now and put there."""
    for path in folder.glob(f"{name}.*.safetensors"):
        return head_from_tensors(path.suffixes[0].removeprefix("."), load(path.read_bytes()))
    head = fit()
    write_bytes(folder / f"{name}.{head.type_name}.safetensors", save(head.state_dict()))
    return head


class SeedsStudy:
    """On test prompts; the seeds' heads must be in the setup's registry."""

    def __init__(self, setup: EvalSetup, seeded: list[SeededHeads]) -> None:
        self._setup, self._seeded = setup, seeded

    def run(self) -> dict[str, Any]:
        setup = self._setup
        arms = {"base": setup.subject.factory.base()}
        for pair in self._seeded:
            arms[f"head, seed {pair.seed}"] = head_arm = self._arm(pair.head_name, setup.subject.step_size)
            arms[f"static vector, seed {pair.seed}"] = self._arm(pair.vector_name, self._matched(pair, head_arm))
        figures = setup.compare(arms)
        metrics = ("reward", *setup.scoring.judges)
        by_metric = {metric: self._by_seed(figures, metric) for metric in metrics}
        return {
            "arms": figures,
            "head_arms": [f"head, seed {pair.seed}" for pair in self._seeded],
            "over_base": {name: mean_over_fits(head - base) for name, (base, head, _) in by_metric.items()},
            "over_static_vector": {name: mean_over_fits(head - other) for name, (_, head, other) in by_metric.items()},
            "deviation": {
                name: round(float(head.mean(axis=1).std(ddof=1)), 4) for name, (_, head, _) in by_metric.items()
            },
            **setup.describe(),
            "control": {"step_size": setup.subject.step_size, "max_kl": setup.subject.max_kl},
        }

    def save(self, result: dict[str, Any]) -> None:
        save_card(self._setup.folder, self._setup.card().model_copy(update={"seeds": for_card(result)}))

    def show(self, result: dict[str, Any]) -> None:
        show_arms(result)
        for over in ("over_base", "over_static_vector"):
            for metric, figure in result[over].items():
                print(f"{over}, {metric}: {figure['mean']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}]")

    def _arm(self, head: str, step_size: float) -> Arm:
        subject = self._setup.subject
        return subject.factory.control(subject.control(step_size, by=head))

    def _matched(self, pair: SeededHeads, head_arm: Arm) -> float:
        """The strength of a seed's vector at which it diverges as far as its head."""
        wanted = self._setup.tune({pair.head_name: head_arm})[pair.head_name]["kl"]["mean"]
        vector = Method(
            pair.vector_name,
            pair.vector_name,
            lambda _, strength: self._arm(pair.vector_name, strength),
            strengths=STATIC_VECTOR.strengths,
            is_matched=True,
            largest=MAX_STEP_SIZE,
        )
        return self._setup.strengths().at_divergence(vector, wanted)

    def _by_seed(self, figures: Mapping[str, Any], metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The base model's means [P], the heads' and the vectors' [F, P]."""

        def rows(what: str) -> np.ndarray:
            return np.array([figures[f"{what}, seed {pair.seed}"]["by_prompt"][metric] for pair in self._seeded])

        return np.array(figures["base"]["by_prompt"][metric]), rows("head"), rows("static vector")
