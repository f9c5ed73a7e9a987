"""Engines turn requests into tokens. A new engine is a package here and a branch below, and writes only its own.

base.py          the seam: what an engine offers and reports
model_engine.py  what every engine that serves a model inherits: facts, text, room for requests, heads
choice.py        one choice of a request: its text, when it ends and why, its chunks, what observers hear
segments.py      which part of a response a token belongs to: reasoning, the answer or a call
edits.py         what control did to a token, and to a choice taken together
text.py          text to tokens and back; stop strings
chat_template.py a conversation to tokens
heads.py         where heads come from; a registry with one more or less
checks.py        what is refused before it is queued
streams.py       chunks on their way to their reader
devices.py       on what a model is computed, and in what numbers
selection.py     which engine `auto` comes to
checkpoint/      what a model's files say of it
embedded/, vllm/, fake.py   the engines; none imports another
"""

from __future__ import annotations

from server.engines.base import Engine, EngineObserver
from server.engines.selection import resolved
from server.settings import Settings


def create_engine(settings: Settings, *, observer: EngineObserver | None = None) -> Engine:
    """The engine that the settings name or come to, not yet started. Imports only that one."""
    settings = resolved(settings)
    if settings.engine == "fake":
        from server.engines.fake import FakeEngine

        form = "hermes" if settings.tool_call_format == "auto" else settings.tool_call_format
        return FakeEngine(observer=observer, call_format=form)
    if settings.engine == "vllm":
        from server.engines.vllm.engine import VllmEngine

        return VllmEngine(settings, observer=observer)
    from server.engines.embedded.engine import EmbeddedEngine

    return EmbeddedEngine(settings, observer=observer)
