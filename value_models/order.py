"""Whether a head tells better given texts from worse ones, on prompts that no fit has seen.

Knows nothing of files or servers. Enter at `order_figures`.

Shapes: B responses, N tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from value_models.heads import ValueHead
from value_models.linalg import vecdot
from value_models.moments import CHUNK_TOKENS
from value_models.training_data import TrainingData

_MAX_COMPARED = 4000
"""Every two single texts are compared, so not more of them than so many."""


def order_figures(head: ValueHead, data: TrainingData) -> dict[str, Any]:
    """What a card says of given texts, nothing of rollouts: `order`, and what a step of 1 costs training tokens.

    Pairs are compared within themselves, single texts each with every other of another score. A direction puts two in
    order where a small edit makes the better one gain more log-probability, in sum for the responses to one prompt
    (as in direct preference optimisation) and per token for single texts; the value where it is higher at the better
    one's last token. Half of those that it cannot tell apart count.
    """
    if not data.is_given:
        return {}
    change_N, cost_N = _changes(head, data)
    lengths_B = data.offsets[1:] - data.offsets[:-1]
    gained_B = torch.zeros(len(lengths_B)).index_add_(0, data.response_of_tokens(), change_N)
    if data.kind == "texts":
        gained_B = gained_B / lengths_B
    value_B = head.value(data.states_ND[data.offsets[1:] - 1])
    held_out = data.is_in("validation")
    better, worse = _compared(data, held_out)
    return {
        "order": {
            "what": "pairs" if data.kind == "pairs" else "couples of texts",
            "compared": len(better),
            "by_direction": _share_in_order(gained_B, better, worse),
            "by_value": _share_in_order(value_B, better, worse),
        },
        "train_unit_cost_nats": round(float(cost_N[data.tokens_of("train")].mean()), 4),
    }


def _changes(head: ValueHead, data: TrainingData) -> tuple[Tensor, Tensor]:
    """What an ascent of length 1 adds to each token's log-probability, and what it costs, to second order; [N]."""
    changes: list[Tensor] = []
    costs: list[Tensor] = []
    for chunk in torch.split(torch.arange(len(data.states_ND)), CHUNK_TOKENS):
        _, slope_U = head.readout(head.units(data.states_ND[chunk]))
        shift_D = slope_U @ head.folded_ascent()
        changes.append(vecdot(shift_D, data.logp_grads_ND[chunk].float()))
        costs.append(0.5 * vecdot(shift_D, data.cost_grads_ND[chunk].float()).square())
    return torch.cat(changes), torch.cat(costs)


def _compared(data: TrainingData, is_in_B: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the better and the worse response of all comparisons."""
    index = is_in_B.nonzero()[:, 0][:_MAX_COMPARED]
    if data.kind == "pairs":
        return index[data.reward_B[index] > 0], index[data.reward_B[index] < 0]
    rewards = data.reward_B[index]
    better, worse = (rewards[:, None] > rewards[None, :]).nonzero().unbind(1)
    return index[better], index[worse]


def _share_in_order(score_B: Tensor, better: Tensor, worse: Tensor) -> float | None:
    if len(better) == 0:
        return None
    margin = score_B[better] - score_B[worse]
    return round(float(((margin > 0).float() + 0.5 * (margin == 0)).mean()), 4)
