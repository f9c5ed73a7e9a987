"""What a server pins stays as good as it is alone, whatever callers' heads are added to it.

The pinned heads' edit is made first, within its own budgets, as if nobody had asked for more. Then the callers' ascents
are added, with as much of the pinned ones mixed in as keeps them from taking anything back: neither the value of a
pinned head, nor the reward to be expected by its ascent, may fall below what pinning alone gives, nor may the tokens
that its edit raises be less likely. With linear heads slopes tell the first two exactly. In the end values and tokens
are compared once more, and where they are worse, what the callers ask for is dropped. Every operation treats rows
alone. Knows nothing of states or budgets. Enter at `PinnedRows`.

Shapes: R rows, K heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from server.control.multipliers import LEAST_GAIN, SWEEPS

_TRIES = 3
_LOST_SHARE = 0.02
"""Of the ground that the pinned edit gains, what is too little to matter."""
_ROUNDING = 1e-4
"""Of a change, relative to the sizes of what it is the sum of."""


@dataclass(slots=True, frozen=True)
class PinnedRows:
    """What R rows pin of the K heads of a stack.

    `signs_RK`: 1 for a head that is raised, -1 for one that is lowered, 0 for one that is not pinned. `bounds_RK`: the
    bounds of the pinned guardrail, in standard deviations, minus infinity where there is none.
    """

    signs_RK: Tensor
    bounds_RK: Tensor
    pinned: tuple[int, ...]
    """The heads that are pinned in any row."""

    def kept_weights(self, weights_RK: Tensor, effects_RKK: Tensor, inner_RKK: Tensor) -> Tensor:
        """The callers' weights [R, K] with as much of the pinned ascents as keeps all that is pinned; none of them for
        a row where that cannot be.

        `effects_RKK[r, k, l]` is what ascent k does to value l, `inner_RKK` what it does to the reward that ascent l
        is expected to bring. Each pinned head's multiplier is the least that makes up for both, in turn for each.
        """
        added_RK = torch.zeros_like(weights_RK)
        # One head's multiplier does not depend on another's.
        for _ in range(1 if len(self.pinned) == 1 else SWEEPS):
            for k in self.pinned:
                total_RK = weights_RK + self.signs_RK * added_RK
                wanted_R = torch.zeros_like(added_RK[:, k])
                for moves_RKK in (effects_RKK, inner_RKK):
                    gain_R = moves_RKK[:, k, k]
                    change_R = self.signs_RK[:, k] * (total_RK * moves_RKK[:, :, k]).sum(dim=1)
                    others_R = change_R - added_RK[:, k] * gain_R
                    wanted_R = wanted_R.maximum(torch.where(gain_R > LEAST_GAIN, -others_R / gain_R, 0.0))
                added_RK[:, k] = torch.where(self.signs_RK[:, k] != 0, wanted_R, 0.0)
        total_RK = weights_RK + self.signs_RK * added_RK
        is_kept_R = self._keeps(total_RK, effects_RKK) & self._keeps(total_RK, inner_RKK)
        return torch.where(is_kept_R[:, None], total_RK, 0.0)

    def takes_back(self, alone_RK: Tensor, together_RK: Tensor, tolerance: float) -> Tensor:
        """Whether values [R, K] together are worse than those of what is pinned alone: one of its heads is further
        back, or what would break its guardrail no longer does."""
        is_back_RK = self.signs_RK * (together_RK - alone_RK) < -tolerance
        is_lifted_RK = (alone_RK < self.bounds_RK) & (together_RK >= self.bounds_RK)
        return (is_back_RK | is_lifted_RK).any(dim=1)

    def _keeps(self, weights_RK: Tensor, moves_RKK: Tensor) -> Tensor:
        terms_RKK = weights_RK[:, :, None] * moves_RKK
        change_RK = self.signs_RK * terms_RKK.sum(dim=1)
        return (change_RK >= -_ROUNDING * terms_RKK.abs().sum(dim=1)).all(dim=1)


Finish = Callable[[Tensor], Tensor]


def pinned_share(base_RV: Tensor, moved_RV: Tensor, delta_RV: Tensor, finish: Finish) -> Tensor:
    """How much more [R] of the pinned edit, whose change of the logits is `moved_RV`, makes up for what the callers'
    change of the logits takes from it: so much that the tokens drawn are not less those that it raises."""
    alone_R, variance_R = _ground(finish(base_RV + moved_RV), moved_RV)
    more_R = torch.zeros_like(alone_R)
    for _ in range(_TRIES):
        together_R, _ = _ground(finish(base_RV + (1.0 + more_R[:, None]) * moved_RV + delta_RV), moved_RV)
        lacking_R = torch.where(variance_R > LEAST_GAIN, (alone_R - together_R) / variance_R, 0.0)
        more_R = (more_R + lacking_R).clamp(min=0.0)
    return more_R


def loses_ground(base_RV: Tensor, moved_RV: Tensor, delta_RV: Tensor, finish: Finish) -> Tensor:
    """Whether [R] less is left, by more than a little, of what the pinned edit gains."""
    none_R, _ = _ground(finish(base_RV), moved_RV)
    alone_R, _ = _ground(finish(base_RV + moved_RV), moved_RV)
    together_R, _ = _ground(finish(base_RV + moved_RV + delta_RV), moved_RV)
    return alone_R - together_R > _LOST_SHARE * (alone_R - none_R).abs()


def _ground(logits_RV: Tensor, moved_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [R] of the pinned change of a token's logit under these logits."""
    probs_RV = logits_RV.softmax(dim=-1)
    mean_R = (probs_RV * moved_RV).sum(dim=-1)
    return mean_R, (probs_RV * (moved_RV - mean_R[:, None]).square()).sum(dim=-1)
