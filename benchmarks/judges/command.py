"""`python -m benchmarks.judges`: the test of judges as flags, and its table. Enter at `Judges`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from benchmarks.markdown import header, row
from benchmarks.study import Study
from server.cli.asked import ASKED
from server.cli.evaluate import JUDGES, KNOWN_JUDGES
from value_models.anchors import ANCHORED
from value_models.metrics import EvalMetric
from value_models.rewards import load_reward

PAIRS_FILE = Path(__file__).parent / "pairs.jsonl"
LEAST_LOW = 0.5
"""A judge by meaning is used only where its 95% interval lies above this, which is what guessing gives."""
_REWARD = "the reward"


class Pair(NamedTuple):
    """Two responses, one of which serves an aim better."""

    aim: str
    better: str
    worse: str


class Judges(Study):
    """Ask the judges of the shipped heads about pairs of responses that no lexicon tells apart."""

    section: ClassVar[str] = "bench-judges"

    def measure(self) -> dict[str, Any]:
        pairs = read_pairs()
        return {"aims": {aim: _figures(aim, [pair for pair in pairs if pair.aim == aim]) for aim in _aims(pairs)}}

    def body(self, result: Mapping[str, Any]) -> str:
        return table(result)


def table(result: Mapping[str, Any]) -> str:
    lines = header(["aim", "pairs", "judge", "reads", "right", "95% interval", "used"])
    for aim, figures in result["aims"].items():
        for name, figure in figures["judges"].items():
            cells = [f"`{aim}`", str(figures["num_pairs"]), _code(name), _kind(name), f"{figure['mean']:.0%}"]
            cells += [
                f"{figure['low']:.0%} to {figure['high']:.0%}",
                "" if name == _REWARD else _used(name, figure),
            ]
            lines.append(row(cells))
    system = result["system"]
    told = f"`{result['command']}`, {system['cpu']}, {system['date'][:10]}, commit {system['commit']}."
    return "\n".join([*lines, "", told])


def read_pairs() -> list[Pair]:
    return [Pair(**json.loads(line)) for line in PAIRS_FILE.read_text(encoding="utf-8").splitlines()]


def _aims(pairs: Sequence[Pair]) -> list[str]:
    return list(dict.fromkeys(pair.aim for pair in pairs))


def _figures(aim: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    judges: dict[str, EvalMetric] = {_REWARD: load_reward(aim), **{name: KNOWN_JUDGES[name] for name in JUDGES[aim]}}
    return {"num_pairs": len(pairs), "judges": {name: _right(judge, pairs) for name, judge in judges.items()}}


def _right(judge: EvalMetric, pairs: Sequence[Pair]) -> dict[str, float]:
    """The share of pairs that a judge puts in order, a tie counting half, with what a response took."""
    responses = [*(pair.better for pair in pairs), *(pair.worse for pair in pairs)]
    judge([""], ["It is."])  # loads what it reads with
    started_s = time.perf_counter()
    scores = np.array(judge([""] * len(responses), responses)).reshape(2, -1)
    response_s = (time.perf_counter() - started_s) / len(responses)
    right_P = (scores[0] > scores[1]) + 0.5 * (scores[0] == scores[1])
    return {**_share_interval(float(right_P.mean()), len(pairs)), "response_s": round(response_s, 5)}


def _share_interval(share: float, number: int) -> dict[str, float]:
    """{mean, low, high} of a share of so many, at 95%, which tells something of a share of one too.

    Source: Wilson 1927.
    """
    z = 1.96
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    return {"mean": share, "low": max(middle - half, 0.0), "high": min(middle + half, 1.0)}


def _kind(name: str) -> str:
    return "meaning" if name in {*ANCHORED, *ASKED} else "words"


def _code(name: str) -> str:
    return name if name == _REWARD else f"`{name}`"


def _used(name: str, figure: Mapping[str, float]) -> str:
    """Judges by words stay beside the others, for what they are: the pairs are made so that words tell little."""
    if name == _REWARD:
        return ""
    return "yes" if _kind(name) == "words" or figure["low"] > LEAST_LOW else "no"
