"""A folder of value heads, on this machine or, as a URL (`s3://bucket/heads`), in an object store by way of fsspec.

Either way a head is what its card says: its tensors are read whole and their SHA-256 is compared with the card's, so a
head that is half written, or whose two files are not of one make, is refused. Tensors from a store are kept in a cache
by that digest; cards are always read anew. Names come from requests, locations only from whoever runs the server. Enter
at `open_heads`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from value_models.errors import HeadFileError
from value_models.files import cache_root, write_bytes
from value_models.heads import ValueHead
from value_models.store import (
    CARD_FILE,
    HEAD_FILE,
    NAME_PATTERN,
    HeadCard,
    check_size,
    head_from_bytes,
    parse_card,
    read_file,
)

_log = logging.getLogger(__name__)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:_-]*://")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class HeadFolder(ABC):
    """Heads by name. Every method raises HeadFileError, whose message says where and what to do."""

    def __init__(self, location: str) -> None:
        self.location = location

    @abstractmethod
    def names(self) -> list[str]:
        """The names of the heads that have a card, in order."""

    def card(self, name: str) -> HeadCard:
        """A head's card; the folder must have the name that the card has."""
        where = f"{self.location}/{name}/{CARD_FILE}"
        card = parse_card(self._read(self._checked(name), CARD_FILE), where)
        if card.name != name:
            raise HeadFileError(f"{where}: {name!r} names its head {card.name!r}; the folder must have that name")
        return card

    def load(self, name: str, *, device: torch.device | str = "cpu") -> tuple[ValueHead, HeadCard]:
        """A head whose tensors are those that its card was written for."""
        card = self.card(name)
        where = f"{self.location}/{name}/{HEAD_FILE}"
        return head_from_bytes(self._tensors(name, card), card, where, device=device), card

    def publish(self, name: str, source: HeadFolder) -> None:
        """Copy a head that can be loaded. The card goes last: until it is there, readers keep the head they have."""
        _, card = source.load(name)
        tensors = source._tensors(name, card)
        self._write(self._checked(name), HEAD_FILE, tensors)
        self._write(name, CARD_FILE, source._read(name, CARD_FILE))

    def _tensors(self, name: str, card: HeadCard) -> bytes:
        del card
        return self._read(name, HEAD_FILE)

    @abstractmethod
    def _read(self, name: str, file: str) -> bytes: ...

    @abstractmethod
    def _write(self, name: str, file: str, data: bytes) -> None: ...

    def _checked(self, name: str) -> str:
        if not re.fullmatch(NAME_PATTERN, name):
            raise HeadFileError(f"{name[:64]!r} is no name of a head")
        return name


class LocalHeads(HeadFolder):
    """A folder of this machine, or one that is mounted on it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder

    def names(self) -> list[str]:
        if not self._folder.is_dir():
            raise HeadFileError(f"{self._folder} is not a folder")
        return sorted(path.parent.name for path in self._folder.glob(f"*/{CARD_FILE}"))

    def _read(self, name: str, file: str) -> bytes:
        path = self._folder / name / file
        try:
            return read_file(path)
        except OSError as error:
            raise HeadFileError(f"{path} cannot be read: {error.strerror}") from error

    def _write(self, name: str, file: str, data: bytes) -> None:
        path = self._folder / name / file
        try:
            write_bytes(path, data)
        except OSError as error:
            raise HeadFileError(f"{path} cannot be written: {error.strerror}") from error


class StoredHeads(HeadFolder):
    """What fsspec reaches by a URL. Credentials and endpoints are its backends' own: environment variables, files."""

    def __init__(self, url: str, cache: Path) -> None:
        """Open a store. Raises HeadFileError for an unknown kind of store, or one whose package is not installed."""
        super().__init__(url.rstrip("/"))
        self._cache = cache
        try:
            # Imported so because it has no types, and here because only those who name a URL need it.
            fsspec_core = importlib.import_module("fsspec.core")
            filesystem, root = fsspec_core.url_to_fs(url)
        except Exception as error:
            raise HeadFileError(
                f"{url} cannot be opened: {error} (S3 needs `pip install 'recontrol[object-store]'`, other stores "
                "their own fsspec package)"
            ) from error
        self._filesystem: Any = filesystem
        self._root: str = root.rstrip("/")

    def names(self) -> list[str]:
        with self._named_in_errors("listed", self.location):
            self._filesystem.invalidate_cache()
            paths = self._filesystem.glob(f"{self._root}/*/{CARD_FILE}")
            if not paths and not self._filesystem.exists(self._root):
                raise FileNotFoundError("there is nothing")
        return sorted(path.split("/")[-2] for path in paths)

    def _tensors(self, name: str, card: HeadCard) -> bytes:
        """Read them from the cache, or from the store, and keep them in the cache if they are the card's."""
        digest = card.tensors_sha256
        if not _DIGEST.fullmatch(digest):
            raise HeadFileError(f"{self.location}/{name}/{CARD_FILE} has no SHA-256 of the tensors")
        path = self._cache / f"{digest}.safetensors"
        with contextlib.suppress(OSError):
            # What has been damaged on this machine is fetched again.
            if _sha256(data := path.read_bytes()) == digest:
                return data
        data = self._read(name, HEAD_FILE)
        if _sha256(data) == digest:
            try:
                write_bytes(path, data)
            except OSError as error:
                _log.warning("The head %r is not cached: %s", name, error)
        return data

    def _read(self, name: str, file: str) -> bytes:
        where = f"{self.location}/{name}/{file}"
        with self._named_in_errors("read", where):
            path = f"{self._root}/{name}/{file}"
            size = self._filesystem.size(path)
            if size is not None:
                check_size(size, file, where)
            data = self._filesystem.cat_file(path)
        check_size(len(data), file, where)
        return data

    def _write(self, name: str, file: str, data: bytes) -> None:
        with self._named_in_errors("written", f"{self.location}/{name}/{file}"):
            # Where there are folders, they must be made; elsewhere this does nothing.
            self._filesystem.makedirs(f"{self._root}/{name}", exist_ok=True)
            self._filesystem.pipe_file(f"{self._root}/{name}/{file}", data)

    @contextlib.contextmanager
    def _named_in_errors(self, done: str, where: str) -> Generator[None]:
        """Every store has errors of its own, and none may get past those who expect HeadFileError."""
        try:
            yield
        except HeadFileError:
            raise
        except Exception as error:
            raise HeadFileError(f"{where} cannot be {done}: {type(error).__name__}: {error}") from error


def open_heads(location: str | Path) -> HeadFolder:
    """The folder or store at a path or URL; nothing is read yet. Raises HeadFileError."""
    return StoredHeads(str(location), cache_root() / "heads") if is_url(location) else LocalHeads(Path(location))


def is_url(location: str | Path) -> bool:
    return isinstance(location, str) and bool(_URL.match(location))


def absolute(location: str | Path) -> str:
    """The same place for processes that work in other folders."""
    return str(location) if is_url(location) else str(Path(location).resolve())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
