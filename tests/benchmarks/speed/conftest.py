"""A tiny model as the peers get it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.speed.models import random_model
from benchmarks.speed.setup import Setup


@pytest.fixture
def setup(model_folder: Callable[[str], Path], tmp_path: Path) -> Setup:
    folder = model_folder("llama")
    return Setup(
        model=str(folder), folder=folder, heads_dir=None, heads=(), device="cpu", dtype="bfloat16", threads=3,
        max_batch_size=5, max_len=384, kv_cache_gib=1, gpu_memory_share=0.5, seed=7, peers_dir=tmp_path,
        work=tmp_path / "work",
    )  # fmt: skip


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """Random weights by the shape of a folder with a config and a tokenizer."""
    work = tmp_path_factory.mktemp("work")
    return random_model(str(model_folder("llama")), work, dtype="float32", device="cpu", seed=1)
