"""Recorded decode steps, on a CPU: recording is calling the function again, but buckets, padding and buffers are real.

On a real GPU: test_on_a_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from server.control.editor import StateEditor
from server.control.plan import EditPlan
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.graphs import DecodeGraphs, Replay
from server.engines.embedded.sampler import RowSampling, sample
from server.types import GenerationRequest, SamplingParams
from tests.conftest import control, random_head, random_linear_head, run


def record_by_calling(compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Replay]:
    states = compute()
    return states, lambda: states.copy_(compute())  # type: ignore[return-value]


def with_graphs(core: EngineCore, record: Callable = record_by_calling) -> EngineCore:
    core.runner.graphs = DecodeGraphs(core.runner._body.states, record)
    return core


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", "float32"), ("gemma2", "float32"), ("wide_llama", "bfloat16")]
)
def test_padding_to_a_bucket_changes_nothing(
    make_core: Callable[..., EngineCore], architecture: str, dtype: str
) -> None:
    requests = [
        GenerationRequest(
            f"r{i}", tuple(range(1, 4 + 20 * i)), SamplingParams(max_tokens=5 + 3 * i, seed=i),
            control({"good": 1.0}) if i % 2 else None,
        )
        for i in range(5)
    ]  # fmt: skip
    plain = run(make_core(architecture, dtype=dtype), requests)
    core = with_graphs(make_core(architecture, dtype=dtype))
    recorded = run(core, requests)
    assert {key: r.token_ids for key, r in recorded.items()} == {key: r.token_ids for key, r in plain.items()}
    buckets = core.runner.graphs._recorded
    assert set(buckets) <= {(rows, pages) for rows in (1, 2, 4, 8) for pages in (1, 2)}
    assert len(buckets) > 2


def test_candidates_that_end_at_different_steps_are_compared_by_their_own_states(
    make_core: Callable[..., EngineCore],
) -> None:
    """Each step's states come to the same place, where those of a candidate that waits for others are overwritten."""
    search = control({"good": 1.0}, search={"type": "blocks", "candidates": 4, "block_tokens": 12})
    often = {"max_tokens": 30, "logit_bias": {256: 4.5}}
    requests = [GenerationRequest(f"r{i}", (1, 2, i), SamplingParams(seed=i, **often), search) for i in range(6)]
    requests += [
        GenerationRequest(f"b{i}", (1, 2, i), SamplingParams(seed=i, **often), control({"good": 1.0}), best_of=4)
        for i in range(6)
    ]
    plain, recorded = run(make_core(), requests), run(with_graphs(make_core()), requests)
    assert {key: r.token_ids for key, r in recorded.items()} == {key: r.token_ids for key, r in plain.items()}


def test_each_bucket_is_recorded_once(make_core: Callable[..., EngineCore]) -> None:
    made = []

    def record(compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Replay]:
        made.append(compute)
        return record_by_calling(compute)

    core = with_graphs(make_core(), record)
    for seed in range(3):
        run(core, [GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=9, seed=seed))])
    assert len(made) == 1


def test_editing_and_drawing_never_wait_for_a_gpu() -> None:
    """On tensors without values, which take a GPU's way, anything that asks for one raises."""
    controls = [control({"good": 1.0}), None, control({"line": -1.0, "good": 0.5}), control({"line": 1.0})]
    rows = [RowSampling(1.0, 0.9, 0, (0, 0)), RowSampling(0.0, 1.0, 0, (0, 1)), RowSampling(0.7, 1.0, 5, (0, 2), 0.1)]
    rows.append(RowSampling(1.0, 1.0, 0, (0, 3)))
    with torch.inference_mode():
        registry = HeadRegistry({"good": random_head(1).to("meta"), "line": random_linear_head(3).to("meta")})
        plan = EditPlan.from_rows(controls, registry, device="meta")
        weight = torch.empty(258, 32, device="meta")
        logits, stats = StateEditor(_Plain(weight)).logits(torch.empty(4, 32, device="meta"), plan)
        tokens = sample(logits, rows, [0, 1, 2, 3])
    assert tokens.shape == (4,)
    assert len(stats) == 3


class _Plain:
    """An unembedding without a bias."""

    is_linear, soft_cap = True, None

    def __init__(self, weight_VD: torch.Tensor) -> None:
        self._weight_VD = weight_VD

    def project(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        return hidden_MD @ self._weight_VD.T

    def finish(self, projected_MV: torch.Tensor) -> torch.Tensor:
        return projected_MV
