"""How log records are written: as text or as one JSON object a line. No content of a request can begin a second record.

Knows nothing of HTTP but a request's id, which the outermost layer puts into `request_id_var`. Enter at `configure`.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]
request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of what moves a cursor, ends a line, turns the direction of writing, is not seen, or cannot be written."""
_TEXT_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """One line for a terminal, whatever a file or a request put into the text."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def printable_json(text: str) -> str:
    """JSON for a terminal, which may have several lines."""
    return "".join(char if char == "\n" or not _is_unseen(char) else json.dumps(char)[1:-1] for char in text)


def printable_text(text: str) -> str:
    """What a model wrote, for a terminal: lines, tabs and marks of direction stay, and nothing moves the cursor."""
    return text.translate(_TEXT_ESCAPES)


def _is_unseen(char: str) -> bool:
    return unicodedata.category(char) in _UNSEEN


def _escaped(char: str) -> str:
    return f"\\x{ord(char):02x}" if _is_unseen(char) else char


def configure(log_format: LogFormat, level: str) -> None:
    """Write all records to stderr in the given format, uvicorn's too when it is run with `log_config=None`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class TextFormatter(logging.Formatter):
    """Control characters are escaped, and a traceback's lines stand behind a bar, where they pass for no record.

    A record of a request ends with its id, as its access line has it.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = printable(f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}")
        if not hasattr(record, "fields") and (request_id := request_id_var.get()):
            line += f" request_id={json.dumps(request_id)}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line += "".join(f"\n  | {printable(part)}" for part in trace)
        return line


class JsonFormatter(logging.Formatter):
    """`extra={"fields": {...}}` puts fields into the object in place of the message that repeats them."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        if fields is None:
            entry["message"] = record.getMessage()
            if request_id := request_id_var.get():
                entry["request_id"] = request_id
        else:
            entry |= fields
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
