"""The safetensors of a model folder, by their headers alone: which files, whether they are whole, which tensors.

Enter at `weight_files` and `read_tensors`; `refuse_wrong_tensors` compares what files hold with what the model takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from server.engines.checkpoint.json_files import POINTER_BYTES, listed, read_object, refuse_dangling, refuse_pointer
from server.errors import ModelLoadError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_PICKLE_MARKS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

# Tensors by whose names a folder is known to be something else, most telling first.
_OTHER_KINDS = {
    r"^pretrained_model\.|(^|\.)(v_head|value_head)\.": (
        "a model with a value head of TRL around it; save its pretrained_model by itself"
    ),
    r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b|^base_model\.model\.|\.base_layer\.": (
        "an adapter that is not merged; merge it with peft's merge_and_unload, or give the base model with --adapter"
    ),
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|weight_scale_2|weight_zero_point|absmax|quant_map"
    r"|quant_state(\.\w+)?|SCB|qscales|scales|biases)$": (
        "quantized weights, and its config.json does not say how; give the folder as it was before quantization"
    ),
    r"^(module|_orig_mod|_fsdp_wrapped_module|student|policy|actor)\.": (
        "a model that was saved inside a wrapper; save the module that it wraps"
    ),
    r"^(score|classifier|classification_head|regression_head|reward_head|rm_head|qa_outputs|pooler)\b": (
        "a classifier or a reward model; this server runs causal language models"
    ),
}
# What old checkpoints hold beside weights: masks, tables of rotations, positions; each is computed from the config.
_COMPUTED = re.compile(r"(\.inv_freq|\.masked_bias|position_ids|\.attn\.bias|\.attention\.bias|cos_cached|sin_cached)$")
_MASKED_BIAS = re.compile(r"\.(attn|attention)\.bias$")
# Of the other senses of a model that also reads text, which the text model leaves out.
_OTHER_SENSES = re.compile(
    r"visi|visual|image|audio|speech|multi_?modal|mm_|projector|talker|token2wav|code2wav|vqmodel"
)
_CACHE_SCALES = re.compile(r"\.(k_scale|v_scale|kv_scale|input_scale|activation_scale|q_scale)$")


@dataclass(slots=True, frozen=True)
class StoredTensor:
    """A tensor as a file's header has it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that transformers would read, one or the shards that the index names. Raises ModelLoadError."""
    for path in (folder / SINGLE, folder / INDEX):
        refuse_dangling(path)
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise ModelLoadError(f"model: {folder} {_without_weights(folder)}")
        return [folder / SINGLE]
    shards = sorted(set(_weight_map(folder).values()))
    if (folder / SINGLE).exists() and shards != [SINGLE]:
        raise ModelLoadError(
            f"model: {folder} holds two sets of weights, {SINGLE} and the shards of {INDEX}. Keep only one."
        )
    for shard in shards:
        if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
            raise ModelLoadError(f"model: {folder / INDEX} names {shard!r}, which is outside the folder.")
        refuse_dangling(folder / shard)
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ModelLoadError(f"model: {folder} is incomplete: {INDEX} names {listed(missing)}, not there.")
    return [folder / shard for shard in shards]


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder by its name, no values read. Raises ModelLoadError for a file that is not whole."""
    tensors = {name: tensor for file in weight_files(folder) for name, tensor in read_header(file).items()}
    if (folder / INDEX).exists() and (absent := sorted(_weight_map(folder).keys() - tensors.keys())):
        raise ModelLoadError(f"model: {folder / INDEX} names tensors that no shard holds: {listed(absent)}.")
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises ModelLoadError when it is cut, a pointer, or another format."""
    refuse_dangling(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            beginning = opened.read(POINTER_BYTES)
            refuse_pointer(file, beginning)
            if beginning.startswith(_PICKLE_MARKS):
                raise ModelLoadError(f"model: {file} is a pickle, not safetensors; pickles are never read.")
            if size < 8:
                raise ModelLoadError(f"model: {file} is cut: it has {size} bytes. Copy it again.")
            header_bytes = int.from_bytes(beginning[:8], "little")
            if header_bytes > _MAX_HEADER_BYTES:
                raise ModelLoadError(f"model: {file} is not a safetensors file. Copy it again.")
            opened.seek(8)
            header = json.loads(opened.read(header_bytes)) if 8 + header_bytes <= size else None
        stored = {} if header is None else {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [int(entry["data_offsets"][1]) for entry in stored.values()]
        tensors = {
            name: StoredTensor(file, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in stored.items()
        }
    except OSError as error:
        raise ModelLoadError(f"model: {file} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ModelLoadError(
            f"model: {file} is not a safetensors file: its header is damaged. Copy it again."
        ) from error
    whole = 8 + header_bytes + max(ends, default=0)
    if size != whole:
        state = "is cut" if size < whole else "is damaged"
        raise ModelLoadError(f"model: {file} {state}: it has {size} bytes and should have {whole}. Copy it again.")
    return tensors


def refuse_wrong_tensors(
    folder: Path,
    class_name: str,
    loading: Mapping[str, Any],
    config: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
) -> None:
    """Raises ModelLoadError unless files and model agree, by what transformers tells of having loaded it.

    `loading` has missing_keys, unexpected_keys and mismatched_keys; tied weights are not missing there. `class_name` is
    the model's, `config` what config.json holds, and `stored` the tensors in the files.
    """
    unexpected = sorted(name for name in loading["unexpected_keys"] if not _may_be_left(name, config, stored))
    missing = sorted(name for name in loading["missing_keys"] if not _COMPUTED.search(name))
    for pattern, kind in _OTHER_KINDS.items():
        if telling := [name for name in unexpected if re.search(pattern, name)]:
            raise ModelLoadError(f"model: {folder} holds {kind} (it has {listed(telling)}).")
    if missing:
        raise ModelLoadError(
            f"model: {folder} lacks {listed(missing)}, without which the model would be random. Copy the folder again, "
            "or save the model whole."
        )
    if mismatched := sorted(loading["mismatched_keys"]):
        name, is_shape, due_shape = mismatched[0]
        more = f" ({len(mismatched) - 1} more differ)" if len(mismatched) > 1 else ""
        raise ModelLoadError(
            f"model: {folder}: {name} has shape {list(is_shape)}, and config.json asks for {list(due_shape)}{more}. "
            "Weights and config.json must be of one model."
        )
    if unexpected:
        raise ModelLoadError(
            f"model: {folder} holds tensors that {class_name} does not have: {listed(unexpected)}. "
            "It is another model than config.json says."
        )


def _may_be_left(name: str, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor that the model does not take says nothing of its text."""
    if _COMPUTED.search(name):
        shape = stored[name].shape if name in stored else None
        # A causal mask of old GPT-2s; a bias has one dimension.
        return not _MASKED_BIAS.search(name) or shape is None or len(shape) == 4
    if _CACHE_SCALES.search(name):
        return True
    has_other_senses = any(f"{part}_config" in config for part in ("text", "vision", "audio", "thinker", "llm"))
    return has_other_senses and bool(_OTHER_SENSES.search(name))


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelLoadError(f"model: {folder / INDEX} has no weight_map from names of tensors to names of files.")
    return weight_map


def _without_weights(folder: Path) -> str:
    """What is there instead of weights, and what to do about it."""
    pickles = sorted(
        path.name for pattern in _PICKLES for path in folder.glob(pattern) if path.name != "training_args.bin"
    )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"has no {SINGLE} or {INDEX}, only {listed(others)}; rename or convert what is to be served."
    if pickles:
        return (
            f"holds its weights as pickles only ({listed(pickles)}), which are never read, since they can run code: "
            "load them with transformers where you trust them, and save_pretrained writes safetensors."
        )
    return f"has no weights: there is neither {SINGLE} nor {INDEX} with its shards."
