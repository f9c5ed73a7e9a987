"""PEFT's LoRA adapters, merged into their base model when it is loaded. Needs the extra `adapters`.

An adapter is held against the model before peft sees it: what does not fit, cannot be merged exactly or is of another
kind raises ModelLoadError. Enter at `read_adapter`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from server.engines.checkpoint.inspection import one_line
from server.engines.checkpoint.json_files import listed, read_object, refuse_dangling
from server.engines.checkpoint.weights import StoredTensor, read_header
from server.errors import ModelLoadError

_log = logging.getLogger(__name__)
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of LoRA that change what the model computes in ways that merging into its weights cannot follow.
_NOT_MERGED = (
    "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "megatron_config",
    "use_qalora", "use_bdlora", "arrow_config", "loftq_config",
)  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to begin training that leave the base model's weights as they were."""

# What says where an adapter came from, and nothing of what it does.
_ORIGIN = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type", "auto_mapping")
_LORA = re.compile(r"\.lora_(?P<side>A|B|embedding_A|embedding_B|magnitude_vector)(\.weight|\.bias)?$")


@dataclass(slots=True, frozen=True)
class Adapter:
    """A LoRA adapter's folder, and what is in it."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def merged(self, model: Any) -> Any:
        """The model with the adapter in its weights, each computed in float32. Raises ModelLoadError."""
        self._refuse_what_does_not_fit(model)
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        try:
            # What peft warns of has been refused already, or comes of how it is built.
            with warnings.catch_warnings(action="ignore"):
                wrapped: Any = PeftModel.from_pretrained(model, str(self.folder))
            layers: list[Any] = [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]
            self._refuse_what_is_left_out(wrapped)
            for layer in layers:
                weight: Any = layer.get_base_layer().weight
                dtype = weight.dtype
                weight.data = weight.data.float()
                layer.merge(safe_merge=True)
                weight.data = weight.data.to(dtype)
            merged: Any = wrapped.base_model.unload()
        except ModelLoadError:
            raise
        except Exception as error:
            raise ModelLoadError(f"adapter: {self.folder} cannot be merged: {one_line(error)}") from error
        return merged

    def fingerprint(self, base: str) -> str:
        """Of the merged model, by its base model's: the same in every dtype, and never the base model's own."""
        # Lists of modules are written in any order.
        settings = {
            key: sorted(map(str, value)) if isinstance(value, list) else value
            for key, value in self.config.items()
            if value is not None and key not in _ORIGIN
        }
        digest = hashlib.sha256(base.encode())
        digest.update(json.dumps(settings, sort_keys=True).encode())
        with (self.folder / _WEIGHTS).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:32]

    def _refuse_what_does_not_fit(self, model: Any) -> None:
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
        tied = _tied_modules(model)
        for name, tensor in self.tensors.items():
            if not name.startswith(_PREFIX):
                raise ModelLoadError(
                    f"adapter: {self.folder / _WEIGHTS} holds {name}, which is no tensor of PEFT's LoRA."
                )
            place = name.removeprefix(_PREFIX)
            if any(place.startswith(f"{module}.") for module in tied):
                raise ModelLoadError(
                    f"adapter: {self.folder} changes {place}, and the model's embeddings and its head are the same "
                    "tensor, so the two cannot be told apart when merged. Merge it with peft and save the model untied."
                )
            due = _due_shape(place, modules, parameters)
            if due is None:
                raise ModelLoadError(
                    f"adapter: {self.folder} changes {place}, which this model does not have. It was made for "
                    f"{self.config.get('base_model_name_or_path')}."
                )
            if any(want is not None and want != have for want, have in zip(due, tensor.shape, strict=False)):
                raise ModelLoadError(
                    f"adapter: {self.folder}: {place} has shape {list(tensor.shape)}, and this model asks for "
                    f"{['any' if want is None else want for want in due]}. It was made for "
                    f"{self.config.get('base_model_name_or_path')}."
                )

    def _refuse_what_is_left_out(self, wrapped: Any) -> None:
        from peft import get_peft_model_state_dict

        # Otherwise it asks the hub for the base model's vocabulary.
        due = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        if absent := sorted(due.keys() - self.tensors.keys()):
            raise ModelLoadError(
                f"adapter: {self.folder / _WEIGHTS} lacks {listed(absent)}, which {_CONFIG} speaks of."
            )


def read_adapter(folder: Path) -> Adapter:
    """Raises ModelLoadError when the folder holds no LoRA adapter that can be merged."""
    if not folder.is_dir():
        raise ModelLoadError(f"adapter: there is no folder {folder}. Name one with {_CONFIG} and {_WEIGHTS}.")
    if not (folder / _CONFIG).exists():
        is_model = (folder / "config.json").exists()
        raise ModelLoadError(
            f"adapter: {folder} has no {_CONFIG}{'; it is a model, which --model serves' if is_model else ''}."
        )
    config = read_object(folder / _CONFIG)
    _refuse_kinds(folder, config)
    refuse_dangling(folder / _WEIGHTS)
    if not (folder / _WEIGHTS).exists():
        pickled = (
            " only as a pickle (adapter_model.bin), which is never read"
            if (folder / "adapter_model.bin").exists()
            else ""
        )
        raise ModelLoadError(f"adapter: {folder} has no {_WEIGHTS}{pickled and ','}{pickled}. Save it with peft again.")
    tensors = read_header(folder / _WEIGHTS)
    if not importlib.util.find_spec("peft"):
        raise ModelLoadError("adapter: merging needs peft; run `pip install 'recontrol[adapters]'`.")
    _refuse_unknown_settings(folder, config)
    return Adapter(folder, config, tensors)


def _tied_modules(model: Any) -> list[str]:
    """Names of the embeddings and of the head, where the two are one tensor."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in ends or ends[0].weight is not ends[1].weight:
        return []
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def _refuse_unknown_settings(folder: Path, config: dict[str, Any]) -> None:
    """peft drops what a later release has written, in silence or nearly."""
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)} | set(_ORIGIN)
    if unknown := sorted(key for key, value in config.items() if value and key not in known):
        raise ModelLoadError(
            f"adapter: {folder / _CONFIG} sets {listed(unknown)}, which this peft does not know; a newer release may "
            "(`pip install -U peft`)."
        )


