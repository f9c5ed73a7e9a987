"""Every objective and condition through the editor: what it reaches, never breaks, and never touches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from server.control.ascent import TOLERANCE, ascend
from server.control.editor import StateEditor
from server.control.group_edit import GroupStats
from server.control.params import ControlParams
from server.control.plan import EditPlan
from server.control.registry import HeadRegistry
from server.control.state import HELD_BY, ControlState
from tests.conftest import HIDDEN, card_of, random_head, random_linear_head
from tests.control.test_editor import EDITOR, UNEMBEDDING, LinearUnembedding
from value_models.linear import PackedLinear

HEADS = {
    "good": random_head(1),
    "deep": random_head(2, widths=(16, 12)),
    **{f"line{i}": random_linear_head(i) for i in (3, 4, 5)},
}
REGISTRY = HeadRegistry(HEADS)
GAINS = {"good": 0.02, "deep": 0.05, "line3": 0.01, "line4": 0.08, "line5": 0.03}
"""What cards say; `REGISTRY` has none."""
KNOWN = HeadRegistry(HEADS, {name: card_of(name, HEADS[name], ascent_gain=gain) for name, gain in GAINS.items()})
FREE = {"max_kl": 0.5, "max_shift": 2.0}
SUM = {"type": "weighted_sum", "weights": {"good": 1.0}}
OBJECTIVES: list[dict[str, Any]] = [
    SUM,
    {"weights": {"line3": -1.0, "line4": 0.5}},
    {"type": "worst_case", "weights": {"line3": 1.0, "line4": 1.0}},
    {"type": "worst_case", "weights": {"good": 1.0, "line4": -1.0, "deep": 0.5}},
    {"type": "target", "values": {"line3": 1.0}},
    {"type": "target", "values": {"good": 1.0, "line3": -0.5}},
    {"type": "floor", "weights": {"line3": 1.0}, "floors": {"line4": -0.2}},
    {"type": "floor", "weights": {"good": 1.0}, "floors": {"deep": 0.2, "line5": 0.1}},
]
CONDITIONS: list[dict[str, Any]] = [
    {},
    {"window": {"start": 2, "end": 6}},
    {"schedule": {"type": "linear", "tokens": 8, "to": 0.1}},
    {"gate": {"head": "deep", "below": 0.3, "hysteresis": 0.2}},
    {"gate": {"head": "line5", "above": 0.0}, "window": {"end": 4}, "schedule": {"type": "cosine", "tokens": 5}},
    {"max_response_kl": 0.6},
    {
        "max_response_kl": 0.1,
        "gate": {"head": "good", "below": 5.0},
        "schedule": {"type": "exponential", "half_life": 2},
    },
]


def params(objective: dict[str, Any], **options: Any) -> ControlParams:
    return ControlParams.model_validate({"objective": objective, **options})


def states(count: int, *, seed: int = 4, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def edited(hidden: Tensor, *rows: ControlParams | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and each head's values before and after, of rows that all have the same heads."""
    logits, (stats,) = EDITOR.logits(hidden, EditPlan.from_rows(rows, REGISTRY))
    return logits, {name: torch.stack([stats.values_before_RK[:, k], stats.values_after_RK[:, k]], dim=1)
                    for k, name in enumerate(stats.group.stack.names)}  # fmt: skip


def reasons(stats: GroupStats) -> list[str | None]:
    return [HELD_BY[code] for code in stats.held_by_R.tolist()]


