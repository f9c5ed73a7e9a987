"""The files of a run: for each block of prompts one of tensors and one of lines, which comes last.

Lines are read whole; tensors are mapped, so that of a shard only what is asked for comes into memory. Knows nothing of
what a run is of. Enter at `read_rows` and `map_tensors`.

Shapes: N tokens of a shard's responses one after the other, B responses, D hidden size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType] (a PathLike of what)
from torch import Tensor

from value_models.errors import RolloutError
from value_models.token_blocks import are_ordered

TENSORS = ("states_ND", "logp_grads_ND", "token_ids_N")
SAMPLED = "sampled_grads_ND"


def shard_path(folder: Path, index: int, suffix: str) -> Path:
    return folder / f"shard-{index:05d}{suffix}"


@dataclass(slots=True, frozen=True)
class ShardTensors:
    """Response i has the tokens offsets[i] to offsets[i + 1]."""

    by_name: dict[str, Tensor]
    """`states_ND`, `logp_grads_ND`, `token_ids_N`, and of given texts `sampled_grads_ND`."""
    offsets: Tensor


def read_rows(folder: Path, index: int, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """One line a response, each with these fields at least. Raises RolloutError."""
    path = shard_path(folder, index, ".jsonl")
    try:
        # Not splitlines(): it also cuts at U+2028 and the like, which JSON allows inside a string.
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, ValueError) as error:
        raise damaged(folder, index, error) from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise damaged(folder, index, f"line {number}: {error}") from error
        if not isinstance(row, dict):
            raise damaged(folder, index, f"line {number} is no object")
        row = cast("dict[str, Any]", row)
        missing = [name for name in fields if name not in row]
        if missing:
            raise damaged(folder, index, f"line {number} lacks {missing[0]}")
        rows.append(row)
    return rows


def map_tensors(folder: Path, index: int, *, is_given: bool) -> ShardTensors:
    """A shard's tensors, backed by its file. Raises RolloutError."""
    names = (*TENSORS, SAMPLED) if is_given else TENSORS
    try:
        read = load_file(shard_path(folder, index, ".safetensors"))
        tensors, offsets = {name: read[name] for name in names}, read["offsets"]
        lengths = {len(tensor) for tensor in tensors.values()}
        if not are_ordered([int(offset) for offset in offsets.unbind()]) or lengths != {int(offsets[-1])}:
            raise ValueError("its offsets do not fit its tensors")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, index, error) from error
    return ShardTensors(tensors, offsets)


def damaged(folder: Path, index: int, why: object) -> RolloutError:
    """What a shard that cannot be used is told by."""
    tensors, rows = shard_path(folder, index, ".safetensors"), shard_path(folder, index, ".jsonl")
    return RolloutError(
        f"{tensors} or {rows.name} beside it is damaged ({why}); delete both, and the command that made them makes "
        "them anew"
    )
