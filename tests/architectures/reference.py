"""Log-probabilities by transformers' own forward: no cache, one sequence alone, eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

_SAME = 1e-4
"""Nats up to which a text's numbers count as unchanged by what follows it."""


class Reference:
    """A model folder as transformers runs it."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        self.has_experts = any("expert" in name or "router" in name for name, _ in self.model.named_parameters())

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int]) -> Tensor:
        """[T, V] float32: of the token behind each position."""
        # Rotations that grow with the text keep what the longest one had; a text of one token resets them.
        self.model(torch.tensor([token_ids[:1]]), use_cache=False)
        logits_TV = self.model(torch.tensor([token_ids]), use_cache=False).logits[0]
        return logits_TV.float().log_softmax(dim=-1)

    def logprobs_of(self, prompt: list[int], generated: list[int]) -> Tensor:
        """[T, V] of a prompt as it stands, then of each generated token given all before it.

        Where a text's numbers depend on its length (long rotations), each generated token has a forward of its own.
        """
        alone_TV, whole_TV = self.logprobs(prompt), self.logprobs(prompt + generated)
        # The one behind the last generated token is nobody's.
        whole_TV = whole_TV[: len(prompt) + len(generated) - 1]
        if float((whole_TV[: len(prompt)] - alone_TV).abs().max()) < _SAME:
            return whole_TV
        later = [self.logprobs(prompt + generated[:count])[-1] for count in range(1, len(generated))]
        return torch.stack([*alone_TV, *later])
