"""GET /v1/models and /v1/heads: what can be asked for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.api.resolution import head_of_model, model_ids
from server.control.params import ControlParams
from server.engines.base import Engine, EngineInfo
from server.errors import UnknownHeadError, UnknownModelError

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The base model, and one id for each head's default objective."""
    info = _info(request)
    return {"object": "list", "data": [_model(name, info) for name in model_ids(info)]}


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> dict[str, Any]:
    info = _info(request)
    if model_id not in model_ids(info):
        raise UnknownModelError(model_id, model_ids(info))
    return _model(model_id, info)


@router.get("/v1/heads")
async def list_heads(request: Request) -> dict[str, Any]:
    """Every value head with its card, and warnings where it was made for another model; and the names of the rewards
    that a search may go by."""
    info = _info(request)
    data = [_head(request, name) for name in info.heads]
    return {"object": "list", "data": data, "search_rewards": list(info.search_rewards)}


@router.get("/v1/heads/{name}")
async def get_head(request: Request, name: str) -> dict[str, Any]:
    heads = _info(request).heads
    if name not in heads:
        raise UnknownHeadError(name, heads)
    return _head(request, name)


def warned(info: EngineInfo, head: str | None) -> dict[str, list[str]]:
    """A head's `warnings`, only where there are any."""
    warnings = [] if head is None else info.warnings([head])
    return {"warnings": warnings} if warnings else {}


def _head(request: Request, name: str) -> dict[str, Any]:
    pinned: ControlParams | None = request.app.state.pinned
    is_pinned = pinned is not None and name in pinned.head_names
    info = _info(request)
    return {"id": name, "object": "value_head", "is_pinned": is_pinned, **info.heads[name], **warned(info, name)}


def _info(request: Request) -> EngineInfo:
    engine: Engine = request.app.state.engine
    return engine.info


def _model(name: str, info: EngineInfo) -> dict[str, Any]:
    model = {"id": name, "object": "model", "created": 0, "owned_by": "recontrol", "max_model_len": info.max_model_len}
    if name == info.model_id:
        return model
    return {**model, "parent": info.model_id, **warned(info, head_of_model(name, info))}
