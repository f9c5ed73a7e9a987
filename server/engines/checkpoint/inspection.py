"""What a model folder is, by its JSON files and the headers of its weights. Enter at `inspect`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from server.engines.checkpoint.json_files import listed, read_object, refuse_dangling
from server.engines.checkpoint.positions import refuse_lengths, refuse_rotations
from server.engines.checkpoint.quantized import quantization_of, refuse_quantized
from server.engines.checkpoint.weights import StoredTensor, read_tensors
from server.errors import ModelLoadError

_OPTIONAL = (
    "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
# What the last part of an architecture's name says it is; the others run a text on, or are held against their tensors.
_OTHER_HEADS = {
    "ForSequenceClassification": "a classifier",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMultipleChoice": "a classifier",
    "ForNextSentencePrediction": "a classifier",
    "ForMaskedLM": "a masked language model",
    "ForPreTraining": "a masked language model",
    "RewardModel": "a reward model",
    "ForReward": "a reward model",
    "ForRewardModeling": "a reward model",
    "ForImageClassification": "a classifier of images",
    "ForAudioClassification": "a classifier of sounds",
    "ForCTC": "a model of speech",
    "ForSpeechSeq2Seq": "a model of speech",
    "EncoderModel": "an encoder",
    "ForTextEncoding": "an encoder",
    "WithValueHead": "a model with a value head of TRL around it",
    "Model": "a model without a language model's head, as embeddings use it",
}
_TUPLES = "use_return_dict"
# Errors that were meant for whoever wrote the code, and say no more than a key or two types.
_BARE = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, NotImplementedError)


@dataclass(slots=True, frozen=True)
class Inspected:
    """What has been read of a folder that may be served. `config` is transformers'."""

    config: Any
    raw_config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def is_quantized(self) -> bool:
        return quantization_of(self.raw_config) is not None


def inspect(folder: Path) -> Inspected:
    """Read what tells whether a folder can be served, and no weights. Raises ModelLoadError when it cannot."""
    refuse_other_folders(folder)
    raw = read_object(folder / "config.json")
    _refuse_code(folder / "config.json", raw)
    for name in _OPTIONAL:
        refuse_dangling(folder / name)
        if (folder / name).exists():
            _refuse_code(folder / name, read_object(folder / name))
    refuse_other_architectures(folder, raw)
    tensors = read_tensors(folder)
    refuse_quantized(folder, raw, tensors)
    refuse_lengths(folder / "config.json", raw)
    config = _read_config(folder, raw)
    refuse_rotations(folder / "config.json", config)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadError(
            f"model: {folder} holds an encoder with a decoder ({raw['model_type']}); this server runs causal language "
            "models."
        )
    reads_both_ways = raw["model_type"] in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if reads_both_ways and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False)):
        raise ModelLoadError(
            f"model: {folder} holds an encoder ({raw['model_type']} without is_decoder in config.json), whose tokens "
            "see what follows them; this server runs causal language models."
        )
    return Inspected(config, raw, tensors)


def refuse_other_folders(folder: Path) -> None:
    """Raises ModelLoadError when a folder is an adapter, a pipeline or a folder of folders."""
    if (folder / "adapter_config.json").is_file():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        if (folder / "config.json").is_file():
            raise ModelLoadError(
                f"model: {folder} holds both a model and an adapter (adapter_config.json), and it cannot be known "
                "whether they are merged. Move one of them to a folder of its own."
            )
        raise ModelLoadError(f"model: {folder} holds an adapter. Serve it with --model {base} --adapter {folder}.")
    refuse_dangling(folder / "config.json")
    if (folder / "config.json").exists():
        return
    if (folder / "model_index.json").is_file():
        raise ModelLoadError(f"model: {folder} holds a pipeline of diffusers; this server runs causal language models.")
    if (folder / "params.json").is_file():
        raise ModelLoadError(
            f"model: {folder} holds a model in its maker's own format (params.json). Convert it to config.json and "
            "safetensors with transformers."
        )
    if snapshot := _newest_snapshot(folder):
        raise ModelLoadError(f"model: {folder} is a model's place in the hub's cache. Give {snapshot}.")
    if inner := sorted(path.parent.name for path in folder.glob("*/config.json")):
        raise ModelLoadError(f"model: {folder} has no config.json, but folders in it have: {listed(inner)}. Name one.")
    raise ModelLoadError(
        f"model: {folder} has no readable config.json. A model's folder has config.json, safetensors weights and a "
        "tokenizer, or one GGUF file."
    )


