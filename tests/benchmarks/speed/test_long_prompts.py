"""The gaps in streams while a long prompt is read, on an engine that stalls all streams from then on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.speed.long_prompts import gaps_beside
from benchmarks.speed.process import PeerError
from server.app import create_app
from server.engines.fake import FakeEngine
from server.settings import Settings
from server.types import GenerationRequest
from tests.api.conftest import serving

USUAL_S, STALL_S = 0.01, 0.2


class StallingEngine(FakeEngine):
    def generate(self, request: GenerationRequest) -> Any:
        if len(request.prompt_token_ids) > 10:
            self._token_delay_s = STALL_S
        return super().generate(request)


def body(prompt_tokens: int, max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": [7] * prompt_tokens, "max_tokens": max_tokens, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True}, **fields}  # fmt: skip


@pytest.fixture
def engine() -> FakeEngine:
    return StallingEngine(token_delay_s=USUAL_S)


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with serving(create_app(Settings(), engine)) as url:
        yield url


def test_the_longest_gap_is_that_of_the_stall_and_the_usual_one_that_before(url: str) -> None:
    gaps = asyncio.run(gaps_beside(url, [body(3, 2000)] * 2, body(20, 4)))
    assert USUAL_S * 0.9 <= gaps.usual_s < gaps.longest_s
    assert gaps.longest_s >= STALL_S * 0.9
    assert gaps.ttft_s >= STALL_S * 0.9


def test_streams_that_are_too_short_are_named(url: str) -> None:
    with pytest.raises(PeerError, match="ended before the long prompt was sent"):
        asyncio.run(gaps_beside(url, [body(3, 5)], body(20, 4)))


@pytest.mark.parametrize(
    ("stream", "prompt", "what"),
    [
        (body(3, 2000, model="other"), body(20, 4), "a stream failed: 404: .*Known models"),
        (body(3, 2000), body(20, 4, model="other"), "the long prompt failed: 404"),
    ],
)
def test_what_is_refused_is_named(url: str, stream: dict[str, Any], prompt: dict[str, Any], what: str) -> None:
    with pytest.raises(PeerError, match=what):
        asyncio.run(gaps_beside(url, [stream], prompt))
