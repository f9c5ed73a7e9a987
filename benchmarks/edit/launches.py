"""How many operations one edit launches on a GPU, counted without one: on tensors that have no values.

Such tensors take a GPU's way through the code. Counted is every operation of torch on them that computes or copies,
but none that only looks at memory otherwise or takes some, and every launch of a Triton kernel. Enter at `count`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.edit.cases import CASES, Case, Shape, Step

_TAKE_MEMORY = ("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh", "detach")
_META = torch.device("meta")


class Launched(TorchDispatchMode):
    """Counts while it is entered; tensors of a `device` other than "meta" stand for a GPU's, too."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.count = 0
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        is_view = any(given.alias_info is not None and not given.alias_info.is_write for given in func._schema.returns)
        if name == "to":  # It looks at the same memory only if that is as it is asked for.
            is_view = result is args[0]
        leaves = tree_leaves((args, kwargs, result))
        is_on_device = any(isinstance(leaf, Tensor) and leaf.device.type == self._device for leaf in leaves)
        if is_on_device and not is_view and name not in _TAKE_MEMORY:
            self.count += 1
        return result


def count(shape: Shape) -> dict[str, Any]:
    """For each case, what a step of this shape launches beyond the same step without control: by torch's operations
    alone, and with the kernels. RECONTROL_KERNELS=triton must be in the environment."""
    return {
        name: {"torch": beyond_base(shape, case, fuses=False), "kernels": beyond_base(shape, case, fuses=True)}
        for name, case in CASES.items()
    }


def table_rows(launches: Mapping[str, Any]) -> list[list[str]]:
    return [[name, str(each["torch"]), str(each["kernels"])] for name, each in launches.items()]


def beyond_base(shape: Shape, case: Case, *, fuses: bool) -> int:
    """The same for one case, by the kernels or by torch's operations alone."""
    with torch.inference_mode():
        step = Step(shape, _META, soft_cap=case.soft_cap)
        if not fuses:
            step.editor.without_kernels()
        base = _count(step)
        step.control(case.rows(shape.rows))
        step.edit()  # What is laid out once for a plan is not counted.
        return _count(step) - base


def _count(step: Step) -> int:
    kernels = step.editor.kernels_on(_META)
    before = kernels.num_launches if kernels is not None else 0
    with Launched() as launched:
        step.edit()
    return launched.count + (kernels.num_launches - before if kernels is not None else 0)
