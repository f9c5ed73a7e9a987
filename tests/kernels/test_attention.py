"""Native attention on every level of this machine: torch's numbers over the same pages, and its laws to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from server.engines.embedded.core import EngineCore
from server.engines.embedded.model import attention
from server.engines.embedded.model.attention import AttentionKind, DecodeRow, Segment, Span, StepLayout
from server.engines.embedded.model.kv_cache import KVCache
from server.engines.embedded.model.llama import NativeLlama
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.model.torch_attention import attend_by_torch
from server.kernels import Kernels, native

pytestmark = pytest.mark.skipif(native() is None, reason="no native kernels on this machine")
PLAIN, WINDOW, CAPPED = AttentionKind(0.17), AttentionKind(0.17, Span(window=70)), AttentionKind(0.17, softcap=5.0)
BOTH = AttentionKind(0.17, Span(window=33), softcap=5.0)
KINDS = [PLAIN, WINDOW, CAPPED, BOTH]
# Heads, key-value heads, head size.
CASES = [
    ((9, 3, 64), PLAIN), ((9, 3, 64), WINDOW), ((4, 4, 32), CAPPED), ((4, 4, 32), AttentionKind(0.17, Span(window=1))),
    ((8, 1, 96), BOTH), ((28, 1, 32), WINDOW), ((32, 2, 128), CAPPED), ((2, 1, 256), BOTH),
]  # fmt: skip
Shape = tuple[int, int, int]
each_case = pytest.mark.parametrize(("shape", "how"), CASES)
PAGES = [3, 11, 7, 1, 9, 5]
STRANGERS = [2, 4]


@pytest.fixture(autouse=True)
def _level(library: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "native", lambda: library)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Attended:
    """A cache, and rows of it attended natively or by torch."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_size: int, *, stale: float = 0.0) -> None:
        """`stale` is what a former owner left in every page."""
        self.kv = KVCache(12)
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        for tensor in self.kv.layer(0, *self.rows(1, 0)[1:]):
            tensor.fill_(stale)

    def __call__(
        self, rows: list[torch.Tensor], decode: list[DecodeRow], segments: list[Segment], how: AttentionKind, *,
        natively: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        step = StepLayout.of(self.kv, decode, segments, torch.device("cpu"))
        keys, values = self.kv.layer(0, *rows[1:])
        if not natively:
            return attend_by_torch(rows, keys, values, step, how)
        out = torch.empty_like(rows[0])
        addresses, strides = [row.data_ptr() for row in rows], [row.stride(0) for row in rows]
        attention.attend_natively(addresses, strides, out.data_ptr(), keys, values, step, self.num_heads, how)
        return out

    def prompt(self, rows: list[torch.Tensor], how: AttentionKind, first: int = 0) -> torch.Tensor:
        return self(rows, [], [Segment(PAGES, first, [0] * len(rows[0]))], how)

    def rows(self, count: int, seed: int) -> list[torch.Tensor]:
        """Queries, keys and values."""
        rng = torch.Generator().manual_seed(seed)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        return [torch.randn(count, n, self.head_size, generator=rng).bfloat16() for n in heads]


def part(rows: list[torch.Tensor], first: int, last: int) -> list[torch.Tensor]:
    return [row[first:last].contiguous() for row in rows]


def truth(rows: list[torch.Tensor], how: AttentionKind) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, of a whole prompt [T, heads, P]: the weighted values, and the weighted magnitudes of values."""
    query, key, value = (row.double().transpose(0, 1) for row in rows)
    key, value = (row.repeat_interleave(len(query) // len(key), dim=0) for row in (key, value))
    scores = query @ key.transpose(1, 2) * how.scaling
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    seen = how.span.visible(torch.arange(len(rows[0])), torch.arange(len(rows[0]))[:, None])
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(0, 1), (weights @ value.abs()).transpose(0, 1)


@each_case
def test_a_prompt_over_many_pages_is_the_truth_but_for_two_roundings_to_bfloat16(
    shape: Shape, how: AttentionKind
) -> None:
    attended = Attended(*shape)
    rows = attended.rows(350, 1)
    expected, magnitudes = truth(rows, how)
    # Weights and results are rounded, by 2^-8 at most each; scores and sums are float32.
    error = (attended.prompt(rows, how).double() - expected).abs()
    assert bool((error <= (2**-7 + 2**-14) * magnitudes).all())


@each_case
def test_rows_of_prompts_and_of_decoding_are_torchs(shape: Shape, how: AttentionKind) -> None:
    one, other = Attended(*shape), Attended(*shape)
    long, short = [3, 1, 7], [5]
    steps = [
        ([], [Segment(long, 0, [0] * 90), Segment(short, 0, [0] * 7)]),
        ([], [Segment(long, 90, [0] * 61)]),
        ([DecodeRow(short, 7, 0), DecodeRow(long, 151, 0)], []),
        ([DecodeRow(long, 152, 0)], [Segment([9], 0, [0] * 33)]),
    ]
    for number, (decode, segments) in enumerate(steps):
        rows = one.rows(len(decode) + sum(len(segment.token_ids) for segment in segments), number)
        torch.testing.assert_close(
            one(rows, decode, segments, how).float(),
            other(rows, decode, segments, how, natively=False).float(),
            atol=2e-2,
            rtol=2e-2,
        )


@each_case
@pytest.mark.parametrize("cuts", [(0, 1, 64, 101, 350), (0, 17, 128, 129, 200, 263, 350), (0, 350)])
def test_how_a_prompt_was_cut_and_what_else_a_step_holds_cannot_be_seen(
    cuts: tuple[int, ...], shape: Shape, how: AttentionKind
) -> None:
    whole, cut = Attended(*shape), Attended(*shape)
    rows = whole.rows(350, 0)
    expected = whole.prompt(rows, how)
    for first, last in itertools.pairwise(cuts):
        own, extra = part(rows, first, last), cut.rows(71, last)
        step = [torch.cat([other[:1], row, other[1:]]) for row, other in zip(own, extra, strict=True)]
        segments = [Segment(PAGES, first, [0] * (last - first)), Segment([4, 10], 0, [0] * 70)]
        got = cut(step, [DecodeRow([2], first % 64, 0)], segments, how)
        assert torch.equal(got[1 : 1 + last - first], expected[first:last])


@each_case
def test_a_decode_row_has_the_bits_of_the_same_row_of_a_prompt(shape: Shape, how: AttentionKind) -> None:
    whole, decoded = Attended(*shape), Attended(*shape)
    rows = whole.rows(200, 2)
    expected = whole.prompt(rows, how)
    decoded.prompt(part(rows, 0, 50), how)
    for position in range(50, 200):
        got = decoded(part(rows, position, position + 1), [DecodeRow(PAGES, position, 0)], [], how)
        assert torch.equal(got[0], expected[position])


def test_several_decode_rows_of_one_sequence_in_a_step_are_a_chunk_of_it() -> None:
    whole, decoded = Attended(9, 3, 64), Attended(9, 3, 64)
    rows = whole.rows(80, 3)
    expected = whole.prompt(rows, KINDS[0])
    got = decoded(rows, [DecodeRow(PAGES, position, 0) for position in range(80)], [], KINDS[0])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("how", KINDS)
def test_the_number_of_threads_cannot_be_seen(how: AttentionKind, num_threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2, 3):
        num_threads(count)
        attended = Attended(9, 3, 64)
        rows = attended.rows(303, 4)
        decode = [DecodeRow([page], 20, 0) for page in STRANGERS]
        results.append(attended(rows, decode, [Segment(PAGES, 0, [0] * 301)], how))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("stale", [float("nan"), float("-inf"), 3e38])
def test_what_a_former_owner_left_in_a_page_cannot_be_seen(stale: float, how: AttentionKind) -> None:
    clean, used = Attended(9, 3, 64), Attended(9, 3, 64, stale=stale)
    rows = clean.rows(200, 5)
    for first, last in ((0, 7), (7, 70), (70, 71), (71, 200)):
        chunk = part(rows, first, last)
        assert torch.equal(used.prompt(chunk, how, first), clean.prompt(chunk, how, first))


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("broken", [0, 63, 100])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_breaks_those_that_see_it_and_no_others(
    number: float, broken: int, how: AttentionKind
) -> None:
    attended = Attended(9, 3, 64)
    rows = attended.rows(200, 6)
    expected = attended.prompt(rows, how)
    for tensor in rows[1:]:
        tensor[broken, 1, 5:9] = number
    got = attended.prompt(rows, how)[:, 3:6]
    sees = range(broken, 200 if how.span.window is None else min(200, broken + how.span.window))
    sane = [position for position in range(200) if position not in sees]
    assert torch.equal(got[sane], expected[sane, 3:6])
    assert not bool(got[list(sees)].isfinite().all(-1).any())


def test_numbers_near_the_smallest_have_the_same_bits_in_a_prompt_and_in_decoding() -> None:
    """Products on some levels take what is below the normal numbers for zero."""
    whole, decoded = Attended(9, 3, 64), Attended(9, 3, 64)
    rows = whole.rows(150, 7)
    rows[2] *= 2.0**-126
    expected = whole.prompt(rows, KINDS[0])
    assert bool(expected.any())
    for position in range(150):
        got = decoded(part(rows, position, position + 1), [DecodeRow(PAGES, position, 0)], [], KINDS[0])
        assert torch.equal(got[0].view(torch.int16), expected[position].view(torch.int16))


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
