# type: ignore  (Triton compiles this language; it is not run as Python)
"""The move of an edit on a GPU as one Triton kernel: logits to where their budgets allow, and each row's report.

Knows nothing of how far that is found to be (budget_kernels.py, beside_kernels.py). Called by edit.py.

Shapes: B rows of the step, R edited rows, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from server.kernels.gpu import layout
from server.kernels.gpu.beside_kernels import found_alone, joined, shift_ratio
from server.kernels.gpu.budget_kernels import _change

SLOTS, COUNT, KIND = tl.constexpr(layout.SLOTS), tl.constexpr(layout.COUNT), tl.constexpr(layout.KIND)
LIMIT, KL_HELD = tl.constexpr(layout.LIMIT), tl.constexpr(layout.KL_HELD)
HELD, IS_GATED = tl.constexpr(layout.HELD), tl.constexpr(layout.IS_GATED)
NUM_UNITS, BESIDE = tl.constexpr(layout.NUM_UNITS), tl.constexpr(layout.BESIDE)
PLACES, LEVELS, MARKED = tl.constexpr(layout.PLACES), tl.constexpr(layout.LEVELS), tl.constexpr(layout.MARKED)
ROW_WIDTH, STATE_WIDTH = tl.constexpr(layout.ROW_WIDTH), tl.constexpr(layout.STATE_WIDTH)
COEFFICIENTS, UNITS, CLIMB = (tl.constexpr(place) for place in (layout.COEFFICIENTS, layout.UNITS, layout.CLIMB))
RATIO, IS_NONFINITE = tl.constexpr(layout.RATIO), tl.constexpr(layout.IS_NONFINITE)
IS_CAPPED, IS_OPEN = tl.constexpr(layout.IS_CAPPED), tl.constexpr(layout.IS_OPEN)
REWARD_MEAN, REWARD_SCALE = tl.constexpr(layout.REWARD_MEAN), tl.constexpr(layout.REWARD_SCALE)
TARGET = tl.constexpr(layout.TARGET)
NUM_WEIGHED, NUM_SOUGHT = tl.constexpr(layout.NUM_WEIGHED), tl.constexpr(layout.NUM_SOUGHT)
WEIGHED, SOUGHT = tl.constexpr(layout.WEIGHED_WIDTH), tl.constexpr(layout.SOUGHT_WIDTH)


@triton.jit(do_not_specialize=["num_splits", "num_units", "num_first", "beside_splits"])
def move(
    source, source_stride, logits, size_V, places_B, basis, table, state, num_first, measured, probed, weighed, sought,
    numbers_3U, num_units, report, num_splits, chunk, beside_splits, HAS_CAP: tl.constexpr, HAS_BESIDE: tl.constexpr,
    IS_WIDENED: tl.constexpr, TOLERANCE: tl.constexpr, BY_CAP: tl.constexpr, BY_GATE: tl.constexpr,
    BY_LEVEL: tl.constexpr, BY_PINNED: tl.constexpr, REPORTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (b, split): its part of row b of `source` into the same of `logits` [B, V] float32, moved if `places_B`
    has a place of the table for the row, and not -1; the first split writes the row's report [R, REPORTED].

    Without IS_WIDENED both are one, and rows that do not move are left as they are. `BY_CAP`, `BY_GATE` and `BY_PINNED`
    are reported of what these hold, `BY_LEVEL` of a target, and one more of a floor. Without HAS_BESIDE no row is over
    pinned control, and `weighed` and `sought` hold nothing; with HAS_CAP `measured` is what `seek_alone` left.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    is_edited = tl.load(places_B + row) >= 0
    place = tl.maximum(tl.load(places_B + row), 0)
    entry, first = table + place * ROW_WIDTH, state + place * STATE_WIDTH
    limit = tl.load(entry + LIMIT)
    scale, divergence, is_finite = found_alone(measured, probed, place, num_splits, limit, HAS_CAP)
    is_lost = (tl.load(first + IS_NONFINITE) > 0) | (is_finite == 0)
    is_short, is_capped, is_dropped = scale < 1.0, tl.load(first + IS_CAPPED) > 0, scale < 0.0
    ratio = scale * tl.load(first + RATIO)
    added, of_added = first, tl.full([], 0.0, tl.float32)
    if HAS_BESIDE:
        beside = tl.load(entry + BESIDE).to(tl.int32)
        if beside >= 0:
            added, each = state + beside * STATE_WIDTH, (beside - num_first) * beside_splits
            scale, of_added, divergence, is_held, is_dropped, is_lost = joined(
                table + beside * ROW_WIDTH, first, added, scale, divergence, is_lost == 0, numbers_3U, num_units,
                weighed + each * NUM_WEIGHED * WEIGHED, sought + each * NUM_SOUGHT * SOUGHT, beside_splits, TOLERANCE,
            )  # fmt: skip
            is_short |= is_held
            is_capped |= (tl.load(added + IS_CAPPED) > 0) & (of_added > 0)
            ratio = shift_ratio(first, added, scale, of_added)
    if is_edited & (split == 0):
        held = tl.where(is_short, tl.load(entry + KL_HELD), tl.where(is_capped, BY_CAP, 0.0))
        held = tl.where((held == 0.0) & is_dropped, BY_PINNED, held)
        _tell(
            report + place * REPORTED, entry, first, added, numbers_3U, num_units, scale, of_added, ratio, divergence,
            tl.where(is_lost, 0.0, held), is_lost, TOLERANCE, BY_GATE, BY_LEVEL,
        )  # fmt: skip
    count = tl.load(entry + NUM_UNITS).to(tl.int32)
    columns = tl.arange(0, TILE)
    is_moved = is_edited & (ratio > 0)
    end = tl.minimum((split + 1) * chunk, size_V)
    if not IS_WIDENED:
        end = tl.where(is_moved, end, 0)
    for start in range(split * chunk, end, TILE):
        is_in = start + columns < end
        base = tl.load(source + row.to(tl.int64) * source_stride + start + columns, mask=is_in, other=0.0)
        moved = base.to(tl.float32)
        if is_moved:
            moved += scale * _change(basis, size_V, entry, first + COEFFICIENTS, count, start + columns, is_in)
            if of_added > 0:
                moved += of_added * _change(basis, size_V, entry, added + COEFFICIENTS, count, start + columns, is_in)
        tl.store(logits + row.to(tl.int64) * size_V + start + columns, moved, mask=is_in)


@triton.jit
def _tell(
    report, entry, first, added, numbers_3U, num_units, scale, of_added, ratio, divergence, held, is_lost,
    TOLERANCE: tl.constexpr, BY_GATE: tl.constexpr, BY_LEVEL: tl.constexpr,
):  # fmt: skip
    """As `GroupStats.numbers_RN` has it. `held` is what a budget or the like held the row by, 0 for nothing."""
    slots = tl.arange(0, SLOTS)
    count = tl.load(entry + COUNT).to(tl.int32)
    is_used = slots < count
    places = tl.load(entry + PLACES + slots).to(tl.int32)
    mean = tl.load(numbers_3U + REWARD_MEAN * num_units + places)
    reward_scale = tl.load(numbers_3U + REWARD_SCALE * num_units + places)
    before = tl.load(first + UNITS + slots)
    climb = scale * tl.load(first + CLIMB + slots) + of_added * tl.load(added + CLIMB + slots)
    after = tl.where(ratio > 0, before + climb, before)
    kind = tl.load(entry + KIND)
    levels = (tl.load(entry + LEVELS + slots) - mean) / reward_scale
    is_levelled = tl.load(entry + MARKED + slots) * tl.where(kind >= TARGET, 1.0, 0.0) > 0
    is_at_level = tl.max((is_levelled & (tl.abs(after - levels) <= TOLERANCE)).to(tl.int32), axis=0) > 0
    held = tl.where((held == 0.0) & is_at_level, BY_LEVEL + kind - TARGET, held)
    is_open = tl.load(first + IS_OPEN)
    held = tl.where((tl.load(entry + IS_GATED) > 0) & (is_open == 0), BY_GATE, held)
    known = tl.load(entry + HELD)
    held = tl.where(known == 0.0, held, known)
    tl.store(report + slots, mean + reward_scale * before, mask=is_used)
    tl.store(report + count + slots, mean + reward_scale * after, mask=is_used)
    rest = report + 2 * count
    # No shift, no divergence: what is left of it would be rounding.
    tl.store(rest, tl.where(tl.load(first + RATIO) + ratio > 0, divergence, 0.0))
    tl.store(rest + 1, ratio)
    tl.store(rest + 2, held)
    tl.store(rest + 3, tl.where(is_lost, 1.0, 0.0))
    tl.store(rest + 4, is_open)
