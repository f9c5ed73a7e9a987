"""What is known of a model without loading its weights: tokenizer, sizes, ends of text, and a value head's match.

The weights are vLLM's, in its own processes; here only the first values of each tensor are read, for the fingerprint
that value heads are matched against. Enter at `ModelFiles.of`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from server.engines.embedded.model.loader import (
    FINGERPRINT_VALUES,
    PACKAGED_MODELS,
    base_model_identity,
    load_model,
    packaged_model_folder,
    refuse_code,
)
from server.errors import ModelLoadError


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder and its short name."""

    folder: Path
    name: str

    @classmethod
    def of(cls, model: str) -> ModelFiles:
        """By a packaged model's name, folder or hub id, which is downloaded. Raises ModelLoadError."""
        packaged = PACKAGED_MODELS.get(model)
        folder = packaged_model_folder(packaged) if packaged else Path(model)
        if not folder.is_dir():
            folder = _downloaded(model)
        refuse_code(folder)
        is_local = Path(model).is_dir() and not packaged
        return cls(folder, folder.resolve().name if is_local else model.rsplit("/", 1)[-1])

    @cached_property
    def config(self) -> Any:
        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadError(f"Cannot read the model's config in {self.folder}: {error}") from error

    @cached_property
    def tokenizer(self) -> Any:
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadError(f"Cannot read the model's tokenizer in {self.folder}: {error}") from error

    @property
    def max_len(self) -> int:
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", None) or 2048)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        try:
            generation = GenerationConfig.from_pretrained(self.folder)
        except OSError:
            generation = GenerationConfig.from_model_config(self.config)
        eos = generation.eos_token_id
        listed = eos if isinstance(eos, list) else [eos]
        return frozenset(int(token) for token in [*listed, self.tokenizer.eos_token_id] if token is not None)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Equal to that of `load_model`, which is asked where the files name their tensors in a way of their own."""
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        places = {name: file for file in sorted(self.folder.glob("*.safetensors")) for name in _names(file)}
        names = [name for name, _ in model.named_parameters()]
        if not places.keys() >= set(names):
            return load_model(str(self.folder), device="cpu").identity | {"name": self.name}
        heads = {name: _first_values(places[name], name) for name in names}
        return base_model_identity(model, self.name, heads)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _first_values(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        values = tensors.get_slice(name)
        width = max(torch.Size(values.get_shape()[1:]).numel(), 1)
        return values[: -(-FINGERPRINT_VALUES // width)].flatten()[:FINGERPRINT_VALUES]


def _downloaded(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except Exception as error:
        raise ModelLoadError(
            f"Cannot load the model {model!r}: {error}. Give a local folder with config.json, safetensors weights and "
            f"a tokenizer, a hub id that this machine can reach, or one of {', '.join(PACKAGED_MODELS)}."
        ) from error
