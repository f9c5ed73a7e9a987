"""The kernels of a GPU's edit on rows over pinned control, against torch's operations.

What a budget of KL holds is compared by what was added to the pinned move: both add the same, more or less of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from server.api.resolution import with_pinned
from server.control.ascent import TOLERANCE
from server.control.editor import StateEditor
from server.control.params import ControlParams, UnderPinned
from server.control.state import HELD_BY, ControlState, HeldBy
from tests.conftest import control
from tests.control.by_gpu_kernels import FIELDS, HEADS, SOFT_CAP, Compared, Unembedding, linear_head, registry, states
from value_models.heads import LinearHead, ValueHead

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("torch_judges")]
VOCAB, SMALL_VOCAB = 1500, 600
"""Of one kind of row, where programs share a vocabulary, and of all kinds at once, which would take minutes."""
MILD: dict[str, Any] = {"step_size": 0.005, "max_kl": 0.5}
STRONG: dict[str, Any] = {"step_size": 2.0, "max_shift": 2.0}


def against(name: str, noise: float) -> ValueHead:
    """Nearly the opposite of a head."""
    head, other = HEADS[name], linear_head(99)
    return LinearHead(
        mean_D=head.mean_D, scale_D=head.scale_D, inputs_UD=noise * other.inputs_UD - head.inputs_UD,
        input_bias_U=torch.zeros(1),
    )  # fmt: skip


OTHERS: dict[str, Any] = {"opposite": against("a", 0.0), "nearly": against("a", 0.1)}


def over(asked: ControlParams, pinned: ControlParams) -> UnderPinned:
    merged = with_pinned(asked, pinned)
    assert isinstance(merged, UnderPinned)
    return merged


def pin(weights: dict[str, float] | None = None, **fields: Any) -> ControlParams:
    return control(weights or {"a": 1.0}, **{**MILD, **fields})


ONE, THREE = pin(), pin({"a": 1.0, "b": -0.5, "c": 0.3})
ROWS: dict[str, UnderPinned] = {
    "one head over one": over(control({"b": 1.0}, **MILD), ONE),
    "three heads over one": over(control({"b": 1.0, "c": -0.5, "h1": 2.0}, **MILD), ONE),
    "one head over three": over(control({"h1": 1.0}, **MILD), THREE),
    "three heads over three": over(control({"h1": 1.0, "h2": -1.0, "h3": 0.5}, **MILD), THREE),
    "a field over a head": over(control({"f": 1.0}, **MILD), ONE),
    "a head over a field and a head": over(control({"a": 1.0}, **MILD), pin({"g": 1.0, "b": 0.5})),
    "the opposite of what is pinned": over(control({"opposite": 1.0}, **MILD), ONE),
    "nearly the opposite": over(control({"nearly": 1.0}, **MILD), ONE),
    "nearly the opposite, and a long way": over(control({"nearly": 1.0}, max_kl=0.5, step_size=2.0), ONE),
    "no steps": over(control({"b": 1.0}, steps=0), ONE),
    "no weight": over(control({"b": 0.0}), ONE),
    "nothing pinned but a name": over(control({"b": 1.0}, **MILD), pin({"a": 0.0})),
    "a gate that is shut": over(control({"b": 1.0}, **MILD), pin(gate={"head": "c", "below": -1e6})),
    "a gate that is open": over(control({"b": 1.0}, **MILD), pin(gate={"head": "c", "below": 1e6})),
    "a gate of some states": over(control({"b": 1.0}, **MILD), pin(gate={"head": "a", "below": 0.5})),
    "a window that is to come": over(control({"b": 1.0}, **MILD), pin(window={"start": 4})),
    "a schedule": over(control({"b": 1.0}, **MILD), pin(schedule={"type": "linear", "tokens": 9, "to": 0.5})),
    "a cap on the pinned shift": over(control({"b": 1.0}, **MILD), pin(step_size=1.0, max_shift=0.02)),
    "a cap on the callers' shift": over(
        control({"b": 1.0}, step_size=1.0, max_shift=0.1, max_kl=0.5), pin(max_shift=0.1)
    ),
    "no room beside the pinned shift": over(
        control({"b": 1.0}, max_shift=0.05, **MILD), pin(step_size=1.0, max_shift=0.05)
    ),
    "a bound that no caller may lift": over(control({"b": 1.0}, **MILD), pin(stop_below={"c": 0.2, "h1": -1.0})),
    "a budget that holds the callers": over(control({"b": 1.0, "h1": 0.5}, max_kl=0.1, step_size=0.3), pin(max_kl=0.1)),
    "a small budget that holds the callers": over(
        control({"b": 1.0}, max_kl=0.02, step_size=3.0), pin(max_kl=0.01, step_size=0.001)
    ),
    "a budget that holds what is pinned": over(
        control({"b": 1.0}, step_size=2.0, max_kl=0.3), pin(max_kl=0.02, **STRONG)
    ),
    "a budget that holds both": over(control({"b": 1.0}, step_size=2.0, max_kl=0.05), pin(max_kl=0.05, **STRONG)),
    "an opposite under a budget that holds both": over(
        control({"nearly": 1.0, "b": 0.2}, step_size=2.0, max_kl=0.3), pin(max_kl=0.1, **STRONG)
    ),
}  # fmt: skip


class OverPinned(Compared):
    """Beside it the same rows under what is pinned alone."""

    def __init__(self, hidden_BD: Tensor, rows: list[ControlParams | None], **more: Any) -> None:
        device = str(hidden_BD.device)
        heads, unembedding = more.pop("heads", None) or registry(device, **OTHERS), more.pop("unembedding", None)
        unembedding = unembedding or Unembedding(device, vocab=VOCAB)
        super().__init__(hidden_BD, rows, heads, unembedding, **more)
        pinned = [row.pinned if isinstance(row, UnderPinned) else None for row in rows]
        self.alone = Compared(hidden_BD, pinned, heads, unembedding, **more)  # type: ignore[arg-type]

    def assert_alike(self) -> None:
        super().assert_alike()
        for row, (params, _) in self.numbers.items():
            if isinstance(params, UnderPinned):
                self.assert_nothing_is_taken_back(row, params)

    def assert_budget_is_used(self, row: int) -> None:
        (params, mine), other = self.numbers[row], self.other[row][1]
        if not isinstance(params, UnderPinned):
            return super().assert_budget_is_used(row)
        alone_kl, _, alone_held, *_ = self.alone.numbers[row][1][-5:]
        if HELD_BY[int(alone_held)] is HeldBy.MAX_KL:
            # How much of it is taken differs a little, and all that comes after with it.
            assert mine[-5] > 0.96 * other[-5]
            return None
        assert 0.96 * params.max_kl < mine[-5]
        moves, others = (
            moved_V - alone_V for moved_V, alone_V in zip(self.moves(row), self.alone.moves(row), strict=True)
        )
        share = float(moves @ others / (others @ others))
        torch.testing.assert_close(moves, share * others, rtol=1e-3, atol=1e-3)
        assert alone_kl < mine[-5]
        return None

    def assert_nothing_is_taken_back(self, row: int, params: UnderPinned) -> None:
        numbers, alone = self.numbers[row][1], self.alone.numbers[row][1]
        names, pinned_names = params.head_names, params.pinned.head_names
        after = dict(zip(names, numbers[len(names) : 2 * len(names)], strict=True))
        after_alone = dict(zip(pinned_names, alone[len(pinned_names) : 2 * len(pinned_names)], strict=True))
        for name, weight in params.pinned.objective.head_weights.items():
            change = math.copysign(1.0, weight) * (after[name] - after_alone[name])
            assert change >= -2 * TOLERANCE * (HEADS | FIELDS)[name].reward_scale
        for name, bound in (params.pinned.stop_below or {}).items():
            assert not (after_alone[name] < bound <= after[name])
        raised_V = self.alone.moves(row)[0]
        none, least, ground = (
            float((logits_V.softmax(-1) * raised_V).sum())
            for logits_V in (self.base_BV[row], self.alone.logits_BV[row], self.logits_BV[row])
        )
        assert ground >= least - 0.021 * abs(least - none) - 1e-5


@pytest.mark.parametrize("name", ROWS)
def test_each_kind_of_row_over_pinned_control_is_edited_as_torch_edits_it(name: str, device: str) -> None:
    compared = OverPinned(states(3, device), [ROWS[name]] * 3)
    assert compared.num_fused == 3
    compared.assert_alike()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_all_kinds_in_one_step_are_edited_alike_in_either_precision(device: str, dtype: torch.dtype) -> None:
    rows = [None, ONE, *ROWS.values(), THREE, None, control({"a": 1.0, "b": 1.0}, max_kl=0.05, **STRONG)]
    hidden_BD, unembedding = states(len(rows), device, dtype), Unembedding(device, dtype, SMALL_VOCAB)
    compared = OverPinned(hidden_BD, rows, unembedding=unembedding)
    assert compared.num_fused == len(rows) - 2
    compared.assert_alike()
    stays = [torch.equal(*pair) for pair in zip(compared.logits_BV, compared.base_BV, strict=True)]
    assert [place for place, row in enumerate(rows) if row is None or stays[place]] == [
        place for place, logits_V in enumerate(compared.other_BV) if torch.equal(logits_V, compared.base_BV[place])
    ]


def test_rows_of_all_kinds_are_edited_as_torch_edits_them_under_a_soft_cap(device: str) -> None:
    rows = [None, ONE, *ROWS.values(), THREE]
    unembedding = Unembedding(device, vocab=SMALL_VOCAB, soft_cap=SOFT_CAP)
    compared = OverPinned(states(len(rows), device), rows, unembedding=unembedding)
    assert compared.num_fused == len(rows) - 1
    compared.assert_alike()


def test_callers_who_ask_for_nothing_leave_the_pinned_edit_to_the_bit(device: str) -> None:
    held = pin(max_kl=0.02, **STRONG)
    rows = [ROWS["no steps"], ONE, ROWS["no weight"], ONE, over(control({"b": 1.0}, steps=0), held), held]
    compared = Compared(states(3, device).repeat_interleave(2, dim=0), rows, registry(device))  # type: ignore[arg-type]
    assert torch.equal(compared.logits_BV[0::2], compared.logits_BV[1::2])


def test_what_would_lift_a_value_over_a_pinned_bound_is_dropped_and_said_so(device: str) -> None:
    bare = Compared(states(4, device), [pin(stop_below={"b": -1e6})] * 4, registry(device))
    bound = max(numbers[3] for _, numbers in bare.numbers.values()) + 1e-3
    rows = [over(control({"h1": 1.0, "lifts": 1.0}, step_size=1.0, max_kl=0.5), pin(stop_below={"b": bound}))] * 4
    compared = OverPinned(states(4, device), rows, heads=registry(device, lifts=HEADS["b"]))  # type: ignore[arg-type]
    compared.assert_alike()
    assert HeldBy.PINNED in {HELD_BY[int(numbers[-3])] for _, numbers in compared.numbers.values()}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_counted_and_spares_the_neighbours(device: str, bad: float) -> None:
    broken = linear_head(5)
    broken.ascent_UD.fill_(bad)
    heads = registry(device, broken=broken)
    row = ROWS["one head over one"]
    hidden_BD = states(3, device)
    sound = OverPinned(hidden_BD, [row, row, row], heads=heads)
    compared = OverPinned(hidden_BD, [row, over(control({"broken": 1.0}, **MILD), ONE), row], heads=heads)
    assert [numbers[-2] for _, numbers in compared.numbers.values()] == [0.0, 0.0, 1.0]
    assert torch.equal(compared.logits_BV[[0, 2]], sound.logits_BV[[0, 2]])
    assert torch.equal(compared.logits_BV[1], compared.base_BV[1])
    assert all(math.isfinite(number) for _, numbers in compared.numbers.values() for number in numbers)
    hidden_BD[1] = bad
    compared = OverPinned(hidden_BD, [row, row, row], heads=heads)
    assert torch.equal(compared.logits_BV[[0, 2]], sound.logits_BV[[0, 2]])
    assert compared.numbers[1][1][-2] == 1.0


def test_a_pinned_gate_that_was_open_holds_for_both(device: str) -> None:
    gate = {"head": "a", "above": 0.0, "hysteresis": 5.0}
    rows = [over(control({"b": 1.0}, **MILD), pin(gate=gate))] * 3
    for is_open in (False, True):
        state = ControlState(3, 0.0, is_open)
        OverPinned(states(3, device), rows, state_of=lambda _, state=state: state).assert_alike()  # type: ignore[arg-type]


def test_rows_that_are_drawn_again_find_their_place_beside_others(device: str) -> None:
    """Plans of other rows come between, over the same buffers."""
    heads, editor = registry(device, **OTHERS), StateEditor(Unembedding(device, vocab=VOCAB))
    names = ["one head over one", "three heads over three", "a budget that holds the callers"]
    rows, hidden_BD = [ROWS[names[0]], None, ROWS[names[1]], ONE, ROWS[names[2]]], states(5, device)
    edit: Callable[[list[int]], Tensor] = lambda places: editor.logits(  # noqa: E731
        hidden_BD[places], editor.plan([rows[place] for place in places], heads, device=device)
    )[0]
    whole_BV = edit([0, 1, 2, 3, 4])
    for again in ([4], [3, 0], [1, 2, 4]):
        torch.testing.assert_close(edit(again), whole_BV[again], rtol=1e-4, atol=1e-4)
    assert torch.equal(edit([0, 1, 2, 3, 4]), whole_BV)


def test_no_budget_is_exceeded_over_a_large_vocabulary(device: str) -> None:
    # The interpreter would take minutes for the larger one.
    unembedding = Unembedding(device, vocab=16_000 if device == "cpu" else 256_000)
    budgets = [0.3, 0.02]
    rows = [over(control({"b": 1.0}, max_kl=kl, **STRONG), pin(max_kl=kl / 2, **STRONG)) for kl in budgets]
    compared = Compared(states(2, device), rows, registry(device), unembedding)  # type: ignore[arg-type]
    for row, budget in enumerate(budgets):
        # Half of it is what is pinned, beside which a caller's head may find nothing to add.
        assert 0.9 * budget / 2 < compared.divergence(row) <= budget
