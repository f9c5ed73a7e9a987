"""Objectives and conditions over whole requests: alone as in a batch, and what they remember between tokens."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.control.params import ControlParams
from server.engines.embedded.core import EngineCore
from server.types import BrokenBound, FinishReason, GenerationRequest, SamplingParams, TokenEdit
from tests.conftest import Collected, run
from tests.engines.test_laws import CONTROLS, requests

BALANCED = {"type": "worst_case", "weights": {"good": 1.0, "line": -1.0}}
HELD = {"type": "floor", "weights": {"line": 1.0}, "floors": {"good": 0.5}}
STEERED = [
    ControlParams.model_validate(fields)
    for fields in (
        {"objective": {"weights": {"line": 1.0}}, "max_response_kl": 0.5, "step_size": 2.0},
        {"objective": {"weights": {"line": 1.0}}, "gate": {"head": "good", "below": 0.0, "hysteresis": 1.0}},
        {"objective": BALANCED, "schedule": {"type": "cosine", "tokens": 9}},
        {"objective": BALANCED, "window": {"start": 2, "end": 12}},
        {"objective": {"type": "target", "values": {"line": 0.5}}, "step_size": 1.0},
        {"objective": {"type": "target", "values": {"deep": 0.5}}, "gate": {"head": "line", "above": 0.0}},
        {"objective": HELD, "max_response_kl": 1.0, "step_size": 1.0},
        {"objective": HELD, "schedule": {"type": "exponential", "half_life": 3.0}, "window": {"end": 9}},
        {"objective": {"weights": {"line": 1.0}}, "stop_below": {"line": 8.0}},
    )
]


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    controls=st.lists(st.sampled_from([*CONTROLS, *STEERED]), min_size=2, max_size=11),
    seed=st.integers(0, 99),
    steps_between=st.integers(0, 3),
)
def test_alone_equals_in_a_batch_for_every_objective_and_condition(
    core: EngineCore, controls: list[ControlParams | None], seed: int, steps_between: int
) -> None:
    mixed = [replace(r, control=c) for r, c in zip(requests(len(controls), seed), controls, strict=True)]
    together = run(core, mixed, steps_between=steps_between)
    for request in mixed:
        for key, alone in run(core, [request]).items():
            assert [chunk.edit for chunk in alone.chunks] == [chunk.edit for chunk in together[key].chunks]
            assert alone.token_ids == together[key].token_ids


def edits_of(core: EngineCore, num_tokens: int, **fields: object) -> list[TokenEdit]:
    control = ControlParams.model_validate({"objective": {"weights": {"good": 1.0}}, "step_size": 2.0, **fields})
    sampling = SamplingParams(max_tokens=num_tokens, seed=3)
    chunks = run(core, [GenerationRequest("r", (1, 2, 3), sampling, control)])["r", 0].chunks
    return [chunk.edit for chunk in chunks if chunk.edit is not None]


def test_a_response_never_spends_more_than_its_budget(core: EngineCore) -> None:
    edits = edits_of(core, 40, max_response_kl=1.0, max_kl=0.2)
    spent = [edit.kl for edit in edits]
    assert 0.9 < sum(spent) <= 1.0
    assert all(kl <= 0.2 for kl in spent)
    assert [edit.held_by for edit in edits[-5:]] == ["max_response_kl"] * 5
    assert not any(spent[-5:])


def test_a_window_acts_on_its_tokens_alone(core: EngineCore) -> None:
    edits = edits_of(core, 12, window={"start": 3, "end": 7})
    assert [edit.shift_ratio > 0 for edit in edits] == [3 <= token < 7 for token in range(12)]
    assert [edit.held_by == "window" for edit in edits] == [not 3 <= token < 7 for token in range(12)]


def test_a_gate_remembers_for_its_own_sequence_that_it_is_open(core: EngineCore) -> None:
    gate = {"head": "line", "below": 10.0, "hysteresis": 6.0}
    edits, was_open, kept = edits_of(core, 60, gate=gate), False, 0
    for edit in edits:
        value = edit.value_before["line"]
        is_open = value < 10.0 or (was_open and value < 16.0)
        kept += is_open and value >= 10.0
        assert edit.is_gate_open == is_open
        assert (edit.held_by == "gate") == (not is_open)
        assert (edit.shift_ratio > 0) == is_open
        was_open = is_open
    assert kept > 0
    assert {edit.is_gate_open for edit in edits} == {True, False}


def test_a_summary_tells_what_held_control_back(core: EngineCore) -> None:
    steer = ControlParams.model_validate({"objective": BALANCED, "window": {"end": 4}, "max_kl": 0.01})
    result = run(core, [GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=8, seed=3), steer)])["r", 0]
    summary = result.chunks[-1].control
    assert summary is not None
    held = [chunk.edit.held_by for chunk in result.chunks if chunk.edit is not None]
    assert summary.held_share == {name: held.count(name) / 8 for name in held}
    assert summary.held_share["window"] == 0.5


def test_a_guardrail_ends_the_response_at_the_first_value_below_its_bound(core: EngineCore) -> None:
    def result_of(**fields: object) -> Collected:
        steer = ControlParams.model_validate({"objective": {"weights": {"good": 1.0}}, **fields})
        return run(core, [GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=60, seed=3), steer)])["r", 0]

    free = result_of(stop_below={"line": -1e5})
    values = [chunk.edit.value_after["line"] for chunk in free.chunks if chunk.edit is not None]
    bound = sorted(values[5:])[1]
    guarded = result_of(stop_below={"line": bound})
    last = next(i for i, value in enumerate(values) if value < bound)
    assert guarded.token_ids == free.token_ids[: last + 1]
    assert guarded.finish_reasons == [FinishReason.GUARDRAIL]
    summaries = [one.chunks[-1].control for one in (guarded, free)]
    assert [summary.stopped_by for summary in summaries] == [{"line": BrokenBound(values[last], bound)}, None]
    assert free.finish_reasons != guarded.finish_reasons
    assert free.text.startswith(guarded.text)
    assert core.status().kv_cache_usage == 0


def test_a_value_that_is_no_number_breaks_a_guardrail() -> None:
    guarded = ControlParams.model_validate({"objective": {"weights": {"good": 1.0}}, "stop_below": {"good": 0.0}})
    assert [guarded.breaks_guardrail({"good": value}) for value in (0.1, 0.0, -0.1, float("nan"))] == [
        False, False, True, True,
    ]  # fmt: skip