def _refuse_kinds(folder: Path, config: dict[str, Any]) -> None:
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA":
        raise ModelLoadError(f"adapter: {folder} is of the type {kind}; only LORA (with DoRA and rsLoRA) is merged.")
    if task not in (None, "CAUSAL_LM"):
        raise ModelLoadError(f"adapter: {folder} is for the task {task}; this server runs causal language models.")
    for setting in _NOT_MERGED:
        if config.get(setting):
            raise ModelLoadError(f"adapter: {folder} uses {setting}, which cannot be merged into a model's weights.")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise ModelLoadError(
            f"adapter: {folder} began as {start!r} (init_lora_weights), which changes the base model too. Save it as a "
            "plain LoRA (path_initial_model_for_weight_conversion of peft's save_pretrained)."
        )
    library = (config.get("auto_mapping") or {}).get("parent_library") or "transformers"
    if library.partition(".")[0] != "transformers":
        raise ModelLoadError(f"adapter: {folder / _CONFIG} names Python code of {library}, which is never run.")


def _due_shape(
    place: str, modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter]
) -> tuple[int | None, ...] | None:
    """The shape that an adapter's tensor must have here, None for a length that is free; None for no such place."""
    if not (match := _LORA.search(place)):
        plain = place.replace(".base_layer.", ".")
        return tuple(parameters[plain].shape) if plain in parameters else None
    module = modules.get(place[: match.start()])
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        return None
    rows, columns = (weight.shape[1], weight.shape[0]) if type(module).__name__ == "Conv1D" else weight.shape
    if place.endswith(".bias"):
        return (rows,)
    return {"A": (None, columns), "B": (rows, None), "magnitude_vector": (rows,),
            "embedding_A": (None, rows), "embedding_B": (columns, None)}[match["side"]]  # fmt: skip
