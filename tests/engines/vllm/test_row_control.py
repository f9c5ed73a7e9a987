"""Control inside a vLLM worker, with a plain matrix in the place of vLLM's LM head."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.control import params as params_module
from server.control.editor import StateEditor
from server.control.params import ControlParams
from server.control.plan import EditPlan
from server.control.registry import HeadRegistry
from server.engines.edits import token_edit
from server.engines.embedded.model.lm_head import LMHead
from server.engines.vllm.row_control import Row, RowControl
from server.engines.vllm.unembedding import VllmUnembedding
from server.engines.vllm.wire import CONTROL_KEY, OPENING_KEY, control_args
from server.errors import ModelLoadError
from tests.conftest import HIDDEN, VOCAB, control, edited_states
from value_models.heads import ValueHead

GOOD = control({"good": 1.0}, step_size=2.0)
LINE = control({"line": 1.0}, step_size=0.5)
CONTROLS = [None, GOOD, None, LINE, control({"deep": -1.0, "line": 0.5}), None]


class Model(nn.Module):
    """The end of a model as vLLM has it: an LM head with perhaps a bias, a soft cap, and columns of padding."""

    def __init__(self, *, soft_cap: float | None = None, has_bias: bool = False, dtype: torch.dtype = torch.float32):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(HIDDEN, VOCAB + 6, bias=has_bias, dtype=dtype).requires_grad_(False)
        for parameter in self.linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
        if soft_cap is not None:
            self.processor = nn.Module()
            self.processor.soft_cap, self.processor.scale = soft_cap, 0.5  # type: ignore[assignment]

    def compute_logits(self, hidden_MD: Tensor) -> Tensor:
        logits_MV = self.linear(hidden_MD)[:, :VOCAB]
        if hasattr(self, "processor") and self.processor.soft_cap is not None:
            cap: Any = self.processor.soft_cap
            logits_MV = torch.tanh(logits_MV / cap) * cap * self.processor.scale
        return logits_MV


MODELS: dict[str, Callable[[], Model]] = {
    "linear": Model,
    "bfloat16": lambda: Model(dtype=torch.bfloat16),
    "capped": lambda: Model(soft_cap=3.0),
    "biased": lambda: Model(has_bias=True),
    "capped_and_biased": lambda: Model(soft_cap=3.0, has_bias=True),
}


def unembedding_of(model: Model) -> VllmUnembedding:
    return VllmUnembedding.of(model.compute_logits, model, HIDDEN, model.linear.weight.dtype, "cpu")


def states(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def rows_for(row_control: RowControl, controls: list[ControlParams | None], position: int = 0) -> list[Row | None]:
    for index, params in enumerate(controls):
        args = None if params is None else control_args(params, f"choice-{index}")
        row_control.add(f"r{index}", args, prompt_len=5)
    return [row_control.row(f"r{index}", 5 + position) for index in range(len(controls))]


@pytest.fixture
def registry(heads: dict[str, ValueHead]) -> HeadRegistry:
    return HeadRegistry(heads)


@pytest.mark.parametrize("name", MODELS)
def test_rows_without_control_have_the_bits_that_vllm_gives_them(name: str, registry: HeadRegistry) -> None:
    model = MODELS[name]()
    hidden_BD = states(6, model.linear.weight.dtype)
    plain_BV = model.compute_logits(hidden_BD).float()
    row_control = RowControl(registry, unembedding_of(model))
    logits_BV = row_control.logits(hidden_BD, rows_for(row_control, CONTROLS))
    for index, params in enumerate(CONTROLS):
        assert logits_BV[index].equal(plain_BV[index]) == (params is None)


@pytest.mark.parametrize("name", MODELS)
def test_a_controlled_rows_logits_are_those_of_its_edited_state_within_its_budget(
    name: str, registry: HeadRegistry
) -> None:
    model = MODELS[name]()
    hidden_BD = states(6, model.linear.weight.dtype)
    before_BD = hidden_BD.clone()
    unembedding = unembedding_of(model)
    row_control = RowControl(registry, unembedding)
    logits_BV = row_control.logits(hidden_BD, rows_for(row_control, CONTROLS))
    _, stats = StateEditor(unembedding).logits(hidden_BD.float(), EditPlan.from_rows(CONTROLS, registry))
    edited_BD = edited_states(hidden_BD.float(), stats)
    expected_BV = model.compute_logits(edited_BD.to(hidden_BD.dtype)).float()
    tolerance = 1e-4 if hidden_BD.dtype == torch.float32 else 0.2
    torch.testing.assert_close(logits_BV, expected_BV, atol=tolerance, rtol=tolerance / 4)
    assert hidden_BD.equal(before_BD)
    log_p, log_q = logits_BV.log_softmax(-1), model.compute_logits(hidden_BD).float().log_softmax(-1)
    assert ((log_p.exp() * (log_p - log_q)).sum(-1) <= 0.3 + 1e-4).all()


def test_an_edit_is_what_the_embedded_engines_editor_makes_of_it(registry: HeadRegistry) -> None:
    model = Model()
    linear = nn.Linear(HIDDEN, VOCAB, bias=False)
    linear.weight = nn.Parameter(model.linear.weight[:VOCAB], requires_grad=False)
    plan = EditPlan.from_rows(CONTROLS, registry)
    expected_BV, _ = StateEditor(LMHead(linear)).logits(states(6), plan)
    row_control = RowControl(registry, unembedding_of(model))
    logits_BV = row_control.logits(states(6), rows_for(row_control, CONTROLS))
    torch.testing.assert_close(logits_BV, expected_BV, atol=1e-4, rtol=1e-5)


def test_the_report_tells_each_controlled_rows_edit(registry: HeadRegistry) -> None:
    row_control = RowControl(registry, unembedding_of(Model()))
    row_control.logits(states(6), rows_for(row_control, CONTROLS))
    report = row_control.take_report()
    assert report is not None
    assert row_control.take_report() is None
    data = json.loads(json.dumps(report.as_plain_data()))
    assert sorted(data["edits"]) == ["r1", "r3", "r4"]
    assert data["edit_s"] > 0
    deep = CONTROLS[4]
    assert deep is not None
    edit = token_edit(deep.head_names, data["edits"]["r4"])
    assert list(edit.value_before) == list(edit.value_after) == ["deep", "line"]
    assert edit.value_before != edit.value_after
    assert 0 < edit.kl <= deep.max_kl
    assert edit.shift_ratio > 0
    assert (edit.is_nonfinite, edit.is_gate_open) == (False, True)


def test_a_row_does_not_depend_on_its_place_or_on_who_had_it_before(registry: HeadRegistry) -> None:
    hidden_BD = states(6)
    row_control = RowControl(registry, unembedding_of(Model()))
    rows = rows_for(row_control, CONTROLS)
    logits_BV = row_control.logits(hidden_BD, rows)
    order = [3, 0, 5, 1, 4, 2]
    moved_BV = row_control.logits(hidden_BD[order], [rows[index] for index in order])
    torch.testing.assert_close(moved_BV, logits_BV[order], atol=1e-5, rtol=1e-6)
    row_control.remove("r3")
    row_control.add("r3", None, prompt_len=5)
    assert row_control.row("r3", 5) is None


def run_tokens(row_control: RowControl, count: int, *, first: int = 0) -> list[list[float]]:
    """The edits of so many tokens of the one request, each drawn from another state."""
    edits = []
    for position in range(first, first + count):
        generator = torch.Generator().manual_seed(position)
        row_control.logits(torch.randn(1, HIDDEN, generator=generator), [Row("r0", position)])
        report = row_control.take_report()
        assert report is not None
        edits.append(report.resolve()["r0"])
    return edits


REMEMBERING = [
    control({"good": 1.0}, step_size=2.0, max_response_kl=0.7),
    ControlParams.model_validate(
        {"objective": {"weights": {"good": 1.0}}, "gate": {"head": "line", "below": 0.0, "hysteresis": 1.0},
         "window": {"start": 2}, "step_size": 2.0}
    ),
]  # fmt: skip


@pytest.mark.parametrize("params", REMEMBERING, ids=["budget", "gate"])
def test_tokens_that_are_drawn_again_after_a_preemption_are_edited_as_before(
    params: ControlParams, registry: HeadRegistry
) -> None:
    straight, preempted = (RowControl(registry, unembedding_of(Model())) for _ in range(2))
    for row_control in (straight, preempted):
        row_control.add("r0", control_args(params, "c"), prompt_len=3)
    expected = run_tokens(straight, 8)
    run_tokens(preempted, 5)
    # It lost its slot, comes back as a new request, and its last two tokens were thrown away.
    preempted.add("r0", control_args(params, "c"), prompt_len=3)
    assert run_tokens(preempted, 5, first=3) == expected[3:]


def test_the_budget_of_a_whole_response_is_kept(registry: HeadRegistry) -> None:
    row_control = RowControl(registry, unembedding_of(Model()))
    row_control.add("r0", control_args(REMEMBERING[0], "c"), prompt_len=3)
    spent = [numbers[-5] for numbers in run_tokens(row_control, 12)]
    assert 0.6 < sum(spent) <= 0.7
    assert spent[-1] == 0


def test_bad_control_and_unknown_heads_are_told_and_touch_nobody(registry: HeadRegistry) -> None:
    model = Model()
    row_control = RowControl(registry, unembedding_of(model))
    row_control.add("bad", {CONTROL_KEY: '{"objective": 7}'}, prompt_len=5)
    row_control.add("unknown", control_args(control({"nobody": 1.0}), "c"), prompt_len=5)
    row_control.add("fine", control_args(GOOD, "d"), prompt_len=5)
    row_control.add("begins", {**control_args(GOOD, "e"), OPENING_KEY: "nowhere"}, prompt_len=5)
    names = ("bad", "unknown", "begins", "fine")
    logits_BV = row_control.logits(states(4), [row_control.row(name, 5) for name in names])
    assert logits_BV[:3].equal(model.compute_logits(states(4))[:3])
    report = row_control.take_report()
    assert report is not None
    data = report.as_plain_data()
    assert list(data["edits"]) == ["fine"]
    assert "objective" in data["faults"]["bad"]
    assert "nobody" in data["faults"]["unknown"]
    assert "recontrol_opening: must be one of reasoning, answer, either" in data["faults"]["begins"]


def test_heads_of_many_units_are_not_used_together(registry: HeadRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params_module, "MAX_UNITS_PER_REQUEST", 1)
    row_control = RowControl(registry, unembedding_of(Model()))
    for name, asked in (("r0", LINE), ("r1", control({"line": 0.5, "good": 1.0}))):
        of_vllms_server = {CONTROL_KEY: control_args(asked, "")[CONTROL_KEY]}
        row_control.add(name, of_vllms_server, prompt_len=5)
    row_control.logits(states(2), [row_control.row(name, 5) for name in ("r0", "r1")])
    report = row_control.take_report()
    assert report is not None
    data = report.as_plain_data()
    assert list(data["edits"]) == ["r0"]
    assert "control.objective.weights: these heads have" in data["faults"]["r1"]


def test_a_head_that_goes_while_its_request_runs_ends_that_request_and_no_other(registry: HeadRegistry) -> None:
    model = Model()
    row_control = RowControl(registry, unembedding_of(model))
    rows = rows_for(row_control, [GOOD, None])
    row_control.use(HeadRegistry({}))
    logits_BV = row_control.logits(states(2), rows)
    assert logits_BV.equal(model.compute_logits(states(2)))
    report = row_control.take_report()
    assert report is not None
    assert list(report.as_plain_data()["faults"]) == ["r0"]


def test_logits_that_no_edit_can_move_are_refused_at_start() -> None:
    model = Model()
    with pytest.raises(ModelLoadError, match="not linear"):
        VllmUnembedding.of(
            lambda hidden_MD: model.compute_logits(hidden_MD).square(), model, HIDDEN, torch.float32, "cpu"
        )
