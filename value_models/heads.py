"""Value heads: small networks from a language model's last hidden state to the reward of the finished response.

    x = (h - mean) / scale                                normalised state, [D]
    z = W x + b, linear rows excepted                     units, [U]: the rows of `inputs`
    f = readout(z)                                        standardised value
    V(h) = reward_mean + reward_scale * f                 reward units

A head ascends along `ascent` rows, one for each unit and chosen in training (value_models/ascent.py; the rows of W are
the plain gradient, as in the paper). The whole ascent runs in the space of the units: one step of size a moves z by
a * c(z) Gram with Gram = ascent W^T, and h by a * scale * c(z) ascent. The coefficients c are df/dz, but of a field,
whose c are the features that its direction follows.
Gradients are closed-form matrix products with masks; there is no autograd in decoding.

Knows nothing of models, rewards, files or requests. Enter at `ValueHead`; to add an architecture, write one class and
put it in HEAD_TYPES.

Shapes: B rows, D hidden size, U units (rows of the first layer), H width of a hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from value_models.errors import HeadShapeError
from value_models.linear import PackedLinear

MakeLinear = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]
"""It makes a map of a weight [out, in] and a bias. The map's result for a row must not depend on other rows."""
UNIT_COST_NATS = 0.1
"""What an ascent of length 1 of a trained head costs a token, on average over its training states."""
MAX_UNITS = 8192
"""Of a head's layer, twice what the paper's have; a server keeps the inner products of all units with each other."""
MAX_FEATURES = 8
"""Of a field. What each of its rows does to the logits is kept, a row of the vocabulary's size."""
MAX_FEATURE = 3.0
"""That a feature counts, in standard deviations."""
_NOT_OF_THE_VALUE = frozenset({"mean_D", "scale_D", "ascent_UD", "reward"})
"""Tensors of every head: normalisation, the way uphill, and the reward's mean and scale."""


class ValueHead(nn.Module):
    """Base of all heads. Subclasses say what becomes of the units in `readout`; all tensors are float32 and frozen."""

    type_name: ClassVar[str]
    is_straight: ClassVar[bool] = False
    """Whether coefficients stay as they are along an ascent, so that n steps are one of n times the size."""

    mean_D: Tensor
    scale_D: Tensor
    inputs_UD: Tensor
    input_bias_U: Tensor
    ascent_UD: Tensor
    reward: Tensor

    def __init__(
        self,
        *,
        mean_D: Tensor,
        scale_D: Tensor,
        inputs_UD: Tensor,
        input_bias_U: Tensor,
        ascent_UD: Tensor | None = None,
        reward_mean: float = 0.0,
        reward_scale: float = 1.0,
    ) -> None:
        """Take a first layer; `ascent_UD` None is the identity metric. Raises HeadShapeError."""
        super().__init__()
        if inputs_UD.dim() != 2 or not inputs_UD.numel():
            raise HeadShapeError(f"inputs has shape {tuple(inputs_UD.shape)}, expected units x hidden size")
        num_units, hidden_size = inputs_UD.shape
        if num_units > MAX_UNITS:
            raise HeadShapeError(f"inputs has {num_units} units; at most {MAX_UNITS} are allowed")
        ascent_UD = inputs_UD.clone() if ascent_UD is None else ascent_UD
        _check_shape("mean", mean_D, (hidden_size,))
        _check_shape("scale", scale_D, (hidden_size,))
        _check_shape("input_bias", input_bias_U, (num_units,))
        _check_shape("ascent", ascent_UD, (num_units, hidden_size))
        if not reward_scale > 0:
            raise HeadShapeError(f"reward_scale is {reward_scale}; it must be above 0")
        self._keep("mean_D", mean_D)
        self._keep("scale_D", scale_D)
        self._keep("inputs_UD", inputs_UD)
        self._keep("input_bias_U", input_bias_U)
        self._keep("ascent_UD", ascent_UD)
        self._keep("reward", torch.tensor([reward_mean, reward_scale], device=inputs_UD.device))

    @property
    def hidden_size(self) -> int:
        return self.inputs_UD.shape[1]

    @property
    def num_units(self) -> int:
        return self.inputs_UD.shape[0]

    @property
    def reward_mean(self) -> float:
        return float(self.reward[0])

    @property
    def reward_scale(self) -> float:
        """Standard deviation of the training reward: the unit in which objectives see this head's value."""
        return float(self.reward[1])

    def readout(self, units_BU: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised value f [B] and the coefficients c [B, U] that a step takes the ascent rows times."""
        raise NotImplementedError

    def units(self, hidden_BD: Tensor) -> Tensor:
        """z [B, U] of states [B, D]."""
        normalised_BD = (hidden_BD.float() - self.mean_D) / self.scale_D
        return functional.linear(normalised_BD, self.inputs_UD, self.input_bias_U)

    def value(self, hidden_BD: Tensor) -> Tensor:
        """Predicted reward [B], float32, in reward units."""
        return self.reward[0] + self.reward[1] * self.readout(self.units(hidden_BD))[0]

    def folded_inputs(self) -> tuple[Tensor, Tensor]:
        """First layer with the normalisation folded in: weights [U, D] and bias [U] with z = W' h + b'."""
        weight_UD = self.inputs_UD / self.scale_D
        return weight_UD, self.input_bias_U - weight_UD @ self.mean_D

    def folded_ascent(self) -> Tensor:
        """Rows [U, D] in h: an ascent step of size a is a * c(z) @ rows."""
        return self.ascent_UD * self.scale_D

    def moved_units(self) -> Tensor:
        """Which units [U] an ascent moves, bool; others stay what they are of the model's own state."""
        return torch.ones_like(self.input_bias_U, dtype=torch.bool)

    def with_ascent(self, ascent_UD: Tensor) -> ValueHead:
        """The same head with other ascent rows (see value_models/ascent.py)."""
        return head_from_tensors(self.type_name, {**self.state_dict(), "ascent_UD": ascent_UD})

    @property
    def num_parameters(self) -> int:
        """Numbers that its standardised value is fitted by."""
        return sum(t.numel() for name, t in self.state_dict().items() if name not in _NOT_OF_THE_VALUE)

    @property
    def hidden_widths(self) -> list[int]:
        """The widths of its hidden layers; empty without any."""
        return []

    def map_with(self, linear: MakeLinear) -> None:
        """Let `linear` make anew the maps between hidden layers, where there are any; torch alone does at first."""

    @classmethod
    def take_own(cls, tensors: dict[str, Tensor]) -> dict[str, Any]:  # noqa: ARG003
        """Take the tensors that this class adds out of a state dict, as arguments of its `__init__`.

        Raises KeyError for one that is missing.
        """
        return {}

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor.detach().float().contiguous())


