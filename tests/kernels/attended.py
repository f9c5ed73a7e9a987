"""What the tests of attention share: cases, caches whose rows are attended in one way or another, and the truth."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from server.engines.embedded.model import attention
from server.engines.embedded.model.kv_cache import KVCache
from server.engines.embedded.model.layout import DecodeRow, PromptChunk, StepLayout
from server.engines.embedded.model.spans import AttentionKind, Span

PAGES = [3, 11, 7, 1, 9, 5]
STRANGERS = [2, 4]
PLAIN, WINDOW, CAPPED = AttentionKind(0.17), AttentionKind(0.17, Span(window=70)), AttentionKind(0.17, softcap=5.0)
BOTH, CHUNKS = AttentionKind(0.17, Span(window=33), softcap=5.0), AttentionKind(0.17, Span(chunk=70))
KINDS = [PLAIN, WINDOW, CAPPED, BOTH, CHUNKS]


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int
    has_sinks: bool = False


CASES = [
    (Shape(9, 3, 64, 64), PLAIN), (Shape(9, 3, 64, 64, has_sinks=True), WINDOW), (Shape(4, 4, 32, 32), CAPPED),
    (Shape(4, 4, 8, 8, has_sinks=True), AttentionKind(0.17, Span(window=1))), (Shape(8, 1, 96, 96), BOTH),
    (Shape(28, 1, 32, 32), CHUNKS), (Shape(32, 2, 128, 128), CAPPED), (Shape(2, 1, 256, 256), BOTH),
    (Shape(4, 2, 80, 80), PLAIN), (Shape(6, 2, 16, 48), WINDOW), (Shape(3, 3, 192, 128), CHUNKS),
    (Shape(5, 1, 72, 40, has_sinks=True), CAPPED), (Shape(2, 1, 6, 5, has_sinks=True), CHUNKS),
]  # fmt: skip
each_case = pytest.mark.parametrize(("shape", "how"), CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class Attended:
    """A cache, and rows of it attended natively or by torch."""

    def __init__(self, shape: Shape, dtype: torch.dtype, *, stale: float = 0.0, way: str = "native") -> None:
        """`stale` is what a former owner left in every page; a way is native, plain, triton (asked for by
        RECONTROL_KERNELS), or batches."""
        self.kv = KVCache(12)
        self.shape, self.dtype, self.way = shape, dtype, way
        for tensor in self.kv.layer(0, *self.rows(1, 0)[1:]):
            tensor.fill_(stale)
        rng = torch.Generator().manual_seed(99)
        self.sinks = torch.randn(shape.num_heads, generator=rng) + 2.0 if shape.has_sinks else None

    def __call__(
        self, rows: list[torch.Tensor], decode: list[DecodeRow], chunks: list[PromptChunk], how: AttentionKind
    ) -> torch.Tensor:
        step = StepLayout.of(self.kv, decode, chunks, torch.device("cpu"))
        keys, values = self.kv.layer(0, *rows[1:])
        if self.way != "native":
            out = attention._attend_without_native(rows, keys, values, step, how, self.sinks)
            if self.way in ("plain", "triton"):
                return out
            num_kv_heads = self.shape.num_kv_heads
            query_TNQP = rows[0].unflatten(1, (num_kv_heads, -1))
            sinks_NQ = None if self.sinks is None else self.sinks.view(num_kv_heads, -1)
            return attention._attend_in_batches(query_TNQP, keys, values, step, how, sinks_NQ).flatten(1, 2)
        out = rows[2].new_empty(len(rows[0]), self.shape.num_heads, self.shape.value_size)
        addresses, strides = [row.data_ptr() for row in rows], [row.stride(0) for row in rows]
        attention.attend_natively(
            addresses, strides, out.data_ptr(), keys, values, step, self.shape.num_heads, how, self.sinks
        )
        return out

    def prompt(self, rows: list[torch.Tensor], how: AttentionKind, first: int = 0) -> torch.Tensor:
        return self(rows, [], [PromptChunk(PAGES, first, [0] * len(rows[0]))], how)

    def rows(self, count: int, seed: int) -> list[torch.Tensor]:
        """Queries, keys and values."""
        rng, shape = torch.Generator().manual_seed(seed), self.shape
        sizes = [
            (shape.num_heads, shape.key_size), (shape.num_kv_heads, shape.key_size),
            (shape.num_kv_heads, shape.value_size),
        ]  # fmt: skip
        return [torch.randn(count, *size, generator=rng).to(self.dtype) for size in sizes]

    def truth(self, rows: list[torch.Tensor], how: AttentionKind) -> tuple[torch.Tensor, torch.Tensor]:
        """In float64, of a whole prompt [T, heads, V]: the weighted values, and the weighted magnitudes of values."""
        query, key, value = (row.double().transpose(0, 1) for row in rows)
        key, value = (row.repeat_interleave(len(query) // len(key), dim=0) for row in (key, value))
        scores = query @ key.transpose(1, 2) * how.scaling
        if how.softcap is not None:
            scores = how.softcap * torch.tanh(scores / how.softcap)
        seen = how.span.visible(torch.arange(len(rows[0])), torch.arange(len(rows[0]))[:, None])
        scores = scores.masked_fill(~seen, float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks.double()[:, None, None].expand(-1, len(rows[0]), 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., : len(rows[0])]
        return (weights @ value).transpose(0, 1), (weights @ value.abs()).transpose(0, 1)


def part(rows: list[torch.Tensor], first: int, last: int) -> list[torch.Tensor]:
    return [row[first:last].contiguous() for row in rows]
