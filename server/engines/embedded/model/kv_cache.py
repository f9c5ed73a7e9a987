"""Keys and values of all layers, in pages (pages.py says whose).

Every layer has one tensor of keys and one of values, [pages, N, PAGE_TOKENS, P], made on first use. On a CPU their
memory is taken by the operating system page by page as it is first written, so it follows use; what lies inside a page
is the attention's own affair (attention.py). Knows nothing of sequences.

Shapes: N key-value heads, P size of an attention head.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from server.engines.embedded.model.pages import PAGE_TOKENS, PagePool, num_pages_for
from server.machine import memory_limit_bytes

_DEVICE_SHARE = 0.9
_MACHINE_SHARE = 0.5
_HIGH_WATER_SHARE = 0.5


def default_kv_bytes(device: torch.device) -> int:
    """Most of what is free on a GPU; half of what this process may have of a machine (where only use takes it)."""
    if device.type == "cuda":
        return int(_DEVICE_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(_MACHINE_SHARE * memory_limit_bytes())


def high_water_pages(share: float | None, num_pages: int, device: torch.device) -> int:
    """The pages, of `num_pages` with the null page, that may be used before known ones make room for others.

    By default half; on a GPU all, whose memory is taken at the start in any case.
    """
    if share is None:
        share = 1.0 if device.type == "cuda" else _HIGH_WATER_SHARE
    return int(share * (num_pages - 1))


class KVCache:
    def __init__(self, num_pages: int) -> None:
        """`num_pages` counts the null page too."""
        self.num_pages = num_pages
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes_per_page(self) -> int:
        """Over all layers used so far."""
        tensors = [tensor for layer in self._layers.values() for tensor in layer]
        return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)

    def layer(self, index: int, like_key_TNP: Tensor, like_value_TNP: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, made on first use in the shape and dtype of a step's."""
        if index not in self._layers:
            self._layers[index] = (self._empty(like_key_TNP), self._empty(like_value_TNP))
        return self._layers[index]

    def copy_page(self, source: int, target: int) -> None:
        for keys, values in self._layers.values():
            keys[target] = keys[source]
            values[target] = values[source]

    def clear(self, pages: Iterable[int]) -> None:
        """Zero these pages, so that nothing non-finite left in them meets a later sequence through 0 x NaN."""
        for page in pages:
            # One by one, which torch does in this thread: its others may be held up by a busy neighbour.
            for keys, values in self._layers.values():
                keys[page].zero_()
                values[page].zero_()

    def _empty(self, like_TNP: Tensor) -> Tensor:
        _, num_heads, head_size = like_TNP.shape
        dtype, device = like_TNP.dtype, like_TNP.device
        shape = (self.num_pages, num_heads, PAGE_TOKENS, head_size)
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # numpy asks the system for zeroed memory, which costs nothing until it is written; torch would write it.
        num_bytes = dtype.itemsize * int(np.prod(shape))
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def fork_pages(kv: KVCache, pool: PagePool, pages: list[int], length: int) -> list[int] | None:
    """Pages of another sequence with the same first `length` positions: full ones shared, the last one copied.

    None when there is no page for the copy.
    """
    whole = length // PAGE_TOKENS
    last = pool.take(num_pages_for(length) - whole)
    if last is None:
        return None
    pool.share(pages[:whole])
    if last:
        kv.copy_page(pages[whole], last[0])
    return [*pages[:whole], *last]
