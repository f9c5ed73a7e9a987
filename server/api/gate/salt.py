"""Whose cached prompts a request may use: what is cached for one caller must not tell another, by its timing, what was
asked.

Callers are told apart by their keys, and behind a gateway, which has one key or none for all, by the header in which it
names them. Enter at `CacheSalt`.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from fastapi import Request

from server.api.gate.context import context_of


@dataclass(slots=True, frozen=True)
class CacheSalt:
    header: str | None
    """Set by the gateway, which must not let its callers set it."""
    is_shared: bool
    """Whether requests that nothing tells apart share what is cached."""

    def of(self, request: Request) -> str:
        """Requests of the same salt share. Where the gateway names nobody, a request has one of its own."""
        caller = context_of(request).caller
        key_id = None if caller is None else caller.key_id
        if self.header is None and self.is_shared and key_id is not None:
            return key_id
        named = request.headers.getlist(self.header) if self.header is not None else []
        if not named:
            # Not the request's id, which a client may choose.
            return secrets.token_hex()
        return hashlib.sha256(f"{key_id}\n{','.join(named)}".encode()).hexdigest()
