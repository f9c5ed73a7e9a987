"""Attention over pages on a GPU for tensors: one launch for decoding rows, one for prompts, whatever their number.

What is launched for decoding rows depends on shapes alone, so a CUDA graph may record it. Enter at `attend`.

Shapes: T tokens of the step, B of them decoding rows, G heads, N key-value heads, P size of a key, V that of a value,
M pages of the longest sequence.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LEAST_TILE = 16
"""Of a product of tensor cores, on each side."""
_BLOCK_ROWS = 64
_SPLIT_PAGES = 8
_STAGES, _BESIDE_BYTES = 3, 1024
"""Pages that Triton has a program read ahead, and what else is shared."""
_EXACT_OF_BFLOAT16 = "tf32"
"""Tensor cores lose no bit of numbers that were bfloat16, and of the weights fewer than bfloat16 would."""


@dataclass(slots=True, frozen=True)
class Places:
    """Whose pages the rows of a step read: of row t those that `tables` [.., M] int32 has at sequences_T[t], up to
    position positions_T[t]. The first `num_decode` rows are each of a sequence of its own.

    `blocks` [.., 2] int32 has the first row and the number of rows, `tokens_of_a_block` at most, of each block of
    consecutive tokens that the others come in; None without others.
    """

    tables: Tensor
    sequences_T: Tensor
    positions_T: Tensor
    num_decode: int
    blocks: Tensor | None


@dataclass(slots=True, frozen=True)
class Asked:
    """What a layer asks of its attention. A soft cap, window or chunk of 0 is none; sinks [G] are float32."""

    scaling: float
    softcap: float = 0.0
    window: int = 0
    chunk: int = 0
    sinks: Tensor | None = None


def fits(keys: Tensor, values: Tensor) -> bool:
    """Whether the pages that a program reads ahead fit into what a multiprocessor of the device shares among threads.

    Those of large attention heads in float32 do not.
    """
    *_, page, key_size = keys.shape
    ahead = _STAGES * page * (_tile(key_size) + _tile(values.shape[3])) * keys.element_size()
    return ahead + _BESIDE_BYTES <= _shared_bytes(keys.device)


def tokens_of_a_block(num_heads: int, num_kv_heads: int) -> int:
    """The most tokens of a prompt that a program takes at once, whose queries are rows of one product."""
    return max(1, _BLOCK_ROWS // _power(num_heads // num_kv_heads))


def attend(queries_TGP: Tensor, keys: Tensor, values: Tensor, places: Places, asked: Asked) -> Tensor:
    """[T, G, V] in the type of the values; keys [pages, N, tokens of a page, P] and values [.., V] hold the step's."""
    out_TGV = torch.empty(*queries_TGP.shape[:2], values.shape[3], dtype=values.dtype, device=values.device)
    launch = _Launch(queries_TGP, keys, values, places, asked, out_TGV)
    if places.num_decode:
        launch.decoding()
    if places.blocks is not None:
        launch.prompts(places.blocks)
    return out_TGV


@dataclass(slots=True, frozen=True)
class _Launch:
    queries_TGP: Tensor
    keys: Tensor
    values: Tensor
    places: Places
    asked: Asked
    out_TGV: Tensor

    @property
    def num_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def queries_per_head(self) -> int:
        return self.queries_TGP.shape[1] // self.num_heads

    def decoding(self) -> None:
        from server.kernels.gpu import attention_kernel

        num_rows, rows, width = self.places.num_decode, _tile(self.queries_per_head), _tile(self.values.shape[3])
        num_splits = -(-self.places.tables.shape[1] // _SPLIT_PAGES)
        if num_splits == 1:
            self._attend((num_rows, self.num_heads, 1), rows)
            return
        parts = self.out_TGV.new_empty(num_rows, self.num_heads, num_splits, rows, width + 2, dtype=torch.float32)
        self._attend((num_rows, self.num_heads, num_splits), rows, parts=parts)
        join: Any = attention_kernel.join
        join[num_rows, self.num_heads](
            parts, self.out_TGV, self.num_heads, num_splits, QUERIES=self.queries_per_head,
            VALUE_SIZE=self.values.shape[3], ROWS=rows, VALUES=width,
        )  # fmt: skip

    def prompts(self, blocks: Tensor) -> None:
        tokens = tokens_of_a_block(self.queries_TGP.shape[1], self.num_heads)
        self._attend((len(blocks), self.num_heads, 1), _tile(tokens * self.queries_per_head), blocks=blocks)

    def _attend(
        self, grid: tuple[int, int, int], rows: int, *, blocks: Tensor | None = None, parts: Tensor | None = None
    ) -> None:
        from server.kernels.gpu import attention_kernel

        places, asked, (*_, page, key_size) = self.places, self.asked, self.keys.shape
        attend: Any = attention_kernel.attend
        attend[grid](
            self.queries_TGP, self.queries_TGP.stride(0), self.keys, self.values, places.tables,
            places.tables.shape[1], places.sequences_T, places.positions_T, blocks, asked.sinks, self.out_TGV, parts,
            self.num_heads, asked.scaling, asked.softcap, asked.window, asked.chunk,
            places.tables.shape[1] if parts is None else _SPLIT_PAGES, grid[2], QUERIES=self.queries_per_head,
            KEY_SIZE=key_size, VALUE_SIZE=self.values.shape[3], ROWS=rows, KEYS=_tile(key_size),
            VALUES=_tile(self.values.shape[3]), PAGE=page, HAS_BLOCKS=blocks is not None, IS_SPLIT=parts is not None,
            HAS_SINKS=asked.sinks is not None, HAS_CAP=asked.softcap > 0,
            num_stages=_STAGES, PRECISION="ieee" if self.keys.dtype == torch.float32 else _EXACT_OF_BFLOAT16,
        )  # fmt: skip


@functools.cache
def _shared_bytes(device: torch.device) -> float:
    """Of a GPU; whatever interprets kernels has room for all."""
    if device.type != "cuda":
        return math.inf
    # ROCm does not tell; torch takes it for this too.
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 49152)


def _tile(count: int) -> int:
    return max(_LEAST_TILE, _power(count))


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
