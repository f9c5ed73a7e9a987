# type: ignore  (Triton compiles this language; it is not run as Python)
"""How far rows may go along their changes on a GPU, as Triton kernels: divergences over the vocabulary, and the scale.

The logits of a row move along a change d, the rows of a basis taken so many times. The divergence KL(s) of such a move
is that of server/control/budget.py, which explains it; here it is evaluated for several scales s in one pass:

    measure   KL at 8 scales, halves of each other from the whole edit on, and its curvature at zero
    probe     twice: KL at 16 scales near the one at which it meets the limit, by a curve through what is known by then
    settle    the largest scale of all these whose KL is within the limit, and that KL, for whoever moves rows himself

So what is done is the same whatever the numbers are, and no launch waits for the host to read one. A row's vocabulary
is split over programs, so that few rows fill the device too; each program puts its sums into a table, and whoever needs
them adds a row's together. move_kernel.py makes the move, and beside_kernels.py adds another change to one that has
been found here. Knows nothing of heads beyond the rows of their units. Called by edit.py.

Shapes: R edited rows, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from server.kernels.gpu import layout

ROW, LIMIT = tl.constexpr(layout.ROW), tl.constexpr(layout.LIMIT)
PLACES, NUM_UNITS = tl.constexpr(layout.PLACES), tl.constexpr(layout.NUM_UNITS)
ROW_WIDTH, STATE_WIDTH = tl.constexpr(layout.ROW_WIDTH), tl.constexpr(layout.STATE_WIDTH)
COEFFICIENTS = tl.constexpr(layout.COEFFICIENTS)

SCALES, POINTS = tl.constexpr(layout.MEASURED_SCALES), tl.constexpr(layout.PROBED_SCALES)
SPLITS, ROUNDS = tl.constexpr(layout.MAX_SPLITS), tl.constexpr(layout.NUM_ROUNDS)
MEASURED, PROBED = tl.constexpr(layout.MEASURED_WIDTH), tl.constexpr(layout.PROBED_WIDTH)
TOTAL, WEIGHTED = tl.constexpr(0), tl.constexpr(layout.MEASURED_SCALES)
MASS, FIRST, SECOND, TOP, PEAK, CHECK = (tl.constexpr(2 * layout.MEASURED_SCALES + i) for i in range(6))
INFINITY = tl.constexpr(float("inf"))
# Of sums of exponentials, relative to those of the base: what is less says nothing.
LEAST_TOTAL = tl.constexpr(1e-30)
# Of a bracket, what a guess keeps away from its ends.
MARGIN = tl.constexpr(1e-6)


@triton.jit(do_not_specialize=["num_splits"])
def measure(logits, logits_stride, size_V, basis, table, state, measured, num_splits, chunk, TILE: tl.constexpr):
    """Program (r, split): its part of the vocabulary into the row r, split of `measured` [R, splits, MEASURED]."""
    place, split = tl.program_id(0), tl.program_id(1)
    entry, coefficients = table + place * ROW_WIDTH, state + place * STATE_WIDTH + COEFFICIENTS
    row = logits + tl.load(entry + ROW).to(tl.int64) * logits_stride
    count = tl.load(entry + NUM_UNITS).to(tl.int32)
    begin = split * chunk
    end = tl.minimum(begin + chunk, size_V)
    columns = tl.arange(0, TILE)

    tops = tl.full([TILE], -INFINITY, tl.float32)
    peaks = tl.full([TILE], -INFINITY, tl.float32)
    for start in range(begin, end, TILE):
        is_in = start + columns < end
        tops = tl.maximum(tops, tl.load(row + start + columns, mask=is_in, other=-INFINITY).to(tl.float32))
        change = _change(basis, size_V, entry, coefficients, count, start + columns, is_in)
        peaks = tl.maximum(peaks, tl.where(is_in, change, -INFINITY))
    top, peak = tl.max(tops, axis=0), tl.max(peaks, axis=0)
    # Of a part without any finite logit nothing is left but zeros.
    lowered_by = tl.where(top > -INFINITY, top, 0.0)

    scales = _measured_scales()
    totals = tl.zeros([SCALES, TILE], tl.float32)
    weighted = tl.zeros([SCALES, TILE], tl.float32)
    mass, first = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    second, check = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(begin, end, TILE):
        is_in = start + columns < end
        base = tl.load(row + start + columns, mask=is_in, other=-INFINITY).to(tl.float32)
        change = _change(basis, size_V, entry, coefficients, count, start + columns, is_in)
        below = tl.where(is_in, change - peak, 0.0)
        weight = tl.exp(base - lowered_by)
        tilted = weight[None, :] * tl.exp(scales[:, None] * below[None, :])
        totals += tilted
        weighted += tilted * below[None, :]
        mass += weight
        first += weight * below
        second += weight * below * below
        check += change
    out = measured + (place * num_splits + split) * MEASURED
    points = tl.arange(0, SCALES)
    tl.store(out + TOTAL + points, tl.sum(totals, axis=1))
    tl.store(out + WEIGHTED + points, tl.sum(weighted, axis=1))
    tl.store(out + MASS, tl.sum(mass, axis=0))
    tl.store(out + FIRST, tl.sum(first, axis=0))
    tl.store(out + SECOND, tl.sum(second, axis=0))
    tl.store(out + TOP, top)
    tl.store(out + PEAK, peak)
    tl.store(out + CHECK, tl.sum(check, axis=0))


@triton.jit(do_not_specialize=["num_splits"])
def probe(
    logits, logits_stride, size_V, basis, table, state, measured, aims, probed, num_splits, chunk, ROUND: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (r, split): likewise, for the scales that `aims` [2, POINTS] ask for, into the part of this round, 0 or
    1, of `probed` [R, ROUNDS, splits, PROBED].

    An aim is a share of the limit, or, where it is 0, a place between the scales that the limit is known to be between.
    """
    place, split = tl.program_id(0), tl.program_id(1)
    entry, coefficients = table + place * ROW_WIDTH, state + place * STATE_WIDTH + COEFFICIENTS
    row = logits + tl.load(entry + ROW).to(tl.int64) * logits_stride
    count = tl.load(entry + NUM_UNITS).to(tl.int32)
    points = tl.arange(0, POINTS)
    divergences, slope, mass, top, peak, _ = _sum_measured(measured + place * num_splits * MEASURED, num_splits)
    limit = tl.load(entry + LIMIT)
    low, low_kl, high, high_kl = _between(_measured_scales(), divergences, limit, 0.0, 0.0, 1.0, INFINITY)
    if ROUND > 0:
        known, known_kl = _sum_probed(probed + place * ROUNDS * num_splits * PROBED, num_splits, mass)
        low, low_kl, high, high_kl = _between(known, known_kl, limit, low, low_kl, high, high_kl)
    wanted = tl.sqrt(tl.maximum(tl.load(aims + points) * limit, 0.0))
    scales = _near(low, tl.sqrt(low_kl), high, tl.sqrt(high_kl), slope, wanted, tl.load(aims + POINTS + points))

    begin = split * chunk
    end = tl.minimum(begin + chunk, size_V)
    columns = tl.arange(0, TILE)
    totals = tl.zeros([POINTS, TILE], tl.float32)
    weighted = tl.zeros([POINTS, TILE], tl.float32)
    for start in range(begin, end, TILE):
        is_in = start + columns < end
        base = tl.load(row + start + columns, mask=is_in, other=-INFINITY).to(tl.float32)
        change = _change(basis, size_V, entry, coefficients, count, start + columns, is_in)
        below = tl.where(is_in, change - peak, 0.0)
        tilted = tl.exp(base - top)[None, :] * tl.exp(scales[:, None] * below[None, :])
        totals += tilted
        weighted += tilted * below[None, :]
    out = probed + ((place * ROUNDS + ROUND) * num_splits + split) * PROBED
    tl.store(out + points, scales)
    tl.store(out + POINTS + points, tl.sum(totals, axis=1))
    tl.store(out + 2 * POINTS + points, tl.sum(weighted, axis=1))


