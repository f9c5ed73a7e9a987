# type: ignore  (Triton compiles this language; it is not run as Python)
"""The ascent of rows over straight heads as one Triton kernel: values, gate, objective, shift, and the cap on it.

One program takes one row. What server/control/ascent.py, objectives.py and multipliers.py do for many rows and any
heads is done here for one row and heads whose slope is constant along an ascent, so that one step is the whole of it:
linear heads, of one unit each, and fields, whose further units are features by which their direction follows the
state. The program of a pinned row does the ascent of the callers' heads beside it too, which pinned.py explains. Knows
nothing of the vocabulary (budget_kernels.py). Enter at `ascend`.

Shapes: D hidden size, U units of the bank, and `SLOTS` places for the units of a row's heads, whose values come first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from server.kernels.gpu import layout

SLOTS = tl.constexpr(layout.SLOTS)
ROW, COUNT, KIND, SIZE = (tl.constexpr(place) for place in (layout.ROW, layout.COUNT, layout.KIND, layout.SIZE))
MAX_SHIFT, EARNS = tl.constexpr(layout.MAX_SHIFT), tl.constexpr(layout.EARNS)
GATE_SLOT, GATE_LEVEL = tl.constexpr(layout.GATE_SLOT), tl.constexpr(layout.GATE_LEVEL)
GATE_SIDE, GATE_BAND = tl.constexpr(layout.GATE_SIDE), tl.constexpr(layout.GATE_BAND)
IS_GATED, WAS_OPEN = tl.constexpr(layout.IS_GATED), tl.constexpr(layout.WAS_OPEN)
LOWEST, HIGHEST = tl.constexpr(layout.LOWEST), tl.constexpr(layout.HIGHEST)
PLACES, LEADERS = tl.constexpr(layout.PLACES), tl.constexpr(layout.LEADERS)
NUM_UNITS, WEIGHTS = tl.constexpr(layout.NUM_UNITS), tl.constexpr(layout.WEIGHTS)
LEVELS, MARKED = tl.constexpr(layout.LEVELS), tl.constexpr(layout.MARKED)
EARNED, BESIDE = tl.constexpr(layout.EARNED), tl.constexpr(layout.BESIDE)
ROW_WIDTH, STATE_WIDTH = tl.constexpr(layout.ROW_WIDTH), tl.constexpr(layout.STATE_WIDTH)
COEFFICIENTS, UNITS, CLIMB = (tl.constexpr(place) for place in (layout.COEFFICIENTS, layout.UNITS, layout.CLIMB))
RATIO, IS_NONFINITE = tl.constexpr(layout.RATIO), tl.constexpr(layout.IS_NONFINITE)
IS_CAPPED, IS_OPEN = tl.constexpr(layout.IS_CAPPED), tl.constexpr(layout.IS_OPEN)
ALONG, ASIDE = tl.constexpr(layout.ALONG), tl.constexpr(layout.ASIDE)
BIAS, REWARD_MEAN = tl.constexpr(layout.BIAS), tl.constexpr(layout.REWARD_MEAN)
REWARD_SCALE = tl.constexpr(layout.REWARD_SCALE)
WORST_CASE, TARGET = tl.constexpr(layout.WORST_CASE), tl.constexpr(layout.TARGET)
SWEEPS = tl.constexpr(12)
LEAST_GAIN = tl.constexpr(1e-9)
LEAST_LENGTH = tl.constexpr(1e-9)
# Of a change, relative to the sizes of what it is the sum of.
ROUNDING = tl.constexpr(1e-4)
INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["num_units"])
def ascend(
    hidden, hidden_stride, hidden_size, table, inputs_UD, ascent_UD, numbers_3U, effects_UU, inner_UU, num_units,
    feature_limit, state, TILE: tl.constexpr,
):  # fmt: skip
    """Program r: from row r of the table, the state [.., D] at its place and the bank of U units, row r of `state`."""
    place = tl.program_id(0)
    entry, out = table + place * ROW_WIDTH, state + place * STATE_WIDTH
    slots = tl.arange(0, SLOTS)
    num_used = tl.load(entry + COUNT).to(tl.int32)
    is_unit = slots < tl.load(entry + NUM_UNITS).to(tl.int32)
    is_head = slots < num_used
    places = tl.load(entry + PLACES + slots).to(tl.int64)
    row = hidden + tl.load(entry + ROW).to(tl.int64) * hidden_stride
    length, units = _read(row, hidden_size, inputs_UD, places, is_unit, TILE)
    units = tl.where(is_unit, units + tl.load(numbers_3U + BIAS * num_units + places), 0.0)
    mean = tl.load(numbers_3U + REWARD_MEAN * num_units + places)
    scale = tl.load(numbers_3U + REWARD_SCALE * num_units + places)

    is_open = _is_gate_open(entry, mean + scale * units, slots)
    size = tl.where(is_open, tl.load(entry + SIZE), 0.0)
    shares = _shares(entry, units, is_unit, is_head, feature_limit, slots)
    pairs = places[:, None] * num_units + places[None, :]
    moves_values = tl.load(effects_UU + pairs, mask=is_unit[:, None] & is_head[None, :], other=0.0)
    effects = tl.sum(shares[:, :, None] * moves_values[:, None, :], axis=0)
    weights = tl.load(entry + WEIGHTS + slots)
    kind = tl.load(entry + KIND)
    is_marked = tl.load(entry + MARKED + slots) > 0
    if kind == WORST_CASE:
        inner = tl.load(inner_UU + pairs, mask=is_unit[:, None] & is_unit[None, :], other=0.0)
        earnings = _cosines(_products(inner, shares), slots) * tl.load(entry + EARNED + slots)[None, :]
        moves = tl.where(tl.load(entry + EARNS) > 0, earnings, effects)
        weights = _worst_case(units, moves, size, weights, is_marked, num_used, slots)
    elif kind >= TARGET:
        levels = tl.where(is_marked, (tl.load(entry + LEVELS + slots) - mean) / scale, 0.0)
        lowest, highest = tl.load(entry + LOWEST), tl.load(entry + HIGHEST)
        weights = _onto_levels(units, effects, size, weights, levels, is_marked, lowest, highest, num_used, slots)
        weights = _within_bounds(units, effects, size, weights, levels, is_marked, kind == TARGET)

    taken = tl.where(is_unit, size * tl.sum(shares * weights[None, :], axis=1), 0.0)
    kept = _leave(
        out, entry, units, taken, moves_values, is_open, length, ascent_UD, hidden_size, places, is_unit, slots, TILE
    )
    beside = tl.load(entry + BESIDE).to(tl.int32)
    if beside >= 0:
        theirs, left = table + beside * ROW_WIDTH, state + beside * STATE_WIDTH
        inner = tl.load(inner_UU + pairs, mask=is_unit[:, None] & is_unit[None, :], other=0.0)
        weights = _kept_weights(theirs, effects, _products(inner, shares), num_used, slots)
        size = tl.where(is_open, tl.load(theirs + SIZE), 0.0)
        taken = tl.where(is_unit, size * tl.sum(shares * weights[None, :], axis=1), 0.0)
        units += tl.sum(kept[:, None] * moves_values, axis=0)
        added = _leave(
            left, theirs, units, taken, moves_values, is_open, length, ascent_UD, hidden_size, places, is_unit, slots,
            TILE,
        )  # fmt: skip
        along, aside = _against(ascent_UD, hidden_size, places, kept, added, is_unit, TILE)
        # Nothing is taken of what is not finite, and that is 0 times it.
        is_finite = _is_finite(along) & _is_finite(aside / length)
        tl.store(left + ALONG, tl.where(is_finite, along, 0.0))
        tl.store(left + ASIDE, tl.where(is_finite, aside / length, 0.0))


@triton.jit
def _leave(
    out, entry, units, taken, moves_values, is_open, length, ascent_UD, hidden_size, places, is_unit, slots,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write what is left of an ascent within the cap on its shift; the coefficients of that."""
    ends = units + tl.sum(taken[:, None] * moves_values, axis=0)
    ratio = _length_of(ascent_UD, hidden_size, places, taken, is_unit, TILE) / length
    is_finite = _is_finite(ratio) & (tl.min(_is_finite(ends).to(tl.int32), axis=0) > 0)
    max_shift = tl.load(entry + MAX_SHIFT)
    share = tl.where(is_finite, tl.where(ratio > max_shift, max_shift / ratio, 1.0), 0.0)
    kept = tl.where(is_finite, taken * share, 0.0)
    tl.store(out + COEFFICIENTS + slots, kept)
    tl.store(out + UNITS + slots, units)
    tl.store(out + CLIMB + slots, tl.sum(kept[:, None] * moves_values, axis=0))
    tl.store(out + RATIO, tl.where(is_finite, ratio * share, 0.0))
    tl.store(out + IS_NONFINITE, tl.where(is_finite, 0.0, 1.0))
    tl.store(out + IS_CAPPED, tl.where(is_finite & (share < 1.0), 1.0, 0.0))
    tl.store(out + IS_OPEN, tl.where(is_open, 1.0, 0.0))
    return kept


