"""What a long prompt does to streams that run beside it: the gaps between their tokens, before and while it is read.

Knows no peer. Enter at `beside`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx

from benchmarks.speed.online import NO_LIMIT, REQUEST_TIMEOUT_S, stream
from benchmarks.speed.process import PeerError

_USUAL_GAPS = 32
_POLL_S = 0.005
_AFTERWARDS_S = 10.0
"""How long a stream's next token is waited for once the prompt has been read."""


@dataclass(slots=True, frozen=True)
class Gaps:
    """Seconds."""

    usual_s: float
    """Median gap of all streams before the prompt was sent."""
    longest_s: float
    """Of any stream while the prompt was read."""
    ttft_s: float
    """Of the prompt."""


async def beside(url: str, running: Sequence[Mapping[str, Any]], prompt: Mapping[str, Any]) -> Gaps:
    """Send a prompt once all streams run, and end them when it has its first text. Raises PeerError."""
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S, limits=NO_LIMIT) as client:
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


class _Stream:
    def __init__(self) -> None:
        self.moments_s: list[float] = []
        """When each token came."""

    async def listen(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> None:
        """Until its end, or until it is cancelled. Raises PeerError."""
        try:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    raise PeerError(f"a stream was refused: {(await response.aread()).decode(errors='replace')[:300]}")
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise PeerError(f"a stream failed: {event['error']}")
                    if event.get("choices"):
                        self.moments_s.append(time.perf_counter())
        except (httpx.HTTPError, ValueError) as error:
            raise PeerError(f"a stream failed: {type(error).__name__}: {error}") from error

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
            raise error
