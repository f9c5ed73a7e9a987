"""A checkpoint held against the model that transformers would make of it, no weights loaded. Enter at `check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from server.engines.checkpoint.inspection import Inspected, inspect, one_line
from server.engines.checkpoint.quiet import quiet_transformers
from server.engines.checkpoint.source import find_checkpoint
from server.engines.checkpoint.weights import refuse_wrong_tensors
from server.errors import ModelLoadError


@dataclass(slots=True, frozen=True)
class Checked:
    """A folder with a model that can be loaded, and the model's short name."""

    folder: Path
    name: str
    inspected: Inspected


def check(model: str) -> Checked:
    """By a packaged model's name, folder, GGUF file or hub id, which is downloaded. Raises ModelLoadError.

    Refused is what loading it would refuse, but for weights that are not finite and quantized ones that do not fit.
    """
    with quiet_transformers():
        checkpoint = find_checkpoint(model)
        inspected = inspect(checkpoint.folder)
        if not inspected.is_quantized:
            _refuse_wrong_tensors(checkpoint.folder, inspected)
    return Checked(checkpoint.folder, checkpoint.name, inspected)


def _refuse_wrong_tensors(folder: Path, inspected: Inspected) -> None:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=inspected.config, device_map="meta", trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:
        raise ModelLoadError(f"model: {folder} cannot be loaded by transformers: {one_line(error)}") from error
    model, loading = loaded
    refuse_wrong_tensors(folder, type(model).__name__, loading, inspected.raw_config, inspected.tensors)
