"""How a GGUF file scales its rotations, for transformers. Enter at `scaled_rotation`.

The keys mean what llama.cpp makes of them: a factor without a type is linear, and a factor of attention multiplies what
the type would use itself. What transformers has no parameter for is refused unless its value changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from server.engines.checkpoint.gguf_header import GgufHeader, told
from server.errors import ModelLoadError
from server.unicode import beginning

SCALING = "rope.scaling."
_TYPES = ("none", "linear", "yarn")
_FOLLOWED = {"type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"}
# Releases of llama.cpp differ in what they make of other values.
_NEUTRAL = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}
# How much of YaRN is mixed in; negative is as if it were not there.
_MIXED_IN = "yarn_ext_factor"
_BETAS = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


def scaled_rotation(header: GgufHeader, max_len: int) -> dict[str, Any]:
    """Parameters of transformers for the values of a file's keys under rope.scaling, none where nothing is scaled.

    `max_len` is the length that was trained on where the file does not say. Raises ModelLoadError, naming the key.
    """
    prefix = f"{header.architecture}.{SCALING}"
    scaling = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    kind = str(scaling.get("type", "linear" if "factor" in scaling else "none"))
    if kind not in _TYPES:
        raise ModelLoadError(
            f"model: {header.path} scales its rotations by {told(kind)} ({beginning(', '.join(scaling))}), which is "
            "not read from GGUF here. Use the model's safetensors."
        )
    _refuse_what_is_not_followed(header, scaling, kind)
    if kind == "none":
        return {}
    if "factor" not in scaling:
        raise ModelLoadError(
            f"model: {header.path} scales its rotations by {kind} and has no {prefix}factor; it "
            "must be a positive number."
        )
    rotation = {"rope_type": kind, "factor": positive(header, f"{SCALING}factor", scaling["factor"])}
    if kind == "yarn":
        original = scaling.get("original_context_length") or max_len
        rotation["original_max_position_embeddings"] = int(
            positive(header, f"{SCALING}original_context_length", original)
        )
        for key, name in _BETAS.items():
            if key in scaling:
                rotation[name] = positive(header, f"{SCALING}{key}", scaling[key])
    return rotation


def positive(header: GgufHeader, key: str, value: Any) -> float:
    """The value of an architecture's key as a number. Raises ModelLoadError, naming the key, for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise header.is_not(f"{header.architecture}.{key}", "a positive number")
    return float(value)


def _refuse_what_is_not_followed(header: GgufHeader, scaling: Mapping[str, Any], kind: str) -> None:
    for key, value in scaling.items():
        if key == _MIXED_IN:
            due = 1.0 if kind == "yarn" else 0.0
            is_followed = value == due or (isinstance(value, int | float) and value < 0)
        else:
            is_followed = key in _FOLLOWED or (key in _NEUTRAL and value == _NEUTRAL[key])
        if not is_followed:
            raise ModelLoadError(
                f"model: {header.path} asks for {header.architecture}.{SCALING}{key} = {told(value)} with rotations of "
                f"the type {kind}, which is not read from GGUF here. Use the model's safetensors."
            )
