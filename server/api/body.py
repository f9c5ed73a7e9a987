"""A body in JSON whose fields are each given once.

Of a field that is given twice readers take one or the other, so what a gateway looked at could be another value than
the one that is served. Enter at `JsonRoute`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from server.errors import InvalidRequestError
from server.unicode import beginning


class JsonRoute(APIRoute):
    """A route that refuses a body in which an object has a name twice, at any depth."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_checked(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_checked


class _JsonRequest(Request):
    async def json(self) -> Any:
        """Raises JSONDecodeError, and an HTTPException whose detail is an InvalidRequestError."""
        try:
            return json.loads(await self.body(), object_pairs_hook=_members)
        except InvalidRequestError as error:
            # FastAPI lets no other kind of error pass.
            raise HTTPException(error.status, detail=error) from error


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        name = beginning(twice)
        raise InvalidRequestError(f"{name}: the body has this field twice", param=name)
    return members
