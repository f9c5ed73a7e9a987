"""What a stream and /health see of the worst requests that are allowed, all at once beside them.

Both wait for a thread, the engine's or the event loop's. What counts is how long that thread computes between two
tokens of the stream, or between a question and its answer: a busy machine changes little of it. How long the steps
themselves get is shown on a clock that a test turns (`tests/engines/test_pace.py`, `test_prompt_shares.py`); here it is
that nothing else comes between them, and nothing in them that is as large as a caller likes.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.engines.embedded import engine as embedded
from server.engines.embedded.core import EngineCore
from server.engines.embedded.engine import EmbeddedEngine
from server.engines.embedded.model.loader import load_model
from server.engines.embedded.scheduler import Scheduler, Step
from server.settings import Settings
from server.telemetry import Telemetry
from tests.conftest import write_heads
from value_models.heads import ValueHead

STREAM, MANAGER = "the-stream", {"authorization": "Bearer manager-key-0123456789"}
MOST_STEPS = 1.0
"""Of the engine's thread, between two steps."""
MOST_S = 0.06
"""From one token to the next: less than three usual steps of a model of any size that is used, and a third of what one
schema takes to compile."""
HEALTH_S = 0.15
REFUSED = {"unknown fields"}
USUAL_TOKENS = 60


@dataclass(slots=True)
class Watched:
    """Steps that gave the stream a token: what the engine's thread had computed when they ended, and in them."""

    steps: list[tuple[float, float]] = field(default_factory=list)

    def saw(self, step: Step, seconds: float) -> None:
        if any(sequence.request.request_id.startswith(STREAM) for sequence, _ in step.decoding):
            self.steps.append((time.thread_time(), seconds))

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """What was computed from each token to the next, and how much of it outside of the step."""
        ends = itertools.pairwise(self.steps)
        return [(ended_s - before_s, ended_s - before_s - seconds) for (before_s, _), (ended_s, seconds) in ends]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    watched, took = Watched(), Scheduler.took

    def watch(self: Scheduler, step: Step, seconds: float) -> None:
        took(self, step, seconds)
        watched.saw(step, seconds)

    monkeypatch.setattr(Scheduler, "took", watch)
    monkeypatch.setattr(embedded, "EngineCore", partial(EngineCore, clock=time.thread_time))
    # Python's own collection of what the whole test session holds would be counted too.
    gc.disable()
    yield watched
    gc.enable()


@pytest.fixture
def app(roomy_folder: Path, heads: dict[str, ValueHead], tmp_path: Path) -> FastAPI:
    identity = load_model(str(roomy_folder), device="cpu", dtype="float32").identity
    write_heads(tmp_path / "heads", {"positive": heads["good"], "plain": heads["line"]}, identity)
    settings = Settings(
        model=str(roomy_folder), served_model_name="tiny", heads_dir=tmp_path / "heads", device="cpu", dtype="float32",
        max_batch_size=8, management_keys=MANAGER["authorization"].removeprefix("Bearer "), max_body_bytes=2**21,
        allow_inspection=True, kv_cache_gib=0.25,
    )  # fmt: skip
    telemetry = Telemetry()
    return create_app(settings, EmbeddedEngine(settings, observer=telemetry), telemetry)


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=120) as client,
    ):
        yield client


async def read_stream(client: httpx.AsyncClient) -> None:
    """One that goes on for longer than everything beside it."""
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    await client.post("/v1/completions", json=body, headers={"x-request-id": STREAM})


SCHEMA = {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 15} for i in range(400)}}
PARAMETERS = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(100)}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
LONG = "plain text, as it comes " * 330
FLOOD = {f"a{i}": 1 for i in range(170_000)}
WORST: dict[str, tuple[str, dict[str, Any]]] = {
    "long prompts": ("/v1/completions", {"prompt": [f"{i}{LONG}"[:8000] for i in range(1)], "max_tokens": 2}),
    "prompts told": ("/v1/completions", {"prompt": f"echo {LONG}"[:8000], "max_tokens": 1, "echo": True,
                                         "logprobs": 20}),
    "a schema": ("/v1/completions", {"prompt": "Hi", "max_tokens": 20, "guided_json": SCHEMA}),
    "choices": ("/v1/completions", {"prompt": "Hi", "max_tokens": 20, "guided_choice": [f"c{i:04}" for i in
                                                                                       range(1024)]}),
    "tools": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20,
                                       "tools": TOOLS, "tool_choice": "required"}),
    "unknown fields": ("/v1/completions", {"prompt": "Hi", **FLOOD}),
    "token ids": ("/v1/completions", {"prompt": [[i] * 2000 for i in range(2)], "max_tokens": 1, "n": 4}),
    "a long text": ("/tokenize", {"prompt": LONG * 120, "return_token_strs": True}),
    "values": ("/v1/value", {"input": [f"{i} {LONG}"[:2000] for i in range(8)], "per_token": True}),
    "biases": ("/v1/completions", {"prompt": "Hi", "max_tokens": 20, "logit_bias": {str(i): 1 for i in range(258)},
                                   "stop": [f"stop {i} " + "x" * 200 for i in range(64)], "n": 4}),
}  # fmt: skip


CONTENTS = {name: json.dumps({"model": "tiny", **body}).encode() for name, (_, body) in WORST.items()}
"""Written before, since this is the clients' work."""


async def send(client: httpx.AsyncClient, name: str) -> int:
    path, _ = WORST[name]
    answer = await client.post(path, content=CONTENTS[name], headers={"content-type": "application/json"})
    return answer.status_code


async def change_heads(client: httpx.AsyncClient) -> None:
    for what in ("reload", "unload", "load") * 3:
        answer = await client.post(f"/v1/management/heads/plain/{what}", headers=MANAGER)
        assert answer.status_code == 200, answer.text


async def ask_health(client: httpx.AsyncClient, took: list[float]) -> None:
    """What the loop's thread computes from each question to its answer."""
    while True:
        before_s = time.thread_time()
        assert (await client.get("/health")).status_code == 200
        took.append(time.thread_time() - before_s)
        await asyncio.sleep(0.002)


async def test_beside_the_worst_requests_no_stream_and_no_health_check_waits_long(
    app: FastAPI, watched: Watched
) -> None:
    took: list[float] = []
    async with client_of(app) as client:
        streaming = asyncio.create_task(read_stream(client))
        while len(watched.steps) < USUAL_TOKENS:
            await asyncio.sleep(0.01)
        asking = asyncio.create_task(ask_health(client, took))
        statuses = dict(zip(WORST, await asyncio.gather(*(send(client, name) for name in WORST)), strict=True))
        await change_heads(client)
        assert not streaming.done()
        for task in (asking, streaming):
            task.cancel()
        await asyncio.gather(asking, streaming, return_exceptions=True)
    assert {name for name, status in statuses.items() if status != 200} == REFUSED, statuses
    assert max(took) < HEALTH_S
    usual_s = statistics.median(gap_s for gap_s, _ in watched.gaps[:USUAL_TOKENS])
    assert max(outside_s for _, outside_s in watched.gaps) < MOST_STEPS * usual_s
    assert max(gap_s for gap_s, _ in watched.gaps) < MOST_S
