"""What a server pins stays as good as it is alone, whatever a caller's heads are and ask for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.api.resolution import with_pinned
from server.control.ascent import TOLERANCE
from server.control.editor import StateEditor
from server.control.params import ControlParams, UnderPinned
from server.control.pinned import PinnedRows
from server.control.plan import EditPlan
from server.control.registry import HeadRegistry
from server.control.state import HELD_BY, HeldBy
from tests.conftest import HIDDEN, control, random_head, random_linear_head
from tests.control.test_editor import LinearUnembedding
from tests.control.test_editor_properties import nats
from value_models.heads import LinearHead


def against(head: LinearHead, noise: float) -> LinearHead:
    """Nearly the opposite of a head."""
    other = random_linear_head(99).inputs_UD
    return LinearHead(
        mean_D=head.mean_D, scale_D=head.scale_D, inputs_UD=noise * other - head.inputs_UD, input_bias_U=torch.zeros(1)
    )


LINE = random_linear_head(3)
OVERFLOWING = random_head(6, widths=(16, 12))
OVERFLOWING.get_buffer("hidden_weight_0").fill_(3e38)
OVERFLOWING.out_weight_H.copy_(torch.tensor([3e38, -3e38] * 6))
REGISTRY = HeadRegistry(
    {
        "overflows": OVERFLOWING,
        "line": LINE, "other": random_linear_head(4), "opposite": against(LINE, 0.0), "nearly": against(LINE, 0.1),
        "good": random_head(1), "deep": random_head(2, widths=(16, 12)),
    }
)  # fmt: skip
EDITORS = {softcap: StateEditor(LinearUnembedding(softcap)) for softcap in (None, 5.0)}
PINS = {
    "one": control({"line": 1.0}, steps=3, step_size=0.3, max_kl=0.2),
    "two": control({"line": 1.0, "other": -0.5}, steps=2, step_size=0.5, max_kl=0.1),
    "of a hidden layer": control({"good": 1.0}, steps=4, step_size=0.2, max_kl=0.2),
}
ASKED = st.builds(
    control,
    st.dictionaries(st.sampled_from(["opposite", "nearly", "deep"]), st.floats(-10, 10), min_size=1, max_size=3),
    steps=st.integers(0, 20), step_size=st.floats(0, 10), max_kl=st.floats(1e-3, 0.5), max_shift=st.floats(1e-2, 2),
)  # fmt: skip


def over(asked: ControlParams, pinned: ControlParams) -> UnderPinned:
    merged = with_pinned(asked, pinned)
    assert isinstance(merged, UnderPinned)
    return merged


def edited(rows: list[ControlParams | None], hidden: Tensor, softcap: float | None = None) -> tuple[Tensor, list[dict]]:
    """Logits, and each row's values after control with its held_by."""
    logits, groups = EDITORS[softcap].logits(hidden, EditPlan.from_rows(rows, REGISTRY))
    told: list[dict] = [{} for _ in rows]
    for group in groups:
        names = group.group.stack.names
        for place, row in enumerate(group.group.rows):
            told[row] = dict(zip(names, group.values_after_RK[place].tolist(), strict=True))
            told[row]["held_by"] = HELD_BY[int(group.held_by_R[place])]
            told[row]["kl"], told[row]["shift"] = float(group.kl_R[place]), float(group.shift_ratio_R[place])
    return logits, told


def states(seed: int, count: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80, deadline=None)
@given(ASKED, st.sampled_from(list(PINS)), st.integers(0, 2**32), st.sampled_from([None, 5.0]))
def test_no_callers_heads_take_a_pinned_value_below_what_pinning_alone_gives(
    asked: ControlParams, pin: str, seed: int, softcap: float | None
) -> None:
    pinned, hidden = PINS[pin], states(seed)
    merged = over(asked, pinned)
    logits, (together,) = edited([merged], hidden, softcap)
    _, (alone,) = edited([pinned], hidden, softcap)
    for name, weight in pinned.objective.head_weights.items():
        change = together[name] - alone[name]
        assert change * weight >= -2 * TOLERANCE * abs(weight)
    base = LinearUnembedding(softcap).finish(LinearUnembedding(softcap).project(hidden))
    assert float(nats(logits, base)) <= merged.max_kl
    assert together["kl"] == pytest.approx(float(nats(logits, base)), abs=1e-4)
    assert together["shift"] <= merged.max_shift * (1 + 1e-4)


