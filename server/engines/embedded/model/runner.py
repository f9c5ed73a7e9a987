"""A transformers model run over flattened rows, ending at the state after its final norm.

Any causal language model whose attention goes through transformers' AttentionInterface will do: the edit needs only
the post-norm state and the LM head. `ModelRunner.create` takes a model over only once it has been shown on it that this
engine's numbers are transformers' own (takeover.py). Knows nothing of requests or control.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from server.engines.embedded.model.body import Body
from server.engines.embedded.model.graphs import DecodeGraphs, record_on_cuda
from server.engines.embedded.model.kv_cache import KVCache
from server.engines.embedded.model.layout import DecodeRow, PromptChunk, StepWatch
from server.engines.embedded.model.lm_head import LMHead
from server.engines.embedded.model.pages import NULL_PAGE, num_pages_for
from server.engines.embedded.model.takeover.takeover import take_over
from server.errors import ConfigurationError
from server.kernels.linear import Bits
from server.kernels.transfer import on_device


class ModelRunner:
    """Owns the weights and the key-value cache. Used from one thread only."""

    def __init__(self, body: Body, lm_head: LMHead, kv: KVCache) -> None:
        self.lm_head = lm_head
        self.kv = kv
        self.graphs: DecodeGraphs | None = None
        """Recorded decode steps, on a GPU."""
        self.kv_bytes = 0
        """What keys and values take when every page is used."""
        self._body = body

    @classmethod
    def create(cls, model: Any, *, max_len: int, max_sequences: int, kv_bytes: int, bits: Bits = 16) -> ModelRunner:
        """Take over a loaded causal language model; it must not be used by anyone else afterwards.

        The key-value cache gets room for `max_sequences` of `max_len` tokens, but never more than `kv_bytes`. With
        fewer than 16 `bits` its linear maps are quantized, once the model has been proved as it is.

        Raises ModelLoadError when the model cannot be run exactly, ConfigurationError when not even one sequence of
        max_len fits, or weights cannot be quantized here.
        """
        with torch.inference_mode():
            taken = take_over(model, max_len=max_len, bits=bits)
            pages = num_pages(taken.bytes_per_page, max_len, max_sequences, kv_bytes)
            runner = cls(taken.body, taken.lm_head, KVCache(pages))
            runner.kv_bytes = pages * taken.bytes_per_page
            if model.device.type == "cuda":
                runner.graphs = DecodeGraphs(taken.body.states, record_on_cuda)
        return runner

    @property
    def is_native(self) -> bool:
        """Whether the native layers run, and not transformers' modules."""
        return self._body.is_native

    @torch.inference_mode()
    def forward(
        self,
        decode: list[DecodeRow],
        chunks: list[PromptChunk],
        *,
        drawn_B: Tensor | None = None,
        watch: StepWatch | None = None,
    ) -> Tensor:
        """Post-norm states [T, D] in the model's dtype: a row for each decode row, then for each token of the chunks.

        `drawn_B` are the tokens that were drawn last, for rows that name theirs by its place among them. A watch is
        told what each layer gets ("entered", [T, D]), and says what the layer goes on with.
        """
        token_ids_T, step = self._body.layout(self.kv, decode, chunks, watch)
        if drawn_B is not None:
            _take_drawn(token_ids_T, decode, drawn_B)
        if watch is not None:
            return self._body.watched_states(token_ids_T, step)
        if self.graphs is not None and not chunks:
            return self.graphs.forward(token_ids_T, step)
        return self._body.states(token_ids_T, step)


def _take_drawn(token_ids_T: Tensor, decode: list[DecodeRow], drawn_B: Tensor) -> None:
    """Put the tokens that the device alone knows in their rows; what stands for none there may be any token."""
    pairs = [(row, decoded.drawn) for row, decoded in enumerate(decode) if decoded.drawn is not None]
    if pairs:
        rows_R, places_R = on_device(list(zip(*pairs, strict=True)), token_ids_T.device)
        token_ids_T.index_copy_(0, rows_R, drawn_B[places_R].clamp(min=0))


def num_pages(bytes_per_page: int, max_len: int, max_sequences: int, kv_bytes: int) -> int:
    """Pages, the null page included. Raises ConfigurationError."""
    one = num_pages_for(max_len)
    wanted = max_sequences * one
    allowed = min(wanted, kv_bytes // bytes_per_page - 1)
    if allowed < one:
        raise ConfigurationError(
            f"kv_cache_gib: a sequence of {max_len} tokens takes {(one + 1) * bytes_per_page / 2**30:.3g} GiB of keys "
            f"and values; allow that, or set a smaller max_model_len"
        )
    return NULL_PAGE + 1 + allowed
