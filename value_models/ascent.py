"""Which way is uphill: the rows along which a head's edits move a state, and how long one step is.

    identity      rows W: the plain gradient of the value, as in the paper
    covariance    rows W M, M the correlation of the training states
    natural       the natural policy gradient: one row u with the advantages A of the sampled tokens best explained by
                  u . grad_h log pi(token | h), that is u = F^-1 E[A grad], F = E[grad grad^T] the Fisher information

The plain gradient asks how the value reads a state; an edit is felt only through the token it makes likelier, which is
what the natural one asks. Advantages come from the head's own values (generalised advantage estimation), so a token is
credited with what it changed and not with the luck of the whole response. Texts that the model did not write have their
scores for advantages, and the Fisher information is that of tokens which the model draws in the same states.

All rows are scaled so that an ascent of length 1 costs UNIT_COST_NATS a token on average over training states, to
second order, where KL = u F u / 2. So step sizes mean the same for every head. Knows nothing of files or servers. Enter
at `ascent_rows`, `calibrated` and `ascent_gain`.

Shapes: N tokens of all responses one after the other, D hidden size, U units of a head.

Source: Kakade 2001, A natural policy gradient; Schulman et al. 2016, High-dimensional continuous control using GAE.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from value_models.heads import UNIT_COST_NATS, ValueHead
from value_models.linalg import solve, vecdot
from value_models.moments import CHUNK_TOKENS, Moments
from value_models.training_data import TrainingData

Metric = Literal["natural", "covariance", "identity"]
_MIN_COST_NATS = 1e-12


def ascent_rows(
    head: ValueHead,
    data: TrainingData,
    moments: Moments,
    standard_B: Tensor,
    *,
    metric: Metric,
    shrinkage: float,
    trace: float,
    damping: float,
) -> Tensor:
    """Rows [U, D] over the normalised state, not yet calibrated. `standard_B` are the rewards that the head predicts.

    `shrinkage` belongs to the covariance metric; `trace` (lambda of the advantages) and `damping` (added to the Fisher
    information, relative to its mean eigenvalue) to the natural one. There the linear unit alone has a row.
    """
    if metric == "identity":
        return head.inputs_UD.clone()
    if metric == "covariance":
        return head.inputs_UD @ moments.metric(shrinkage)
    tokens_N = data.tokens_of("train")
    if data.is_given:
        advantage_N = _given_advantages(data, standard_B, tokens_N)
        # A handful of texts tells little of the Fisher information of so many dimensions.
        damping += len(head.scale_D) / len(tokens_N)
    else:
        values_N = _standardised_values(head, data)
        advantage_N = data.lambda_returns(standard_B, values_N, trace=trace) - values_N
    rows_UD = torch.zeros_like(head.inputs_UD)
    rows_UD[0] = natural_direction(data, tokens_N, advantage_N, damping=damping) / head.scale_D
    return rows_UD


def natural_direction(data: TrainingData, tokens_N: Tensor, advantage_N: Tensor, *, damping: float) -> Tensor:
    """u [D] = (F + damping * mean eigenvalue * I)^-1 E[A grad], over the given tokens."""
    size = data.states_ND.shape[1]
    fisher_DD, gain_D = torch.zeros(size, size), torch.zeros(size)
    for chunk in torch.split(tokens_N, CHUNK_TOKENS):
        drawn = data.cost_grads_ND[chunk].float()
        fisher_DD += drawn.T @ drawn
        gain_D += advantage_N[chunk] @ data.logp_grads_ND[chunk].float()
    damped_DD = fisher_DD + damping * fisher_DD.diagonal().mean() * torch.eye(size)
    return solve(damped_DD, gain_D)


def calibrated(head: ValueHead, data: TrainingData) -> ValueHead:
    """The head with its rows scaled so that an ascent of length 1 costs UNIT_COST_NATS a token on average.

    Over training tokens of rollouts, and over validation tokens of given texts: those may be so few that the rows
    follow what training tokens happen to cost little.
    """
    total_nats, tokens_N = 0.0, data.tokens_of("validation" if data.is_given else "train")
    for chunk in torch.split(tokens_N, CHUNK_TOKENS):
        _, slope_U = head.readout(head.units(data.states_ND[chunk]))
        shift_D = slope_U @ head.folded_ascent()
        change = vecdot(shift_D, data.cost_grads_ND[chunk].float())
        total_nats += 0.5 * float(change.square().sum())
    cost_nats = max(total_nats / len(tokens_N), _MIN_COST_NATS)
    return head.with_ascent(head.ascent_UD * (UNIT_COST_NATS / cost_nats) ** 0.5)


def ascent_gain(head: ValueHead, data: TrainingData, standard_B: Tensor, tokens_N: Tensor) -> float:
    """What edits earn for what they cost, to first order: standard deviations of reward a token, a root nat.

    E[A s . grad] / sqrt(E[(s . grad)^2] / 2) over the given tokens, with s the head's shift and A the reward less the
    value: small edits that cost k nats a token add about this times sqrt(k) for each token of a response. On tokens
    that no fit has seen it compares ways uphill in seconds, without sampling. Its noise is about the root of 2 / N.
    """
    earned, paid = 0.0, 0.0
    if data.is_given:
        advantage_N = _given_advantages(data, standard_B, tokens_N)
    else:
        advantage_N = standard_B[data.response_of_tokens()] - _standardised_values(head, data)
    for chunk in torch.split(tokens_N, CHUNK_TOKENS):
        _, slope_U = head.readout(head.units(data.states_ND[chunk]))
        shift_D = slope_U @ head.folded_ascent()
        earned += float(advantage_N[chunk] @ vecdot(shift_D, data.logp_grads_ND[chunk].float()))
        paid += 0.5 * float(vecdot(shift_D, data.cost_grads_ND[chunk].float()).square().sum())
    return earned / len(tokens_N) / max(paid / len(tokens_N), _MIN_COST_NATS) ** 0.5


def _standardised_values(head: ValueHead, data: TrainingData) -> Tensor:
    """Each token's value [N], in standard deviations of the training reward."""
    return torch.cat([head.readout(head.units(states))[0] for states in torch.split(data.states_ND, CHUNK_TOKENS)])


def _given_advantages(data: TrainingData, standard_B: Tensor, tokens_N: Tensor) -> Tensor:
    """Of tokens [N] of texts that the model did not write: their text's score, less its mean over the given tokens.

    So E[A grad] is the gradient of the margin between better and worse texts. What the mean leaves out is that all
    texts become likelier, since gradients of texts of others do not vanish in the mean. No value is subtracted: there
    are few texts, and a value fitted to them knows most of their scores, of which nothing would be left.
    """
    score_N = standard_B[data.response_of_tokens()]
    return score_N - score_N[tokens_N].mean()
