"""What is known of a model by its files: tokenizer, sizes, ends of text, and what a value head is matched against.

Both engines begin here, so what one refuses the other does in the same words. Enter at `ModelFiles.find`, or where the
weights are loaded elsewhere, as vLLM does in its own processes, at `ModelFiles.of`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from server.engines.checkpoint.identity import base_model_identity, first_values, refuse_what_is_not_finite
from server.engines.checkpoint.inspection import Inspected, inspect, one_line
from server.engines.checkpoint.positions import max_len
from server.engines.checkpoint.quiet import quiet_transformers
from server.engines.checkpoint.source import find_checkpoint
from server.engines.checkpoint.tokenizer import eos_token_ids, load_tokenizer, warn_of_tokens_beyond
from server.engines.checkpoint.weights import refuse_wrong_tensors
from server.engines.devices import resolve_dtype
from server.errors import ModelLoadError


@dataclass(frozen=True)
class ModelFiles:
    """A folder with a model that may be served, the model's short name, and what the files say."""

    folder: Path
    name: str
    inspected: Inspected

    @classmethod
    def find(cls, model: str) -> ModelFiles:
        """By a packaged model's name, folder, GGUF file or hub id, which is downloaded. Raises ModelLoadError."""
        with quiet_transformers():
            checkpoint = find_checkpoint(model)
            return cls(checkpoint.folder, checkpoint.name, inspect(checkpoint.folder))

    @classmethod
    def of(cls, model: str) -> ModelFiles:
        """As `find`, and held against the model that transformers would make of them, no weights loaded.

        Refused is what loading it would refuse, but for weights that are not finite and quantized ones that do not fit.
        """
        files = cls.find(model)
        with quiet_transformers():
            if not files.inspected.is_quantized:
                files.load(device_map="meta")
        warn_of_tokens_beyond(files.folder, files.tokenizer, int(files.config.get_text_config().vocab_size))
        return files

    def load(self, **options: Any) -> Any:
        """transformers' model with its weights; `options` are those of `from_pretrained`. Raises ModelLoadError."""
        config = self.config
        if self.inspected.is_quantized:
            # On a GPU too: control and the fast path want plain weights.
            holder = config if getattr(config, "quantization_config", None) else config.get_text_config()
            holder.quantization_config = {**holder.quantization_config, "dequantize": True}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.folder, config=config, trust_remote_code=False, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
        except ModelLoadError:
            raise
        except Exception as error:
            raise ModelLoadError(f"model: {self.folder} cannot be loaded by transformers: {one_line(error)}") from error
        model, loading = loaded
        inspected = self.inspected
        refuse_wrong_tensors(self.folder, type(model).__name__, loading, inspected.raw_config, inspected.tensors)
        return model

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
        """Equal to that of the loaded model, which is loaded where files keep tensors in a way of their own."""
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        stored = self.inspected.tensors
        names = [name for name, _ in model.named_parameters()]
        if not self.inspected.is_quantized and stored.keys() >= set(names):
            return base_model_identity(
                model, self.name, {name: first_values(stored[name].file, name) for name in names}
            )
        with quiet_transformers():
            model = self.load(dtype=resolve_dtype("auto", torch.device("cpu")))
        refuse_what_is_not_finite(self.folder, model)
        return base_model_identity(model, self.name)
