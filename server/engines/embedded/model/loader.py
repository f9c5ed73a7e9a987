"""A causal language model with its tokenizer, loaded into this process.

Never runs code of a model folder or a model's package: safetensors only, `trust_remote_code` off, `auto_map` refused.
What may be loaded is known by `server.engines.checkpoint`. Knows nothing of engines. Enter at `load_model`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from server.engines.checkpoint.adapters import Adapter, read_adapter
from server.engines.checkpoint.inspection import Inspected, inspect, one_line
from server.engines.checkpoint.json_files import listed
from server.engines.checkpoint.positions import max_len_of
from server.engines.checkpoint.quiet import quiet_transformers
from server.engines.checkpoint.source import find_checkpoint
from server.engines.checkpoint.tokenizer import eos_token_ids, load_tokenizer, warn_of_tokens_beyond
from server.engines.checkpoint.weights import refuse_wrong_tensors
from server.errors import ModelLoadError

_log = logging.getLogger(__name__)
FINGERPRINT_VALUES = 256
_NO_TEXT = ("image", "audio", "video", "vision", "boi", "eoi", "boa", "eoa")
DEFAULT_MAX_LEN = 2048


@dataclass(slots=True, frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer. `identity` is what a value head is matched against."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    identity: dict[str, Any]
    eos_token_ids: frozenset[int]
    max_len: int
    placeholder_ids: frozenset[int] = frozenset()
    """Tokens that stand for a picture or a sound, of a model that takes those too."""


def load_model(
    name: str, *, device: str = "auto", dtype: str = "auto", adapter: str | Path | None = None
) -> LoadedModel:
    """Load by a packaged model's name, folder, GGUF file or hub id, and merge an adapter into it.

    Raises ModelLoadError with what to do about it.
    """
    target = resolve_device(device)
    lora = None if adapter is None else read_adapter(Path(adapter).expanduser())
    with quiet_transformers():
        checkpoint = find_checkpoint(name)
        folder = checkpoint.folder
        inspected = inspect(folder)
        tokenizer = load_tokenizer(folder, inspected.config)
        model = _load_weights(folder, inspected, resolve_dtype(dtype, target))
        identity = base_model_identity(model, checkpoint.name)
        if lora is not None:
            model, identity = _with_adapter(lora, model, identity)
    _refuse_what_is_not_finite(folder, model)
    model.to(target).eval().requires_grad_(False)
    warn_of_tokens_beyond(folder, tokenizer, identity["vocab_size"])
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=identity["name"],
        identity=identity,
        eos_token_ids=eos_token_ids(model.generation_config, tokenizer),
        max_len=max_len(folder, model.config),
        placeholder_ids=placeholder_ids(model.config),
    )


def placeholder_ids(config: Any) -> frozenset[int]:
    """Tokens that stand for what is no text, by the names that transformers gives them in a configuration."""
    if config.get_text_config() is config:
        return frozenset()
    return frozenset(
        value
        for name, value in vars(config).items()
        if type(value) is int and name.endswith(("_token_id", "_token_index")) and name.startswith(_NO_TEXT)
    )


def _load_weights(folder: Path, inspected: Inspected, dtype: torch.dtype) -> Any:
    config = inspected.config
    if inspected.is_quantized:
        # On a GPU too: control and the fast path want plain weights.
        holder = config if getattr(config, "quantization_config", None) else config.get_text_config()
        holder.quantization_config = {**holder.quantization_config, "dequantize": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"model: {folder} cannot be loaded by transformers: {one_line(error)}") from error
    model, loading = loaded
    refuse_wrong_tensors(folder, type(model).__name__, loading, inspected.raw_config, inspected.tensors)
    return model


def _with_adapter(lora: Adapter, model: Any, identity: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    made_for = str(lora.config.get("base_model_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]
    if made_for and made_for != identity["name"]:
        _log.warning(
            "The adapter %s says that it was made for %s; the model is %s", lora.name, made_for, identity["name"]
        )
    merged = lora.merged(model)
    changed = {"name": f"{identity['name']}+{lora.name}", "fingerprint": lora.fingerprint(identity["fingerprint"])}
    return merged, identity | changed


def _refuse_what_is_not_finite(folder: Path, model: nn.Module) -> None:
    """By the sums of the weights: one pass over memory, a tenth of a second for the default model."""
    broken = [name for name, parameter in model.named_parameters() if not parameter.detach().sum().isfinite()]
    if broken:
        raise ModelLoadError(f"model: {folder} has weights that are not finite numbers: {listed(broken)}.")


def max_len(folder: Path, config: Any) -> int:
    """The most tokens of a sequence, by the model's configuration, or a default with a word in the log."""
    if length := max_len_of(config):
        return length
    _log.warning(
        "%s: config.json does not say how many tokens the model was trained on; %d are served", folder, DEFAULT_MAX_LEN
    )
    return DEFAULT_MAX_LEN


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
        head = values[:FINGERPRINT_VALUES].to("cpu", torch.bfloat16)
        digest.update(parameter_name.encode())
        digest.update(head.view(torch.int16).numpy().tobytes())
    return {
        "name": name,
        "architecture": type(model).__name__,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "fingerprint": digest.hexdigest()[:32],
    }


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError("device: cuda was asked for, but torch sees no CUDA device. Use auto or cpu.")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported()
    else:
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32
