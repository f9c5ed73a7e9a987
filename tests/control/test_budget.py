import pytest
import torch

from server.control import budget as budget_module
from server.control.budget import (
    GeneralDivergence,
    LinearDivergence,
    ShiftTable,
    largest_scale,
    largest_scale_of_shared,
)

SCALES = [(1.0, 0.01), (3.0, 0.5), (3.0, 3.0), (8.0, 10.0), (0.1, 100.0)]


def exact_kl(base: torch.Tensor, delta: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    log_base = base.double().log_softmax(-1)
    log_moved = (base.double() + scale.double()[:, None] * delta.double()).log_softmax(-1)
    return (log_moved.exp() * (log_moved - log_base)).sum(-1)


@pytest.mark.parametrize(("base_scale", "delta_scale"), SCALES)
@pytest.mark.parametrize("budget", [0.001, 0.05, 0.3, 1.0])
def test_the_budget_is_never_exceeded(base_scale: float, delta_scale: float, budget: float) -> None:
    torch.manual_seed(0)
    base, delta = torch.randn(8, 5000) * base_scale, torch.randn(8, 5000) * delta_scale
    scale, kl = largest_scale(LinearDivergence(base, delta), torch.full((8,), budget))
    truth = exact_kl(base, delta, scale)
    assert (truth <= budget).all()
    torch.testing.assert_close(kl.double(), truth, rtol=0, atol=1e-5)


def test_an_edit_that_fits_is_taken_whole() -> None:
    base, delta = torch.randn(4, 300), torch.randn(4, 300) * 1e-3
    scale, _ = largest_scale(LinearDivergence(base, delta), torch.full((4,), 0.3))
    assert torch.equal(scale, torch.ones(4))


def test_an_ordinary_budget_is_used_up_to_a_few_percent() -> None:
    torch.manual_seed(1)
    base, delta = torch.randn(16, 5000) * 3, torch.randn(16, 5000) * 2
    _, kl = largest_scale(LinearDivergence(base, delta), torch.full((16,), 0.3))
    assert (kl >= 0.9 * 0.3).all()


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(2)
    base, delta = torch.randn(9, 3000) * 3, torch.randn(9, 3000) * torch.logspace(-2, 2, 9)[:, None]
    budget = torch.linspace(0.01, 1.0, 9)
    whole, whole_kl = largest_scale(LinearDivergence(base, delta), budget)
    for i in range(9):
        rows = [i, i]
        alone, alone_kl = largest_scale(LinearDivergence(base[rows], delta[rows]), budget[rows])
        assert alone[0] == whole[i]
        assert alone_kl[0] == whole_kl[i]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_edit_gets_scale_zero(bad: float) -> None:
    base, delta = torch.randn(3, 50), torch.randn(3, 50)
    delta[1, 7] = bad
    scale, kl = largest_scale(LinearDivergence(base, delta), torch.full((3,), 0.3))
    assert scale[1] == 0
    assert kl[1] == 0
    assert scale[0] > 0


def test_both_forms_of_the_divergence_agree() -> None:
    base, delta, scale = torch.randn(5, 400), torch.randn(5, 400), torch.rand(5)
    general = GeneralDivergence(base, delta, lambda logits: logits)
    torch.testing.assert_close(LinearDivergence(base, delta)(scale), general(scale), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("base_scale", "delta_scale"), SCALES)
def test_a_table_of_a_shared_shift_gives_the_divergence_of_taking_it_whole(
    base_scale: float, delta_scale: float
) -> None:
    torch.manual_seed(3)
    base, shift = torch.randn(6, 50_000) * base_scale, torch.randn(50_000) * delta_scale
    exact = exact_kl(base, shift.expand(6, -1), torch.ones(6))
    torch.testing.assert_close(ShiftTable(shift).divergence(base).double(), exact, rtol=1e-5, atol=5e-6)


def test_rows_that_share_a_shift_are_scaled_as_those_that_do_not() -> None:
    torch.manual_seed(4)
    base, shift, share = torch.randn(12, 3000) * 3, torch.randn(3000), torch.tensor([1.0, 1.0, 0.4] * 4)
    budget = torch.logspace(-3, 0.5, 12)
    shared = largest_scale_of_shared(ShiftTable(shift), share, base, budget)
    alone = largest_scale(LinearDivergence(base, share[:, None] * shift), budget)
    torch.testing.assert_close(shared, alone, rtol=0.05, atol=1e-5)
    assert (exact_kl(base, shift.expand(12, -1), shared[0] * share) <= budget).all()


def test_a_row_that_shares_a_shift_does_not_depend_on_the_others() -> None:
    torch.manual_seed(5)
    table, base = ShiftTable(torch.randn(3000)), torch.randn(9, 3000) * 3
    share, budget = torch.tensor([1.0, 0.7, 1.0] * 3), torch.logspace(-2, 0.3, 9)
    whole, whole_kl = largest_scale_of_shared(table, share, base, budget)
    for i in range(9):
        rows = [i, i]
        alone, alone_kl = largest_scale_of_shared(table, share[rows], base[rows], budget[rows])
        assert alone[0] == whole[i]
        assert alone_kl[0] == whole_kl[i]


def test_a_shared_shift_that_is_not_finite_is_none_at_all() -> None:
    table = ShiftTable(torch.tensor([0.0, float("inf"), 1.0]))
    assert not table.is_finite
    assert not table.shift_V.any()


@pytest.mark.parametrize("peak", [20.0, 60.0, 100.0, 1000.0])
def test_a_shift_of_one_token_far_above_the_rest_keeps_its_budget(peak: float) -> None:
    torch.manual_seed(6)
    base, shift, budget = torch.randn(8, 50_000) * 3, torch.zeros(50_000), torch.full((8,), 0.05)
    shift[17] = peak
    delta = shift.expand(8, -1)
    for scale, kl in (
        largest_scale(LinearDivergence(base, delta), budget),
        largest_scale_of_shared(ShiftTable(shift), torch.ones(8), base, budget),
    ):
        truth = exact_kl(base, delta, scale)
        assert (truth <= budget).all()
        torch.testing.assert_close(kl.double(), truth, rtol=0, atol=2e-5)


def test_the_error_of_a_divergence_is_within_the_margin_that_budgets_leave() -> None:
    torch.manual_seed(7)
    for size in (0.01, 0.1, 0.5, 2.0):
        base, shift = torch.randn(16, 50_000) * 3, torch.randn(50_000) * size
        truth = exact_kl(base, shift.expand(16, -1), torch.ones(16))
        for kl in (LinearDivergence(base, shift.expand(16, -1))(torch.ones(16)), ShiftTable(shift).divergence(base)):
            assert (truth - kl.double()).max() < budget_module.ROUNDING_NATS / 2
