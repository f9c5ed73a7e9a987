"""What a head is compared with, and the head itself: each makes an arm of a strength in a unit of its own.

Knows nothing of how strengths are found (strengths.py) or arms are scored. Enter at METHODS; to add a method, write one
and put it there, or, for a study alone, beside the study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.cli.arms import ArmFactory, Instruction
from server.control.params import MAX_STEP_SIZE, ControlParams
from value_models.baselines import STATIC_VECTOR as STATIC_VECTOR_BASELINE
from value_models.baselines import Baseline
from value_models.evaluation import Arm
from value_models.prompt_sets import RolloutPrompt
from value_models.rewards import Reward
from value_models.training_data import TrainingData


@dataclass(slots=True, frozen=True)
class Subject:
    """The head that is evaluated, what it may do, and what makes arms of it."""

    factory: ArmFactory
    head: str
    step_size: float
    max_kl: float
    """Nats a token, of every arm with a budget."""
    instruction: Instruction | None
    """For prompting, and methods that learn from it."""
    fits: Fits | None = None
    """Of methods that are fitted to rollouts and are no heads."""

    def control(self, step_size: float, *, by: str | None = None) -> ControlParams:
        """By its head, or by another one under the same budget."""
        return ControlParams.for_head(by or self.head, step_size=step_size, max_kl=self.max_kl)

    def prompting(self, control: ControlParams | None = None) -> Arm:
        assert self.instruction is not None
        return self.factory.prompting(self.instruction, control)

    def fitted(self, method: Method) -> Any:
        """What the method is for this subject's instruction. Raises what its `fit` does."""
        assert self.fits is not None
        return self.fits.of(method, self.instruction)


@dataclass(slots=True, frozen=True)
class FitSources:
    """What methods are fitted to."""

    factory: ArmFactory
    """Of the model that is steered."""
    end_token_ids: frozenset[int]
    words: Callable[[], Mapping[int, str]]
    """Those of tokens that begin one, by token."""
    reward_name: str
    reward: Reward
    rollouts: Path
    training_data: Callable[[], TrainingData]
    """Rollouts and their rewards. Raises RolloutError, RewardError."""
    prompts: Callable[[], Mapping[str, RolloutPrompt]]
    """Those of the rollouts, by id."""
    folder: Path
    """For what takes long to fit."""
    instruction: Instruction | None = None
    """Of methods that need one."""

    @property
    def vocab_size(self) -> int:
        return self.factory.source.base_model["vocab_size"]


class Fits:
    """What methods come to, each fitted when it is first asked for."""

    def __init__(self, sources: FitSources) -> None:
        self._sources = sources
        self._made: dict[tuple[str, Instruction | None], Any] = {}

    def of(self, method: Method, instruction: Instruction | None = None) -> Any:
        assert method.fit is not None
        key = (method.name, instruction if method.needs_instruction else None)
        if key not in self._made:
            self._made[key] = method.fit(replace(self._sources, instruction=key[1]))
        return self._made[key]


@dataclass(slots=True, frozen=True)
class Method:
    """A way to steer."""

    name: str
    label: str
    """As tables have it."""
    arm: Callable[[Subject, float], Arm]
    """Of a subject and a strength."""
    strengths: tuple[float, ...]
    """Tried on validation prompts. Of a matched method, the first guess of where it diverges as far as the head."""
    is_matched: bool = False
    largest: float = math.inf
    """Strength that is allowed."""
    tested_at: float | None = None
    """Strength on test prompts, where that is not for validation prompts to say."""
    needs_instruction: bool = False
    num_rows: int = 1
    """Of a step, which one response takes."""
    baseline: Baseline | None = None
    """The head that it is, registered under the method's name."""
    fit: Callable[[FitSources], Any] | None = None
    """What else its arms are made of, as `Subject.fitted` gives it."""
    rewards: frozenset[str] | None = None
    """Those that it can raise, where it cannot raise any."""


PROMPTING = Method(
    "prompting",
    "prompting",
    lambda subject, _: subject.prompting(),
    strengths=(0.0,),
    tested_at=0.0,
    needs_instruction=True,
)
BEST_OF = Method(
    "best-of",
    "best of 4",
    lambda subject, number: subject.factory.best_of(int(number)),
    strengths=(2.0, 4.0, 8.0),
    tested_at=4.0,
)
STATIC_VECTOR = Method(
    "static-vector",
    "static vector",
    lambda subject, step_size: subject.factory.control(subject.control(step_size, by=STATIC_VECTOR.name)),
    strengths=(0.12,),
    is_matched=True,
    largest=MAX_STEP_SIZE,
    baseline=STATIC_VECTOR_BASELINE,
)
HEAD = Method(
    "head",
    "head",
    lambda subject, step_size: subject.factory.control(subject.control(step_size)),
    strengths=(),
    is_matched=True,
    largest=MAX_STEP_SIZE,
)
"""Its strength is the subject's step size, and what others are matched to."""

METHODS = {method.name: method for method in (PROMPTING, BEST_OF, STATIC_VECTOR)}
"""Those that any head is compared with, as tables have them."""
