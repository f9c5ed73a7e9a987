"""JSON and text files of a model folder, and files that only stand in for another. Enter at `read_object`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from server.errors import ModelLoadError

_POINTERS = {b"version https://git-lfs": "Git LFS (`git lfs pull` fetches it)", b"/annex/objects/": "git-annex"}
POINTER_BYTES = 200
"""Of a file's beginning are enough to know a pointer by."""


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelLoadError, naming the file, when there is none in it."""
    refuse_dangling(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"model: {path} cannot be read ({error.strerror}).") from error
    refuse_pointer(path, content[:POINTER_BYTES])
    if not content.strip():
        raise ModelLoadError(f"model: {path} is empty; it must hold a JSON object. Copy it again.")
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"model: {path} is not valid JSON in UTF-8 ({error}). Copy it again.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"model: {path} holds a JSON {type(value).__name__}; it must hold an object.")
    return value


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """Raises ModelLoadError when a file's first bytes say that its content is elsewhere."""
    for mark, keeper in _POINTERS.items():
        if beginning.lstrip().startswith(mark):
            raise ModelLoadError(f"model: {path} is only a pointer to the file, which is kept by {keeper}.")


def refuse_dangling(path: Path) -> None:
    """Raises ModelLoadError for a link that leads nowhere, which otherwise looks as if there were no such file."""
    if os.path.lexists(path) and not path.exists():
        raise ModelLoadError(f"model: {path} is a link to a file that is not there. Copy the file itself.")


def refuse_stand_in(path: Path) -> None:
    """Raises ModelLoadError for a link to nowhere, a pointer, or what is there and is no file."""
    refuse_dangling(path)
    if not path.exists():
        return
    try:
        with path.open("rb") as opened:
            refuse_pointer(path, opened.read(POINTER_BYTES))
    except OSError as error:
        raise ModelLoadError(f"model: {path} cannot be read ({error.strerror}).") from error


def listed(names: list[str], *, most: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
