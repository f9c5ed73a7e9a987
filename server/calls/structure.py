"""What an engine has to hold a text to, so that its calls are whole and their arguments hold their schemas.

Knows no grammar. Enter at `CallStructure`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.calls.writers import Frame


@dataclass(slots=True, frozen=True)
class CallStructure:
    frame: Frame
    schemas: Mapping[str, str]
    """The JSON schemas of the tools' arguments by name, each of an object."""
    is_forced: bool
    """Whether the text is calls and nothing else; otherwise a call is held once it has begun."""
    max_calls: int
    answer: str | None = None
    """The JSON schema of a text that calls nothing; None leaves it free. Where calls are forced there is none."""
