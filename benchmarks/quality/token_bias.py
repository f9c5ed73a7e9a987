"""A constant bias on tokens as a rival: added to every state's logits as far as a head's budget allows.

At each token the largest scale up to the strength is taken whose exact KL is within the budget, by the search that
heads' edits take. Enter at `token_bias`.

Shapes: B rows of a step, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from server.cli.arms import ArmFactory
from server.control.budget import largest_linear_scale
from server.control.editor import StateEditor, Unembedding
from server.control.group_edit import GroupStats
from server.control.plan import EditPlan
from value_models.evaluation import Arm
from value_models.generations import EvalSample
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings


class BiasEditor(StateEditor):
    """Moves every row of a step by the same bias, and each by as much of it as the budget allows."""

    def __init__(self, unembedding: Unembedding, bias_V: Tensor, max_kl: float) -> None:
        super().__init__(unembedding)
        self._bias_V, self._max_kl = bias_V, max_kl

    def logits(
        self, hidden_BD: Tensor, plan: EditPlan, instructed: Mapping[int, Tensor] | None = None
    ) -> tuple[Tensor, list[GroupStats]]:
        logits_BV, stats = super().logits(hidden_BD, plan, instructed)
        bias_BV = self._bias_V.to(logits_BV.device).expand_as(logits_BV).contiguous()
        max_kl_B = torch.full_like(logits_BV[:, 0], self._max_kl)
        scale_B, _ = largest_linear_scale(logits_BV, torch.arange(len(logits_BV)), bias_BV, max_kl_B)
        return torch.addcmul(logits_BV, scale_B[:, None], bias_BV), stats


def token_bias(factory: ArmFactory, bias_V: Tensor, *, strength: float, max_kl: float) -> Arm:
    """`strength` times a bias in its own unit, within `max_kl` nats at every token."""
    source = factory.source
    editor = BiasEditor(source.core.lm_head, strength * bias_V, max_kl)

    def sample(prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterable[EvalSample]:
        return source.evaluate(prompts, settings, editor=editor)

    digest = hashlib.sha256(bias_V.cpu().contiguous().numpy().tobytes()).hexdigest()
    return factory.arm({"bias": {"tokens": digest, "strength": strength, "max_kl": max_kl}}, sample)
