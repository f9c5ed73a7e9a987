"""The draw's laws, held for torch's operations and, where there are any, for the native kernels."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engines.embedded import sampler
from server.engines.embedded.sampler import RowSampling, _filtered, sample, uniform


@pytest.fixture(params=["native where that can be", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(sampler.ops, "can_run_natively", lambda _: False)


def rows(count: int, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> list[RowSampling]:
    return [RowSampling(temperature, top_p, top_k, (7, i)) for i in range(count)]


def draw(probs: list[float], count: int, **options: float) -> list[float]:
    logits = torch.tensor(probs).log().expand(count, -1).contiguous()
    drawn = sample(logits, rows(count, **options), [0] * count)  # type: ignore[arg-type]
    return (torch.bincount(drawn, minlength=len(probs)) / count).tolist()


def test_frequencies_follow_the_distribution() -> None:
    probs = [0.5, 0.3, 0.15, 0.05]
    assert draw(probs, 20_000) == pytest.approx(probs, abs=0.015)


def test_temperature_sharpens_it() -> None:
    squared = torch.tensor([0.5, 0.3, 0.2]).square()
    assert draw([0.5, 0.3, 0.2], 20_000, temperature=0.5) == pytest.approx(
        (squared / squared.sum()).tolist(), abs=0.015
    )


def test_top_k_keeps_the_k_most_likely() -> None:
    assert draw([0.4, 0.1, 0.3, 0.2], 5_000, top_k=2) == pytest.approx([4 / 7, 0, 3 / 7, 0], abs=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, 1), (0.69, 2), (0.71, 3), (0.95, 4)])
def test_top_p_keeps_the_smallest_set_that_holds_p(top_p: float, kept: int) -> None:
    assert sum(share > 0 for share in draw([0.4, 0.1, 0.3, 0.2], 2_000, top_p=top_p)) == kept


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(5, 50)
    assert torch.equal(sample(logits, rows(5, temperature=0.0), [0] * 5), logits.argmax(-1))


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((4000, 3), -float("inf"))
    logits[:, 1] = 0.0
    assert (sample(logits, rows(4000), [0] * 4000) == 1).all()


def test_a_row_is_drawn_alike_whatever_the_others_ask_for() -> None:
    logits = torch.randn(6, 3000)
    mixed = [RowSampling(t, p, k, (3, i)) for i, (t, p, k) in enumerate(
        [(1.0, 0.9, 0), (0.0, 1.0, 0), (0.5, 1.0, 40), (1.5, 0.5, 7), (1.0, 1.0, 0), (0.8, 0.99, 0)])]  # fmt: skip
    whole = sample(logits, mixed, [5] * 6)
    for i in range(6):
        assert sample(logits[[i, i]], [mixed[i]] * 2, [5, 5])[0] == whole[i]


def test_the_stream_depends_on_seed_choice_and_position_alone() -> None:
    assert uniform((1, 2), 3) == uniform((1, 2), 3)
    others = {uniform(stream, position) for stream in ((1, 2), (2, 1), (-1, 2)) for position in (3, 4)}
    assert len(others) == 6
    assert all(0 <= u < 1 for u in others)


@pytest.mark.parametrize("temperature", [0.0, 1e-50, 1e-40, 1e-6])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_too_small_to_divide_by_is_greedy_and_spares_the_neighbours(
    temperature: float, top_p: float
) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) * 5
    mixed = rows(3)
    alone = sample(logits, mixed, [0, 0, 0])
    mixed[1] = RowSampling(temperature, top_p, 0, (7, 1))
    drawn = sample(logits, mixed, [0, 0, 0])
    assert drawn[1] == logits[1].argmax()
    assert torch.equal(drawn[[0, 2]], alone[[0, 2]])


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_the_nucleus_is_the_smallest_set_that_holds_its_mass(top_p: float, sharpness: float) -> None:
    probs = (torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * sharpness).softmax(0)
    ordered = probs.sort(descending=True).values
    kept = int((ordered.cumsum(0) - ordered < top_p).sum())
    left = _filtered(probs[None], [RowSampling(1.0, top_p, 0, (0, 0))])[0]
    # In sums over 20,000 the last of thousands of tails may fall on either side.
    assert abs(int((left > 0).sum()) - kept) <= 2e-3 * kept
    assert float(left[left > 0].min()) >= float(probs[left == 0].max())


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 4), (0.2, 4), (0.3, 3), (0.6, 2), (0.8, 1), (1.0, 1)])
def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely(min_p: float, kept: int) -> None:
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().expand(4000, -1).contiguous()
    drawn = sample(logits, [RowSampling(1.0, 1.0, 0, (7, i), min_p) for i in range(4000)], [0] * 4000)
    probs = torch.bincount(drawn, minlength=4) / 4000
    assert int((probs > 0).sum()) == kept
    expected = torch.tensor([0.4, 0.1, 0.3, 0.2])
    expected[expected < min_p * 0.4 - 1e-6] = 0
    assert probs.tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=0.03)


def test_min_p_leaves_the_nucleus_a_share_of_what_it_kept() -> None:
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().expand(2000, -1).contiguous()
    rows_of = [RowSampling(1.0, 0.5, 0, (7, i), 0.6) for i in range(2000)]
    # Of 4/7 and 3/7, the first alone holds half.
    assert (sample(logits, rows_of, [0] * 2000) == 0).all()


@pytest.mark.parametrize("options", [{"min_p": 1.0}, {"top_k": 1}, {"top_p": 0.3}])
def test_tokens_as_likely_as_the_last_one_kept_stay_in(options: dict[str, float]) -> None:
    logits = torch.tensor([0.2, 0.4, 0.4]).log().expand(200, -1).contiguous()
    limits = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, **options}
    drawn = sample(logits, [RowSampling(1.0, stream=(7, i), **limits) for i in range(200)], [0] * 200)  # type: ignore[arg-type]
    assert set(drawn.tolist()) == {1, 2}


def test_a_top_p_of_one_leaves_out_not_even_what_rounding_would() -> None:
    probs = torch.tensor([[0.0, -60.0, -80.0, -90.0]]).softmax(-1)
    assert torch.equal(
        _filtered(probs, [RowSampling(1.0, 1.0, 3, (0, 0))]) > 0, torch.tensor([[True, True, True, False]])
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.05, 2.0),
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(-1, 30),
    min_p=st.floats(0.0, 1.0),
    u=st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-53]),
)
def test_every_u_draws_a_token_that_all_three_filters_keep(
    seed: int, temperature: float, top_p: float, top_k: int, min_p: float, u: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 40, generator=rng) * 4
    logits[:, torch.randperm(40, generator=rng)[:10]] = -torch.inf
    logits[:, -1] = -torch.inf
    row = RowSampling(temperature, top_p, max(top_k, 0), (seed, 0), min_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "uniform", lambda *_: u)
        drawn = sample(logits, [row] * 3, [0] * 3)
    for token, logits_V in zip(drawn.tolist(), logits.double(), strict=True):
        probs = (logits_V / temperature).softmax(0)
        above = probs[probs > probs[token] * (1 + 1e-5)]
        assert probs[token] > 0
        assert probs[token] >= min_p * probs.max() * (1 - 1e-5)
        assert top_k <= 0 or len(above) < top_k
        # Of the mass that min-p and top-k leave, those before it hold less than top_p.
        left = probs[probs >= min_p * probs.max()].sort(descending=True).values
        left = left[:top_k] if top_k > 0 else left
        assert above.sum() <= top_p * left.sum() + 1e-5
