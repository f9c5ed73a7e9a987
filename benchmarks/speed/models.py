"""The model as each peer wants it: random weights of a given shape, and GGUF files for llama.cpp.

Everything made here is made once, into a scratch name that is renamed at the end.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.speed import PROGRAM
from benchmarks.speed.process import PeerError
from benchmarks.speed.setup import Setup
from server.engines.checkpoint.model_files import ModelFiles
from server.engines.checkpoint.packaged import PACKAGED_MODELS, default_model_folder, packaged_model_folder
from server.errors import ConfigurationError
from value_models.heads import LinearHead
from value_models.store import CARD_FILE, BaseModelCard, HeadCard, architecture_card, save_head

LLAMA_CPP_SOURCE = ".venv-llama/src/vendor/llama.cpp"
"""Below --peers-dir: llama.cpp's sources, with its converter."""
_LLAMA_CPP_CONVERT = ".venv-llama/convert"
_GGUF_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_GIB = 2**30
_LLAMA_3 = {
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
"""Shapes of `--random-weights`; `tiny` is for trying the command."""
NUM_RANDOM_HEADS = 3


def model_folder(model: str) -> Path:
    """A model's folder of safetensors, for peers that know no packages. Raises ConfigurationError, ModelLoadError."""
    if model in PACKAGED_MODELS:
        return packaged_model_folder(PACKAGED_MODELS[model])
    if not Path(model).expanduser().exists():
        raise ConfigurationError(
            f"model: {model!r} is no folder; give one, a GGUF file, one of {', '.join(PACKAGED_MODELS)}, or "
            "--random-weights"
        )
    return ModelFiles.of(model).folder


def random_model(shape: str, work: Path, *, dtype: str, device: str, seed: int) -> Path:
    """A folder with a randomly initialised model, a tokenizer that fits, and heads in `heads/`.

    `shape` is one of SHAPES or a folder with a config.json. Raises ConfigurationError.
    """
    config, tokenizer = random_config(shape)
    folder = work / "models" / f"{Path(shape).resolve().name if shape not in SHAPES else shape}-random-{dtype}-{seed}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-", dir=folder.parent))
    torch.manual_seed(seed)
    with torch.device(device):  # Billions of random numbers take a CPU minutes.
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    for number in range(1, NUM_RANDOM_HEADS + 1):
        _save_random_head(scratch / "heads", f"random-{number}", folder.name, config.hidden_size)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)
    return folder


def text_config(folder: Path) -> Any:
    """Of a model's language part, where it has others."""
    return AutoConfig.from_pretrained(folder).get_text_config()


def kv_cache_gib(config: Any, *, rows: int, length: int, dtype: str) -> int:
    """Whole GiB that hold the keys and values of so many rows."""
    return math.ceil(rows * length * kv_bytes_per_token(config, dtype=dtype) / _GIB)


def kv_bytes_per_token(config: Any, *, dtype: str) -> int:
    """Keys and values of one position in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size * getattr(torch, dtype).itemsize


def head_names(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob(f"*/{CARD_FILE}"))


def converted_gguf(setup: Setup) -> Path:
    """The model in its own precision, by llama.cpp's converter. Raises PeerError."""
    kind = _GGUF_TYPES[setup.dtype]
    target = setup.work / "models" / f"{setup.folder.resolve().name}-{kind}.gguf"
    if target.is_file():
        return target
    script = setup.peers_dir / LLAMA_CPP_SOURCE / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise PeerError(f"the model cannot be converted: there is no {script} (`make peers` unpacks it)")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(".part")
    command = [sys.executable, str(script), str(setup.folder), "--outfile", str(scratch), "--outtype", kind]
    env = {**os.environ, "PYTHONPATH": str(setup.peers_dir / _LLAMA_CPP_CONVERT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise PeerError(f"the model cannot be converted: {' | '.join(done.stderr.splitlines()[-3:])}")
    os.replace(scratch, target)
    return target


def packaged_gguf(setup: Setup) -> Path:
    """The 4-bit file that the model's package carries, whatever --dtype says. Raises PeerError."""
    packaged = PACKAGED_MODELS.get(setup.model)
    spec = importlib.util.find_spec(packaged.modules[0]) if packaged else None
    files = sorted(Path(spec.origin).parent.glob(packaged.pattern)) if packaged and spec and spec.origin else []
    if len(files) != 1:
        raise PeerError(f"there is no one 4-bit file of {setup.model}")
    return files[0]


def random_config(shape: str) -> tuple[Any, Any]:
    """The configuration and a tokenizer whose ids it has room for."""
    folder = Path(shape)
    if shape not in SHAPES and not (folder / "config.json").is_file():
        raise ConfigurationError(
            f"random_weights: {shape!r} is neither a folder with a config.json nor one of {', '.join(SHAPES)}"
        )
    config: Any = LlamaConfig(**SHAPES[shape]) if shape in SHAPES else AutoConfig.from_pretrained(folder)
    has_tokenizer = shape not in SHAPES and (folder / "tokenizer.json").is_file()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder if has_tokenizer else default_model_folder())
    if len(tokenizer) > config.vocab_size:
        raise ConfigurationError(
            f"random_weights: {shape!r} has a vocabulary of {config.vocab_size}, its tokenizer {len(tokenizer)} tokens"
        )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config, tokenizer


def _save_random_head(folder: Path, name: str, model: str, hidden_size: int) -> None:
    """Of the kind that ships: linear. What it steers towards means nothing; what it costs does."""
    head = LinearHead(
        mean_D=torch.zeros(hidden_size),
        scale_D=torch.ones(hidden_size),
        inputs_UD=torch.randn(1, hidden_size),
        input_bias_U=torch.zeros(1),
    )
    unknown = "none: random weights"
    card = HeadCard(
        name=name,
        description="Random, for the benchmark",
        base_model=BaseModelCard(name=model, hidden_size=hidden_size),
        architecture=architecture_card(head),
        normalisation="none",
        metric="identity, steps not calibrated",
        reward=unknown,
        reward_mean=0.0,
        reward_scale=1.0,
        targets=unknown,
        data={},
        validation={},
        command=f"{PROGRAM} --random-weights",
    )
    save_head(folder / name, head, card)
