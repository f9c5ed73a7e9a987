"""Long prompts: how fast they are read alone, what streams beside them notice, and who waits behind them.

Alone is measured on engines without HTTP, by the time of one new token; the rest on servers. Enter at `measure`, or at
`gaps_beside` for what streams notice.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import httpx

from benchmarks.speed.figures import Outcome, spread
from benchmarks.speed.offline import Engines
from benchmarks.speed.online import Servers, drive, events, stream, streaming_client
from benchmarks.speed.peers import ARMS, PEERS, Found, objectives
from benchmarks.speed.process import PeerError
from benchmarks.speed.servers import END_S
from benchmarks.speed.setup import Setup, Workload
from benchmarks.speed.turns import Keep, Key, Results

NUM_STREAMS = 4
"""Streams that run beside a long prompt."""
NUM_AHEAD = 4
"""Long prompts that a short one comes behind."""
ROWS = 8
"""Sequences that servers and engines have room for, so that nobody waits for a row."""
FEW_TOKENS = 4
"""New tokens of what is only waited for: one alone may have no text yet."""
_BEHIND_S = 0.05
_USUAL_GAPS = 32
_POLL_S = 0.005
_AFTERWARDS_S = 10.0
"""How long a stream's next token is waited for once the prompt has been read."""


def measure(
    setup: Setup,
    arms: Sequence[str],
    found: Mapping[str, Found],
    workload: Workload,
    *,
    lengths: Sequence[int],
    repeats: int,
    keep: Keep,
) -> dict[str, Results]:
    """`alone` and `beside`: by arm, its peer's facts and its figures at each length. The setup has room for them."""

    def keep_alone(alone: Results) -> None:
        keep({"alone": alone, "beside": {}})

    def keep_beside(beside: Results) -> None:
        keep({"alone": alone, "beside": beside})

    alone = _Alone(setup, found, workload).run(arms, lengths, repeats, warm_up=True, keep=keep_alone)
    serving = [arm for arm in arms if PEERS[ARMS[arm].peer].server is not None]
    beside = _Beside(setup, found, workload)
    if not serving:
        return {"alone": alone, "beside": {}}
    return {"alone": alone, "beside": beside.run(serving, lengths, repeats, warm_up=False, keep=keep_beside)}


