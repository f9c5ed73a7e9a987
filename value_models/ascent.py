"""Which way is uphill: the rows along which a head's edits move a state, and how long one step is.

    identity      rows W: the plain gradient of the value, as in the paper
    covariance    rows W M, M the correlation of the training states
    natural       the natural policy gradient: one row u with the advantages A of the sampled tokens best explained by
                  u . grad_h log pi(token | h), that is u = F^-1 E[A grad], F = E[grad grad^T] the Fisher information

The plain gradient asks how the value reads a state; an edit is felt only through the token it makes likelier, which is
what the natural one asks. Advantages are generalised ones by a critic, so a token is credited with what it changed and
not with the luck of the whole response. The critic is the head's own value, or one that sees the text so far as well
(critic.py). Texts that the model did not write have their scores for advantages, and the Fisher information is that of
tokens which the model draws in the same states.

From several sources each gives the direction that its own advantages ask for, by the Fisher information of tokens of
all. Directions of one cost are added by the sources' weights, so neither the unit of a score nor the number of
tokens decides how much a source counts.

All rows are scaled so that an ascent of length 1 costs UNIT_COST_NATS a token on average over training states, to
second order, where KL = u F u / 2. So step sizes mean the same for every head. Knows nothing of files or servers. Enter
at `NaturalSums`, `calibrated` and `ascent_gain`.

A field (fields.py) has a direction for each of its features beside the constant one, which are fitted jointly.

Tokens are read in blocks, in one pass for all directions and one for their length, and only sums are kept.

Shapes: N tokens of a block, B responses of a source, D hidden size, U units of a head, W fitted rows, F = W D, C ways
of crediting tokens.

Source: Kakade 2001, A natural policy gradient; Schulman et al. 2016, High-dimensional continuous control using GAE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from value_models.critic import Credit, PrefixCritic
from value_models.errors import TrainingDataError
from value_models.heads import UNIT_COST_NATS, FieldHead, ValueHead
from value_models.linalg import solve, vecdot
from value_models.moments import Moments, ProductGramSum
from value_models.sources import FitSource
from value_models.token_blocks import TokenBlock
from value_models.training_data import TrainingData

Metric = Literal["natural", "covariance", "identity"]
MONTE_CARLO = Credit(trace=1.0)
"""The reward less the head's value."""
ADDED_DAMPING = 10.0
"""Of a field's added rows, relative to that of its constant one."""
CLEAR_ERRORS = 2.0
"""Standard errors by which one gain has to be above another to be clearly so."""
_MIN_COST_NATS = 1e-12
_FISHER_TOKENS = 128
"""Tokens for each number of a direction that the Fisher information is the mean of, where there are as many. That makes
a direction worse by a share of about 1 / 128, and to take all of millions would be most of the time of a fit."""
_MIN_FISHER_TOKENS = 1 << 18


def plain_rows(head: ValueHead, moments: Moments, metric: Metric, shrinkage: float) -> Tensor:
    """Rows [U, D] over the normalised state, not yet calibrated, of the metrics that ask no tokens; `shrinkage` belongs
    to the covariance metric."""
    return head.inputs_UD.clone() if metric == "identity" else head.inputs_UD @ moments.metric(shrinkage)


