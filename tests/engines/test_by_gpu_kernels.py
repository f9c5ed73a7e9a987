"""The embedded engine by a GPU's kernels, which Triton's interpreter runs: whole responses are those of a CPU's edit.

Budgets are wide here, since within them both give the same; what a budget cuts is in tests/control/test_fused.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from server.api.resolution import with_pinned
from server.control.params import ControlParams
from server.engines.embedded.core import EngineCore
from server.types import GenerationRequest, SamplingParams
from tests.conftest import Results, control, random_head, random_linear_head, run
from tests.triton_interpreter import quicken
from value_models.heads import ValueHead

pytestmark = pytest.mark.triton
MILD = {"step_size": 0.05, "max_kl": 0.5}
LINE = {"line": 1.0}


def steered(kind: str, **fields: Any) -> ControlParams:
    more = {name: fields.pop(name) for name in ("stop_below", "gate") if name in fields}
    return ControlParams.model_validate({"objective": {"type": kind, **fields}, **MILD, **more})


CONTROLS: dict[str, ControlParams | None] = {
    "none": None,
    "a head": control(LINE, **MILD),
    "worst of two": steered("worst_case", weights={"line": 1.0, "rule": -1.0}),
    "targets": steered("target", values={"line": 0.5, "rule": 0.0}),
    "a floor": steered("floor", weights=LINE, floors={"rule": 0.2}, gate={"head": "rule", "above": -0.5}),
    "paced": control(LINE, window={"start": 2}, schedule={"type": "linear", "tokens": 9, "to": 0.5},
                     max_response_kl=50.0, **MILD),
    "an instruction": steered("instruction", text="x", weight=0.3, beside={"weights": LINE}),
    "a hidden layer": control({"good": 1.0, "line": 0.5}, **MILD),
    "retries": control(LINE, stop_below={"rule": -0.8}, on_stop={"type": "retry", "step_growth": 1.5, "hold_tokens": 4},
                       **MILD),
    "a search": control(LINE, search={"type": "blocks", "candidates": 2, "block_tokens": 3}, **MILD),
    "over pinned control": with_pinned(control({"rule": 1.0}, **MILD), control(LINE, **MILD)),
}  # fmt: skip


@pytest.fixture
def heads() -> dict[str, ValueHead]:
    return {"line": random_linear_head(3), "rule": random_linear_head(4), "good": random_head(1)}


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """What follows is edited and drawn by them."""
    quicken(monkeypatch)
    with np.errstate(all="ignore"):
        yield lambda: monkeypatch.setenv("RECONTROL_KERNELS", "triton")


def requests() -> list[GenerationRequest]:
    prompt = (72, 101, 108, 108, 111)
    return [
        GenerationRequest(
            name, prompt, SamplingParams(max_tokens=12, seed=seed, top_p=0.95, ignore_eos=True, logprobs=2), steer,
            instructed_token_ids=(9, 8, *prompt) if steer is not None and steer.instruction is not None else (),
        )
        for seed, (name, steer) in enumerate(CONTROLS.items())
    ]  # fmt: skip


def values(results: Results, name: str) -> list[float]:
    edits = [chunk.edit for chunk in results[name, 0].chunks if chunk.edit is not None]
    return [value for edit in edits for value in (*edit.value_before.values(), *edit.value_after.values(), edit.kl)]


def logprobs(results: Results, name: str) -> list[float]:
    return [token.logprob for chunk in results[name, 0].chunks for token in chunk.logprobs or ()]


def test_responses_under_every_kind_of_control_are_those_of_a_cpus_edit(
    make_core: Callable[..., EngineCore], by_kernels: Callable[[], None]
) -> None:
    expected = run(make_core(), requests())
    by_kernels()
    core = make_core()
    got = run(core, requests(), steps_between=1)
    kernels = core.editor.kernels_on(torch.device("cpu"))
    assert kernels is not None
    assert kernels.num_launches > 0
    assert got.keys() == expected.keys()
    summary = expected["retries", 0].chunks[-1].control
    assert summary is not None
    assert summary.guardrail is not None
    assert summary.guardrail.retries > 0
    for name in CONTROLS:
        assert got[name, 0].token_ids == expected[name, 0].token_ids, name
        assert got[name, 0].finish_reasons == expected[name, 0].finish_reasons
        assert values(got, name) == pytest.approx(values(expected, name), rel=1e-3, abs=1e-3)
        assert len(logprobs(got, name)) == len(got[name, 0].token_ids)
        assert logprobs(got, name) == pytest.approx(logprobs(expected, name), abs=1e-3)
