"""Native attention on every level of this machine: torch's numbers over the same pages, and its laws to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from server.engines.embedded.core import EngineCore
from server.engines.embedded.model import attention
from server.engines.embedded.model.layout import DecodeRow, PromptChunk
from server.engines.embedded.model.llama import NativeLlama
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.model.spans import AttentionKind
from server.kernels import Kernels, native
from tests.kernels.attended import (
    KINDS,
    PAGES,
    STRANGERS,
    Attended,
    Shape,
    each_case,
    each_dtype,
    part,
)

pytestmark = pytest.mark.skipif(native() is None, reason="no native kernels on this machine")
PLAIN_SHAPE = Shape(9, 3, 64, 64)
# Of a result, at most, as a share of the weighted magnitudes of values. Scores and sums are float32; in bfloat16
# weights and results are rounded, by 2^-8 at most each.
ERRORS = {torch.float32: 2**-17, torch.bfloat16: 2**-7 + 2**-14}


@pytest.fixture(autouse=True)
def _level(library: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "native", lambda: library)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_dtype
@each_case
def test_a_prompt_over_many_pages_is_the_truth_but_for_rounding(
    shape: Shape, how: AttentionKind, dtype: torch.dtype
) -> None:
    attended = Attended(shape, dtype)
    rows = attended.rows(350, 1)
    expected, magnitudes = attended.truth(rows, how)
    error = (attended.prompt(rows, how).double() - expected).abs()
    assert bool((error <= ERRORS[dtype] * magnitudes).all())


def test_keys_of_an_odd_size_are_attended_natively_in_float32_and_not_in_bfloat16() -> None:
    cpu = torch.device("cpu")
    assert attention.can_attend_natively(torch.float32, cpu, 7)
    assert not attention.can_attend_natively(torch.bfloat16, cpu, 7)
    attended = Attended(Shape(4, 2, 7, 9), torch.float32)
    rows = attended.rows(150, 8)
    expected, magnitudes = attended.truth(rows, KINDS[0])
    error = (attended.prompt(rows, KINDS[0]).double() - expected).abs()
    assert bool((error <= ERRORS[torch.float32] * magnitudes).all())


@each_dtype
@each_case
@pytest.mark.parametrize("way", ["plain", "batches"])
def test_rows_of_prompts_and_of_decoding_are_torchs(
    way: str, shape: Shape, how: AttentionKind, dtype: torch.dtype
) -> None:
    one, other = Attended(shape, dtype), Attended(shape, dtype, way=way)
    long, short = [3, 1, 7], [5]
    steps = [
        ([], [PromptChunk(long, 0, [0] * 90), PromptChunk(short, 0, [0] * 7)]),
        ([], [PromptChunk(long, 90, [0] * 41)]),
        ([DecodeRow(short, 7, 0), DecodeRow(long, 131, 0)], []),
        ([DecodeRow(long, 132, 0)], [PromptChunk([9], 0, [0] * 33)]),
    ]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    for number, (decode, chunks) in enumerate(steps):
        rows = one.rows(len(decode) + sum(len(chunk.token_ids) for chunk in chunks), number)
        got, expected = (attended(rows, decode, chunks, how).float() for attended in (one, other))
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@each_dtype
@each_case
@pytest.mark.parametrize("cuts", [(0, 1, 64, 101, 350), (0, 17, 128, 129, 200, 263, 350), (0, 350)])
def test_how_a_prompt_was_cut_and_what_else_a_step_holds_cannot_be_seen(
    cuts: tuple[int, ...], shape: Shape, how: AttentionKind, dtype: torch.dtype
) -> None:
    whole, cut = Attended(shape, dtype), Attended(shape, dtype)
    rows = whole.rows(350, 0)
    expected = whole.prompt(rows, how)
    for first, last in itertools.pairwise(cuts):
        own, extra = part(rows, first, last), cut.rows(71, last)
        step = [torch.cat([other[:1], row, other[1:]]) for row, other in zip(own, extra, strict=True)]
        chunks = [PromptChunk(PAGES, first, [0] * (last - first)), PromptChunk([4, 10], 0, [0] * 70)]
        got = cut(step, [DecodeRow([2], first % 64, 0)], chunks, how)
        assert torch.equal(got[1 : 1 + last - first], expected[first:last])


@each_dtype
@each_case
def test_a_decode_row_has_the_bits_of_the_same_row_of_a_prompt(
    shape: Shape, how: AttentionKind, dtype: torch.dtype
) -> None:
    whole, decoded = Attended(shape, dtype), Attended(shape, dtype)
    rows = whole.rows(200, 2)
    expected = whole.prompt(rows, how)
    decoded.prompt(part(rows, 0, 50), how)
    for position in range(50, 200):
        got = decoded(part(rows, position, position + 1), [DecodeRow(PAGES, position, 0)], [], how)
        assert torch.equal(got[0], expected[position])


@each_dtype
def test_several_decode_rows_of_one_sequence_in_a_step_are_a_chunk_of_it(dtype: torch.dtype) -> None:
    whole, decoded = Attended(PLAIN_SHAPE, dtype), Attended(PLAIN_SHAPE, dtype)
    rows = whole.rows(80, 3)
    expected = whole.prompt(rows, KINDS[0])
    got = decoded(rows, [DecodeRow(PAGES, position, 0) for position in range(80)], [], KINDS[0])
    assert torch.equal(got, expected)


@each_dtype
@pytest.mark.parametrize("how", KINDS)
def test_the_number_of_threads_cannot_be_seen(
    how: AttentionKind, dtype: torch.dtype, num_threads: Callable[[int], None]
) -> None:
    results = []
    for count in (1, 2, 3):
        num_threads(count)
        attended = Attended(PLAIN_SHAPE, dtype)
        rows = attended.rows(303, 4)
        decode = [DecodeRow([page], 20, 0) for page in STRANGERS]
        results.append(attended(rows, decode, [PromptChunk(PAGES, 0, [0] * 301)], how))
    assert all(torch.equal(result, results[0]) for result in results)


@each_dtype
@pytest.mark.parametrize("shape", [PLAIN_SHAPE, Shape(4, 2, 40, 72, has_sinks=True)])
@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("stale", [float("nan"), 3e38])
def test_what_a_former_owner_left_in_a_page_cannot_be_seen(
    stale: float, how: AttentionKind, shape: Shape, dtype: torch.dtype
) -> None:
    clean, used = Attended(shape, dtype), Attended(shape, dtype, stale=stale)
    rows = clean.rows(200, 5)
    for first, last in ((0, 7), (7, 70), (70, 71), (71, 200)):
        chunk = part(rows, first, last)
        assert torch.equal(used.prompt(chunk, how, first), clean.prompt(chunk, how, first))


@each_dtype
@pytest.mark.parametrize("shape", [PLAIN_SHAPE, Shape(9, 3, 40, 72, has_sinks=True)])
@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize(("broken", "number"), [(0, float("inf")), (63, float("nan")), (100, float("inf"))])
def test_a_token_that_is_not_finite_breaks_those_that_see_it_and_no_others(
    number: float, broken: int, how: AttentionKind, shape: Shape, dtype: torch.dtype
) -> None:
    attended = Attended(shape, dtype)
    rows = attended.rows(200, 6)
    expected = attended.prompt(rows, how)
    for tensor in rows[1:]:
        tensor[broken, 1, 5:9] = number
    got = attended.prompt(rows, how)[:, 3:6]
    sees = how.span.visible(torch.tensor(broken), torch.arange(200))
    assert torch.equal(got[~sees], expected[~sees, 3:6])
    assert not bool(got[sees].isfinite().all(-1).any())


@each_dtype
def test_numbers_near_the_smallest_have_the_same_bits_in_a_prompt_and_in_decoding(dtype: torch.dtype) -> None:
    """Products on some levels take what is below the normal numbers for zero."""
    whole, decoded = Attended(PLAIN_SHAPE, dtype), Attended(PLAIN_SHAPE, dtype)
    rows = whole.rows(150, 7)
    rows[2] *= 2.0**-126
    expected = whole.prompt(rows, KINDS[0])
    assert bool(expected.any())
    for position in range(150):
        got = decoded(part(rows, position, position + 1), [DecodeRow(PAGES, position, 0)], [], KINDS[0])
        assert torch.equal(got[0].view(torch.uint8), expected[position].view(torch.uint8))


@pytest.mark.parametrize("architecture", ["wide_llama", "wide_qwen2"])
def test_native_layers_give_the_states_of_transformers_modules(
    load_tiny: Callable[..., LoadedModel],
    make_core: Callable[..., EngineCore],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
) -> None:
    core = make_core(architecture, dtype="bfloat16")
    assert core.runner.is_native
    monkeypatch.setattr(NativeLlama, "can_run", lambda *_: False)
    plain = make_core(architecture, dtype="bfloat16")
    exact = make_core(architecture, dtype="float32")
    text = [(7 * i) % 250 for i in range(150)]
    truth = exact.states(text)
    errors = [float((c.states(text).float() - truth).norm() / truth.norm()) for c in (core, plain)]
    # As near to the states in float32 as transformers' own modules come in bfloat16.
    assert errors[0] < 1.3 * errors[1]
    assert errors[1] < 0.1


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "llama"])
def test_a_model_with_other_parts_is_left_to_transformers(
    make_core: Callable[..., EngineCore], architecture: str
) -> None:
    assert not make_core(architecture, dtype="bfloat16").runner.is_native
