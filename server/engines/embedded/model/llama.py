"""The layers of Llama and its like (Mistral, Qwen2, SmolLM2 and 3), run by the native kernels.

The same computation as transformers' modules with fewer and larger pieces: one matrix for queries, keys and values, one
for gate and up, and everything between two matrices in one pass. Roundings to bfloat16 are where transformers has them,
but for rotary angles and attention, which stay in float32. `NativeLlama.can_run` tells from every layer's modules and
facts whether a model is built this way, and `proof.py` compares each layer with transformers' own before one is used;
any other model runs through transformers. Knows nothing of requests.

Shapes: T rows of a step, D hidden size, L layers, N key-value heads, P size of an attention head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from server.engines.embedded.model.attention import PROJECTIONS, attend_natively, can_attend_natively
from server.engines.embedded.model.layout import StepLayout
from server.engines.embedded.model.spans import AttentionKind
from server.engines.embedded.model.takeover.facts import LayerFacts
from server.kernels import native
from server.kernels.linear import Bits, NativeLinear, can_run_natively

_MODEL_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_PARTS = ("gate_proj", "up_proj", "down_proj")
_LANES = 16
_NORM_ERROR = 2e-2


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
    rotates: bool


class NativeLlama(nn.Module):
    """Called as transformers' backbone is; the result has `last_hidden_state` [1, T, D]."""

    def __init__(self, backbone: Any, facts: Mapping[int, LayerFacts], *, max_len: int, bits: Bits = 16) -> None:
        """Of a backbone that `can_run`."""
        super().__init__()
        first = facts[0]
        self._embedding: nn.Embedding = backbone.embed_tokens
        self._num_heads, self._num_kv_heads = first.num_heads, first.num_kv_heads
        self._head_size = first.key_size
        self._epsilon = _epsilon(backbone.norm)
        self._layers = [_layer(index, layer, facts[index], bits) for index, layer in enumerate(backbone.layers)]
        # The weight of the norm behind each layer: the next layer's first, and at last the final one.
        self._norms = [layer.norm for layer in self._layers] + [backbone.norm.weight.detach()]
        angles = torch.arange(max_len)[None]
        cosines, sines = backbone.rotary_emb(torch.zeros(1, dtype=torch.float32), angles)
        half = self._head_size // 2
        self._cosines, self._sines = (table[0, :, :half].contiguous() for table in (cosines, sines))
        self._native: Any = native()

    @staticmethod
    def can_run(backbone: Any, config: Any, facts: Mapping[int, LayerFacts]) -> bool:
        """Whether every part of every layer is one that this file computes, and there is none besides."""
        return (
            _names(backbone) == _MODEL_PARTS
            and list(facts) == list(range(len(backbone.layers)))
            and all(_is_llamas(layer) for layer in backbone.layers)
            and _are_alike(backbone.layers, backbone.norm)
            and all(_fits(fact, facts[0]) for fact in facts.values())
            and config.hidden_size % _LANES == 0
        )

    def attending(self, facts: Mapping[int, LayerFacts]) -> NativeLlama:
        """The same layers with the same weights, which attend as these facts have it."""
        other = copy.copy(self)
        other._layers = [replace(layer, how=facts[layer.index].kind) for layer in self._layers]
        return other

    def forward(self, *, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """input_ids [1, T]; positions come with the step."""
        step: StepLayout = self.recontrol.step  # type: ignore[union-attr]
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
        epsilon, watch = self._epsilon, step.watch
        add_norm(None, residual_at, self._norms[0].data_ptr(), normed_at, num_rows, size, epsilon)
        for layer, next_norm in zip(self._layers, self._norms[1:], strict=True):
            if watch is not None:
                residual_TD.copy_(watch.saw(layer.index, "entered", residual_TD))
                add_norm(None, residual_at, layer.norm.data_ptr(), normed_at, num_rows, size, epsilon)
            layer.qkv.write(normed_at, qkv_at, num_rows)
            if layer.rotates:
                rotate(qkv_at, width, positions_at, cosines_at, sines_at, num_rows, num_heads + num_kv_heads, head_size)
            keys, values = step.kv.layer(layer.index, key_TNP, key_TNP)
            attend_natively(
                [qkv_at, key_at, value_at], [width] * 3, attended_at, keys, values, step, num_heads, layer.how
            )
            layer.out.write(attended_at, update_at, num_rows)
            if watch is not None:
                parts = qkv.split([n * head_size for n in (num_heads, num_kv_heads, num_kv_heads)], dim=1)
                for what, part in zip((*PROJECTIONS, "attended"), (*parts, update), strict=True):
                    watch.saw(layer.index, what, part)
            add_norm(update_at, residual_at, layer.mlp_norm.data_ptr(), normed_at, num_rows, size, epsilon)
            layer.gate_up.write(normed_at, gate_up_at, num_rows)
            silu_mul(gate_up_at, activated_at, num_rows, inner)
            layer.down.write(activated_at, update_at, num_rows)
            add_norm(update_at, residual_at, next_norm.data_ptr(), normed_at, num_rows, size, epsilon)
            if watch is not None:
                watch.saw(layer.index, "left", residual_TD)
        return SimpleNamespace(last_hidden_state=normed[None])


def _layer(index: int, layer: Any, facts: LayerFacts, bits: Bits) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        index=index,
        norm=layer.input_layernorm.weight.detach(),
        qkv=_joined(bits, attention.q_proj, attention.k_proj, attention.v_proj),
        out=_joined(bits, attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_joined(bits, mlp.gate_proj, mlp.up_proj),
        down=_joined(bits, mlp.down_proj),
        how=facts.kind,
        rotates=facts.rotates,
    )


def _joined(bits: Bits, *linears: nn.Linear) -> NativeLinear:
    """Several maps of the same input as one; where only some have a bias, the others' is zero."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return NativeLinear(weight, bits=bits)
    filled = [
        weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach() for linear in linears
    ]
    return NativeLinear(weight, torch.cat(filled), bits=bits)


def _is_llamas(layer: Any) -> bool:
    """By its parts and all its parameters, which are those of seven maps and two norms."""
    if _names(layer) != _LAYER_PARTS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if _names(attention) != set(_ATTENTION_PARTS) or _names(mlp) != {*_MLP_PARTS, "act_fn"}:
        return False
    linears = [getattr(attention, name) for name in _ATTENTION_PARTS] + [getattr(mlp, name) for name in _MLP_PARTS]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    known = {id(parameter) for part in (*linears, *norms) for parameter in part.parameters()}
    return (
        all(type(linear) is nn.Linear and can_run_natively(linear.weight) for linear in linears)
        and all(_is_rms_norm(norm) for norm in norms)
        and {id(parameter) for parameter in layer.parameters()} == known
        and not list(layer.buffers())
        and _is_silu(mlp.act_fn)
    )


def _is_rms_norm(norm: nn.Module) -> bool:
    """Tried out, since a norm's name does not tell whether it adds one to its weight or takes a mean away."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or _epsilon(norm) is None or weight.dim() != 1:
        return False
    x = torch.linspace(-1.0, 3.0, weight.numel()).sin()[None] + 0.5
    expected = functional.rms_norm(x, weight.shape, weight.float(), _epsilon(norm))
    error = (norm(x.to(weight.dtype)).float() - expected).norm()
    return bool(error <= _NORM_ERROR * expected.norm())


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _is_silu(activation: Callable[[Tensor], Tensor]) -> bool:
    x = torch.linspace(-8.0, 8.0, 65)
    return torch.allclose(activation(x), functional.silu(x), atol=1e-5)


def _are_alike(layers: Any, norm: Any) -> bool:
    """The same shapes in every layer and the same epsilon in every norm, for which buffers and kernels are made."""

    def shapes(layer: nn.Module) -> list[torch.Size]:
        return [module.weight.shape for module in layer.modules() if isinstance(module, nn.Linear)]

    norms = [norm, *(part for layer in layers for part in (layer.input_layernorm, layer.post_attention_layernorm))]
    return (
        all(shapes(layer) == shapes(layers[0]) for layer in layers)
        and len({_epsilon(part) for part in norms}) == 1
        and _is_rms_norm(norm)
        and layers[0].mlp.down_proj.in_features % _LANES == 0
    )


def _fits(facts: LayerFacts, first: LayerFacts) -> bool:
    sizes = (facts.num_heads, facts.num_kv_heads, facts.key_size, facts.value_size)
    attention: Any = facts.module
    weight, size = attention.q_proj.weight, facts.key_size
    widths = [linear.out_features for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return (
        weight.dtype == torch.bfloat16
        and widths == [facts.num_heads * size, facts.num_kv_heads * size, facts.num_kv_heads * size]
        and sizes == (first.num_heads, first.num_kv_heads, first.key_size, first.key_size)
        and facts.only_turns
        and not facts.has_sinks
        and facts.key_size % (2 * _LANES) == 0
        and can_attend_natively(weight.dtype, weight.device, facts.key_size)
    )


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
