from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from server.control import budget as budget_module
from server.control.budget import (
    Divergence,
    GeneralDivergence,
    LinearDivergence,
    largest_linear_scale,
    largest_scale,
)

Scaled = tuple[torch.Tensor, torch.Tensor]


def by_torch(base: torch.Tensor, delta: torch.Tensor, max_kl: torch.Tensor) -> Scaled:
    return largest_scale(LinearDivergence(base, delta), max_kl)


def best_way(base: torch.Tensor, delta: torch.Tensor, max_kl: torch.Tensor) -> Scaled:
    return largest_linear_scale(base, torch.arange(len(base)), delta, max_kl)


# The second is native where that can be, and else the first.
WAYS = pytest.mark.parametrize("way", [by_torch, best_way])
SCALES = [(1.0, 0.01), (3.0, 0.5), (3.0, 3.0), (8.0, 10.0), (0.1, 100.0)]


def exact_kl(base: torch.Tensor, delta: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    log_base = base.double().log_softmax(-1)
    log_moved = (base.double() + scale.double()[:, None] * delta.double()).log_softmax(-1)
    return (log_moved.exp() * (log_moved - log_base)).sum(-1)


@WAYS
@pytest.mark.parametrize(("base_scale", "delta_scale"), SCALES)
@pytest.mark.parametrize("budget", [0.001, 0.05, 0.3, 1.0])
def test_the_budget_is_never_exceeded(
    way: Callable[..., Scaled], base_scale: float, delta_scale: float, budget: float
) -> None:
    torch.manual_seed(0)
    base, delta = torch.randn(8, 5000) * base_scale, torch.randn(8, 5000) * delta_scale
    scale, kl = way(base, delta, torch.full((8,), budget))
    truth = exact_kl(base, delta, scale)
    assert (truth <= budget).all()
    torch.testing.assert_close(kl.double(), truth, rtol=0, atol=1e-5)


@WAYS
def test_an_edit_that_fits_is_taken_whole(way: Callable[..., Scaled]) -> None:
    base, delta = torch.randn(4, 300), torch.randn(4, 300) * 1e-3
    scale, _ = way(base, delta, torch.full((4,), 0.3))
    assert torch.equal(scale, torch.ones(4))


@WAYS
def test_an_ordinary_budget_is_used_up_to_a_few_percent(way: Callable[..., Scaled]) -> None:
    torch.manual_seed(1)
    base, delta = torch.randn(16, 5000) * 3, torch.randn(16, 5000) * 2
    _, kl = way(base, delta, torch.full((16,), 0.3))
    assert (kl >= 0.9 * 0.3).all()


@WAYS
def test_a_row_does_not_depend_on_the_others(way: Callable[..., Scaled]) -> None:
    torch.manual_seed(2)
    base, delta = torch.randn(9, 3000) * 3, torch.randn(9, 3000) * torch.logspace(-2, 2, 9)[:, None]
    budget = torch.linspace(0.01, 1.0, 9)
    whole, whole_kl = way(base, delta, budget)
    for i in range(9):
        rows = [i, i]
        alone, alone_kl = way(base[rows], delta[rows], budget[rows])
        assert alone[0] == whole[i]
        assert alone_kl[0] == whole_kl[i]


@WAYS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_edit_gets_scale_zero(way: Callable[..., Scaled], bad: float) -> None:
    base, delta = torch.randn(3, 50), torch.randn(3, 50)
    delta[1, 7] = bad
    scale, kl = way(base, delta, torch.full((3,), 0.3))
    assert scale[1] == 0
    assert kl[1] == 0
    assert scale[0] > 0


def test_both_forms_of_the_divergence_agree() -> None:
    base, delta, scale = torch.randn(5, 400), torch.randn(5, 400), torch.rand(5)
    general = GeneralDivergence(base, delta, lambda logits: logits)
    torch.testing.assert_close(LinearDivergence(base, delta)(scale), general(scale), rtol=1e-4, atol=1e-5)


@WAYS
@pytest.mark.parametrize("peak", [20.0, 60.0, 100.0, 1000.0])
def test_a_shift_of_one_token_far_above_the_rest_keeps_its_budget(way: Callable[..., Scaled], peak: float) -> None:
    torch.manual_seed(6)
    base, shift, budget = torch.randn(8, 50_000) * 3, torch.zeros(50_000), torch.full((8,), 0.05)
    shift[17] = peak
    delta = shift.expand(8, -1)
    scale, kl = way(base, delta, budget)
    truth = exact_kl(base, delta, scale)
    assert (truth <= budget).all()
    assert (scale > 0).all()
    torch.testing.assert_close(kl.double(), truth, rtol=0, atol=2e-5)


def test_the_error_of_a_divergence_is_within_the_margin_that_budgets_leave() -> None:
    torch.manual_seed(7)
    for size in (0.01, 0.1, 0.5, 2.0):
        base, shift = torch.randn(16, 50_000) * 3, torch.randn(50_000) * size
        truth = exact_kl(base, shift.expand(16, -1), torch.ones(16))
        whole, native_kl = largest_linear_scale(base, torch.arange(16), shift.expand(16, -1), torch.full((16,), 1e6))
        assert (whole == 1).all()
        for kl in (LinearDivergence(base, shift.expand(16, -1))(torch.ones(16)), native_kl):
            assert (truth - kl.double()).max() < budget_module.ROUNDING_NATS / 2


class Counting:
    """A divergence that counts how often it is evaluated."""

    def __init__(self, divergence: Divergence, sizes: list[int]) -> None:
        self._divergence, self.sizes = divergence, sizes

    def __call__(self, scale_R: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(scale_R))
        return self._divergence(scale_R)

    def root_slope(self) -> torch.Tensor:
        return self._divergence.root_slope()

    def take(self, rows: torch.Tensor) -> Divergence:
        return Counting(self._divergence.take(rows), self.sizes)


@pytest.mark.parametrize(("base_scale", "delta_scale"), [(1.0, 1.0), (3.0, 2.0)])
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.5])
def test_an_ordinary_edit_is_within_three_percent_of_its_budget_after_few_evaluations(
    base_scale: float, delta_scale: float, budget: float
) -> None:
    torch.manual_seed(3)
    base, delta = torch.randn(16, 5000) * base_scale, torch.randn(16, 5000) * delta_scale
    counting = Counting(LinearDivergence(base, delta), [])
    scale, kl = largest_scale(counting, torch.full((16,), budget))
    assert ((kl >= 0.97 * (budget - budget_module.ROUNDING_NATS)) | (scale == 1)).all()
    # The whole edit, for all rows; then few more, for those that are over.
    assert counting.sizes[0] == 16
    assert len(counting.sizes) <= 1 + 4


def test_both_ways_through_the_search_give_the_same() -> None:
    torch.manual_seed(4)
    base, delta = (
        torch.randn(6, 400) * 3,
        torch.randn(6, 400) * torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0, 100.0])[:, None],
    )
    limit = torch.full((6,), 0.3)
    scale, kl = largest_scale(LinearDivergence(base, delta), limit)
    with mock.patch.object(torch.Tensor, "device", SimpleNamespace(type="cuda")):
        scale_on_gpu, kl_on_gpu = largest_scale(LinearDivergence(base, delta), limit)
    assert torch.equal(scale, scale_on_gpu)
    assert torch.equal(kl, kl_on_gpu)