@pytest.mark.parametrize("name", ["line3", "good", "deep"])
@pytest.mark.parametrize(
    "step", [{"step_size": 0.05, "steps": 100}, {"step_size": 0.5, "steps": 100}, {"step_size": 10.0}]
)
def test_a_target_is_reached_from_both_sides_and_not_passed(name: str, step: dict[str, Any]) -> None:
    hidden = states(40)
    level, scale = 0.6, REGISTRY.head(name).reward_scale
    target = {"type": "target", "values": {name: level}}
    _, values = edited(hidden, *[params(target, **step, **FREE)] * 40)
    before, after = values[name].unbind(dim=1)
    assert (before > level).any()
    assert (before < level).any()
    assert ((after - level) * (before - level).sign() >= -1.01 * TOLERANCE * scale).all()
    assert ((after - level).abs() <= (before - level).abs() + 1e-5).all()
    # Without a budget in the way, all but those that a hidden layer leaves without a way on come close.
    free = ControlParams.without_limits(
        params({"type": "target", "values": {name: level}}).objective, step_size=0.5, steps=100
    )
    _, values = edited(hidden, *[free] * 40)
    assert ((values[name][:, 1] - level).abs() <= 0.05 * scale).float().mean() > 0.9


def test_a_target_that_is_reached_needs_no_edit_and_says_so() -> None:
    hidden = states(2)
    now = REGISTRY.head("line3").value(hidden)
    rows = [params({"type": "target", "values": {"line3": float(value)}}) for value in now]
    logits, (stats,) = EDITOR.logits(hidden, EditPlan.from_rows(rows, REGISTRY))
    torch.testing.assert_close(logits, UNEMBEDDING.project(hidden), rtol=1e-5, atol=1e-5)
    assert reasons(stats) == ["target", "target"]


@pytest.mark.parametrize("heads", [("line3", "line4"), ("line3", "line4", "line5")])
def test_the_worst_of_linear_heads_is_raised_as_far_as_a_linear_program_says(heads: tuple[str, ...]) -> None:
    hidden, length, count = states(20, scale=0.3), 0.4, len(heads)
    objective = params({"type": "worst_case", "weights": dict.fromkeys(heads, 1.0)}).objective
    free = ControlParams.without_limits(objective, step_size=length / 10, steps=10)
    _, values = edited(hidden, *[free] * 20)
    stack = REGISTRY.stack(heads)
    moves = stack.gram(torch.eye(count))
    for i in range(20):
        before = [float(values[name][i, 0]) for name in heads]
        # Maximise m with m <= before_l + length * sum_k v_k moves_kl, sum(v) = 1, v >= 0.
        bounds = [[-length * float(moves[k, j]) for k in range(count)] + [1.0] for j in range(count)]
        best = linprog([0.0] * count + [-1.0], A_ub=bounds, b_ub=before, A_eq=[[1.0] * count + [0.0]], b_eq=[1.0],
                       bounds=[(0, None)] * count + [(None, None)])  # fmt: skip
        assert min(float(values[name][i, 1]) for name in heads) == pytest.approx(-best.fun, abs=1e-2)


@pytest.mark.parametrize("heads", [("line3", "line4"), ("line3", "line4", "line5")])
@pytest.mark.parametrize("length", [0.1, 3.0])
def test_where_cards_tell_what_ascents_earn_the_worst_reward_to_be_expected_is_raised_that_far(
    heads: tuple[str, ...], length: float
) -> None:
    """Reward l is expected at its value and length x sum_k v_k cos_kl earned_l, with earned = gain sqrt(0.1) 50."""
    hidden, count = states(20, scale=0.02), len(heads)
    objective = params({"type": "worst_case", "weights": dict.fromkeys(heads, 1.0)}).objective
    free = ControlParams.without_limits(objective, step_size=length / 10, steps=10)
    (group,) = EditPlan.from_rows([free] * 20, KNOWN).groups
    weights = ascend(hidden, group).coefficients_RU.double().numpy() / length
    rows = torch.nn.functional.normalize(torch.cat([HEADS[name].folded_ascent() for name in heads]))
    earnings = (rows @ rows.T * torch.tensor([GAINS[name] * 0.1**0.5 * 50 for name in heads])).double().numpy()
    before = group.stack.readout(group.stack.inputs(hidden))[0].double().numpy()
    for i in range(20):
        bounds = np.hstack([-length * earnings.T, np.ones((count, 1))])
        best = linprog([0.0] * count + [-1.0], A_ub=bounds, b_ub=before[i], A_eq=[[1.0] * count + [0.0]], b_eq=[1.0],
                       bounds=[(0, None)] * count + [(None, None)])  # fmt: skip
        assert (before[i] + length * weights[i] @ earnings).min() == pytest.approx(-best.fun, abs=1e-2)


