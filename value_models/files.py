"""Files that this program writes: whole or not at all, and the folder for those that it could make or fetch again.

A file is written into a scratch file beside it, which is then renamed. Enter at `write_whole`, `write_bytes`,
`write_text` and `cache_root`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path

SCRATCH_SUFFIX = ".part"
"""What a killed process may leave behind ends in this."""


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a scratch file, and put that in the place of `path`, whose folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SCRATCH_SUFFIX, dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        write(scratch)
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        # A scratch file is its maker's alone; the result is for whoever may read the folder.
        scratch.chmod(0o644)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    write_whole(path, lambda scratch: _write(scratch, data))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def cache_root() -> Path:
    """The user's cache folder, or what RECONTROL_CACHE_DIR names; it need not exist."""
    return Path(os.environ.get("RECONTROL_CACHE_DIR") or user_cache_path("recontrol"))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
