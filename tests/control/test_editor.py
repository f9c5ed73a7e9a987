"""The laws of the edit, on a random LM head."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.control.ascent import ascend
from server.control.editor import StateEditor
from server.control.params import ControlParams
from server.control.plan import EditPlan
from server.control.registry import HeadRegistry
from tests.conftest import HIDDEN, control, edited_states, random_field_head, random_head, random_linear_head
from value_models.heads import MAX_FEATURE, ValueHead
from value_models.linear import PackedLinear

VOCAB = 400


class LinearUnembedding:
    def __init__(self, softcap: float | None = None) -> None:
        self.weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))
        self._linear = PackedLinear(self.weight)
        self._softcap = softcap
        self.soft_cap = None if softcap is None else (softcap, softcap)

    @property
    def is_linear(self) -> bool:
        return self._softcap is None

    def project(self, hidden_MD: Tensor) -> Tensor:
        return self._linear(hidden_MD)

    def finish(self, projected_MV: Tensor) -> Tensor:
        return projected_MV if self._softcap is None else self._softcap * torch.tanh(projected_MV / self._softcap)


@pytest.fixture
def registry(heads: dict[str, ValueHead]) -> HeadRegistry:
    return HeadRegistry({**heads, "field": random_field_head(6)})


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(4))


UNEMBEDDING = LinearUnembedding()
EDITOR = StateEditor(UNEMBEDDING)
STRONG = {"step_size": 10.0, "steps": 100, "max_shift": 2.0}
NULL_CONTROLS = [
    control({"good": 1.0}, steps=0),
    control({"good": 1.0}, step_size=0.0),
    control({"good": 0.0}),
    control({"good": 0.0, "line": 0.0}),
]


def plan_of(registry: HeadRegistry, rows: list[ControlParams | None]) -> EditPlan:
    return EditPlan.from_rows(rows, registry)


def naive_ascent(head: ValueHead, state: Tensor, params: ControlParams, weight: float) -> Tensor:
    """The method as the paper states it, one step at a time in the state itself."""
    start = state.clone()
    for _ in range(params.steps):
        _, slope = head.readout(head.units(state[None]))
        state = state + params.step_size * weight * (slope @ head.folded_ascent())[0]
    shift = state - start
    return start + shift * min(1.0, params.max_shift * float(start.norm()) / max(float(shift.norm()), 1e-12))


@pytest.mark.parametrize("params", NULL_CONTROLS)
def test_null_control_gives_the_base_models_logits_bit_for_bit(
    registry: HeadRegistry, hidden: Tensor, params: ControlParams
) -> None:
    base = UNEMBEDDING.project(hidden)
    logits, (stats,) = EDITOR.logits(hidden, plan_of(registry, [params] * 7))
    assert torch.equal(logits, base)
    assert not stats.kl_R.any()
    assert torch.equal(stats.values_before_RK, stats.values_after_RK)


def test_rows_outside_the_plan_are_bit_identical(registry: HeadRegistry, hidden: Tensor) -> None:
    plan = plan_of(registry, [None, control({"good": 1.0}), None, None, control({"line": 1.0}), None, None])
    logits, _ = EDITOR.logits(hidden, plan)
    base = UNEMBEDDING.project(hidden)
    assert [torch.equal(logits[i], base[i]) for i in range(7)] == [True, False, True, True, False, True, True]


@pytest.mark.parametrize("name", ["good", "deep", "line"])
def test_the_loop_over_units_equals_steps_in_the_state(registry: HeadRegistry, hidden: Tensor, name: str) -> None:
    params = control({name: -0.7}, step_size=0.01, steps=9, max_kl=0.5, max_shift=2.0)
    _, (stats,) = EDITOR.logits(hidden, plan_of(registry, [params] * 7))
    edited = edited_states(hidden, [stats])
    head = registry.stack((name,)).heads[0]
    assert not stats.held_by_R.any()
    for i in range(7):
        torch.testing.assert_close(edited[i], naive_ascent(head, hidden[i], params, -0.7), rtol=1e-4, atol=1e-4)


def test_a_fields_direction_is_that_of_the_models_own_state(registry: HeadRegistry, hidden: Tensor) -> None:
    head = registry.head("field")
    features_RK = head.units(hidden)[:, 1:]
    assert (features_RK.abs() > MAX_FEATURE).any()
    shift_RD = (
        0.2 * head.folded_ascent()[0] + 0.2 * features_RK.clamp(-MAX_FEATURE, MAX_FEATURE) @ head.folded_ascent()[1:]
    )
    for params in ({"step_size": 0.2, "steps": 1}, {"step_size": 0.01, "steps": 20}):
        plan = plan_of(registry, [control({"field": 1.0}, max_kl=0.5, max_shift=2.0, **params)] * 7)
        ascent = ascend(hidden, plan.groups[0])
        whole_RD = ascent.shift_RD / ascent.share_R[:, None]
        torch.testing.assert_close(whole_RD, shift_RD, rtol=1e-4, atol=1e-4)
    moved_R = ((hidden + ascent.shift_RD) @ head.inputs_UD[0]) - hidden @ head.inputs_UD[0]
    torch.testing.assert_close(ascent.climb_RU[:, 0], moved_R, rtol=1e-4, atol=1e-3)
    assert not ascent.climb_RU[:, 1:].any()


def test_what_is_kept_of_fields_is_bounded_by_their_rows(registry: HeadRegistry, hidden: Tensor) -> None:
    editor = StateEditor(UNEMBEDDING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.control.row_logits.MAX_ROWS", 4)
        for weights in ({"field": 1.0}, {"line": 1.0}, {"field": 1.0, "line": 1.0}):
            plan = plan_of(registry, [control(weights, steps=2, max_response_kl=9.0)] * 7)
            logits, _ = editor.logits(hidden, plan)
            assert torch.equal(logits, EDITOR.logits(hidden, plan)[0])
            assert sum(len(rows_UV) for rows_UV in editor._row_logits._kept.values()) <= 4


@pytest.mark.parametrize("name", ["good", "deep", "line", "field"])
def test_the_logits_are_those_of_the_edited_state(registry: HeadRegistry, hidden: Tensor, name: str) -> None:
    plan = plan_of(registry, [control({name: 1.0}, step_size=0.3, max_kl=0.2)] * 7)
    logits, stats = EDITOR.logits(hidden, plan)
    edited = edited_states(hidden, stats)
    assert not torch.equal(edited, hidden)
    torch.testing.assert_close(logits, UNEMBEDDING.project(edited), rtol=1e-4, atol=1e-4)


def test_several_heads_ascend_their_weighted_sum(registry: HeadRegistry, hidden: Tensor) -> None:
    params = control({"good": 1.0, "deep": -2.0}, step_size=1e-3, steps=1, max_kl=0.5, max_shift=2.0)
    edited = edited_states(hidden, EDITOR.logits(hidden, plan_of(registry, [params] * 7))[1])
    stack = registry.stack(("deep", "good"))
    expected = hidden.clone()
    for head, weight in zip(stack.heads, (-2.0, 1.0), strict=True):
        expected += 1e-3 * weight * (head.readout(head.units(hidden))[1] @ head.folded_ascent())
    torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("max_kl", [0.01, 0.3, 0.5])
def test_the_divergence_of_what_is_sampled_never_exceeds_the_budget(
    registry: HeadRegistry, hidden: Tensor, softcap: float | None, max_kl: float
) -> None:
    unembedding = LinearUnembedding(softcap)
    plan = plan_of(registry, [control({name: 1.0}, max_kl=max_kl, **STRONG) for name in ("good", "field", "line")] * 2)
    logits, stats = StateEditor(unembedding).logits(hidden[:6], plan)
    log_base = unembedding.finish(unembedding.project(hidden[:6])).double().log_softmax(-1)
    log_moved = logits.double().log_softmax(-1)
    kl = (log_moved.exp() * (log_moved - log_base)).sum(-1)
    assert (kl <= max_kl).all()
    assert kl.max() > 0.5 * max_kl
    for group in stats:
        torch.testing.assert_close(group.kl_R.double(), kl[group.group.rows_R], rtol=1e-3, atol=1e-5)


def test_the_shift_never_exceeds_its_share_of_the_state(registry: HeadRegistry, hidden: Tensor) -> None:
    params = control({"good": 1.0}, step_size=10.0, steps=50, max_shift=0.05, max_kl=0.5)
    logits, (stats,) = EDITOR.logits(hidden, plan_of(registry, [params] * 7))
    # The LM head has more outputs than inputs, so a shift can be read from what it does to the logits.
    change = (logits - UNEMBEDDING.project(hidden)).double()
    shift = torch.linalg.lstsq(UNEMBEDDING.weight.double(), change.T).solution.T.float()
    ratio = shift.norm(dim=-1) / hidden.norm(dim=-1)
    assert (ratio <= 0.05 * (1 + 1e-4)).all()
    torch.testing.assert_close(stats.shift_ratio_R, ratio, rtol=1e-3, atol=1e-5)


def test_a_rows_edit_is_the_same_bits_alone_and_among_others(registry: HeadRegistry, hidden: Tensor) -> None:
    rows = [
        control({"line": 1.0}, step_size=2.0, max_kl=0.1),
        control({"good": 1.0, "line": -1.0}, step_size=2.0),
        None,
        control({"good": -3.0}, steps=40, max_kl=0.05),
        control({"deep": 1.0, "field": -1.0}, max_shift=0.1),
        control({"line": 5.0, "field": 1.0}, steps=1),
        control({"good": 1.0}, steps=0),
    ]
    whole, _ = EDITOR.logits(hidden, plan_of(registry, rows))
    for order in (torch.arange(7).flip(0), torch.tensor([3, 0]), torch.tensor([5, 4, 1])):
        some, _ = EDITOR.logits(hidden[order], plan_of(registry, [rows[i] for i in order.tolist()]))
        assert torch.equal(some, whole[order])
    for i in range(7):
        alone, _ = EDITOR.logits(hidden[[i, i]], plan_of(registry, [rows[i]] * 2))
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("make_head", [random_head, random_linear_head, random_field_head])
def test_a_nonfinite_edit_keeps_the_state_is_counted_and_touches_no_neighbour(
    hidden: Tensor, bad: float, make_head: Callable[[int], ValueHead]
) -> None:
    broken = control({"broken": 1.0})
    good = control({"good": 1.0})
    heads = {"good": random_head(5), "broken": make_head(5)}
    heads["broken"].ascent_UD.fill_(bad)
    logits, stats = EDITOR.logits(hidden, plan_of(HeadRegistry(heads), [good, broken, good, broken, None, None, None]))
    alone, _ = EDITOR.logits(hidden, plan_of(HeadRegistry(heads), [good, None, good, None, None, None, None]))
    assert torch.equal(logits, alone)
    by_head = {group.group.stack.names: group for group in stats}
    assert by_head["broken",].is_nonfinite_R.all()
    assert not by_head["good",].is_nonfinite_R.any()


def test_control_raises_the_predicted_value_and_a_negative_weight_lowers_it(
    registry: HeadRegistry, hidden: Tensor
) -> None:
    for weight in (1.0, -1.0):
        params = control({"good": weight}, step_size=0.05)
        _, (stats,) = EDITOR.logits(hidden, plan_of(registry, [params] * 7))
        assert ((stats.values_after_RK - stats.values_before_RK) * weight > 0).all()


def test_many_kinds_of_rows_need_one_group_for_each_set_of_heads(registry: HeadRegistry) -> None:
    rows = [control({"good": w}, steps=s) for w in (1.0, -1.0) for s in (1, 5)] + [control({"line": 1.0, "good": 2.0})]
    assert len(plan_of(registry, rows).groups) == 2


def test_rows_of_linear_heads_are_grouped_by_their_shift(registry: HeadRegistry) -> None:
    rows = [control({"line": weight}, step_size=size, steps=steps)
            for weight, size, steps in ((1.0, 0.2, 5), (0.5, 0.2, 10), (2.0, 0.5, 1), (-1.0, 0.2, 5))]  # fmt: skip
    assert [group.rows for group in plan_of(registry, rows).groups] == [(0, 1, 2), (3,)]


@pytest.mark.parametrize("name", ["good", "line"])
@pytest.mark.parametrize("place", [0, 1])
def test_one_controlled_row_of_two_is_edited_as_if_alone(
    registry: HeadRegistry, hidden: Tensor, name: str, place: int
) -> None:
    params = control({name: 1.0}, max_kl=0.05, **STRONG)
    rows: list[ControlParams | None] = [None, None]
    rows[place] = params
    for first in range(5):
        pair = hidden[first : first + 2].contiguous()
        logits, (stats,) = EDITOR.logits(pair, plan_of(registry, rows))
        alone, (its,) = EDITOR.logits(pair[[place, place]], plan_of(registry, [params, None]))
        assert torch.equal(logits[place], alone[0])
        assert torch.equal(logits[1 - place], UNEMBEDDING.project(pair)[1 - place])
        assert stats.kl_R[0] == its.kl_R[0]
        log_base = UNEMBEDDING.project(pair)[place].double().log_softmax(-1)
        log_moved = logits[place].double().log_softmax(-1)
        assert float((log_moved.exp() * (log_moved - log_base)).sum()) <= 0.05


@pytest.mark.parametrize("weights", [{"line": 1.0}, {"field": 1.0}, {"field": -0.5, "line": 1.0}])
@pytest.mark.parametrize("max_shift", [0.01, 0.5])
def test_sharing_a_shift_changes_nothing_but_rounding(
    registry: HeadRegistry, hidden: Tensor, weights: dict[str, float], max_shift: float
) -> None:
    rows = [control(weights, step_size=3.0, max_kl=0.02 * (i + 1), max_shift=max_shift) for i in range(7)]
    plan = plan_of(registry, rows)
    alone = EditPlan(tuple(replace(group, factors=None) for group in plan.groups))
    (shared_BV, (shared,)), (alone_BV, (other,)) = EDITOR.logits(hidden, plan), EDITOR.logits(hidden, alone)
    torch.testing.assert_close(shared_BV, alone_BV, atol=0.02, rtol=0.02)
    torch.testing.assert_close(shared.kl_R, other.kl_R, rtol=0.05, atol=1e-5)
    torch.testing.assert_close(shared.values_before_RK, other.values_before_RK, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shared.values_after_RK, other.values_after_RK, rtol=0.02, atol=0.02)
    torch.testing.assert_close(shared.shift_ratio_R, other.shift_ratio_R, rtol=0.05, atol=1e-4)
    assert shared.held_by_R.tolist() == other.held_by_R.tolist()


def test_more_distinct_shifts_than_are_kept_give_each_row_its_own(registry: HeadRegistry, hidden: Tensor) -> None:
    rows = [control({"line": 0.01 * (i + 1)}) for i in range(70)]
    many, _ = EDITOR.logits(hidden[:1].expand(70, -1).contiguous(), plan_of(registry, rows))
    for i in (0, 35, 69):
        assert torch.equal(EDITOR.logits(hidden[:1].contiguous(), plan_of(registry, [rows[i]]))[0][0], many[i])


@pytest.mark.parametrize("name", ["good", "line", "field"])
def test_a_row_that_overflows_is_counted_and_spares_the_others_of_its_group(
    registry: HeadRegistry, hidden: Tensor, name: str
) -> None:
    plan = plan_of(registry, [control({name: 1.0}, step_size=2.0)] * 7)
    whole, _ = EDITOR.logits(hidden, plan)
    broken = hidden.clone()
    broken[2] = torch.finfo(torch.float32).max
    logits, (stats,) = EDITOR.logits(broken, plan)
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(logits[others], whole[others])
    assert stats.is_nonfinite_R.tolist() == [i == 2 for i in range(7)]


def test_stacks_are_kept_by_their_size_and_not_by_their_number_alone(
    registry: HeadRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = registry.stack(("good",))
    assert registry.stack(("good",)) is good
    deep = registry.stack(("deep",))
    monkeypatch.setattr("server.control.registry._MAX_STACKS_BYTES", good.num_bytes + deep.num_bytes)
    registry.stack(("line",))
    assert registry.stack(("deep",)) is deep
    assert registry.stack(("good",)) is not good
