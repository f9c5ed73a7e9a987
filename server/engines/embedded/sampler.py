"""Tokens from logits, one random stream a sequence.

Inverse-CDF sampling: token = first whose cumulative probability exceeds u, with one uniform u per row that depends on
nothing but the row's seed, choice and position. So a neighbour can never disturb a draw, and no generator has state.
Filters are defined by probability values rather than ranks, so ties do not depend on a sort's order. Knows nothing of
models, control or requests. Enter at `sample`.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels import ops
from value_models.linear import MIN_ROWS

# Below it a row is greedy: its logits over its temperature would not be finite in float32.
_MIN_TEMPERATURE = 1e-5
# Probabilities above which most nuclei lie whole: a few tokens to sort instead of thousands.
_FLOORS = (1e-3, 1e-4)


@dataclass(slots=True, frozen=True)
class RowSampling:
    """How one row is drawn; a temperature near 0 is greedy, top_k 0, top_p 1 and min_p 0 keep every token."""

    temperature: float
    top_p: float
    top_k: int
    stream: tuple[int, int]
    """(seed, choice): the key of the row's random stream."""
    min_p: float = 0.0
    """Least probability, as a share of the most likely token's, that a token needs to be drawn."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature < _MIN_TEMPERATURE


def uniform(stream: tuple[int, int], position: int) -> float:
    """A number in [0, 1) keyed by stream and position alone (BLAKE2b in counter mode, 53 bits)."""
    digest = hashlib.blake2b(struct.pack("<qqq", *stream, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits_BV: Tensor, rows: list[RowSampling], positions: list[int]) -> Tensor:
    """Token ids [B] int64 from logits [B, V] float32; `positions` are the rows' own, counted in new tokens.

    A row whose largest logit is not finite gets -1.
    """
    # A row's u stays below its total even when the product rounds up.
    uniforms = [uniform(row.stream, position) * (1 - 2.0**-24) for row, position in zip(rows, positions, strict=True)]
    if not ops.can_run_natively(logits_BV):
        return _sample_by_torch(logits_BV, rows, uniforms)
    return ops.sample(
        logits_BV,
        temperatures=[0.0 if row.is_greedy else row.temperature for row in rows],
        top_k=[row.top_k for row in rows],
        top_p=[row.top_p for row in rows],
        min_p=[row.min_p for row in rows],
        uniforms=uniforms,
    )


def _sample_by_torch(logits_BV: Tensor, rows: list[RowSampling], uniforms: list[float]) -> Tensor:
    if len(rows) < MIN_ROWS:
        # On a CPU torch reduces a single row in another order than the same row among others.
        return _sample_by_torch(logits_BV.expand(MIN_ROWS, -1), rows * MIN_ROWS, uniforms * MIN_ROWS)[: len(rows)]
    is_finite_B = logits_BV.amax(dim=-1).isfinite()
    # Whatever a broken row would do to the operations below, its neighbours must not feel it.
    finite_BV = torch.where(is_finite_B[:, None], logits_BV, 0.0)
    return torch.where(is_finite_B, _draw(finite_BV, rows, uniforms), -1)


def _draw(logits_BV: Tensor, rows: list[RowSampling], uniforms: list[float]) -> Tensor:
    drawn = [i for i, row in enumerate(rows) if not row.is_greedy]
    if not drawn:
        return logits_BV.argmax(dim=-1)
    temperature = [1.0 if row.is_greedy else row.temperature for row in rows]
    probs_BV = (logits_BV / logits_BV.new_tensor(temperature)[:, None]).softmax(dim=-1)
    for i in drawn:
        _filter_row(probs_BV[i], rows[i])
    cumulative_BV = probs_BV.cumsum(dim=-1)
    target_B1 = (logits_BV.new_tensor(uniforms) * cumulative_BV[:, -1])[:, None]
    drawn_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)
    if len(drawn) == len(rows):
        return drawn_B
    is_greedy_B = torch.tensor([row.is_greedy for row in rows], device=logits_BV.device)
    return torch.where(is_greedy_B, logits_BV.argmax(dim=-1), drawn_B)


def _filter_row(probs_V: Tensor, row: RowSampling) -> None:
    """Zero, in place, what min-p, top-k and then top-p leave out; ties with the last token kept stay in."""
    if row.min_p > 0.0:
        probs_V.masked_fill_(probs_V < row.min_p * probs_V.max(), 0.0)
        probs_V /= probs_V.sum()
    if 0 < row.top_k < probs_V.shape[0]:
        kth = probs_V.topk(row.top_k).values[-1]
        probs_V.masked_fill_(probs_V < kth, 0.0)
        probs_V /= probs_V.sum()
    if row.top_p < 1.0:
        probs_V.masked_fill_(probs_V < nucleus_threshold(probs_V, row.top_p), 0.0)


def nucleus_threshold(probs_V: Tensor, top_p: float) -> Tensor:
    """Smallest probability in the smallest set of most likely tokens that holds at least top_p of the mass.

    Only the tokens above a floor are sorted: the highest floor above which the mass suffices. At the last one it
    always does, since the tokens below (1 - top_p) / V hold less than 1 - top_p together.
    """
    candidates = probs_V
    for floor in (*_FLOORS, (1.0 - top_p) / probs_V.shape[0]):
        candidates = probs_V[probs_V >= floor]
        if float(candidates.sum()) >= top_p:
            break
    ordered = candidates.sort(descending=True).values
    mass_before = ordered.cumsum(dim=0) - ordered
    num_kept = int((mass_before < top_p).sum().clamp(min=1))
    return ordered[num_kept - 1]
