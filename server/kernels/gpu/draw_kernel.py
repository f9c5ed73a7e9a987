# type: ignore  (Triton compiles this language; it is not run as Python)
"""Drawing tokens on a GPU as one Triton kernel: bias, penalties, masks, softmax, min-p, top-k, top-p and the draw.

One program takes one row. What changes a row's logits concerns few tokens, so they are changed one by one in a copy of
the row, in float32 and in the order of server/engines/embedded/logits.py; a row without rules is read where it is.
Nothing is sorted: a filter keeps what is above a weight, relative to the most likely token's. Which weight that is, is
searched for by the bits of the float, four at a time, in passes over the row that count or add up what is above each of
sixteen. server/engines/embedded/sampler.py says what is drawn, and does the same by torch's operations. Enter at
`draw`.

Shapes: B rows, C of them with rules, V vocabulary, N entries of all rows' rules, M masks.
Source: vLLM's penalties and FlashInfer's filters are alike, with a dense count for each token, and by rejection.
"""

from __future__ import annotations

import triton
import triton.language as tl

TEMPERATURE, TOP_K, TOP_P, MIN_P, UNIFORM = range(5)
ROW_WIDTH = 5
"""Of the table [B, ROW_WIDTH] float32; a temperature of 0 is greedy, a top_k of 0 keeps every token."""
REPETITION, INVERSE_REPETITION, FREQUENCY, PRESENCE = range(4)
PENALTIES_WIDTH = 4
"""Of the penalties [B, PENALTIES_WIDTH] float32."""
COPY, MASK, BIAS, BIAS_END, PROMPT, PROMPT_END, OUTPUT, OUTPUT_END = range(8)
PLACES_WIDTH = 8
"""Of the places [B, PLACES_WIDTH] int32 of a row's rules: its copy and its mask, or -1, and where its entries begin and
end among the tokens with a bias, those of prompts and those of outputs."""

_WIDTH, _PLACES, _PENALTIES = tl.constexpr(ROW_WIDTH), tl.constexpr(PLACES_WIDTH), tl.constexpr(PENALTIES_WIDTH)
_TOP_K, _TOP_P, _MIN_P = tl.constexpr(TOP_K), tl.constexpr(TOP_P), tl.constexpr(MIN_P)
_UNIFORM = tl.constexpr(UNIFORM)
_REPETITION, _INVERSE_REPETITION = tl.constexpr(REPETITION), tl.constexpr(INVERSE_REPETITION)
_FREQUENCY, _PRESENCE = tl.constexpr(FREQUENCY), tl.constexpr(PRESENCE)
_COPY, _MASK = tl.constexpr(COPY), tl.constexpr(MASK)
_BIAS, _BIAS_END = tl.constexpr(BIAS), tl.constexpr(BIAS_END)
_PROMPT, _PROMPT_END = tl.constexpr(PROMPT), tl.constexpr(PROMPT_END)
_OUTPUT, _OUTPUT_END = tl.constexpr(OUTPUT), tl.constexpr(OUTPUT_END)
INFINITY = tl.constexpr(float("inf"))
DIGITS = tl.constexpr(16)
WHOLE = tl.constexpr(0x3F800000)
"""The bits of 1.0, the weight of the most likely token; bits of positive floats are ordered as they are."""


