"""What a client saw of one request."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

BUSY = (429, 503)
"""Statuses that ask a client to come again."""
_DATA, _NAME = "data: ", "event: "


@dataclass(slots=True)
class Seen:
    """Of the last time that it was sent."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    """Of an answer that came whole."""
    events: list[str] = field(default_factory=list)
    """Of a stream: what stands behind each `data: `."""
    names: list[str] = field(default_factory=list)
    """Of a stream whose events have names: what stands behind each `event: `."""
    strays: list[str] = field(default_factory=list)
    """Lines of a stream that are no events."""
    has_left: bool = False
    """The client went before the end, as planned."""
    error: str | None = None
    """The connection broke, or nothing came in time."""
    request_id: str = ""
    """Under which it was sent."""
    retried: Counter[str] = field(default_factory=Counter)
    """Why it had been sent before: `429`, `503`, `timeout`, or `broken` where nothing came of it."""
    unheard: list[str] = field(default_factory=list)
    """Ids under which it was sent before and which the server cannot have seen, since their connections broke."""
    statuses: list[int] = field(default_factory=list)
    """All that it was answered with, this time's included."""

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    def take(self, body: str) -> None:
        """The body of an answer, whole."""
        if not self.is_stream:
            self.body = body
            return
        for line in body.split("\n"):
            self.take_line(line.removesuffix("\r"))

    def take_line(self, line: str) -> None:
        """One of a stream."""
        if line.startswith(_DATA):
            self.events.append(line.removeprefix(_DATA))
        elif line.startswith(_NAME):
            self.names.append(line.removeprefix(_NAME))
        elif line and not line.startswith(":"):
            self.strays.append(line)
