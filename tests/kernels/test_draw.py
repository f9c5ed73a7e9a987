"""The draw of a GPU's kernel against torch's operations: by Triton's interpreter, and compiled where there is a GPU.

A draw may differ where the number lies within 1e-5 of the border between two tokens, since sums differ in rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engines.embedded.logits import LogitRules, adjusted
from server.engines.embedded.rule_tables import RuleRows
from server.engines.embedded.sampler import RowSampling, _draw, _filtered, sample
from server.engines.embedded.sequence import SequenceState
from server.errors import GenerationError
from server.kernels.gpu.draw import Drawing, draw, launch
from server.types import SamplingParams
from tests.triton_interpreter import quicken

pytestmark = pytest.mark.triton
NUMBERS = [0.0, 0.03, 0.2, 0.41, 0.5, 0.77, 0.93, 0.9999]
FILTERS = {
    "none": {},
    "top_p": {"top_p": 0.6},
    "top_p of next to nothing": {"top_p": 1e-9},
    "top_p of 0": {"top_p": 0.0},
    "top_k": {"top_k": 7},
    "top_k of 1": {"top_k": 1},
    "top_k beyond the vocabulary": {"top_k": 5000},
    "min_p": {"min_p": 0.05},
    "min_p of 1": {"min_p": 1.0},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("no CUDA device" if request.param == "cuda" else "where there is a GPU the kernels are compiled")
    if request.param == "cpu":
        quicken(monkeypatch)
    with np.errstate(all="ignore"):  # As a GPU has it.
        yield request.param


def logits(num_rows: int, device: str, size: int = 1500) -> Tensor:
    return 2.5 * torch.randn(num_rows, size, generator=torch.Generator().manual_seed(3)).to(device)


def by_torch(logits_BV: Tensor, row: RowSampling, uniforms: list[float]) -> list[int]:
    return _draw(logits_BV, [row] * len(uniforms), uniforms).tolist()


def by_kernel(logits_BV: Tensor, row: RowSampling, uniforms: list[float]) -> list[int]:
    drawings = [Drawing(row.temperature, row.top_k, row.top_p, row.min_p, u) for u in uniforms]
    return draw(logits_BV, drawings).tolist()


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_a_token_is_drawn_as_torch_draws_it(name: str, temperature: float, device: str) -> None:
    row = RowSampling(temperature, stream=(0,), **{"top_p": 1.0, "top_k": 0, **FILTERS[name]})  # type: ignore[arg-type]
    logits_BV = logits(1, device).expand(len(NUMBERS), -1).contiguous()
    assert by_kernel(logits_BV, row, NUMBERS) == by_torch(logits_BV, row, NUMBERS)


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p", "all"])
def test_what_filters_keep_is_what_torch_keeps(name: str, device: str) -> None:
    """By the first and the last token that can be drawn, with a few equal logits at the border of top_k."""
    logits_1V = logits(1, device)
    order = logits_1V[0].argsort(descending=True)
    logits_1V[0, order[5:9]] = logits_1V[0, order[6]].clone()
    row = RowSampling(1.0, stream=(0,), **{"top_p": 1.0, "top_k": 0, **FILTERS[name]})  # type: ignore[arg-type]
    kept = _filtered(logits_1V.softmax(-1), [row])[0].nonzero()[:, 0].tolist()
    ends = by_kernel(logits_1V.expand(2, -1).contiguous(), row, [0.0, 1 - 2.0**-24])
    assert ends == [kept[0], kept[-1]]


def test_a_greedy_row_takes_the_first_of_the_largest(device: str) -> None:
    logits_BV = logits(3, device)
    logits_BV[1, [1200, 40]] = 100.0
    greedy = RowSampling(0.0, 0.5, 3, (0,))
    drawn = by_kernel(logits_BV, greedy, [0.9] * 3)
    assert drawn == [int(logits_BV[0].argmax()), 40, int(logits_BV[2].argmax())]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_draws_nothing_and_spares_the_others(bad: float, device: str) -> None:
    logits_BV = logits(4, device)
    row = RowSampling(1.0, 0.9, 0, (0,))
    expected = by_kernel(logits_BV, row, NUMBERS[:4])
    logits_BV[1, 7], logits_BV[2] = bad, -torch.inf
    assert by_kernel(logits_BV, row, NUMBERS[:4]) == [expected[0], -1, -1, expected[3]]


def test_tokens_that_a_mask_forbids_are_never_drawn(device: str) -> None:
    logits_BV = logits(len(NUMBERS), device)
    logits_BV[:, 3:] = -torch.inf
    assert set(by_kernel(logits_BV, RowSampling(1.0, 1.0, 0, (0,)), NUMBERS)) <= {0, 1, 2}


def test_the_sampler_draws_by_it_where_it_is_used(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [RowSampling(1.0, 0.9, 0, (0, 0)), RowSampling(0.0, 1.0, 0, (0, 1)), RowSampling(0.7, 1.0, 5, (0, 2), 0.1)]
    logits_BV = logits(3, device)
    monkeypatch.setenv("RECONTROL_KERNELS", "torch")
    expected = sample(logits_BV, rows, [0, 1, 2])
    monkeypatch.setenv("RECONTROL_KERNELS", "triton")
    assert torch.equal(sample(logits_BV, rows, [0, 1, 2]), expected)


def test_a_vocabulary_of_256_000_is_drawn_from(device: str) -> None:
    logits_BV, row = logits(1, device, 256_000), RowSampling(1.0, 0.95, 0, (0,))
    (drawn,), (expected,) = by_kernel(logits_BV, row, [0.4321]), by_torch(logits_BV, row, [0.4321])
    cumulative_V = _filtered(logits_BV.softmax(-1), [row])[0].double().cumsum(0)
    shares = cumulative_V / cumulative_V[-1]
    assert abs(float(shares[drawn] - shares[expected])) < 1e-4


PROMPT = [3, 9, 3, 700, 1499]
RULES: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": {9: 4.0, 10: -100.0, 700: 0.1}},
    "repetition": {"repetition_penalty": 1.8},
    "repetition that is wanted": {"repetition_penalty": 0.7},
    "frequency": {"frequency_penalty": 0.3},
    "presence": {"presence_penalty": -1.1},
    "all": {"logit_bias": {9: 1.3, 12: 2.0}, "repetition_penalty": 1.3, "frequency_penalty": 0.37,
            "presence_penalty": 0.51},
}  # fmt: skip
GREEDY, PLAIN = Drawing(0.0, 0, 1.0, 0.0, 0.5), Drawing(1.0, 0, 1.0, 0.0, 0.0)


@dataclass(eq=False)
class Row:
    """What `RuleRows` reads of a sequence."""

    logit_rules: LogitRules | None = None
    token_ids: list[int] = field(default_factory=list)
    held_to: Any = None
    state: SequenceState = SequenceState.DECODING


@dataclass
class Mask:
    tokens: tuple[int, ...] | None

    def allowed(self) -> np.ndarray:
        if self.tokens is None:
            raise GenerationError("no way on")
        return np.isin(np.arange(1500), self.tokens)


def ruled(name: str, output: list[int]) -> Row:
    return Row(LogitRules.of(SamplingParams(**RULES[name]), PROMPT), output)


def by_torch_rules(logits_BV: Tensor, rows: list[Row]) -> Tensor:
    return adjusted(logits_BV, [row.logit_rules for row in rows], [row.token_ids for row in rows])


def drawn(logits_BV: Tensor, rows: list[Row], drawings: list[Drawing], rule_rows: RuleRows | None = None) -> list[int]:
    tables = (rule_rows or RuleRows()).tables(rows, logits_BV.shape[1], logits_BV.device)  # type: ignore[arg-type]
    return draw(logits_BV, drawings, tables).tolist()


@pytest.mark.parametrize("name", RULES)
def test_rules_change_logits_as_torch_does_to_the_last_bit(name: str, device: str) -> None:
    """A token that no rule concerns, before or behind one that rules raise or lower, gets what that comes to: of two
    equal logits the first is drawn, and were one a last bit higher, it would be drawn whichever comes first."""
    concerned = [9, 700] if name == "bias" else [9, 20, 40]
    rows = [ruled(name, [20] * (1 + i // 3) + [40, 9] + [60] * i) for i in range(12)]
    logits_BV = logits(12, device).clamp(-4.0, 4.0)
    for i in range(12):
        logits_BV[i, concerned[i % len(concerned)]] = 9.0 + 0.713 * i
    top_B = by_torch_rules(logits_BV, rows).max(-1).values
    for i in range(12):
        logits_BV[i, (5, 1400)[i // len(concerned) % 2]] = top_B[i]
    expected = by_torch_rules(logits_BV, rows).argmax(-1).tolist()
    assert {5, *concerned} == set(expected)
    assert drawn(logits_BV, rows, [GREEDY] * 12) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_rules_and_rows_without_are_drawn_as_torch_draws_them(dtype: torch.dtype, device: str) -> None:
    rows = [*(ruled(name, [20, 20, 40, 9, 20]) for name in RULES), Row(), ruled("frequency", [])]
    logits_BV = logits(len(rows), device).to(dtype)
    uniforms, sampling = NUMBERS[: len(rows)], RowSampling(0.9, 0.8, 50, (0,), 0.01)
    before_BV, expected = logits_BV.clone(), by_torch(by_torch_rules(logits_BV.float(), rows), sampling, uniforms)
    assert drawn(logits_BV, rows, [Drawing(0.9, 50, 0.8, 0.01, u) for u in uniforms]) == expected
    assert torch.equal(logits_BV, before_BV)


def test_what_schemas_forbid_is_never_drawn_and_one_that_fails_ends_its_row_alone(device: str) -> None:
    free = ruled("bias", [])
    rows = [Row(held_to=Mask((31, 32, 1499))), Row(held_to=Mask(None)), free, ruled("all", [32])]
    rows[3].held_to = Mask((0, 64))
    logits_BV = logits(4, device)
    logits_BV[0, 1499] = logits_BV[3, 64] = 50.0
    assert drawn(logits_BV, rows, [GREEDY] * 4) == [1499, -1, drawn(logits_BV[2:3], [free], [GREEDY])[0], 64]
    assert drawn(logits_BV, rows, [PLAIN] * 4)[::3] == [31, 0]


def test_what_has_been_drawn_is_counted_on_and_anew_where_tokens_are_taken_back(device: str) -> None:
    row, rule_rows, logits_BV = ruled("frequency", []), RuleRows(), logits(1, device)
    greedy = []
    for _ in range(12):
        greedy += drawn(logits_BV, [row], [GREEDY], rule_rows)
        assert greedy[-1] == int(by_torch_rules(logits_BV, [row]).argmax())
        row.token_ids.append(greedy[-1])
        if len(row.token_ids) == 5:
            del row.token_ids[2:]
    assert len(set(greedy)) < len(greedy)


def test_rules_over_a_vocabulary_of_256_000_read_all_of_it(device: str) -> None:
    logits_BV, row = logits(1, device, 256_000), ruled("all", [255_999, 255_999, 2047, 2048])
    logits_BV[0, 255_999], logits_BV[0, 255_998] = 30.0, 27.5
    expected = int(by_torch_rules(logits_BV, [row]).argmax())
    assert (drawn(logits_BV, [row], [GREEDY]), expected) == ([expected], 255_998)


def test_a_draw_that_is_recorded_reads_its_tables_and_logits_anew(device: str) -> None:
    """On a CPU, where nothing is recorded, it is launched again."""
    rows, logits_BV = [ruled("all", [20, 40, 20]), Row(), ruled("bias", [])], logits(3, device)
    tables = RuleRows().tables(rows, logits_BV.shape[1], logits_BV.device)  # type: ignore[arg-type]
    table_BW = torch.tensor([Drawing(1.0, 0, 0.9, 0.0, u) for u in (0.1, 0.5, 0.7)], device=device)
    again = recorded(lambda: launch(logits_BV, table_BW, tables), device)
    logits_BV.copy_(logits(3, device).flip(1))
    table_BW[:, 4] = torch.tensor([0.9, 0.3, 0.6])
    expected = drawn(logits_BV, rows, [Drawing(1.0, 0, 0.9, 0.0, u) for u in (0.9, 0.3, 0.6)])
    assert again().tolist() == expected


def recorded(draw_once: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    draw_once()
    if device != "cuda":
        return draw_once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens_B = draw_once()

    def replayed() -> Tensor:
        graph.replay()
        return tokens_B

    return replayed
