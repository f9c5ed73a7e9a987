"""Attention by a GPU's kernel, by Triton's interpreter: the truth but for rounding, and no row feels another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from server.engines.embedded.core import EngineCore
from server.engines.embedded.model import attention
from server.engines.embedded.model.layout import DecodeRow, PromptChunk
from server.engines.embedded.model.spans import AttentionKind
from tests.conftest import run
from tests.engines.test_laws import requests, tokens
from tests.kernels.attended import KINDS, PAGES, PLAIN, STRANGERS, Attended, Shape, each_case, each_dtype, part
from tests.triton_interpreter import add_in_order, quicken

pytestmark = pytest.mark.triton
# Of a result, at most, as a share of the weighted magnitudes of values: as of the native kernel.
ERRORS = {torch.float32: 2**-17, torch.bfloat16: 2**-7 + 2**-14}


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RECONTROL_KERNELS", "triton")
    monkeypatch.setattr(attention, "can_attend_natively", lambda *_: False)
    quicken(monkeypatch)
    add_in_order(monkeypatch)
    with np.errstate(all="ignore"):
        yield


@each_dtype
@each_case
def test_a_prompt_over_pages_is_the_truth_but_for_rounding(
    shape: Shape, how: AttentionKind, dtype: torch.dtype
) -> None:
    attended = Attended(shape, dtype, stale=float("nan"), way="triton")
    rows = attended.rows(150, 1)
    expected, magnitudes = attended.truth(rows, how)
    error = (attended.prompt(rows, how).double() - expected).abs()
    assert bool((error <= ERRORS[dtype] * magnitudes).all())


@each_dtype
@each_case
def test_a_decoding_row_is_the_truth_but_for_rounding(shape: Shape, how: AttentionKind, dtype: torch.dtype) -> None:
    attended = Attended(shape, dtype, stale=float("nan"), way="triton")
    rows = attended.rows(140, 1)
    attended.prompt(part(rows, 0, 139), how)
    expected, magnitudes = attended.truth(rows, how)
    got = attended(part(rows, 139, 140), [DecodeRow(PAGES, 139, 0)], [], how)
    assert bool(((got[0].double() - expected[139]).abs() <= ERRORS[dtype] * magnitudes[139]).all())


@pytest.mark.parametrize("how", KINDS, ids=["plain", "window", "capped", "both", "chunks"])
def test_a_row_whose_pages_are_split_is_the_truth_but_for_rounding(
    how: AttentionKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.kernels.gpu.attention._SPLIT_PAGES", 2)
    attended = Attended(Shape(4, 2, 32, 32, has_sinks=True), torch.float32, way="triton")
    rows = attended.rows(330, 1)
    attended.prompt(part(rows, 0, 329), how)
    expected, magnitudes = attended.truth(rows, how)
    got = attended(part(rows, 329, 330), [DecodeRow(PAGES, 329, 0)], [], how)
    assert bool(((got[0].double() - expected[329]).abs() <= ERRORS[torch.float32] * magnitudes[329]).all())


@pytest.mark.parametrize("cut", [1, 16, 37, 64, 100])
def test_a_prompt_is_the_same_to_the_bit_however_it_is_cut_and_beside_others(cut: int) -> None:
    attended, other = (Attended(Shape(6, 2, 32, 32), torch.float32, way="triton") for _ in range(2))
    rows, strange = attended.rows(130, 1), attended.rows(41, 2)
    whole = attended.prompt(rows, PLAIN)
    first = other.prompt(part(rows, 0, cut), PLAIN)
    joined = [torch.cat(pair) for pair in zip(strange, part(rows, cut, 130), strict=True)]
    rest = other(joined, [], [PromptChunk(STRANGERS, 0, [0] * 41), PromptChunk(PAGES, cut, [0] * (130 - cut))], PLAIN)
    assert torch.equal(torch.cat([first, rest[41:]]), whole)


def test_a_decoding_row_is_the_same_to_the_bit_alone_and_beside_one_whose_pages_are_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.kernels.gpu.attention._SPLIT_PAGES", 1)
    alone, beside = (Attended(Shape(6, 2, 32, 32), torch.float32, way="triton") for _ in range(2))
    rows, strange = alone.rows(30, 1), alone.rows(100, 2)
    for attended in (alone, beside):
        attended.prompt(part(rows, 0, 29), PLAIN)
    beside(part(strange, 0, 99), [], [PromptChunk(STRANGERS, 0, [0] * 99)], PLAIN)
    joined = [torch.cat(pair) for pair in zip(part(rows, 29, 30), part(strange, 99, 100), strict=True)]
    got = beside(joined, [DecodeRow(PAGES, 29, 0), DecodeRow(STRANGERS, 99, 0)], [], PLAIN)
    assert torch.equal(got[:1], alone(part(rows, 29, 30), [DecodeRow(PAGES, 29, 0)], [], PLAIN))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_whole_responses_are_those_of_torchs_attention(
    make_core: Callable[..., EngineCore], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = tokens(run(make_core(architecture), requests(4)))
    monkeypatch.delenv("RECONTROL_KERNELS")
    assert got == tokens(run(make_core(architecture), requests(4)))
