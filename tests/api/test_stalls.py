"""The largest requests that are allowed, one by one: none of them holds up the event loop, on which all others wait.

Counted is what the loop's own thread computes at one go, which a busy machine does not change, and beside it what the
whole process does meanwhile, since a thread in C may hold up the loop too. Without care these took seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.api import resolution
from server.api.json_text import json_bytes
from tests.api.conftest import complete
from tests.api.test_incidents import JSON

MOST_S = 0.2
"""Of the loop's own thread: two megabytes of JSON take up to half of it to parse, where others share the caches."""
MOST_OF_ALL_S = 1.0
"""Of all threads together, which may compute side by side."""
MIB = 2**20
_MOST_TIMES = 3
ROOM = {"max_body_bytes": 2 * MIB}


@dataclass(slots=True)
class Stall:
    """The longest that was computed between two turns of the loop: by its own thread, and by all."""

    own_s: float = 0.0
    all_s: float = 0.0

    @property
    def is_short(self) -> bool:
        return self.own_s < MOST_S and self.all_s < MOST_OF_ALL_S


async def longest_stall(app: FastAPI, path: str, body: dict[str, Any]) -> tuple[Stall, httpx.Response]:
    """Of the event loop while the app answers; the shortest of up to three times, since caches of others spoil some."""
    for _ in range(_MOST_TIMES):
        stall, response = await _stall_once(app, path, body)
        if stall.is_short:
            break
    return stall, response


async def _stall_once(app: FastAPI, path: str, body: dict[str, Any]) -> tuple[Stall, httpx.Response]:
    content = json.dumps(body, separators=(",", ":")).encode()
    assert len(content) <= 2 * MIB
    stall = Stall()

    async def probe() -> None:
        while True:
            own_s, all_s = time.thread_time(), time.process_time()
            await asyncio.sleep(0.002)
            stall.own_s = max(stall.own_s, time.thread_time() - own_s)
            stall.all_s = max(stall.all_s, time.process_time() - all_s)

    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=120) as client,
    ):
        probing = asyncio.create_task(probe())
        await asyncio.sleep(0.05)
        response = await client.post(path, content=content, headers=JSON)
        await asyncio.sleep(0.01)
        probing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await probing
    return stall, response


@pytest.fixture(autouse=True)
def _without_garbage_collection() -> Iterator[None]:
    """Which would look at all that this session of tests has made; a server's need not (`server/cli/serve.py`)."""
    gc.disable()
    yield
    gc.enable()


