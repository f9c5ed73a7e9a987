"""What is left of an engine's speed beside others on the same machine. Enter at `measure`.

Each condition is a turn: alone; beside one process that keeps a core busy; two engines of the peer at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.speed.figures import spread
from benchmarks.speed.offline import Engines
from benchmarks.speed.peers import ARMS, Found, objectives
from benchmarks.speed.process import Child
from benchmarks.speed.setup import Setup, Workload
from benchmarks.speed.turns import Keep, Key, Results

ALONE, BUSY, TWO = "alone", "busy core", "two"
CONDITIONS = (ALONE, BUSY, TWO)
_SPIN = "while True: pass"
_BUSY_CHILD = "busy-core"


def measure(
    setup: Setup,
    arms: Sequence[str],
    found: Mapping[str, Found],
    workload: Workload,
    *,
    rows: int,
    repeats: int,
    keep: Keep,
) -> Results:
    """By arm, its peer's facts and its tokens a second in each condition at so many rows, of both engines together."""
    return _Neighbours(setup, found, workload, rows).run(arms, CONDITIONS, repeats, warm_up=True, keep=keep)


class _Neighbours(Engines):
    kind = "neighbours"
    keys = "conditions"

    def __init__(self, setup: Setup, found: Mapping[str, Found], workload: Workload, rows: int) -> None:
        super().__init__(setup, found, workload)
        self._rows = rows

    def open(self, peer: str) -> dict[str, Any]:
        """The second engine, too, and what keeps a core busy; both are frozen but for their turns."""
        if _BUSY_CHILD not in self.children:
            busy = Child([sys.executable, "-c", _SPIN], env={}, log=self.log(_BUSY_CHILD))
            self.children[_BUSY_CHILD] = busy
            busy.freeze()
        facts = self.load(peer, peer)
        self.load(peer, _twin(peer))
        self.children[_twin(peer)].freeze()
        return facts

    def turn(self, arm: str, key: Key, repeat: int) -> dict[str, Any]:
        peer = ARMS[arm].peer
        if key == BUSY:
            with self.children[_BUSY_CHILD].awake():
                return self._batches(arm, [peer], repeat)
        if key == TWO:
            with self.children[_twin(peer)].awake():
                return self._batches(arm, [peer, _twin(peer)], repeat)
        return self._batches(arm, [peer], repeat)

    def figures(self, key: str, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        del key
        rates = [turn["num_tokens"] / turn["seconds"] for turn in turns]
        seconds = [turn["seconds"] for turn in turns]
        return {"num_tokens": turns[0]["num_tokens"], "tokens_per_s": spread(rates), "seconds": seconds}

    def _batches(self, arm: str, names: Sequence[str], repeat: int) -> dict[str, Any]:
        """A batch by each of these children at the same time, until the last is done."""
        steer, new_tokens = objectives(ARMS[arm], self.setup.heads), self.workload.new_tokens

        def generate(number: int, name: str) -> int:
            prompts = self.workload.prompts(self._rows, "neighbours", repeat, number)
            seed = self.workload.seed_of("neighbours", repeat, number)
            return self.generate(name, prompts, new_tokens, seed, steer)["num_tokens"]

        started_s = time.perf_counter()
        with ThreadPoolExecutor(len(names)) as pool:
            counts = list(pool.map(generate, range(len(names)), names))
        return {"num_tokens": sum(counts), "seconds": time.perf_counter() - started_s}


def _twin(peer: str) -> str:
    return f"{peer}-second"