@triton.jit
def _shares(entry, units, is_unit, is_head, feature_limit, slots):
    """How much of each unit's ascent row [unit, head] a step of length one along a head's ascent takes: all of its
    value's, and of its features' as much as these are, within limits. See `FieldHead.readout`."""
    cut = tl.maximum(tl.minimum(units, feature_limit), -feature_limit)
    # What is not a number stays so.
    features = tl.where(units == units, cut, units)  # noqa: PLR0124
    leaders = tl.load(entry + LEADERS + slots).to(tl.int32)
    is_of_head = is_unit[:, None] & (leaders[:, None] == slots[None, :])
    return tl.where(is_of_head, tl.where(is_head, 1.0, features)[:, None], 0.0)


@triton.jit
def _products(inner, shares):
    """Of every two heads' ascents, from the inner products of units' ascent rows."""
    half = tl.sum(shares[:, :, None] * inner[:, None, :], axis=0)
    return tl.sum(half[:, :, None] * shares[None, :, :], axis=1)


@triton.jit
def _cosines(products, slots):
    """Of every two heads' ascents, from their inner products."""
    squares = tl.sum(tl.where(slots[:, None] == slots[None, :], products, 0.0), axis=1)
    lengths = tl.maximum(tl.sqrt(squares), LEAST_LENGTH)
    return products / lengths[:, None] / lengths[None, :]


