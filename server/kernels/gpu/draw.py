"""The draw on a GPU for tensors: one copy of what rows are drawn by, and one launch, which a CUDA graph may record with
the tables that it reads. Enter at `draw`, or at `launch` with a table that is there already.

Shapes: B rows, C of them with rules, V vocabulary, N entries of all rows' rules, M masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from server.kernels.transfer import on_device

_TILE, _WARPS = 2048, 16
"""One program has a multiprocessor for itself, so that it takes as many threads as its sums leave registers for."""


class Drawing(NamedTuple):
    """How a row is drawn, in the order of draw_kernel's table: a temperature of 0 is greedy, a top_k of 0 keeps all."""

    temperature: float
    top_k: float
    top_p: float
    min_p: float
    uniform: float


class Penalties(NamedTuple):
    """Of a row, in the order of draw_kernel's penalties. `inverse_repetition` is what it divides by, inverted."""

    repetition: float = 1.0
    inverse_repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0


class RulePlaces(NamedTuple):
    """Where the rules of a row are, in the order of draw_kernel's places: its copy and its mask, or -1, and where its
    entries begin and end. A row without a copy has no rules."""

    copy: int = -1
    mask: int = -1
    bias: int = 0
    bias_end: int = 0
    prompt: int = 0
    prompt_end: int = 0
    output: int = 0
    output_end: int = 0


@dataclass(slots=True, frozen=True)
class RuleTables:
    """What changes rows' logits before a token is drawn, as draw_kernel.py has it; int32 but for penalties and bias."""

    places_BP: Tensor
    num_copies: int
    penalties_B4: Tensor
    biased_N: Tensor
    bias_N: Tensor
    prompt_N: Tensor
    outputs_2N: Tensor
    masks_MW: Tensor
    """A bit for each token that may be drawn, the first in the lowest."""


def draw(logits_BV: Tensor, drawings: Sequence[Drawing], rules: RuleTables | None = None) -> Tensor:
    """Token ids [B] int64 by the inverse of the cumulative distribution; -1 where the largest logit is not finite.

    Logits stay as they are.
    """
    return launch(logits_BV, on_device(drawings, logits_BV.device, dtype=torch.float32), rules)


def launch(logits_BV: Tensor, table_BW: Tensor, rules: RuleTables | None) -> Tensor:
    """Token ids [B] as from `draw`, given the `Drawing`s as a table on the device.

    What is launched depends on nothing but shapes and whether there are rules.
    """
    assert logits_BV.stride(1) == 1
    device, (num_rows, size) = logits_BV.device, logits_BV.shape
    tokens_B = torch.empty(num_rows, dtype=torch.int64, device=device)
    told: tuple[Any, ...] = (None,) * 10
    if rules is not None:
        told = (
            rules.places_BP, rules.penalties_B4, rules.biased_N, rules.bias_N, rules.prompt_N, rules.outputs_2N,
            rules.outputs_2N.shape[1], rules.masks_MW, rules.masks_MW.shape[1],
            torch.empty(rules.num_copies, size, device=device),
        )  # fmt: skip
    if not logits_BV.is_meta and num_rows:
        from server.kernels.gpu import draw_kernel

        kernel: Any = draw_kernel.draw
        # A product and a sum are rounded one by one, as torch does.
        kernel[(num_rows,)](
            logits_BV, logits_BV.stride(0), size, table_BW, *told, tokens_B, HAS_RULES=rules is not None, TILE=_TILE,
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return tokens_B
