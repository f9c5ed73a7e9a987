"""Studies of one head: all methods with a picture of their sweep, costs, the corners of the allowed ranges, and
RE-Control by step size and steps.

A study runs on an `EvalSetup`, gives a result of plain data, saves it with the head, and shows it. Enter at one of the
studies.
"""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

from tqdm import tqdm

from benchmarks.quality.added_rows import with_rows
from benchmarks.quality.plots import plot_map, plot_pareto
from benchmarks.quality.rivals import RE_CONTROL, re_control
from server.cli.asked import ASKED
from server.cli.comparison import EvalSetup, MethodsStudy, for_card, show_arms
from server.control.params import MAX_KL_NATS, MAX_SHIFT_RATIO, MAX_STEP_SIZE, MAX_STEPS, ControlParams
from value_models.files import write_text
from value_models.store import MAP_FILE, SWEEP_FILE, save_card

_NUM_COST_PROMPTS, _NUM_COST_ROUNDS = 16, 2
_MAP_FACTORS = (0.3, 1.0, 3.0, 10.0)
_MAP_STEPS = (10, 30, 100)
_NUM_MAP_PROMPTS = 24
_MAP_METRICS = ("reward", "diversity", "coherence", "nll", "kl")


class SweptMethodsStudy(MethodsStudy):
    """Keeps the sweep, which is of validation prompts, beside the card, with its plot.

    With `adds_rows` other methods that the card and the sweep hold stay there; see added_rows.py.
    """

    def __init__(self, setup: EvalSetup, *, adds_rows: bool = False) -> None:
        super().__init__(setup)
        self._adds_rows = adds_rows

    def save(self, result: dict[str, Any]) -> None:
        kept = (self.setup.card().evaluation or {}).get(result["test_set"]) if self._adds_rows else None
        super().save(result if kept is None else with_rows(kept, for_card(result)))
        # Of the same sweep other test sets may have fewer methods.
        if self.setup.split == "test":
            fields = ("test_set", "num_tuning_prompts", "strengths", "sweep", "sampling", "command")
            judges = list(self.setup.scoring.without(ASKED).judges)
            sweep = {name: result[name] for name in fields} | {"judges": judges}
            path = self.setup.folder / SWEEP_FILE
            if self._adds_rows and path.exists():
                there = json.loads(path.read_text())
                sweep = there | {"sweep": there["sweep"] | sweep["sweep"]}
            write_text(path, json.dumps(sweep, indent=1) + "\n")
            plot_pareto(sweep, path.with_suffix(".svg"), title=self.setup.subject.head)


class CostStudy:
    """What a response of each method takes: sampled anew on test prompts, by turns, so that all meet the same machine.

    Worth its figures only on a machine that does nothing else.
    """

    def __init__(self, setup: EvalSetup) -> None:
        self._setup = setup

    def run(self) -> dict[str, Any]:
        setup, _ = self._setup.with_best_instruction()
        arms = setup.arms(setup.strengths().sweep())
        prompts = setup.prompts[:_NUM_COST_PROMPTS]
        spent_s: dict[str, list[float]] = {name: [] for name in arms}
        for _ in tqdm(range(_NUM_COST_ROUNDS), unit="round", leave=False):
            for name, arm in arms.items():
                samples = arm.sampler(prompts, setup.num_samples * arm.best_of)
                spent_s[name].append(sum(sample.wall_s for sample in samples) / len(prompts) / setup.num_samples)
        figures = {
            name: {
                "response_s": round(statistics.median(seconds), 4),
                "over_base": round(statistics.median(a / b for a, b in zip(seconds, spent_s["base"], strict=True)), 3),
            }
            for name, seconds in spent_s.items()
        }
        return {"arms": figures, "num_rounds": _NUM_COST_ROUNDS, **setup.describe(), "num_prompts": len(prompts)}

    def save(self, result: dict[str, Any]) -> None:
        save_card(self._setup.folder, self._setup.card().model_copy(update={"cost": result}))

    def show(self, result: dict[str, Any]) -> None:
        for name, figures in result["arms"].items():
            print(f"{name:28}{figures['response_s']:.3f} s a response, {figures['over_base']:.2f} of base")


class StressStudy:
    """Base, and the largest steps, shift and budget that a request may ask for, either way."""

    def __init__(self, setup: EvalSetup) -> None:
        self._setup = setup

    def run(self) -> dict[str, Any]:
        setup = self._setup
        corner = {"step_size": MAX_STEP_SIZE, "steps": MAX_STEPS, "max_shift": MAX_SHIFT_RATIO}
        factory = setup.subject.factory
        arms = {"base": factory.base()}
        for weight in (1.0, -1.0):
            for max_kl in (ControlParams.model_fields["max_kl"].default, MAX_KL_NATS):
                control = ControlParams.for_head(setup.subject.head, weight=weight, max_kl=max_kl, **corner)
                arms[f"weight {weight:+.0f}, max_kl {max_kl}"] = factory.control(control)
        return {"arms": setup.compare(arms), **setup.describe(), "control": corner}

    def save(self, result: dict[str, Any]) -> None:
        save_card(self._setup.folder, self._setup.card().model_copy(update={"stress": for_card(result)}))

    def show(self, result: dict[str, Any]) -> None:
        show_arms(result)


class MapStudy:
    """RE-Control as published at many step sizes and numbers of steps, on validation prompts: without a budget, and
    with the same edits under the head's."""

    def __init__(self, setup: EvalSetup) -> None:
        self._setup = setup

    def run(self) -> dict[str, Any]:
        middle = self._setup.strengths().matched(RE_CONTROL)
        budget = self._setup.subject.max_kl
        step_sizes = [float(f"{middle * factor:.2g}") for factor in _MAP_FACTORS]
        maps = {
            name: [[self._cell(size, steps, max_kl) for steps in _MAP_STEPS] for size in step_sizes]
            for name, max_kl in (("without budget", math.inf), ("with budget", budget))
        }
        return {"step_sizes": step_sizes, "steps": list(_MAP_STEPS), "max_kl": budget, "maps": maps}

    def save(self, result: dict[str, Any]) -> None:
        self._setup.card()
        path = self._setup.folder / MAP_FILE
        write_text(path, json.dumps(result, indent=1) + "\n")
        plot_map(result, path.with_suffix(".svg"), title=self._setup.subject.head)

    def show(self, result: dict[str, Any]) -> None:
        for name, rows in result["maps"].items():
            print(name)
            for size, row in zip(result["step_sizes"], rows, strict=True):
                cells = (f"{cell['reward']:.2f} ({cell['diversity']:.2f})" for cell in row)
                print(f"  {size:<8g}", "  ".join(cells))

    def _cell(self, step_size: float, steps: int, max_kl: float) -> dict[str, float]:
        arm = re_control(self._setup.subject.factory, step_size=step_size, steps=steps, max_kl=max_kl)
        figures = self._setup.tune({f"{step_size:g} x {steps}": arm}, num_prompts=_NUM_MAP_PROMPTS)
        (cell,) = figures.values()
        return {metric: cell[metric]["mean"] for metric in _MAP_METRICS}
