"""Copies of a tiny model's folder, each changed in one way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


class Folder:
    """A copy of a model's folder to change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "model.safetensors"

    def tensors(self) -> Tensors:
        return load_file(self.weights)

    def write_tensors(self, tensors: Mapping[str, torch.Tensor], file: str = "model.safetensors") -> None:
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(kept, self.path / file, metadata={"format": "pt"})

    def write_json(self, name: str, **values: Any) -> None:
        """Into what the file has; None takes a key away."""
        path = self.path / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({key: value for key, value in {**content, **values}.items() if value is not None}))


@pytest.fixture
def copied(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Folder]:
    def copy(architecture: str = "qwen2", name: str = "copy") -> Folder:
        return Folder(shutil.copytree(model_folder(architecture), tmp_path / name))

    return copy