class LinearHead(ValueHead):
    """f = z of one unit. A static steering vector is this head with the vector as its ascent row."""

    type_name = "linear"
    is_straight = True

    def __init__(self, **first_layer: Any) -> None:
        super().__init__(**first_layer)
        if self.num_units != 1:
            raise HeadShapeError(f"a linear head has one unit; inputs have {self.num_units} rows")

    def readout(self, units_BU: Tensor) -> tuple[Tensor, Tensor]:
        return units_BU[:, 0], torch.ones_like(units_BU)


class FieldHead(ValueHead):
    """f = z_0, and a way uphill that follows the state: ascent_0 + sum_k phi_k ascent_k.

    The features phi are units 1.. of the state as the model left it, cut to MAX_FEATURE; an ascent does not move them.
    """

    type_name = "field"
    is_straight = True

    def __init__(self, **first_layer: Any) -> None:
        super().__init__(**first_layer)
        if self.num_units > 1 + MAX_FEATURES:
            raise HeadShapeError(f"a field has {self.num_units - 1} features; at most {MAX_FEATURES} are allowed")

    def readout(self, units_BU: Tensor) -> tuple[Tensor, Tensor]:
        features_BK = units_BU[:, 1:].clamp(-MAX_FEATURE, MAX_FEATURE)
        return units_BU[:, 0], torch.cat([torch.ones_like(units_BU[:, :1]), features_BK], dim=1)

    def moved_units(self) -> Tensor:
        return torch.arange(self.num_units, device=self.inputs_UD.device) == 0


