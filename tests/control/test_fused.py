"""The kernels of a GPU's edit against torch's operations, by Triton's interpreter, or compiled where there is a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from server.control.editor import StateEditor
from server.control.params import ControlParams
from server.control.state import HELD_BY, ControlState, HeldBy
from server.control.turns import Turn
from tests.conftest import control, random_head
from tests.control.by_gpu_kernels import (
    HEADS,
    SOFT_CAP,
    Compared,
    Unembedding,
    asked,
    linear_head,
    objective,
    registry,
    states,
)

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("torch_judges")]
STRONG = {"step_size": 3.0, "max_shift": 2.0}
ROWS: dict[str, ControlParams] = {
    "one head": control({"a": 1.0}, max_kl=0.5),
    "one head that its budget holds": control({"a": 1.0}, max_kl=0.05, **STRONG),
    "a small budget of a long shift": control({"a": 1.0}, max_kl=0.002, step_size=10.0, steps=100, max_shift=2.0),
    "three heads": control({"a": 1.0, "b": -0.5, "c": 2.0}, max_kl=0.5),
    "three heads that their budget holds": control({"a": 1.0, "b": -0.5, "c": 2.0}, max_kl=0.1, **STRONG),
    "eight heads": control(dict.fromkeys(HEADS, 0.5), max_kl=0.5),
    "a cap on the shift": control({"b": 1.0}, max_shift=0.02, step_size=2.0, max_kl=0.5),
    "no steps": control({"a": 1.0}, steps=0),
    "no weight": control({"a": 0.0, "b": 0.0}),
    "worst of two": asked(**objective("worst_case", weights={"a": 1.0, "b": 2.0}), max_kl=0.5),
    "worst of three": asked(**objective("worst_case", weights={"a": 1.0, "b": -1.0, "c": 0.7}), max_kl=0.5),
    "worst of eight": asked(**objective("worst_case", weights=dict.fromkeys(HEADS, 1.0)), max_kl=0.5, **STRONG),
    "worst of one": asked(**objective("worst_case", weights={"c": 1.0}), max_kl=0.5),
    "one target": asked(**objective("target", values={"a": 0.4}), max_kl=0.5, **STRONG),
    "two targets": asked(**objective("target", values={"a": 0.4, "b": -1.0}), max_kl=0.5, **STRONG),
    "a floor": asked(**objective("floor", weights={"a": 1.0}, floors={"b": 0.5}), max_kl=0.5, step_size=0.5),
    "two floors": asked(
        **objective("floor", weights={"a": 1.0}, floors={"b": 0.5, "c": 0.1}), max_kl=0.5, step_size=0.5
    ),
    "a field": control({"f": 1.0}, max_kl=0.5, step_size=0.05),
    "a field that its budget holds": control({"f": -1.0}, max_kl=0.05, **STRONG),
    "a field with a cap on the shift": control({"g": 1.0}, max_shift=0.02, step_size=2.0, max_kl=0.5),
    "fields among heads": control({"a": 1.0, "f": 0.5, "b": -0.5, "g": 0.7}, max_kl=0.5, step_size=0.05),
    "worst of fields and a head": asked(
        **objective("worst_case", weights={"f": 1.0, "a": 2.0, "g": -1.0}), max_kl=0.5, step_size=0.05
    ),
    "targets of a field and a head": asked(**objective("target", values={"f": 0.4, "a": -0.2}), max_kl=0.5, **STRONG),
    "a field under a floor": asked(
        **objective("floor", weights={"a": 1.0}, floors={"f": 0.5}), max_kl=0.5, step_size=0.1
    ),
    "a gate on a field": control({"a": 1.0}, gate={"head": "g", "below": 0.3}),
    "a gate that is shut": control({"a": 1.0}, gate={"head": "b", "below": -1e6}),
    "a gate that is open": control({"a": 1.0}, gate={"head": "b", "below": 1e6}),
    "a gate on its own head": control({"a": 1.0}, gate={"head": "a", "above": 0.0, "hysteresis": 0.5}),
    "a window that is past": control({"a": 1.0}, window={"start": 1, "end": 2}),
    "a schedule at nothing": control({"a": 1.0}, schedule={"type": "linear", "tokens": 1, "to": 0.0}),
    "a guardrail of another head": control({"a": 1.0}, stop_below={"b": 0.0, "c": 0.0}, max_kl=0.5),
    "a retry that steps further": control(
        {"a": 1.0}, stop_below={"b": 0.0}, on_stop={"type": "retry", "step_growth": 2.0}, step_size=0.1, max_kl=0.5
    ).strengthened(3),
    "a floor that has tightened": asked(
        **objective("floor", weights={"a": 1.0}, floors={"b": 0.1}),
        max_kl=0.5,
        step_size=0.5,
        over_turns={"floors": {"b": {"tighten": 0.1, "to": 0.5}}},
    ).at_turn(Turn(3)),
    "a target beside an instruction of no weight": asked(
        **objective("instruction", text="x", weight=0.0, beside={"type": "target", "values": {"a": 0.4}}),
        max_kl=0.5,
        step_size=1.0,
    ),
    "a budget of the response": control({"a": 1.0}, max_response_kl=0.03, max_kl=0.5, **STRONG),
}


@pytest.mark.parametrize("name", ROWS)
def test_each_kind_of_row_is_edited_as_torch_edits_it(name: str, device: str) -> None:
    rows = [ROWS[name]] * 3
    compared = Compared(states(3, device), rows, registry(device))  # type: ignore[arg-type]
    assert compared.num_fused == 3
    compared.assert_alike()


def test_a_batch_of_all_kinds_and_of_rows_without_control_is_one_edit(device: str) -> None:
    rows = [None, *ROWS.values(), None, control({"a": -1.0})]
    compared = Compared(states(len(rows), device), rows, registry(device))
    compared.assert_alike()
    stays, stays_by_torch = (
        [torch.equal(*pair) for pair in zip(logits_BV, compared.base_BV, strict=True)]
        for logits_BV in (compared.logits_BV, compared.other_BV)
    )
    assert stays == stays_by_torch
    assert all(stays[row] for row, params in enumerate(rows) if params is None)
    assert not all(stays)


def test_a_batch_of_all_kinds_is_edited_as_torch_edits_it_under_a_soft_cap(device: str) -> None:
    rows = [None, *ROWS.values()]
    unembedding = Unembedding(device, vocab=600, soft_cap=SOFT_CAP)
    compared = Compared(states(len(rows), device), rows, registry(device), unembedding)
    assert compared.num_fused == len(ROWS)
    compared.assert_alike()
    assert torch.equal(compared.logits_BV[0], compared.base_BV[0])


def test_rows_without_control_and_null_controls_keep_the_base_models_logits_to_the_bit(device: str) -> None:
    rows = [None, ROWS["no steps"], ROWS["no weight"], ROWS["a gate that is shut"], control({"a": 1.0}), None]
    for dtype in (torch.float32, torch.bfloat16):
        compared = Compared(states(6, device), rows, registry(device), Unembedding(device, dtype))
        assert [torch.equal(a, b) for a, b in zip(compared.logits_BV, compared.base_BV, strict=True)] == [
            True, True, True, True, False, True,
        ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_logits_in_either_precision_are_edited_alike(device: str, dtype: torch.dtype) -> None:
    rows = [ROWS["three heads"], None, ROWS["one head that its budget holds"], ROWS["worst of three"]]
    Compared(states(4, device, dtype), rows, registry(device), Unembedding(device, dtype)).assert_alike()


def test_what_ascents_earn_weighs_the_worst_case_where_cards_tell_it(device: str) -> None:
    weighted = control({"a": 1.0, "b": 1.0, "c": 1.0}, max_kl=0.5)
    rows: list[ControlParams | None] = [ROWS["worst of two"], ROWS["worst of three"], weighted]
    rows.append(asked(**objective("worst_case", weights={"f": 1.0, "c": -1.0}), max_kl=0.5, step_size=0.05))
    gains = {"a": 0.05, "b": 0.2, "c": 0.1, "f": 0.15, "g": 0.3}
    telling, silent = (Compared(states(4, device), rows, registry(device, gains=g)) for g in (gains, None))
    telling.assert_alike()
    assert not torch.equal(telling.logits_BV[1], silent.logits_BV[1])
    assert not torch.equal(telling.logits_BV[3], silent.logits_BV[3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_edit_that_is_not_finite_is_counted_and_spares_the_others(device: str, bad: float) -> None:
    broken = linear_head(5)
    broken.ascent_UD.fill_(bad)
    heads = registry(device, broken=broken)
    rows = [control({"a": 1.0}), control({"broken": 1.0}), control({"a": 1.0, "broken": 1.0}), None]
    # As many rows, so that their vocabulary is split alike.
    compared, sound = (Compared(states(4, device), r, heads) for r in (rows, [rows[0], rows[0], rows[0], None]))
    assert [compared.numbers[row][1][-2] for row in range(3)] == [0.0, 1.0, 1.0]
    torch.testing.assert_close(compared.logits_BV[0], sound.logits_BV[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(compared.logits_BV[1:], compared.base_BV[1:])
    assert all(math.isfinite(number) for _, numbers in compared.numbers.values() for number in numbers[-5:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, torch.finfo(torch.float32).max])
def test_a_state_that_is_not_finite_is_left_alone_and_touches_no_neighbour(device: str, bad: float) -> None:
    hidden_BD, rows = states(3, device), [control({"a": 1.0, "b": 1.0})] * 3
    expected = Compared(hidden_BD, rows, registry(device))  # type: ignore[arg-type]
    hidden_BD[1] = bad
    compared = Compared(hidden_BD, rows, registry(device))  # type: ignore[arg-type]
    assert torch.equal(compared.logits_BV[[0, 2]], expected.logits_BV[[0, 2]])
    assert torch.equal(compared.logits_BV[1].nan_to_num(), compared.base_BV[1].nan_to_num())
    assert compared.numbers[1][1][-2] == 1.0


@pytest.mark.parametrize(("max_kl", "held"), [(0.0, HeldBy.MAX_KL), (math.inf, None)])
def test_no_budget_lets_nothing_move_and_an_unlimited_one_everything(
    device: str, max_kl: float, held: HeldBy | None
) -> None:
    params = control({"a": 1.0}, step_size=0.05, max_shift=2.0).model_copy(update={"max_kl": max_kl})
    compared = Compared(states(2, device), [params] * 2, registry(device))
    compared.assert_alike()
    assert torch.equal(compared.logits_BV, compared.base_BV) == (max_kl == 0)
    assert all(HELD_BY[int(numbers[-3])] == held for _, numbers in compared.numbers.values())


def test_what_a_row_remembers_gates_and_budgets_its_next_token(device: str) -> None:
    rows = [ROWS["a gate on its own head"], ROWS["a budget of the response"], ROWS["a window that is past"]]
    for state in (ControlState(1, 0.0, True), ControlState(5, 0.03, False), ControlState(3, 0.02, True)):
        compared = Compared(states(3, device), rows, registry(device), state_of=lambda _, state=state: state)  # type: ignore[misc]
        for row, (_, numbers) in compared.numbers.items():
            assert numbers[-3:] == compared.other[row][1][-3:]
            assert numbers[-5:-3] == pytest.approx(compared.other[row][1][-5:-3], rel=0.15, abs=1e-5)


def test_no_divergence_exceeds_its_budget_over_a_vocabulary_of_256_000(device: str) -> None:
    unembedding = Unembedding(device, vocab=256_000)
    budgets = [0.5, 0.01]
    rows = [control({"a": 1.0, "b": 1.0}, max_kl=budget, **STRONG) for budget in budgets]
    compared = Compared(states(2, device), rows, registry(device), unembedding)  # type: ignore[arg-type]
    for row, budget in enumerate(budgets):
        assert 0.9 * budget < compared.divergence(row) <= budget


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("max_kl", [1e-3, 0.1, 3.0])
def test_the_largest_scale_of_any_change_comes_near_its_budget_and_stays_within(
    device: str, spread: float, max_kl: float
) -> None:
    """Changes with long tails, and such that few tokens or one are all that moves."""
    from server.kernels.gpu.edit import EditKernels

    rng = torch.Generator().manual_seed(7)
    base_RV, delta_RV = 3 * torch.randn(12, 2000, generator=rng), torch.randn(12, 2000, generator=rng)
    delta_RV[4:8] = delta_RV[4:8] ** 3
    delta_RV[8:] *= torch.rand(4, 2000, generator=rng) < 0.002
    base_RV, delta_RV, limit_R = base_RV.to(device), spread * delta_RV.to(device), torch.full((12,), max_kl).to(device)
    scale_R, kl_R = EditKernels().largest_scales(base_RV, delta_RV, limit_R)
    log_base, log_moved = (x.double().log_softmax(-1) for x in (base_RV, base_RV + scale_R[:, None] * delta_RV))
    exact_R = (log_moved.exp() * (log_moved - log_base)).sum(-1)
    torch.testing.assert_close(kl_R.double(), exact_R, rtol=1e-3, atol=1e-5)
    assert ((scale_R == 1) | ((kl_R > 0.9 * max_kl) & (kl_R <= max_kl))).all()


def test_heads_with_hidden_layers_ascend_by_torch_and_are_budgeted_by_the_kernels(device: str) -> None:
    heads = registry(device, deep=random_head(1))
    rows = [control({"deep": 1.0}, max_kl=0.05, **STRONG), control({"a": 1.0}), control({"deep": 0.1, "a": 1.0})]
    compared = Compared(states(3, device), rows, heads)  # type: ignore[arg-type]
    assert compared.num_fused == 1
    compared.assert_alike()


def test_rows_that_follow_an_instruction_are_torchs_among_rows_of_the_kernels(device: str) -> None:
    guided = [
        asked(**objective("instruction", text="x", weight=weight, **beside), **more)
        for weight, beside, more in (
            (0.2, {}, {"max_kl": 0.5}), (2.0, {"beside": {"weights": {"a": 1.0}}}, {"max_kl": 0.05}),
            (-0.1, {"beside": {"type": "floor", "weights": {"a": 1.0}, "floors": {"b": 0.5}}}, {"max_kl": 0.5}),
            (0.1, {"beside": {"weights": {"a": 1.0}}}, {"gate": {"head": "b", "below": -1e6}}),
        )
    ]  # fmt: skip
    rows = [ROWS["one head"], *guided, None, ROWS["worst of three"]]
    behind = {row: states(20, device)[10 + row] for row in range(1, 5)}
    for dtype in (torch.float32, torch.bfloat16):
        compared = Compared(states(9, device), rows, registry(device), Unembedding(device, dtype), instructed=behind)
        assert compared.num_fused == 2
        compared.assert_alike()


def test_rows_that_draw_again_are_edited_as_they_are_among_the_others(device: str) -> None:
    """A guardrail has some rows of a step edited again, in a plan of their own, and then all of them at the next."""
    heads, editor = registry(device), StateEditor(Unembedding(device))
    hidden_BD, rows = states(4, device), [ROWS["one head"], ROWS["worst of three"], None, ROWS["three heads"]]
    alone = {}
    whole_BV, _ = editor.logits(hidden_BD, editor.plan(rows, heads, device=device))
    for again in ([1], [0, 3], [1, 2]):
        plan = editor.plan([rows[row] for row in again], heads, device=device)
        alone[tuple(again)], _ = editor.logits(hidden_BD[again], plan)
    for again, logits_BV in alone.items():
        torch.testing.assert_close(logits_BV, whole_BV[list(again)], rtol=1e-4, atol=1e-4)
    after_BV, _ = editor.logits(hidden_BD, editor.plan(rows, heads, device=device))
    assert torch.equal(after_BV, whole_BV)


def test_heads_that_come_and_go_find_their_place_in_the_bank(device: str) -> None:
    heads, unembedding = registry(device), Unembedding(device)
    editor, hidden_BD = StateEditor(unembedding), states(2, device)
    for names in (["b"], ["a", "b"], ["g", "a"], ["h1", "a"], ["c"], ["b", "c", "f"]):
        rows = [control(dict.fromkeys(names, 1.0)), control({names[0]: -1.0})]
        got, _ = editor.logits(hidden_BD, editor.plan(rows, heads, device=device))
        expected = Compared(hidden_BD, rows, heads, unembedding)  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected.logits_BV, rtol=1e-3, atol=1e-4)
