"""What an engine says of its memory when it starts."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from server.engines.embedded import memory
from server.engines.embedded.core import EngineCore
from server.engines.embedded.memory import log_memory


def said(core: EngineCore, caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    with caplog.at_level(logging.INFO):
        log_memory(core.runner, core.page_pool, torch.device("cpu"))
    return [(level, text) for logger, level, text in caplog.record_tuples if logger == memory.__name__]


def test_size_pages_tokens_and_mark_are_told(core: EngineCore, caplog: pytest.LogCaptureFixture) -> None:
    ((level, text),) = said(core, caplog)
    assert level == logging.INFO
    # 8 rows of 256 tokens in pages of 64.
    assert text.startswith("Keys and values: up to 0.00 GiB, 32 pages, 2048 tokens; beyond 16 pages remembered")


def test_what_would_not_fit_beside_the_model_is_warned_of(
    make_core: Callable[..., EngineCore], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: 2**20)
    (_, (level, text)) = said(make_core(), caplog)
    assert level == logging.WARNING
    assert text.startswith("kv_cache_gib: keys and values of")
