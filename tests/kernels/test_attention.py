"""Native attention against torch's over the same pages, and a whole native model against transformers' modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from server.engines.embedded.core import EngineCore
from server.engines.embedded.model import attention
from server.engines.embedded.model.attention import AttentionKind, DecodeRow, Segment, Span, StepLayout
from server.engines.embedded.model.kv_cache import KVCache
from server.engines.embedded.model.llama import NativeLlama
from server.engines.embedded.model.loader import LoadedModel
from server.kernels import native

pytestmark = pytest.mark.skipif(native() is None, reason="no native kernels on this machine")
KINDS = [AttentionKind(0.17), AttentionKind(0.17, Span(window=70)), AttentionKind(0.17, softcap=5.0)]


class Attended:
    """A cache, and rows of it attended natively or by torch."""

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_size: int) -> None:
        self.kv = KVCache(12)
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size

    def __call__(
        self, rows: list[torch.Tensor], decode: list[DecodeRow], segments: list[Segment], how: AttentionKind, *,
        natively: bool,
    ) -> torch.Tensor:  # fmt: skip
        step = StepLayout.of(self.kv, decode, segments, torch.device("cpu"))
        keys, values = self.kv.layer(0, *rows[1:])
        if not natively:
            return attention._attend_by_torch(rows, keys, values, step, how)
        out = torch.empty_like(rows[0])
        addresses, strides = [row.data_ptr() for row in rows], [row.stride(0) for row in rows]
        attention.attend_natively(addresses, strides, out.data_ptr(), keys, values, step, self.num_heads, how)
        return out

    def rows(self, count: int, seed: int) -> list[torch.Tensor]:
        rng = torch.Generator().manual_seed(seed)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        return [torch.randn(count, n, self.head_size, generator=rng).bfloat16() for n in heads]


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), [(9, 3, 64), (4, 4, 32), (8, 1, 32)])
def test_rows_of_prompts_and_of_decoding_are_torchs(
    num_heads: int, num_kv_heads: int, head_size: int, how: AttentionKind
) -> None:
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_size": head_size}
    one, other = Attended(**shape), Attended(**shape)
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
            one(rows, decode, segments, how, natively=True).float(),
            other(rows, decode, segments, how, natively=False).float(),
            atol=2e-2,
            rtol=2e-2,
        )


@pytest.mark.parametrize("how", KINDS)
def test_how_a_text_was_cut_and_what_else_a_step_holds_cannot_be_seen(how: AttentionKind) -> None:
    shape = {"num_heads": 6, "num_kv_heads": 2, "head_size": 32}
    whole, cut = Attended(**shape), Attended(**shape)
    pages, stranger = [1, 2, 3], [4]
    rows = whole.rows(150, 0)
    expected = whole(rows, [], [Segment(pages, 0, [0] * 150)], how, natively=True)
    for first, last in ((0, 1), (1, 64), (64, 101), (101, 150)):
        extra = cut.rows(5, last)
        part = [torch.cat([row[first:last], more]) for row, more in zip(rows, extra, strict=True)]
        if last - first > 40:
            segments = [Segment(pages, first, [0] * (last - first)), Segment(stranger, 0, [0] * 5)]
            got = cut(part, [], segments, how, natively=True)
        else:
            decode = [DecodeRow(pages, position, 0) for position in range(first, last)]
            got = cut(part, decode, [Segment(stranger, 0, [0] * 5)], how, natively=True)
        assert torch.equal(got[: last - first], expected[first:last])


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
