"""What all peers have in common in one run: the model, the precision, and the room they are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(slots=True, frozen=True)
class Setup:
    model: str
    """As this project's own server is told: a packaged model's name, a folder or a hub id."""
    folder: Path
    """The same model as a folder of safetensors with its tokenizer, for the others."""
    heads_dir: Path | None
    heads: tuple[str, ...]
    """Names of the heads that controlled arms use, best known first."""
    device: str
    dtype: str
    threads: int
    max_batch_size: int
    max_len: int
    """Prompt and new tokens of one row, rounded up to whole pages of any peer's cache."""
    kv_cache_gib: int
    """Enough for `max_batch_size` rows of `max_len`, for peers that take their cache beforehand."""
    gpu_memory_share: float
    seed: int
    peers_dir: Path
    work: Path

    def load_options(self) -> dict[str, Any]:
        """Of a worker's `load` command."""
        return {
            "model": self.model,
            "folder": str(self.folder),
            "heads_dir": str(self.heads_dir) if self.heads_dir else None,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "max_batch_size": self.max_batch_size,
            "max_len": self.max_len,
            "gpu_memory_share": self.gpu_memory_share,
            "seed": self.seed,
        }
