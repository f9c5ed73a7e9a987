"""What a converted model was when it was written: sizes and digests of its files, in a file beside them.

They tell of damage and of changes by hand, and not of whoever may write there and could change them as well (trust.py).
A file is read again only where its size or time is not as it was, so that a start costs nothing. Enter at
`write_manifest` and `check_manifest`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from server.errors import ModelLoadError

MANIFEST = "manifest.json"
CONVERSION_VERSION = 2
"""Of how models are converted; another number makes them anew."""


def write_manifest(folder: Path) -> None:
    """Of all that lies in the folder, which is not changed any more."""
    files = {file.name: {**_facts(file), "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")


def check_manifest(folder: Path) -> None:
    """Raises ModelLoadError where the folder is not what was written, by name of the file.

    One without a manifest is of an earlier version, which wrote none, and is taken as it is.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    try:
        written: dict[str, dict[str, Any]] = json.loads(manifest.read_text())["files"]
        present = {file.name for file in folder.iterdir()} - {MANIFEST}
        for name in sorted(written.keys() ^ present):
            raise _changed(folder, name, "is gone" if name in written else "was not converted")
        for name, facts in written.items():
            if _facts(folder / name) != {key: facts[key] for key in ("size", "mtime_s")}:
                _check_digest(folder / name, facts["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _changed(folder, MANIFEST, f"cannot be read ({type(error).__name__})") from error


def _check_digest(file: Path, sha256: str) -> None:
    if _sha256(file) != sha256:
        raise _changed(file.parent, file.name, "is not as it was converted")


def _changed(folder: Path, name: str, what: str) -> ModelLoadError:
    return ModelLoadError(f"model: {folder / name} {what}. Remove {folder}, so that the model is converted anew.")


def _facts(file: Path) -> dict[str, int]:
    facts = file.stat()
    # Layers of images keep whole seconds.
    return {"size": facts.st_size, "mtime_s": int(facts.st_mtime)}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
