"""Drawing tokens and searching a budget natively, on every level, against torch's way of doing the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.control.budget import LinearDivergence, largest_scale
from server.engines.embedded import sampler
from server.engines.embedded.sampler import RowSampling, sample
from server.kernels import Kernels, ops


@pytest.fixture(autouse=True)
def level(library: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "native", lambda: library)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 5),
    st.integers(2, 700),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    st.sampled_from([0.1, 0.7, 0.95, 1.0]),
    st.sampled_from([0, 1, 5, 300, 10_000]),
    st.sampled_from([0.0, 0.01, 0.3]),
)
def test_tokens_are_those_that_torch_draws(
    rows: int, size: int, seed: int, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=rng) * 3
    how = [RowSampling(temperature, top_p, top_k, (seed, i), min_p) for i in range(rows)]
    # Not at the very ends of tokens' shares, where the last bit of a sum decides.
    uniforms = [sampler.uniform(row.stream, 0) for row in how]
    expected = sampler._sample_by_torch(logits, how, uniforms)
    got = sample(logits, how, [0] * rows)
    for i in range(rows):
        if got[i] != expected[i]:
            nearby = [sampler._sample_by_torch(logits, how, [u * (1 + e) for u in uniforms])[i] for e in (-1e-4, 1e-4)]
            assert got[i] in nearby


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 6.0])
@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.95])
def test_the_nucleus_of_a_large_vocabulary_is_the_one_that_sorting_finds(spread: float, top_p: float) -> None:
    """Where it is large it is found without sorting; ties with its last token stay in."""
    size = 20_000
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(1)) * spread
    weights = (logits[0] - logits.max()).double().exp()
    ordered = weights.sort(descending=True).values
    held = ordered.cumsum(0)
    last = ordered[int((held < top_p * held[-1]).sum())]
    # A weight in float32 may lie on the other side of the edge.
    inside, outside = weights >= last * (1 - 1e-5), weights < last * (1 - 1e-5)
    how = [RowSampling(1.0, top_p, 0, (7, i)) for i in range(400)]
    drawn = sample(logits.expand(400, -1), how, [0] * 400)
    assert not outside[drawn].any()
    # What is drawn reaches to the edge: none of the nucleus has been cut off.
    shares = (weights * inside).cumsum(0) / (weights * inside).sum()
    expected = torch.searchsorted(shares, torch.tensor([sampler.uniform(row.stream, 0) for row in how]).double())
    place = inside.cumsum(0)
    assert (place[drawn] - place[expected]).abs().max() <= 1


def test_rows_that_are_not_finite_draw_nothing_and_their_neighbours_are_as_alone() -> None:
    logits = torch.randn(5, 300)
    logits[1, 7], logits[2, 8], logits[3] = float("nan"), float("inf"), -float("inf")
    how = [RowSampling(1.0, 0.9, 0, (1, i)) for i in range(5)]
    for drawn in (sample(logits, how, [0] * 5), sampler._sample_by_torch(logits, how, [0.3] * 5)):
        assert (drawn[1:4] == -1).all()
        assert (drawn[[0, 4]] >= 0).all()
    assert sample(logits[4:], how[4:], [0])[0] == sample(logits, how, [0] * 5)[4]


def assert_within(base: Tensor, moved: Tensor, kl: Tensor, limit: Tensor) -> None:
    """The divergence is what is said, and within its limit."""
    before, after = base.double().log_softmax(-1), moved.double().log_softmax(-1)
    exact = (after.exp() * (after - before)).sum(-1)
    assert (exact <= limit).all()
    torch.testing.assert_close(kl.double(), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.05, 1.0, 6.0])
def test_the_scale_is_the_one_that_torch_finds_and_the_divergence_is_exact(strength: float) -> None:
    rng = torch.Generator().manual_seed(0)
    base, delta = torch.randn(7, 5000, generator=rng) * 3, torch.randn(7, 5000, generator=rng) * strength
    limit = torch.full((7,), 0.3)
    expected, _ = largest_scale(LinearDivergence(base, delta), limit)
    scale, kl = ops.largest_scales(base, torch.arange(len(base)), delta, limit)
    torch.testing.assert_close(scale, expected, atol=5e-3, rtol=1e-2)
    assert_within(base, base + scale[:, None] * delta, kl, limit)


def test_a_change_that_is_not_finite_is_not_taken() -> None:
    base, delta = torch.randn(3, 100), torch.randn(3, 100)
    delta[0, 5], delta[1, 5] = float("nan"), float("inf")
    scale, _ = ops.largest_scales(base, torch.arange(len(base)), delta, torch.full((3,), 0.3))
    assert scale.tolist()[:2] == [0.0, 0.0]
    assert scale[2] > 0


def shift_of(num_heads: int, strength: float, seed: int, size: int = 5000) -> ops.SharedShift:
    """Of a state of 32 numbers, one for all states; its length is 2."""
    rng = torch.Generator().manual_seed(seed)
    delta = torch.randn(5000, generator=rng)[:size] * strength
    each_unit, each_head = torch.randn(num_heads, 2, generator=rng), torch.randn(num_heads, 3, generator=rng)
    each_head[:, 0] = torch.arange(num_heads)
    numbers = [torch.tensor([2.0, float(delta.max()), 3.0]), each_unit.flatten(), each_head.flatten()]
    numbers.append(torch.randn(num_heads, num_heads, generator=rng).flatten())
    weight = torch.randn(num_heads, 32, generator=rng)
    logits = ops.ShiftLogits(delta, (delta - delta.max()).exp())
    return ops.SharedShift(torch.cat(numbers), weight, num_heads, logits)


def edit(
    hidden: Tensor, logits: Tensor, shifts: list[ops.SharedShift], shift_of: list[int], rows: list[int], cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    count, others = len(rows), sorted(set(range(len(logits))).difference(rows))
    return ops.edit_shared(
        hidden,
        logits,
        torch.tensor([shift.entry() for shift in shifts]),
        torch.tensor(shift_of),
        torch.tensor([*rows, *others]),
        torch.full((count,), cap),
        torch.full((count,), 0.3),
        num_heads=2,
        held_by_kl=4,
        held_by_cap=6,
    )


def following_shift(seed: int) -> ops.SharedShift:
    """Of a state of 32 numbers: one head of three units beside one of a single unit; it follows the state."""
    rng = torch.Generator().manual_seed(seed)
    factors, ascent = torch.tensor([0.5, 0.5, 0.5, -0.3]), torch.randn(4, 32, generator=rng)
    each_unit = torch.stack([torch.randn(4, generator=rng), factors], dim=1)
    each_head = torch.tensor([[0.0, 0.2, 2.0], [3.0, -0.1, 0.5]])
    changes = torch.randn(2, 4, generator=rng)
    numbers = torch.cat([torch.tensor([0.0, 0.0, 3.0]), each_unit.flatten(), each_head.flatten(), changes.flatten()])
    rows = (torch.randn(3, 5000, generator=rng), torch.randn(1, 5000, generator=rng))
    return ops.SharedShift(numbers, torch.randn(4, 32, generator=rng), 2, ops.RowAscents.of(ascent, rows))


def test_a_shift_that_follows_the_state_weights_its_rows_by_what_units_read() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden, base = torch.randn(5, 32, generator=rng), torch.randn(5, 5000, generator=rng) * 3
    shift = following_shift(1)
    assert isinstance(shift.logits, ops.RowAscents)
    moved, taken, report = edit(hidden, base.clone(), [shift], [0] * 5, list(range(5)), 0.5)
    bias, factors = shift.numbers[3:11].view(4, 2).T
    units = hidden @ shift.weight_UD.T + bias
    assert (units[:, 1:3].abs() > 3).any()
    coefficients = factors * torch.where(torch.tensor([False, True, True, False]), units.clamp(-3, 3), 1.0)
    length = (coefficients @ shift.logits.ascent_UD).norm(dim=1) / hidden.norm(dim=1)
    delta = coefficients @ torch.cat(shift.logits.row_logits)
    most = torch.where(length > 0.5, 0.5 / length, 1.0)
    expected, _ = largest_scale(LinearDivergence(base, most[:, None] * delta), torch.full((5,), 0.3))
    torch.testing.assert_close(taken, most * expected, atol=5e-3, rtol=2e-2)
    torch.testing.assert_close(moved, base + taken[:, None] * delta, atol=1e-4, rtol=1e-4)
    values, change = units[:, [0, 3]], taken[:, None] * (coefficients @ shift.numbers[17:].view(2, 4).T)
    mean, scale = torch.tensor([0.2, -0.1]), torch.tensor([2.0, 0.5])
    after = torch.cat([mean + scale * values, mean + scale * (values + change)], dim=1)
    torch.testing.assert_close(report[:, :4], after, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(report[:, 5], taken * length, atol=1e-5, rtol=1e-4)


def test_a_straight_edit_is_its_coefficients_of_the_rows_as_far_as_its_limit_allows() -> None:
    rng = torch.Generator().manual_seed(0)
    base, coefficients = torch.randn(6, 5000, generator=rng) * 3, torch.randn(4, 3, generator=rng)
    rows = (torch.randn(2, 5000, generator=rng), torch.randn(1, 5000, generator=rng))
    coefficients[1], coefficients[2, 0] = 0.0, float("inf")
    places, limit = torch.tensor([5, 0, 2, 3]), torch.full((4,), 0.3)
    moved = base.clone()
    scale, kl, is_finite = ops.edit_straight(moved, places, coefficients, rows, limit)
    assert torch.equal(moved[[0, 1, 2, 4]], base[[0, 1, 2, 4]])
    assert (is_finite.tolist(), scale.tolist()[1:3], kl.tolist()[1:3]) == ([True, True, False, True], [1, 0], [0, 0])
    changed, delta = places[[0, 3]], ops.combine_rows(coefficients[[0, 3]], rows)
    torch.testing.assert_close(delta, coefficients[[0, 3]] @ torch.cat(rows), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved[changed], base[changed] + scale[[0, 3]][:, None] * delta, atol=1e-5, rtol=1e-5)
    assert_within(base[changed], moved[changed], kl[[0, 3]], limit[:2])
    by_hand = base.clone()
    found = ops.largest_scales(by_hand, changed, delta, limit[:2])
    ops.move_rows(by_hand, changed, delta, found[0])
    assert torch.equal(by_hand[changed], moved[changed])
    assert torch.equal(torch.stack(found), torch.stack([scale, kl])[:, [0, 3]])


def read_by(shift: ops.SharedShift, state: Tensor) -> tuple[Tensor, ...]:
    """The change of logits by a shift that is one for all states; for each head [K] that of its value, the mean and the
    scale of its rewards, and what it reads."""
    assert isinstance(shift.logits, ops.ShiftLogits)
    num_heads = shift.num_heads
    each = shift.numbers[3:].split([2 * num_heads, 3 * num_heads, num_heads**2])
    bias, factor = each[0].view(-1, 2).T
    _, mean, scale = each[1].view(-1, 3).T
    return shift.logits.delta_V, each[2].view(num_heads, -1) @ factor, mean, scale, shift.weight_UD @ state + bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cap", [0.2, 10.0])
@pytest.mark.parametrize("strength", [0.05, 1.0, 6.0])
def test_shared_shifts_move_their_rows_within_both_bounds_and_no_other_row(
    dtype: torch.dtype, cap: float, strength: float
) -> None:
    rng = torch.Generator().manual_seed(0)
    hidden, base = torch.randn(7, 32, generator=rng).to(dtype), torch.randn(7, 5000, generator=rng) * 3
    shifts, which, rows = [shift_of(2, strength, 1), shift_of(1, strength, 2)], [0, 1, 0, 0, 1], [0, 1, 3, 4, 6]
    moved, taken, report = edit(hidden, base.clone(), shifts, which, rows, cap)
    assert torch.equal(moved[[2, 5]], base[[2, 5]])
    for row, shift, share, numbers in zip(rows, (shifts[i] for i in which), taken, report, strict=True):
        state, size = hidden[row].float(), shift.num_heads
        delta, climb, mean, scale, units = read_by(shift, state)
        torch.testing.assert_close(numbers[:size], mean + scale * units, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            numbers[size : 2 * size], mean + scale * (units + share * climb), atol=1e-4, rtol=1e-4
        )
        kl, ratio, held_by, is_nonfinite, last = numbers[2 * size : 2 * size + 5].tolist()
        torch.testing.assert_close(moved[row], base[row] + share * delta, atol=1e-5, rtol=1e-5)
        assert_within(base[row][None], moved[row][None], torch.tensor([kl]), torch.tensor([0.3]))
        most = min(1.0, cap * float(state.norm()) / 2)
        expected, _ = largest_scale(
            LinearDivergence(base[[row, row]], (most * delta).expand(2, -1)), torch.full((2,), 0.3)
        )
        assert float(share) == pytest.approx(most * float(expected[0]), abs=5e-3, rel=1e-2)
        assert ratio == pytest.approx(2 * float(share) / float(state.norm()), rel=1e-4)
        assert held_by == (4 if float(share) < 0.999 * most else 6 if most < 1 else 0)
        assert (is_nonfinite, last) == (0, 1)


def test_a_row_or_a_shift_that_is_not_finite_moves_nothing_and_is_counted() -> None:
    hidden, base = torch.randn(3, 32), torch.randn(3, 5000)
    hidden[1, 3] = float("inf")
    good, bad = shift_of(1, 1.0, 1), shift_of(1, 1.0, 2)
    bad.numbers[1] = float("nan")
    moved, taken, report = edit(hidden, base.clone(), [good, bad], [0, 0, 1], [0, 1, 2], 10.0)
    assert not torch.equal(moved[0], base[0])
    assert torch.equal(moved[1:], base[1:])
    assert (taken > 0).tolist() == [True, False, False]
    assert report[:, 5].tolist() == [0.0, 1.0, 1.0]
    assert report[1:, 2:5].tolist() == [[0.0] * 3] * 2


def test_a_row_is_drawn_searched_and_edited_as_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, delta, hidden = (torch.randn(9, size, generator=rng) for size in (4999, 4999, 32))
    how = [RowSampling(0.9, 0.8, 300, (3, i), 0.001) for i in range(9)]
    limit, shift = torch.full((9,), 0.2), shift_of(2, 1.0, 1, size=4999)
    drawn, scales = sample(logits, how, [0] * 9), ops.largest_scales(logits, torch.arange(9), delta, limit)
    moved = edit(hidden, logits.clone(), [shift], [0] * 9, list(range(9)), 1.0)
    for i in range(9):
        row = slice(i, i + 1)
        assert torch.equal(sample(logits[row], how[row], [0]), drawn[row])
        alone = ops.largest_scales(logits, torch.tensor([i]), delta[row], limit[row])
        alone += edit(hidden[row], logits[row].clone(), [shift], [0], [0], 1.0)
        assert all(torch.equal(mine, its[row]) for mine, its in zip(alone, scales + moved, strict=True))


def test_logits_in_bfloat16_are_widened_on_the_way_wherever_their_rows_lie() -> None:
    hidden, wide = torch.randn(5, 32), (torch.randn(5, 5100) * 3).bfloat16()
    narrow, kept, shift = wide[:, :4999], wide.clone(), shift_of(1, 1.0, 1, size=4999)
    expected = edit(hidden, narrow.float(), [shift], [0, 0], [1, 4], 10.0)
    got = edit(hidden, narrow, [shift], [0, 0], [1, 4], 10.0)
    assert all(torch.equal(mine, its) for mine, its in zip(got, expected, strict=True))
    assert torch.equal(got[0][[0, 2, 3]], narrow[[0, 2, 3]].float())
    assert not torch.equal(got[0][1], narrow[1].float())
    assert torch.equal(wide, kept)
