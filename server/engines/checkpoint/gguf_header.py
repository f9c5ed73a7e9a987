"""What a GGUF file says of itself before its tensors: metadata and where each tensor lies. No values are read.

Strings in lists (the vocabulary, merges) are left as their number: nothing here needs them. Enter at `read_header`.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from server.engines.checkpoint.json_files import POINTER_BYTES, refuse_pointer
from server.errors import ModelLoadError
from server.unicode import beginning

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _LIST = 8, 9


@dataclass(slots=True, frozen=True)
class GgufTensor:
    """A tensor of the file. `shape` is torch's, slowest first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    """From the beginning of the tensors' part."""
    num_bytes: int


@dataclass(slots=True, frozen=True)
class GgufHeader:
    """A file's metadata by its keys, and its tensors."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def is_not(self, key: str, wanted: str) -> ModelLoadError:
        """The error for a key whose value is something else."""
        return ModelLoadError(f"model: {self.path}: {key} is {told(self.metadata.get(key))}; it must be {wanted}.")


def told(value: Any) -> str:
    """The beginning of what a file says, which may be of any length."""
    return beginning(repr(value))


def is_gguf(path: Path) -> bool:
    """Whether a file is one, whatever its name: Ollama's have none."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> GgufHeader:
    """Raises ModelLoadError when the file is not a whole GGUF of this machine's kind."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            refuse_pointer(path, file.read(POINTER_BYTES))
            if size < 24:
                raise ModelLoadError(f"model: {path} is not a GGUF file: it has {size} bytes.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).header(size)
    except OSError as error:
        raise ModelLoadError(f"model: {path} cannot be read ({os.strerror(error.errno or 0)}).") from error
    except (struct.error, ValueError, IndexError, OverflowError, MemoryError, KeyError) as error:
        raise ModelLoadError(f"model: {path} is cut or damaged: its metadata cannot be read. Copy it again.") from error


class _Reader:
    """Goes through the bytes once."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._at = 4

    def header(self, size: int) -> GgufHeader:
        if self._content[:4] != MAGIC:
            raise ModelLoadError(f"model: {self._path} is not a GGUF file.")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise ModelLoadError(
                f"model: {self._path} is GGUF of version {version}, or of the other byte order. Versions 2 and 3 are "
                "read."
            )
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        metadata = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._number("<I"))
        tensors = tuple(self._tensor() for _ in range(num_tensors))
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment <= 0:
            raise ValueError("no alignment")
        begin = -(-self._at // alignment) * alignment
        ends = [begin + tensor.start + tensor.num_bytes for tensor in tensors]
        whole = max(ends, default=self._at)
        if size < whole:
            raise ModelLoadError(
                f"model: {self._path} is cut: it has {size} bytes and should have {whole}. Copy it again."
            )
        return GgufHeader(self._path, metadata, tensors)

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._content, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._number("<Q")
        if self._at + length > len(self._content):
            raise ValueError("a string beyond the end")
        text = self._content[self._at : self._at + length].decode("utf-8", errors="replace")
        self._at += length
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _LIST:
            return self._number(_FORMATS[kind])
        kind, count = self._number("<I"), self._number("<Q")
        if kind != _STRING:
            form = _FORMATS[kind]
            values = struct.unpack_from(f"<{count}{form[1]}", self._content, self._at)
            self._at += count * struct.calcsize(form)
            return list(values)
        for _ in range(count):
            length = self._number("<Q")
            self._at += length
        return count

    def _tensor(self) -> GgufTensor:
        name = self._string()
        shape = tuple(reversed([self._number("<Q") for _ in range(self._number("<I"))]))
        number, start = self._number("<I"), self._number("<Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise ModelLoadError(
                f"model: {self._path} holds {name} in a quantization of number {number}, which is not known here."
            ) from error
        values, bytes_of_values = GGML_QUANT_SIZES[kind]
        count = 1
        for length in shape:
            count *= length
        return GgufTensor(name, shape, kind, start, count // values * bytes_of_values)