async def gaps_beside(url: str, running: Sequence[Mapping[str, Any]], prompt: Mapping[str, Any]) -> Gaps:
    """Send a prompt once all streams run, and end them when it has its first text. Raises PeerError."""
    async with streaming_client(url) as client:
        heard = [_Stream() for _ in running]
        tasks = [asyncio.create_task(one.listen(client, body)) for one, body in zip(heard, running, strict=True)]
        try:
            while not all(len(one.moments_s) > _USUAL_GAPS for one in heard):
                _raise_what_failed(tasks)
                if any(task.done() for task in tasks):
                    raise PeerError("a stream ended before the long prompt was sent: there are too few tokens for it")
                await asyncio.sleep(_POLL_S)
            sent_s = time.perf_counter()
            outcome = await stream(client, prompt, sent_s, 0.0)
            if outcome.error is not None:
                raise PeerError(f"the long prompt failed: {outcome.error}")
            read_s = sent_s + outcome.ttft_s
            await _wait_for_next_tokens(heard, tasks, read_s)
            _raise_what_failed(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    usual_s = median(gap for one in heard for gap in one.gaps_before(sent_s))
    longest_s = max((gap for one in heard for gap in one.gaps_within(sent_s, read_s)), default=usual_s)
    return Gaps(usual_s, longest_s, outcome.ttft_s)


@dataclass(slots=True, frozen=True)
class Gaps:
    """Seconds."""

    usual_s: float
    """Median gap of all streams before the prompt was sent."""
    longest_s: float
    """Of any stream while the prompt was read."""
    ttft_s: float
    """Of the prompt."""


class _Alone(Engines):
    kind = "long"
    keys = "lengths"

    def turn(self, arm: str, key: Key, repeat: int) -> dict[str, Any]:
        prompts = replace(self.workload, prompt_tokens=int(key)).prompts(1, "long", key, repeat)
        seed = self.workload.seed_of("long", key, repeat)
        return self.generate(ARMS[arm].peer, prompts, 1, seed, objectives(ARMS[arm], self.setup.heads))

    def figures(self, key: str, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        seconds = [turn["seconds"] for turn in turns]
        return {"ttft_s": spread(seconds), "tokens_per_s": spread([int(key) / one for one in seconds])}


class _Beside(Servers):
    kind = "long-beside"
    keys = "lengths"

    def turn(self, arm: str, key: Key, repeat: int) -> dict[str, Any]:
        """First the streams and one long prompt, then a short prompt alone, then one behind several long ones."""
        peer, length = ARMS[arm].peer, int(key)
        server = self.server(peer)
        steer = objectives(ARMS[arm], self.setup.heads)
        long_workload = replace(self.workload, prompt_tokens=length)
        first, *ahead = self._few(self.bodies(peer, steer, long_workload.prompts(1 + NUM_AHEAD, "long", key, repeat)))
        short = self.workload.prompts(NUM_STREAMS + 2, "short", key, repeat)
        room = self.setup.max_len - self.workload.prompt_tokens - 1
        running = [{**body, "max_tokens": room} for body in self.bodies(peer, steer, short[:NUM_STREAMS])]
        alone, behind = self._few(self.bodies(peer, steer, short[NUM_STREAMS:]))
        try:
            seen = asyncio.run(gaps_beside(server.url, running, first))
            (short_alone,) = _answered(asyncio.run(drive(server.url, [alone], [0.0])))
            moments_s = [0.0] * NUM_AHEAD + [_BEHIND_S]
            *_, short_behind = _answered(asyncio.run(drive(server.url, [*ahead, behind], moments_s)))
        except PeerError as error:
            server.ends_within(END_S)
            raise server.failure(str(error)) from error
        return {
            "usual_gap_s": seen.usual_s,
            "longest_gap_s": seen.longest_s,
            "gap_ratio": seen.longest_s / seen.usual_s,
            "ttft_s": seen.ttft_s,
            "short_alone_s": short_alone.ttft_s,
            "short_behind_s": short_behind.ttft_s,
        }

    def figures(self, key: str, turns: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        del key
        return {name: spread([turn[name] for turn in turns]) for name in turns[0]}

    @staticmethod
    def _few(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**body, "max_tokens": FEW_TOKENS} for body in bodies]


def _answered(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """Raises PeerError when one of them failed."""
    if error := next((outcome.error for outcome in outcomes if outcome.error), None):
        raise PeerError(f"a prompt failed: {error}")
    return outcomes


class _Stream:
    def __init__(self) -> None:
        self.moments_s: list[float] = []
        """When each token came."""

    async def listen(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> None:
        """Until its end, or until it is cancelled. Raises StreamError."""
        async for event in events(client, body):
            if event.get("choices"):
                self.moments_s.append(time.perf_counter())

    def gaps_before(self, moment_s: float) -> list[float]:
        """The last ones, when all streams ran."""
        before = [one for one in self.moments_s if one <= moment_s]
        return [later - earlier for earlier, later in itertools.pairwise(before)][-_USUAL_GAPS:]

    def gaps_within(self, start_s: float, end_s: float) -> list[float]:
        """Those that lie in this time at least in part."""
        pairs = itertools.pairwise(self.moments_s)
        return [later - earlier for earlier, later in pairs if later > start_s and earlier < end_s]


async def _wait_for_next_tokens(heard: Sequence[_Stream], tasks: Sequence[asyncio.Task[None]], since_s: float) -> None:
    """So that a gap which the prompt's last chunk made counts in full."""
    deadline_s = time.perf_counter() + _AFTERWARDS_S
    for one, task in zip(heard, tasks, strict=True):
        while one.moments_s[-1] <= since_s and not task.done() and time.perf_counter() < deadline_s:
            await asyncio.sleep(_POLL_S)


def _raise_what_failed(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done() and (error := task.exception()) is not None:
            raise PeerError(f"a stream failed: {error}") from error
