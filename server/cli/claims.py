"""What a comparison of methods claims for the head, and how sure that is, as plain data.

Enter at `claims`, of arms on test prompts, and at `areas` and `compute_areas`, of the sweep on validation prompts.

Shapes: Q strengths, P prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from server.cli.methods import HEAD
from server.cli.strengths import Point, Sweep
from value_models.areas import Curve, Frontier, area, area_over, shared_bound
from value_models.claims import holm

MAX_TIMES = 8.0
"""What methods are compared up to, in the base model's compute: as much as its best of eight takes."""


def claims(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How far the head is above each rival, by the reward and each judge, with p-values corrected for their number."""
    made = [
        {"over": rival, "metric": metric, **figure}
        for rival, gains in arms[HEAD.label]["gain_over"].items()
        for metric, figure in gains.items()
    ]
    return [
        claim | {"holm": corrected} for claim, corrected in zip(made, holm([claim["p"] for claim in made]), strict=True)
    ]


def areas(sweep: Sweep) -> dict[str, Any]:
    """What each method that is matched to the head's divergence earns over all divergences that all of these reach.

    Gains of reward over the base model on validation prompts (value_models/areas.py), with the head's over each rival.
    Nothing where one of them does not diverge.
    """
    (base,) = sweep.points["base"]
    curves = {
        name: Curve.of(_by_prompt(sweep.points[name], "kl"), _by_prompt(sweep.points[name], "reward"), _rewards(base))
        for name in sweep.matched
    }
    bound = shared_bound(curves.values())
    if bound <= 0:
        return {}
    return {
        "max_kl": round(bound, 4),
        "gain": {name: area(curve, bound) for name, curve in curves.items()},
        "head_over": {
            name: area_over(curves[HEAD.name], curve, bound) for name, curve in curves.items() if name != HEAD.name
        },
    }


def compute_areas(sweep: Sweep) -> dict[str, Any]:
    """What each method earns over all amounts of compute up to MAX_TIMES the base model's, as `areas` has it.

    Compute is tokens that the model is run over. Strengths that may not be a method's best do not count, and neither
    does what takes more.
    """
    (base,) = sweep.points["base"]
    frontiers = {
        name: Frontier(
            np.array([point.mean("forwarded") / base.mean("forwarded") for point in points]),
            _by_prompt(points, "reward") - _rewards(base) if points else np.zeros((0, len(_rewards(base)))),
        )
        for name, allowed in sweep.allowed.items()
        for points in [[point for point, is_allowed in zip(sweep.points[name], allowed, strict=True) if is_allowed]]
    }
    return {
        "max_times": MAX_TIMES,
        "gain": {name: area(frontier, MAX_TIMES) for name, frontier in frontiers.items()},
        "head_over": {
            name: area_over(frontiers[HEAD.name], frontier, MAX_TIMES)
            for name, frontier in frontiers.items()
            if name != HEAD.name
        },
        "times": {name: frontier.times_Q.round(2).tolist() for name, frontier in frontiers.items()},
    }


def show_claims(result: dict[str, Any]) -> None:
    """A line for each claim and area."""
    for claim in result["claims"]:
        where = f"head over {claim['over']}, {claim['metric']}:"
        print(f"{where:60}{claim['mean']:+.3f} [{claim['low']:+.3f}, {claim['high']:+.3f}]  Holm p {claim['holm']:.5f}")
    for name, figure in result["areas"].get("gain", {}).items():
        print(f"area up to {result['areas']['max_kl']:.3f} nats, {name}: {figure['mean']:+.3f}")
    for name, figure in result["compute_areas"]["gain"].items():
        print(f"area up to {MAX_TIMES:g} times the base model's compute, {name}: {figure['mean']:+.3f}")


def _by_prompt(points: Sequence[Point], metric: str) -> np.ndarray:
    """[Q, P]"""
    return np.array([point.figures["by_prompt"][metric] for point in points])


def _rewards(point: Point) -> np.ndarray:
    """[P]"""
    return np.array(point.figures["by_prompt"]["reward"])