TEXT = "plain text, as it comes " * (MIB // 48)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": TEXT, "return_token_strs": True}),
        ("/tokenize", {"messages": [{"role": "user", "content": TEXT}], "return_token_strs": True}),
        # What spells control tokens goes its own way to the tokenizer.
        ("/tokenize", {"messages": [{"role": "user", "content": "<bos>" * (MIB // 5)}]}),
        ("/detokenize", {"tokens": [101] * 131_072}),
    ],
    ids=["text", "chat", "control tokens", "tokens"],
)
async def test_texts_as_long_as_bodies_may_be_do_not_hold_up_others(
    make_embedded_app: Callable[..., FastAPI], path: str, body: dict[str, Any]
) -> None:
    stall, response = await longest_stall(make_embedded_app(**ROOM), path, body)
    assert response.status_code == 200
    assert stall.is_short, stall


FLOODS: dict[str, Any] = {
    "unknown fields": {f"a{i}": 1 for i in range(170_000)},
    "unknown fields of a field": {"control": {f"a{i}": 1 for i in range(170_000)}},
    "unknown fields of messages": {"messages": [{f"a{i}": 1 for i in range(180)}] * 1000},
    "empty parts": {"messages": [{"role": "user", "content": [""] * 500}] * 1000},
    "wrong token ids": {"stop_token_ids": ["a"] * 400_000},
    "wrong tokens": {"tokens": ["a"] * 131_072},
    "token ids": {"prompt": [1] * 1_000_000},
    "lists of token ids": {"prompt": [[1] * 15_000] * 64},
    "brackets": {"messages": [[[]]] * 250_000},
    "input items": {"input": [{"type": "message", "role": "user", "content": "a"}] * 20_000},
}


OTHERS = [
    ("/v1/chat/completions", "unknown fields of messages"),
    ("/v1/value", "unknown fields"),
    ("/v1/value", "empty parts"),
    ("/v1/responses", "unknown fields"),
    ("/v1/responses", "input items"),
    ("/tokenize", "unknown fields"),
    ("/detokenize", "wrong tokens"),
]


@pytest.mark.parametrize(("path", "flood"), [*(("/v1/completions", flood) for flood in FLOODS), *OTHERS])
async def test_a_body_full_of_what_there_is_no_place_for_is_refused_at_once(
    make_app: Callable[..., FastAPI], path: str, flood: str
) -> None:
    body = {"model": "fake", "prompt": "hi", **FLOODS[flood]}
    stall, response = await longest_stall(make_app(settings=ROOM), path, body)
    assert response.status_code == 400
    assert len(response.content) < 2000
    assert stall.is_short, stall


async def test_the_apis_description_is_made_beside_others(make_app: Callable[..., FastAPI]) -> None:
    """For whoever asks first for it, or by a method that a path does not have."""
    stall, response = await _stall_once(make_app(), "/openapi.json", {})
    assert (response.status_code, response.headers["allow"]) == (405, "GET")
    assert stall.own_s < MOST_S, stall


async def test_a_text_may_hold_as_many_brackets_as_it_likes(make_app: Callable[..., FastAPI]) -> None:
    prompt = '[{"\\' * 100_000
    stall, response = await longest_stall(make_app(settings=ROOM), "/tokenize", {"prompt": prompt})
    assert (response.status_code, response.json()["count"]) == (200, len(prompt))
    assert stall.is_short, stall


async def test_an_answer_with_all_log_probabilities_is_written_beside_others(make_app: Callable[..., FastAPI]) -> None:
    body = {"model": "fake", "prompt": "hi", "max_tokens": 600, "n": 16, "logprobs": 20}
    stall, response = await longest_stall(make_app(), "/v1/completions", body)
    assert response.status_code == 200
    assert len(response.content) > MIB
    assert stall.is_short, stall


async def test_the_last_events_of_a_response_are_written_beside_others(make_app: Callable[..., FastAPI]) -> None:
    """Each of them holds all log-probabilities."""
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 20, "instructions": "é" * 100}
    body = {"model": "fake", "input": "hi", "max_output_tokens": 3500, "stream": True, "ignore_eos": True, **asked}
    stall, response = await longest_stall(make_app(settings=ROOM), "/v1/responses", body)
    assert response.status_code == 200
    events = [
        json.loads(line.removeprefix("data: ")) for line in response.text.split("\n") if line.startswith("data: ")
    ]
    assert events[-1]["type"] == "response.incomplete"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    (item,) = events[-1]["response"]["output"]
    assert len(item["content"][0]["logprobs"]) == 3500
    assert stall.is_short, stall


def test_a_response_keeps_no_more_log_probabilities_than_fit_streamed_or_not(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolution, "MAX_TOLD_SCORES", 1000)
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 20, "max_output_tokens": 60}
    for stream in (False, True):
        refused = client.post("/v1/responses", json={"model": "fake", "input": "hi", "stream": stream, **asked})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "include")


def test_an_answer_that_is_no_stream_holds_no_more_log_probabilities_than_fit(client: TestClient) -> None:
    body = {"n": 16, "max_tokens": 4000, "logprobs": 20}
    refused = complete(client, **body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
    assert "stream: true" in refused.json()["error"]["message"]
    assert complete(client, **{**body, "n": 1, "max_tokens": 50}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_long_prompt_with_log_probabilities_is_told_beside_others(
    make_app: Callable[..., FastAPI], stream: bool
) -> None:
    body = {
        "model": "fake",
        "prompt": ["a" * 4000] * 3,
        "max_tokens": 1,
        "echo": True,
        "logprobs": 20,
        "stream": stream,
    }
    stall, response = await longest_stall(make_app(), "/v1/completions", body)
    assert response.status_code == 200
    assert stall.is_short, stall


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"a": []},
        {"a": [{"b": [1.5] * 100}] * 70, "c": "é\u2028"},
        [[[[[[[1] * 100]]]]]],
        [None] * 64,
        [{}] * 65,
        "x",
    ],
)
def test_json_in_pieces_is_json(value: Any) -> None:
    assert json_bytes(value).decode() == json.dumps(value, ensure_ascii=False, separators=(",", ":"))
