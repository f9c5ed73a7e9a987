"""How far a model's rotary angles are those of a position alone.

Some rotations change for all positions once a text is longer than what the model was trained on (longrope, dynamic).
Rows of a step have texts of many lengths, and keys in the cache were turned when their text was shorter, so such a
model is served up to the length at which it changes. Asked of the model's own modules. Enter at `text_length`.
"""

from __future__ import annotations

import bisect
import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from server.engines.embedded.model.loader import LoadedModel
from server.errors import ConfigurationError, ModelLoadError

_log = logging.getLogger(__name__)

_FEW = 4
_LEAST = 16


def text_length(loaded: LoadedModel, asked: int | None) -> int:
    """The longest text, prompt and new tokens together. Raises ConfigurationError for more than the model can have."""
    longest = static_length(loaded.model, loaded.max_len)
    if longest < _LEAST:
        raise ModelLoadError(f"{loaded.name} has room for {longest} tokens, and {_LEAST} are needed to serve it")
    if longest < loaded.max_len and asked is None:
        _log.warning(
            "%s is served up to %d tokens of its %d: in longer texts its rotation turns all positions otherwise",
            loaded.name, longest, loaded.max_len,
        )  # fmt: skip
    if asked is not None and asked > longest:
        reason = "has" if longest == loaded.max_len else "has with one rotation for texts of all lengths"
        raise ConfigurationError(
            f"max_model_len: {asked} is more than the {longest} positions that {loaded.name} {reason}"
        )
    return asked or longest


def static_length(backbone: nn.Module, max_len: int) -> int:
    """The longest text up to max_len of which no position's angles differ from those in a short text."""
    limit = max_len
    for module in backbone.modules():
        for layer_type in _layer_types(module):
            limit = min(limit, _static_length(module, layer_type, limit))
    return limit


def _layer_types(module: nn.Module) -> list[str | None]:
    """Of a rotation that has kinds by layer, or None for the one kind that it has; nothing for other modules."""
    if "Rotary" not in type(module).__name__ or "position_ids" not in inspect.signature(module.forward).parameters:
        return []
    kinds: Any = getattr(module, "rope_type", None)
    return list(kinds) if isinstance(kinds, dict) else [None]


def _static_length(module: nn.Module, layer_type: str | None, max_len: int) -> int:
    few = torch.arange(min(_FEW, max_len), device=_device(module))
    short = _angles(module, layer_type, few)
    if not short.isfinite().all():
        raise ModelLoadError(
            f"{type(module).__name__} gives angles that are not finite: rope_parameters in config.json must have a "
            "rope_theta and factors above 0"
        )

    def differs(length: int) -> bool:
        # The last position alone stands for a text of that length.
        positions = torch.cat([few, few.new_tensor([length - 1])])
        return not torch.equal(_angles(module, layer_type, positions)[..., : len(few), :], short)

    try:
        if not differs(max_len):
            return max_len
        return bisect.bisect_left(range(len(few), max_len), True, key=differs) + len(few) - 1
    finally:
        _angles(module, layer_type, few)  # Some keep what they last used.


def _angles(module: nn.Module, layer_type: str | None, positions: Tensor) -> Tensor:
    like = torch.zeros(1, 1, 1, device=positions.device)
    kind = {} if layer_type is None else {"layer_type": layer_type}
    angles: Any = module(like, positions[None], **kind)
    first = angles[0] if isinstance(angles, tuple) else angles
    return torch.view_as_real(first).flatten(-2) if first.is_complex() else first


def _device(module: nn.Module) -> torch.device:
    tensors = [*module.buffers(), *module.parameters()]
    return tensors[0].device if tensors else torch.device("cpu")
