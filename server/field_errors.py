"""How a validator says which field of a body is wrong, and how. Enter at `field_error`."""

from __future__ import annotations

from typing import LiteralString

from pydantic_core import PydanticCustomError

WRONG = "field"
REFUSED = "unsupported_field"
"""The field is OpenAI's or vLLM's, and not served here."""
UNKNOWN = "unknown_field"
KINDS = (WRONG, REFUSED, UNKNOWN)


def field_error(name: str, reason: str, kind: LiteralString = WRONG) -> PydanticCustomError:
    """The error that is answered as `NAME: REASON`, for a validator to raise.

    `name` is that of the field within what is validated; where this is a part of the body, the answer's name begins
    with the part's. `kind` is one of KINDS.
    """
    return PydanticCustomError(kind, "{name}: {reason}", {"name": name, "reason": reason})
