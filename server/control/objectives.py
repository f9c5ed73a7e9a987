"""What a request asks of the value heads: one class is both the wire format and the behaviour.

An objective sees the standardised values of heads, (value - mean) / standard deviation of that head's training reward,
so that weights mean the same for a head that counts words and one that scores sentiment. Levels, such as a target or a
floor, are the mean reward that responses are to have. Before a request is queued they become levels of the value, as
values are reported (levels.py), and those are all that the functions here see. The functions of a class take many rows
at once, each with its own `Terms`, and never mix rows. Knows nothing of hidden states, models or HTTP. Enter at
`Objective`; to add a type, write one class and put it in the union `_OfHeads`.

Beside `score` and its `slope`, a class says which weights the next step of the ascent takes, given how each head's
ascent moves every value. They are the slope at the end of the step instead of at its start, which is why a target is
not passed, a floor not broken and the worst of several heads not left for the next worst. Where all heads are linear,
one step of any length is exact. A class that looks ahead is asked at the rewards to be expected instead of at values.

An instruction stands apart: it names no heads, and moves the logits by what the model itself makes of it (guidance.py).

Shapes: R rows, K heads; effects_RKK[r, k, l] is the change of value l, or of reward l for a class that looks ahead, by
a step of length one along head k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, FiniteFloat
from torch import Tensor

from server.control.multipliers import Box, simplex_weights, within_bounds
from server.control.state import HeldBy
from server.control.wire import WireModel
from server.unicode import check_text

MAX_HEADS_PER_REQUEST = 8
MAX_UNITS_PER_REQUEST = 8192
"""Of all those heads together."""
MAX_ABS_WEIGHT = 10.0
MAX_ABS_LEVEL = 1e6
MAX_INSTRUCTION_CHARS = 8192


def _check_nonzero(weight: float) -> float:
    if weight == 0:
        raise ValueError("must not be 0; leave the head out instead")
    return weight


def _check_instruction(text: str) -> str:
    if not text.strip():
        raise ValueError("must hold more than blanks")
    return check_text(text)


HeadName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Weight = Annotated[FiniteFloat, Field(ge=-MAX_ABS_WEIGHT, le=MAX_ABS_WEIGHT)]
Level = Annotated[FiniteFloat, Field(ge=-MAX_ABS_LEVEL, le=MAX_ABS_LEVEL)]
"""A head's value in reward units, or a reward."""
LevelUnit = Literal["reward", "value"]
"""What a target's or floor's levels are: the mean reward that responses are to have, or a value at every token."""
Weights = Annotated[dict[HeadName, Weight], Field(min_length=1, max_length=MAX_HEADS_PER_REQUEST)]
NonzeroWeights = Annotated[
    dict[HeadName, Annotated[Weight, AfterValidator(_check_nonzero)]],
    Field(min_length=1, max_length=MAX_HEADS_PER_REQUEST),
]
Levels = Annotated[dict[HeadName, Level], Field(min_length=1, max_length=MAX_HEADS_PER_REQUEST)]


@dataclass(slots=True, frozen=True)
class Terms:
    """What R objectives that name the same heads say of the K heads of a stack."""

    weights_RK: Tensor
    levels_RK: Tensor
    """They are in standard deviations, and 0 where there is none."""
    has_level_K: Tensor
    weighted: tuple[int, ...]
    """The heads that have a weight."""
    levelled: tuple[int, ...]
    """The heads that have a level."""

    @classmethod
    def of(cls, objectives: Sequence[Objective], names: Sequence[str], mean_K: Tensor, scale_K: Tensor) -> Terms:
        """The terms for heads in the order of `names`, whose training rewards have these means and scales."""
        device = mean_K.device
        weights = [[objective.head_weights.get(name, 0.0) for name in names] for objective in objectives]
        levels = [[objective.head_levels.get(name, 0.0) for name in names] for objective in objectives]
        weighted, levelled = objectives[0].head_weights, objectives[0].head_levels
        has_level_K = torch.tensor([name in levelled for name in names], device=device)
        standardised_RK = (torch.tensor(levels, device=device) - mean_K) / scale_K
        return cls(
            weights_RK=torch.tensor(weights, device=device),
            levels_RK=torch.where(has_level_K, standardised_RK, 0.0),
            has_level_K=has_level_K,
            weighted=tuple(k for k, name in enumerate(names) if name in weighted),
            levelled=tuple(k for k, name in enumerate(names) if name in levelled),
        )


