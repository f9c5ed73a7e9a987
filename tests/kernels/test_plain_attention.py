"""Attention on a CPU without kernels: the truth, and to the bit the laws that the native one has."""

from __future__ import annotations

import itertools

import pytest
import torch

from server.engines.embedded.model import plain_attention
from server.engines.embedded.model.layout import DecodeRow, PromptChunk
from server.engines.embedded.model.plain_attention import _exp, _sum
from server.engines.embedded.model.spans import AttentionKind
from tests.kernels.attended import KINDS, PAGES, Attended, Shape, each_case, each_dtype, part

SHAPE = Shape(4, 2, 24, 20, has_sinks=True)
# The result alone is rounded in bfloat16.
ERRORS = {torch.float32: 2**-17, torch.bfloat16: 2**-8 + 2**-14}


def plain(shape: Shape, dtype: torch.dtype = torch.float32, *, stale: float = 0.0) -> Attended:
    return Attended(shape, dtype, stale=stale, way="plain")


@each_dtype
@each_case
def test_a_prompt_is_the_truth_but_for_rounding(shape: Shape, how: AttentionKind, dtype: torch.dtype) -> None:
    attended = plain(shape, dtype)
    rows = attended.rows(100, 1)
    expected, magnitudes = attended.truth(rows, how)
    assert bool(((attended.prompt(rows, how).double() - expected).abs() <= ERRORS[dtype] * magnitudes).all())


@each_dtype
@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("cuts", [(0, 1, 64, 101, 150), (0, 17, 128, 129, 150)])
def test_how_a_prompt_was_cut_and_what_else_a_step_holds_cannot_be_seen(
    cuts: tuple[int, ...], how: AttentionKind, dtype: torch.dtype
) -> None:
    whole, cut = plain(SHAPE, dtype), plain(SHAPE, dtype)
    rows = whole.rows(150, 0)
    expected = whole.prompt(rows, how)
    for first, last in itertools.pairwise(cuts):
        own, extra = part(rows, first, last), cut.rows(71, last)
        step = [torch.cat([other[:1], row, other[1:]]) for row, other in zip(own, extra, strict=True)]
        chunks = [PromptChunk(PAGES, first, [0] * (last - first)), PromptChunk([4, 10], 0, [0] * 70)]
        got = cut(step, [DecodeRow([2, 6, 8, 0], 200, 0)], chunks, how)
        assert torch.equal(got[1 : 1 + last - first], expected[first:last])


@pytest.mark.parametrize("how", KINDS)
def test_a_decode_row_has_the_bits_of_the_same_row_of_a_prompt(how: AttentionKind) -> None:
    whole, decoded = plain(SHAPE), plain(SHAPE)
    rows = whole.rows(140, 2)
    expected = whole.prompt(rows, how)
    decoded.prompt(part(rows, 0, 50), how)
    for position in range(50, 140):
        got = decoded(part(rows, position, position + 1), [DecodeRow(PAGES, position, 0)], [], how)
        assert torch.equal(got[0], expected[position])


def test_how_many_rows_are_attended_at_a_time_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    attended = plain(SHAPE)
    rows = attended.rows(130, 3)
    expected = attended.prompt(rows, KINDS[0])
    for count in (1, 30_000, 1 << 30):
        monkeypatch.setattr(plain_attention, "_NUMBERS_AT_ONCE", count)
        assert torch.equal(attended.prompt(rows, KINDS[0]), expected)


@pytest.mark.parametrize("how", KINDS)
def test_what_a_former_owner_left_in_a_page_cannot_be_seen(how: AttentionKind) -> None:
    clean, used = plain(SHAPE), plain(SHAPE, stale=float("nan"))
    rows = clean.rows(70, 5)
    assert torch.equal(used.prompt(rows, how), clean.prompt(rows, how))


@pytest.mark.parametrize("how", KINDS)
def test_a_token_that_is_not_finite_breaks_those_that_see_it_and_no_others(how: AttentionKind) -> None:
    attended = plain(SHAPE)
    rows = attended.rows(150, 6)
    expected = attended.prompt(rows, how)
    for tensor in rows[1:]:
        tensor[63, 1, 5:9] = float("nan")
    got = attended.prompt(rows, how)[:, 2:]
    sees = how.span.visible(torch.tensor(63), torch.arange(150))
    assert torch.equal(got[~sees], expected[~sees, 2:])
    assert not bool(got[sees].isfinite().all(-1).any())


def test_exponentials_are_the_truth_but_for_rounding_and_the_same_in_any_place() -> None:
    x = torch.cat([torch.linspace(-87.0, 0.0, 9_999), torch.tensor([0.0, -float("inf"), float("nan"), -88.0])])
    y = _exp(x)
    torch.testing.assert_close(y[:-4].double(), x[:-4].double().exp(), rtol=3e-7, atol=0.0)
    assert y[-4:].nan_to_num(7.0).tolist() == [1.0, 0.0, 7.0, 0.0]
    in_parts = torch.cat([_exp(few) for few in x.split(7)])
    assert torch.equal(in_parts.view(torch.int32), y.view(torch.int32))


@pytest.mark.parametrize("size", [1, 2, 5, 64, 80])
def test_sums_of_any_size_add_each_number_once(size: int) -> None:
    terms = 2.0 ** torch.arange(size).remainder(20).repeat(3, 1).float()
    assert torch.equal(_sum(terms, dim=1), terms.sum(dim=1))
