# type: ignore  (Triton compiles this language; it is not run as Python)
"""A callers' change of logits added to a pinned one on a GPU, as Triton kernels: see pinned.py of server/control.

The pinned change m of a row's logits is as its own budget left it (budget_kernels.py). The callers' change d comes
beside it as base + m + t (room (d + more m)), and is found like this:

    weigh   three times: how likely the tokens are that m raises, under base, base + m, and base + (1 + more) m + d, by
            which `more` grows so that m takes no loss; the cap on the shift then says how much room there is
    seek    twice: KL from the base at 31 scales t, the second time near the one at which it meets the limit

and `joined` says for move_kernel.py how much of both is taken in the end. Every program sums its part of a row's
vocabulary, as in budget_kernels.py. The logits may be under a soft cap here: there `seek_alone`, likewise twice, stands
in place of that file's kernels, which need logits that are linear along a change. Called by edit.py.

Shapes: Q rows over pinned control, whose entries of the table come after those of all edited rows; V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from server.kernels.gpu import layout
from server.kernels.gpu.budget_kernels import _between, _change, _largest, _near

SLOTS, ROW, LIMIT = tl.constexpr(layout.SLOTS), tl.constexpr(layout.ROW), tl.constexpr(layout.LIMIT)
MAX_SHIFT, NUM_UNITS = tl.constexpr(layout.MAX_SHIFT), tl.constexpr(layout.NUM_UNITS)
COUNT, PLACES, BESIDE = tl.constexpr(layout.COUNT), tl.constexpr(layout.PLACES), tl.constexpr(layout.BESIDE)
LEVELS, MARKED = tl.constexpr(layout.LEVELS), tl.constexpr(layout.MARKED)
ROW_WIDTH, STATE_WIDTH = tl.constexpr(layout.ROW_WIDTH), tl.constexpr(layout.STATE_WIDTH)
COEFFICIENTS, UNITS, CLIMB = (tl.constexpr(place) for place in (layout.COEFFICIENTS, layout.UNITS, layout.CLIMB))
RATIO, IS_NONFINITE = tl.constexpr(layout.RATIO), tl.constexpr(layout.IS_NONFINITE)
ALONG, ASIDE = tl.constexpr(layout.ALONG), tl.constexpr(layout.ASIDE)
REWARD_MEAN, REWARD_SCALE = tl.constexpr(layout.REWARD_MEAN), tl.constexpr(layout.REWARD_SCALE)

SPLITS, NOTED = tl.constexpr(layout.MAX_SPLITS), tl.constexpr(layout.NUM_NOTED)
WEIGHED_POINTS, SOUGHT_POINTS = tl.constexpr(layout.WEIGHED_POINTS), tl.constexpr(layout.SOUGHT_POINTS)
NUM_WEIGHED, NUM_SOUGHT = tl.constexpr(layout.NUM_WEIGHED), tl.constexpr(layout.NUM_SOUGHT)
WEIGHED, SOUGHT = tl.constexpr(layout.WEIGHED_WIDTH), tl.constexpr(layout.SOUGHT_WIDTH)
# Places among a round's distributions while `more` is found.
BASE, ALONE, TOGETHER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
INFINITY = tl.constexpr(float("inf"))
LEAST_GAIN = tl.constexpr(1e-9)
# Of the ground that the pinned change gains, what is too little to matter.
LOST_SHARE = tl.constexpr(0.02)


@triton.jit(do_not_specialize=["num_first", "first_splits", "num_splits"])
def weigh(
    logits, logits_stride, size_V, basis, table, state, width, height, num_first, measured, probed, first_splits,
    weighed, num_splits, chunk, HAS_CAP: tl.constexpr, ROUND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (q, split): its part of the vocabulary into the part of this round of `weighed` [Q, NUM_WEIGHED, splits,
    WEIGHED]. `num_first` entries of the table come before those of callers."""
    place, split = tl.program_id(0), tl.program_id(1)
    entry = table + (num_first + place) * ROW_WIDTH
    alone = tl.load(entry + BESIDE).to(tl.int32)
    allowed = tl.load(table + alone * ROW_WIDTH + LIMIT)
    scale, _, _ = found_alone(measured, probed, alone, first_splits, allowed, HAS_CAP)
    parts = weighed + place * NUM_WEIGHED * num_splits * WEIGHED
    more = _more(parts, num_splits, ROUND)
    points = tl.arange(0, WEIGHED_POINTS)
    of_first = tl.where(points == BASE, 0.0, tl.where(points == TOGETHER, 1.0 + more, 1.0))
    of_second = tl.where(points == TOGETHER, 1.0, 0.0)
    _look(
        logits + tl.load(entry + ROW).to(tl.int64) * logits_stride, basis, size_V, entry, state + alone * STATE_WIDTH,
        state + (num_first + place) * STATE_WIDTH, scale, of_first, of_second, of_second, split * chunk,
        tl.minimum((split + 1) * chunk, size_V), parts + (ROUND * num_splits + split) * WEIGHED,
        width, height, HAS_CAP, WEIGHED_POINTS, TILE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_first", "first_splits", "num_splits"])
def seek(
    logits, logits_stride, size_V, basis, table, state, width, height, num_first, measured, probed, first_splits,
    weighed, scales_3P, sought, num_splits, chunk, HAS_CAP: tl.constexpr, ROUND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (q, split): likewise into `sought` [Q, NUM_SOUGHT, splits, SOUGHT].

    `scales_3P` holds the scales of the first round, and of the second aims and places as `probe` takes them; the first
    of each is the base's, and 0.
    """
    place, split = tl.program_id(0), tl.program_id(1)
    entry, added = table + (num_first + place) * ROW_WIDTH, state + (num_first + place) * STATE_WIDTH
    alone = tl.load(entry + BESIDE).to(tl.int32)
    limit = tl.load(entry + LIMIT)
    allowed = tl.load(table + alone * ROW_WIDTH + LIMIT)
    scale, alone_kl, _ = found_alone(measured, probed, alone, first_splits, allowed, HAS_CAP)
    more = _more(weighed + place * NUM_WEIGHED * num_splits * WEIGHED, num_splits, NUM_WEIGHED)
    room = _room(entry, state + alone * STATE_WIDTH, added, scale, more)
    parts = sought + place * NUM_SOUGHT * num_splits * SOUGHT
    points = tl.arange(0, SOUGHT_POINTS)
    scales = _tried(parts, num_splits, limit, alone_kl, scales_3P, ROUND)
    _look(
        logits + tl.load(entry + ROW).to(tl.int64) * logits_stride, basis, size_V, entry, state + alone * STATE_WIDTH,
        added, scale, tl.where(points == BASE, 0.0, 1.0 + scales * room * more), scales * room, scales, split * chunk,
        tl.minimum((split + 1) * chunk, size_V), parts + (ROUND * num_splits + split) * SOUGHT,
        width, height, HAS_CAP, SOUGHT_POINTS, TILE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_splits"])
def seek_alone(
    logits, logits_stride, size_V, basis, table, state, width, height, scales_3P, sought, num_splits, chunk,
    HAS_CAP: tl.constexpr, ROUND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (r, split): likewise for row r's own change, into `sought` [R, NUM_SOUGHT, splits, SOUGHT]."""
    place, split = tl.program_id(0), tl.program_id(1)
    entry, own = table + place * ROW_WIDTH, state + place * STATE_WIDTH
    parts = sought + place * NUM_SOUGHT * num_splits * SOUGHT
    none = tl.full([], 0.0, tl.float32)
    scales = _tried(parts, num_splits, tl.load(entry + LIMIT), none, scales_3P, ROUND)
    _look(
        logits + tl.load(entry + ROW).to(tl.int64) * logits_stride, basis, size_V, entry, own, own, none,
        scales, scales, scales, split * chunk, tl.minimum((split + 1) * chunk, size_V),
        parts + (ROUND * num_splits + split) * SOUGHT, width, height, HAS_CAP, SOUGHT_POINTS, TILE,
    )  # fmt: skip


@triton.jit
def found_alone(measured, probed, place, num_splits, limit, HAS_CAP: tl.constexpr):
    """A row's own largest scale that is within the limit, its divergence, and whether all changes are finite: by
    `seek_alone`, which left `measured`, where there is a cap, and by `measure` and `probe` otherwise."""
    if HAS_CAP:
        parts = measured + place * NUM_SOUGHT * num_splits * SOUGHT
        none = tl.full([], 0.0, tl.float32)
        scale, divergence, _, _ = _found(parts, num_splits, limit, none, NUM_SOUGHT)
        _, _, _, _, is_finite = _sum_looked(parts, num_splits, SOUGHT, SOUGHT_POINTS)
        scale, divergence = tl.where(is_finite, scale, 0.0), tl.where(is_finite, divergence, 0.0)
    else:
        scale, divergence, is_finite = _largest(measured, probed, place, num_splits, limit)
    return scale, divergence, is_finite


@triton.jit
def joined(
    entry, first, added, scale, alone_kl, is_sound, numbers_3U, num_units, weighed, sought, num_splits,
    TOLERANCE: tl.constexpr,
):  # fmt: skip
    """How much of the pinned change and of the callers' a row takes, its divergence, whether the budget held the
    callers' back, whether it was dropped for taking back what is pinned, and whether it is lost, not being finite.

    `scale`, `alone_kl` and `is_sound` are of the pinned change alone; `weighed` and `sought` begin at the row's parts.
    """
    more = _more(weighed, num_splits, NUM_WEIGHED)
    room = _room(entry, first, added, scale, more)
    taken, taken_kl, _, _ = _found(sought, num_splits, tl.load(entry + LIMIT), alone_kl, NUM_SOUGHT)
    _, _, grounds, _, is_finite = _sum_looked(weighed, num_splits, WEIGHED, WEIGHED_POINTS)
    is_lost = (is_sound == 0) | (tl.load(added + IS_NONFINITE) > 0) | (is_finite == 0)
    is_worse = _takes_back(
        entry, first, added, scale * taken * room * more, taken * room, scale, numbers_3U, num_units, TOLERANCE
    )
    is_worse |= _loses_ground(grounds, _ground_at(sought, num_splits, taken))
    is_dropped = (taken > 0) & is_worse & (is_lost == 0)
    is_short = (taken < 1.0) & (is_dropped == 0) & (is_lost == 0)
    # Nothing of what is not finite.
    is_taken = (taken > 0) & (is_dropped == 0) & (is_lost == 0)
    of_added = tl.where(is_taken, taken * room, 0.0)
    of_first = scale * (1.0 + tl.where(is_taken, of_added * more, 0.0))
    return of_first, of_added, tl.where(is_taken, taken_kl, alone_kl), is_short, is_dropped, is_lost


@triton.jit
def _takes_back(entry, first, added, more_of_first, of_added, scale, numbers_3U, num_units, TOLERANCE: tl.constexpr):
    """See `PinnedRows.takes_back`."""
    slots = tl.arange(0, SLOTS)
    is_used = slots < tl.load(entry + COUNT).to(tl.int32)
    signs, bounds = tl.load(entry + MARKED + slots), tl.load(entry + LEVELS + slots)
    places = tl.load(entry + PLACES + slots).to(tl.int32)
    mean = tl.load(numbers_3U + REWARD_MEAN * num_units + places)
    bounds = (bounds - mean) / tl.load(numbers_3U + REWARD_SCALE * num_units + places)
    climb = tl.load(first + CLIMB + slots)
    alone = tl.load(first + UNITS + slots) + scale * climb
    change = more_of_first * climb + of_added * tl.load(added + CLIMB + slots)
    is_back = signs * change < -TOLERANCE
    is_lifted = (alone < bounds) & (alone + change >= bounds)
    return tl.max((is_used & (is_back | is_lifted)).to(tl.int32), axis=0) > 0


@triton.jit
def _loses_ground(grounds, together):
    """See `loses_ground` of pinned.py."""
    points = tl.arange(0, WEIGHED_POINTS)
    none, alone = _at(grounds, points, BASE), _at(grounds, points, ALONE)
    return alone - together > LOST_SHARE * tl.abs(alone - none)


@triton.jit
def shift_ratio(first, added, of_first, of_added):
    """The length of so much of both shifts together, relative to the state."""
    along = tl.load(first + RATIO) * (of_first + of_added * tl.load(added + ALONG))
    aside = of_added * tl.load(added + ASIDE)
    return tl.sqrt(along * along + aside * aside)


@triton.jit
def _room(entry, first, added, scale, more):
    """See `room_beside`: the share that the cap on the shift leaves room for."""
    ratio = shift_ratio(first, added, scale * more, 1.0)
    left = tl.maximum(tl.load(entry + MAX_SHIFT) - scale * tl.load(first + RATIO), 0.0)
    return tl.where(ratio > left, left / ratio, 1.0)


@triton.jit
def _more(weighed, num_splits, NUM: tl.constexpr):
    """See `pinned_share`, after so many rounds."""
    points = tl.arange(0, WEIGHED_POINTS)
    more = tl.full([], 0.0, tl.float32)
    for number in tl.static_range(NUM):
        parts = weighed + number * num_splits * WEIGHED
        _, _, grounds, squares, _ = _sum_looked(parts, num_splits, WEIGHED, WEIGHED_POINTS)
        alone = _at(grounds, points, ALONE)
        variance = _at(squares, points, ALONE) - alone * alone
        lacking = tl.where(variance > LEAST_GAIN, (alone - _at(grounds, points, TOGETHER)) / variance, 0.0)
        more = tl.maximum(more + lacking, 0.0)
    return more


@triton.jit
def _found(sought, num_splits, limit, alone_kl, NUM: tl.constexpr):
    """The scales that the limit lies between after so many rounds, and their divergences."""
    low, low_kl = tl.full([], 0.0, tl.float32), alone_kl
    high, high_kl = tl.full([], 1.0, tl.float32), tl.full([], INFINITY, tl.float32)
    for number in tl.static_range(NUM):
        parts = sought + number * num_splits * SOUGHT
        scales, divergences, _, _, _ = _sum_looked(parts, num_splits, SOUGHT, SOUGHT_POINTS)
        low, low_kl, high, high_kl = _between(scales, divergences, limit, low, low_kl, high, high_kl)
    return low, low_kl, high, high_kl


@triton.jit
def _tried(sought, num_splits, limit, alone_kl, scales_3P, ROUND: tl.constexpr):
    """The scales of a round: given ones, and then those near which the divergence should meet the limit."""
    points = tl.arange(0, SOUGHT_POINTS)
    scales = tl.load(scales_3P + points)
    if ROUND > 0:
        low, low_kl, high, high_kl = _found(sought, num_splits, limit, alone_kl, ROUND)
        wanted = tl.sqrt(tl.maximum(tl.load(scales_3P + SOUGHT_POINTS + points) * limit, 0.0))
        places = tl.load(scales_3P + 2 * SOUGHT_POINTS + points)
        # The slope of the divergence's root is not known at 0.
        slope = tl.full([], 0.0, tl.float32)
        scales = _near(low, tl.sqrt(low_kl), high, tl.sqrt(high_kl), slope, wanted, places)
        scales = tl.where(points == BASE, 0.0, scales)
    return scales


@triton.jit
def _ground_at(sought, num_splits, taken):
    """The mean of the pinned change at a scale that was evaluated."""
    ground = tl.full([], -INFINITY, tl.float32)
    for number in tl.static_range(NUM_SOUGHT):
        parts = sought + number * num_splits * SOUGHT
        scales, _, grounds, _, _ = _sum_looked(parts, num_splits, SOUGHT, SOUGHT_POINTS)
        ground = tl.maximum(ground, tl.max(tl.where(scales == taken, grounds, -INFINITY), axis=0))
    return ground


@triton.jit
def _look(
    row, basis, size_V, entry, first, second, scale, of_first, of_second, noted, begin, end, out, width, height,
    HAS_CAP: tl.constexpr, POINTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of a part of a row's vocabulary under base + of_first m + of_second d, for POINTS pairs of factors, the first of
    which is the base, and under the cap, if there is one: the largest logit, and relative to it the sums of
    exponentials, of what logits moved by, of m and of its square; and the sum of d, to tell whether it is finite.
    `noted` is kept beside them."""
    count = tl.load(entry + NUM_UNITS).to(tl.int32)
    columns, points = tl.arange(0, TILE), tl.arange(0, POINTS)
    tops = tl.full([POINTS, TILE], -INFINITY, tl.float32)
    for start in range(begin, end, TILE):
        is_in = start + columns < end
        _, _, _, _, logits = _moved_tile(
            row, basis, size_V, entry, first, second, scale, of_first, of_second, count, start + columns, is_in,
            width, height, HAS_CAP,
        )  # fmt: skip
        tops = tl.maximum(tops, tl.where(is_in[None, :], logits, -INFINITY))
    top = tl.max(tops, axis=1)
    # Of a part without any finite logit nothing is left but zeros.
    lowered_by = tl.where(top > -INFINITY, top, 0.0)
    gained = lowered_by - _at(lowered_by, points, BASE)

    totals = tl.zeros([POINTS, TILE], tl.float32)
    moved = tl.zeros([POINTS, TILE], tl.float32)
    grounds = tl.zeros([POINTS, TILE], tl.float32)
    squares = tl.zeros([POINTS, TILE], tl.float32)
    check = tl.zeros([TILE], tl.float32)
    for start in range(begin, end, TILE):
        is_in = start + columns < end
        base, pinned, change, moves, logits = _moved_tile(
            row, basis, size_V, entry, first, second, scale, of_first, of_second, count, start + columns, is_in,
            width, height, HAS_CAP,
        )  # fmt: skip
        weight = tl.where(is_in[None, :], tl.exp(logits - lowered_by[:, None]), 0.0)
        if HAS_CAP:
            moves = logits - _capped(base, width, height, HAS_CAP)[None, :]
        totals += weight
        moved += weight * (moves - gained[:, None])
        grounds += weight * pinned[None, :]
        if POINTS == WEIGHED_POINTS:
            squares += weight * (pinned * pinned)[None, :]
        check += change
    tl.store(out + points, noted)
    tl.store(out + POINTS + points, top)
    tl.store(out + 2 * POINTS + points, tl.sum(totals, axis=1))
    tl.store(out + 3 * POINTS + points, tl.sum(moved, axis=1))
    tl.store(out + 4 * POINTS + points, tl.sum(grounds, axis=1))
    tl.store(out + 5 * POINTS + points, tl.sum(squares, axis=1))
    tl.store(out + NOTED * POINTS, tl.sum(check, axis=0))


@triton.jit
def _moved_tile(
    row, basis, size_V, entry, first, second, scale, of_first, of_second, count, columns, is_in, width, height,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Of these columns the base, m and d, how far each pair of factors moves the base, and the logits there."""
    base = tl.load(row + columns, mask=is_in, other=-INFINITY).to(tl.float32)
    pinned = scale * _change(basis, size_V, entry, first + COEFFICIENTS, count, columns, is_in)
    change = _change(basis, size_V, entry, second + COEFFICIENTS, count, columns, is_in)
    moves = of_first[:, None] * pinned[None, :] + of_second[:, None] * change[None, :]
    return base, pinned, change, moves, _capped(base[None, :] + moves, width, height, HAS_CAP)


@triton.jit
def _capped(logits, width, height, HAS_CAP: tl.constexpr):
    """What `finish` makes of them: height x tanh(logit / width), if there is a cap."""
    if HAS_CAP:
        logits = height * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / width)))
    return logits


