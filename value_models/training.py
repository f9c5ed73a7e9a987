"""Fitting a value head to rollouts: targets, normalisation, a small network with early stopping, the way uphill.

The linear part is the ridge solution, which is exact; hidden layers, if any, start from it and learn what is left.
Splits are by prompt, so validation figures are on prompts that the fit has not seen. Knows nothing of language models
or servers. Enter at `train_head`.

Shapes: N tokens of all responses one after the other, B responses, D hidden size, H head width.
"""

# torch leaves types out of `manual_seed`, `Tensor.backward` and an optimiser's `step`.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from value_models.ascent import Metric, ascent_gain, ascent_rows, calibrated
from value_models.errors import TrainingDataError
from value_models.heads import LinearHead, MLPHead, ValueHead
from value_models.moments import CHUNK_TOKENS, Moments
from value_models.targets import center_by_prompt
from value_models.training_data import TrainingData

_log = logging.getLogger(__name__)
_MIN_REWARD_SCALE = 1e-5


class TrainSettings(BaseModel):
    """What `recontrol train` can vary; the defaults are what the default model's heads were made with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: Literal["monte_carlo", "td_lambda", "td_one_step"] = "monte_carlo"
    trace: float = Field(default=0.95, ge=0, le=1, description="lambda of td_lambda")
    center_by_prompt: bool = Field(default=True, description="subtract each prompt's mean reward")
    hidden_widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="hidden layers beside the linear part; none by default"
    )
    has_linear_part: bool = Field(
        default=True, description="without it, as in the paper, the hidden layers are all there is"
    )
    metric: Metric = Field(default="natural", description="which way is uphill; see value_models/ascent.py")
    advantage_trace: float = Field(default=1.0, ge=0, le=1, description="lambda of the natural metric's advantages")
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

    @property
    def effective_trace(self) -> float:
        return {"monte_carlo": 1.0, "td_one_step": 0.0}.get(self.targets, self.trace)


@dataclass(slots=True, frozen=True)
class ValidationFigures:
    """What a head does on validation prompts; a card keeps it as `HeadCard.validation`."""

    ascent_gain: float
    """What small edits earn for what they cost; see `ascent_gain` in value_models/ascent.py."""
    r2: dict[str, float]
    """Share of the reward's variance that the head explains, at all tokens together (`all`) and at some positions."""
    num_train_tokens: int
    num_validation_tokens: int


@dataclass(slots=True, frozen=True)
class TrainedHead:
    head: ValueHead
    figures: ValidationFigures


def train_head(data: TrainingData, settings: TrainSettings) -> TrainedHead:
    """Fit one head. The result is deterministic for a seed on one machine.

    Raises TrainingDataError when a split is empty, or when the rewards are all the same.
    """
    torch.manual_seed(settings.seed)
    train_N, validation_N = data.tokens_of("train"), data.tokens_of("validation")
    moments = Moments.of(data.states_ND, train_N)
    reward_B = center_by_prompt(data.reward_B, data.prompt_B) if settings.center_by_prompt else data.reward_B
    is_train_B = data.is_in("train")
    mean, scale = float(reward_B[is_train_B].mean()), float(reward_B[is_train_B].std())
    if not scale > _MIN_REWARD_SCALE:
        within = " within each prompt (sample several responses a prompt)" if settings.center_by_prompt else ""
        raise TrainingDataError(f"reward: the training responses all have the same reward{within}; nothing to learn")
    standard_B = (reward_B - mean) / scale
    target_N = standard_B[data.response_of_tokens()]

    # Given texts are few, and a response's tokens share one score, so that it is responses that count.
    few = len(moments.mean_D) / int(is_train_B.sum()) if data.is_given else 0.0
    linear_D = moments.ridge(data.states_ND, train_N, target_N, settings.ridge + few)
    if settings.hidden_widths:
        network = _Network(linear_D if settings.has_linear_part else None, len(linear_D), settings.hidden_widths)
        _fit(network, data, moments, target_N, settings, train_N, validation_N)
        head = network.head(moments, mean, scale)
    else:
        head = LinearHead(
            mean_D=moments.mean_D,
            scale_D=moments.scale_D,
            inputs_UD=linear_D[None],
            input_bias_U=torch.zeros(1),
            reward_mean=mean,
            reward_scale=scale,
        )
    rows_UD = ascent_rows(
        head,
        data,
        moments,
        standard_B,
        metric=settings.metric,
        shrinkage=settings.shrinkage,
        trace=settings.advantage_trace,
        damping=settings.damping,
    )
    head = calibrated(head.with_ascent(rows_UD), data)
    figures = ValidationFigures(
        ascent_gain=round(ascent_gain(head, data, standard_B, validation_N), 4),
        r2=_r2_by_position(head, data, target_N * scale + mean, validation_N),
        num_train_tokens=len(train_N),
        num_validation_tokens=len(validation_N),
    )
    return TrainedHead(head, figures)


