"""Attention over the paged cache by torch's products: on a GPU, in float32, and for what the native kernel does not do.

Decode rows are attended together, padded to the longest, and prompts page by page. Enter at `attend_by_torch`; shapes
are named as in attention.py.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from server.engines.embedded.model.pages import PAGE_TOKENS, num_pages_for

if TYPE_CHECKING:
    from server.engines.embedded.model.attention import AttentionKind, StepLayout


def attend_by_torch(
    rows: list[Tensor],
    keys: Tensor,
    values: Tensor,
    step: StepLayout,
    how: AttentionKind,
    sinks: Tensor | None = None,
) -> Tensor:
    """Write keys and values, then attend; rows are queries, keys and values [T, heads, P]."""
    query_TNP, key_TNP, value_TNP = rows
    num_kv_heads = key_TNP.shape[1]
    pages_T = step.tables[step.sequences_T, step.positions_T // PAGE_TOKENS]
    keys[pages_T, :, step.positions_T % PAGE_TOKENS] = key_TNP
    values[pages_T, :, step.positions_T % PAGE_TOKENS] = value_TNP
    query_TNQP = query_TNP.unflatten(1, (num_kv_heads, -1))
    sinks_NQ = None if sinks is None else sinks.float().view(num_kv_heads, -1)
    outputs: list[Tensor] = []
    first = step.num_decode
    if first:
        tables = step.tables[:first]
        mask = step.decode_mask(how.span)
        keys_BNSP, values_BNSP = _gather(keys, tables), _gather(values, tables)
        outputs.append(_attend(query_TNQP[:first], keys_BNSP, values_BNSP, mask, how, sinks_NQ))
    for index, segment in enumerate(step.segments, start=first):
        table = step.tables[index]
        for page in range(segment.start // PAGE_TOKENS, num_pages_for(segment.end)):
            start, end = max(segment.start, page * PAGE_TOKENS), min(segment.end, (page + 1) * PAGE_TOKENS)
            span = slice(first + start - segment.start, first + end - segment.start)
            outputs.append(_attend_page(query_TNQP[span], keys, values, table[: page + 1], start, how, sinks_NQ))
        first += len(segment.token_ids)
    return torch.cat(outputs).flatten(1, 2)


def _attend_page(
    query_TNQP: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    start: int,
    how: AttentionKind,
    sinks_NQ: Tensor | None,
) -> Tensor:
    """[T, N, Q, P]: those of a prompt's tokens from `start` on that lie in the last of its pages so far, causally.

    They are computed in the place and among as many rows as if all of the page's were there, which a product's order of
    summation can depend on.
    """
    num_tokens, num_kv_heads, queries_per_head, size = query_TNQP.shape
    first = start % PAGE_TOKENS
    rows_TNQP = query_TNQP.new_zeros(PAGE_TOKENS, num_kv_heads, queries_per_head, size)
    rows_TNQP[first : first + num_tokens] = query_TNQP
    positions = torch.arange(len(pages) * PAGE_TOKENS, device=keys.device)
    mask_TS = how.span.visible(positions, positions[-PAGE_TOKENS:, None])
    out_1NQP = _attend(
        rows_TNQP.transpose(0, 1).flatten(1, 2)[None],
        _gather(keys, pages[None]),
        _gather(values, pages[None]),
        mask_TS.repeat_interleave(queries_per_head, dim=0)[None, None],
        how,
        None if sinks_NQ is None else sinks_NQ.repeat(1, PAGE_TOKENS),
    )
    out_TNQP = out_1NQP[0].unflatten(1, (PAGE_TOKENS, queries_per_head)).transpose(0, 1)
    return out_TNQP[first : first + num_tokens]


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