@triton.jit
def _sum_looked(parts, num_splits, WIDTH: tl.constexpr, POINTS: tl.constexpr):
    """Of a row's round: what was noted of each distribution, its divergence from the base, the mean of the pinned
    change and of its square, and whether the callers' change is finite."""
    splits, points = tl.arange(0, SPLITS), tl.arange(0, POINTS)
    is_there = splits < num_splits
    each, is_one = parts + splits[:, None] * WIDTH + points[None, :], is_there[:, None]
    tops = tl.load(each + POINTS, mask=is_one, other=-INFINITY)
    base_tops = tl.load(parts + splits * WIDTH + POINTS, mask=is_there, other=-INFINITY)
    top, base_top = tl.max(tops, axis=0), tl.max(base_tops, axis=0)
    has_any = is_one & (tops > -INFINITY)
    factor = tl.where(has_any, tl.exp(tops - top[None, :]), 0.0)
    # A part's moves are relative to what its own largest logit gained.
    offset = tl.where(has_any, (tops - base_tops[:, None]) - (top - base_top)[None, :], 0.0)
    totals = factor * tl.load(each + 2 * POINTS, mask=is_one, other=0.0)
    moved = factor * tl.load(each + 3 * POINTS, mask=is_one, other=0.0)
    total = tl.sum(totals, axis=0)
    grounds = tl.sum(factor * tl.load(each + 4 * POINTS, mask=is_one, other=0.0), axis=0) / total
    squares = tl.sum(factor * tl.load(each + 5 * POINTS, mask=is_one, other=0.0), axis=0) / total
    divergence = tl.sum(moved + offset * totals, axis=0) / total - tl.log(total / _at(total, points, BASE))
    # Comparisons with what is not a number are false, so that stays, and a maximum might not keep it.
    divergence = tl.where(divergence <= 0, 0.0, divergence)
    check = tl.sum(tl.load(parts + splits * WIDTH + NOTED * POINTS, mask=is_there, other=0.0), axis=0)
    return tl.load(parts + points), divergence, grounds, squares, tl.abs(check) < INFINITY


@triton.jit
def _at(numbers, points, place):
    """The one at a place."""
    return tl.sum(tl.where(points == place, numbers, 0.0), axis=0)
