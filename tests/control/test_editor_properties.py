"""The laws of the edit for whatever control any rows of a step may ask for."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.control.editor import StateEditor
from server.control.params import ControlParams
from server.control.plan import EditPlan
from server.control.registry import HeadRegistry
from tests.conftest import HIDDEN, control, random_field_head, random_head, random_linear_head
from tests.control.test_editor import LinearUnembedding

REGISTRY = HeadRegistry(
    {
        "good": random_head(1),
        "deep": random_head(2, widths=(16, 12)),
        "line": random_linear_head(3),
        "field": random_field_head(6),
    }
)


class Unembedding(LinearUnembedding):
    """Of states of any type, as an engine's LM head is."""

    def project(self, hidden_MD: Tensor) -> Tensor:
        return super().project(hidden_MD.float())


UNEMBEDDINGS = {"linear": Unembedding(), "soft cap": Unembedding(5.0)}
EDITORS = {name: StateEditor(unembedding) for name, unembedding in UNEMBEDDINGS.items()}
WEIGHTS = st.dictionaries(st.sampled_from(REGISTRY.names), st.floats(-10, 10), min_size=1, max_size=3)
CONTROL = st.builds(
    control,
    WEIGHTS,
    steps=st.integers(0, 100),
    step_size=st.floats(0, 10),
    max_kl=st.floats(1e-4, 0.5),
    max_shift=st.floats(1e-3, 2),
)
ROWS = st.lists(st.none() | CONTROL, min_size=2, max_size=6)


def nats(moved_BV: Tensor, base_BV: Tensor) -> Tensor:
    moved, base = moved_BV.double().log_softmax(-1), base_BV.double().log_softmax(-1)
    return (moved.exp() * (moved - base)).sum(-1)


@settings(max_examples=40, deadline=None)
@given(
    ROWS,
    st.integers(0, 2**32),
    st.sampled_from(list(UNEMBEDDINGS)),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_budgets_hold_and_a_row_depends_on_itself_alone(
    rows: list[ControlParams | None], seed: int, name: str, dtype: torch.dtype
) -> None:
    hidden = torch.randn(len(rows), HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)
    unembedding, editor = UNEMBEDDINGS[name], EDITORS[name]
    base = unembedding.finish(unembedding.project(hidden))
    logits, stats = editor.logits(hidden, EditPlan.from_rows(rows, REGISTRY))
    divergence = nats(logits, base)
    for i, params in enumerate(rows):
        if params is None:
            assert torch.equal(logits[i], base[i])
        else:
            assert divergence[i] <= params.max_kl
        pair, _ = editor.logits(hidden[[i, i]], EditPlan.from_rows([params] * 2, REGISTRY))
        assert torch.equal(pair[0], logits[i])
    for group in stats:
        count = len(group.group.rows)
        asked = [rows[row] for row in group.group.rows]
        for row, params, kl, ratio in zip(
            group.group.rows, asked, group.kl_R[:count], group.shift_ratio_R[:count], strict=True
        ):
            assert params is not None
            assert abs(float(kl) - float(divergence[row])) <= 2e-5 + 1e-3 * float(kl)
            assert float(ratio) <= params.max_shift * (1 + 1e-4)
    backwards, _ = editor.logits(hidden.flip(0), EditPlan.from_rows(rows[::-1], REGISTRY))
    assert torch.equal(backwards.flip(0), logits)
