"""Long prompts: how fast they are read alone, what streams beside them notice, and who waits behind them.

Alone is measured on engines without HTTP, by the time of one new token; the rest on servers. Enter at `measure`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.speed import gaps
from benchmarks.speed.figures import Outcome, spread
from benchmarks.speed.offline import Engines
from benchmarks.speed.online import END_S, Servers, drive
from benchmarks.speed.peers import ARMS, PEERS, Found, objectives
from benchmarks.speed.process import PeerError
from benchmarks.speed.setup import Setup
from benchmarks.speed.turns import Key
from benchmarks.speed.workload import Workload

NUM_STREAMS = 4
"""Streams that run beside a long prompt."""
NUM_AHEAD = 4
"""Long prompts that a short one comes behind."""
ROWS = 8
"""Sequences that servers and engines have room for, so that nobody waits for a row."""
FEW_TOKENS = 4
"""New tokens of what is only waited for: one alone may have no text yet."""
_BEHIND_S = 0.05


def measure(
    setup: Setup,
    arms: Sequence[str],
    found: Mapping[str, Found],
    workload: Workload,
    *,
    lengths: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """`alone` and `beside`: by arm, its peer's facts and its figures at each length. The setup has room for them."""
    alone = _Alone(setup, found, workload).run(arms, lengths, repeats, warm_up=True)
    for result in alone.values():
        result["lengths"] = {length: _alone(int(length), turns) for length, turns in result.pop("turns").items()}
    serving = [arm for arm in arms if PEERS[ARMS[arm].peer].server is not None]
    beside = _Beside(setup, found, workload).run(serving, lengths, repeats, warm_up=False) if serving else {}
    for result in beside.values():
        result["lengths"] = {length: _beside(turns) for length, turns in result.pop("turns").items()}
    return {"alone": alone, "beside": beside}


class _Alone(Engines):
    kind = "long"

    def turn(self, arm: str, key: Key, repeat: int) -> dict[str, Any]:
        prompts = replace(self.workload, prompt_tokens=int(key)).prompts(1, "long", key, repeat)
        seed = self.workload.seed_of("long", key, repeat)
        return self.generate(ARMS[arm].peer, prompts, 1, seed, objectives(ARMS[arm], self.setup.heads))


class _Beside(Servers):
    kind = "long-beside"

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
            seen = asyncio.run(gaps.beside(server.url, running, first))
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

    @staticmethod
    def _few(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**body, "max_tokens": FEW_TOKENS} for body in bodies]


def _answered(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """Raises PeerError when one of them failed."""
    if error := next((outcome.error for outcome in outcomes if outcome.error), None):
        raise PeerError(f"a prompt failed: {error}")
    return outcomes


def _alone(length: int, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = [turn["seconds"] for turn in turns]
    return {"ttft_s": spread(seconds), "tokens_per_s": spread([length / one for one in seconds])}


def _beside(turns: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: spread([turn[name] for turn in turns]) for name in turns[0]}
