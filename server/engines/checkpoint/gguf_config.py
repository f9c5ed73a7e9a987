"""A GGUF file's configuration for transformers, with what transformers leaves out of the file's metadata.

transformers reads some keys of each architecture and takes its own defaults for the rest: another scaling of rotations
or window would be served in silence. Here every key that is left is set, known to say nothing, or refused. Enter at
`refuse_numbers` and `complete_config`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from server.engines.checkpoint.gguf_header import GgufHeader
from server.engines.checkpoint.gguf_rotation import SCALING, positive, scaled_rotation
from server.engines.checkpoint.json_files import listed
from server.engines.checkpoint.positions import MIN_POSITIONS
from server.errors import ModelLoadError

ALIASES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}
"""llama.cpp's name of an architecture, and transformers' where it differs."""

# Keys that are an attribute of the configuration under another name.
_ATTRIBUTES = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    "feed_forward_length": "n_inner",
    "logit_scale": "logit_scale",
    "context_length": "n_positions",
}
# Keys that say what the tensors' shapes say, or nothing of the computation.
_SAY_NOTHING = {
    "vocab_size", "context_length", "attention.value_length", "attention.causal", "tensor_data_layout",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "block_count", "feed_forward_length",
    "attention.head_count_kv", "use_parallel_residual", "attention.layer_norm_epsilon", "rope.dimension_count",
    "expert_group_count", "expert_group_used_count",
}  # fmt: skip
# Whole numbers that a file of an architecture that has them cannot do without, and those that it may leave out.
_NEEDED = ("block_count", "embedding_length", "attention.head_count")
_MAY_BE_LEFT_OUT = ("context_length", "attention.head_count_kv", "attention.key_length", "rope.dimension_count")
_BASES = ("rope.freq_base", "rope.freq_base_swa")
# Llama 3.1's scaling of rotations, which GGUF keeps as one factor for each frequency.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# The sizes of Gemma whose queries are scaled by the width of the model over its heads, by architecture and layers.
_WIDE_GEMMAS = {("gemma2", 46), ("gemma3", 62)}


def refuse_numbers(header: GgufHeader) -> None:
    """Raises ModelLoadError for sizes and rotations with which nothing can be computed, naming the key."""
    mapping = GGUF_CONFIG_MAPPING.get(ALIASES.get(header.architecture, header.architecture), {})
    for key in (*_NEEDED, *_MAY_BE_LEFT_OUT):
        value = header.metadata.get(f"{header.architecture}.{key}")
        if value is None:
            if key in _NEEDED and key in mapping:
                raise ModelLoadError(f"model: {header.path} has no {header.architecture}.{key}.")
            continue
        least = MIN_POSITIONS if key == "context_length" else 1
        # A list has one for each layer.
        if not isinstance(value, list) and (type(value) is not int or value < least):
            raise header.is_not(f"{header.architecture}.{key}", f"a whole number from {least} up")
    for key in _BASES:
        if (value := header.metadata.get(f"{header.architecture}.{key}")) is not None:
            positive(header, key, value)
    scaled_rotation(header, MIN_POSITIONS)


def complete_config(header: GgufHeader, config: Any, rope_factors: np.ndarray | None) -> None:
    """Set what the file says and transformers did not read. Raises ModelLoadError for a key that cannot be followed.

    `rope_factors` is the file's tensor rope_freqs.weight.
    """
    prefix = f"{header.architecture}."
    name = ALIASES.get(header.architecture, header.architecture)
    read = {
        key
        for key, attribute in GGUF_CONFIG_MAPPING.get(name, {}).items()
        # An attribute by the key's own name is none of transformers'; GPT-2's n_ctx is none that it follows.
        if attribute not in (None, key, "n_ctx")
    }
    left = {
        key.removeprefix(prefix): value
        for key, value in header.metadata.items()
        if key.startswith(prefix) and key.removeprefix(prefix) not in read
    }
    unknown = []
    for key, value in left.items():
        if key.startswith(SCALING):
            continue
        if not _set(config, key, value) and key not in _SAY_NOTHING:
            unknown.append(f"{prefix}{key} = {value}")
    if unknown:
        raise ModelLoadError(
            f"model: {header.path} asks for {listed(unknown)}, which is not read from GGUF here. Use the model's "
            "safetensors."
        )
    _set_rotation(header, config, left.get("rope.dimension_count"))
    if rope_factors is not None:
        _set_llama3(header, config, rope_factors)
    if header.architecture in ("gemma2", "gemma3"):
        is_wide = (header.architecture, config.num_hidden_layers) in _WIDE_GEMMAS
        wide = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = wide if is_wide else config.head_dim


def _set(config: Any, key: str, value: Any) -> bool:
    """Whether the configuration has what the key speaks of; it is set then."""
    if key in _BASES:
        for rotation in _rotations(config, sliding=key.endswith("_swa")):
            rotation["rope_theta"] = float(value)
        return True
    attribute = _ATTRIBUTES.get(key)
    if attribute is None or not hasattr(config, attribute):
        return False
    if getattr(config, attribute) is not None or value != 0:
        setattr(config, attribute, value)
    return True


def _rotations(config: Any, *, sliding: bool = False) -> list[dict[str, Any]]:
    """The parameters of rotations: of all layers, or of those with a window or without."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in parameters:
        return [parameters["sliding_attention" if sliding else "full_attention"]]
    return [] if sliding else [parameters]


def _set_rotation(header: GgufHeader, config: Any, width: int | None) -> None:
    for rotation in _rotations(config):
        rotation.update(scaled_rotation(header, getattr(config, "max_position_embeddings", 0)))
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if width is not None and width != int(head * rotation.get("partial_rotary_factor", 1.0)):
            rotation["partial_rotary_factor"] = width / head


def _set_llama3(header: GgufHeader, config: Any, factors: np.ndarray) -> None:
    """Llama 3.1's parameters again, out of the factor that they give for each frequency."""
    (rotation,) = _rotations(config)
    factor = float(factors.max())
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wavelengths = 2 * math.pi * rotation["rope_theta"] ** (np.arange(0, head, 2) / head)
    low, high, length = _LLAMA3.values()
    smooth = ((length / wavelengths - low) / (high - low)).clip(0, 1)
    if factors.shape != smooth.shape or not np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
        raise ModelLoadError(
            f"model: {header.path} scales its rotations one by one (rope_freqs.weight), and not as Llama 3.1 does, "
            "which is not read from GGUF here. Use the model's safetensors."
        )
    if factor != 1:
        rotation.update(rope_type="llama3", factor=factor, **_LLAMA3)
