from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import card_of, plain_gradient, random_field_head, random_head, random_linear_head
from value_models.errors import HeadShapeError
from value_models.heads import HEAD_TYPES, LinearHead, MLPHead, ValueHead, head_from_tensors
from value_models.store import load_head, save_head

HEADS = [random_head(0), random_head(1, widths=(16, 12)), random_head(2, widths=(8, 8, 8)), random_linear_head(3)]


@pytest.mark.parametrize("head", HEADS)
def test_the_closed_form_gradient_equals_autograd(head: ValueHead) -> None:
    hidden = torch.randn(5, head.hidden_size)
    value, grad = head.value(hidden), plain_gradient(head, hidden)
    leaf = hidden.clone().requires_grad_()
    # The head's own forward pass in plain operations, so that autograd can follow it.
    x = (leaf - head.mean_D) / head.scale_D
    z = x @ head.inputs_UD.T + head.input_bias_U
    expected = head.reward_mean + head.reward_scale * _forward(head, z)
    expected.sum().backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-4)


def _forward(head: ValueHead, z: torch.Tensor) -> torch.Tensor:
    if not isinstance(head, MLPHead):
        return z[:, 0]
    tensors, active = head.state_dict(), z[:, 1:].relu()
    for i in range(sum(name.startswith("hidden_weight_") for name in tensors)):
        active = (active @ tensors[f"hidden_weight_{i}"].T + tensors[f"hidden_bias_{i}"]).relu()
    return z[:, 0] + active @ head.out_weight_H + head.out_bias


def test_all_of_a_head_is_where_its_tensors_are() -> None:
    """The reward's scale too: it alone is made from numbers, and on a GPU a value could not be computed otherwise."""
    tensors = {name: torch.zeros(shape, device="meta") for name, shape in
               {"mean_D": (4,), "scale_D": (4,), "inputs_UD": (1, 4), "input_bias_U": (1,)}.items()}  # fmt: skip
    head = LinearHead(**tensors)
    assert {tensor.device.type for tensor in head.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("head", HEADS)
def test_the_gradient_equals_finite_differences(head: ValueHead) -> None:
    hidden, direction = torch.randn(4, head.hidden_size), torch.randn(4, head.hidden_size)
    step = 1e-3
    slope = (head.value(hidden + step * direction) - head.value(hidden - step * direction)) / (2 * step)
    grad = plain_gradient(head, hidden)
    # A ReLU may switch within the step in one row; not in most.
    error = (slope - (grad * direction).sum(-1)).abs()
    assert error.median() < 1e-2


@pytest.mark.parametrize("head", HEADS)
def test_a_head_survives_its_state_dict(head: ValueHead) -> None:
    again = head_from_tensors(head.type_name, dict(head.state_dict()))
    hidden = torch.randn(3, head.hidden_size)
    assert torch.equal(again.value(hidden), head.value(hidden))


def test_heads_are_frozen() -> None:
    assert not list(random_head(0).parameters())
    assert not random_head(0).value(torch.randn(2, 32)).requires_grad


@pytest.mark.parametrize("name", ["mean_D", "inputs_UD", "out_weight_H"])
def test_a_missing_or_misshapen_tensor_is_named(name: str) -> None:
    tensors = dict(random_head(0).state_dict())
    without = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(HeadShapeError, match=name):
        head_from_tensors("mlp", without)
    with pytest.raises(HeadShapeError):
        head_from_tensors("mlp", {**tensors, name: torch.zeros(3, 3)})


def test_a_reward_without_spread_is_refused() -> None:
    tensors = dict(random_head(0).state_dict())
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(HeadShapeError, match="reward_scale"):
            head_from_tensors("mlp", {**tensors, "reward": torch.tensor([0.0, scale])})


def test_an_unknown_type_or_an_unused_tensor_is_refused() -> None:
    tensors = dict(random_head(0).state_dict())
    with pytest.raises(HeadShapeError, match="known: field, linear, mlp"):
        head_from_tensors("transformer", tensors)
    with pytest.raises(HeadShapeError, match="extra"):
        head_from_tensors("mlp", {**tensors, "extra": torch.zeros(1)})


def test_a_field_survives_its_state_dict_and_has_few_features() -> None:
    field = random_field_head(0)
    hidden = torch.randn(3, field.hidden_size)
    again = head_from_tensors("field", dict(field.state_dict()))
    assert torch.equal(again.readout(again.units(hidden))[1], field.readout(field.units(hidden))[1])
    with pytest.raises(HeadShapeError, match="a field has 9 features; at most 8 are allowed"):
        random_field_head(0, num_features=9)


def test_a_linear_head_has_one_unit() -> None:
    head = random_linear_head(0)
    tensors = head.state_dict()
    two = {
        name: tensors[name].expand(2, *tensors[name].shape[1:]) for name in ("inputs_UD", "input_bias_U", "ascent_UD")
    }
    with pytest.raises(HeadShapeError, match="one unit"):
        head_from_tensors("linear", tensors | two)


class SquaredHead(ValueHead):
    """f = power * z^2, with a tensor of its own."""

    type_name = "squared"
    power: Tensor

    def __init__(self, *, power: Tensor, **first_layer: Any) -> None:
        super().__init__(**first_layer)
        self._keep("power", power)

    def readout(self, units_BU: Tensor) -> tuple[Tensor, Tensor]:
        return self.power * units_BU[:, 0].square(), 2.0 * self.power * units_BU

    @classmethod
    def take_own(cls, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {"power": tensors.pop("power")}


def test_an_architecture_is_added_by_its_class_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEAD_TYPES, "squared", SquaredHead)
    first_layer = {name: tensor for name, tensor in random_linear_head(0).state_dict().items() if name != "reward"}
    head = SquaredHead(power=torch.tensor([3.0]), **first_layer)
    save_head(tmp_path, head, card_of("own", head))
    again, card = load_head(tmp_path)
    hidden = torch.randn(4, head.hidden_size)
    assert isinstance(again, SquaredHead)
    assert torch.equal(again.value(hidden), head.value(hidden))
    assert card.architecture.num_parameters == head.hidden_size + 2
    with pytest.raises(HeadShapeError, match="the squared head lacks the tensor 'power'"):
        head_from_tensors("squared", {**random_linear_head(0).state_dict()})


@pytest.mark.parametrize(
    ("head", "widths", "num_parameters"),
    [
        (random_linear_head(0), [], 32 + 1),
        (random_field_head(0, num_features=2), [], 3 * (32 + 1)),
        (random_head(0, widths=(8, 4)), [8, 4], (1 + 8) * (32 + 1) + (8 + 1) * 4 + 4 + 1),
        (random_head(0, widths=(2,) * 12), [2] * 12, (1 + 2) * (32 + 1) + 11 * (2 + 1) * 2 + 2 + 1),
    ],
    ids=["linear", "field", "two layers", "twelve layers"],
)
def test_a_head_tells_its_hidden_layers_and_the_numbers_of_its_value(
    head: ValueHead, widths: list[int], num_parameters: int
) -> None:
    assert (head.hidden_widths, head.num_parameters) == (widths, num_parameters)
