"""Attention of a step's flattened rows over the paged key-value cache.

A step holds one row for each newest token (a decode row), then one segment for each prompt chunk. All rows run through
the model as one sequence of T tokens; only attention looks at whose pages they read. Every decode row and every page's
worth of a prompt is attended on its own, so a sequence's numbers never depend on the step's other rows, nor on how its
prompt was cut into chunks. Registered with transformers' AttentionInterface; knows nothing of requests, sampling or
control.

Three ways, which tests hold against each other: the native kernel on a CPU (server/kernels/attention.cpp), for which a
decode row is a chunk of one token; where it was not compiled, plain_attention.py; and torch's products on a GPU.

Shapes: B decode rows, T tokens of the step, N key-value heads, Q queries that share a key-value head, P size of an
attention head, V that of its values, S attended positions, M pages of the longest sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.engines.embedded.model.kv_cache import KVCache
from server.engines.embedded.model.pages import NULL_PAGE, PAGE_TOKENS
from server.engines.embedded.model.plain_attention import attend_plainly
from server.engines.embedded.model.spans import AttentionKind, Span
from server.kernels import native
from server.kernels.transfer import on_device

ATTENTION_NAME = "recontrol"
PROJECTIONS = ("queries", "keys", "values")
_KERNELS = {torch.float32: "paged_attention_f32", torch.bfloat16: "paged_attention_bf16"}
HARMLESS_OPTIONS = frozenset(
    {"dropout", "is_causal", "output_attentions", "output_hidden_states", "position_ids", "sliding_window", "use_cache"}
)
"""Arguments of transformers' attention functions that change nothing here: a window is read from the layer's mask."""


class UnsupportedAttentionError(ValueError):
    """The model asks attention for something this engine does not do."""


@dataclass(slots=True, frozen=True)
class DecodeRow:
    """The newest token of a sequence, whose keys and values lie in `pages`."""

    pages: list[int]
    position: int
    token_id: int


@dataclass(slots=True, frozen=True)
class Segment:
    """A chunk of one prompt: token_ids go to positions start.. of the sequence that holds `pages`."""

    pages: list[int]
    start: int
    token_ids: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class StepWatch(Protocol):
    """Is told what each layer of a step does; see proof.py."""

    def saw(self, layer: int, what: str, given: Tensor) -> Tensor:
        """`what` a layer got ("entered"), attends with ("queries", "keys", "values"), or gave; what to go on with."""
        ...


@dataclass(slots=True)
class StepLayout:
    """Whose pages the T flattened rows read: table row sequences_T[t], up to position positions_T[t]."""

    kv: KVCache
    positions_T: Tensor
    sequences_T: Tensor
    tables: Tensor
    """Pages of the decode rows, then of the segments' sequences, [B + segments, M] int32, padded with the null page."""
    num_decode: int
    segments: list[Segment]
    spans: Mapping[int, Span] = field(default_factory=dict)
    """By index of the layer."""
    watch: StepWatch | None = None
    """Follows the layers while a model is proved."""
    masks: dict[Span, Tensor] = field(default_factory=dict)
    """Of the decode rows, made when a layer first asks."""

    @classmethod
    def of(
        cls,
        kv: KVCache,
        decode: list[DecodeRow],
        segments: list[Segment],
        device: torch.device,
        spans: Mapping[int, Span] | None = None,
        watch: StepWatch | None = None,
    ) -> StepLayout:
        positions = [row.position for row in decode]
        owners = list(range(len(decode)))
        for index, segment in enumerate(segments, start=len(decode)):
            positions += range(segment.start, segment.end)
            owners += [index] * len(segment.token_ids)
        used = [row.pages[: row.position // PAGE_TOKENS + 1] for row in decode]
        used += [segment.pages[: (segment.end - 1) // PAGE_TOKENS + 1] for segment in segments]
        widest = max(map(len, used))
        padded = [pages + [NULL_PAGE] * (widest - len(pages)) for pages in used]
        both_2T = on_device([positions, owners], device)
        tables = on_device(padded, device, dtype=torch.int32)
        return cls(kv, both_2T[0], both_2T[1], tables, len(decode), segments, spans or {}, watch)

    def decode_mask(self, span: Span) -> Tensor:
        """[B, 1, 1, S] bool, true where attended."""
        if span not in self.masks:
            last_B1 = self.positions_T[: self.num_decode, None]
            positions = torch.arange(self.tables.shape[1] * PAGE_TOKENS, device=last_B1.device)
            self.masks[span] = span.visible(positions, last_B1)[:, None, None]
        return self.masks[span]


@dataclass(slots=True)
class StepSlot:
    """Where a backbone's attention finds the step that it works in; not every model hands arguments on to it."""

    step: Any = None

    @classmethod
    def of(cls, backbone: nn.Module, step: Any = None) -> StepSlot:
        """A new one, which all modules of the backbone have from now on."""
        slot = cls(step)
        for module in backbone.modules():
            module.recontrol = slot  # type: ignore[assignment]
        return slot


def register_attention() -> str:
    """Make the attention below known to transformers; harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    return ATTENTION_NAME


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Write this step's keys and values, then attend. query [1, heads, T, P]; returns [1, T, heads, V].

    `s_aux` [heads] are sinks: logits of a place that takes a share of each head's attention and gives nothing.
    """
    if attention_mask is not None or (unknown := unknown_options(options)):
        raise UnsupportedAttentionError(f"attention masks of the model's own or options {sorted(unknown)}")
    layer: int = module.layer_idx  # type: ignore[assignment]
    step: StepLayout = module.recontrol.step  # type: ignore[union-attr]
    how = attention_kind(key, scaling, softcap, step.spans[layer])
    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    if step.watch is not None:
        for what, given in zip(PROJECTIONS, rows, strict=True):
            step.watch.saw(layer, what, given)
    keys, values = step.kv.layer(layer, *rows[1:])
    sinks = None if s_aux is None else s_aux.float().contiguous()
    is_of_one_type = query.dtype == key.dtype == value.dtype
    if is_of_one_type and can_attend_natively(query.dtype, query.device, key.shape[3]):
        out_TNV = value.new_empty(query.shape[2], query.shape[1], value.shape[3])
        addresses = [row.data_ptr() for row in rows]
        strides = [row.stride(0) for row in rows]
        attend_natively(addresses, strides, out_TNV.data_ptr(), keys, values, step, query.shape[1], how, sinks)
        return out_TNV[None], None
    return _attend_by_torch(rows, keys, values, step, how, sinks)[None], None


def unknown_options(options: Mapping[str, Any]) -> set[str]:
    """Arguments to an attention function that ask for something this engine does not do."""
    asked = {name for name, value in options.items() if value is not None and value is not False}
    return asked - HARMLESS_OPTIONS


def attention_kind(key: Tensor, scaling: float | None, softcap: float | None, span: Span) -> AttentionKind:
    """What a layer asks of its attention; key [1, N, T, P]. Transformers' default scaling is that of the keys' size."""
    return AttentionKind(key.shape[3] ** -0.5 if scaling is None else scaling, span, softcap)


def can_attend_natively(dtype: torch.dtype, device: torch.device, key_size: int) -> bool:
    """Whether `attend_natively` takes queries and keys of this type and size, here."""
    # In bfloat16 a key is read by pairs of numbers.
    fits = dtype == torch.float32 or key_size % 2 == 0
    return dtype in _KERNELS and fits and device.type == "cpu" and native() is not None


def attend_natively(
    addresses: list[int],
    strides: list[int],
    out: int,
    keys: Tensor,
    values: Tensor,
    step: StepLayout,
    num_heads: int,
    how: AttentionKind,
    sinks: Tensor | None = None,
) -> None:
    """Queries, keys and values at three addresses, their rows `strides` elements apart; the result goes to `out`.

    Their type is that of the cache's `keys` and `values`; sinks [heads] are float32.
    """
    attend = getattr(native(), _KERNELS[keys.dtype])
    attend(
        *addresses, *strides, keys.data_ptr(), values.data_ptr(), step.tables.data_ptr(), step.tables.shape[1],
        step.sequences_T.data_ptr(), step.positions_T.data_ptr(), None if sinks is None else sinks.data_ptr(), out,
        len(step.positions_T), num_heads, keys.shape[1], keys.shape[3], values.shape[3], how.scaling,
        how.softcap or 0.0, how.span.window or 0, how.span.chunk or 0,
    )  # fmt: skip


def _attend_by_torch(
    rows: list[Tensor],
    keys: Tensor,
    values: Tensor,
    step: StepLayout,
    how: AttentionKind,
    sinks: Tensor | None = None,
) -> Tensor:
    """As above, [T, heads, V]; rows are queries, keys and values [T, heads, P], sinks [heads] float32."""
    query_TNP, key_TNP, value_TNP = rows
    num_kv_heads = key_TNP.shape[1]
    pages_T = step.tables[step.sequences_T, step.positions_T // PAGE_TOKENS]
    keys[pages_T, :, step.positions_T % PAGE_TOKENS] = key_TNP
    values[pages_T, :, step.positions_T % PAGE_TOKENS] = value_TNP
    query_TNQP = query_TNP.unflatten(1, (num_kv_heads, -1))
    sinks_NQ = None if sinks is None else sinks.view(num_kv_heads, -1)
    if keys.device.type == "cpu":
        tables_TM = step.tables[step.sequences_T]
        return attend_plainly(query_TNQP, keys, values, tables_TM, step.positions_T, how, sinks_NQ).flatten(1, 2)
    return _attend_in_batches(query_TNQP, keys, values, step, how, sinks_NQ).flatten(1, 2)


def _attend_in_batches(
    query_TNQP: Tensor,
    keys: Tensor,
    values: Tensor,
    step: StepLayout,
    how: AttentionKind,
    sinks_NQ: Tensor | None,
) -> Tensor:
    """[T, N, Q, V], with the keys and values of the step in their pages."""
    outputs: list[Tensor] = []
    first = step.num_decode
    if first:
        tables = step.tables[:first]
        mask = step.decode_mask(how.span)
        keys_BNSP, values_BNSP = _gather(keys, tables), _gather(values, tables)
        outputs.append(_attend(query_TNQP[:first], keys_BNSP, values_BNSP, mask, how, sinks_NQ))
    for index, segment in enumerate(step.segments, start=first):
        table = step.tables[index]
        for start in range(segment.start, segment.end, PAGE_TOKENS):
            end = min(segment.end, start + PAGE_TOKENS)
            span = slice(first + start - segment.start, first + end - segment.start)
            outputs.append(_attend_segment(query_TNQP[span], keys, values, table, range(start, end), how, sinks_NQ))
        first += len(segment.token_ids)
    return torch.cat(outputs)


def _attend_segment(
    query_TNQP: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    positions: range,
    how: AttentionKind,
    sinks_NQ: Tensor | None,
) -> Tensor:
    """[T, N, Q, P]: a page's worth of a prompt over its own pages, causally."""
    num_tokens, _, queries_per_head, _ = query_TNQP.shape
    end, pages = positions.stop, table[None, : (positions.stop - 1) // PAGE_TOKENS + 1]
    last_T1 = torch.arange(positions.start, end, device=keys.device)[:, None]
    mask_TS = how.span.visible(torch.arange(end, device=keys.device), last_T1)
    out_1NQP = _attend(
        query_TNQP.transpose(0, 1).flatten(1, 2)[None],
        _gather(keys, pages)[:, :, :end],
        _gather(values, pages)[:, :, :end],
        mask_TS.repeat_interleave(queries_per_head, dim=0)[None, None],
        how,
        None if sinks_NQ is None else sinks_NQ.repeat(1, num_tokens),
    )
    return out_1NQP[0].unflatten(1, (num_tokens, queries_per_head)).transpose(0, 1)


def _gather(cache: Tensor, tables: Tensor) -> Tensor:
    """[B, N, S, P] of the sequences with these tables [B, M]."""
    return cache[tables].transpose(1, 2).flatten(2, 3)


def _attend(
    query_BNQP: Tensor,
    keys_BNSP: Tensor,
    values_BNSP: Tensor,
    mask: Tensor,
    how: AttentionKind,
    sinks_NQ: Tensor | None = None,
) -> Tensor:
    """In float32 whatever the dtype, whose products in fewer bits can depend on the number of rows.

    Plain products: unlike the fused kernel, these give a row the same bits in every batch.
    """
    scores_BNQS = query_BNQP.float() @ keys_BNSP.float().transpose(-1, -2) * how.scaling
    if how.softcap is not None:
        scores_BNQS = how.softcap * torch.tanh(scores_BNQS / how.softcap)
    scores_BNQS = scores_BNQS.masked_fill(~mask, float("-inf"))
    if sinks_NQ is None:
        weights_BNQS = scores_BNQS.softmax(dim=-1)
    else:
        # First, so that its place in the sum does not depend on the length of the step's longest row.
        sinks_BNQ1 = sinks_NQ[None, :, :, None].expand(*scores_BNQS.shape[:3], 1)
        weights_BNQS = torch.cat([sinks_BNQ1, scores_BNQS], dim=-1).softmax(dim=-1)[..., 1:]
    # A product's order of summation can depend on S, which the step's longest row decides: sum blocks of one size in
    # order, of which those beyond a row's own length add exact zeros.
    blocks = zip(weights_BNQS.split(PAGE_TOKENS, dim=-1), values_BNSP.float().split(PAGE_TOKENS, dim=-2), strict=True)
    return functools.reduce(torch.add, (weights @ values for weights, values in blocks)).to(values_BNSP.dtype)