class BaseObjective(WireModel):
    held_by: ClassVar[HeldBy | None] = None
    """The reason that is reported for a value that rests on a level."""
    looks_ahead: ClassVar[bool] = False
    """Whether steps are weighed by the rewards they lead to (`HeadStack.earnings`) instead of by the values."""

    @property
    def head_weights(self) -> dict[str, float]:
        return {}

    @property
    def head_levels(self) -> dict[str, float]:
        """Each head's level, in reward units."""
        return {}

    @property
    def named_heads(self) -> dict[str, str]:
        """Every head, with the field that names it."""
        raise NotImplementedError

    @property
    def head_names(self) -> tuple[str, ...]:
        """The heads that it names, in a fixed order."""
        return tuple(sorted(self.named_heads))

    @property
    def is_null(self) -> bool:
        """Whether the slope is zero everywhere, so that no edit can follow from it."""
        return False

    @staticmethod
    def score(values_RK: Tensor, terms: Terms) -> Tensor:
        """Objectives [R] at standardised values."""
        raise NotImplementedError

    @staticmethod
    def slope(values_RK: Tensor, terms: Terms) -> Tensor:
        """Derivative [R, K] of `score` by each value."""
        raise NotImplementedError

    @staticmethod
    def step_weights(values_RK: Tensor, effects_RKK: Tensor, size_R: Tensor, terms: Terms) -> Tensor:
        """How much of each head's ascent [R, K] a step of the given size takes."""
        raise NotImplementedError

    @staticmethod
    def bounds(values_RK: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        """Lowest and highest values [R, K] that an edit from these values may lead to."""
        return torch.full_like(values_RK, -torch.inf), torch.full_like(values_RK, torch.inf)


class WeightedSum(BaseObjective):
    """Maximise the sum of weight x standardised value. A negative weight steers away from what the head rewards."""

    type: Literal["weighted_sum"] = "weighted_sum"
    weights: Weights

    @property
    def named_heads(self) -> dict[str, str]:
        return dict.fromkeys(self.weights, "weights")

    @property
    def head_weights(self) -> dict[str, float]:
        return self.weights

    @property
    def is_null(self) -> bool:
        return not any(self.weights.values())

    @staticmethod
    def score(values_RK: Tensor, terms: Terms) -> Tensor:
        return (values_RK * terms.weights_RK).sum(dim=1)

    @staticmethod
    def slope(values_RK: Tensor, terms: Terms) -> Tensor:  # noqa: ARG004
        return terms.weights_RK

    @staticmethod
    def step_weights(values_RK: Tensor, effects_RKK: Tensor, size_R: Tensor, terms: Terms) -> Tensor:  # noqa: ARG004
        return terms.weights_RK


class WorstCase(BaseObjective):
    """Maximise the smallest of weight x standardised value: each step raises whichever heads are worst off.

    The step's direction is the mixture v of the heads' ascents, v >= 0 and sum(v) = 1, that leaves the worst of them
    highest: the worst of the rewards to be expected when every token of a response is moved so, starting from the
    values. Values alone would not do: they say what the base model would make of the text, and follow its rewards by a
    small part that differs from head to head. Where cards do not tell what ascents earn, values are all there is.
    Source: Son et al. 2025, Robust multi-objective controlled decoding (RMOD).
    """

    looks_ahead: ClassVar[bool] = True
    type: Literal["worst_case"]
    weights: NonzeroWeights

    @property
    def named_heads(self) -> dict[str, str]:
        return dict.fromkeys(self.weights, "weights")

    @property
    def head_weights(self) -> dict[str, float]:
        return self.weights

    @staticmethod
    def score(values_RK: Tensor, terms: Terms) -> Tensor:
        return _weighted_where_named(values_RK, terms).amin(dim=1)

    @staticmethod
    def slope(values_RK: Tensor, terms: Terms) -> Tensor:
        weighted_RK = _weighted_where_named(values_RK, terms)
        is_worst_RK = weighted_RK == weighted_RK.amin(dim=1, keepdim=True)
        return terms.weights_RK * is_worst_RK / is_worst_RK.sum(dim=1, keepdim=True)

    @staticmethod
    def step_weights(values_RK: Tensor, effects_RKK: Tensor, size_R: Tensor, terms: Terms) -> Tensor:
        weights_RK = terms.weights_RK
        weighted_RKK = weights_RK[:, :, None] * effects_RKK * weights_RK[:, None, :]
        return weights_RK * simplex_weights(values_RK * weights_RK, weighted_RKK, size_R, terms.weighted)


class Target(BaseObjective):
    """Bring each value to a level, from either side, and stop there: minimise sum |value - level|.

    Source: Zhang et al. 2025 (Pre-Control, arXiv 2510.12121), whose square would slow down on the way.
    """

    held_by: ClassVar[HeldBy | None] = HeldBy.TARGET
    type: Literal["target"]
    values: Levels
    unit: LevelUnit = "reward"

    @property
    def named_heads(self) -> dict[str, str]:
        return dict.fromkeys(self.values, "values")

    @property
    def head_levels(self) -> dict[str, float]:
        return self.values

    @staticmethod
    def score(values_RK: Tensor, terms: Terms) -> Tensor:
        return -torch.where(terms.has_level_K, (values_RK - terms.levels_RK).abs(), 0.0).sum(dim=1)

    @staticmethod
    def slope(values_RK: Tensor, terms: Terms) -> Tensor:
        return torch.where(terms.has_level_K, (terms.levels_RK - values_RK).sign(), 0.0)

    @staticmethod
    def step_weights(values_RK: Tensor, effects_RKK: Tensor, size_R: Tensor, terms: Terms) -> Tensor:
        box = Box(terms.levelled, terms.levels_RK, torch.zeros_like(values_RK), lowest=-1.0, highest=1.0)
        weights_RK = box.weights(values_RK, effects_RKK, size_R)
        return within_bounds(values_RK, effects_RKK, size_R, weights_RK, Target.bounds(values_RK, terms))

    @staticmethod
    def bounds(values_RK: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        low_RK, high_RK = BaseObjective.bounds(values_RK, terms)
        is_above_RK = terms.has_level_K & (values_RK >= terms.levels_RK)
        is_below_RK = terms.has_level_K & (values_RK <= terms.levels_RK)
        return torch.where(is_above_RK, terms.levels_RK, low_RK), torch.where(is_below_RK, terms.levels_RK, high_RK)


class Floor(BaseObjective):
    """Maximise the sum of weight x standardised value while other values stay at or above their floors.

    Each floor has a multiplier a row, from 0 up to the largest weight: how much of that head's ascent is added so that
    the step ends on the floor or above. Where that is not enough the step is shortened instead, so an edit never takes
    a value below its floor, nor further below when it was there before. Source: InferenceGuard (Ji et al. 2025).
    """

    held_by: ClassVar[HeldBy | None] = HeldBy.FLOOR
    type: Literal["floor"]
    weights: Weights
    floors: Levels
    unit: LevelUnit = "reward"

    @property
    def named_heads(self) -> dict[str, str]:
        return {**dict.fromkeys(self.floors, "floors"), **dict.fromkeys(self.weights, "weights")}

    @property
    def head_weights(self) -> dict[str, float]:
        return self.weights

    @property
    def head_levels(self) -> dict[str, float]:
        return self.floors

    @staticmethod
    def score(values_RK: Tensor, terms: Terms) -> Tensor:
        missing_RK = torch.where(terms.has_level_K, (terms.levels_RK - values_RK).clamp(min=0.0), 0.0)
        return (values_RK * terms.weights_RK).sum(dim=1) - MAX_ABS_WEIGHT * missing_RK.sum(dim=1)

    @staticmethod
    def slope(values_RK: Tensor, terms: Terms) -> Tensor:
        is_broken_RK = terms.has_level_K & (values_RK < terms.levels_RK)
        return terms.weights_RK + MAX_ABS_WEIGHT * is_broken_RK

    @staticmethod
    def step_weights(values_RK: Tensor, effects_RKK: Tensor, size_R: Tensor, terms: Terms) -> Tensor:
        box = Box(terms.levelled, terms.levels_RK, terms.weights_RK, lowest=0.0, highest=MAX_ABS_WEIGHT)
        weights_RK = box.weights(values_RK, effects_RKK, size_R)
        return within_bounds(values_RK, effects_RKK, size_R, weights_RK, Floor.bounds(values_RK, terms))

    @staticmethod
    def bounds(values_RK: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        low_RK, high_RK = BaseObjective.bounds(values_RK, terms)
        return torch.where(terms.has_level_K, values_RK.minimum(terms.levels_RK), low_RK), high_RK


def _default_type(objective: object) -> object:
    return (
        {"type": "weighted_sum", **cast("dict[str, object]", objective)} if isinstance(objective, dict) else objective
    )


_OfHeads = WeightedSum | WorstCase | Target | Floor
"""Those that the values of heads say all of."""
HeadsObjective = Annotated[_OfHeads, Discriminator("type"), BeforeValidator(_default_type)]
NO_HEADS = WeightedSum.model_construct(weights={})
"""What an instruction alone asks of heads."""


class Instruction(BaseObjective):
    """Go where an instruction would lead: move the next token's logits by weight x what it changes of them.

    With weight 1 and budget enough, tokens are drawn as after the instruction itself; a larger weight goes on in that
    direction, and a negative one steers away. `beside` is an objective over heads that the same edit follows too.
    Source: Sanchez et al. 2023 (classifier-free guidance for language models, arXiv 2306.17806).
    """

    type: Literal["instruction"]
    text: Annotated[str, Field(max_length=MAX_INSTRUCTION_CHARS), AfterValidator(_check_instruction)]
    weight: Weight = 1.0
    beside: HeadsObjective | None = None

    @property
    def named_heads(self) -> dict[str, str]:
        return {} if self.beside is None else {n: f"beside.{field}" for n, field in self.beside.named_heads.items()}

    @property
    def is_null(self) -> bool:
        return self.weight == 0 and (self.beside is None or self.beside.is_null)


Objective = Annotated[_OfHeads | Instruction, Discriminator("type"), BeforeValidator(_default_type)]


def _weighted_where_named(values_RK: Tensor, terms: Terms) -> Tensor:
    """Weight x value, and infinity where there is no weight, so that those are never the smallest."""
    return torch.where(terms.weights_RK != 0, values_RK * terms.weights_RK, torch.inf)
