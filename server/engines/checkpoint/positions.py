"""How many positions a configuration speaks of and how it rotates them, refused where nothing could be computed.

Enter at `refuse_lengths` before transformers has read config.json, at `refuse_rotations` after, and at `max_len`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.errors import ModelLoadError

_log = logging.getLogger(__name__)
MIN_POSITIONS = 16
"""Whether a model can be served is seen by running it on a few tokens."""

MAX_POSITIONS = 2**31 - 1
_DEFAULT_MAX_LEN = 2048
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
_TEXT_PARTS = ("text_config", "llm_config")
_UNSCALED = ("default", "axial")
"""Ways to rotate that models compute by themselves."""

_POSITIVE = (
    "rope_theta", "factor", "attention_factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "short_factor", "long_factor",
)  # fmt: skip


def max_len_of(config: Any) -> int | None:
    """The most tokens a model's configuration speaks of; None where it does not."""
    text_config = config.get_text_config()
    lengths = (getattr(text_config, name, None) for name in _LENGTHS)
    return next((int(length) for length in lengths if isinstance(length, int) and length > 0), None)


def max_len(folder: Path, config: Any) -> int:
    """The most tokens of a sequence, by the model's configuration, or a default with a word in the log."""
    if length := max_len_of(config):
        return length
    _log.warning(
        "%s: config.json does not say how many tokens the model was trained on; %d are served", folder, _DEFAULT_MAX_LEN
    )
    return _DEFAULT_MAX_LEN


def refuse_lengths(path: Path, raw: Mapping[str, Any]) -> None:
    """Raises ModelLoadError for a number of positions that config.json, or its part of the text, cannot mean."""
    for part in (raw, *(raw.get(name) for name in _TEXT_PARTS)):
        for name in _LENGTHS:
            length = part.get(name) if isinstance(part, Mapping) else None
            if length is not None and (type(length) is not int or not MIN_POSITIONS <= length <= MAX_POSITIONS):
                raise ModelLoadError(
                    f"model: {path}: {name} is {_short(length)}; it must be a whole number from {MIN_POSITIONS} to "
                    f"{MAX_POSITIONS}."
                )


def refuse_rotations(path: Path, config: Any) -> None:
    """Raises ModelLoadError for rotations of a type that is not known, or by numbers that are not positive."""
    for rotation in _rotations(getattr(config.get_text_config(), "rope_parameters", None)):
        kind = rotation.get("rope_type", "default")
        if kind not in (*ROPE_INIT_FUNCTIONS, *_UNSCALED):
            raise ModelLoadError(
                f"model: {path}: rope_type {_short(kind)} of its rotations (rope_scaling or rope_parameters) is not "
                f"known to transformers {transformers.__version__}; it knows "
                f"{', '.join((_UNSCALED[0], *ROPE_INIT_FUNCTIONS))}."
            )
        for name in _POSITIVE:
            value = rotation.get(name)
            if value is not None and not (_is_positive(value) or _is_list_of_positives(value)):
                raise ModelLoadError(
                    f"model: {path}: {name} of its rotations is {_short(value)}; it must be a positive number."
                )


def _rotations(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """Of all layers, or of each kind of layers."""
    if not isinstance(parameters, Mapping):
        return
    if inner := [value for value in parameters.values() if isinstance(value, Mapping)]:
        yield from inner
    else:
        yield parameters


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_list_of_positives(value: Any) -> bool:
    """As the factors of each frequency are; whether one number is due is for transformers to say."""
    return isinstance(value, list | tuple) and all(_is_positive(factor) for factor in value)


def _short(value: Any, *, most: int = 40) -> str:
    text = repr(value)
    return text[:most] + "..." if len(text) > most else text
