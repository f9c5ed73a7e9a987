"""Which quantized checkpoints can be served: those that transformers makes whole again on load, on any device.

Enter at `refuse_quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.engines.checkpoint.json_files import read_object
from server.engines.checkpoint.weights import StoredTensor
from server.errors import ModelLoadError

DEQUANTIZED = ("fp8", "mxfp4")
"""Methods whose checkpoints are read as if they had not been quantized; no GPU or other package is needed."""

_WHAT_IS_SERVED = (
    f"Served are checkpoints that are not quantized, with --quantization int8 or int4 if wanted, those of "
    f"{' and '.join(DEQUANTIZED)}, and GGUF files."
)
# Where older tools wrote what config.json says today.
_OWN_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_SCALES = ".weight_scale_inv"
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json says of its quantization, of the whole model or its text part; None for nothing."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(part, dict):
            for name in ("quantization_config", "compression_config", "quantization"):
                if part.get(name):
                    return part[name] if isinstance(part[name], dict) else {"quant_method": str(part[name])}
    return None


def refuse_quantized(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Raises ModelLoadError for a quantized checkpoint that would not be served rightly."""
    settings = quantization_of(config)
    if settings is None:
        _refuse_integers(folder, tensors)
        return
    method = _method(settings)
    if method not in DEQUANTIZED:
        raise ModelLoadError(f"model: {folder} is quantized by {method}, which is not served. {_WHAT_IS_SERVED}")
    if method == "fp8":
        _refuse_uneven_blocks(folder, settings, tensors)


def _method(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    method = settings.get("quant_method") or ("MLX" if "group_size" in settings else "a method that it does not name")
    return str(method)


def _refuse_integers(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    own = [name for name in _OWN_FILES if (folder / name).is_file()]
    packed = [name for name, tensor in tensors.items() if tensor.dtype in _INTEGERS and len(tensor.shape) > 1]
    if not own or not packed:
        packed = [name for name in packed if name.endswith(".weight")]
    if packed:
        named = read_object(folder / own[0]).get("quant_method") if own else None
        raise ModelLoadError(
            f"model: {folder} is quantized{f' by {named}' if named else ''} (it holds {packed[0]} as "
            f"{tensors[packed[0]].dtype}), and config.json does not say how. {_WHAT_IS_SERVED}"
        )


def _refuse_uneven_blocks(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """transformers takes the blocks' size from the number of scales, which is wrong where the last block is smaller."""
    block = settings.get("weight_block_size", (128, 128))
    for name, scales in tensors.items():
        weight = tensors.get(name.removesuffix("_scale_inv"))
        if not name.endswith(_SCALES) or weight is None or len(scales.shape) < 2 or block is None:
            continue
        due = tuple(count * size for count, size in zip(scales.shape[-2:], block, strict=True))
        if weight.shape[-2:] != due:
            raise ModelLoadError(
                f"model: {folder} is quantized by fp8 in blocks of {block[0]} x {block[1]}, which do not divide "
                f"{name.removesuffix('_scale_inv')} of {weight.shape[-2]} x {weight.shape[-1]}; that is not served. "
                f"{_WHAT_IS_SERVED}"
            )
    if any(tensor.dtype.startswith("F8") for tensor in tensors.values()) and not any(
        n.endswith(_SCALES) for n in tensors
    ):
        raise ModelLoadError(
            f"model: {folder} is quantized by fp8 with scales that are not named weight_scale_inv; that is not "
            f"served. {_WHAT_IS_SERVED}"
        )
