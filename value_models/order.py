"""Whether a head tells better given texts from worse ones, on prompts that no fit has seen.

Knows nothing of files or servers. Enter at `order_figures`.

Shapes: B responses, N tokens of a block, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from value_models.ascent import cost_nats, shift_of
from value_models.heads import ValueHead
from value_models.linalg import vecdot
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
    held_out = data.is_in("validation")
    gained_B, value_B = torch.zeros(len(held_out)), torch.zeros(len(held_out))
    for block in data.blocks("validation"):
        change_N = vecdot(shift_of(head, block), block.logp_grads_ND).cpu()
        gained_B.index_add_(0, block.responses.repeat_interleave(block.lengths), change_N)
        value_B[block.responses] = head.value(block.states_ND[block.last_tokens()]).cpu()
    if data.kind == "texts":
        gained_B = gained_B / data.lengths_B
    better, worse = _compared(data, held_out)
    return {
        "order": {
            "what": "pairs" if data.kind == "pairs" else "couples of texts",
            "compared": len(better),
            "by_direction": _share_in_order(gained_B, better, worse),
            "by_value": _share_in_order(value_B, better, worse),
        },
        "train_unit_cost_nats": round(cost_nats(head, data, "train") / data.num_tokens("train"), 4),
    }


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
