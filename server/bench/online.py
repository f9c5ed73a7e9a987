"""Streams over HTTP at a given rate of requests: first text, gaps, whole answers, goodput. Servers by turns.

Arrivals are a Poisson process that waits for nobody, so a server that is too slow builds up a queue. Enter at
`measure`, or at `drive` for the client alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from tqdm import tqdm

from server.bench.figures import Outcome, spread, streams
from server.bench.peers import ARMS, PEERS, Found, child_env, objectives
from server.bench.process import PeerError
from server.bench.servers import Server, free_port
from server.bench.setup import Setup
from server.bench.workload import Workload

_START_TIMEOUT_S = 3600.0
_REQUEST_TIMEOUT_S = 600.0
_WARM_UP_REQUESTS = 8
_NO_LIMIT = httpx.Limits(max_connections=None, max_keepalive_connections=None)
_TIMES = ("ttft_s", "itl_s", "e2e_s")


@dataclass(slots=True, frozen=True)
class Load:
    """What the servers are put under, and what counts as a good answer."""

    rates: Sequence[float]
    num_requests: int
    repeats: int
    ttft_s: float
    itl_s: float


def measure(
    setup: Setup, arms: Sequence[str], found: Mapping[str, Found], workload: Workload, load: Load
) -> dict[str, Any]:
    """By arm, its figures; one whose server fails says so under `failed`, keeps what it had, and the others go on."""
    run = _Run(setup, found, workload, load)
    results: dict[str, dict[str, Any]] = {arm: {"rates": {}} for arm in arms}
    try:
        for peer in dict.fromkeys(ARMS[arm].peer for arm in arms):
            run.start(peer)
        turns = [
            (rate, repeat, arm)
            for repeat in range(load.repeats)
            for rate in load.rates
            for arm in [*arms[repeat % len(arms) :], *arms[: repeat % len(arms)]]
        ]
        for rate, repeat, arm in (progress := tqdm(turns, desc="online", unit="turn")):
            progress.set_postfix_str(f"{arm}, {rate:g} requests/s")
            if (figures := run.turn(arm, rate, repeat)) is not None:
                results[arm]["rates"].setdefault(f"{rate:g}", []).append(figures)
        for arm, result in results.items():
            result["rates"] = {rate: _rate(repeats) for rate, repeats in result["rates"].items()}
            result.update(run.facts(ARMS[arm].peer))
    finally:
        run.end()
    return results


async def drive(url: str, bodies: Sequence[Mapping[str, Any]], arrivals_s: Sequence[float]) -> list[Outcome]:
    """Send each body at its time, whatever has become of the others, and read all streams to their end."""
    async with httpx.AsyncClient(base_url=url, timeout=_REQUEST_TIMEOUT_S, limits=_NO_LIMIT) as client:
        started_s = time.perf_counter()

        async def send(body: Mapping[str, Any], arrival_s: float) -> Outcome:
            await asyncio.sleep(max(0.0, started_s + arrival_s - time.perf_counter()))
            return await _stream(client, body, started_s, arrival_s)

        return await asyncio.gather(*(send(*pair) for pair in zip(bodies, arrivals_s, strict=True)))


async def _stream(client: httpx.AsyncClient, body: Mapping[str, Any], started_s: float, arrival_s: float) -> Outcome:
    """One completion. A failure of any kind is an outcome, too."""
    sent_at_s = time.perf_counter()
    sent_s = sent_at_s - started_s
    times_s: list[float] = []
    num_tokens = 0
    error: str | None = None
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.is_error:
                error = f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:300]}"
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    error = str(event["error"])
                if any(choice.get("text") for choice in event.get("choices", ())):
                    times_s.append(time.perf_counter() - sent_at_s)
                if usage := event.get("usage"):
                    num_tokens = usage["completion_tokens"]
    except (httpx.HTTPError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    e2e_s = time.perf_counter() - sent_at_s
    if error is None and not times_s:
        error = "no text came"
    if error is None and num_tokens != body["max_tokens"]:
        error = f"gave {num_tokens} tokens where {body['max_tokens']} were asked for"
    if error is not None:
        return Outcome(sent_s, sent_s - arrival_s, error=error)
    gaps_s = tuple(later - earlier for earlier, later in itertools.pairwise(times_s))
    return Outcome(sent_s, sent_s - arrival_s, times_s[0], e2e_s, gaps_s, num_tokens)


class _Run:
    """The servers of one run, each frozen but for its own turns."""

    def __init__(self, setup: Setup, found: Mapping[str, Found], workload: Workload, load: Load) -> None:
        self._setup = setup
        self._found = found
        self._workload = workload
        self._load = load
        self._servers: dict[str, Server] = {}
        self._models: dict[str, str] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def start(self, name: str) -> None:
        """Start a server, time it until its first answer has come, and warm it up."""
        setup, peer, python = self._setup, PEERS[name], self._found[name].python
        self._facts[name] = {}
        assert peer.server is not None
        try:
            gguf = peer.gguf(setup) if peer.gguf is not None else None
            started_s = time.perf_counter()
            port = free_port()
            log = setup.work / "logs" / f"{name}-online.log"
            command, env = peer.server(setup, python, port, gguf), child_env(peer, setup, python)
            server = self._servers[name] = Server(command, port, env=env, log=log)
            (prompt,) = self._workload.prompts(1, "start")
            self._models[name] = server.wait_until_it_answers(
                {"prompt": prompt, **peer.request}, timeout_s=_START_TIMEOUT_S
            )
            self._facts[name]["startup_s"] = time.perf_counter() - started_s
            bodies = self._bodies(name, (), self._workload.prompts(_WARM_UP_REQUESTS, "warm-up"))
            outcomes = asyncio.run(drive(server.url, bodies, [0.0] * len(bodies)))
            if error := next((outcome.error for outcome in outcomes if outcome.error), None):
                raise server.failure(f"the first requests failed: {error}")
            server.freeze()
        except (PeerError, OSError) as error:
            self._fail(name, error)

    def turn(self, arm: str, rate: float, repeat: int) -> dict[str, Any] | None:
        """One rate; None when the server has failed, now or before."""
        name, load = ARMS[arm].peer, self._load
        if "failed" in self._facts[name]:
            return None
        server = self._servers[name]
        # The same prompts and moments for every arm.
        prompts = self._workload.prompts(load.num_requests, "online", rate, repeat)
        arrivals_s = self._workload.arrivals_s(load.num_requests, rate, repeat)
        bodies = self._bodies(name, objectives(ARMS[arm], self._setup.heads), prompts)
        try:
            with server.awake():
                outcomes = asyncio.run(drive(server.url, bodies, arrivals_s))
            if not server.is_running:
                raise server.failure("the server ended")
        except PeerError as error:
            self._fail(name, error)
            return None
        return streams(outcomes, ttft_s=load.ttft_s, itl_s=load.itl_s)

    def facts(self, name: str) -> dict[str, Any]:
        """What is known of a server at the end of the run; memory is the most it held in all of it."""
        server = self._servers.get(name)
        if "failed" not in self._facts[name] and server is not None:
            server.thaw()
            self._facts[name] |= {"peak_rss_bytes": server.peak_rss_bytes(), "idle_cpu_s": server.idle_cpu_s}
        return self._facts[name]

    def end(self) -> None:
        for server in self._servers.values():
            server.end()

    def _bodies(
        self, name: str, row_objectives: Sequence[Mapping[str, Any]], prompts: Sequence[list[int]]
    ) -> list[dict[str, Any]]:
        body = {
            "model": self._models[name],
            "max_tokens": self._workload.new_tokens,
            "temperature": 1.0,
            "top_p": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **PEERS[name].request,
        }
        controls = [{"control": {"objective": objective}} for objective in row_objectives] or [{}]
        return [{**body, "prompt": prompt, **controls[i % len(controls)]} for i, prompt in enumerate(prompts)]

    def _fail(self, name: str, error: Exception) -> None:
        tqdm.write(f"{name}: {error}")
        self._facts[name]["failed"] = str(error)


def _rate(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One rate's repeats: each figure's spread over those in which a request came through."""
    result: dict[str, Any] = {"repeats": list(repeats), "goodput": spread([turn["goodput"] for turn in repeats])}
    for name in _TIMES:
        turns = [turn[name] for turn in repeats if turn[name] is not None]
        result[name] = {p: spread([turn[p] for turn in turns]) for p in turns[0]} if turns else None
    tokens = [turn["tokens_per_s"] for turn in repeats if turn["tokens_per_s"] is not None]
    result["tokens_per_s"] = spread(tokens) if tokens else None
    return result
