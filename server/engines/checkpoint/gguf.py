"""GGUF files as model folders: converted once into the cache by transformers, and again when the file changes.

A conversion is whole or not there: it is written beside its place and renamed. What was converted before is used only
where this user (or root) owns it and no one else may write there. Enter at `gguf_folder`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from server.engines.checkpoint.gguf_config import ALIASES, complete_config, refuse_numbers
from server.engines.checkpoint.gguf_header import GgufHeader, read_header, told
from server.engines.checkpoint.inspection import one_line, refuse_other_architectures
from server.engines.checkpoint.json_files import listed
from server.engines.checkpoint.manifest import CONVERSION_VERSION, check_manifest, write_manifest
from server.engines.checkpoint.quiet import quiet_transformers
from server.engines.checkpoint.trust import own_folder, refuse_strangers
from server.engines.checkpoint.weights import refuse_wrong_tensors
from server.errors import ModelLoadError
from value_models.files import cache_root

_log = logging.getLogger(__name__)
# Its bar is tqdm's own there, which transformers' switch for bars does not reach.
_reader: Any = modeling_gguf_pytorch_utils
_reader.tqdm = transformers.utils.logging.tqdm
_SOURCE = "source.json"

_FLOATS = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
_NOT_ARCHITECTURES = ("general", "tokenizer")
_ROPE_FACTORS = "rope_freqs.weight"
# How text is split before merges (tokenizer.ggml.pre): as GPT-2 does, or so and digit by digit.
_AS_GPT2 = {"gpt-2", "gpt2", "default", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling", "exaone4"}
_DIGIT_BY_DIGIT = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>", "<turn|>")
"""Tokens that end a turn; where a file's chat template has one, a response ends with it."""


def gguf_folder(file: Path) -> Path:
    """The folder that a file has been converted to, now or before. Raises ModelLoadError for what cannot be."""
    header = read_header(file)
    refuse_gguf(header)
    root = cache_root() / "models" / "gguf"
    own_folder(root, mode=0o700)
    path = file.resolve()
    folder = root / f"{path.stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
    facts = path.stat()
    source = {"path": str(path), "size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "version": CONVERSION_VERSION,
              "transformers": transformers.__version__}  # fmt: skip
    if folder.is_dir():
        refuse_strangers(folder)
    # A cache that can only be read does, when the file is in it.
    if not _is_from(folder, source):
        with FileLock(root / f"{folder.name}.lock"):
            if not _is_from(folder, source):
                _convert(header, folder, source)
    check_manifest(folder)
    return folder


def refuse_gguf(header: GgufHeader) -> None:
    """Raises ModelLoadError for a file that is no language model, or one that transformers does not read."""
    kind = header.metadata.get("general.type", "model")
    name = header.architecture
    if kind != "model" or name == "clip":
        raise ModelLoadError(
            f"model: {header.path} is a GGUF of the type {told(kind)} ({told(name)}), not of a whole language model."
        )
    if type(num_parts := header.metadata.get("split.count", 0)) is not int:
        raise header.is_not("split.count", "a whole number")
    if num_parts > 1:
        raise ModelLoadError(
            f"model: {header.path} is one of {num_parts} parts. Join them first: "
            "`llama-gguf-split --merge FIRST_PART WHOLE.gguf`."
        )
    known = {key for key in GGUF_CONFIG_MAPPING if key not in _NOT_ARCHITECTURES} | ALIASES.keys()
    if name not in known:
        raise ModelLoadError(
            f"model: {header.path} is of the architecture {told(name)}, which transformers {transformers.__version__} "
            f"does not read from GGUF; it reads {', '.join(sorted(known))}. Use the model's safetensors."
        )
    for tensor in header.tensors:
        if tensor.type not in _FLOATS and not _can_dequantize(tensor.type):
            raise ModelLoadError(
                f"model: {header.path} holds {tensor.name} as {tensor.type.name}, which cannot be dequantized here. "
                "Take another quantization of the model, such as Q8_0 or Q4_K_M."
            )
    for key in _ENDS:
        if (token_id := header.metadata.get(key)) is not None and (type(token_id) is not int or token_id < 0):
            raise header.is_not(key, "a whole number from 0 up")
    if not header.metadata.get("tokenizer.ggml.model"):
        raise ModelLoadError(f"model: {header.path} has no tokenizer in it.")
    refuse_numbers(header)


def write_as_folder(file: Path, folder: Path) -> None:
    """Weights, configuration and tokenizer of a GGUF file as transformers saves them. Raises ModelLoadError."""
    header = read_header(file)
    refuse_gguf(header)
    with quiet_transformers(), _read_once():
        _write(header, folder)


class QuickReader(gguf.GGUFReader):
    """gguf's reader on a plain array: each slice of its memmap, two a token of the vocabulary, runs Python's code."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = mapped.view(np.ndarray)


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers has gguf read the same file three times, and make the same map of names for each module of a model.

    The first takes long for a large vocabulary, and the second for a deep model.
    """
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = cache(QuickReader)  # type: ignore[misc, assignment]
    gguf.get_tensor_name_map = cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]
        gguf.get_tensor_name_map = name_map


