"""Events as bytes."""

from __future__ import annotations

import json

from server.api.sse import _event


def test_an_event_is_one_line_for_whoever_cuts_lines_as_python_does() -> None:
    """httpx does, and so do clients that are built on it; a model draws such characters now and then."""
    data = {"text": "".join(map(chr, [*range(0x20), 0x7F, 0x85, 0xA0, 0x2028, 0x2029, 0x1F600]))}
    line, empty = _event(data).decode().splitlines()
    assert not empty
    assert json.loads(line.removeprefix("data: ")) == data
