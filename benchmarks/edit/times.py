"""How long an edit takes on a device: by torch's operations, by the kernels, and by the kernels as a recorded graph.

What the same step takes without control is taken off. Enter at `measure`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.edit.cases import CASES, Case, Shape, Step

_WARM_UP = 3
_WARM_UP_ON_A_CPU = 1


def measure(shapes: Sequence[Shape], device: torch.device, *, repeats: int) -> dict[str, Any]:
    """Median ms of an edit for each case and number of rows; `recorded` on a GPU alone, None for what cannot be."""
    times: dict[str, Any] = {}
    for name, case in CASES.items():
        for shape in shapes:
            with torch.inference_mode():
                times.setdefault(name, {})[str(shape.rows)] = _times(shape, case, device, repeats)
    return times


def _times(shape: Shape, case: Case, device: torch.device, repeats: int) -> dict[str, float | None]:
    step = Step(shape, device, soft_cap=case.soft_cap)
    base_ms = _median_ms(step.edit, device, repeats)
    step.control(case.rows(shape.rows))
    is_fused = any(group.fixed_RW is not None for group in step.plan.groups)
    kernels_ms = _median_ms(step.edit, device, repeats)
    recorded_ms = _recorded_ms(step, device, repeats) if is_fused and device.type == "cuda" else None
    step.editor.without_kernels()
    step.control(case.rows(shape.rows))
    torch_ms = _median_ms(step.edit, device, repeats)
    return {
        "base_ms": base_ms, "torch_ms": torch_ms - base_ms, "kernels_ms": kernels_ms - base_ms,
        "recorded_ms": None if recorded_ms is None else recorded_ms,
    }  # fmt: skip


def _recorded_ms(step: Step, device: torch.device, repeats: int) -> float | None:
    """Replays of a step's graph, less those of a graph of the same step without control; None where rows change from
    token to token, which no graph of one token holds. Raises RuntimeError where a replay gives other logits."""
    if any(group.is_paced for group in step.plan.groups):
        return None
    controlled, plan = _graph(step), step.plan
    expected_BV, _ = step.edit()
    controlled[0].replay()
    if not torch.allclose(controlled[1], expected_BV, rtol=1e-4, atol=1e-4):
        raise RuntimeError("a recorded edit gave other logits than a plain one")
    step.control([])
    base = _graph(step)
    step.plan = plan
    return _median_ms(controlled[0].replay, device, repeats) - _median_ms(base[0].replay, device, repeats)


def _graph(step: Step) -> tuple[Any, torch.Tensor]:
    for _ in range(_WARM_UP):
        step.edit()
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits_BV, _ = step.edit()
    return graph, logits_BV


def _median_ms(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    for _ in range(_WARM_UP if device.type == "cuda" else _WARM_UP_ON_A_CPU):
        run()
    return statistics.median(_ms(run, device) for _ in range(repeats))


def _ms(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        started_s = time.perf_counter()
        run()
        return (time.perf_counter() - started_s) * 1e3
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started_s) * 1e3
