"""What a value head is matched against: a model's name, sizes and fingerprint. Enter at `base_model_identity`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from server.engines.checkpoint.json_files import listed
from server.errors import ModelLoadError

_FINGERPRINT_VALUES = 256


def base_model_identity(
    model: nn.Module, name: str, first_values: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Name, sizes, and a fingerprint: sha256 over the first values of every parameter, rounded to bfloat16.

    A model without weights needs those values given. Raises ModelLoadError when its configuration lacks the sizes.
    """
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    missing = [size for size in ("hidden_size", "vocab_size") if not isinstance(getattr(config, size, None), int)]
    if missing:
        raise ModelLoadError(
            f"{type(model).__name__} cannot be served: its configuration has no {' and no '.join(missing)}"
        )
    digest = hashlib.sha256()
    for parameter_name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten() if first_values is None else first_values[parameter_name]
        head = values[:_FINGERPRINT_VALUES].to("cpu", torch.bfloat16)
        digest.update(parameter_name.encode())
        digest.update(head.view(torch.int16).numpy().tobytes())
    return {
        "name": name,
        "architecture": type(model).__name__,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "fingerprint": digest.hexdigest()[:32],
    }


def first_values(file: Path, name: str) -> torch.Tensor:
    """Those of a tensor in a file that its fingerprint is of, nothing else read."""
    with safe_open(file, framework="pt") as tensors:
        values = tensors.get_slice(name)
        width = max(torch.Size(values.get_shape()[1:]).numel(), 1)
        return values[: -(-_FINGERPRINT_VALUES // width)].flatten()[:_FINGERPRINT_VALUES]


def refuse_what_is_not_finite(folder: Path, model: nn.Module) -> None:
    """By the sums of the weights: one pass over memory, a tenth of a second for the default model.

    Raises ModelLoadError.
    """
    broken = [name for name, parameter in model.named_parameters() if not parameter.detach().sum().isfinite()]
    if broken:
        raise ModelLoadError(f"model: {folder} has weights that are not finite numbers: {listed(broken)}.")