def test_the_head_whose_ascent_earns_least_gets_the_largest_share() -> None:
    names = ("line3", "line4", "line5")
    row = params({"type": "worst_case", "weights": dict.fromkeys(names, 1.0)}, step_size=1.0)
    (group,) = EditPlan.from_rows([row, row], KNOWN).groups
    shares = ascend(states(2, scale=1e-3), group).coefficients_RU[0]
    assert shares[0] > 0.5 * shares.sum()
    # One head whose card does not tell, and all are weighed by their values.
    some = HeadRegistry(HEADS, {name: card for name, card in KNOWN.cards().items() if name != "line5"})
    (group,) = EditPlan.from_rows([row, row], some).groups
    (plain,) = EditPlan.from_rows([row, row], REGISTRY).groups
    assert torch.equal(ascend(states(2), group).shift_RD, ascend(states(2), plain).shift_RD)
    assert some.stack(names).earnings([torch.ones(2, 1)] * 3) is None


@pytest.mark.parametrize("objective", OBJECTIVES[6:])
@pytest.mark.parametrize("step", [{}, {"step_size": 1.0}, {"step_size": 10.0, "steps": 100}])
@pytest.mark.parametrize("max_kl", [0.05, 0.5])
def test_no_edit_takes_a_value_below_its_floor_or_further_below(
    objective: dict[str, Any], step: dict[str, Any], max_kl: float
) -> None:
    _, values = edited(states(60), *[params(objective, max_kl=max_kl, max_shift=2.0, **step)] * 60)
    for name, floor in objective["floors"].items():
        before, after = values[name].unbind(dim=1)
        scale = REGISTRY.head(name).reward_scale
        assert (after >= before.clamp(max=floor) - 1.01 * TOLERANCE * scale).all()
    (raised,) = objective["weights"]
    above = torch.stack([values[n][:, 0] > f for n, f in objective["floors"].items()]).all(dim=0)
    gain = values[raised][:, 1] - values[raised][:, 0]
    assert gain[above].mean() > 0


class Chain:
    """Two tokens move a state of two numbers, each read by a head: `up` raises the first, and `down` the second."""

    is_linear, soft_cap = True, None

    def __init__(self) -> None:
        self._linear = PackedLinear(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))

    def project(self, hidden_MD: Tensor) -> Tensor:
        return self._linear(hidden_MD)

    def finish(self, projected_MV: Tensor) -> Tensor:
        return projected_MV


def chain_registry() -> HeadRegistry:
    def reading(index: int, ascent: list[float]) -> Any:
        head = random_linear_head(0)
        return type(head)(mean_D=torch.zeros(2), scale_D=torch.ones(2), inputs_UD=torch.eye(2)[index : index + 1],
                          input_bias_U=torch.zeros(1), ascent_UD=torch.tensor([ascent]))  # fmt: skip

    return HeadRegistry({"first": reading(0, [1.0, -1.0]), "second": reading(1, [0.0, 1.0])})


