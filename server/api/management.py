"""POST /v1/management/heads/...: load, reload and unload value heads while the server runs.

The router is only there when a management key is set, and the gate asks for that key; a name is one of a folder below
the heads' folder, never a path. Enter at `router`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from server.api.gate.auth import MANAGEMENT_PREFIX
from server.api.gate.context import context_of
from server.api.models import warned
from server.control.params import ControlParams
from server.engines.base import Engine
from server.errors import AuthenticationError, HeadConflictError, HeadMismatchError, UnknownHeadError
from server.telemetry import Telemetry


def require_manager(request: Request) -> None:
    """The gate has seen to it; a path that got past it some other way ends here."""
    if not context_of(request).is_manager:
        raise AuthenticationError("This path needs a management key.")


router = APIRouter(prefix=f"{MANAGEMENT_PREFIX}heads", dependencies=[Depends(require_manager)])


@router.post("/{name}/load")
async def load_head(request: Request, name: str) -> dict[str, Any]:
    """Offer a head that lies in the heads' folder and is not loaded yet."""
    engine: Engine = request.app.state.engine
    if name in engine.info.heads:
        raise HeadConflictError(f"The value head {name!r} is loaded already; reload reads it anew.")
    return await _load(request, name)


@router.post("/{name}/reload")
async def reload_head(request: Request, name: str) -> dict[str, Any]:
    """Read a loaded head's files anew; requests that run under it go on with the new one."""
    _check_loaded(request, name)
    return await _load(request, name)


@router.post("/{name}/unload")
async def unload_head(request: Request, name: str) -> dict[str, Any]:
    """Offer a head no more; the answer comes when the last request that runs under it has ended."""
    _check_loaded(request, name)
    pinned: ControlParams | None = request.app.state.pinned
    if pinned is not None and name in pinned.head_names:
        raise HeadConflictError(f"The value head {name!r} is pinned by the server's settings.")
    engine: Engine = request.app.state.engine
    await engine.unload_head(name)
    return _heads(request)


async def _load(request: Request, name: str) -> dict[str, Any]:
    engine: Engine = request.app.state.engine
    telemetry: Telemetry = request.app.state.telemetry
    try:
        await engine.load_head(name)
    except HeadMismatchError as error:
        raise HeadConflictError(error.message) from error
    telemetry.bind_heads(engine.info.heads)
    return _heads(request)


def _check_loaded(request: Request, name: str) -> None:
    engine: Engine = request.app.state.engine
    if name not in engine.info.heads:
        raise UnknownHeadError(name, engine.info.heads)


def _heads(request: Request) -> dict[str, Any]:
    engine: Engine = request.app.state.engine
    info = engine.info
    data = [{"id": name, "object": "value_head", **warned(info, name)} for name in info.heads]
    return {"object": "list", "data": data}
