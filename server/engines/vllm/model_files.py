"""What is known of a model without loading its weights: tokenizer, sizes, ends of text, and a value head's match.

The weights are vLLM's, in its own processes; here only the first values of each tensor are read, for the fingerprint
that value heads are matched against. What the embedded engine refuses is refused here in the same words, before vLLM
starts. Enter at `ModelFiles.of`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from server.engines.checkpoint.checked import check
from server.engines.checkpoint.inspection import Inspected
from server.engines.checkpoint.quiet import quiet_transformers
from server.engines.checkpoint.tokenizer import eos_token_ids, load_tokenizer, warn_of_tokens_beyond
from server.engines.embedded.model.loader import (
    FINGERPRINT_VALUES,
    base_model_identity,
    load_model,
    max_len,
)


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder, its short name, and what its files say."""

    folder: Path
    name: str
    inspected: Inspected

    @classmethod
    def of(cls, model: str) -> ModelFiles:
        """By a packaged model's name, folder, GGUF file or hub id, which is downloaded. Raises ModelLoadError."""
        checked = check(model)
        files = cls(checked.folder, checked.name, checked.inspected)
        warn_of_tokens_beyond(files.folder, files.tokenizer, int(files.config.get_text_config().vocab_size))
        return files

    @property
    def config(self) -> Any:
        return self.inspected.config

    @cached_property
    def tokenizer(self) -> Any:
        with quiet_transformers():
            return load_tokenizer(self.folder, self.config)

    @cached_property
    def max_len(self) -> int:
        return max_len(self.folder, self.config)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        try:
            generation = GenerationConfig.from_pretrained(self.folder)
        except OSError:
            generation = GenerationConfig.from_model_config(self.config)
        return eos_token_ids(generation, self.tokenizer)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Equal to that of `load_model`, which is asked where the files keep their tensors in a way of their own."""
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        stored = self.inspected.tensors
        names = [name for name, _ in model.named_parameters()]
        if self.inspected.is_quantized or not stored.keys() >= set(names):
            return load_model(str(self.folder), device="cpu").identity | {"name": self.name}
        heads = {name: _first_values(stored[name].file, name) for name in names}
        return base_model_identity(model, self.name, heads)


def _first_values(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        values = tensors.get_slice(name)
        width = max(torch.Size(values.get_shape()[1:]).numel(), 1)
        return values[: -(-FINGERPRINT_VALUES // width)].flatten()[:FINGERPRINT_VALUES]
