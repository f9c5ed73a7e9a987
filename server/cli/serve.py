"""`recontrol serve`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

import uvicorn
from pydantic import Field

from server.app import create_app
from server.engines import create_engine
from server.engines.base import Engine
from server.settings import Settings
from server.telemetry import Telemetry

_GRACE_S = 30
_ENDING_S = 1
"""For the last events to reach their clients."""


class Serve(Settings):
    """Serve the OpenAI-compatible API."""

    print_config: bool = Field(False, description="print the settings as JSON and exit")

    def cli_cmd(self) -> None:
        settings = Settings.model_construct(**self.model_dump(exclude={"print_config"}))
        if self.print_config:
            print(settings.model_dump_json(indent=2))
            return
        logging.getLogger().setLevel(self.log_level.upper())
        # uvicorn shuts down cleanly on Ctrl-C and then raises it again.
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    telemetry = Telemetry()
    engine = create_engine(settings, observer=telemetry)
    # Before uvicorn, so that a model or head that cannot be served is one line and not a traceback.
    await engine.start()
    config = uvicorn.Config(
        create_app(settings, engine, telemetry),
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        timeout_graceful_shutdown=_GRACE_S,
    )
    await GracefulServer(config, engine).serve()


class GracefulServer(uvicorn.Server):
    """Ends what still runs shortly before the grace period does, so that every stream gets its last event."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        grace_s = self.config.timeout_graceful_shutdown or 0

        async def stop_engine_in_time() -> None:
            await asyncio.sleep(max(grace_s - _ENDING_S, 0))
            await self._engine.stop()

        ending = asyncio.create_task(stop_engine_in_time())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
