"""What is edited: rows under several kinds of control, over random heads and a random LM head of a given shape.

Knows nothing of counting or timing. Enter at `CASES` and `Step`.

Shapes: B rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from server.api.resolution import with_pinned
from server.control.editor import StateEditor
from server.control.group_edit import GroupStats
from server.control.params import ControlParams
from server.control.plan import EditPlan
from server.control.registry import HeadRegistry
from server.control.state import ControlState
from value_models.heads import FieldHead, LinearHead, MLPHead, ValueHead

NUM_LINEAR = 3
_WIDTH = 512
_FEATURES = 3
_SOFT_CAP = 30.0
_WEIGHTS = {f"linear-{i}": 1.0 for i in range(NUM_LINEAR)}
_PINNED = {f"pinned-{i}": 1.0 for i in range(NUM_LINEAR)}


@dataclass(slots=True, frozen=True)
class Case:
    """Row i is under what comes next of these controls, and round again; logits may be under a soft cap."""

    controls: tuple[ControlParams, ...]
    soft_cap: float | None = None

    def rows(self, num_rows: int) -> list[ControlParams]:
        return [self.controls[row % len(self.controls)] for row in range(num_rows)]


def _each(*asked: dict[str, Any], soft_cap: float | None = None) -> Case:
    return Case(tuple(ControlParams.model_validate(fields) for fields in asked), soft_cap)


def _over_pinned(asked: dict[str, Any], *, pinned: dict[str, Any]) -> Case:
    control = with_pinned(ControlParams.model_validate(asked), ControlParams.model_validate(pinned))
    assert control is not None
    return Case((control,))


def _one(name: str) -> dict[str, Any]:
    return {"objective": {"weights": {name: 1.0}}}


CASES: dict[str, Case] = {
    "one head": _each(_one("linear-0")),
    "three heads mixed": _each(*(_one(f"linear-{i}") for i in range(NUM_LINEAR)), {"objective": {"weights": _WEIGHTS}}),
    "worst case of three heads": _each({"objective": {"type": "worst_case", "weights": _WEIGHTS}}),
    "gate, window and a response's budget": _each(
        {
            **_one("linear-0"),
            "gate": {"head": "linear-1", "below": 0.5},
            "window": {"start": 0, "end": 200},
            "max_response_kl": 20.0,
        }
    ),
    "a head with a hidden layer": _each({**_one("deep"), "steps": 8}),
    "a head beside an instruction": _each(
        {"objective": {"type": "instruction", "text": "x", "weight": 0.5, "beside": {"weights": {"linear-0": 1.0}}}}
    ),
    "a head over a pinned one": _over_pinned(_one("linear-0"), pinned=_one("pinned-0")),
    "three heads over three pinned ones": _over_pinned(
        {"objective": {"weights": _WEIGHTS}}, pinned={"objective": {"weights": _PINNED}}
    ),
    "a field of three features": _each(_one("field")),
    "one head under a soft cap": _each(_one("linear-0"), soft_cap=_SOFT_CAP),
}


class PlainUnembedding:
    """An LM head of weights [V, D] without a bias, with or without a soft cap."""

    def __init__(self, weight_VD: Tensor, soft_cap: float | None) -> None:
        self._weight_VD = weight_VD
        self.is_linear, self.soft_cap = soft_cap is None, None if soft_cap is None else (soft_cap, soft_cap)

    def project(self, hidden_MD: Tensor) -> Tensor:
        return nn.functional.linear(hidden_MD.to(self._weight_VD.dtype), self._weight_VD)

    def finish(self, projected_MV: Tensor) -> Tensor:
        if self.soft_cap is None:
            return projected_MV
        width, height = self.soft_cap
        return height * torch.tanh(projected_MV / width)


@dataclass(slots=True, frozen=True)
class Shape:
    rows: int
    hidden: int
    vocabulary: int


class Step:
    """An editor and a step's states, on a device or, on `meta`, without values."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.bfloat16,
        soft_cap: float | None = None,
    ) -> None:
        rng = torch.Generator().manual_seed(0)
        on_host = "meta" if device.type == "meta" else "cpu"

        def normal(*size: int) -> Tensor:
            return torch.empty(size, device="meta") if on_host == "meta" else torch.randn(size, generator=rng)

        heads = {name: _linear(normal, shape.hidden) for name in (*_WEIGHTS, *_PINNED)}
        others = {"deep": _deep(normal, shape.hidden), "field": _field(normal, shape.hidden)}
        self.registry = HeadRegistry({**heads, **others})
        self.registry = HeadRegistry({name: _on(self.registry.head(name), device) for name in self.registry.names})
        weight_VD = (normal(shape.vocabulary, shape.hidden) / shape.hidden**0.5).to(device, dtype)
        self.editor = StateEditor(PlainUnembedding(weight_VD, soft_cap))
        self.hidden_BD = normal(shape.rows, shape.hidden).to(device, dtype)
        self._instructed = dict(enumerate(normal(shape.rows, shape.hidden).to(device, dtype)))
        self.plan = EditPlan(())

    def control(self, rows: Sequence[ControlParams]) -> None:
        self.plan = self.editor.plan(rows, self.registry, device=self.hidden_BD.device)

    def edit(self) -> tuple[Tensor, list[GroupStats]]:
        """One step's logits and report, conditions included."""
        plan = self.plan.at(lambda _: ControlState(num_tokens=3, nats_spent=0.5))
        return self.editor.logits(self.hidden_BD, plan, self._instructed)


def _linear(normal: Callable[..., Tensor], hidden: int) -> LinearHead:
    inputs_UD = normal(1, hidden) / hidden**0.5
    return LinearHead(
        mean_D=torch.zeros_like(inputs_UD[0]), scale_D=torch.ones_like(inputs_UD[0]), inputs_UD=inputs_UD,
        input_bias_U=torch.zeros_like(inputs_UD[:, 0]),
    )  # fmt: skip


def _deep(normal: Callable[..., Tensor], hidden: int) -> MLPHead:
    inputs_UD = normal(_WIDTH + 1, hidden) / hidden**0.5
    return MLPHead(
        mean_D=torch.zeros_like(inputs_UD[0]), scale_D=torch.ones_like(inputs_UD[0]), inputs_UD=inputs_UD,
        input_bias_U=torch.zeros_like(inputs_UD[:, 0]), out_weight_H=normal(_WIDTH), out_bias=normal(1)[0],
    )  # fmt: skip


def _field(normal: Callable[..., Tensor], hidden: int) -> FieldHead:
    inputs_UD = normal(_FEATURES + 1, hidden) / hidden**0.5
    return FieldHead(
        mean_D=torch.zeros_like(inputs_UD[0]), scale_D=torch.ones_like(inputs_UD[0]), inputs_UD=inputs_UD,
        input_bias_U=torch.zeros_like(inputs_UD[:, 0]), ascent_UD=normal(_FEATURES + 1, hidden) / hidden**0.5,
    )  # fmt: skip


def _on(head: ValueHead, device: torch.device) -> ValueHead:
    return head.to(device)
