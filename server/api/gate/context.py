"""What is known of one request beside its body: its id, its caller, and what its access line will say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.types import Scope

from server.api.gate.limits import Caller, Charge

CLIENT_CLOSED_REQUEST = 499
"""nginx's status, for the log alone: whoever asked has left."""


@dataclass(slots=True)
class RequestContext:
    request_id: str
    caller: Caller | None = None
    """Set once the key is known."""
    is_manager: bool = False
    num_body_bytes: int = 0
    """Once the body is there, decoded."""
    reading: Charge | None = None
    """What was paid for the reading of its texts, until their tokens are paid for."""
    may_inspect: bool = False
    """Whether the caller may see what heads could be read from (inspection.py)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Goes into the access line; add plain values that were checked."""


def context_of(source: Request | Scope) -> RequestContext:
    scope = source.scope if isinstance(source, Request) else source
    return scope["state"]["context"]


def request_id_of(request: Request) -> str:
    return context_of(request).request_id