def test_the_opposite_of_a_pinned_head_changes_nothing() -> None:
    hidden = states(1, 3)
    alone, _ = edited([PINS["one"]] * 3, hidden)
    together, _ = edited([over(control({"opposite": 1.0}, step_size=5.0), PINS["one"])] * 3, hidden)
    assert torch.allclose(together, alone, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(ASKED, st.sampled_from(list(PINS)), st.integers(0, 2**32))
def test_tokens_that_the_pinned_edit_raises_are_as_likely_as_they_are_alone(
    asked: ControlParams, pin: str, seed: int
) -> None:
    pinned, hidden = PINS[pin], states(seed)
    (together, _), (alone, _) = edited([over(asked, pinned)], hidden), edited([pinned], hidden)
    raised = alone - LinearUnembedding().project(hidden)
    ground = [
        float((logits.softmax(-1) * raised).sum())
        for logits in (hidden @ LinearUnembedding().weight.T, alone, together)
    ]
    assert ground[2] >= ground[1] - 0.03 * abs(ground[1] - ground[0]) - 1e-4


@pytest.mark.parametrize("pin", list(PINS))
def test_a_callers_head_that_gives_no_number_takes_nothing_of_what_is_pinned(pin: str) -> None:
    hidden, pinned = states(6, 3), PINS[pin]
    alone, _ = edited([pinned] * 3, hidden)
    asked = control({"overflows": 1.0, "other" if pin == "one" else "nearly": 0.5})
    together, told = edited([over(asked, pinned)] * 3, hidden)
    assert torch.allclose(together, alone, atol=1e-5)
    assert all(math.isnan(row["overflows"]) for row in told)


def test_a_callers_heads_act_where_they_take_nothing_back() -> None:
    hidden = states(3, 3)
    pinned = control({"line": 1.0}, steps=1, step_size=0.1)
    _, alone = edited([over(control({"other": 1.0}, steps=0), pinned)] * 3, hidden)
    _, together = edited([over(control({"other": 1.0}, step_size=0.3), pinned)] * 3, hidden)
    assert all(more["other"] > less["other"] + 0.01 for more, less in zip(together, alone, strict=True))


def test_a_row_over_pinned_heads_depends_on_itself_alone() -> None:
    hidden = states(4, 4)
    rows = [over(control({"nearly": 1.0}), PINS["one"]), PINS["one"], None, over(control({"deep": 2.0}), PINS["two"])]
    logits, _ = edited(rows, hidden)
    for i, row in enumerate(rows):
        assert torch.equal(edited([row], hidden[i : i + 1])[0][0], logits[i])


def test_a_pinned_window_holds_for_both() -> None:
    pinned = control({"line": 1.0}, window={"start": 5})
    hidden = states(5)
    logits, (told,) = edited([over(control({"other": 1.0}), pinned)], hidden)
    assert torch.equal(logits, LinearUnembedding().project(hidden))
    assert told["held_by"] is HeldBy.WINDOW


def test_no_callers_head_lifts_a_value_over_a_pinned_bound() -> None:
    """The guardrail of a server reads values after control, which an own head could raise."""
    hidden = states(6, 8)
    _, alone = edited([control({"line": 1.0}, steps=1, stop_below={"other": 0.0})] * 8, hidden)
    pinned = control({"line": 1.0}, steps=1, stop_below={"other": max(told["other"] for told in alone) + 1e-3})
    lifting = HeadRegistry({"line": LINE, "other": random_linear_head(4), "lifts": random_linear_head(4)})
    plan = EditPlan.from_rows([over(control({"lifts": 1.0}, step_size=9.0), pinned)] * 8, lifting)
    _, (group,) = EDITORS[None].logits(hidden, plan)
    place = group.group.stack.names.index("other")
    assert (group.values_after_RK[:, place] < pinned.stop_below["other"]).all()  # pyright: ignore[reportOptionalSubscript]
    assert (group.held_by_R == HELD_BY.index(HeldBy.PINNED)).any()


def test_what_cannot_be_made_up_for_is_left_out() -> None:
    """A head that raises the pinned value, but whose ascent the pinned reward is bound to lose by, and the reverse."""
    rows = PinnedRows(torch.tensor([[1.0, 0.0]]), torch.full((1, 2), -torch.inf), (0,))
    effects = torch.tensor([[[0.0, 0.0], [-1.0, 1.0]]])
    inner = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    assert rows.kept_weights(torch.tensor([[0.0, 1.0]]), effects, inner).tolist() == [[0.0, 0.0]]
    effects[0, 0, 0] = inner[0, 0, 0] = 2.0
    assert rows.kept_weights(torch.tensor([[0.0, 1.0]]), effects, inner).tolist() == [[0.5, 1.0]]


def test_a_search_keeps_no_candidate_that_pinned_heads_score_lower_than_none() -> None:
    from server.engines.embedded.candidates import _not_taken_back

    assert _not_taken_back([0.5, 0.6, 0.4], 1) == [(True, 0.5), (True, 0.6), (False, 0.4)]
    assert _not_taken_back([0.5, 0.6, 0.4], 2) == [(False, 0.5), (True, 0.6), (False, 0.4)]
    assert _not_taken_back([float("nan"), 0.6], 1)[1] == (False, 0.6)
