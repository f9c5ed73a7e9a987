"""Objectives as functions of values: scores, slopes, and the weights of a step that ends where they want it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy.optimize import LinearConstraint, linprog, minimize
from torch import Tensor

from server.control.multipliers import predicted_change
from server.control.objective_rows import ObjectiveRows
from server.control.objectives import BaseObjective, Objective, Target, Terms, WeightedSum, WorstCase

NAMES = ("a", "b", "c")
MEAN, SCALE = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([2.0, 0.5, 1.0])
parse = TypeAdapter(Objective).validate_python
OBJECTIVES = {
    "weighted_sum": parse({"weights": {"b": -0.5, "a": 2.0}}),
    "worst_case": parse({"type": "worst_case", "weights": {"a": 1.0, "b": -2.0, "c": 0.5}}),
    "worst_of_two": parse({"type": "worst_case", "weights": {"a": 1.0, "c": 1.0}}),
    "target": parse({"type": "target", "values": {"b": -0.8}}),
    "targets": parse({"type": "target", "values": {"b": -0.8, "a": 1.5}}),
    "floor": parse({"type": "floor", "weights": {"a": 1.0}, "floors": {"b": -1.2, "c": 0.3}}),
}


def terms_of(objective: BaseObjective, names: tuple[str, ...] = NAMES) -> Terms:
    return Terms.of([objective], names, MEAN[: len(names)], SCALE[: len(names)])  # type: ignore[list-item]


def rows_of(*objectives: BaseObjective) -> ObjectiveRows:
    return ObjectiveRows.of(objectives, NAMES, MEAN, SCALE)  # type: ignore[arg-type]


def effects(num_rows: int, *, seed: int = 0, is_symmetric: bool = True) -> Tensor:
    """How heads move each other's values: as inner products of random directions, or those and something on top."""
    rng = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_rows, 3, 5, generator=rng)
    gram = directions @ directions.transpose(1, 2) / 5
    return gram if is_symmetric else gram + 0.2 * torch.randn(num_rows, 3, 3, generator=rng)


def values_of(num_rows: int, seed: int = 1) -> Tensor:
    return torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_slope_is_autograd_of_the_score(name: str) -> None:
    objective, values = OBJECTIVES[name], values_of(50).requires_grad_()
    objective.score(values, terms_of(objective)).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(objective.slope(values, terms_of(objective)).expand(50, 3), values.grad)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_no_length_takes_the_slope(name: str) -> None:
    objective, values = OBJECTIVES[name], values_of(50)
    weights = rows_of(*[objective] * 50).step_weights(values, effects(50), torch.full((50,), 1e-6))
    slope = objective.slope(values, terms_of(objective)).expand(50, 3)
    # A floor that is met but for rounding may have its weight split.
    assert ((weights - slope).abs().amax(dim=1) < 1e-3).float().mean() > 0.95


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_uphill_never_lowers_the_score(name: str) -> None:
    objective, values = OBJECTIVES[name], values_of(200)
    for size in (0.01, 0.3, 2.0, 50.0):
        size_R, moves = torch.full((200,), size), effects(200)
        weights = rows_of(*[objective] * 200).step_weights(values, moves, size_R)
        after = values + predicted_change(moves, size_R, weights)
        gain = objective.score(after, terms_of(objective)) - objective.score(values, terms_of(objective))
        assert (gain >= -1e-4 * max(size, 1.0)).all()


def test_the_worst_case_is_the_quadratic_program_over_the_simplex() -> None:
    objective, values, moves = OBJECTIVES["worst_case"], values_of(40), effects(40)
    signs = torch.tensor([1.0, -2.0, 0.5])
    for size in (0.1, 1.0, 5.0):
        weights = rows_of(*[objective] * 40).step_weights(values, moves, torch.full((40,), size))
        for i in range(40):
            signed = (values[i] * signs).double().numpy()
            matrix = (signs[:, None] * moves[i] * signs[None, :]).double().numpy()

            def dual(v, signed=signed, matrix=matrix, size=size):
                return v @ signed + size / 2 * v @ matrix @ v

            best = minimize(dual, [1 / 3] * 3, bounds=[(0, 1)] * 3, method="SLSQP", options={"ftol": 1e-14},
                            constraints=LinearConstraint([[1, 1, 1]], 1, 1))  # fmt: skip
            mixture = (weights[i] / signs).double().numpy()
            assert mixture.min() >= 0
            assert mixture.sum() == pytest.approx(1, abs=1e-5)
            assert dual(mixture) <= best.fun + 1e-3 * max(1, abs(best.fun))


