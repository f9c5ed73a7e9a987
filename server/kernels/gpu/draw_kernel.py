# type: ignore  (Triton compiles this language; it is not run as Python)
"""Drawing tokens on a GPU as one Triton kernel: softmax, min-p, top-k, top-p and the draw, without sorting.

One program takes one row. A filter keeps what is above a weight, relative to the most likely token's. Which weight
that is, is searched for by the bits of the float, four at a time, in passes over the row that count or add up what is
above each of sixteen. server/engines/embedded/sampler.py says what is drawn, and does the same by torch's operations.
Enter at `draw`.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

TEMPERATURE, TOP_K, TOP_P, MIN_P, UNIFORM = range(5)
ROW_WIDTH = 5
"""Of the table [B, ROW_WIDTH] float32; a temperature of 0 is greedy, a top_k of 0 keeps every token."""

_WIDTH = tl.constexpr(ROW_WIDTH)
_TOP_K, _TOP_P, _MIN_P = tl.constexpr(TOP_K), tl.constexpr(TOP_P), tl.constexpr(MIN_P)
_UNIFORM = tl.constexpr(UNIFORM)
INFINITY = tl.constexpr(float("inf"))
DIGITS = tl.constexpr(16)
WHOLE = tl.constexpr(0x3F800000)
"""The bits of 1.0, the weight of the most likely token; bits of positive floats are ordered as they are."""


@triton.jit
def draw(logits, logits_stride, size_V, table, tokens_B, TILE: tl.constexpr):
    """Program b: the token of row b, -1 where the largest logit is not finite."""
    place = tl.program_id(0)
    row, entry = logits + place.to(tl.int64) * logits_stride, table + place * _WIDTH
    columns = tl.arange(0, TILE)
    tops = tl.full([TILE], -INFINITY, tl.float32)
    is_number = tl.full([TILE], 1, tl.int32)
    for start in range(0, size_V, TILE):
        logit = _load(row, start + columns, size_V)
        tops = tl.maximum(tops, logit)
        is_number = is_number & (logit == logit).to(tl.int32)  # noqa: PLR0124
    top = tl.max(tops, axis=0)
    is_drawable = (tl.min(is_number, axis=0) > 0) & (tl.abs(top) < INFINITY)
    temperature = tl.load(entry)
    inverse = tl.where(temperature > 0, 1.0 / tl.where(temperature > 0, temperature, 1.0), 0.0)

    above = (tl.maximum(tl.load(entry + _MIN_P), 0.0).to(tl.int32, bitcast=True)) - 1
    top_k = tl.load(entry + _TOP_K)
    if top_k > 0:
        above = tl.maximum(above, _highest(row, size_V, top, inverse, -1, top_k, True, TILE) - 1)
    above = tl.minimum(above, WHOLE - 1)
    top_p = tl.load(entry + _TOP_P)
    if top_p < 1.0:
        wanted = top_p * _mass(row, size_V, top, inverse, above, TILE)
        above = tl.maximum(above, _highest(row, size_V, top, inverse, above, wanted, False, TILE))
    # The most likely token stays whatever is left out.
    above = tl.where(temperature > 0, tl.minimum(above, WHOLE - 1), -1)
    target = tl.load(entry + _UNIFORM) * _mass(row, size_V, top, inverse, above, TILE)
    token = _where(row, size_V, top, inverse, above, target, temperature == 0, TILE)
    tl.store(tokens_B + place, tl.where(is_drawable, token, -1).to(tl.int64))


@triton.jit
def _load(row, columns, size_V):
    return tl.load(row + columns, mask=columns < size_V, other=-INFINITY).to(tl.float32)


@triton.jit
def _weights(row, columns, size_V, top, inverse):
    return tl.where(columns < size_V, tl.exp((_load(row, columns, size_V) - top) * inverse), 0.0)


@triton.jit
def _mass(row, size_V, top, inverse, above, TILE: tl.constexpr):
    """Of the weights with bits above these."""
    columns = tl.arange(0, TILE)
    mass = tl.zeros([TILE], tl.float32)
    for start in range(0, size_V, TILE):
        weight = _weights(row, start + columns, size_V, top, inverse)
        mass += tl.where(weight.to(tl.int32, bitcast=True) > above, weight, 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def _highest(row, size_V, top, inverse, above, wanted, COUNTS: tl.constexpr, TILE: tl.constexpr):
    """The highest bits t such that at least `wanted` weights are of bits t or more, with COUNTS; without it, such that
    the weights of bits beyond t, among those with bits above these, add up to at least `wanted`; -1 if there are none.
    """
    columns, digits = tl.arange(0, TILE), tl.arange(0, DIGITS)
    found = tl.zeros([], tl.int32)
    has_any = tl.zeros([], tl.int32)
    for step in range(8):
        tried = found + (digits << (28 - 4 * step))
        sums = tl.zeros([DIGITS, TILE], tl.float32)
        for start in range(0, size_V, TILE):
            weight = _weights(row, start + columns, size_V, top, inverse)
            bits = weight.to(tl.int32, bitcast=True)
            if COUNTS:
                is_in = (bits[None, :] >= tried[:, None]) & (start + columns < size_V)[None, :]
                sums += is_in.to(tl.float32)
            else:
                is_in = (bits[None, :] > tried[:, None]) & (bits > above)[None, :]
                sums += tl.where(is_in, weight[None, :], 0.0)
        # Beyond 2^31 the first digit has no meaning, and nothing is as high.
        is_enough = (tl.sum(sums, axis=1) >= wanted) & (tried >= found)
        has_any = tl.maximum(has_any, tl.max(is_enough.to(tl.int32), axis=0))
        found = tl.maximum(found, tl.max(tl.where(is_enough, tried, 0), axis=0))
    return tl.where(has_any > 0, found, -1)


@triton.jit
def _where(row, size_V, top, inverse, above, target, is_greedy, TILE: tl.constexpr):
    """The first token up to and with which the weights kept add up to more than the target; greedily, the first of the
    largest logits."""
    columns = tl.arange(0, TILE)
    before = tl.zeros([], tl.float32)
    token = tl.full([], 2147483647, tl.int32)
    last = tl.full([], -1, tl.int32)
    for start in range(0, size_V, TILE):
        logit = _load(row, start + columns, size_V)
        weight = _weights(row, start + columns, size_V, top, inverse)
        is_kept = (weight.to(tl.int32, bitcast=True) > above) & (start + columns < size_V)
        kept = tl.where(is_kept, weight, 0.0)
        is_beyond = tl.where(is_greedy, logit == top, is_kept & (before + tl.cumsum(kept, axis=0) > target))
        token = tl.minimum(token, tl.min(tl.where(is_beyond, start + columns, 2147483647), axis=0))
        last = tl.maximum(last, tl.max(tl.where(is_kept, start + columns, -1), axis=0))
        before += tl.sum(kept, axis=0)
    # Rounding may leave the sum a little below the target.
    return tl.where(token < 2147483647, token, last)
