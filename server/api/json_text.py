"""JSON of any size, written in pieces: the encoder of Python holds its lock for as long as one call takes.

Enter at `json_bytes`, or at `json_text` for what is small.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_MOST_ITEMS = 64
"""Of a list that are written at once: a token's log-probabilities are two thousand characters each at most."""
_MOST_DEPTH = 6
"""Below it nothing grows with what a caller asks for."""


def json_bytes(value: Any) -> bytes:
    """A value as `json_text` has it, in UTF-8. Raises ValueError for NaN and infinity."""
    return b"".join(piece.encode() for piece in json_pieces(value))


def json_pieces(value: Any, depth: int = 0) -> Iterator[str]:
    """The same in parts, none of which takes more than some milliseconds."""
    if isinstance(value, dict) and depth < _MOST_DEPTH:
        before = "{"
        for name, item in value.items():
            yield f"{before}{json_text(name)}:"
            yield from json_pieces(item, depth + 1)
            before = ","
        yield "}" if value else "{}"
    elif isinstance(value, list) and depth < _MOST_DEPTH and len(value) > _MOST_ITEMS and not _are_large(value, depth):
        for start in range(0, len(value), _MOST_ITEMS):
            yield ("," if start else "[") + json_text(value[start : start + _MOST_ITEMS])[1:-1]
        yield "]"
    elif isinstance(value, list) and depth < _MOST_DEPTH:
        for index, item in enumerate(value):
            yield "," if index else "["
            yield from json_pieces(item, depth + 1)
        yield "]" if value else "[]"
    else:
        yield json_text(value)


def _are_large(items: list[Any], depth: int) -> bool:
    """Whether they may be an answer's choices, each as large as a whole answer."""
    return depth < 2 and isinstance(items[0], dict)


def json_text(value: Any) -> str:
    """A value by one call, without blanks and without escapes. Raises ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
