"""Fitting a value head to rollouts or texts: normalisation, the linear part, hidden layers, the way uphill, figures.

The linear part is the ridge solution, which is exact; hidden layers, if any, start from it and learn what is left
(network.py). Splits are by prompt, so validation figures are on prompts that the fit has not seen. Data comes in
blocks, several times over, and what is in memory does not grow with the number of tokens. Knows nothing of language
models or servers. Enter at `train_head`.

Shapes: N tokens of a block, B responses of a source, D hidden size.
"""

# torch leaves types out of `manual_seed`.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from value_models.ascent import Metric, NaturalSums, ascending, ascent_gain, calibrated, plain_rows
from value_models.calibration import ExpectedRewards
from value_models.critic import NOT_FINITE
from value_models.critic_choice import (
    PREFIX_TRACE,
    VALUE_TRACE,
    CreditsToTry,
    CriticFigures,
    CriticName,
    choose,
    credits_to_try,
)
from value_models.errors import TrainingDataError
from value_models.expected import ExpectedSums
from value_models.fields import AUTO_FEATURES, FieldFigures, as_field, choose_field, num_tried
from value_models.heads import MAX_FEATURES, LinearHead, ValueHead, head_from_tensors
from value_models.moments import Moments, MomentSums
from value_models.network import Network, fit
from value_models.order import order_figures
from value_models.prefix_rewards import MODEL_STRIDE, STRIDE
from value_models.rollouts import RunKind
from value_models.sources import FitSource, token_weights
from value_models.training_data import TrainingData

_POSITIONS = (0, 10, 20, 40, 60)
"""Tokens of responses at which the explained variance is looked at."""


FieldFeatures = Annotated[int, Field(ge=0, le=MAX_FEATURES)] | Literal["auto"]


