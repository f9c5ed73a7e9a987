"""What only some callers may see: numbers that heads, guardrails included, could be read from.

A linear head is fitted exactly by about as many states and values as a state has numbers, and states follow from the
log-probabilities of a prompt's tokens. So states themselves, and log-probabilities of prompts, need a right of their
own where callers are not the operator. Enter at `check_may_inspect`.
"""

from __future__ import annotations

from fastapi import Request

from server.api.gate.context import context_of
from server.errors import PermissionDeniedError


def check_may_inspect(request: Request, field: str) -> None:
    """Raises PermissionDeniedError, which names the field, for a caller without the right."""
    if not context_of(request).may_inspect:
        raise PermissionDeniedError(
            f"{field}: this server's value heads could be read from it, so it needs a key of --inspect-keys, or a "
            "server with --allow-inspection",
            param=field.partition(" ")[0],
        )
