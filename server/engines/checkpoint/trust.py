"""Whose word a cache of converted models is: nobody's but this user's and root's, who could change the program too.

Digests beside the files say no more of that, since whoever can change them could change those as well; they tell of
damage (manifest.py). Enter at `refuse_strangers`.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from server.errors import ModelLoadError

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_MAY_ENTER = stat.S_IXGRP | stat.S_IXOTH


def own_folder(folder: Path, *, mode: int) -> None:
    """Make a folder for converted models, or keep others from writing into the one that is there.

    Raises ModelLoadError for one that is another user's or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=mode)
        facts = folder.lstat()
        if facts.st_uid == os.getuid() and facts.st_mode & _OTHERS_MAY_WRITE and stat.S_ISDIR(facts.st_mode):
            # An earlier version, or a generous umask, made it so; what lies in it is looked at on its own.
            folder.chmod(stat.S_IMODE(facts.st_mode) & ~_OTHERS_MAY_WRITE)
    except OSError as error:
        raise ModelLoadError(
            f"The cache for converted models cannot be made: {error}. Set RECONTROL_CACHE_DIR."
        ) from error
    _refuse_strangers(folder)


def refuse_strangers(folder: Path) -> None:
    """Raises ModelLoadError for a folder that holds a model, or a file in it, that another user owns or may change."""
    _refuse_strangers(folder)
    if folder.stat().st_mode & _OTHERS_MAY_ENTER:
        for file in folder.iterdir():
            _refuse_strangers(file)


def _refuse_strangers(path: Path) -> None:
    facts = path.lstat()
    if facts.st_uid not in (0, os.getuid()) or stat.S_ISLNK(facts.st_mode) or facts.st_mode & _OTHERS_MAY_WRITE:
        raise ModelLoadError(
            f"{path} is another user's, or others may write there, so the models in it are not trusted. Remove it, or "
            "set RECONTROL_CACHE_DIR."
        )
