"""Which rows the kernels of a GPU's edit take, and that every other kind falls to torch's operations.

Plans are made on `meta`, where neither a GPU nor Triton is needed; what the kernels do is in test_fused.py.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch

from server.api.resolution import with_pinned
from server.control.budget import ROUNDING_NATS
from server.control.editor import StateEditor
from server.control.fused import _entries, _table
from server.control.objectives import Objective, WeightedSum
from server.control.params import ControlParams
from server.control.plan import EditGroup, EditPlan, GateRows
from server.control.registry import HeadRegistry
from server.control.state import HELD_BY, ControlState, HeldBy
from server.kernels.gpu import layout
from tests.conftest import control, random_field_head, random_head, random_linear_head
from tests.control.test_editor import LinearUnembedding

NAMES = ("a", "b", "c")
HEADS = {
    **{name: random_linear_head(seed) for seed, name in enumerate(NAMES)},
    **{f"field-{count}": random_field_head(count, num_features=count) for count in (2, 6, 7)},
    "deep": random_head(9),
}
REGISTRY = HeadRegistry({name: head.to("meta") for name, head in HEADS.items()})
BOUNDS = {"a": 0.0}
OBJECTIVES: dict[str, tuple[dict[str, Any], bool]] = {
    "weighted_sum": ({"weights": {"a": 1.0}}, True),
    "worst_case": ({"weights": {"a": 1.0, "b": 1.0}}, True),
    "target": ({"values": {"a": 0.5}}, True),
    "floor": ({"weights": {"a": 1.0}, "floors": {"b": 0.5}}, True),
    "instruction": ({"text": "Be brief."}, False),
}
"""An example of each, and whether the kernels know it."""


@pytest.fixture(autouse=True)
def _by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONTROL_KERNELS", "triton")


def planned(*rows: ControlParams | None, softcap: float | None = None) -> tuple[EditGroup, ...]:
    return StateEditor(LinearUnembedding(softcap)).plan(rows, REGISTRY, device="meta").groups


def is_fused(steer: ControlParams | None, *, softcap: float | None = None) -> bool:
    (group,) = planned(steer, softcap=softcap)
    return group.fixed_RW is not None


def following(weight: float, beside: dict[str, Any] | None = None, **more: Any) -> ControlParams:
    objective = {"type": "instruction", "text": "Be brief.", "weight": weight, "beside": beside}
    return ControlParams.model_validate({"objective": objective, **more})


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_each_objective_is_known_to_the_kernels_or_left_to_torch(kind: str) -> None:
    objective, is_known = OBJECTIVES[kind]
    assert is_fused(ControlParams.model_validate({"objective": {"type": kind, **objective}})) == is_known


def test_every_objective_that_there_is_has_been_thought_of() -> None:
    types = get_args(get_args(Objective)[0])
    assert {kind for each in types for kind in get_args(each.model_fields["type"].annotation)} == OBJECTIVES.keys()


def test_an_objective_that_the_kernels_do_not_know_falls_to_torch_even_if_it_is_much_like_one() -> None:
    class Sharpened(WeightedSum):
        """Of some later day."""

    later = control({"a": 1.0}).model_copy(update={"objective": Sharpened(weights={"a": 1.0})})
    assert is_fused(control({"a": 1.0}))
    assert not is_fused(later)
    assert not is_fused(later.model_copy(update={"objective": following(1.0, {"weights": {"a": 1.0}}).objective}))


@pytest.mark.parametrize(
    ("steer", "expected"),
    [
        (following(1.0, {"weights": {"a": 1.0}}), False),
        (following(0.0, {"weights": {"a": 1.0}}), True),
        (following(0.0, {"type": "target", "values": {"a": 1.0}}), True),
        (following(0.0, {"weights": {"a": 1.0}}, steps=0), True),
        (following(0.0), False),
        (following(1.0, steps=0), False),
    ],
    ids=["it acts", "weighs nothing", "weighs nothing beside a target", "no steps", "alone", "alone without steps"],
)
def test_an_instruction_that_acts_is_torchs_and_heads_beside_one_that_does_not_are_the_kernels(
    steer: ControlParams, expected: bool
) -> None:
    assert is_fused(steer) == expected


@pytest.mark.parametrize(
    "steer",
    [
        control({"deep": 1.0}),
        with_pinned(control({"deep": 1.0}), control({"b": 1.0})),
        with_pinned(control({"a": 1.0}), control({"deep": 1.0})),
        control({"a": 1.0, "deep": 1.0}),
        control({"a": 1.0}, gate={"head": "deep", "below": 0.0}),
        control({"a": 1.0}, stop_below={"deep": 0.0}),
    ],
    ids=[
        "a hidden layer",
        "one over pinned control",
        "a pinned one",
        "one among others",
        "a gate of one",
        "a guardrail of one",
    ],
)
def test_rows_of_a_head_with_a_hidden_layer_are_torchs(steer: ControlParams | None) -> None:
    assert not is_fused(steer)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("field-7",), True),
        (("a", "field-2", "b"), True),
        (("a", "field-6", "field-7"), True),
        (("a", "b", "field-6", "field-7"), False),
    ],
)
def test_fields_are_the_kernels_as_long_as_a_row_has_room_for_their_units(
    names: tuple[str, ...], expected: bool
) -> None:
    assert is_fused(control(dict.fromkeys(names, 1.0))) == expected


def test_a_row_with_a_field_has_the_values_of_its_heads_first_and_then_the_features() -> None:
    (group,) = planned(control({"a": 1.0, "field-2": 2.0, "b": 3.0}))
    row = _table(group, [4, 5, 6, 7, 8])[0].tolist()
    assert (row[layout.COUNT], row[layout.NUM_UNITS]) == (3.0, 5.0)
    field = group.stack.names.index("field-2")
    assert row[layout.LEADERS : layout.LEADERS + 5] == [0.0, 1.0, 2.0, field, field]


def test_a_model_with_a_soft_cap_is_the_kernels_if_they_know_all_that_becomes_of_its_logits() -> None:
    assert is_fused(control({"a": 1.0}), softcap=5.0)
    unembedding = LinearUnembedding(5.0)
    unembedding.soft_cap = None
    (group,) = StateEditor(unembedding).plan([control({"a": 1.0})], REGISTRY, device="meta").groups
    assert group.fixed_RW is None


def test_kinds_in_one_step_are_groups_of_their_own_and_no_row_is_missed() -> None:
    rows = [
        control({"a": 1.0}), following(1.0, {"weights": {"a": 1.0}}), control({"a": -1.0}, stop_below=BOUNDS),
        with_pinned(control({"b": 1.0}), control({"a": 1.0})), following(0.0, {"weights": {"a": 1.0}}),
    ]  # fmt: skip
    told = {group.rows: group.fixed_RW is not None for group in planned(*rows)}
    assert told == {(0, 2, 4): True, (1,): False, (3,): True}


def test_told_to_do_without_kernels_a_plan_has_none() -> None:
    (group,) = EditPlan.from_rows([control({"a": 1.0})], REGISTRY, device="meta").groups
    assert group.fixed_RW is None


def test_whatever_changes_an_edit_is_in_the_table_or_keeps_a_row_out_of_it() -> None:
    """A field that is new fails here until somebody has thought of it."""
    edits = {"objective", "step_size", "steps", "max_kl", "max_shift", "max_response_kl", "gate", "window", "schedule"}
    engines = {"phase", "in_calls", "stop_below", "on_stop", "search", "trace", "over_turns"}
    assert ControlParams.model_fields.keys() == edits | engines
    in_table = {"stack", "controls", "fixed_RW", "rows_R", "step_size_R", "steps_R", "max_kl_R", "gates", "held_R",
                "kl_held_R"}  # fmt: skip
    fixed = {"weights_RK", "objectives", "max_shift_R"}
    keeps_out = {"guidance_R", "factors"}
    over_pinned = {"pinned", "beneath"}
    of_plans = {"rows", "max_steps", "is_paced"}
    assert {field.name for field in fields(EditGroup)} == in_table | fixed | keeps_out | over_pinned | of_plans
    gates = {"head_R", "level_R", "side_R", "hysteresis_R", "is_gated_R", "was_open_R"}
    assert {field.name for field in fields(GateRows)} == gates


def test_a_rows_table_says_what_it_asks_for_now() -> None:
    gate = {"head": "b", "above": 0.25, "hysteresis": 0.5}
    steer = control({"a": 1.5}, steps=4, step_size=0.5, max_shift=0.75, max_kl=0.25, max_response_kl=1.0, gate=gate)
    (group,) = planned(steer, control({"b": -2.0, "a": 0.0}))
    row, other = _table(group.at(lambda _: ControlState(3, 0.875, True)), [7, 9]).tolist()
    assert row[layout.COUNT] == 2.0
    assert row[layout.PLACES : layout.PLACES + 2] == [7.0, 9.0]
    assert (row[layout.NUM_UNITS], row[layout.LEADERS : layout.LEADERS + 2]) == (2.0, [0.0, 1.0])
    assert row[layout.WEIGHTS : layout.WEIGHTS + 2] == [1.5, 0.0]
    assert (row[layout.SIZE], row[layout.MAX_SHIFT]) == (2.0, 0.75)
    assert row[layout.LIMIT] == pytest.approx(0.125 - ROUNDING_NATS)
    assert HELD_BY[int(row[layout.KL_HELD])] == HeldBy.MAX_RESPONSE_KL
    assert row[layout.GATE_SLOT : layout.WAS_OPEN + 1] == [1.0, 0.25, -1.0, 0.5, 1.0, 1.0]
    assert (other[layout.ROW], other[layout.IS_GATED], HELD_BY[int(other[layout.KL_HELD])]) == (1.0, 0.0, HeldBy.MAX_KL)


def test_a_row_over_pinned_control_has_an_entry_for_what_is_pinned_and_one_for_what_is_added() -> None:
    pinned = control({"b": -2.0, "c": 0.0}, steps=2, step_size=0.25, max_kl=0.125, stop_below={"c": 0.5})
    over = with_pinned(control({"a": 0.5}, steps=1, step_size=3.0, max_kl=0.25, stop_below={"a": 9.0}), pinned)
    groups = planned(control({"a": 1.0}), over, None, over)
    entries, num_beside = _entries(groups, {group.stack: [4, 5, 6] for group in groups})
    plain, first, second, *callers = entries.tolist()
    assert (len(callers), num_beside) == (2, 2)
    assert [row[layout.BESIDE] for row in (plain, first, second, *callers)] == [-1.0, 3.0, 4.0, 1.0, 2.0]
    assert [row[layout.ROW] for row in (first, second, *callers)] == [1.0, 3.0, 1.0, 3.0]
    weights, marks, levels = (slice(place, place + 3) for place in (layout.WEIGHTS, layout.MARKED, layout.LEVELS))
    assert (first[weights], first[layout.SIZE]) == ([0.0, -2.0, 0.0], 0.5)
    assert first[layout.LIMIT] == pytest.approx(0.125 - ROUNDING_NATS)
    (theirs, _) = callers
    assert (theirs[weights], theirs[layout.SIZE]) == ([0.5, 0.0, 0.0], 3.0)
    assert theirs[layout.LIMIT] == pytest.approx(0.25 - ROUNDING_NATS)
    assert (theirs[marks], theirs[levels]) == ([0.0, -1.0, 0.0], [-math.inf, -math.inf, 0.5])


def test_a_row_without_steps_has_none_in_the_table_however_long_they_were() -> None:
    endless = ControlParams.without_limits(WeightedSum(weights={"a": 0.0}), step_size=3e38, steps=100)
    (group,) = planned(endless)
    assert _table(group, [0])[0, layout.SIZE] == 0.0


def test_what_kernels_are_told_lies_on_the_host_until_it_travels_together() -> None:
    over = with_pinned(control({"a": 1.0}), control({"b": 1.0}, window={"start": 2}))
    tensors = [
        getattr(part, field.name)
        for group in planned(control({"a": 1.0}), control({"a": 1.0}, window={"start": 2}), over)
        for part in (group, group.pinned)
        if part is not None
        for field in fields(part)
    ]
    assert {tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)} == {"cpu"}
