"""A tiny random model of every causal language model class that transformers maps, in variants.

`cases` lists them; `make_folder` writes one as a user's folder would be. Weights are large enough that logits differ
and attention matters, and nothing is left at a value that hides it: gates, sinks and biases that start at zero, and
norms that start at one, are random too. Knows nothing of engines.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures.exceptions import EXCEPTIONS, GAINS, OTHERS
from tests.architectures.sizes import HEAD_SIZE, LAYERS, PATTERNED_LAYERS, SIZES, SWITCH, TRAITS
from tests.conftest import byte_tokenizer

_GAIN = 6.0
_LAYER_COUNTS = {name for name, value in SIZES.items() if value is LAYERS and "layer" in name}
_HIDDEN = ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "word_embed_proj_dim", "lru_width")
_PATTERNS = ("layer_types", "mlp_layer_types", "no_rope_layers", "sliding_window_pattern", "_sliding_window_pattern")

ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": SWITCH},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": SWITCH},
    "longrope": {"rope_type": "longrope", "factor": 16.0, "original_max_position_embeddings": SWITCH},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}  # fmt: skip


class NotApplicableError(Exception):
    """A variant that is no other model."""


@dataclass(frozen=True, slots=True)
class Case:
    """One architecture of transformers' mapping, as it is or with one thing changed."""

    model_type: str
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.model_type}+{self.variant}" if self.variant else self.model_type

    @property
    def class_name(self) -> str:
        mapped = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]
        return mapped if isinstance(mapped, str) else mapped[0]


def cases() -> list[Case]:
    """Every mapped architecture, each followed by its variants."""
    return [
        Case(model_type, variant)
        for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        for variant in _variants(model_type)
    ]


def case_named(name: str) -> Case:
    """Raises ValueError where there is none."""
    model_type, _, variant = name.partition("+")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or variant not in _variants(model_type):
        raise ValueError(f"there is no case {name}")
    return Case(model_type, variant)


def _variants(model_type: str) -> list[str]:
    fields = _fields(CONFIG_MAPPING[model_type])
    found = ["", "plain"]
    if "rope_parameters" in fields:
        found += ROTATIONS
    if "is_decoder" in fields:
        found.append("encoder")
    return found + list(OTHERS.get(model_type, ()))


def make_folder(case: Case, folder: Path) -> None:
    """Config, safetensors in bfloat16, and tokenizer. Raises whatever transformers raises where it cannot build it."""
    torch.manual_seed(0)
    config = make_config(case)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model, GAINS.get(case.model_type, _GAIN))
    model.to(torch.bfloat16).save_pretrained(folder)
    # Of a model whose class takes the text's part, the whole, as those who publish it do.
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def make_config(case: Case) -> PreTrainedConfig:
    """Raises whatever the class raises for what it does not take, NotApplicableError for its own rotation."""
    config_class = CONFIG_MAPPING[case.model_type]
    given = EXCEPTIONS.get(case.model_type, {}) | OTHERS.get(case.model_type, {}).get(case.variant, {})
    if case.variant == "encoder":
        given["is_decoder"] = False
    arguments = _tiny(config_class, given, TRAITS if case.variant != "plain" else {})
    config = config_class(**arguments)
    if not getattr(config, "rope_parameters", None):
        return config
    return config_class(**{**arguments, "rope_parameters": _rotation(config, ROTATIONS.get(case.variant, {}))})


def _rotation(config: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The configuration's own rotation with a switch that texts reach, and with these changes to its full attention."""
    own = copy.deepcopy(config.rope_parameters)
    kinds = {name: kind for name, kind in own.items() if isinstance(kind, dict)}
    for kind in kinds.values() or [own]:
        if "original_max_position_embeddings" in kind:
            kind["original_max_position_embeddings"] = SWITCH
    changed = kinds.get("full_attention", next(iter(kinds.values()))) if kinds else own
    before = dict(changed)
    changed.update(changes)
    if changes.get("rope_type") == "longrope":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pairs = int(size * changed.get("partial_rotary_factor", 1.0)) // 2
        changed["short_factor"] = torch.linspace(1.0, 1.5, pairs).tolist()
        changed["long_factor"] = torch.linspace(1.0, 8.0, pairs).tolist()
    if changes and changed == before:
        raise NotApplicableError("the class rotates like this anyway")
    return own


def randomise(model: nn.Module, gain: float = _GAIN) -> None:
    """Weights `gain` times as large; constants, at one or zero, random around them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 0 or not parameter.is_floating_point():
                continue
            if _is_constant(parameter):
                _spread(parameter)
            elif parameter.dim() > 1:
                parameter.mul_(gain)
        for name, buffer in model.named_buffers():
            # The bias by which experts are chosen is a buffer.
            if "bias" in name and buffer.is_floating_point() and _is_constant(buffer):
                _spread(buffer)


def _is_constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _spread(tensor: Tensor) -> None:
    value = float(tensor.flatten()[0])
    noise = torch.randn(tensor.shape)
    tensor.copy_(0.3 * noise if value == 0.0 else value * (1 + 0.2 * noise))


def _tiny(config_class: type[PreTrainedConfig], given: dict[str, Any], traits: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the class for a tiny configuration; `given` goes before the rules, for parts too."""
    fields = _fields(config_class)
    hidden = 64 if "head_dim" in fields else 4 * HEAD_SIZE
    layers = PATTERNED_LAYERS if any(name in fields for name in _PATTERNS) else LAYERS
    rules = {**SIZES, **traits, **dict.fromkeys(_HIDDEN, hidden), **dict.fromkeys(_LAYER_COUNTS, layers)}
    arguments = {name: value for name, value in rules.items() if name in fields} | given
    parts: Any = config_class.sub_configs
    for name in parts or {}:
        known = given.get(name, {})
        part = CONFIG_MAPPING[known["model_type"]] if "model_type" in known else type(getattr(config_class(), name))
        if part is not type(None):
            arguments[name] = part(**_tiny(part, known, traits))
    return arguments


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
