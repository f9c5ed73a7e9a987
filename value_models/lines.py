"""Records that users bring, in files of JSON lines or parquet or in a request, as numbered objects.

Nothing is guessed: what is no object, repeats a field or holds a number that is not finite is refused with its line.
Knows nothing of what records mean. Enter at `read_records`; `given_records` takes those of a request.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

from value_models.errors import MissingPackageError, TextsFileError

_NO_CHARACTER = "half of a surrogate pair, which is no character"
Record = tuple[int, dict[str, Any]]
"""A line's number, from 1, and its object; in parquet the row's number."""


class Origin(Protocol):
    """Where records come from, in the words of messages about them."""

    @property
    def name(self) -> str:
        """What a head's card calls it."""
        ...

    def __str__(self) -> str: ...

    def item(self, number: int) -> str:
        """A record, where the origin is clear; numbers begin at 1."""
        ...

    def at(self, number: int) -> str:
        """A record with its origin."""
        ...


@dataclass(slots=True, frozen=True)
class FileOrigin:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def __str__(self) -> str:
        return str(self.path)

    def item(self, number: int) -> str:
        return f"line {number}"

    def at(self, number: int) -> str:
        return f"{self.path}, line {number}"


@dataclass(slots=True, frozen=True)
class FieldOrigin:
    """A list in the body of a request; its items are named as fields are, counted from 0."""

    name: str

    def __str__(self) -> str:
        return self.name

    def item(self, number: int) -> str:
        return f"{self.name}.{number - 1}"

    def at(self, number: int) -> str:
        return self.item(number)


def given_records(items: Sequence[object], origin: Origin) -> Iterator[Record]:
    """The items of a list that was JSON, in order. Raises TextsFileError."""
    for number, item in enumerate(items, 1):
        where = origin.at(number)
        record = _as_object(item, where)
        try:
            _check_numbers(record.items())
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise TextsFileError(f"{where}: {_NO_CHARACTER}") from error
        except ValueError as error:
            raise TextsFileError(f"{where}: {error}") from error
        yield number, record


def read_records(path: Path) -> Iterator[Record]:
    """The file's records in order. Raises TextsFileError, MissingPackageError."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        # Not splitlines(): it also cuts at U+2028 and the like, which JSON allows inside a string.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(line, f"{path}, line {number}")
    except OSError as error:
        raise TextsFileError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise TextsFileError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        read: object = json.loads(line, parse_constant=_no_number, object_pairs_hook=_fields)
        json.dumps(read, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise TextsFileError(f"{where}: {_NO_CHARACTER}") from error
    except RecursionError as error:
        raise TextsFileError(f"{where}: nested too deeply") from error
    except ValueError as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise TextsFileError(f"{where}: no JSON object ({reason})") from error
    return _as_object(read, where)


def _as_object(read: object, where: str) -> dict[str, Any]:
    if not isinstance(read, dict):
        raise TextsFileError(f"{where}: a JSON object is needed, with a text in each field")
    return cast("dict[str, Any]", read)


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    _check_numbers(pairs)
    return fields


def _check_numbers(pairs: Iterable[tuple[str, Any]]) -> None:
    for name, value in pairs:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is not a finite number")


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a finite number")


def _parquet(path: Path) -> Iterator[Record]:
    """Rows; a column that is null in a row is a field that the row has not."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingPackageError("pyarrow to read parquet", "'recontrol[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}
    except OSError as error:
        raise TextsFileError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        # What pyarrow says of a file that is damaged or no parquet.
        raise TextsFileError(f"{path} is no parquet file ({error})") from error