def _write(header: GgufHeader, folder: Path) -> None:
    file = header.path
    location, name = str(file.parent), file.name
    try:
        config = AutoConfig.from_pretrained(location, gguf_file=name)
    except Exception as error:
        raise ModelLoadError(f"model: {file}: its metadata cannot be read: {one_line(error)}") from error
    refuse_other_architectures(file, config.to_dict())
    complete_config(header, config, _rope_factors(file, header))
    dtype = _stored_dtype(header)
    _refuse_unread_tensors(header, config)
    try:
        # transformers takes the weights out of llama.cpp's conventions, such as Gemma's norms with one added.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location, gguf_file=name, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(location, gguf_file=name)
    except Exception as error:
        raise ModelLoadError(f"model: {file} cannot be converted: {one_line(error)}") from error
    model, loading = loaded
    refuse_wrong_tensors(file, type(model).__name__, loading, {}, {})
    # The weights are dequantized now; the marks of their origin would make transformers refuse to save them.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _set_split(header, tokenizer)
    model.generation_config.eos_token_id = _ends_of_text(header, tokenizer) or None
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_tokens_beyond(folder, int(header.metadata.get("tokenizer.ggml.tokens", 0)))


def _convert(header: GgufHeader, folder: Path, source: dict[str, Any]) -> None:
    """Write into a scratch folder and rename it at the end, so that a killed conversion leaves nothing in the way."""
    for leftover in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    dtype = _stored_dtype(header)
    needed = sum(int(np.prod(tensor.shape)) for tensor in header.tensors) * dtype.itemsize
    if shutil.disk_usage(folder.parent).free < needed:
        raise ModelLoadError(
            f"model: {header.path} becomes {needed / 2**30:.1f} GiB when converted, more than {folder.parent} has room "
            "for. Set RECONTROL_CACHE_DIR to another disk."
        )
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    _log.warning("Converting %s once into %s (%.1f GiB)", header.path, folder, needed / 2**30)
    try:
        write_as_folder(header.path, scratch)
        (scratch / _SOURCE).write_text(json.dumps(source))
        write_manifest(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    except OSError as error:
        raise ModelLoadError(f"model: {header.path} cannot be converted into {folder}: {one_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_from(folder: Path, source: dict[str, Any]) -> bool:
    with suppress(OSError, ValueError):
        return json.loads((folder / _SOURCE).read_text()) == source
    return False


def _stored_dtype(header: GgufHeader) -> torch.dtype:
    """That of the file's matrices where they are floats, else bfloat16, which holds all that quantized ones have."""
    types = {tensor.type for tensor in header.tensors if len(tensor.shape) > 1}
    return _FLOATS[next(iter(types))] if len(types) == 1 and types <= _FLOATS.keys() else torch.bfloat16


def _can_dequantize(kind: gguf.GGMLQuantizationType) -> bool:
    values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        return gguf.dequantize(np.zeros((1, num_bytes), np.uint8), kind).size == values
    except NotImplementedError:
        return False


def _rope_factors(file: Path, header: GgufHeader) -> np.ndarray | None:
    if not any(tensor.name == _ROPE_FACTORS for tensor in header.tensors):
        return None
    reader = gguf.GGUFReader(str(file))
    return next(np.array(tensor.data) for tensor in reader.tensors if tensor.name == _ROPE_FACTORS)


def _refuse_unread_tensors(header: GgufHeader, config: Any) -> None:
    """transformers leaves out, in silence, what it has no place for."""
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
        places = get_gguf_hf_weights_map(model, processor)
    except Exception as error:
        raise ModelLoadError(f"model: {header.path} cannot be converted: {one_line(error)}") from error
    names = {tensor.name for tensor in header.tensors} - {_ROPE_FACTORS}
    # Experts are kept together, under names without an ending.
    if unread := sorted(name for name in names if not {name, name.removesuffix(".weight")} & places.keys()):
        raise ModelLoadError(
            f"model: {header.path} holds {listed(unread)}, for which {type(model).__name__} has no place. "
            "Use the model's safetensors."
        )


def _set_split(header: GgufHeader, tokenizer: Any) -> None:
    """Split text before merges as the model's own tokenizer does. Raises ModelLoadError where that is not known."""
    split: str | None = header.metadata.get("tokenizer.ggml.pre")
    if header.metadata["tokenizer.ggml.model"] != "gpt2":
        return
    if split is None:
        _log.warning("%s does not say how its tokenizer splits text; it is split as GPT-2's is", header.path)
    elif split in _splits_of_transformers() or split in _AS_GPT2:
        return
    elif split in _DIGIT_BY_DIGIT:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
        )
    else:
        raise ModelLoadError(
            f"model: {header.path} splits text by the rules {told(split)} (tokenizer.ggml.pre), which are not known "
            "here. Use the model's safetensors."
        )


def _drop_tokens_beyond(folder: Path, num_tokens: int) -> None:
    """transformers gives each tokenizer the special tokens of its class, also those that the file does not have."""
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, settings = json.loads(path.read_text()), json.loads(settings_path.read_text())
    beyond = {token["content"] for token in content["added_tokens"] if token["id"] >= num_tokens}
    if not beyond:
        return
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in beyond]
    settings = {key: value for key, value in settings.items() if not (isinstance(value, str) and value in beyond)}
    path.write_text(json.dumps(content, ensure_ascii=False))
    settings_path.write_text(json.dumps(settings, ensure_ascii=False, indent=2))


def _splits_of_transformers() -> Container[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        # Releases before 5.20 know them by architecture only.
        return ()
    return GGUF_PRE_TOKENIZER_SPLITS


def _ends_of_text(header: GgufHeader, tokenizer: Any) -> list[int]:
    """The file's own ends of text, and of turns where its chat template uses them."""
    ends = [header.metadata.get(key) for key in _ENDS]
    template = str(header.metadata.get("tokenizer.chat_template", ""))
    vocabulary = tokenizer.get_vocab()
    ends += [vocabulary.get(token) for token in _TURN_ENDS if token in template]
    return sorted({token for token in ends if token is not None})
