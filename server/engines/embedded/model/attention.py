"""Attention of a step's flattened rows over the paged key-value cache.

A step holds one row for each newest token (a decode row), then the chunks of prompts. All rows run through
the model as one sequence of T tokens; only attention looks at whose pages they read. Every decode row and every page of
a prompt is attended on its own, so a sequence's numbers never depend on the step's other rows, nor on where its prompt
was cut into chunks. Registered with transformers' AttentionInterface; knows nothing of requests, sampling or control.

Four ways, which tests hold against each other: the native kernel on a CPU (server/kernels/attention.cpp), for which a
decode row is a chunk of one token; where it was not compiled, plain_attention.py; on a GPU the kernel in Triton
(server/kernels/gpu/attention.py), which attends prompts together as blocks; and where that cannot be, torch's products.

Shapes: B decode rows, T tokens of the step, N key-value heads, Q queries that share a key-value head, P size of an
attention head, V that of its values, S attended positions, M pages of the longest sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.engines.embedded.model.layout import StepLayout
from server.engines.embedded.model.pages import PAGE_TOKENS, num_pages_for
from server.engines.embedded.model.plain_attention import attend_plainly
from server.engines.embedded.model.spans import AttentionKind, Span
from server.kernels import gpu, native

ATTENTION_NAME = "recontrol"
PROJECTIONS = ("queries", "keys", "values")
_KERNELS = {torch.float32: "paged_attention_f32", torch.bfloat16: "paged_attention_bf16"}
HARMLESS_OPTIONS = frozenset(
    {"dropout", "is_causal", "output_attentions", "output_hidden_states", "position_ids", "sliding_window", "use_cache"}
)
"""Arguments of transformers' attention functions that change nothing here: a window is read from the layer's mask."""


class UnsupportedAttentionError(ValueError):
    """The model asks attention for something this engine does not do."""


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
    unknown = unknown_options(options)
    if attention_mask is not None or unknown:
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
    return _attend_without_native(rows, keys, values, step, how, sinks)[None], None


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


def _attend_without_native(
    rows: list[Tensor],
    keys: Tensor,
    values: Tensor,
    step: StepLayout,
    how: AttentionKind,
    sinks: Tensor | None = None,
) -> Tensor:
    """Cache the step's keys and values, and attend by Triton or torch: [T, heads, V].

    Rows are queries, keys and values [T, heads, P], sinks [heads] float32.
    """
    query_TNP, key_TNP, value_TNP = rows
    num_kv_heads = key_TNP.shape[1]
    pages_T = step.tables[step.sequences_T, step.positions_T // PAGE_TOKENS]
    keys[pages_T, :, step.positions_T % PAGE_TOKENS] = key_TNP
    values[pages_T, :, step.positions_T % PAGE_TOKENS] = value_TNP
    if _can_attend_by_triton(query_TNP, keys, values):
        return _attend_by_triton(query_TNP, keys, values, step, how, sinks)
    query_TNQP = query_TNP.unflatten(1, (num_kv_heads, -1))
    sinks_NQ = None if sinks is None else sinks.view(num_kv_heads, -1)
    if keys.device.type == "cpu":
        tables_TM = step.tables[step.sequences_T]
        return attend_plainly(query_TNQP, keys, values, tables_TM, step.positions_T, how, sinks_NQ).flatten(1, 2)
    return _attend_in_batches(query_TNQP, keys, values, step, how, sinks_NQ).flatten(1, 2)


def _can_attend_by_triton(query_TNP: Tensor, keys: Tensor, values: Tensor) -> bool:
    if not gpu.are_used_on(keys.device) or not query_TNP.dtype == keys.dtype == values.dtype:
        return False
    from server.kernels.gpu.attention import fits

    return keys.dtype in _KERNELS and fits(keys, values)


def _attend_by_triton(
    query_TNP: Tensor, keys: Tensor, values: Tensor, step: StepLayout, how: AttentionKind, sinks: Tensor | None
) -> Tensor:
    from server.kernels.gpu.attention import Asked, Places, attend, tokens_of_a_block

    blocks = step.prompt_blocks(tokens_of_a_block(query_TNP.shape[1], keys.shape[1]))
    return attend(
        query_TNP, keys, values,
        Places(step.tables, step.sequences_T, step.positions_T, step.num_decode, blocks),
        Asked(how.scaling, how.softcap or 0.0, how.span.window or 0, how.span.chunk or 0, sinks),
    )  # fmt: skip


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
    for index, chunk in enumerate(step.chunks, start=first):
        table = step.tables[index]
        for page in range(chunk.start // PAGE_TOKENS, num_pages_for(chunk.end)):
            start, end = max(chunk.start, page * PAGE_TOKENS), min(chunk.end, (page + 1) * PAGE_TOKENS)
            span = slice(first + start - chunk.start, first + end - chunk.start)
            outputs.append(_attend_page(query_TNQP[span], keys, values, table[: page + 1], start, how, sinks_NQ))
        first += len(chunk.token_ids)
    return torch.cat(outputs)


def _attend_page(
    query_TNQP: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    start: int,
    how: AttentionKind,
    sinks_NQ: Tensor | None,
) -> Tensor:
    """[T, N, Q, V]: those of a prompt's tokens from `start` on that lie in the last of its pages so far, causally.

    They are computed in the place and among as many rows as if all of the page's were there, which a product's order of
    summation can depend on.
    """
    num_tokens, num_kv_heads, queries_per_head, size = query_TNQP.shape
    first = start % PAGE_TOKENS
    rows_TNQP = query_TNQP.new_zeros(PAGE_TOKENS, num_kv_heads, queries_per_head, size)
    rows_TNQP[first : first + num_tokens] = query_TNQP
    positions = torch.arange(len(pages) * PAGE_TOKENS, device=keys.device)
    mask_TS = how.span.visible(positions, positions[-PAGE_TOKENS:, None])
    out_1NQV = _attend(
        rows_TNQP.transpose(0, 1).flatten(1, 2)[None],
        _gather(keys, pages[None]),
        _gather(values, pages[None]),
        mask_TS.repeat_interleave(queries_per_head, dim=0)[None, None],
        how,
        None if sinks_NQ is None else sinks_NQ.repeat(1, PAGE_TOKENS),
    )
    out_TNQV = out_1NQV[0].unflatten(1, (PAGE_TOKENS, queries_per_head)).transpose(0, 1)
    return out_TNQV[first : first + num_tokens]


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
