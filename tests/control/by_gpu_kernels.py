"""A step that is edited by the kernels of a GPU and by torch's operations, and heads for it.

Tolerances: values to 1e-4 of what they are; where the budget of KL does not hold a row, its divergence to 1e-3 and its
logits to 1e-4 of what they are. Where it does, the kernels' divergence is within 4% below the budget, and the scale not
less than 0.98 of torch's, which now and then stops earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from server.control.editor import StateEditor
from server.control.group_edit import GroupStats
from server.control.params import ControlParams
from server.control.plan import EditPlan
from server.control.registry import HeadRegistry
from server.control.state import HELD_BY, ControlState, HeldBy
from tests.conftest import HIDDEN, card_of, on_device, random_field_head, random_linear_head
from value_models.heads import ValueHead

VOCAB = 3001
SOFT_CAP = (20.0, 15.0)
"""Width and height."""
BY_KL, BY_RESPONSE_KL = HELD_BY.index(HeldBy.MAX_KL), HELD_BY.index(HeldBy.MAX_RESPONSE_KL)


class Unembedding:
    """Logits of a random LM head, as float32 or rounded to bfloat16, and under a soft cap, if there is one."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype = torch.float32,
        vocab: int = VOCAB,
        soft_cap: tuple[float, float] | None = None,
    ) -> None:
        self.soft_cap, self.is_linear = soft_cap, soft_cap is None
        weight = torch.randn(vocab, HIDDEN, generator=torch.Generator().manual_seed(9))
        self.weight, self._dtype = weight.double().to(device), dtype

    def project(self, hidden_MD: Tensor) -> Tensor:
        # In float64, so that no row is rounded in another way beside others.
        return (hidden_MD.double() @ self.weight.T).to(self._dtype)

    def finish(self, projected_MV: Tensor) -> Tensor:
        if self.soft_cap is None:
            return projected_MV
        width, height = self.soft_cap
        return height * torch.tanh(projected_MV / width)

    def unfinished(self, logits_MV: Tensor) -> Tensor:
        if self.soft_cap is None:
            return logits_MV
        width, height = self.soft_cap
        return width * torch.atanh(logits_MV / height)


def linear_head(seed: int, *, scale: float = 1.0, mean: float = 0.0) -> ValueHead:
    head = random_linear_head(seed)
    head.input_bias_U.fill_(0.1 * seed)
    head.reward.copy_(torch.tensor([mean, scale]))
    return head


HEADS = {"a": linear_head(1), "b": linear_head(2, scale=2.0, mean=0.3), "c": linear_head(3, scale=0.5),
         **{f"h{i}": linear_head(10 + i) for i in range(5)}}  # fmt: skip


def field_head(seed: int, *, scale: float = 1.0, mean: float = 0.0) -> ValueHead:
    """Its biases and rewards are of different sizes, and some of its features are cut."""
    head = random_field_head(seed, num_features=seed)
    head.input_bias_U.copy_(0.2 * torch.arange(seed + 1))
    head.ascent_UD.div_(4.0)
    head.reward.copy_(torch.tensor([mean, scale]))
    return head


FIELDS = {"f": field_head(4), "g": field_head(2, scale=2.0, mean=0.3)}


def registry(device: str, *, gains: dict[str, float] | None = None, **more: ValueHead) -> HeadRegistry:
    heads = {**HEADS, **FIELDS, **more}
    cards = {name: card_of(name, heads[name], ascent_gain=gain) for name, gain in (gains or {}).items()}
    return HeadRegistry({name: on_device(head, device) for name, head in heads.items()}, cards)


def states(num_rows: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(4)).to(device, dtype)