@triton.jit(do_not_specialize=["num_splits"])
def settle(table, measured, probed, scale_R, divergence_R, num_splits):
    """Program r: the largest scale that was found to be within the row's limit, and its divergence."""
    place = tl.program_id(0)
    limit = tl.load(table + place * ROW_WIDTH + LIMIT)
    scale, divergence, _ = _largest(measured, probed, place, num_splits, limit)
    tl.store(scale_R + place, scale)
    tl.store(divergence_R + place, divergence)


@triton.jit
def _change(basis, size_V, entry, coefficients, count, columns, is_in):
    """How much the logits of these columns change by the whole edit."""
    change = tl.zeros_like(columns).to(tl.float32)
    for slot in range(count):
        row = basis + tl.load(entry + PLACES + slot).to(tl.int64) * size_V
        change += tl.load(coefficients + slot) * tl.load(row + columns, mask=is_in, other=0.0)
    return change


@triton.jit
def _measured_scales():
    """1, 1/2, 1/4, ..., exactly: the floats with these exponents."""
    return ((127 - tl.arange(0, SCALES)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _divergence(scales, total, weighted, mass):
    """KL at these scales; infinite where the sums are too small to tell it, and not a number where they are none."""
    remaining = total / mass
    divergence = scales * weighted / total - tl.log(remaining)
    # Comparisons with what is not a number are false, so that stays, and a maximum might not keep it.
    told = tl.where(divergence <= 0, 0.0, divergence)
    return tl.where(remaining <= LEAST_TOTAL, INFINITY, told)


@triton.jit
def _sum_measured(parts, num_splits):
    """Of a row: its divergences at the measured scales, slope of their root at zero, sum of exponentials, largest
    logit, largest change, and whether all changes are finite. A part's sums are relative to its own largest ones."""
    splits = tl.arange(0, SPLITS)
    is_there = splits < num_splits
    part = parts + splits * MEASURED
    tops = tl.load(part + TOP, mask=is_there, other=-INFINITY)
    peaks = tl.load(part + PEAK, mask=is_there, other=-INFINITY)
    top, peak = tl.max(tops, axis=0), tl.max(peaks, axis=0)
    has_any = is_there & (tops > -INFINITY)
    factor = tl.where(has_any, tl.exp(tops - top), 0.0)
    offset = tl.where(has_any, peaks - peak, 0.0)
    masses = factor * tl.load(part + MASS, mask=is_there, other=0.0)
    firsts = factor * tl.load(part + FIRST, mask=is_there, other=0.0)
    seconds = factor * tl.load(part + SECOND, mask=is_there, other=0.0)
    mass = tl.sum(masses, axis=0)
    first = tl.sum(firsts + offset * masses, axis=0) / mass
    second = tl.sum(seconds + 2.0 * offset * firsts + offset * offset * masses, axis=0) / mass
    slope = tl.sqrt(tl.maximum(0.5 * (second - first * first), 0.0))

    scales = _measured_scales()
    points = part[:, None] + tl.arange(0, SCALES)[None, :]
    totals = tl.load(points + TOTAL, mask=is_there[:, None], other=0.0)
    weighted = tl.load(points + WEIGHTED, mask=is_there[:, None], other=0.0)
    tilt = factor[:, None] * tl.exp(scales[None, :] * offset[:, None])
    total = tl.sum(tilt * totals, axis=0)
    weight = tl.sum(tilt * (weighted + offset[:, None] * totals), axis=0)
    check = tl.sum(tl.load(part + CHECK, mask=is_there, other=0.0), axis=0)
    return _divergence(scales, total, weight, mass), slope, mass, top, peak, tl.abs(check) < INFINITY


@triton.jit
def _sum_probed(parts, num_splits, mass):
    """A round's scales of a row, and the divergences there."""
    splits, points = tl.arange(0, SPLITS), tl.arange(0, POINTS)
    is_there = (splits < num_splits)[:, None]
    each = parts + splits[:, None] * PROBED + points[None, :]
    scales = tl.load(parts + points)
    total = tl.sum(tl.load(each + POINTS, mask=is_there, other=0.0), axis=0)
    weighted = tl.sum(tl.load(each + 2 * POINTS, mask=is_there, other=0.0), axis=0)
    return scales, _divergence(scales, total, weighted, mass)


@triton.jit
def _between(scales, divergences, limit, low, low_kl, high, high_kl):
    """The scales that the limit lies between, and their divergences, given those known so far and new ones."""
    is_inside = divergences <= limit
    inside = tl.max(tl.where(is_inside, scales, low), axis=0)
    at_inside = tl.max(tl.where(is_inside & (scales == inside), divergences, 0.0), axis=0)
    low, low_kl = inside, tl.where(inside > low, at_inside, low_kl)
    beyond = tl.min(tl.where((is_inside == 0) & (scales > low), scales, high), axis=0)
    at_beyond = tl.max(tl.where(scales == beyond, divergences, 0.0), axis=0)
    is_new = tl.max(tl.where((is_inside == 0) & (scales == beyond), 1, 0), axis=0) > 0
    return low, low_kl, beyond, tl.where(is_new, at_beyond, high_kl)


@triton.jit
def _near(low, low_root, high, high_root, slope, wanted, places):
    """Scales at which the root of the divergence should be as wanted.

    It follows s / (a + b s) between the two scales, of which the lower may be zero, where the slope is known: a
    straight line, or one that levels off. Where this leads nowhere, it is taken for straight.
    """
    low_inverse = tl.where(low > 0, low / low_root, 1.0 / slope)
    steepness = (high / high_root - low_inverse) / (high - low)
    curved = wanted * (low_inverse - steepness * low) / (1.0 - steepness * wanted)
    share = (curved - low) / (high - low)
    straight = tl.where(high_root < INFINITY, (wanted - low_root) / (high_root - low_root), 0.5)
    share = tl.where((tl.abs(share) < INFINITY) & (steepness * wanted < 1.0), share, straight)
    share = tl.where((wanted > 0) & (tl.abs(share) < INFINITY), share, places)
    share = tl.minimum(tl.maximum(share, MARGIN), 1.0 - MARGIN)
    return low + share * (high - low)


@triton.jit
def _largest(measured, probed, place, num_splits, limit):
    """The largest scale of those evaluated that is within the limit, 0 if none is, its divergence, and whether all
    changes are finite."""
    divergences, _, mass, _, _, is_finite = _sum_measured(measured + place * num_splits * MEASURED, num_splits)
    low, low_kl, high, high_kl = _between(_measured_scales(), divergences, limit, 0.0, 0.0, 1.0, INFINITY)
    for round_place in range(ROUNDS):
        parts = probed + (place * ROUNDS + round_place) * num_splits * PROBED
        scales, probed_kl = _sum_probed(parts, num_splits, mass)
        low, low_kl, high, high_kl = _between(scales, probed_kl, limit, low, low_kl, high, high_kl)
    return tl.where(is_finite, low, 0.0), tl.where(is_finite, low_kl, 0.0), is_finite
