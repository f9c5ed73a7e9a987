"""Adaptive importance sampling over the weights of an objective's heads: the search of that type, without an engine.

Every candidate for a block is drawn under weights of its own, from a Gaussian. Its mean then moves to the candidates'
weights, averaged by how well they scored, and the next block is planned from there: model-predictive path integral
control, as AISP does it over hidden states (arXiv 2510.26219). AISP perturbs each token's whole state, hundreds of
numbers of which a few samples say next to nothing; here the perturbation stays within the directions of the heads.
Where AISP's weights have a term for its divergence from the base model, requests have exact budgets. Knows nothing of
sequences or random streams. Enter at `Proposal.of`.

Shapes: C candidates, K heads.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from server.control.objectives import MAX_ABS_WEIGHT, WeightedSum
from server.control.params import ControlParams, ImportanceSampling


@dataclass(slots=True, frozen=True)
class Proposal:
    """The Gaussian that the next block's weights are drawn from; heads come in the order of their names."""

    control: ControlParams
    """As the request has it."""
    mean_K: tuple[float, ...]
    spread: float
    temperature: float

    @classmethod
    def of(cls, control: ControlParams | None) -> Proposal | None:
        """That of the first block, around the request's own weights; None where there is nothing to be drawn."""
        search = None if control is None else control.search
        if control is None or not isinstance(search, ImportanceSampling) or search.candidates == 1:
            return None
        weights = control.objective.head_weights
        return cls(control, tuple(weights[name] for name in sorted(weights)), search.spread, search.temperature)

    def drawn(self, noise_K: Sequence[float]) -> ControlParams:
        """The control of a candidate, by standard normal numbers; zeros give the mean."""
        drawn_K = [mean + self.spread * noise for mean, noise in zip(self.mean_K, noise_K, strict=True)]
        kept_K = [min(max(weight, -MAX_ABS_WEIGHT), MAX_ABS_WEIGHT) for weight in drawn_K]
        names = sorted(self.control.objective.head_weights)
        objective = WeightedSum(weights=dict(zip(names, kept_K, strict=True)))
        return self.control.model_copy(update={"objective": objective})

    def after(self, tried: Sequence[ControlParams], scores_C: Sequence[float]) -> Proposal:
        """That of the next block: w_c ~ exp(z_c / temperature), the mean the sum of w_c weights_c.

        z are the scores, standardised over the candidates. A score that is no number counts for nothing, and where
        scores tell no difference the mean stays.
        """
        known = [(control, score) for control, score in zip(tried, scores_C, strict=True) if math.isfinite(score)]
        scale = statistics.pstdev(score for _, score in known) if known else 0.0
        if not 0.0 < scale < math.inf:
            return self
        best = max(score for _, score in known)
        shares = [math.exp((score - best) / scale / self.temperature) for _, score in known]
        total = math.fsum(shares)
        names = sorted(self.control.objective.head_weights)
        rows_CK = [[control.objective.head_weights[name] for name in names] for control, _ in known]
        mean_K = tuple(
            math.fsum(share * weight for share, weight in zip(shares, column_C, strict=True)) / total
            for column_C in zip(*rows_CK, strict=True)
        )
        return Proposal(self.control, mean_K, self.spread, self.temperature)
