"""Fits that are kept in files: one that is there already is not made again. Enter at `fit_key` and `kept_tensors`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from value_models.files import write_bytes


def fit_key(made_from: Mapping[str, Any]) -> str:
    """Part of a file's or a folder's name that tells what is kept there from what was made from other things, given as
    plain data."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def kept_tensors(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """From a file, or made now and put there."""
    if not path.exists():
        write_bytes(path, save(make()))
    return load(path.read_bytes())
