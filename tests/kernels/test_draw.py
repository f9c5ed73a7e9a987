"""The draw of a GPU's kernel against torch's operations: by Triton's interpreter, and compiled where there is a GPU.

A draw may differ where the number lies within 1e-5 of the border between two tokens, since sums differ in rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engines.embedded.sampler import RowSampling, _draw, _filtered, sample
from server.kernels.gpu.draw import Drawing, draw
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
