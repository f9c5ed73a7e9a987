import pytest
import torch

from server.control.budget import GeneralDivergence, LinearDivergence, largest_scale

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
    torch.testing.assert_close(kl.double(), truth, rtol=0, atol=5e-6)


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