def test_two_heads_that_can_be_balanced_end_the_step_level() -> None:
    moves = torch.diag(torch.tensor([0.5, 0.3, 0.2])).expand(1, 3, 3)
    objective = WorstCase(type="worst_case", weights={"a": 1.0, "b": 1.0})
    values, size = torch.tensor([[0.0, 0.2, 9.0]]), torch.tensor([2.0])
    weights = rows_of(objective).step_weights(values, moves, size)
    after = values + predicted_change(moves, size, weights)
    assert after[0, 0].item() == pytest.approx(after[0, 1].item(), abs=1e-5)
    # Of all mixtures, as a linear program says: maximise m with m <= value_l + size * effect_l v_l, sum(v) = 1.
    best = linprog([0, 0, -1], A_ub=[[-1.0, 0, 1], [0, -0.6, 1]], b_ub=[0.0, 0.2], A_eq=[[1, 1, 0]], b_eq=[1],
                   bounds=[(0, None), (0, None), (None, None)])  # fmt: skip
    assert after[0, 0].item() == pytest.approx(-best.fun, abs=1e-5)


def test_the_worst_case_of_one_head_is_its_weighted_sum() -> None:
    one = WorstCase(type="worst_case", weights={"b": -3.0})
    weights = rows_of(one).step_weights(values_of(1), effects(1), torch.ones(1))
    assert weights.tolist() == [[0.0, -3.0, 0.0]]


@pytest.mark.parametrize("gap", [-3.0, -0.4, -1e-3, 0.0, 1e-3, 0.4, 3.0])
def test_a_target_is_approached_from_either_side_and_never_passed(gap: float) -> None:
    objective, level = Target(type="target", values={"b": 0.0}), (0.0 - -1.0) / 0.5
    values = torch.tensor([[0.3, level + gap, 0.0]])
    moves = effects(1, is_symmetric=False)
    moves[0, 1, 1] = 0.7
    for size in (1e-3, 0.1, 1.0, 1000.0):
        weights = rows_of(objective).step_weights(values, moves, torch.tensor([size]))
        left = float((values + predicted_change(moves, torch.tensor([size]), weights))[0, 1]) - level
        assert left * gap >= -1e-4
        assert abs(left) == pytest.approx(max(abs(gap) - 0.7 * size, 0), abs=1e-3)
        assert weights[0, [0, 2]].tolist() == [0.0, 0.0]