class TrainSettings(BaseModel):
    """What `recontrol train` can vary; the defaults are what the default model's heads were made with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: Literal["monte_carlo", "td_lambda", "td_one_step"] = "monte_carlo"
    trace: float = Field(default=0.95, ge=0, le=1, description="lambda of td_lambda")
    center_by_prompt: bool = Field(
        default=True, description="subtract each prompt's mean reward; of --texts only where it is asked for"
    )
    hidden_widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="hidden layers beside the linear part; none by default"
    )
    has_linear_part: bool = Field(
        default=True, description="without it, as in the paper, the hidden layers are all there is"
    )
    metric: Metric = Field(default="natural", description="which way is uphill; see value_models/ascent.py")
    critic: CriticName = Field(
        default="auto",
        description="of the natural metric's advantages, in training alone: the head's value, or one that also sees "
        "the reward of the text so far; auto takes that one if it can be had, unless validation prompts clearly speak "
        "against it",
    )
    advantage_trace: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="lambda of the natural metric's advantages; by default "
        f"{VALUE_TRACE:g} with the critic value and {PREFIX_TRACE:g} with prefix_reward",
    )
    prefix_stride: int | None = Field(
        default=None,
        ge=1,
        description=f"tokens from one reward of the text so far to the next; by default {STRIDE}, and {MODEL_STRIDE} "
        "for rewards that are models",
    )
    field_features: FieldFeatures = Field(
        default="auto",
        description=f"principal components of the state that the natural metric's direction follows, {MAX_FEATURES} at "
        f"most; auto tries {AUTO_FEATURES} and takes them if validation prompts of rollouts clearly speak for it, and "
        "by a tenth of the gain",
    )
    damping: float = Field(default=0.1, ge=0, description="of the natural metric, relative to its mean eigenvalue")
    shrinkage: float = Field(default=0.0, ge=0, le=1, description="share of the identity in the covariance metric")
    ridge: float = Field(default=0.01, gt=0, description="of the linear part, relative to unit variance")
    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    batch_size: int = Field(default=4096, ge=1, description="tokens")
    max_epochs: int = Field(default=15, ge=1)
    patience: int = Field(default=2, ge=1, description="epochs without a better validation loss before stopping")
    seed: int = 0

    @model_validator(mode="after")
    def _linear_heads_are_fitted_to_returns(self) -> Self:
        if self.targets != "monte_carlo" and not self.hidden_widths:
            raise ValueError(
                f"targets: a linear head is fitted to monte_carlo targets in closed form; {self.targets} needs "
                "hidden_widths"
            )
        if not self.has_linear_part and not self.hidden_widths:
            raise ValueError("has_linear_part: a head needs it, or hidden_widths")
        return self

    @model_validator(mode="after")
    def _critics_belong_to_the_natural_metric(self) -> Self:
        given = [name for name in ("critic", "advantage_trace", "prefix_stride") if name in self.model_fields_set]
        if given and self.metric != "natural":
            raise ValueError(f"{given[0]}: goes with the metric natural alone; {self.metric} has no advantages")
        if self.prefix_stride is not None and self.critic == "value":
            raise ValueError("prefix_stride: goes with the critics auto and prefix_reward")
        return self

    def centres(self, kind: RunKind) -> bool:
        """Whether each prompt's mean is subtracted. Most prompts of single texts have one, of which nothing would be
        left."""
        return self.center_by_prompt and (kind != "texts" or "center_by_prompt" in self.model_fields_set)

    @model_validator(mode="after")
    def _fields_are_linear_heads_by_the_natural_metric(self) -> Self:
        if "field_features" in self.model_fields_set and self.metric != "natural":
            raise ValueError(f"field_features: goes with the metric natural alone, not with {self.metric}")
        if "field_features" in self.model_fields_set and self.hidden_widths:
            raise ValueError("field_features: goes without hidden_widths; a field's value is linear")
        return self

    def features_tried(self, hidden_size: int, num_tokens: int) -> int:
        """Of a field that may be taken, where there are so many training tokens; 0 for none."""
        if self.metric != "natural" or self.hidden_widths:
            return 0
        return num_tried(hidden_size, num_tokens) if self.field_features == "auto" else self.field_features

    @property
    def wants_prefix_rewards(self) -> bool:
        """Whether the text so far is to be scored, where that can be done."""
        return self.metric == "natural" and self.critic != "value"

    @property
    def effective_trace(self) -> float:
        return {"monte_carlo": 1.0, "td_one_step": 0.0}.get(self.targets, self.trace)


@dataclass(slots=True, frozen=True)
class ValidationFigures:
    """What a head does on validation prompts; a card keeps it as `HeadCard.validation`."""

    ascent_gain: float
    """What small edits earn for what they cost; see `AscentGain` in value_models/ascent.py."""
    r2: dict[str, float]
    """Share of the reward's variance that the head explains, at all tokens together (`all`) and at some positions."""
    num_train_tokens: int
    num_validation_tokens: int
    order: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of given texts; see `order_figures` in value_models/order.py."""
    calibration: dict[str, Any] = field(default_factory=dict[str, Any])
    """How far off the value is as a prediction of the reward; see `ExpectedSums.figures`."""
    expected: ExpectedRewards | None = None
    """What reward to expect of a text with a value."""

    def as_dict(self) -> dict[str, Any]:
        """As a card has it."""
        counts = {"num_train_tokens": self.num_train_tokens, "num_validation_tokens": self.num_validation_tokens}
        calibration = {"calibration": self.calibration} if self.calibration else {}
        return {"ascent_gain": self.ascent_gain, "r2": self.r2, **counts, **calibration, **self.order}


@dataclass(slots=True, frozen=True)
class TrainedHead:
    head: ValueHead
    figures: list[ValidationFigures]
    """For each source."""
    critic: CriticFigures | None
    """Of the natural metric where there are rollouts."""
    field: FieldFigures | None = None
    """Where one was tried."""


def train_head(
    sources: Sequence[TrainingData], settings: TrainSettings, *, weights: Sequence[float] | None = None
) -> TrainedHead:
    """Fit one head to one source or several, which count by `weights`, by default all the same.

    The value predicts in the first source's unit. Of rewards in standard deviations it is the weighted least-squares
    fit; for the way uphill see ascent.py. The result is deterministic for a seed on one machine. Raises
    TrainingDataError when a split is empty, when the rewards are all the same, or when states are not finite.
    """
    torch.manual_seed(settings.seed)
    fitted = [
        FitSource.of(data, weight=weight, is_centred=settings.centres(data.kind))
        for data, weight in zip(sources, weights or [1.0] * len(sources), strict=True)
    ]
    rollouts = next((source for source in fitted if not source.data.is_given), None)
    if rollouts is None and settings.field_features not in (0, "auto"):
        raise TrainingDataError("field_features: a field is fitted to rollouts by the metric natural; there are none")
    tried = None
    if settings.metric == "natural":
        tried = credits_to_try(rollouts, settings.critic, trace=settings.advantage_trace, ridge=settings.ridge)
    moments = _moments(fitted, rollouts, tried)
    head, critic, field_figures = _value_head(fitted, moments, settings), None, None
    if tried is None:
        head = head.with_ascent(plain_rows(head, moments, settings.metric, settings.shrinkage))
    else:
        head, critic, field_figures = _natural_head(head, fitted, moments, settings, rollouts, tried)
    head = calibrated(head, sources)
    figures = [_figures(head, source, is_unit=source is fitted[0]) for source in fitted]
    head = head_from_tensors(head.type_name, {k: v.cpu() for k, v in head.state_dict().items()})
    return TrainedHead(head, figures, critic, field_figures)


def _natural_head(
    head: ValueHead,
    sources: Sequence[FitSource],
    moments: Moments,
    settings: TrainSettings,
    rollouts: FitSource | None,
    tried: CreditsToTry,
) -> tuple[ValueHead, CriticFigures | None, FieldFigures | None]:
    """The head with its natural direction, or a field in its place; figures of what was tried, from rollouts alone."""
    damping = settings.damping
    if any(source.data.is_given for source in sources):
        # A handful of texts tells little of the Fisher information of so many dimensions.
        damping += head.hidden_size / sum(source.data.num_tokens("train") for source in sources)
    num_features = 0
    if rollouts is not None:
        num_features = settings.features_tried(head.hidden_size, rollouts.data.num_tokens("train"))
    field = as_field(head, moments, num_features) if num_features else head
    sums = NaturalSums.of(field, sources, tried.credits)
    numbers = range(len(tried.credits))
    ways = [ascending(head, u_WD) for u_WD in sums.directions(numbers, damping=damping, num_rows=1)]
    taken, critic = choose(ways, tried, rollouts)
    if rollouts is None or not num_features:
        return ways[taken], critic, None
    (u_WD,) = sums.directions([taken], damping=damping)
    is_asked = settings.field_features != "auto"
    chosen, figures = choose_field(
        ways[taken], ascending(field, u_WD), rollouts, tried.credits[taken].critic, is_asked=is_asked
    )
    return chosen, critic, figures


def _moments(sources: Sequence[FitSource], rollouts: FitSource | None, tried: CreditsToTry | None) -> Moments:
    """Of the training states, with the rewards of their responses as the target; rollouts that the fit of a critic has
    read are not read again."""
    read = None if tried is None else tried.state_sums
    sums = MomentSums()
    for source, weight in zip(sources, token_weights(sources), strict=True):
        if read is not None and source is rollouts:
            sums.add_sums(read, weight)
            continue
        for block in source.data.blocks("train"):
            sums.add(block.states_ND, block.of_tokens(source.standard_B), weight)
    if not sums.is_finite():
        raise TrainingDataError(NOT_FINITE)
    return sums.moments()


def _value_head(sources: Sequence[FitSource], moments: Moments, settings: TrainSettings) -> ValueHead:
    """Without its way uphill."""
    penalty = settings.ridge
    if any(source.data.is_given for source in sources):
        # Given texts are few, and a response's tokens share one score, so that it is responses that count.
        penalty += len(moments.mean_D) / sum(int(source.data.is_in("train").sum()) for source in sources)
    linear_D = moments.ridge(penalty)
    mean, scale = sources[0].mean, sources[0].scale
    if not settings.hidden_widths:
        return LinearHead(
            mean_D=moments.mean_D,
            scale_D=moments.scale_D,
            inputs_UD=linear_D[None],
            input_bias_U=torch.zeros_like(linear_D[:1]),
            reward_mean=mean,
            reward_scale=scale,
        )
    # Drawn on the CPU, so that a seed is the same network everywhere.
    start_D = linear_D.cpu() if settings.has_linear_part else None
    network = Network(start_D, len(linear_D), settings.hidden_widths).to(linear_D.device)
    fit(network, sources, moments, settings)
    return network.head(moments, mean, scale)


def _figures(head: ValueHead, source: FitSource, *, is_unit: bool) -> ValidationFigures:
    """`is_unit` is of the source in whose unit values are.

    Raises TrainingDataError where validation states or gradients are not finite.
    """
    gain = ascent_gain(head, source, "validation").gain
    if not math.isfinite(gain):
        raise TrainingDataError("rollouts: validation states hold numbers that are not finite; make them anew")
    r2, sums = _over_validation(head, source)
    return ValidationFigures(
        ascent_gain=round(gain, 4),
        r2=r2,
        num_train_tokens=source.data.num_tokens("train"),
        num_validation_tokens=source.data.num_tokens("validation"),
        order=order_figures(head, source.data),
        calibration=sums.figures() if is_unit else {},
        expected=sums.fitted() if is_unit else None,
    )


def _over_validation(head: ValueHead, source: FitSource) -> tuple[dict[str, float], ExpectedSums]:
    """The share of the reward's variance that the head explains, at all tokens and at some positions, and what reward
    to expect of its values, in one pass over validation tokens."""
    explained = {"all": _Explained(), **{f"token_{position}": _Explained() for position in _POSITIONS}}
    sums = ExpectedSums(head.reward_mean, head.reward_scale)
    for block in source.data.blocks("validation"):
        standard_N = head.readout(head.units(block.states_ND))[0].cpu().double()
        truth_N, position_N = block.of_tokens(source.standard_B), block.position_of_tokens()
        explained["all"].add(standard_N, truth_N)
        for position in _POSITIONS:
            at = position_N == position
            explained[f"token_{position}"].add(standard_N[at], truth_N[at])
        values_N = head.reward_mean + head.reward_scale * standard_N
        sums.add(values_N, block.of_tokens(source.data.reward_B), block.of_tokens(source.data.prompt_B))
    return {name: part.share() for name, part in explained.items() if part.count > 1 or name == "all"}, sums


class _Explained:
    """Share of a reward's variance that values explain, as blocks are added."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._squares = self._errors = 0.0

    def add(self, values: Tensor, truth: Tensor) -> None:
        truth = truth.double()
        self.count += len(truth)
        self._sum += float(truth.sum())
        self._squares += float(truth.square().sum())
        self._errors += float((values - truth).square().sum())

    def share(self) -> float:
        variance = self._squares / self.count - (self._sum / self.count) ** 2
        return 1.0 - self._errors / self.count / max(variance, 1e-12)