@triton.jit
def _read(row, hidden_size, inputs_UD, places, is_used, TILE: tl.constexpr):
    """A state's length, and its products with the input rows of these units."""
    dims = tl.arange(0, TILE)
    squares = tl.zeros([TILE], tl.float32)
    products = tl.zeros([SLOTS, TILE], tl.float32)
    for start in range(0, hidden_size, TILE):
        is_in = start + dims < hidden_size
        state = tl.load(row + start + dims, mask=is_in, other=0.0).to(tl.float32)
        wanted = is_used[:, None] & is_in[None, :]
        inputs = tl.load(inputs_UD + places[:, None] * hidden_size + (start + dims)[None, :], mask=wanted, other=0.0)
        squares += state * state
        products += inputs * state[None, :]
    return tl.sqrt(tl.sum(squares, axis=0)), tl.sum(products, axis=1)


@triton.jit
def _length_of(ascent_UD, hidden_size, places, taken, is_used, TILE: tl.constexpr):
    """The length of the shift that these units' ascent rows, so much of each, come to."""
    dims = tl.arange(0, TILE)
    squares = tl.zeros([TILE], tl.float32)
    for start in range(0, hidden_size, TILE):
        wanted = is_used[:, None] & (start + dims < hidden_size)[None, :]
        rows = tl.load(ascent_UD + places[:, None] * hidden_size + (start + dims)[None, :], mask=wanted, other=0.0)
        shift = tl.sum(taken[:, None] * rows, axis=0)
        squares += shift * shift
    return tl.sqrt(tl.sum(squares, axis=0))


@triton.jit
def _against(ascent_UD, hidden_size, places, first, second, is_used, TILE: tl.constexpr):
    """How many times the first shift the second one goes along it, and the length of what goes aside."""
    dims = tl.arange(0, TILE)
    inner, square = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, hidden_size, TILE):
        wanted = is_used[:, None] & (start + dims < hidden_size)[None, :]
        rows = tl.load(ascent_UD + places[:, None] * hidden_size + (start + dims)[None, :], mask=wanted, other=0.0)
        one, other = tl.sum(first[:, None] * rows, axis=0), tl.sum(second[:, None] * rows, axis=0)
        inner += one * other
        square += one * one
    length = tl.sum(square, axis=0)
    along = tl.where(length > 0, tl.sum(inner, axis=0) / length, 0.0)
    return along, _length_of(ascent_UD, hidden_size, places, second - along * first, is_used, TILE)


@triton.jit
def _is_gate_open(entry, rewards, slots):
    value = _at(rewards, slots, tl.load(entry + GATE_SLOT))
    beyond = tl.load(entry + GATE_SIDE) * (value - tl.load(entry + GATE_LEVEL))
    was_open = tl.load(entry + WAS_OPEN) > 0
    is_gated = tl.load(entry + IS_GATED) > 0
    return (is_gated == 0) | (beyond < 0) | (was_open & (beyond < tl.load(entry + GATE_BAND)))


