"""Attention of a step's flattened rows over the paged key-value cache.

A step holds one row for each newest token (a decode row), then one segment for each prompt chunk. All rows run through
the model as one sequence of T tokens; only attention looks at whose pages they read. Every decode row and every page of
a prompt is attended on its own, so a sequence's numbers never depend on the step's other rows, nor on where its prompt
was cut into chunks. Registered with transformers' AttentionInterface; knows nothing of requests, sampling or control.

Two ways, which tests hold against each other: the native kernel (server/kernels/attention.cpp), for which a decode row
is a chunk of one token, and torch's products (torch_attention.py).

Shapes: B decode rows, T tokens of the step, N key-value heads, Q queries that share a key-value head, P size of an
attention head, S attended positions, M pages of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.engines.embedded.model.kv_cache import KVCache
from server.engines.embedded.model.pages import NULL_PAGE, PAGE_TOKENS
from server.engines.embedded.model.torch_attention import attend_by_torch
from server.kernels import native
from server.kernels.transfer import on_device

ATTENTION_NAME = "recontrol"
PROJECTIONS = ("queries", "keys", "values")
HARMLESS_OPTIONS = frozenset(
    {"dropout", "is_causal", "output_attentions", "output_hidden_states", "position_ids", "sliding_window", "use_cache"}
)
"""Arguments of transformers' attention functions that change nothing here: a window is read from the layer's mask."""


class UnsupportedAttentionError(ValueError):
    """The model asks attention for something this engine does not do."""


@dataclass(slots=True, frozen=True)
class DecodeRow:
    """The newest token of a sequence, whose keys and values lie in `pages`."""

    pages: list[int]
    position: int
    token_id: int


@dataclass(slots=True, frozen=True)
class Segment:
    """A chunk of one prompt: token_ids go to positions start.. of the sequence that holds `pages`."""

    pages: list[int]
    start: int
    token_ids: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(slots=True, frozen=True)
class Span:
    """Which positions up to its own a token sees in one layer; None is no limit.

    With a window of w it sees the last w, its own among them; with chunks of c those of its own chunk, c positions from
    a multiple of c.
    """

    window: int | None = None
    chunk: int | None = None

    def visible(self, positions: Tensor, last: Tensor) -> Tensor:
        """Bool, broadcast: which `positions` a token at position `last` sees."""
        visible = positions <= last
        if self.window is not None:
            visible &= positions > last - self.window
        if self.chunk is not None:
            visible &= positions // self.chunk == last // self.chunk
        return visible


ALL_BEFORE = Span()


@dataclass(slots=True, frozen=True)
class AttentionKind:
    """How one layer attends; a soft cap of None is none."""

    scaling: float
    span: Span = ALL_BEFORE
    softcap: float | None = None


class StepWatch(Protocol):
    """Is told what each layer of a step does; see proof.py."""

    def saw(self, layer: int, what: str, given: Tensor) -> Tensor:
        """`what` a layer got ("entered"), attends with ("queries", "keys", "values"), or gave; what to go on with."""
        ...


@dataclass(slots=True)
class StepLayout:
    """Whose pages the T flattened rows read: table row sequences_T[t], up to position positions_T[t]."""

    kv: KVCache
    positions_T: Tensor
    sequences_T: Tensor
    tables: Tensor
    """Pages of the decode rows, then of the segments' sequences, [B + segments, M] int32, padded with the null page."""
    num_decode: int
    segments: list[Segment]
    spans: Mapping[int, Span] = field(default_factory=dict)
    """By index of the layer."""
    watch: StepWatch | None = None
    """Follows the layers while a model is proved."""
    masks: dict[Span, Tensor] = field(default_factory=dict)
    """Of the decode rows, made when a layer first asks."""

    @classmethod
    def of(
        cls,
        kv: KVCache,
        decode: list[DecodeRow],
        segments: list[Segment],
        device: torch.device,
        spans: Mapping[int, Span] | None = None,
        watch: StepWatch | None = None,
    ) -> StepLayout:
        positions = [row.position for row in decode]
        owners = list(range(len(decode)))
        for index, segment in enumerate(segments, start=len(decode)):
            positions += range(segment.start, segment.end)
            owners += [index] * len(segment.token_ids)
        used = [row.pages[: row.position // PAGE_TOKENS + 1] for row in decode]
        used += [segment.pages[: (segment.end - 1) // PAGE_TOKENS + 1] for segment in segments]
        widest = max(map(len, used))
        padded = [pages + [NULL_PAGE] * (widest - len(pages)) for pages in used]
        both_2T = on_device([positions, owners], device)
        tables = on_device(padded, device, dtype=torch.int32)
        return cls(kv, both_2T[0], both_2T[1], tables, len(decode), segments, spans or {}, watch)

    def decode_mask(self, span: Span) -> Tensor:
        """[B, 1, 1, S] bool, true where attended."""
        if span not in self.masks:
            last_B1 = self.positions_T[: self.num_decode, None]
            positions = torch.arange(self.tables.shape[1] * PAGE_TOKENS, device=last_B1.device)
            self.masks[span] = span.visible(positions, last_B1)[:, None, None]
        return self.masks[span]


@dataclass(slots=True)
class StepSlot:
    """Where a backbone's attention finds the step that it works in; not every model hands arguments on to it."""

    step: Any = None

    @classmethod
    def of(cls, backbone: nn.Module, step: Any = None) -> StepSlot:
        """A new one, which all modules of the backbone have from now on."""
        slot = cls(step)
        for module in backbone.modules():
            module.recontrol = slot  # type: ignore[assignment]
        return slot


def register_attention() -> str:
    """Make the attention below known to transformers; harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    return ATTENTION_NAME


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Write this step's keys and values, then attend. query [1, heads, T, P]; returns [1, T, heads, P of the values].

    `s_aux` [heads] are sinks: logits of a place that takes a share of each head's attention and gives nothing.
    """
    if attention_mask is not None or (unknown := unknown_options(options)):
        raise UnsupportedAttentionError(f"attention masks of the model's own or options {sorted(unknown)}")
    layer: int = module.layer_idx  # type: ignore[assignment]
    step: StepLayout = module.recontrol.step  # type: ignore[union-attr]
    how = attention_kind(key, scaling, softcap, step.spans[layer])
    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    if step.watch is not None:
        for what, given in zip(PROJECTIONS, rows, strict=True):
            step.watch.saw(layer, what, given)
    keys, values = step.kv.layer(layer, *rows[1:])
    is_plain = s_aux is None and how.span.chunk is None and key.shape == value.shape
    if is_plain and can_attend_natively(query.dtype, query.device, key.shape[3]):
        out_TNP = torch.empty_like(rows[0])
        addresses = [row.data_ptr() for row in rows]
        strides = [row.stride(0) for row in rows]
        attend_natively(addresses, strides, out_TNP.data_ptr(), keys, values, step, query.shape[1], how)
        return out_TNP[None], None
    return attend_by_torch(rows, keys, values, step, how, s_aux)[None], None


def unknown_options(options: Mapping[str, Any]) -> set[str]:
    """Arguments to an attention function that ask for something this engine does not do."""
    asked = {name for name, value in options.items() if value is not None and value is not False}
    return asked - HARMLESS_OPTIONS


def attention_kind(key: Tensor, scaling: float | None, softcap: float | None, span: Span) -> AttentionKind:
    """What a layer asks of its attention; key [1, N, T, P]. Transformers' default scaling is that of the keys' size."""
    return AttentionKind(key.shape[3] ** -0.5 if scaling is None else scaling, span, softcap)


def can_attend_natively(dtype: torch.dtype, device: torch.device, head_size: int) -> bool:
    return dtype == torch.bfloat16 and device.type == "cpu" and head_size % 32 == 0 and native() is not None


def attend_natively(
    addresses: list[int],
    strides: list[int],
    out: int,
    keys: Tensor,
    values: Tensor,
    step: StepLayout,
    num_heads: int,
    how: AttentionKind,
) -> None:
    """Queries, keys and values at three addresses, their rows `strides` elements apart; the result goes to `out`."""
    library: Any = native()
    _, num_kv_heads, _, head_size = keys.shape
    library.paged_attention_bf16(
        *addresses, *strides, keys.data_ptr(), values.data_ptr(), step.tables.data_ptr(), step.tables.shape[1],
        step.sequences_T.data_ptr(), step.positions_T.data_ptr(), out, len(step.positions_T), num_heads, num_kv_heads,
        head_size, how.scaling, how.softcap or 0.0, how.span.window or 0,
    )  # fmt: skip
