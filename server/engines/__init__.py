"""Engines turn requests into tokens. `base.py` is the seam; a new engine is a package here and a branch below."""

from __future__ import annotations

from server.engines.base import Engine, EngineObserver
from server.settings import Settings


def create_engine(settings: Settings, *, observer: EngineObserver | None = None) -> Engine:
    """The engine that the settings name, not yet started. Imports only that one."""
    if settings.engine == "fake":
        from server.engines.fake import FakeEngine

        return FakeEngine(observer=observer)
    if settings.engine == "vllm":
        from server.engines.vllm.engine import VllmEngine

        return VllmEngine(settings, observer=observer)
    from server.engines.embedded.engine import EmbeddedEngine

    return EmbeddedEngine(settings, observer=observer)
