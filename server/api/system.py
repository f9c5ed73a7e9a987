"""GET /health (does the loop run?), /ready (may requests be sent?), /version, /metrics and /openapi.json."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from server.engines.base import Engine
from server.telemetry import Telemetry

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the engine's loop runs, else 503."""
    engine: Engine = request.app.state.engine
    is_running = engine.status().is_running
    return JSONResponse({"status": "ok" if is_running else "engine is not running"}, 200 if is_running else 503)


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 while requests are taken, 503 once the server drains or when the engine's loop does not run."""
    engine: Engine = request.app.state.engine
    status = "draining" if request.app.state.is_draining else "ok"
    if not engine.status().is_running:
        status = "engine is not running"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


@router.get("/version")
async def get_version() -> dict[str, str]:
    return {"version": version("recontrol")}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus exposition text."""
    telemetry: Telemetry = request.app.state.telemetry
    return Response(telemetry.render(), media_type=telemetry.content_type)


@router.get("/openapi.json", include_in_schema=False)
async def document(request: Request) -> JSONResponse:
    """The API's description. It is made when it is first asked for, in a thread, since it takes half a second."""
    return JSONResponse(await asyncio.to_thread(request.app.openapi))
