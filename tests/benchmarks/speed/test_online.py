"""The client of streamed completions, against the real server over the fake engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.speed.online import drive
from benchmarks.speed.servers import free_port
from server.app import create_app
from server.engines.fake import FakeEngine
from server.settings import Settings
from tests.api.conftest import serving

DELAY_S = 0.01


def body(prompt: int, **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": [prompt], "max_tokens": 8, "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True}, **fields}  # fmt: skip


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    options = getattr(request, "param", {"token_delay_s": DELAY_S})
    with serving(create_app(Settings(), FakeEngine(**options))) as url:
        yield url


def test_a_stream_is_timed_from_its_sending_text_by_text(url: str) -> None:
    (outcome,) = asyncio.run(drive(url, [body(1)], [0.0]))
    assert outcome.error is None
    assert outcome.num_tokens == 8
    assert len(outcome.gaps_s) == 7
    assert outcome.ttft_s >= DELAY_S * 0.9
    assert outcome.mean_gap_s >= DELAY_S * 0.8
    assert outcome.ttft_s + sum(outcome.gaps_s) <= outcome.e2e_s < 2


def test_requests_are_sent_at_their_times_and_wait_for_nobody(url: str) -> None:
    outcomes = asyncio.run(drive(url, [body(i, max_tokens=40) for i in range(3)], [0.0, 0.05, 0.1]))
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert all(outcome.sent_s >= due for outcome, due in zip(outcomes, [0.0, 0.05, 0.1], strict=True))
    # The last is sent while the first, of 0.4 s at least, is still running.
    assert outcomes[2].sent_s < outcomes[0].sent_s + outcomes[0].e2e_s
    assert outcomes[2].late_s == pytest.approx(outcomes[2].sent_s - 0.1)


@pytest.mark.parametrize(
    ("url", "fields", "error"),
    [
        ({"fail_after": 3}, {}, "The fake engine failed as told"),
        ({"max_open": 0}, {}, "429: .*try again later"),
        ({}, {"model": "other"}, "404: .*Known models"),
        ({}, {"stream_options": {}}, "gave 0 tokens where 8 were asked for"),
    ],
    indirect=["url"],
)
def test_whatever_goes_wrong_is_an_outcome(url: str, fields: dict[str, Any], error: str) -> None:
    outcomes = asyncio.run(drive(url, [body(1, **fields)], [0.0]))
    assert re.search(error, outcomes[0].error or "")
    assert outcomes[0].num_tokens == 0


def test_a_server_that_is_not_there_is_an_outcome_too() -> None:
    (outcome,) = asyncio.run(drive(f"http://127.0.0.1:{free_port()}", [body(1)], [0.0]))
    assert (outcome.error or "").startswith("ConnectError")