@dataclass(slots=True, frozen=True)
class NaturalSums:
    """What natural directions are solved from: one pass over the training tokens of all sources.

    Of a field it has the constant direction too, since that is what the field's first row is without the others.
    """

    head: ValueHead
    fisher: ProductGramSum
    """Of the head's features and the gradients."""
    num_fisher_tokens: int
    gains: list[Tensor]
    """For each source and each way of crediting the tokens of rollouts, [C, W, D]: the mean of advantages times
    features times gradients, float64."""
    weights: list[float]
    """Of the sources."""

    @classmethod
    def of(cls, head: ValueHead, sources: Sequence[FitSource], credits: Sequence[Credit]) -> NaturalSums:
        num_rows, size, device = _num_fitted(head), head.hidden_size, head.scale_D.device
        fisher, gains = ProductGramSum(num_rows, size, device), list[Tensor]()
        num_tokens, num_fisher_tokens = sum(source.data.num_tokens("train") for source in sources), 0
        share = max(_FISHER_TOKENS * num_rows * size, _MIN_FISHER_TOKENS) / num_tokens
        order = torch.Generator().manual_seed(0)
        for source in sources:
            mean_score = source.mean_score("train")
            gain_CWD = torch.zeros(len(credits), num_rows, size, dtype=torch.float64, device=device)
            for block in source.data.blocks("train"):
                values_N, slope_NU = head.readout(head.units(block.states_ND))
                features_NW = slope_NU[:, :num_rows]
                is_in_N = torch.rand(len(values_N), generator=order).to(device) < share
                num_fisher_tokens += int(is_in_N.sum())
                fisher.add(features_NW[is_in_N], block.cost_grads_ND[is_in_N])
                advantages = [_advantages(values_N, source, block, mean_score, credit) for credit in credits]
                weights_NCW = torch.stack(advantages, dim=1)[:, :, None] * features_NW[:, None]
                gain_CWD += (weights_NCW.flatten(1).T @ block.logp_grads_ND).view_as(gain_CWD)
            gains.append(gain_CWD / source.data.num_tokens("train"))
        return cls(head, fisher, num_fisher_tokens, gains, [source.weight for source in sources])

    def directions(self, numbers: Sequence[int], *, damping: float, num_rows: int | None = None) -> list[Tensor]:
        """u [W, D] = (F + damping * mean eigenvalue * I)^-1 E[A x], x a token's features times its gradient, of several
        sources their sum, for the credits of these `numbers`; of the first rows alone where `num_rows` says so."""
        num_rows = num_rows or _num_fitted(self.head)
        fisher_FF = self.fisher.matrix(num_rows).div_(self.num_fisher_tokens)
        damping_F = _damping(fisher_FF, self.head.hidden_size, damping)
        fisher_FF.diagonal().add_(damping_F)
        found: list[Tensor] = []
        for number in numbers:
            directions = [solve(fisher_FF, gain_CWD[number, :num_rows].flatten()) for gain_CWD in self.gains]
            if len(self.gains) > 1:
                costs = [
                    max(0.5 * float(u_F @ fisher_FF @ u_F - damping_F @ u_F.square()), _MIN_COST_NATS)
                    for u_F in directions
                ]
                directions = [
                    weight * u_F / cost**0.5 for weight, u_F, cost in zip(self.weights, directions, costs, strict=True)
                ]
            found.append(torch.stack(directions).sum(0).float().view(num_rows, self.head.hidden_size))
        return found


def natural_directions(
    head: ValueHead, sources: Sequence[FitSource], credits: Sequence[Credit], *, damping: float
) -> list[Tensor]:
    """u [W, D], one for each way of crediting the tokens of rollouts; see `NaturalSums.directions`."""
    return NaturalSums.of(head, sources, credits).directions(range(len(credits)), damping=damping)


def ascending(head: ValueHead, u_WD: Tensor) -> ValueHead:
    """The head with a direction of its first rows, not yet calibrated; its other rows move nothing."""
    rest_UD = torch.zeros_like(head.inputs_UD[len(u_WD) :])
    return head.with_ascent(torch.cat([u_WD / head.scale_D, rest_UD]))


def _num_fitted(head: ValueHead) -> int:
    """How many of the head's rows the natural gradient fits: all of a field, and of others the linear unit's."""
    return head.num_units if isinstance(head, FieldHead) else 1


def _damping(fisher_FF: Tensor, hidden_size: int, damping: float) -> Tensor:
    """What is added to the diagonal [F]: of each row relative to the mean eigenvalue of its own part."""
    parts = torch.split(fisher_FF.diagonal(), hidden_size)
    means = [damping * (ADDED_DAMPING if row else 1.0) * part_D.mean() for row, part_D in enumerate(parts)]
    return torch.stack(means).repeat_interleave(hidden_size)


def calibrated(head: ValueHead, sources: Sequence[TrainingData]) -> ValueHead:
    """The head with its rows scaled so that an ascent of length 1 costs UNIT_COST_NATS a token on average.

    Over training tokens of rollouts, and over validation tokens of given texts: those may be so few that the rows
    follow what training tokens happen to cost little. Raises TrainingDataError where states or gradients are not
    finite.
    """
    splits = [(data, "validation" if data.is_given else "train") for data in sources]
    total_nats = sum(cost_nats(head, data, split) for data, split in splits)
    if not math.isfinite(total_nats):
        raise TrainingDataError("rollouts: states or gradients hold numbers that are not finite; make them anew")
    mean_nats = max(total_nats / sum(data.num_tokens(split) for data, split in splits), _MIN_COST_NATS)
    return head.with_ascent(head.ascent_UD * (UNIT_COST_NATS / mean_nats) ** 0.5)


def cost_nats(head: ValueHead, data: TrainingData, split: str) -> float:
    """What an ascent of length 1 costs all tokens of a split together, to second order."""
    return sum(
        0.5 * float(vecdot(shift_of(head, block), block.cost_grads_ND).square().sum(dtype=torch.float64))
        for block in data.blocks(split)
    )


