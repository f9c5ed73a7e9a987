"""Slot-based key-value cache, and attention over it for a step's flattened rows.

A step holds one row for each decoding sequence, which sit in the slots 0..B-1, then one segment for each prompt chunk.
All rows run through the model as one sequence of T tokens; only attention looks at who they belong to. Every segment
is attended on its own and every decode row only over its own slot, so a sequence's numbers never depend on the step's
other rows. Registered with transformers' AttentionInterface; knows nothing of requests, sampling or control.

Shapes: B decode rows, T tokens of the step, N key-value heads, Q queries that share a key-value head, P size of an
attention head, S attended positions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "recontrol"
_LENGTH_BUCKET = 64
_HARMLESS_OPTIONS = {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states"}


class UnsupportedAttentionError(ValueError):
    """The model asks attention for something this engine does not do."""


class KVCache:
    """Keys and values [slots, N, capacity, P] for each layer; capacity doubles on demand up to max_len."""

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self.capacity = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` positions in every slot."""
        assert length <= self.max_len
        capacity = self.capacity or min(_LENGTH_BUCKET, self.max_len)
        while capacity < length:
            capacity = min(2 * capacity, self.max_len)
        if capacity > self.capacity:
            # Layer by layer, so that one layer's old tensors at most stand beside the new ones; a failure half-way
            # leaves layers that are larger than they need be.
            for index, (keys, values) in self._layers.items():
                self._layers[index] = (_grown(keys, capacity), _grown(values, capacity))
            self.capacity = capacity

    def layer(self, index: int, like_key: Tensor, like_value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, made on first use in the shape of [1, N, T, P] examples."""
        if index not in self._layers:
            self._layers[index] = (self._empty(like_key), self._empty(like_value))
        return self._layers[index]

    def copy(self, source: int, target: int, length: int, *, start: int = 0) -> None:
        """Copy one slot's positions start..length over another's."""
        for keys, values in self._layers.values():
            keys[target, :, start:length] = keys[source, :, start:length]
            values[target, :, start:length] = values[source, :, start:length]

    def clear(self, slot: int, length: int, *, start: int = 0) -> None:
        """Zero a slot's positions, so that no non-finite leftover meets the next sequence through 0 x NaN."""
        if start < length:
            for keys, values in self._layers.values():
                keys[slot, :, start:length] = 0
                values[slot, :, start:length] = 0

    def _empty(self, like: Tensor) -> Tensor:
        _, num_heads, _, head_size = like.shape
        return like.new_zeros(self.num_slots, num_heads, self.capacity, head_size)


def _grown(old: Tensor, capacity: int) -> Tensor:
    if old.shape[2] >= capacity:
        return old
    new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
    new[:, :, : old.shape[2]] = old
    return new


@dataclass(slots=True, frozen=True)
class Segment:
    """A chunk of one prompt: token_ids go to positions start.. of a slot."""

    slot: int
    start: int
    token_ids: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(slots=True)
class StepLayout:
    """Who the T flattened rows belong to: decode row b is slot b at decode_positions_B[b], then the segments."""

    kv: KVCache
    decode_positions_B: Tensor
    segments: list[Segment]
    max_decode_len: int
    _decode_masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def num_decode(self) -> int:
        return self.decode_positions_B.shape[0]

    @property
    def attended_len(self) -> int:
        """S of the decode rows: the longest, rounded up so that few shapes occur."""
        return min(-(-self.max_decode_len // _LENGTH_BUCKET) * _LENGTH_BUCKET, self.kv.capacity)

    def decode_mask(self, window: int | None) -> Tensor:
        """[B, 1, 1, S] bool, true where attended."""
        if window not in self._decode_masks:
            last_B1 = self.decode_positions_B[:, None]
            self._decode_masks[window] = _visible(last_B1, self.attended_len, window)[:, None, None]
        return self._decode_masks[window]


def register_attention() -> str:
    """Make the attention below known to transformers; harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, slot_attention)
    return ATTENTION_NAME


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    step: StepLayout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Write this step's keys and values, then attend. query [1, heads, T, P]; returns [1, T, heads, P]."""
    unknown = {name for name, value in options.items() if value is not None and name not in _HARMLESS_OPTIONS}
    if attention_mask is not None or unknown:
        raise UnsupportedAttentionError(f"attention masks of the model's own or options {sorted(unknown)}")
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = step.kv.layer(layer, key, value)
    num_kv_heads, head_size = key.shape[1], key.shape[3]
    how = _AttentionKind(head_size**-0.5 if scaling is None else scaling, sliding_window, softcap)
    query_TNQP = query[0].transpose(0, 1).reshape(query.shape[2], num_kv_heads, -1, head_size)
    outputs: list[Tensor] = []
    first = step.num_decode
    if first:
        rows = torch.arange(first, device=key.device)
        keys[rows, :, step.decode_positions_B] = key[0, :, :first].transpose(0, 1)
        values[rows, :, step.decode_positions_B] = value[0, :, :first].transpose(0, 1)
        outputs.append(_attend_decode(query_TNQP[:first], keys, values, step, how))
    for segment in step.segments:
        end = first + len(segment.token_ids)
        keys[segment.slot, :, segment.start : segment.end] = key[0, :, first:end]
        values[segment.slot, :, segment.start : segment.end] = value[0, :, first:end]
        outputs.append(_attend_segment(query_TNQP[first:end], keys, values, segment, how))
        first = end
    return torch.cat(outputs)[None], None


@dataclass(slots=True, frozen=True)
class _AttentionKind:
    scaling: float
    sliding_window: int | None
    softcap: float | None


def _attend_decode(query_BNQP: Tensor, keys: Tensor, values: Tensor, step: StepLayout, how: _AttentionKind) -> Tensor:
    """[B, heads, P]: decode row b over slot b."""
    rows, length = step.num_decode, step.attended_len
    mask = step.decode_mask(how.sliding_window)
    return _attend(query_BNQP, keys[:rows, :, :length], values[:rows, :, :length], mask, how).flatten(1, 2)


def _attend_segment(query_TNQP: Tensor, keys: Tensor, values: Tensor, segment: Segment, how: _AttentionKind) -> Tensor:
    """[T, heads, P]: a prompt chunk over its own slot, causally."""
    num_tokens, _, queries_per_head, _ = query_TNQP.shape
    last_T1 = torch.arange(segment.start, segment.end, device=keys.device)[:, None]
    mask_TS = _visible(last_T1, segment.end, how.sliding_window)
    out_1NQP = _attend(
        query_TNQP.transpose(0, 1).flatten(1, 2)[None],
        keys[segment.slot, :, : segment.end][None],
        values[segment.slot, :, : segment.end][None],
        mask_TS.repeat_interleave(queries_per_head, dim=0)[None, None],
        how,
    )
    return out_1NQP[0].unflatten(1, (num_tokens, queries_per_head)).transpose(0, 1).flatten(1, 2)


def _visible(last: Tensor, length: int, window: int | None) -> Tensor:
    """[rows, S] bool: positions up to each row's `last` ([rows, 1]), within the sliding window if there is one."""
    positions = torch.arange(length, device=last.device)
    visible = positions <= last
    return visible if window is None else visible & (positions > last - window)


def _attend(query_BNQP: Tensor, keys_BNSP: Tensor, values_BNSP: Tensor, mask: Tensor, how: _AttentionKind) -> Tensor:
    """Plain products: unlike the fused kernel, these give a row the same bits in every batch in float32 too."""
    scores_BNQS = (query_BNQP @ keys_BNSP.transpose(-1, -2)).float() * how.scaling
    if how.softcap is not None:
        scores_BNQS = how.softcap * torch.tanh(scores_BNQS / how.softcap)
    weights_BNQS = scores_BNQS.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(values_BNSP.dtype)
    if values_BNSP.dtype != torch.float32:
        return weights_BNQS @ values_BNSP
    # In float32 the product's order of summation can depend on S, which the step's longest row decides: sum blocks of
    # one size in order, of which those beyond a row's own length add exact zeros.
    blocks = zip(weights_BNQS.split(_LENGTH_BUCKET, dim=-1), values_BNSP.split(_LENGTH_BUCKET, dim=-2), strict=True)
    return functools.reduce(torch.add, (weights @ values for weights, values in blocks))
