"""Streams over HTTP at a given rate of requests: first text, gaps, whole answers, goodput. Servers by turns.

Arrivals are a Poisson process that waits for nobody, so a server that is too slow builds up a queue. Enter at
`measure`, or at `drive` for the client alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.speed.figures import Outcome, spread, streams
from benchmarks.speed.peers import ARMS, PEERS, Found, child_env, objectives
from benchmarks.speed.servers import END_S, Server, free_port
from benchmarks.speed.setup import Setup, Workload
from benchmarks.speed.turns import Keep, Key, Results, Turns

_TIMEOUT_S = 3600.0
"""Until a server is ready: a large model may load, and another compile, for long."""
_REQUEST_TIMEOUT_S = 600.0
_WARM_UP_REQUESTS = 8
_NO_LIMIT = httpx.Limits(max_connections=None, max_keepalive_connections=None)
_TIMES = ("ttft_s", "itl_s", "e2e_s")


class StreamError(Exception):
    """Why a stream gave nothing that can be measured."""


@dataclass(slots=True, frozen=True)
class Load:
    """What the servers are put under, and what counts as a good answer."""

    rates: Sequence[float]
    num_requests: int
    repeats: int
    ttft_s: float
    itl_s: float


def measure(
    setup: Setup, arms: Sequence[str], found: Mapping[str, Found], workload: Workload, load: Load, *, keep: Keep
) -> Results:
    """By arm, its peer's facts and its figures at each rate."""
    return _Online(setup, found, workload, load).run(arms, load.rates, load.repeats, warm_up=False, keep=keep)


def streaming_client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=_REQUEST_TIMEOUT_S, limits=_NO_LIMIT)


async def drive(url: str, bodies: Sequence[Mapping[str, Any]], arrivals_s: Sequence[float]) -> list[Outcome]:
    """Send each body at its time, whatever has become of the others, and read all streams to their end."""
    async with streaming_client(url) as client:
        started_s = time.perf_counter()

        async def send(body: Mapping[str, Any], arrival_s: float) -> Outcome:
            await asyncio.sleep(max(0.0, started_s + arrival_s - time.perf_counter()))
            return await stream(client, body, started_s, arrival_s)

        return await asyncio.gather(*(send(*pair) for pair in zip(bodies, arrivals_s, strict=True)))


async def stream(client: httpx.AsyncClient, body: Mapping[str, Any], started_s: float, arrival_s: float) -> Outcome:
    """One completion, sent now. A failure of any kind is an outcome, too."""
    sent_at_s = time.perf_counter()
    sent_s = sent_at_s - started_s
    times_s: list[float] = []
    num_tokens = 0
    try:
        async for event in events(client, body):
            if any(choice.get("text") for choice in event.get("choices", ())):
                times_s.append(time.perf_counter() - sent_at_s)
            if usage := event.get("usage"):
                num_tokens = usage["completion_tokens"]
        e2e_s = time.perf_counter() - sent_at_s
        if not times_s:
            raise StreamError("no text came")
        if num_tokens != body["max_tokens"]:
            raise StreamError(f"gave {num_tokens} tokens where {body['max_tokens']} were asked for")
    except StreamError as error:
        return Outcome(sent_s, sent_s - arrival_s, error=str(error))
    gaps_s = tuple(later - earlier for earlier, later in itertools.pairwise(times_s))
    return Outcome(sent_s, sent_s - arrival_s, times_s[0], e2e_s, gaps_s, num_tokens)


async def events(client: httpx.AsyncClient, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Those of one streamed completion as they come. Raises StreamError when it is refused, fails or breaks off."""
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.is_error:
                raise StreamError(f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:300]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise StreamError(str(event["error"]))
                yield event
    except (httpx.HTTPError, ValueError) as failure:
        raise StreamError(f"{type(failure).__name__}: {failure}") from failure


class Servers(Turns):
    """Peers' servers, which answer `bodies`."""

    def __init__(self, setup: Setup, found: Mapping[str, Found], workload: Workload) -> None:
        super().__init__(setup, found, workload)
        self._models: dict[str, str] = {}

    def open(self, peer: str) -> dict[str, Any]:
        """Ready means that its first answer has come; after that it is warmed up."""
        setup, spec, python = self.setup, PEERS[peer], self.found[peer].python
        assert spec.server is not None
        gguf = spec.gguf(setup) if spec.gguf is not None else None
        started_s = time.perf_counter()
        port = free_port()
        command, env = spec.server(setup, python, port, gguf), child_env(spec, setup, python)
        server = self.children[peer] = Server(command, port, env=env, log=self.log(peer))
        (prompt,) = self.workload.prompts(1, "start")
        self._models[peer] = server.wait_until_it_answers({"prompt": prompt, **spec.request}, timeout_s=_TIMEOUT_S)
        startup_s = time.perf_counter() - started_s
        bodies = self.bodies(peer, (), self.workload.prompts(_WARM_UP_REQUESTS, "warm-up"))
        outcomes = asyncio.run(drive(server.url, bodies, [0.0] * len(bodies)))
        if error := next((outcome.error for outcome in outcomes if outcome.error), None):
            server.ends_within(END_S)
            raise server.failure(f"the first requests failed: {error}")
        return {"startup_s": startup_s}

    def server(self, peer: str) -> Server:
        server = self.children[peer]
        assert isinstance(server, Server)
        return server

    def bodies(
        self, peer: str, row_objectives: Sequence[Mapping[str, Any]], prompts: Sequence[list[int]]
    ) -> list[dict[str, Any]]:
        """Of streamed completions; row i takes objective i, and round again."""
        body = {
            "model": self._models[peer],
            "max_tokens": self.workload.new_tokens,
            "temperature": 1.0,
            "top_p": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **PEERS[peer].request,
        }
        controls = [{"control": {"objective": objective}} for objective in row_objectives] or [{}]
        return [{**body, "prompt": prompt, **controls[i % len(controls)]} for i, prompt in enumerate(prompts)]


class _Online(Servers):
    kind = "online"
    keys = "rates"

    def __init__(self, setup: Setup, found: Mapping[str, Found], workload: Workload, load: Load) -> None:
        super().__init__(setup, found, workload)
        self._load = load

    def turn(self, arm: str, key: Key, repeat: int) -> dict[str, Any]:
        """The same prompts and moments for every arm."""
        peer, load, rate = ARMS[arm].peer, self._load, float(key)
        server = self.server(peer)
        prompts = self.workload.prompts(load.num_requests, "online", key, repeat)
        arrivals_s = self.workload.arrivals_s(load.num_requests, rate, repeat)
        bodies = self.bodies(peer, objectives(ARMS[arm], self.setup.heads), prompts)
        outcomes = asyncio.run(drive(server.url, bodies, arrivals_s))
        if server.ends_within(END_S if any(outcome.error for outcome in outcomes) else 0):
            raise server.failure("the server ended")
        return streams(outcomes, ttft_s=load.ttft_s, itl_s=load.itl_s)

    def figures(self, key: str, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Each figure's spread over the repeats in which a request came through."""
        del key
        result: dict[str, Any] = {"repeats": list(turns), "goodput": spread([turn["goodput"] for turn in turns])}
        for name in _TIMES:
            found = [turn[name] for turn in turns if turn[name] is not None]
            result[name] = {p: spread([figures[p] for figures in found]) for p in found[0]} if found else None
        tokens = [turn["tokens_per_s"] for turn in turns if turn["tokens_per_s"] is not None]
        result["tokens_per_s"] = spread(tokens) if tokens else None
        return result
