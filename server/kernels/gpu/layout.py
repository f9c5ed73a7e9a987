"""Where a number lies in the tables that the kernels of a GPU's edit share: one row of each for every edited row.

Plain numbers, so that whoever fills a table or lays out buffers needs no Triton. All entries are float32; whole numbers
among them are far below 2^24. Knows nothing of tensors.
"""

from __future__ import annotations

SLOTS = 16
"""The most units that a row's heads have together: first the value of each of the `COUNT` heads, then the features of
those that are fields. What is of heads lies in the first entries of as many."""

ROW, COUNT, KIND, SIZE, MAX_SHIFT, LIMIT, KL_HELD, HELD = range(8)
"""Place in the step; heads; kind of objective; length of the ascent's step; budgets of the shift and of the divergence,
the latter less what rounding may hide; the reason that is reported where it holds; one that is known beforehand."""
GATE_SLOT, GATE_LEVEL, GATE_SIDE, GATE_BAND, IS_GATED, WAS_OPEN = range(8, 14)
LOWEST, HIGHEST, EARNS, NUM_UNITS, BESIDE = range(14, 19)
"""Bounds on what is added to the weight of a head with a level; whether steps are weighed by what ascents earn; units
of all heads; the place of another row of the table, -1 for none: of the callers' control that is added to a pinned one,
or the other way round."""
PLACES, LEADERS, WEIGHTS, LEVELS, MARKED, EARNED = range(20, 20 + 6 * SLOTS, SLOTS)
"""Places of units in the bank; the entry of the head that each is of; weights; levels in reward units; heads that a
worst case is of, or that have a level; what each head's own ascent of length one earns. Of callers' control over a
pinned one, weights are those of the callers' heads, marks the signs of the pinned weights, and levels the bounds of the
pinned guardrail, minus infinity where there is none."""
ROW_WIDTH = 20 + 6 * SLOTS

COEFFICIENTS, UNITS, CLIMB = range(0, 3 * SLOTS, SLOTS)
"""What the units' ascent rows are taken times, units before, and what the ascent adds to those that are values."""
RATIO, IS_NONFINITE, IS_CAPPED, IS_OPEN, ALONG, ASIDE = range(3 * SLOTS, 3 * SLOTS + 6)
"""Length of the shift relative to the state; flags; of a shift that is added to a pinned one, how many times that one
it goes along it, and the length of what goes aside, relative to the state too."""
STATE_WIDTH = 3 * SLOTS + 6

BIAS, REWARD_MEAN, REWARD_SCALE = range(3)
"""Rows of a bank's numbers [3, U]."""

WEIGHTED_SUM, WORST_CASE, TARGET, FLOOR = range(4)
"""Kinds of objectives."""

MEASURED_SCALES, PROBED_SCALES, NUM_ROUNDS, MAX_SPLITS = 8, 16, 2, 64
"""Scales of a measurement, scales of a round of probes, rounds, and the most parts of a row's vocabulary."""
MEASURED_WIDTH, PROBED_WIDTH = 2 * MEASURED_SCALES + 6, 3 * PROBED_SCALES
"""What a part leaves of each."""
WEIGHED_POINTS, SOUGHT_POINTS, NUM_WEIGHED, NUM_SOUGHT = 4, 32, 3, 2
"""Distributions that a round compares where a change is added to a pinned one, or seeks its scale; rounds of both."""
NUM_NOTED = 6
"""What a part leaves of each such distribution, and one number for all."""
WEIGHED_WIDTH, SOUGHT_WIDTH = NUM_NOTED * WEIGHED_POINTS + 1, NUM_NOTED * SOUGHT_POINTS + 1

NUM_REPORTED = 5
"""Beside a row's values before and after: divergence, length of the shift relative to the state, what held it, whether
it was not finite, whether its gate was open."""