def test_floors_cost_no_more_than_they_must() -> None:
    """Raising a by 1 lowers b by 0.5; b's own ascent raises b by 1 and leaves a alone."""
    moves = torch.tensor([[[1.0, -0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    objective = parse({"type": "floor", "weights": {"a": 1.0}, "floors": {"b": -1.0}})
    floor = 0.0
    for start, multiplier in ((2.0, 0.0), (0.5, 0.0), (0.2, 0.3), (0.0, 0.5), (-1.0, 1.5)):
        values = torch.tensor([[0.0, floor + start, 0.0]])
        weights = rows_of(objective).step_weights(values, moves, torch.ones(1))
        assert weights[0].tolist() == pytest.approx([1.0, multiplier, 0.0], abs=1e-6)


NUMBERS = st.floats(-4, 4, width=32)
MATRICES = st.lists(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=3, max_size=3)


@settings(deadline=None, max_examples=150)
@given(values=st.lists(NUMBERS, min_size=3, max_size=3), rows=MATRICES, size=st.sampled_from([0.0, 0.01, 1.0, 100.0]))
def test_no_step_leaves_the_bounds_however_heads_move_each_other(
    values: list[float], rows: list[list[float]], size: float
) -> None:
    for name in ("target", "targets", "floor"):
        objective, values_RK, moves = OBJECTIVES[name], torch.tensor([values]), torch.tensor([rows])
        size_R = torch.tensor([size])
        weights = rows_of(objective).step_weights(values_RK, moves, size_R)
        assert weights.isfinite().all()
        after = values_RK + predicted_change(moves, size_R, weights)
        low, high = objective.bounds(values_RK, terms_of(objective))
        slack = 1e-5 * (1 + size)
        assert (after >= low - slack).all()
        assert (after <= high + slack).all()


def test_a_rows_weights_are_the_same_bits_alone_and_among_others() -> None:
    objectives = [OBJECTIVES[name] for name in OBJECTIVES] * 5
    values, moves = values_of(len(objectives)), effects(len(objectives), is_symmetric=False)
    size = torch.logspace(-2, 2, len(objectives))
    whole = rows_of(*objectives).step_weights(values, moves, size)
    for i, j in itertools.islice(itertools.combinations(range(len(objectives)), 2), 0, None, 7):
        pair = [i, j]
        some = rows_of(*[objectives[k] for k in pair]).step_weights(values[pair], moves[pair], size[pair])
        assert torch.equal(some, whole[pair])


def test_levels_are_in_reward_units_and_weights_in_standard_deviations() -> None:
    objective = OBJECTIVES["floor"]
    assert terms_of(objective).levels_RK[0].tolist() == pytest.approx([0.0, (-1.2 + 1.0) / 0.5, 0.3])
    assert terms_of(objective).weights_RK[0].tolist() == [1.0, 0.0, 0.0]


def test_heads_come_in_one_order_however_they_are_written() -> None:
    objective = WeightedSum(weights={"b": 1.0, "a": 2.0})
    assert objective.head_names == ("a", "b")
    assert objective.score(torch.tensor([[10.0, 1.0]]), terms_of(objective, ("a", "b"))).item() == 21.0


def test_the_type_of_a_weighted_sum_need_not_be_written() -> None:
    assert parse({"weights": {"a": 1.0}}) == parse({"type": "weighted_sum", "weights": {"a": 1.0}})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e308, 11, -11, True, "1"])
@pytest.mark.parametrize("kind", ["weighted_sum", "worst_case", "floor"])
def test_a_weight_must_be_a_number_within_its_range(kind: str, weight: object) -> None:
    with pytest.raises(ValidationError):
        parse({"type": kind, "weights": {"a": weight}, **({"floors": {"b": 0.0}} if kind == "floor" else {})})


@pytest.mark.parametrize("level", [float("nan"), float("inf"), 1e308, True, "1", None])
def test_a_level_must_be_a_number_within_its_range(level: object) -> None:
    for body in ({"type": "target", "values": {"a": level}},
                 {"type": "floor", "weights": {"a": 1.0}, "floors": {"b": level}}):  # fmt: skip
        with pytest.raises(ValidationError):
            parse(body)


def test_a_worst_case_takes_no_weight_of_zero() -> None:
    with pytest.raises(ValidationError, match="leave the head out"):
        parse({"type": "worst_case", "weights": {"a": 1.0, "b": 0.0}})


@pytest.mark.parametrize("name", ["", "../etc", "a/b", "/abs", "http://x", "a" * 65, "a b"])
def test_a_head_is_named_and_never_a_path(name: str) -> None:
    for body in ({"weights": {name: 1.0}}, {"type": "target", "values": {name: 1.0}},
                 {"type": "floor", "weights": {"a": 1.0}, "floors": {name: 1.0}}):  # fmt: skip
        with pytest.raises(ValidationError):
            parse(body)


def test_no_heads_or_too_many_are_refused() -> None:
    for weights in ({}, {f"h{i}": 1.0 for i in range(9)}):
        with pytest.raises(ValidationError):
            WeightedSum(weights=weights)
