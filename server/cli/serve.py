"""`recontrol serve`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import math
import os
import signal
import socket

from pydantic import Field

from server.app import check_pinned, create_app
from server.cli import address
from server.cli.connection import ConnectionLimits
from server.cli.http import DrainingServer
from server.engines import create_engine
from server.engines.selection import choose, resolved
from server.environment import service_links
from server.errors import ConfigurationError
from server.logs import configure
from server.machine import memory_limit_bytes
from server.settings import Settings
from server.telemetry import Telemetry

_log = logging.getLogger(__name__)


class Serve(Settings):
    """Serve the OpenAI-compatible API."""

    print_config: bool = Field(False, description="print the settings as JSON and exit")

    def cli_cmd(self) -> None:
        settings = Settings.model_construct(**self.model_dump(exclude={"print_config"}))
        if self.print_config:
            print(json.dumps({**settings.model_dump(mode="json"), **_resolved(settings)}, indent=2))
            return
        configure(self.log_format, self.log_level)
        if links := service_links(os.environ):
            _log.warning(
                "Ignored, since Kubernetes makes them of a Service: %s. With `enableServiceLinks: false` it does not",
                ", ".join(links),
            )
        if self.engine != "fake":
            # Not needed for --print-config, and slow to import.
            from transformers.utils.logging import disable_progress_bar

            # A bar is no record; and one that cannot be written, on a full disk, hangs in its own end for ever.
            disable_progress_bar()
        if settings.search_rewards:
            from server.cli.command import allow_rewards_of_the_working_folder

            allow_rewards_of_the_working_folder()
        # First, so that a port in use is told before a model is loaded.
        with contextlib.ExitStack() as held:
            sockets = [held.enter_context(bound) for bound in address.bind(self.host, self.port)]
            if not settings.has_keys and not settings.binds_loopback:
                _log.warning(
                    "Without keys on %s: whoever reaches port %d may use this server. Set api_keys or api_keys_file, "
                    "unless something in front of it keeps strangers out",
                    self.host, self.port,
                )  # fmt: skip
            asyncio.run(_serve(settings, sockets))


def _resolved(settings: Settings) -> dict[str, str]:
    """What settings that are left to the machine come to on this one, as far as that is known without the model."""
    shown, engine = {}, settings.engine
    if engine == "auto":
        chosen = choose(settings)
        shown["engine"], engine = f"auto: {chosen}", chosen.name
    if settings.kv_cache_gib is None and engine == "embedded":
        shown["kv_cache_gib"] = f"auto: at most {_most_kv_cache(settings)}"
    return shown


def _most_kv_cache(settings: Settings) -> str:
    if settings.device == "cuda" or (settings.device == "auto" and _has_cuda()):
        return "nine tenths of what the GPU has free"
    limit_gib = memory_limit_bytes() / 2**30
    return f"{limit_gib / 2:.2f} GiB, half of the {limit_gib:.2f} GiB that this process may have"


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


async def _serve(settings: Settings, sockets: list[socket.socket]) -> None:
    settings = resolved(settings)
    telemetry = Telemetry(vllm_names=settings.vllm_metrics)
    engine = create_engine(settings, observer=telemetry)
    app = create_app(settings, engine, telemetry)
    # Before uvicorn, so that a model or head that cannot be served is one line and not a traceback.
    await engine.start()
    try:
        check_pinned(app)
        address.listen(sockets, settings.host)
    except ConfigurationError:
        await engine.stop()
        raise
    server = DrainingServer(
        app, _connection_limits(settings), grace_s=settings.shutdown_grace_s, log_level=settings.log_level
    )
    _keep_what_stays()
    # uvicorn raises it anew when the server has ended, which then ends as any process does that was told to.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    await server.serve(sockets)


def _keep_what_stays() -> None:
    """Python's garbage collector looks at every object now and then, and holds up all threads meanwhile: a third of a
    second for the libraries, the model and the tokenizer. These are here to stay, so it need not look at them again."""
    gc.collect()
    gc.freeze()


def _connection_limits(settings: Settings) -> ConnectionLimits:
    """A client has no longer to read a response than that may take."""
    longest_s = settings.request_timeout_s or math.inf
    return ConnectionLimits(
        receive_timeout_s=settings.receive_timeout_s,
        send_timeout_s=min(settings.send_timeout_s, longest_s),
        keep_alive_s=settings.keep_alive_s,
        max_connections=settings.max_connections,
        trusted_proxies=settings.trusted_proxies,
        response_timeout_s=longest_s,
    )