def _newest_snapshot(folder: Path) -> Path | None:
    """Of a folder in the hub's cache, or of its folder of snapshots."""
    cached = folder.parent if folder.name == "snapshots" else folder
    snapshots = [path.parent for path in cached.glob("snapshots/*/config.json")]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def _refuse_code(path: Path, content: Mapping[str, Any]) -> None:
    if "auto_map" in content:
        raise ModelLoadError(
            f"model: {path} names Python code (auto_map), which is never run. Where transformers has the architecture "
            "itself, take auto_map out."
        )
    if "transformers_weights" in content:
        raise ModelLoadError(f"model: {path} names weights of its own (transformers_weights); that is not served.")
    eos = content.get("eos_token_id")
    if not all(isinstance(token, int) for token in (eos if isinstance(eos, list) else [eos]) if token is not None):
        raise ModelLoadError(f"model: {path}: eos_token_id is {eos!r}; it must be a token's number or a list of them.")


def refuse_other_architectures(folder: Path, raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelLoadError(f"model: {folder / 'config.json'} has no model_type, which says what the model is.")
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ModelLoadError(f"model: {folder / 'config.json'}: architectures must be a list of names.")
    built = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    known = {built} if isinstance(built, str) else set(built or ())
    foreign = [] if known & set(architectures) else [name for name in architectures if "LMHead" not in name]
    for name in foreign:
        if kind := next((kind for ending, kind in _OTHER_HEADS.items() if name.endswith(ending)), None):
            raise ModelLoadError(f"model: {folder} holds {kind} ({name}); this server runs causal language models.")
    if model_type not in CONFIG_MAPPING:
        raise ModelLoadError(
            f"model: {folder}: transformers {transformers.__version__} does not know the model_type {model_type!r}; a "
            "newer release may."
        )
    if built is None:
        raise ModelLoadError(
            f"model: {folder} is of the model_type {model_type!r}, of which transformers has no causal language model."
        )


def _read_config(folder: Path, raw: Mapping[str, Any]) -> Any:
    """As transformers reads it. Outputs are always objects and no tuples, whatever it says: engines read them so."""
    try:
        left = _without_tuples(raw)
        if left != raw:
            with tempfile.TemporaryDirectory() as scratch:
                (Path(scratch) / "config.json").write_text(json.dumps(left))
                config = AutoConfig.from_pretrained(scratch, trust_remote_code=False)
            config.name_or_path = str(folder)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text_config = config.get_text_config()
    except Exception as error:
        raise ModelLoadError(f"model: {folder / 'config.json'} cannot be read: {one_line(error)}") from error
    if not isinstance(text_config, PreTrainedConfig):
        raise ModelLoadError(
            f"model: {folder / 'config.json'} has a part for the text, which a model of the model_type "
            f"{raw['model_type']!r} does not have."
        )
    config.return_dict = text_config.return_dict = True
    return config


def _without_tuples(content: Any) -> Any:
    """Without a property of transformers' configurations that cannot be set, in every part."""
    if not isinstance(content, Mapping):
        return content
    return {key: _without_tuples(value) for key, value in content.items() if key != _TUPLES}


def one_line(error: BaseException, *, most: int = 300) -> str:
    """The beginning of what an error of another library says, on one line, with its kind where the words need it."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, _BARE):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text[:most] + "..." if len(text) > most else text.rstrip(".") + "."
