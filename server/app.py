"""The application: settings, engine, telemetry and routes put together. Enter at `create_app`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server.api import chat, completions, handlers, models, system
from server.api.schemas import ErrorBody
from server.engines import create_engine
from server.engines.base import Engine
from server.settings import Settings
from server.telemetry import Telemetry


def create_app(settings: Settings, engine: Engine | None = None, telemetry: Telemetry | None = None) -> FastAPI:
    """An ASGI app whose lifespan starts and stops the engine; by default the one that the settings name.

    An engine that is passed in reports to whatever observer it was given, usually the same `telemetry`.
    """
    telemetry = telemetry or Telemetry()
    engine = engine or create_engine(settings, observer=telemetry)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        await engine.start()
        telemetry.bind(engine.info.model_id, engine.info.heads)
        try:
            yield
        finally:
            await engine.stop()

    # The interactive docs load scripts from other hosts; /openapi.json stays.
    # A redirect would be built from the Host header, so a path with a slash too many is a 404.
    app = FastAPI(title="recontrol", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.engine = engine
    app.state.telemetry = telemetry
    handlers.install(app, max_body_bytes=settings.max_body_bytes)
    for module in (completions, chat, models, system):
        app.include_router(module.router, responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}})
    return app