def test_floors_hold_along_a_chain_whose_answer_is_known() -> None:
    """Raising `first` by a step of length s costs `second` s; with the floor f the step ends at
    first + s and max(second - s, min(f, second) + what the multiplier, at most 10 s, adds up to f)."""
    registry, editor = chain_registry(), StateEditor(Chain())
    size, floor = 0.1, -0.5
    row = params({"type": "floor", "weights": {"first": 1.0}, "floors": {"second": floor}},
                 step_size=size, steps=1, max_kl=0.5, max_shift=2.0)  # fmt: skip
    state, ends = torch.tensor([[1.0, 0.3]]), []
    for _ in range(40):
        logits, (stats,) = editor.logits(state.expand(2, -1).contiguous(), EditPlan.from_rows([row, None], registry))
        second = float(state[0, 1])
        expected = max(second - size, floor)
        assert stats.values_after_RK[0].tolist() == pytest.approx([float(state[0, 0]) + size, expected], abs=1e-5)
        held = "floor" if expected == floor else None
        assert reasons(stats)[0] == held
        ends.append(expected)
        # Always the token that raises the first number and lowers the second.
        assert logits[0, 0] > logits[0, 1]
        state = state + torch.tensor([[0.05, -0.05 if second > floor else 0.0]])
    assert min(ends) == floor


def test_conditions_hold_the_edit_and_are_named() -> None:
    hidden = states(8)
    options: list[dict[str, Any]] = [
        {"window": {"start": 3}},
        {"schedule": {"type": "linear", "tokens": 1}},
        {"gate": {"head": "good", "above": 1e5}},
        {"max_response_kl": 0.2},
        {"max_kl": 0.01},
        {"max_shift": 0.001, "max_kl": 0.5},
        {"step_size": 1e-4},
        {},
    ]
    rows = [params(SUM, **{"step_size": 0.5, **more}) for more in options]
    plan = EditPlan.from_rows(rows, REGISTRY).at(lambda _: ControlState(1, 0.15, is_gate_open=True))
    logits, (stats,) = EDITOR.logits(hidden, plan)
    base = UNEMBEDDING.project(hidden)
    assert reasons(stats)[:3] == ["window", "schedule", "gate"]
    assert torch.equal(logits[:3], base[:3])
    assert not stats.kl_R[:3].any()
    assert torch.equal(stats.values_before_RK[:3], stats.values_after_RK[:3])
    assert reasons(stats)[3:7] == ["max_response_kl", "max_kl", "max_shift", None]
    assert 0 < float(stats.kl_R[3]) <= 0.2 - 0.15


def test_conditions_at_full_strength_change_nothing() -> None:
    hidden = states(6)
    for objective in OBJECTIVES:
        loose = {"window": {"start": 0}, "schedule": {"type": "constant"}, "max_response_kl": 1e4}
        bare, some = (EditPlan.from_rows([params(objective, **more)] * 6, REGISTRY) for more in ({}, loose))
        # Rows that share a shift take it from a table; those with conditions do not.
        torch.testing.assert_close(EDITOR.logits(hidden, bare)[0], EDITOR.logits(hidden, some)[0], rtol=1e-2, atol=1e-2)


ROWS = st.lists(
    st.tuples(
        st.sampled_from([None, *OBJECTIVES]),
        st.sampled_from(CONDITIONS),
        st.sampled_from([0.0, 0.05, 1.0, 10.0]),
        st.sampled_from([0, 1, 7]),
        st.integers(0, 9),
        st.sampled_from([0.0, 0.3]),
        st.booleans(),
    ),
    min_size=2,
    max_size=9,
)


