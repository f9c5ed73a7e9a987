"""Where this program keeps what it could make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_root() -> Path:
    """The user's cache folder, or what RECONTROL_CACHE_DIR names; it need not exist."""
    return Path(os.environ.get("RECONTROL_CACHE_DIR") or user_cache_path("recontrol"))
