"""The layers of Llama and its like (Mistral, Qwen2, SmolLM), run by the native kernels.

The same computation as transformers' modules with fewer and larger pieces: one matrix for queries, keys and values, one
for gate and up, and everything between two matrices in one pass. Roundings to bfloat16 are where transformers has them,
but for rotary angles and attention, which stay in float32. `NativeLlama.can_run` tells whether a model is built this
way; any other runs through transformers. `ModelRunner.create` proves this one against the model's own logits. Knows
nothing of requests.

Shapes: T rows of a step, D hidden size, L layers, N key-value heads, P size of an attention head.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from server.engines.embedded.model.attention import AttentionKind, StepLayout, attend_natively, can_attend_natively
from server.kernels import native
from server.kernels.linear import Bits, NativeLinear, can_run_natively

_MODEL_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LANES = 16


@dataclass(slots=True, frozen=True)
class _Layer:
    index: int
    norm: Tensor
    qkv: NativeLinear
    out: NativeLinear
    mlp_norm: Tensor
    gate_up: NativeLinear
    down: NativeLinear
    how: AttentionKind


class NativeLlama(nn.Module):
    """Called as transformers' backbone is; the result has `last_hidden_state` [1, T, D]."""

    def __init__(self, backbone: Any, config: Any, *, max_len: int, bits: Bits = 16) -> None:
        super().__init__()
        self._embedding: nn.Embedding = backbone.embed_tokens
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._head_size: int = backbone.layers[0].self_attn.head_dim
        self._epsilon: float = config.rms_norm_eps
        self._layers = [_layer(index, layer, bits) for index, layer in enumerate(backbone.layers)]
        # The weight of the norm behind each layer: the next layer's first, and at last the final one.
        self._norms = [layer.norm for layer in self._layers] + [backbone.norm.weight.detach()]
        angles = torch.arange(max_len)[None]
        cosines, sines = backbone.rotary_emb(torch.zeros(1, dtype=torch.float32), angles)
        half = self._head_size // 2
        self._cosines, self._sines = (table[0, :, :half].contiguous() for table in (cosines, sines))
        self._native: Any = native()

    @staticmethod
    def can_run(backbone: Any, config: Any) -> bool:
        """Whether every part of the model is one that this file computes, and there is none besides."""
        return _is_llama_like(backbone, config) and _fits_kernels(backbone.layers[0], config)

    def forward(self, *, input_ids: Tensor, step: StepLayout, **_: Any) -> SimpleNamespace:
        """input_ids [1, T]; positions come with the step."""
        residual_TD = self._embedding(input_ids[0])
        num_rows, size = residual_TD.shape
        num_heads, num_kv_heads, head_size = self._num_heads, self._num_kv_heads, self._head_size
        width, inner = (num_heads + 2 * num_kv_heads) * head_size, self._layers[0].down.in_features

        def buffer(columns: int) -> Tensor:
            return torch.empty(num_rows, columns, dtype=torch.bfloat16)

        normed, qkv, attended, update, gate_up, activated = map(
            buffer, (size, width, num_heads * head_size, size, 2 * inner, inner)
        )
        residual_at, normed_at, qkv_at, attended_at, update_at, gate_up_at, activated_at = (
            tensor.data_ptr() for tensor in (residual_TD, normed, qkv, attended, update, gate_up, activated)
        )
        key_at = qkv_at + 2 * num_heads * head_size
        value_at = key_at + 2 * num_kv_heads * head_size
        key_TNP = qkv[:, : num_kv_heads * head_size].unflatten(1, (num_kv_heads, head_size))
        positions_at = step.positions_T.data_ptr()
        cosines_at, sines_at = self._cosines.data_ptr(), self._sines.data_ptr()
        add_norm, rotate, silu_mul = (
            self._native.add_rms_norm_bf16, self._native.rotate_bf16, self._native.silu_mul_bf16,
        )  # fmt: skip
        epsilon = self._epsilon
        add_norm(None, residual_at, self._norms[0].data_ptr(), normed_at, num_rows, size, epsilon)
        for layer, next_norm in zip(self._layers, self._norms[1:], strict=True):
            layer.qkv.write(normed_at, qkv_at, num_rows)
            rotate(qkv_at, width, positions_at, cosines_at, sines_at, num_rows, num_heads + num_kv_heads, head_size)
            keys, values = step.kv.layer(layer.index, key_TNP, key_TNP)
            attend_natively(
                [qkv_at, key_at, value_at], [width] * 3, attended_at, keys, values, step, num_heads, layer.how
            )
            layer.out.write(attended_at, update_at, num_rows)
            add_norm(update_at, residual_at, layer.mlp_norm.data_ptr(), normed_at, num_rows, size, epsilon)
            layer.gate_up.write(normed_at, gate_up_at, num_rows)
            silu_mul(gate_up_at, activated_at, num_rows, inner)
            layer.down.write(activated_at, update_at, num_rows)
            add_norm(update_at, residual_at, next_norm.data_ptr(), normed_at, num_rows, size, epsilon)
        return SimpleNamespace(last_hidden_state=normed[None])


def _layer(index: int, layer: Any, bits: Bits) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        index=index,
        norm=layer.input_layernorm.weight.detach(),
        qkv=_joined(bits, attention.q_proj, attention.k_proj, attention.v_proj),
        out=_joined(bits, attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_joined(bits, mlp.gate_proj, mlp.up_proj),
        down=_joined(bits, mlp.down_proj),
        how=AttentionKind(attention.scaling, getattr(attention, "sliding_window", None)),
    )


def _joined(bits: Bits, *linears: nn.Linear) -> NativeLinear:
    """Several maps of the same input as one."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    has_bias = linears[0].bias is not None
    return NativeLinear(
        weight, torch.cat([linear.bias.detach() for linear in linears]) if has_bias else None, bits=bits
    )


def _is_llama_like(backbone: Any, config: Any) -> bool:
    if _names(backbone) != _MODEL_PARTS or not len(backbone.layers):
        return False
    first = backbone.layers[0]
    parts = (_names(first), _names(first.self_attn), _names(first.mlp))
    if parts != (_LAYER_PARTS, _ATTENTION_PARTS, _MLP_PARTS) or getattr(config, "hidden_act", None) != "silu":
        return False
    # Granite scales embeddings and residuals; rotations that change with the length of the text cannot be tabled.
    is_unscaled = all(getattr(config, name, 1.0) == 1.0 for name in ("embedding_multiplier", "residual_multiplier"))
    rope = getattr(config, "rope_parameters", None) or {}
    is_static = rope.get("rope_type", "default") in {"default", "linear", "llama3", "yarn"}
    return is_unscaled and is_static and rope.get("partial_rotary_factor", 1.0) == 1.0


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _fits_kernels(layer: Any, config: Any) -> bool:
    weight = layer.self_attn.q_proj.weight
    return (
        all(can_run_natively(parameter) for parameter in layer.parameters() if parameter.dim() == 2)
        and can_attend_natively(weight.dtype, weight.device, layer.self_attn.head_dim)
        and all(size % _LANES == 0 for size in (config.hidden_size, config.intermediate_size))
    )
