"""The application: settings, engine, telemetry, gate and routes put together. Enter at `create_app`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from pydantic import SecretStr
from starlette.middleware.cors import CORSMiddleware

from server.api import chat, completions, embeddings, handlers, management, models, playground, system, tokens, value
from server.api.gate.auth import METRICS_PATH, PUBLIC_PATHS, Gatekeeper
from server.api.gate.head import HeadAsGet
from server.api.gate.hosts import ANY, HostGuard
from server.api.gate.identity import REQUEST_ID_HEADER, Identity
from server.api.gate.keys import KeyRing
from server.api.gate.limits import Callers, Limits, LocalRates
from server.api.gate.quota import Quota
from server.api.gate.salt import CacheSalt
from server.api.gate.sizes import BodyLimit, HeaderLimit
from server.api.pinned import check_names
from server.api.responses import route as responses
from server.api.schemas import ErrorBody
from server.api.workers import Workers
from server.control.params import ControlParams
from server.engines import create_engine
from server.engines.base import Engine
from server.engines.selection import resolved
from server.errors import ConfigurationError
from server.settings import PINNED_REFUSES, Settings
from server.telemetry import Telemetry
from server.training.jobs import HeadJobs
from server.watch import HeadWatch

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from server.api.gate.shared_rates import SharedRates


def create_app(settings: Settings, engine: Engine | None = None, telemetry: Telemetry | None = None) -> FastAPI:
    """An ASGI app whose lifespan starts and stops the engine; by default the one that the settings name.

    An engine that is passed in reports to whatever observer it was given, usually the same `telemetry`. Raises
    ConfigurationError for keys or pinned control that cannot be used.
    """
    settings = resolved(settings)
    telemetry = telemetry or Telemetry(vllm_names=settings.vllm_metrics)
    engine = engine or create_engine(settings, observer=telemetry)
    pinned = _pinned_control(settings)
    provider = _trace_provider(settings.otlp_endpoint)
    shared_rates = _shared_rates(settings.rate_limit_storage)
    workers = Workers()
    jobs = HeadJobs(engine, telemetry, pinned=() if pinned is None else tuple(pinned.head_names))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        telemetry.bind(engine.info.model_id, engine.info.heads)
        check_pinned(app)
        if shared_rates is not None:
            await shared_rates.check()
        watch = _start_watch(settings, engine, telemetry)
        jobs.open()
        try:
            yield
        finally:
            if watch is not None:
                watch.cancel()
            await jobs.close()
            await engine.stop()
            if shared_rates is not None:
                await shared_rates.close()
            workers.close()
            if provider is not None:
                await asyncio.to_thread(provider.shutdown)

    # The interactive docs load scripts from other hosts; /openapi.json is our own (system.py).
    # A redirect would be built from the Host header, so a path with a slash too many is a 404.
    app = FastAPI(
        title="recontrol", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.engine, app.state.telemetry = engine, telemetry
    app.state.workers, app.state.jobs = workers, jobs
    app.state.pinned, app.state.pinned_refuses = pinned, settings.pinned_refuses
    app.state.request_timeout_s = settings.request_timeout_s
    app.state.stream_ping_s = settings.stream_ping_s
    app.state.guardrail_finish_reason = settings.guardrail_finish_reason
    app.state.guardrail_replacement = settings.guardrail_replacement
    app.state.is_draining = False
    app.state.cache_salt = _cache_salt(settings)
    handlers.install(app)
    management_keys = _keys(settings.management_keys, settings, "management_keys")
    _install_gate(app, settings, management_keys, shared_rates)
    if provider is not None:
        from server.tracing import Tracing

        app.add_middleware(Tracing, provider=provider)
    app.add_middleware(HeadAsGet)
    app.add_middleware(Identity, count=telemetry.count_response)
    _allow_origins(app, settings)
    for router in _routers(settings, has_management=bool(management_keys)):
        app.include_router(router, responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}})
    return app


def _routers(settings: Settings, *, has_management: bool) -> list[APIRouter]:
    routers = [m.router for m in (completions, chat, responses, value, embeddings, models, tokens, system)]
    if has_management:
        # Training's libraries take time to import, and most servers have nobody to train heads for.
        from server.api import head_jobs

        routers += [management.router, head_jobs.router]
    return [*routers, playground.router] if settings.playground else routers


def _allow_origins(app: FastAPI, settings: Settings) -> None:
    """The outermost layer, since browsers show a page no answer without these headers, an error of ours neither.

    Keys come in a header that a page sets itself, and never from what a browser keeps, so credentials in the sense of
    CORS are not allowed, and any header may be sent: SDKs have their own.
    """
    if not settings.allowed_origins:
        return
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID_HEADER, "Retry-After", "x-should-retry"],
    )


def _cache_salt(settings: Settings) -> CacheSalt:
    # Behind something that keeps strangers out all callers look alike, so what one of them asked is nobody else's.
    return CacheSalt(settings.cache_salt_header, is_shared=settings.has_keys or not settings.allow_public_bind)


def _start_watch(settings: Settings, engine: Engine, telemetry: Telemetry) -> asyncio.Task[None] | None:
    if settings.heads_dir is None or settings.heads_poll_s is None:
        return None
    return asyncio.create_task(HeadWatch(engine, telemetry, settings.heads_dir, settings.heads_poll_s).run())


def _install_gate(app: FastAPI, settings: Settings, management_keys: KeyRing, shared_rates: SharedRates | None) -> None:
    """The last one added is the outermost."""
    inspect_keys = _keys(settings.inspect_keys, settings, "inspect_keys")
    keys = _keys(settings.api_keys, settings, "api_keys") | inspect_keys
    if keys & management_keys:
        raise ConfigurationError(
            "management_keys: a key that is also in api_keys or inspect_keys would give management to callers"
        )
    limits = Limits(
        requests_per_minute=settings.requests_per_minute,
        tokens_per_minute=settings.tokens_per_minute,
        concurrent_requests=settings.concurrent_requests,
    )
    app.add_middleware(Quota)
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes, receive_timeout_s=settings.receive_timeout_s)
    app.add_middleware(
        Gatekeeper,
        keys=keys,
        management_keys=management_keys,
        inspect_keys=inspect_keys,
        # Without keys, on this machine alone, callers are whoever could read the heads' files.
        everyone_inspects=settings.allow_inspection or (not keys and settings.binds_loopback),
        callers=Callers(limits, shared_rates or LocalRates()),
        public_paths=PUBLIC_PATHS
        | ({METRICS_PATH} if settings.public_metrics else set())
        | (playground.PATHS if settings.playground else set()),
    )
    if not keys or settings.allowed_hosts:
        # With keys a page has none, whatever name it comes by.
        app.add_middleware(
            HostGuard,
            hosts=(*settings.allowed_hosts, settings.host),
            origins=settings.allowed_origins if not keys else (ANY,),
            public_paths=PUBLIC_PATHS,
        )
    app.add_middleware(HeaderLimit)


def _keys(listed: SecretStr | None, settings: Settings, setting: str) -> KeyRing:
    file = getattr(settings, f"{setting}_file")
    return KeyRing.load(None if listed is None else listed.get_secret_value(), file, setting=setting)


def _shared_rates(storage: SecretStr | None) -> SharedRates | None:
    """Raises ConfigurationError."""
    if storage is None:
        return None
    try:
        from server.api.gate.shared_rates import SharedRates
    except ImportError as error:
        raise ConfigurationError("rate_limit_storage: Redis needs `pip install 'recontrol[redis]'`") from error
    return SharedRates(storage.get_secret_value())


def _trace_provider(endpoint: str | None) -> TracerProvider | None:
    if endpoint is None:
        return None
    try:
        from server.tracing import make_provider
    except ImportError as error:
        raise ConfigurationError("otlp_endpoint: traces need `pip install 'recontrol[otel]'`") from error
    return make_provider(endpoint)


def _pinned_control(settings: Settings) -> ControlParams | None:
    check_names(settings.pinned_refuses)
    if settings.pinned_control is None:
        if settings.pinned_refuses != PINNED_REFUSES:
            raise ConfigurationError("pinned_refuses: set pinned_control too; without it there is nothing to hold")
        return None
    pinned = ControlParams.from_json(settings.pinned_control, "pinned_control")
    if pinned.objective.type != "weighted_sum":
        raise ConfigurationError("pinned_control: objective: only a weighted_sum can be put together with a caller's")
    if pinned.max_response_kl is not None:
        raise ConfigurationError("pinned_control: max_response_kl: not allowed, since callers' heads could use it up")
    if pinned.search is not None:
        raise ConfigurationError("pinned_control: search: not allowed, since every choice would take several rows")
    if pinned.phase == "reasoning":
        raise ConfigurationError("pinned_control: phase: not reasoning alone, since callers can turn reasoning off")
    if settings.engine == "vllm" and pinned.repairs:
        raise ConfigurationError("pinned_control: on_stop: the vLLM engine only stops")
    if "in_calls" not in pinned.model_fields_set:
        # Or a caller could have all of a text as a tool's arguments, where no control acts.
        pinned = pinned.model_copy(update={"in_calls": True})
    if pinned.stop_below is not None and not pinned.in_calls:
        raise ConfigurationError("pinned_control: in_calls: not false with stop_below, since callers can force calls")
    return pinned


def check_pinned(app: FastAPI) -> None:
    """Raises ConfigurationError when the started engine lacks what the settings pin."""
    pinned: ControlParams | None = app.state.pinned
    heads = app.state.engine.info.heads
    missing = [name for name in pinned.head_names if name not in heads] if pinned else []
    if missing:
        raise ConfigurationError(
            f"pinned_control: no head {', '.join(missing)} is loaded; there are {', '.join(heads) or 'none'}"
        )
    over_turns = pinned and pinned.over_turns
    if over_turns and over_turns.held_heads and not app.state.engine.info.can_score:
        raise ConfigurationError("pinned_control: over_turns: hold is not served by this engine, which reads no values")
