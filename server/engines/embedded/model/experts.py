"""Experts whose result for a token never depends on the step's other tokens.

Transformers hands the tokens and the experts chosen for each to a function that may be replaced, as with attention.
This one runs each expert's maps once over the tokens that chose it, by maps that give a row the same bits in every
batch, and sums a token's experts in the order in which they were chosen. Knows nothing of which models have experts.
Enter at `pack_experts`.

Shapes: T tokens, K experts of a token, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from server.kernels.linear import Bits, FrozenLinear, frozen_linear

EXPERTS_NAME = "recontrol"
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "_apply_gate")


def pack_experts(model: nn.Module, bits: Bits = 16) -> None:
    """Put the experts' weights below `model` into the form that runs here, and let them go in the old one."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, packed_experts)
    module: Any
    for module in model.modules():
        if is_experts(module):
            _pack(module, bits)
            module.config._experts_implementation_internal = EXPERTS_NAME


def is_experts(module: Any) -> bool:
    """Whether a module is one whose function transformers lets be replaced."""
    return all(hasattr(module, name) for name in _FLAGS)


def expert_weights(module: Any) -> dict[str, Tensor]:
    """By name, the weights [experts, out, in] of a module that `is_experts`."""
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    return {name: _outputs_first(module, getattr(module, name)) for name in names}


def packed_experts(module: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """See the top of this file; both choices are [T, K]. Returns [T, D]."""
    up, down = module.recontrol_maps
    out_TKD = hidden_TD.new_zeros(*top_k_index.shape, hidden_TD.shape[-1])
    for expert in top_k_index.unique().tolist():
        if expert >= len(up):
            continue  # The place of no expert at all.
        tokens, places = torch.where(top_k_index == expert)
        inner = up[expert](hidden_TD[tokens])
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        result = down[expert](inner)
        if module.has_post_expert_norm:
            result = module.post_expert_norm(result)
        out_TKD[tokens, places] = result * top_k_weights[tokens, places, None].to(result.dtype)
    parts = out_TKD.float().unbind(dim=1)
    total_TD = parts[0]
    for part_TD in parts[1:]:
        total_TD = total_TD + part_TD
    return total_TD.to(hidden_TD.dtype)


def _pack(module: Any, bits: Bits) -> None:
    maps: list[list[FrozenLinear]] = []
    for name, weight in expert_weights(module).items():
        biases = getattr(module, f"{name}_bias") if module.has_bias else [None] * len(weight)
        maps.append([frozen_linear(w, bias, bits=bits) for w, bias in zip(weight, biases, strict=True)])
        delattr(module, name)
    # A plain attribute: packed weights must not enter state_dict.
    object.__setattr__(module, "recontrol_maps", maps)


def _outputs_first(module: Any, weight: Tensor) -> Tensor:
    return weight.transpose(1, 2) if module.is_transposed else weight
