"""What an objective says of whole texts: its score of the heads' values at given states, without moving anything.

A value predicts how good the finished response will be; of a response that has ended it is the heads' verdict. Every
row is computed alone. Knows nothing of requests or sampling. Enter at `scores`.

Shapes: R rows, K heads, D hidden size.
"""

from __future__ import annotations

from torch import Tensor

from server.control.objectives import Objective, Terms
from server.control.registry import HeadRegistry


def scores(hidden_RD: Tensor, objective: Objective, registry: HeadRegistry) -> Tensor:
    """The objective [R] at states [R, D] of any float dtype, in standard deviations of the training rewards.

    Highest is best for every objective: a weighted sum, the worst of several, closeness to targets, or a weighted sum
    less the largest allowed weight for every standard deviation that a value lacks to its floor. Raises
    UnknownHeadError.
    """
    stack = registry.stack(objective.head_names)
    values_RK, _ = stack.readout(stack.inputs(hidden_RD.float()))
    alike = [objective] * hidden_RD.shape[0]
    return objective.score(values_RK, Terms.of(alike, stack.names, stack.reward_mean_K, stack.reward_scale_K))
