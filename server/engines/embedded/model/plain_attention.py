"""Attention on a CPU without compiled kernels: slow, and in one order of summation that nothing else can change.

torch sums its matrix products, and the rest of a vector, in an order that depends on shapes, and its exponentials
differ in the last bit between full vectors and what is left over. So a row's bits would depend on how many rows a step
has and on how long the longest is. Here each number is made by additions, products, quotients and comparisons of
numbers one by one, which have but one result, and sums are made by halves of fixed sizes: the size of a head, and a
page. Every row is attended as a decode row, whether it is of a prompt or not. That takes some thirty times as long as
matrix products. Knows nothing of steps or models. Enter at `attend_plainly`.

Shapes: T rows, R of them at a time, N key-value heads, Q queries that share one, P size of a key, V size of
a value, S positions of a page, M pages of the longest sequence.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from server.engines.embedded.model.pages import PAGE_TOKENS
from server.engines.embedded.model.spans import AttentionKind

_NUMBERS_AT_ONCE = 1 << 21
"""Of a page's products, for all rows that are attended together; how many those are cannot be seen in the result."""
_LOWEST, _HIGHEST = -87.3, 88.0


def attend_plainly(
    query_TNQP: Tensor,
    keys: Tensor,
    values: Tensor,
    tables_TM: Tensor,
    positions_T: Tensor,
    how: AttentionKind,
    sinks_NQ: Tensor | None = None,
) -> Tensor:
    """[T, N, Q, V] in the dtype of the values: each row over the pages of its table, up to its position.

    Keys and values are [pages, N, S, P] and [pages, N, S, V], with those of the rows already in them.
    """
    _, num_kv_heads, num_queries, key_size = query_TNQP.shape
    widest = num_kv_heads * num_queries * PAGE_TOKENS * max(key_size, values.shape[3])
    num_rows = max(_NUMBERS_AT_ONCE // widest, 1)
    parts = zip(query_TNQP.split(num_rows), tables_TM.split(num_rows), positions_T.split(num_rows), strict=True)
    return torch.cat([_attend_rows(*part, keys, values, how, sinks_NQ) for part in parts])


def _attend_rows(
    query_RNQP: Tensor,
    tables_RM: Tensor,
    positions_R: Tensor,
    keys: Tensor,
    values: Tensor,
    how: AttentionKind,
    sinks_NQ: Tensor | None,
) -> Tensor:
    query_RNQP1 = query_RNQP.float()[..., None]
    seen_of: dict[int, Tensor] = {}
    scores_of: dict[int, Tensor] = {}
    for page, pages_R in enumerate(tables_RM.unbind(1)):
        slots_S = page * PAGE_TOKENS + torch.arange(PAGE_TOKENS)
        seen_RS = how.span.visible(slots_S, positions_R[:, None])
        if bool(seen_RS.any()):
            keys_RNPS = keys[pages_R].float().transpose(2, 3).contiguous()
            scores_RNQS = _score(_sum(query_RNQP1 * keys_RNPS[:, :, None], dim=3), how)
            seen_of[page] = seen_RS[:, None, None]
            scores_of[page] = scores_RNQS.masked_fill(~seen_of[page], float("-inf"))
    highest_RNQ = functools.reduce(torch.maximum, (scores.amax(dim=3) for scores in scores_of.values()))
    if sinks_NQ is not None:
        highest_RNQ = torch.maximum(highest_RNQ, sinks_NQ)
    totals_RNQ = torch.zeros_like(highest_RNQ) if sinks_NQ is None else _exp(sinks_NQ - highest_RNQ)
    sums_RNQV = query_RNQP1.new_zeros(*highest_RNQ.shape, values.shape[3])
    for page, scores_RNQS in scores_of.items():
        weights_RNQS = _exp(scores_RNQS - highest_RNQ[..., None])
        products_RNQSV = weights_RNQS[..., None] * values[tables_RM[:, page]].float()[:, :, None]
        # What is hidden may be no number.
        sums_RNQV += _sum(products_RNQSV.masked_fill_(~seen_of[page][..., None], 0.0), dim=3)
        totals_RNQ = totals_RNQ + _sum(weights_RNQS, dim=3)
    return (sums_RNQV / totals_RNQ[..., None]).to(values.dtype)


def _score(products: Tensor, how: AttentionKind) -> Tensor:
    scores = products * how.scaling
    if how.softcap is None:
        return scores
    # The hyperbolic tangent.
    return how.softcap * (1.0 - 2.0 / (_exp(scores * (2.0 / how.softcap)) + 1.0))


def _sum(terms: Tensor, *, dim: int) -> Tensor:
    """Over one dimension: its second half is added to its first until one is left."""
    while (size := terms.shape[dim]) > 1:
        half = size // 2
        first, second, rest = terms.split([half, half, size % 2], dim)
        terms = torch.cat([first + second, rest], dim) if size % 2 else first + second
    return terms.squeeze(dim)


def _exp(x: Tensor) -> Tensor:
    """e^x of float32, relative error below 3e-7; 0 below -87.3, at most e^88, NaN stays NaN. Cephes' polynomial."""
    bounded = x.clamp(_LOWEST, _HIGHEST)
    whole = (bounded * 1.44269504).round()
    rest = bounded - whole * 0.693359375 + whole * 2.12194440e-4
    y = rest * 1.9875691500e-4
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1):
        y = (y + coefficient) * rest
    y = (y + 5.0000001201e-1) * (rest * rest) + (rest + 1.0)
    power_of_two = ((whole.int() + 127) << 23).view(torch.float32)
    return (y * power_of_two).masked_fill(x < _LOWEST, 0.0)