@triton.jit(do_not_specialize=["num_outputs", "mask_width"])
def draw(
    logits, logits_stride, size_V, table, places_BP, penalties_B4, biased_N, bias_N, prompt_N, outputs_2N, num_outputs,
    masks_MW, mask_width, copies_CV, tokens_B, HAS_RULES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program b: the token of row b, -1 where the largest logit is not finite.

    `outputs_2N` has tokens that were drawn before, each once, and how often; below zero where the prompt has it too.
    """
    place = tl.program_id(0)
    row, entry = logits + place.to(tl.int64) * logits_stride, table + place * _WIDTH
    if HAS_RULES:
        rules = places_BP + place * _PLACES
        copied = tl.load(rules + _COPY)
        if copied >= 0:
            copy = copies_CV + copied.to(tl.int64) * size_V
            _copy(row, size_V, copy, TILE)
            _add_bias(copy, biased_N, bias_N, rules, TILE)
            _repeat(copy, prompt_N, outputs_2N, num_outputs, penalties_B4 + place * _PENALTIES, rules, TILE)
            _mask(copy, size_V, masks_MW, mask_width, tl.load(rules + _MASK), TILE)
            token = _drawn(copy, size_V, entry, TILE)
        else:
            token = _drawn(row, size_V, entry, TILE)
    else:
        token = _drawn(row, size_V, entry, TILE)
    tl.store(tokens_B + place, token.to(tl.int64))


@triton.jit
def _copy(row, size_V, copy, TILE: tl.constexpr):
    columns = tl.arange(0, TILE)
    for start in range(0, size_V, TILE):
        tl.store(copy + start + columns, _load(row, start + columns, size_V), mask=start + columns < size_V)
    # Here and below: one thread has written what another one reads.
    tl.debug_barrier()


@triton.jit
def _add_bias(copy, biased_N, bias_N, rules, TILE: tl.constexpr):
    columns, end = tl.arange(0, TILE), tl.load(rules + _BIAS_END)
    for start in range(tl.load(rules + _BIAS), end, TILE):
        is_in = start + columns < end
        at = copy + tl.load(biased_N + start + columns, mask=is_in, other=0)
        bias = tl.load(bias_N + start + columns, mask=is_in, other=0.0)
        tl.store(at, tl.load(at, mask=is_in, other=0.0) + bias, mask=is_in)
    tl.debug_barrier()


@triton.jit
def _repeat(copy, prompt_N, outputs_2N, num_outputs, penalties, rules, TILE: tl.constexpr):
    """Penalties: of repetition once for each token of prompt or output, of frequency and presence for the output's."""
    columns, end = tl.arange(0, TILE), tl.load(rules + _PROMPT_END)
    repetition, inverse = tl.load(penalties + _REPETITION), tl.load(penalties + _INVERSE_REPETITION)
    for start in range(tl.load(rules + _PROMPT), end, TILE):
        is_in = start + columns < end
        at = copy + tl.load(prompt_N + start + columns, mask=is_in, other=0)
        logit = tl.load(at, mask=is_in, other=0.0)
        tl.store(at, logit * tl.where(logit > 0, inverse, repetition), mask=is_in)
    tl.debug_barrier()
    frequency, presence = tl.load(penalties + _FREQUENCY), tl.load(penalties + _PRESENCE)
    end = tl.load(rules + _OUTPUT_END)
    for start in range(tl.load(rules + _OUTPUT), end, TILE):
        is_in = start + columns < end
        at = copy + tl.load(outputs_2N + start + columns, mask=is_in, other=0)
        count = tl.load(outputs_2N + num_outputs + start + columns, mask=is_in, other=0)
        logit = tl.load(at, mask=is_in, other=0.0)
        logit = tl.where(count > 0, logit * tl.where(logit > 0, inverse, repetition), logit)
        lowered_by = frequency * tl.abs(count).to(tl.float32) + presence
        tl.store(at, logit - lowered_by, mask=is_in)
    tl.debug_barrier()


@triton.jit
def _mask(copy, size_V, masks_MW, mask_width, mask, TILE: tl.constexpr):
    """Nothing is left of tokens whose bit is not set; without a mask all stay."""
    columns = tl.arange(0, TILE)
    for start in range(0, tl.where(mask >= 0, size_V, 0), TILE):
        token = start + columns
        is_in = token < size_V
        word = tl.load(masks_MW + mask.to(tl.int64) * mask_width + token // 32, mask=is_in, other=0)
        is_allowed = ((word >> (token % 32)) & 1) > 0
        tl.store(copy + token, -INFINITY, mask=is_in & (is_allowed == 0))
    tl.debug_barrier()


@triton.jit
def _drawn(row, size_V, entry, TILE: tl.constexpr):
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
    return tl.where(is_drawable, token, -1)


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