class MLPHead(ValueHead):
    """ReLU network of one or more hidden layers, with a linear part beside it.

    Unit 0 is the linear part (weight 1, no ReLU); units 1.. are the first hidden layer.
    f = z_0 + w_out . relu(... relu(z_1..) ...) + b_out, as in the paper where the linear row is zero.
    """

    type_name = "mlp"

    out_weight_H: Tensor
    out_bias: Tensor

    def __init__(
        self,
        *,
        hidden_weights: Sequence[Tensor] = (),
        hidden_biases: Sequence[Tensor] = (),
        out_weight_H: Tensor,
        out_bias: Tensor,
        **first_layer: Any,
    ) -> None:
        """hidden_weights [H_out, H_in] are the layers after the first; none of them makes a two-layer head."""
        super().__init__(**first_layer)
        width = self.num_units - 1
        for i, (weight, bias) in enumerate(zip(hidden_weights, hidden_biases, strict=True)):
            if weight.dim() != 2 or not 0 < weight.shape[0] <= MAX_UNITS:
                raise HeadShapeError(f"hidden_weight_{i} has shape {tuple(weight.shape)}, expected units x units")
            _check_shape(f"hidden_weight_{i}", weight, (weight.shape[0], width))
            _check_shape(f"hidden_bias_{i}", bias, (weight.shape[0],))
            width = weight.shape[0]
            self._keep(f"hidden_weight_{i}", weight)
            self._keep(f"hidden_bias_{i}", bias)
        _check_shape("out_weight", out_weight_H, (width,))
        if out_bias.numel() != 1:
            raise HeadShapeError(f"out_bias has shape {tuple(out_bias.shape)}, expected one number")
        self._num_hidden = len(hidden_weights)
        self._keep("out_weight_H", out_weight_H)
        self._keep("out_bias", out_bias.reshape(()))
        self.map_with(PackedLinear)

    @property
    def hidden_widths(self) -> list[int]:
        later = [getattr(self, f"hidden_weight_{i}").shape[0] for i in range(self._num_hidden)]
        return [self.num_units - 1, *later]

    @classmethod
    def take_own(cls, tensors: dict[str, Tensor]) -> dict[str, Any]:
        num_hidden = sum(name.startswith("hidden_weight_") for name in tensors)
        return {
            "out_weight_H": tensors.pop("out_weight_H"),
            "out_bias": tensors.pop("out_bias"),
            "hidden_weights": [tensors.pop(f"hidden_weight_{i}") for i in range(num_hidden)],
            "hidden_biases": [tensors.pop(f"hidden_bias_{i}") for i in range(num_hidden)],
        }

    def map_with(self, linear: MakeLinear) -> None:
        weights = [getattr(self, f"hidden_weight_{i}") for i in range(self._num_hidden)]
        biases = [getattr(self, f"hidden_bias_{i}") for i in range(self._num_hidden)]
        # In plain lists, since what these maps hold must not enter state_dict.
        self._forward_layers = [linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        self._backward_layers = [linear(weight.t(), None) for weight in weights]

    def readout(self, units_BU: Tensor) -> tuple[Tensor, Tensor]:
        linear_B, first_BH = units_BU[:, 0], units_BU[:, 1:]
        masks = [first_BH > 0]
        active_BH = first_BH * masks[0]
        for layer in self._forward_layers:
            pre_BH = layer(active_BH)
            masks.append(pre_BH > 0)
            active_BH = pre_BH * masks[-1]
        value_B = linear_B + (active_BH * self.out_weight_H).sum(dim=-1) + self.out_bias
        slope_BH = masks[-1] * self.out_weight_H
        for layer, mask_BH in zip(reversed(self._backward_layers), reversed(masks[:-1]), strict=True):
            slope_BH = layer(slope_BH) * mask_BH
        return value_B, torch.cat([torch.ones_like(linear_B)[:, None], slope_BH], dim=1)


HEAD_TYPES: dict[str, type[ValueHead]] = {head.type_name: head for head in (LinearHead, FieldHead, MLPHead)}


def head_from_tensors(type_name: str, tensors: dict[str, Tensor]) -> ValueHead:
    """The inverse of `state_dict` for a type in HEAD_TYPES. Raises HeadShapeError."""
    if type_name not in HEAD_TYPES:
        raise HeadShapeError(f"unknown head type {type_name!r}; known: {', '.join(sorted(HEAD_TYPES))}")
    rest = dict(tensors)
    try:
        reward = rest.pop("reward")
        arguments: dict[str, Any] = {
            name: rest.pop(name) for name in ("mean_D", "scale_D", "inputs_UD", "input_bias_U", "ascent_UD")
        }
        _check_shape("reward", reward, (2,))
        arguments |= {"reward_mean": float(reward[0]), "reward_scale": float(reward[1])}
        arguments |= HEAD_TYPES[type_name].take_own(rest)
    except KeyError as error:
        raise HeadShapeError(f"the {type_name} head lacks the tensor {error.args[0]!r}") from error
    if rest:
        raise HeadShapeError(f"the {type_name} head has tensors it does not use: {', '.join(sorted(rest))}")
    return HEAD_TYPES[type_name](**arguments)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise HeadShapeError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
