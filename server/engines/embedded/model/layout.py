"""What one step of the engine computes: rows of decoding sequences and chunks of prompts, and what each may see.

Knows nothing of how it is computed. Enter at `StepLayout.of`.

Shapes: B decode rows, T tokens of the step, M pages of the longest sequence, S attended positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from server.engines.embedded.model.kv_cache import KVCache
from server.engines.embedded.model.pages import NULL_PAGE, PAGE_TOKENS
from server.engines.embedded.model.spans import Span
from server.kernels.transfer import on_device


@dataclass(slots=True, frozen=True)
class DecodeRow:
    """The newest token of a sequence, whose keys and values lie in `pages`."""

    pages: list[int]
    position: int
    token_id: int
    drawn: int | None = None
    """Where the token lies among those that were drawn last, of one that the host has not read yet."""


@dataclass(slots=True, frozen=True)
class PromptChunk:
    """A chunk of one prompt: token_ids go to positions start.. of the sequence that holds `pages`."""

    pages: list[int]
    start: int
    token_ids: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


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
    """Pages of the decode rows, then of the chunks' sequences, [B + chunks, M] int32, padded with the null page."""
    num_decode: int
    chunks: list[PromptChunk]
    spans: Mapping[int, Span] = field(default_factory=dict)
    """By index of the layer."""
    watch: StepWatch | None = None
    """Follows the layers while a model is proved."""
    masks: dict[Span, Tensor] = field(default_factory=dict)
    """Of the decode rows, made when a layer first asks."""
    blocks: dict[int, Tensor] = field(default_factory=dict)
    """Of the chunks' tokens by the most that a block has, made when a layer first asks."""

    @classmethod
    def of(
        cls,
        kv: KVCache,
        decode: list[DecodeRow],
        chunks: list[PromptChunk],
        device: torch.device,
        spans: Mapping[int, Span] | None = None,
        watch: StepWatch | None = None,
    ) -> StepLayout:
        positions = [row.position for row in decode]
        owners = list(range(len(decode)))
        for index, chunk in enumerate(chunks, start=len(decode)):
            positions += range(chunk.start, chunk.end)
            owners += [index] * len(chunk.token_ids)
        used = [row.pages[: row.position // PAGE_TOKENS + 1] for row in decode]
        used += [chunk.pages[: (chunk.end - 1) // PAGE_TOKENS + 1] for chunk in chunks]
        widest = max(map(len, used))
        padded = [pages + [NULL_PAGE] * (widest - len(pages)) for pages in used]
        both_2T = on_device([positions, owners], device)
        tables = on_device(padded, device, dtype=torch.int32)
        return cls(kv, both_2T[0], both_2T[1], tables, len(decode), chunks, spans or {}, watch)

    def decode_mask(self, span: Span) -> Tensor:
        """[B, 1, 1, S] bool, true where attended."""
        if span not in self.masks:
            last_B1 = self.positions_T[: self.num_decode, None]
            positions = torch.arange(self.tables.shape[1] * PAGE_TOKENS, device=last_B1.device)
            self.masks[span] = span.visible(positions, last_B1)[:, None, None]
        return self.masks[span]

    def prompt_blocks(self, tokens: int) -> Tensor | None:
        """The first row and the number of rows of each block [.., 2] int32 of at most so many tokens; None of no
        chunks. Blocks begin at multiples of it, wherever a prompt was cut."""
        if not self.chunks:
            return None
        if tokens not in self.blocks:
            blocks: list[tuple[int, int]] = []
            first = self.num_decode
            for chunk in self.chunks:
                for start in range(chunk.start // tokens * tokens, chunk.end, tokens):
                    begin, end = max(start, chunk.start), min(start + tokens, chunk.end)
                    blocks.append((first + begin - chunk.start, end - begin))
                first += len(chunk.token_ids)
            self.blocks[tokens] = on_device(blocks, self.positions_T.device, dtype=torch.int32)
        return self.blocks[tokens]


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