class _Network(nn.Module):
    """The trainable twin of `MLPHead`."""

    def __init__(self, linear_D: Tensor | None, hidden_size: int, hidden_widths: tuple[int, ...]) -> None:
        """It starts as the linear part alone, where there is one."""
        super().__init__()
        self.linear_D = nn.Parameter(
            torch.zeros(hidden_size) if linear_D is None else linear_D.clone(), requires_grad=linear_D is not None
        )
        sizes = [hidden_size, *hidden_widths]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.out = nn.Linear(sizes[-1], 1)
        nn.init.zeros_(self.out.bias)
        if linear_D is not None:
            nn.init.zeros_(self.out.weight)

    def forward(self, x_ND: Tensor) -> Tensor:
        active = x_ND
        for layer in self.layers:
            active = functional.relu(layer(active))
        return x_ND @ self.linear_D + self.out(active)[:, 0]

    def head(self, moments: Moments, mean: float, scale: float) -> MLPHead:
        first: Any = self.layers[0]
        later: list[Any] = list(self.layers[1:])
        return MLPHead(
            mean_D=moments.mean_D,
            scale_D=moments.scale_D,
            inputs_UD=torch.cat([self.linear_D[None], first.weight]).detach(),
            input_bias_U=torch.cat([torch.zeros(1), first.bias.detach()]),
            reward_mean=mean,
            reward_scale=scale,
            hidden_weights=[layer.weight.detach() for layer in later],
            hidden_biases=[layer.bias.detach() for layer in later],
            out_weight_H=self.out.weight.detach()[0],
            out_bias=self.out.bias.detach()[0],
        )


def _fit(
    network: _Network,
    data: TrainingData,
    moments: Moments,
    reward_N: Tensor,
    settings: TrainSettings,
    train_N: Tensor,
    validation_N: Tensor,
) -> None:
    """Minimise the squared error with early stopping; leaves the best weights in the network."""
    decayed = [p for name, p in network.named_parameters() if name.endswith("weight")]
    others = [p for name, p in network.named_parameters() if not name.endswith("weight")]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
    )
    best_loss, best_state, waited = float("inf"), {}, 0
    for epoch in range(settings.max_epochs + 1):
        # Validation is always against the reward itself, so that target types can be compared; first the linear part's.
        values_N = _values(network, data, moments, validation_N)
        validation_loss = float(functional.mse_loss(values_N, reward_N[validation_N]))
        _log.info("after %d epochs: validation loss %.4f", epoch, validation_loss)
        if validation_loss < best_loss:
            best_loss, waited = validation_loss, 0
            best_state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        else:
            waited += 1
        if waited >= settings.patience or epoch == settings.max_epochs:
            break
        targets_of = _targets(network, data, moments, reward_N, settings)
        for batch in torch.split(train_N[torch.randperm(len(train_N))], settings.batch_size):
            loss = functional.mse_loss(network(moments.normalise(data.states_ND[batch])), targets_of(batch))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    network.load_state_dict(best_state)


def _targets(
    network: _Network, data: TrainingData, moments: Moments, reward_N: Tensor, settings: TrainSettings
) -> Callable[[Tensor], Tensor]:
    """Token indices -> detached targets for one epoch.

    Lambda-returns take the network's values at the epoch's start; one-step targets take them as it learns, since a
    value that moves back one token an epoch would never reach the first.
    """
    if settings.effective_trace == 1.0:
        return lambda batch: reward_N[batch]
    last = data.offsets[1:] - 1
    if settings.effective_trace == 0.0:
        is_last_N = torch.zeros(len(reward_N), dtype=torch.bool)
        is_last_N[last] = True

        def one_step(batch: Tensor) -> Tensor:
            following = (batch + 1).clamp(max=len(reward_N) - 1)
            return torch.where(is_last_N[batch], reward_N[batch], _values(network, data, moments, following))

        return one_step
    values_N = _values(network, data, moments, torch.arange(len(reward_N)))
    target_N = data.lambda_returns(reward_N[last], values_N, trace=settings.effective_trace)
    return lambda batch: target_N[batch]


@torch.no_grad()
def _values(network: _Network, data: TrainingData, moments: Moments, tokens_N: Tensor) -> Tensor:
    return torch.cat(
        [network(moments.normalise(data.states_ND[chunk])) for chunk in torch.split(tokens_N, CHUNK_TOKENS)]
    )


def _r2_by_position(head: ValueHead, data: TrainingData, target_N: Tensor, tokens_N: Tensor) -> dict[str, float]:
    """Share of the reward's variance that the head explains on given tokens, overall and at some positions."""
    values_N = torch.cat([head.value(data.states_ND[chunk]) for chunk in torch.split(tokens_N, CHUNK_TOKENS)])
    position_N, truth_N = data.position_of_tokens()[tokens_N], target_N[tokens_N]
    figures = {"all": _r2(values_N, truth_N)}
    for position in (0, 10, 20, 40, 60):
        at = position_N == position
        if at.sum() > 1:
            figures[f"token_{position}"] = _r2(values_N[at], truth_N[at])
    return figures


def _r2(values: Tensor, truth: Tensor) -> float:
    variance = float(((truth - truth.mean()) ** 2).mean())
    return 1.0 - float(((values - truth) ** 2).mean()) / max(variance, 1e-12)
