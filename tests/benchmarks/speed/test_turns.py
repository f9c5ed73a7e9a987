"""Turns among peers that need no process: what is kept on the way, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.process import PeerError
from benchmarks.speed.setup import Setup, Workload
from benchmarks.speed.turns import Key, Results, Turns


class Child:
    idle_cpu_s = 0.0

    def freeze(self) -> None: ...

    def end(self) -> None: ...

    def peak_rss_bytes(self) -> int:
        return 1

    @contextmanager
    def awake(self) -> Iterator[None]:
        yield


class Counting(Turns):
    kind = "counting"
    keys = "sizes"

    def open(self, peer: str) -> dict[str, Any]:
        self.children[peer] = Child()  # type: ignore[assignment]
        return {"startup_s": 1.0}

    def turn(self, arm: str, key: Key, repeat: int) -> dict[str, Any]:
        if key == 2 and arm == "vllm":
            raise PeerError("out of memory")
        return {"repeat": repeat}

    def figures(self, key: str, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"size": key, "repeats": [turn["repeat"] for turn in turns]}


@pytest.fixture
def kept() -> list[Results]:
    return []


@pytest.fixture
def results(kept: list[Results], tmp_path: Path) -> Results:
    setup = Setup.__new__(Setup)
    workload = Workload([0], 1, 1, 0)
    return Counting(setup, {}, workload).run(["recontrol", "vllm"], [1, 2], 2, warm_up=True, keep=kept.append)


def test_figures_are_those_of_every_repeat_but_the_first_that_warms_up(results: Results) -> None:
    assert results["recontrol"]["sizes"] == {
        "1": {"size": "1", "repeats": [0, 1]},
        "2": {"size": "2", "repeats": [0, 1]},
    }


def test_what_is_measured_is_kept_after_every_turn(results: Results, kept: list[Results]) -> None:
    assert [list(one["recontrol"]["sizes"]) for one in kept] == [["1"], ["1", "2"], ["1", "2"], ["1", "2"]]
    assert kept[-1]["recontrol"]["sizes"] == results["recontrol"]["sizes"]


def test_a_peer_that_fails_says_why_and_the_others_go_on(results: Results) -> None:
    assert results["vllm"] == {"startup_s": 1.0, "failed": "out of memory", "sizes": {}}
