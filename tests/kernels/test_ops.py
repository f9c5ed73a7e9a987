"""Drawing tokens and searching a budget natively, against torch's way of doing the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.control.budget import LinearDivergence, largest_scale
from server.engines.embedded import sampler
from server.engines.embedded.sampler import RowSampling, sample
from server.kernels import native, ops

pytestmark = pytest.mark.skipif(native() is None, reason="no native kernels on this machine")


@settings(max_examples=60, deadline=None)
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


@pytest.mark.parametrize("strength", [0.05, 1.0, 6.0])
@pytest.mark.parametrize("is_shared", [True, False])
def test_the_scale_is_the_one_that_torch_finds_and_the_divergence_is_exact(strength: float, is_shared: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(7, 5000, generator=rng) * 3
    delta = torch.randn(5000 if is_shared else (7, 5000), generator=rng) * strength
    share, limit = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.0, 1.0, 0.9]), torch.full((7,), 0.3)
    expected, _ = largest_scale(LinearDivergence(base, share[:, None] * delta.expand(7, -1)), limit)
    moved = base.clone()
    scale, kl = ops.scale_within_budget(moved, torch.arange(7), delta, share, limit, apply=True)
    torch.testing.assert_close(scale, expected, atol=5e-3, rtol=1e-2)
    torch.testing.assert_close(moved, base + (scale * share)[:, None] * delta, atol=1e-5, rtol=1e-5)
    before, after = base.double().log_softmax(-1), moved.double().log_softmax(-1)
    exact = (after.exp() * (after - before)).sum(-1)
    assert (exact <= limit).all()
    torch.testing.assert_close(kl.double(), exact, atol=1e-5, rtol=1e-4)


def test_a_shift_that_is_not_finite_moves_nothing() -> None:
    base, delta = torch.randn(3, 100), torch.randn(3, 100)
    delta[0, 5], delta[1, 5] = float("nan"), float("inf")
    moved = base.clone()
    scale, _ = ops.scale_within_budget(moved, torch.arange(3), delta, torch.ones(3), torch.full((3,), 0.3), apply=True)
    assert torch.equal(moved[:2], base[:2])
    assert scale.tolist()[:2] == [0.0, 0.0]
    assert scale[2] > 0


def test_only_the_named_rows_are_moved() -> None:
    base, delta = torch.randn(4, 100), torch.randn(100)
    moved = base.clone()
    ops.scale_within_budget(moved, torch.tensor([2]), delta, torch.ones(1), torch.full((1,), 0.3), apply=True)
    assert torch.equal(moved[[0, 1, 3]], base[[0, 1, 3]])
    assert not torch.equal(moved[2], base[2])
