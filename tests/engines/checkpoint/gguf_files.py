"""Tiny GGUF files, written as llama.cpp's converter writes them: its names, its order of rotated heads, its norms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.conftest import byte_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"


def write_gguf(
    path: Path, architecture: str, model: Any, metadata: Mapping[str, Any] | None = None, *,
    more: Mapping[str, np.ndarray] | None = None, quantization: gguf.GGMLQuantizationType | None = None,
    tokens: tuple[str, ...] = (), **other: Any,
) -> Path:  # fmt: skip
    """`metadata` are keys of the architecture, `other` those of the tokenizer, `more` tensors beside the model's."""
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    for key, value in {**_sizes(architecture, config), **(metadata or {})}.items():
        _add(writer, f"{architecture}.{key}", value)
    _add_tokenizer(writer, tokens)
    for key, value in other.items():
        _add(writer, f"tokenizer.{key}".replace("__", "."), value)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for place, values in _tensors(names, architecture, config, name, tensor.float().numpy()):
            _add_tensor(writer, place, values, quantization)
    for place, values in (more or {}).items():
        writer.add_tensor(place, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _sizes(architecture: str, config: Any) -> dict[str, Any]:
    eps = getattr(config, "rms_norm_eps", None)
    sizes = {
        "context_length": 256,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", 4 * config.hidden_size),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", config.num_attention_heads),
    }
    if eps is None:
        others = (getattr(config, name, None) for name in ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon"))
        sizes["attention.layer_norm_epsilon"] = next(other for other in others if other is not None)
    else:
        sizes["attention.layer_norm_rms_epsilon"] = eps
    if parameters := getattr(config, "rope_parameters", None):
        sizes["rope.freq_base"] = float(parameters.get("full_attention", parameters)["rope_theta"])
    if architecture == "llama":
        sizes["rope.dimension_count"] = config.hidden_size // config.num_attention_heads
    return sizes


def _tensors(
    names: gguf.TensorNameMap, architecture: str, config: Any, name: str, values: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    """A tensor of transformers as one or two of GGUF's."""
    if name.endswith("experts.gate_up_proj"):
        block, half = f"blk.{name.split('.')[2]}", values.shape[1] // 2
        return [(f"{block}.ffn_gate_exps.weight", values[:, :half]), (f"{block}.ffn_up_exps.weight", values[:, half:])]
    if name.endswith("experts.down_proj"):
        return [(f"blk.{name.split('.')[2]}.ffn_down_exps.weight", values)]
    stem, _, ending = name.rpartition(".")
    if architecture == "llama" and (".q_proj" in name or ".k_proj" in name):
        heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
        values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        values = values + 1
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        values = values.T
    if "shared_expert_gate" in name:
        values = values.reshape(-1)
    return [(f"{names.get_name(stem)}.{ending}", values)]


def _add_tensor(
    writer: gguf.GGUFWriter, place: str, values: np.ndarray, quantization: gguf.GGMLQuantizationType | None
) -> None:
    values = np.ascontiguousarray(values)
    if quantization is None or values.ndim < 2:
        writer.add_tensor(place, values)
    else:
        writer.add_tensor(place, gguf.quantize(values, quantization), raw_dtype=quantization)


def _add_tokenizer(writer: gguf.GGUFWriter, tokens: tuple[str, ...]) -> None:
    vocabulary = byte_tokenizer().get_vocab()
    listed = sorted(vocabulary, key=vocabulary.__getitem__)
    # A merge, in the place of a byte that no text has.
    listed[255] = "he"
    for number, token in enumerate(tokens):
        listed[250 + number] = token
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(listed)
    writer.add_token_types([3 if token in ("<eos>", "<bos>", *tokens) else 1 for token in listed])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(vocabulary["<eos>"])
    writer.add_bos_token_id(vocabulary["<bos>"])
    writer.add_pad_token_id(0)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](key, value)


def random_model(model: Any) -> Any:
    """The model with norms and biases that are not ones and zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0).add_(torch.randn_like(parameter) * 0.02)
    return model.eval()
