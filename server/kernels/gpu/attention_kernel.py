# type: ignore  (Triton compiles this language; it is not run as Python)
"""Attention over pages on a GPU as Triton kernels: queries of a block of tokens, page after page of keys and values.

`attend` keeps the largest score so far of each query, the sum of exponentials below it and the weighted values, which
it scales down when a larger score comes. A decoding row is a block of one token, whose pages are split over programs;
`join` puts what these leave together. Pages are taken in one order and splits are of one size, so a row's numbers
depend on no other row. Called by attention.py.

Shapes: T tokens of the step, N key-value heads, Q queries that share one, P size of a key, V that of a value.
Source: Dao 2023 (FlashAttention-2, arXiv 2307.08691) and its way to decode, split over keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["table_width", "window", "chunk", "split_pages", "num_splits"])
def attend(
    queries, query_stride, keys, values, tables, table_width, sequences_T, positions_T, blocks, sinks, out, parts,
    num_heads, scaling, softcap, window, chunk, split_pages, num_splits, QUERIES: tl.constexpr, KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PAGE: tl.constexpr,
    HAS_BLOCKS: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (b, n, s): tokens of block b, of which `blocks` [B, 2] has the first row and the number, or row b alone,
    under key-value head n, over the pages of split s; into `out` [T, N Q, V] or `parts` [B, N, S, ROWS, VALUES + 2]."""
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, count = block, 1
    if HAS_BLOCKS:
        first, count = tl.load(blocks + 2 * block), tl.load(blocks + 2 * block + 1)
    places = tl.arange(0, ROWS)
    tokens = places // QUERIES
    is_query = tokens < count
    rows = (first + tokens).to(tl.int64)
    heads = head * QUERIES + places % QUERIES
    start = tl.load(positions_T + first).to(tl.int32)
    last = start + count - 1
    positions = start + tokens
    dims, outs, slots = tl.arange(0, KEYS), tl.arange(0, VALUES), tl.arange(0, PAGE)
    query_at = queries + rows[:, None] * query_stride + (heads * KEY_SIZE)[:, None] + dims[None, :]
    query = tl.load(query_at, mask=is_query[:, None] & (dims < KEY_SIZE)[None, :], other=0.0).to(tl.float32)

    top = tl.full([ROWS], -INFINITY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, VALUES], tl.float32)
    if HAS_SINKS:
        # A sink is of no page, so it is counted with the first of them.
        top = tl.where(split == 0, tl.load(sinks + heads, mask=is_query, other=0.0), top)
        total = tl.where(split == 0, 1.0, total)
    table = tables + tl.load(sequences_T + first).to(tl.int64) * table_width
    begin = tl.maximum(_lowest(start, window, chunk) // PAGE, split * split_pages)
    end = tl.minimum(last // PAGE + 1, (split + 1) * split_pages)
    for page in range(begin, end):
        base = (tl.load(table + page).to(tl.int64) * num_heads + head) * PAGE
        spots = page * PAGE + slots
        is_there = spots <= last
        key_at = keys + (base + slots)[:, None] * KEY_SIZE + dims[None, :]
        key = tl.load(key_at, mask=is_there[:, None] & (dims < KEY_SIZE)[None, :], other=0.0).to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scaling
        if HAS_CAP:
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / softcap)))
        scores = tl.where(_is_seen(spots[None, :], positions[:, None], window, chunk), scores, -INFINITY)
        above, factor, lowered_by = _raised(top, tl.max(scores, axis=1))
        weights = tl.exp(scores - lowered_by[:, None])
        value_at = values + (base + slots)[:, None] * VALUE_SIZE + outs[None, :]
        value = tl.load(value_at, mask=is_there[:, None] & (outs < VALUE_SIZE)[None, :], other=0.0).to(tl.float32)
        total = total * factor + tl.sum(weights, axis=1)
        summed = summed * factor[:, None] + tl.dot(weights, value, input_precision=PRECISION)
        top = above
    if IS_SPLIT:
        part = parts + (((block * num_heads + head) * num_splits + split) * ROWS + places) * (VALUES + 2)
        tl.store(part[:, None] + outs[None, :], summed)
        tl.store(part + VALUES, top)
        tl.store(part + VALUES + 1, total)
    else:
        out_at = out + (rows * (num_heads * QUERIES) + heads)[:, None] * VALUE_SIZE + outs[None, :]
        tl.store(out_at, summed / total[:, None], mask=is_query[:, None] & (outs < VALUE_SIZE)[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def join(
    parts, out, num_heads, num_splits, QUERIES: tl.constexpr, VALUE_SIZE: tl.constexpr, ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Program (b, n): row b of `out` under key-value head n, of what the splits left in `parts`."""
    block, head = tl.program_id(0), tl.program_id(1)
    places, outs = tl.arange(0, ROWS), tl.arange(0, VALUES)
    top = tl.full([ROWS], -INFINITY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, VALUES], tl.float32)
    for split in range(num_splits):
        part = parts + (((block * num_heads + head) * num_splits + split) * ROWS + places) * (VALUES + 2)
        its_top = tl.load(part + VALUES)
        above, factor, lowered_by = _raised(top, its_top)
        its_factor = tl.exp(its_top - lowered_by)
        total = total * factor + tl.load(part + VALUES + 1) * its_factor
        its_summed = tl.load(part[:, None] + outs[None, :])
        summed = summed * factor[:, None] + its_summed * its_factor[:, None]
        top = above
    row = (block.to(tl.int64) * num_heads + head) * QUERIES + places
    is_out = (places < QUERIES)[:, None] & (outs < VALUE_SIZE)[None, :]
    tl.store(out + row[:, None] * VALUE_SIZE + outs[None, :], summed / total[:, None], mask=is_out)


@triton.jit
def _raised(top, other):
    """The larger one, what exponentials below `top` are taken times, and what scores are lowered by; where both are
    minus infinity nothing has been seen, and zeros stay zeros."""
    above = tl.maximum(top, other)
    lowered_by = tl.where(above > -INFINITY, above, 0.0)
    return above, tl.exp(top - lowered_by), lowered_by


@triton.jit
def _lowest(position, window, chunk):
    """The lowest position that a token sees; see `Span`."""
    of_window = tl.where(window > 0, position - window + 1, 0)
    of_chunk = tl.where(chunk > 0, position - position % tl.maximum(chunk, 1), 0)
    return tl.maximum(tl.maximum(of_window, of_chunk), 0)


@triton.jit
def _is_seen(spots, positions, window, chunk):
    is_near = (window == 0) | (spots > positions - window)
    size = tl.maximum(chunk, 1)
    is_of_chunk = (chunk == 0) | (spots // size == positions // size)
    return (spots <= positions) & is_near & is_of_chunk
