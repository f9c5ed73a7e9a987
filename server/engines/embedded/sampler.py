"""Tokens from logits, one random stream a sequence.

Inverse-CDF sampling: token = first whose cumulative probability exceeds u, with one uniform u per row that depends on
nothing but the row's seed, choice, candidate and position. So a neighbour can never disturb a draw, and no generator
has state. Filters are defined by probability values rather than ranks, so ties do not depend on a sort's order. Knows
nothing of models, control or requests. Enter at `sample`.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from server.kernels import gpu, ops
from server.kernels.transfer import on_device
from server.types import LEAST_TEMPERATURE

if TYPE_CHECKING:
    from server.kernels.gpu.draw import RuleTables


@dataclass(slots=True, frozen=True)
class RowSampling:
    """How one row is drawn; a temperature near 0 is greedy, top_k 0, top_p 1 and min_p 0 keep every token."""

    temperature: float
    top_p: float
    top_k: int
    stream: tuple[int, ...]
    """The key of the row's random stream: (seed, choice), and for further candidates (seed, choice, candidate)."""
    min_p: float = 0.0
    """Least probability, as a share of the most likely token's, that a token needs to be drawn."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    @property
    def is_filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def uniform(stream: tuple[int, ...], position: int) -> float:
    """A number in [0, 1) keyed by stream and position alone (BLAKE2b in counter mode, 53 bits)."""
    digest = hashlib.blake2b(struct.pack(f"<{len(stream) + 1}q", *stream, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits_BV: Tensor, rows: list[RowSampling], positions: list[int], rules: RuleTables | None = None) -> Tensor:
    """Token ids [B] int64 from logits [B, V] float32; `positions` are the rows' own, counted in new tokens.

    A row whose largest logit is not finite gets -1. Only a GPU's kernel takes `rules`.
    """
    # A row's u stays below its total even when the product rounds up.
    uniforms = [uniform(row.stream, position) * (1 - 2.0**-24) for row, position in zip(rows, positions, strict=True)]
    if gpu.are_used_on(logits_BV.device):
        return _sample_by_kernel(logits_BV, rows, uniforms, rules)
    assert rules is None
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


def _sample_by_kernel(
    logits_BV: Tensor, rows: list[RowSampling], uniforms: list[float], rules: RuleTables | None
) -> Tensor:
    from server.kernels.gpu.draw import Drawing, draw

    drawings = [
        Drawing(0.0 if row.is_greedy else row.temperature, row.top_k, row.top_p, row.min_p, u)
        for row, u in zip(rows, uniforms, strict=True)
    ]
    return draw(logits_BV, drawings, rules)


def _sample_by_torch(logits_BV: Tensor, rows: list[RowSampling], uniforms: list[float]) -> Tensor:
    if logits_BV.device.type == "cpu" and len(rows) > 1:
        # Each row by itself and copied: the bits of torch's sums and functions may depend on where a row lies among
        # others, and in memory.
        alone = zip(logits_BV.split(1), rows, uniforms, strict=True)
        return torch.cat([_sample_by_torch(logits_1V.clone(), [row], [u]) for logits_1V, row, u in alone])
    is_finite_B = logits_BV.amax(dim=-1).isfinite()
    # Whatever a broken row would do to the operations below, its neighbours must not feel it.
    finite_BV = torch.where(is_finite_B[:, None], logits_BV, 0.0)
    return torch.where(is_finite_B, _draw(finite_BV, rows, uniforms), -1)


def _draw(logits_BV: Tensor, rows: list[RowSampling], uniforms: list[float]) -> Tensor:
    """Without waiting for the device."""
    device = logits_BV.device
    if all(row.is_greedy for row in rows):
        return logits_BV.argmax(dim=-1)
    temperature_B1 = on_device([1.0 if row.is_greedy else row.temperature for row in rows], device)[:, None]
    probs_BV = (logits_BV / temperature_B1).softmax(dim=-1)
    filtered = [i for i, row in enumerate(rows) if row.is_filtered and not row.is_greedy]
    if filtered:
        filtered_F = on_device(filtered, device)
        kept_FV = _filtered(probs_BV[filtered_F], [rows[i] for i in filtered])
        probs_BV = probs_BV.index_copy(0, filtered_F, kept_FV)
    cumulative_BV = probs_BV.cumsum(dim=-1)
    target_B1 = (on_device(uniforms, device) * cumulative_BV[:, -1])[:, None]
    drawn_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)
    is_greedy_B = on_device([row.is_greedy for row in rows], device)
    return torch.where(is_greedy_B, logits_BV.argmax(dim=-1), drawn_B)


def _filtered(probs_FV: Tensor, rows: list[RowSampling]) -> Tensor:
    """Without what min-p, top-k and then top-p leave out; ties with the last token kept stay in."""
    device, size = probs_FV.device, probs_FV.shape[1]
    ordered_FV = probs_FV.sort(dim=-1, descending=True).values
    least_F1 = on_device([row.min_p for row in rows], device)[:, None] * ordered_FV[:, :1]
    count_F1 = on_device([row.top_k or size for row in rows], device)[:, None]
    is_kept_FV = (ordered_FV >= least_F1) & (torch.arange(size, device=device) < count_F1)
    mass_FV = torch.where(is_kept_FV, ordered_FV, 0.0)
    before_FV = mass_FV.cumsum(dim=-1) - mass_FV
    top_p_F1 = on_device([row.top_p for row in rows], device)[:, None]
    is_kept_FV &= (before_FV < top_p_F1 * mass_FV.sum(dim=-1, keepdim=True)) | (top_p_F1 >= 1.0)
    last_F1 = is_kept_FV.sum(dim=-1, keepdim=True).clamp(min=1) - 1
    return probs_FV.masked_fill(probs_FV < ordered_FV.gather(1, last_F1), 0.0)