@dataclass(slots=True, frozen=True)
class AscentGain:
    """What edits earn for what they cost, to first order: standard deviations of reward a token, a root nat.

    E[A s . grad] / sqrt(E[(s . grad)^2] / 2) over a split's tokens, with s the head's shift and A the reward less the
    value: small edits that cost k nats a token add about this times sqrt(k) for each token of a response. On tokens
    that no fit has seen it compares ways uphill in seconds, without sampling. Its noise is about the root of 2 / N.
    Advantages are Monte Carlo here, whatever the direction was fitted by, so that every way is judged alike. What is
    subtracted from the reward changes the noise alone: the head's value, or a critic's.
    """

    earned_P: Tensor
    """Sums of A s . grad by prompt, float64."""
    paid: float
    """Sum of (s . grad)^2 / 2."""
    num_tokens: int

    @property
    def gain(self) -> float:
        return float(self._by_prompt().sum())

    def margin(self, other: AscentGain) -> tuple[float, float]:
        """How much greater the gain is than another's on the same tokens, and the standard error of that, by prompts:
        infinite for less than two."""
        difference_P = self._by_prompt() - other._by_prompt()
        count = len(difference_P)
        error = float(difference_P.std()) * count**0.5 if count > 1 else math.inf
        return float(difference_P.sum()), error

    def _by_prompt(self) -> Tensor:
        return self.earned_P / self.num_tokens / max(self.paid / self.num_tokens, _MIN_COST_NATS) ** 0.5


def ascent_gain(head: ValueHead, source: FitSource, split: str, critic: PrefixCritic | None = None) -> AscentGain:
    """Of a head's way uphill on the tokens of a split; by the head's value where no critic is given."""
    (gain,) = ascent_gains([head], source, split, critic)
    return gain


def ascent_gains(
    heads: Sequence[ValueHead], source: FitSource, split: str, critic: PrefixCritic | None = None
) -> list[AscentGain]:
    """`ascent_gain` of several heads in one pass over the tokens."""
    data, mean_score, credit = source.data, source.mean_score(split), Credit(1.0, critic)
    prompts = data.prompts_in(split)
    number_B = torch.searchsorted(prompts, data.prompt_B)
    earned_HP, paid_H = torch.zeros(len(heads), len(prompts), dtype=torch.float64), [0.0] * len(heads)
    for block in data.blocks(split):
        states_ND, logp_grads_ND, cost_grads_ND = block.states_ND, block.logp_grads_ND, block.cost_grads_ND
        for number, head in enumerate(heads):
            values_N, shift_ND = _value_and_shift(head, states_ND)
            advantage_N = _advantages(values_N, source, block, mean_score, credit)
            earned_N = (advantage_N * vecdot(shift_ND, logp_grads_ND)).double().cpu()
            earned_HP[number].index_add_(0, block.of_tokens(number_B), earned_N)
            paid_H[number] += 0.5 * float(vecdot(shift_ND, cost_grads_ND).square().sum(dtype=torch.float64))
    num_tokens = data.num_tokens(split)
    return [AscentGain(earned_P, paid, num_tokens) for earned_P, paid in zip(earned_HP, paid_H, strict=True)]


def shift_of(head: ValueHead, block: TokenBlock) -> Tensor:
    """How an ascent of length 1 moves each token's state, [N, D]."""
    return _value_and_shift(head, block.states_ND)[1]


def _value_and_shift(head: ValueHead, states_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N] in standard deviations, and how an ascent of length 1 moves each state, [N, D]."""
    values_N, slope_NU = head.readout(head.units(states_ND))
    return values_N, slope_NU @ head.folded_ascent()


def _advantages(values_N: Tensor, source: FitSource, block: TokenBlock, mean_score: float, credit: Credit) -> Tensor:
    """What each token [N] of a block earned, in standard deviations of the source's training reward. `values_N` are
    the head's, for where the credit has no critic.

    Of texts that the model did not write: their text's score, less `mean_score`, that of all tokens of the split. So
    E[A grad] is the gradient of the margin between better and worse texts. What the mean leaves out is that all texts
    become likelier, since gradients of texts of others do not vanish in the mean. No value is subtracted: there are few
    texts, and a value fitted to them knows most of their scores, of which nothing would be left.
    """
    if source.data.is_given:
        return block.of_tokens(source.standard_B - mean_score).to(values_N.device)
    if credit.critic is not None:
        values_N = credit.critic.values(block)
    if credit.trace == 1.0:
        return block.of_tokens(source.standard_B).to(values_N.device) - values_N
    returns_N = block.lambda_returns(source.standard_B, values_N.cpu(), trace=credit.trace)
    return returns_N.to(values_N.device) - values_N
