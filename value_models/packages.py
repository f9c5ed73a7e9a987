"""Packages that training and evaluation use and serving does not need: found, or missed with what to install.

Enter at `library` (to import) and `package_folder` (to read its files, without running it).
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from value_models.errors import MissingPackageError

_EXTRA = "recontrol[train]"


def library(name: str) -> Any:
    """A module of the `train` extra. Raises MissingPackageError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(name.partition(".")[0], _EXTRA) from error


def package_folder(name: str, to_install: str = _EXTRA) -> Path:
    """Where a package lies. Raises MissingPackageError."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise MissingPackageError(name, to_install)
    return Path(spec.origin).parent
