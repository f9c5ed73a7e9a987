"""Peers by turns: each in a process of its own that is frozen while another one is measured.

Knows nothing of what is measured; `offline` and `online` say it. Enter at `Turns.run`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from benchmarks.speed.peers import ARMS, Found
from benchmarks.speed.process import Child, PeerError
from benchmarks.speed.setup import Setup, Workload

WARM_UP = -1
"""The repeat that is run but not kept."""
Key = float | str
"""What a turn is of: a batch size, a rate, a length, or a condition's name."""
Results = dict[str, dict[str, Any]]
"""By arm."""
Keep = Callable[[Results], object]
"""Takes what has been measured so far."""


class Turns(ABC):
    """One part of the benchmark."""

    kind: ClassVar[str]
    keys: ClassVar[str]
    """What results call figures by key."""

    def __init__(self, setup: Setup, found: Mapping[str, Found], workload: Workload) -> None:
        self.setup = setup
        self.found = found
        self.workload = workload
        self.children: dict[str, Child] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    @abstractmethod
    def open(self, peer: str) -> dict[str, Any]:
        """Start a peer, put it into `children` at once, and wait until it is ready. Facts. Raises PeerError."""

    @abstractmethod
    def turn(self, arm: str, key: Key, repeat: int) -> dict[str, Any]:
        """The figures of one turn of a peer that is awake. Raises PeerError."""

    @abstractmethod
    def figures(self, key: str, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What is told of a key's repeats, of which there is one at least."""

    def last_facts(self, peer: str) -> dict[str, Any]:
        """What only the peer itself can tell, when all turns are over. Raises PeerError."""
        del peer
        return {}

    def run(self, arms: Sequence[str], keys: Sequence[Key], repeats: int, *, warm_up: bool, keep: Keep) -> Results:
        """By arm: facts of its peer, and under `keys` the figures by key. `keep` gets them after every turn.

        A peer that fails says so under `failed` and keeps what it had; the others go on.
        """
        done: dict[str, dict[str, list[dict[str, Any]]]] = {arm: {} for arm in arms}
        peers = list(dict.fromkeys(ARMS[arm].peer for arm in arms))
        # Every arm comes first once in a while.
        turns = [
            (key, repeat, arm)
            for repeat in range(WARM_UP if warm_up else 0, repeats)
            for key in keys
            for arm in [*arms[repeat % len(arms) :], *arms[: repeat % len(arms)]]
        ]
        try:
            for peer in (progress := tqdm(peers, desc=f"{self.kind}: start", unit="peer")):
                progress.set_postfix_str(peer)
                self._start(peer)
            for key, repeat, arm in (progress := tqdm(turns, desc=self.kind, unit="turn")):
                progress.set_postfix_str(f"{arm} {_label(key)}")
                figures = self._turn(arm, key, repeat)
                if figures is not None and repeat != WARM_UP:
                    done[arm].setdefault(_label(key), []).append(figures)
                    keep(self._results(done))
            for peer in peers:
                self._finish(peer)
        finally:
            for child in self.children.values():
                child.end()
        return self._results(done)

    def _results(self, done: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]]) -> Results:
        return {
            arm: {
                **self._facts[ARMS[arm].peer],
                self.keys: {key: self.figures(key, turns) for key, turns in by_key.items()},
            }
            for arm, by_key in done.items()
        }

    def log(self, peer: str) -> Path:
        return self.setup.work / "logs" / f"{peer}-{self.kind}.log"

    def _start(self, peer: str) -> None:
        self._facts[peer] = {}
        try:
            self._facts[peer] = self.open(peer)
            self.children[peer].freeze()
        except (PeerError, OSError) as error:
            self._fail(peer, error)

    def _turn(self, arm: str, key: Key, repeat: int) -> dict[str, Any] | None:
        """None when the peer has failed, now or before."""
        peer = ARMS[arm].peer
        if "failed" in self._facts[peer]:
            return None
        try:
            with self.children[peer].awake():
                return self.turn(arm, key, repeat)
        except PeerError as error:
            self._fail(peer, error)
            return None

    def _finish(self, peer: str) -> None:
        """Memory is the most that it held in all of its life."""
        if "failed" in self._facts[peer]:
            return
        child = self.children[peer]
        try:
            with child.awake():
                self._facts[peer] |= self.last_facts(peer)
                self._facts[peer] |= {"peak_rss_bytes": child.peak_rss_bytes(), "idle_cpu_s": child.idle_cpu_s}
        except PeerError as error:
            self._fail(peer, error)

    def _fail(self, peer: str, error: Exception) -> None:
        """It is left out from now on, and takes nothing from the others."""
        tqdm.write(f"{self.kind}: {peer} failed: {error}")
        self._facts[peer]["failed"] = str(error)
        if (child := self.children.pop(peer, None)) is not None:
            child.end()


def _label(key: Key) -> str:
    return key if isinstance(key, str) else f"{key:g}"