@triton.jit
def _worst_case(values, effects, size, weights, is_named, num_used, slots):
    """See `WorstCase.step_weights` and `simplex_weights`: weight moves between two heads at a time."""
    named = is_named.to(tl.int32)
    count = tl.sum(named, axis=0)
    effects = weights[:, None] * effects * weights[None, :]
    shares = tl.where(is_named, 1.0 / count, 0.0)
    ends = values * weights + size * tl.sum(shares[:, None] * effects, axis=0)
    for _ in range(tl.where(count == 2, 1, SWEEPS)):
        for i in range(num_used):
            if _at(named, slots, i) > 0:
                for j in range(i + 1, num_used):
                    if _at(named, slots, j) > 0:
                        # 1 at i and -1 at j, so that a product with it is the difference between the two.
                        pair = (slots == i).to(tl.float32) - (slots == j).to(tl.float32)
                        difference = tl.sum(pair[:, None] * effects, axis=0)
                        curvature = size * tl.sum(pair * difference, axis=0)
                        wanted = -tl.sum(pair * ends, axis=0) / tl.maximum(curvature, LEAST_GAIN)
                        moved = tl.maximum(tl.minimum(wanted, _at(shares, slots, j)), -_at(shares, slots, i))
                        shares += moved * pair
                        ends += size * moved * difference
    return weights * shares


@triton.jit
def _onto_levels(values, effects, size, weights, levels, is_free, lowest, highest, num_used, slots):
    """See `Box.weights`: what is added to a free head's weight ends its value on its level."""
    ends = values + size * tl.sum(weights[:, None] * effects, axis=0)
    added = tl.zeros([SLOTS], tl.float32)
    for _ in range(tl.where(tl.sum(is_free.to(tl.int32), axis=0) == 1, 1, SWEEPS)):
        for k in range(num_used):
            if _at(is_free.to(tl.int32), slots, k) > 0:
                effect = tl.sum(tl.where((slots == k)[:, None], effects, 0.0), axis=0)
                gain = size * _at(effect, slots, k)
                before = _at(added, slots, k)
                wanted = before + (_at(levels, slots, k) - _at(ends, slots, k)) / gain
                held = tl.where(gain > LEAST_GAIN, tl.minimum(tl.maximum(wanted, lowest), highest), before)
                ends += size * (held - before) * effect
                added = tl.where(slots == k, held, added)
    return weights + added


@triton.jit
def _within_bounds(values, effects, size, weights, levels, is_levelled, is_target):
    """See `within_bounds`, and `Target.bounds` or `Floor.bounds`."""
    low = tl.where(is_target, tl.where(values >= levels, levels, -INFINITY), tl.minimum(values, levels))
    high = tl.where(is_target, tl.where(values <= levels, levels, INFINITY), INFINITY)
    low, high = tl.where(is_levelled, low, -INFINITY), tl.where(is_levelled, high, INFINITY)
    change = size * tl.sum(weights[:, None] * effects, axis=0)
    ends = values + change
    room = tl.where(ends < low, low - values, high - values)
    share = tl.min(tl.where((ends < low) | (ends > high), room / change, 1.0), axis=0)
    return weights * tl.maximum(share, 0.0)


@triton.jit
def _kept_weights(entry, effects, inner, num_used, slots):
    """See `PinnedRows.kept_weights`."""
    weights, signs = tl.load(entry + WEIGHTS + slots), tl.load(entry + MARKED + slots)
    is_pinned = (signs != 0.0).to(tl.int32)
    added = tl.zeros([SLOTS], tl.float32)
    for _ in range(tl.where(tl.sum(is_pinned, axis=0) == 1, 1, SWEEPS)):
        for k in range(num_used):
            if _at(is_pinned, slots, k) > 0:
                total = weights + signs * added
                sign, before = _at(signs, slots, k), _at(added, slots, k)
                wanted = tl.maximum(
                    _wanted(effects, total, sign, before, k, slots), _wanted(inner, total, sign, before, k, slots)
                )
                added = tl.where(slots == k, tl.maximum(wanted, 0.0), added)
    total = weights + signs * added
    return tl.where(_keeps(signs, total, effects) & _keeps(signs, total, inner), total, 0.0)


@triton.jit
def _wanted(moves, total, sign, before, k, slots):
    """The multiplier of pinned head k that makes up for what all the others' ascents move of it."""
    column = tl.sum(tl.where(slots[None, :] == k, moves, 0.0), axis=1)
    gain = _at(column, slots, k)
    others = sign * tl.sum(total * column, axis=0) - before * gain
    return tl.where(gain > LEAST_GAIN, -others / gain, 0.0)


@triton.jit
def _keeps(signs, weights, moves):
    terms = weights[:, None] * moves
    is_kept = signs * tl.sum(terms, axis=0) >= -ROUNDING * tl.sum(tl.abs(terms), axis=0)
    return tl.min(is_kept.to(tl.int32), axis=0) > 0


@triton.jit
def _at(numbers, slots, place):
    """The one at a place."""
    return tl.sum(tl.where(slots == place, numbers, 0), axis=0)


@triton.jit
def _is_finite(number):
    return tl.abs(number) < INFINITY