class Compared:
    """A step edited by the kernels and by torch: logits, and each row's numbers."""

    def __init__(
        self,
        hidden_BD: Tensor,
        rows: list[ControlParams | None],
        heads: HeadRegistry,
        unembedding: Unembedding | None = None,
        state_of: Callable[[int], ControlState] | None = None,
        instructed: Mapping[int, Tensor] | None = None,
    ) -> None:
        device = hidden_BD.device
        unembedding = unembedding or Unembedding(str(device))
        editor, self._unfinished = StateEditor(unembedding), unembedding.unfinished
        plan = editor.plan(rows, heads, device=device)
        self.num_fused = sum(len(group.rows) for group in plan.groups if group.fixed_RW is not None)
        other = EditPlan.from_rows(rows, heads, device=device)
        if state_of is not None:
            plan, other = plan.at(state_of), other.at(state_of)
        self.base_BV = unembedding.finish(unembedding.project(hidden_BD).float())
        self.logits_BV, stats = editor.logits(hidden_BD, plan, instructed)
        editor.without_kernels()
        self.other_BV, other_stats = editor.logits(hidden_BD, other, instructed)
        self.numbers, self.other = _by_row(stats), _by_row(other_stats)

    def assert_alike(self) -> None:
        assert self.logits_BV.dtype == torch.float32
        assert self.numbers.keys() == self.other.keys()
        for row, (params, mine) in self.numbers.items():
            other, num_heads = self.other[row][1], (len(mine) - 5) // 2
            (kl, _, held, is_broken, is_open), others = mine[-5:], other[-3:]
            assert [held, is_broken, is_open] == others, (row, HELD_BY[int(held)], HELD_BY[int(others[0])])
            assert mine[:num_heads] == pytest.approx(other[:num_heads], rel=1e-4, abs=1e-4, nan_ok=True)
            assert kl <= params.max_kl
            if held in (BY_KL, BY_RESPONSE_KL) and other[-5] > 0:
                self.assert_budget_is_used(row)
            else:
                assert kl == pytest.approx(other[-5], rel=1e-3, abs=1e-5)
                assert mine[-4] == pytest.approx(other[-4], rel=1e-3, abs=1e-6)
                torch.testing.assert_close(*self.moves(row), rtol=1e-3, atol=1e-4)
            assert kl == pytest.approx(self.divergence(row), rel=1e-3, abs=2e-5)

    def assert_budget_is_used(self, row: int) -> None:
        """Of a row that it holds."""
        (params, mine), other = self.numbers[row], self.other[row][1]
        held, (kl, ratio), other_ratio = mine[-3], mine[-5:-3], other[-4]
        assert 0.96 * ((params.max_response_kl if held == BY_RESPONSE_KL else None) or params.max_kl) < kl
        assert ratio > 0.98 * other_ratio
        moved_V, other_V = self.moves(row)
        torch.testing.assert_close(moved_V, other_V * (ratio / other_ratio), rtol=1e-3, atol=1e-4)

    def moves(self, row: int) -> tuple[Tensor, Tensor]:
        """What the kernels and torch change of a row's logits [V] before a cap."""
        base_V, moved_V, other_V = (
            self._unfinished(logits_BV[row]) for logits_BV in (self.base_BV, self.logits_BV, self.other_BV)
        )
        return moved_V - base_V, other_V - base_V

    def divergence(self, row: int) -> float:
        """Of the row's logits from its base, in float64."""
        log_base, log_moved = (logits[row].double().log_softmax(-1) for logits in (self.base_BV, self.logits_BV))
        return float((log_moved.exp() * (log_moved - log_base)).sum())


def _by_row(stats: list[GroupStats]) -> dict[int, tuple[ControlParams, list[float]]]:
    return {
        row: (control, numbers)
        for group in stats
        for row, control, numbers in zip(
            group.group.rows, group.group.controls, group.numbers_RN.tolist(), strict=False
        )
    }


def objective(kind: str, **fields: Any) -> dict[str, Any]:
    return {"objective": {"type": kind, **fields}}


def asked(**fields: Any) -> ControlParams:
    return ControlParams.model_validate(fields)
