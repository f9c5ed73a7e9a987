import pytest
import torch
from pydantic import ValidationError

from server.control.objectives import WeightedSum


def test_the_slope_is_autograd_of_the_score() -> None:
    objective = WeightedSum(weights={"b": -0.5, "a": 2.0})
    values = torch.randn(6, 2, requires_grad=True)
    objective.score(values).sum().backward()
    assert torch.equal(objective.slope(values), values.grad)


def test_heads_come_in_one_order_however_they_are_written() -> None:
    assert WeightedSum(weights={"b": 1.0, "a": 2.0}).head_names == ("a", "b")
    values = torch.tensor([[10.0, 1.0]])
    assert WeightedSum(weights={"b": 1.0, "a": 2.0}).score(values).item() == 21.0


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e308, 11, -11, True, "1"])
def test_a_weight_must_be_a_number_within_its_range(weight: object) -> None:
    with pytest.raises(ValidationError):
        WeightedSum(weights={"a": weight})  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["", "../etc", "a/b", "/abs", "http://x", "a" * 65, "a b"])
def test_a_head_is_named_and_never_a_path(name: str) -> None:
    with pytest.raises(ValidationError):
        WeightedSum(weights={name: 1.0})


def test_no_heads_or_too_many_are_refused() -> None:
    for weights in ({}, {f"h{i}": 1.0 for i in range(9)}):
        with pytest.raises(ValidationError):
            WeightedSum(weights=weights)
