"""The draw on a GPU for tensors: one copy of what rows are drawn by, and one launch. Enter at `draw`.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from server.kernels.transfer import on_device

_TILE = 1024


class Drawing(NamedTuple):
    """How a row is drawn, in the order of draw_kernel's table: a temperature of 0 is greedy, a top_k of 0 keeps all."""

    temperature: float
    top_k: float
    top_p: float
    min_p: float
    uniform: float


def draw(logits_BV: Tensor, drawings: Sequence[Drawing]) -> Tensor:
    """Token ids [B] int64 by the inverse of the cumulative distribution; -1 where the largest logit is not finite."""
    assert logits_BV.stride(1) == 1
    table = on_device(drawings, logits_BV.device, dtype=torch.float32)
    tokens_B = torch.empty(len(drawings), dtype=torch.int64, device=logits_BV.device)
    if not logits_BV.is_meta and len(drawings):
        from server.kernels.gpu import draw_kernel

        kernel: Any = draw_kernel.draw
        kernel[(len(drawings),)](logits_BV, logits_BV.stride(0), logits_BV.shape[1], table, tokens_B, TILE=_TILE)
    return tokens_B