@settings(deadline=None, max_examples=60)
@given(
    rows=ROWS,
    seed=st.integers(0, 5),
    softcap=st.sampled_from([None, 5.0]),
    registry=st.sampled_from([REGISTRY, KNOWN]),
    order=st.randoms(),
)
def test_a_row_alone_and_in_any_mix_gets_the_same_bits_within_its_budget(
    rows: list[Any], seed: int, softcap: float | None, registry: HeadRegistry, order: Any
) -> None:
    unembedding = LinearUnembedding(softcap)
    editor, hidden = StateEditor(unembedding), states(len(rows), seed=seed)
    controls = [None if objective is None else params(objective, step_size=size, steps=steps, **more)
                for objective, more, size, steps, *_ in rows]  # fmt: skip
    known = [ControlState(token, spent, is_gate_open=is_open) for *_, token, spent, is_open in rows]

    def logits_of(chosen: list[int]) -> Tensor:
        plan = EditPlan.from_rows([controls[i] for i in chosen], registry)
        logits, _ = editor.logits(hidden[chosen], plan.at(lambda row: known[chosen[row]]))
        return logits

    whole = logits_of(list(range(len(rows))))
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    assert torch.equal(logits_of(shuffled), whole[shuffled])
    base = unembedding.finish(unembedding.project(hidden))
    for i, (control, state) in enumerate(zip(controls, known, strict=True)):
        assert torch.equal(logits_of([i, i])[0], whole[i])
        log_base, log_moved = base[i].double().log_softmax(-1), whole[i].double().log_softmax(-1)
        kl = float((log_moved.exp() * (log_moved - log_base)).sum())
        if control is None or control.steps == 0 or control.step_size == 0:
            assert torch.equal(whole[i], base[i])
        else:
            assert kl <= min(control.max_kl, max((control.max_response_kl or 1e9) - state.nats_spent, 1e-9))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("conditions", CONDITIONS)
def test_a_row_that_overflows_is_counted_and_spares_its_neighbours(
    objective: dict[str, Any], conditions: dict[str, Any]
) -> None:
    hidden = states(5)
    rows = [params(objective, **conditions)] * 5
    whole, _ = EDITOR.logits(hidden, EditPlan.from_rows(rows, REGISTRY))
    broken = hidden.clone()
    broken[2] = torch.finfo(torch.float32).max
    logits, (stats,) = EDITOR.logits(broken, EditPlan.from_rows(rows, REGISTRY))
    others = [0, 1, 3, 4]
    assert torch.equal(logits[others], whole[others])
    assert stats.is_nonfinite_R.tolist() == [i == 2 for i in range(5)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("objective", [
    {"type": "worst_case", "weights": {"good": 1.0, "broken": 1.0}},
    {"type": "target", "values": {"good": 0.0, "broken": 1.0}},
    {"type": "floor", "weights": {"good": 1.0}, "floors": {"broken": 1.0}},
])  # fmt: skip
def test_a_broken_head_leaves_its_rows_unedited_and_touches_no_neighbour(objective: dict[str, Any], bad: float) -> None:
    broken, hidden = random_head(5), states(4)
    broken.ascent_UD.fill_(bad)
    registry = REGISTRY.with_head("broken", broken)
    fine, other = params(OBJECTIVES[5]), params(objective)
    logits, stats = EDITOR.logits(hidden, EditPlan.from_rows([fine, other, fine, other], registry))
    alone, _ = EDITOR.logits(hidden, EditPlan.from_rows([fine, None, fine, None], registry))
    assert torch.equal(logits, alone)
    (group,) = [group for group in stats if "broken" in group.group.stack.names]
    assert group.is_nonfinite_R.all()
    assert reasons(group) == [None, None]


def test_a_row_whose_edit_a_hidden_layer_bends_out_of_bounds_is_dropped_and_says_why() -> None:
    """Along the straight way to where an ascent of many steps ends, a value may pass levels that the ascent kept."""
    hidden, count = states(400, seed=9), 0
    for objective in (OBJECTIVES[5], OBJECTIVES[7]):
        rows = [params(objective, step_size=1.0, steps=40, max_kl=0.02, max_shift=2.0)] * 400
        logits, (stats,) = EDITOR.logits(hidden, EditPlan.from_rows(rows, REGISTRY))
        held = reasons(stats)
        dropped = [i for i in range(400) if held[i] in ("target", "floor") and not stats.shift_ratio_R[i]]
        assert torch.equal(logits[dropped], UNEMBEDDING.project(hidden)[dropped])
        count += len(dropped)
    assert count > 0
