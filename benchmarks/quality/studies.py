"""What `recontrol eval` can ask of a head: all methods compared, the corners of the allowed ranges, step size by steps.

A study runs on an `EvalSetup`, gives a result of plain data, saves it with the head, and shows it. Enter at one of the
studies.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from server.cli.arms import ArmFactory
from server.cli.plots import plot_map, plot_pareto
from server.cli.strengths import Method, StrengthSearch, Sweep
from server.errors import ConfigurationError
from server.types import MAX_KL_NATS, MAX_SHIFT_RATIO, MAX_STEP_SIZE, MAX_STEPS, ControlParams
from value_models.evaluation import Arm, Comparisons, Scoring, evaluate_arms
from value_models.generations import GenerationStore
from value_models.rollouts import RolloutPrompt
from value_models.store import MAP_FILE, SWEEP_FILE, HeadCard, load_card, save_card
from value_models.whole_files import write_text

_HEAD, _PROMPTING = Method.HEAD.label, Method.PROMPTING.label
_WITH_PROMPTING = f"{_HEAD} + {_PROMPTING}"
_COMPARISONS = {
    _HEAD: ("base", _PROMPTING, Method.STATIC_VECTOR.label, "best of 4"),
    _WITH_PROMPTING: (_PROMPTING, _HEAD),
}
_NUM_TUNING_PROMPTS = 48
_NUM_COST_PROMPTS, _NUM_COST_ROUNDS = 16, 2
_MAP_FACTORS = (0.3, 1.0, 3.0, 10.0)
_MAP_STEPS = (10, 30, 100)
_NUM_MAP_PROMPTS = 24
_MAP_METRICS = ("reward", "diversity", "coherence", "nll", "kl")


@dataclass(slots=True, frozen=True)
class EvalSetup:
    """A head with everything it is measured with."""

    head: str
    tensors_sha256: str
    """Of the head that is measured: what is saved must be its own."""
    factory: ArmFactory
    scoring: Scoring
    store: GenerationStore
    prompts: Sequence[RolloutPrompt]
    tuning_prompts: Sequence[RolloutPrompt]
    split: str
    test_set: str
    num_samples: int
    instruction: str | None
    step_size: float
    max_kl: float
    methods: Collection[Method]
    """Those that take part, besides the head."""

    def compare(self, arms: Mapping[str, Arm], comparisons: Comparisons | None = None) -> dict[str, Any]:
        """On the test prompts."""
        return self._evaluate(arms, self.prompts, self.num_samples, comparisons or {})

    def tune(self, arms: Mapping[str, Arm], *, num_prompts: int = _NUM_TUNING_PROMPTS) -> dict[str, Any]:
        """On validation prompts, one response each."""
        return self._evaluate(arms, self.tuning_prompts[:num_prompts], 1, {})

    def strengths(self) -> StrengthSearch:
        return StrengthSearch(
            self.factory,
            self.tune,
            head=self.head,
            step_size=self.step_size,
            max_kl=self.max_kl,
            instruction=self.instruction,
            methods=self.methods,
        )

    def card(self, folder: Path) -> HeadCard:
        """As it is now: other figures may have come meanwhile, but no other head. Raises ConfigurationError."""
        card = load_card(folder)
        if card.tensors_sha256 != self.tensors_sha256:
            raise ConfigurationError(f"{folder} holds another head than when the evaluation began; nothing is saved")
        return card

    def describe(self) -> dict[str, Any]:
        return {
            "judges": list(self.scoring.judges),
            "test_set": self.test_set,
            "split": self.split,
            "num_prompts": len(self.prompts),
            "num_tuning_prompts": min(len(self.tuning_prompts), _NUM_TUNING_PROMPTS),
        }

    def _evaluate(
        self,
        arms: Mapping[str, Arm],
        prompts: Sequence[RolloutPrompt],
        num_samples: int,
        comparisons: Comparisons,
    ) -> dict[str, Any]:
        with tqdm(unit="response", leave=False) as bar:

            def on_arm(name: str, num_responses: int) -> None:
                bar.set_description(name)
                bar.reset(total=num_responses)

            return evaluate_arms(
                arms,
                prompts,
                self.scoring,
                num_samples=num_samples,
                store=self.store,
                comparisons=comparisons,
                on_arm=on_arm,
                on_sample=bar.update,
            )


class MethodsStudy:
    """Every method on the test prompts, at strengths that were set on validation prompts."""

    def __init__(self, setup: EvalSetup) -> None:
        self._setup = setup

    def run(self) -> dict[str, Any]:
        setup, strengths = self._setup, self._setup.strengths()
        sweep = strengths.sweep()
        figures = setup.compare(_arms(setup, strengths, sweep), _COMPARISONS)
        return {
            "arms": figures,
            **setup.describe(),
            "control": {"step_size": setup.step_size, "max_kl": setup.max_kl},
            "strengths": {"equal_divergence": _plain(sweep.matched), "best": _plain(sweep.best)},
            "sweep": {str(method): [asdict(point) for point in points] for method, points in sweep.points.items()},
        }

    def save(self, folder: Path, result: dict[str, Any]) -> None:
        """The table in the card, by test set; the sweep, which is of validation prompts, beside it with its plot."""
        card = self._setup.card(folder)
        evaluation = (card.evaluation or {}) | {result["test_set"]: _for_card(result)}
        save_card(folder, card.model_copy(update={"evaluation": evaluation}))
        if self._setup.split != "all":
            kept = ("test_set", "num_tuning_prompts", "judges", "strengths", "sweep", "sampling", "command")
            sweep = {name: result[name] for name in kept}
            write_text(folder / SWEEP_FILE, json.dumps(sweep, indent=1) + "\n")
            plot_pareto(sweep, folder / SWEEP_FILE.replace(".json", ".svg"), title=self._setup.head)

    def show(self, result: dict[str, Any]) -> None:
        _show(result)


class CostStudy:
    """What a response of each method takes: sampled anew on test prompts, by turns, so that all meet the same machine.

    Worth its figures only on a machine that does nothing else.
    """

    def __init__(self, setup: EvalSetup) -> None:
        self._setup = setup

    def run(self) -> dict[str, Any]:
        setup, strengths = self._setup, self._setup.strengths()
        arms = _arms(setup, strengths, strengths.sweep())
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

    def save(self, folder: Path, result: dict[str, Any]) -> None:
        save_card(folder, self._setup.card(folder).model_copy(update={"cost": result}))

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
        arms = {"base": setup.factory.base()}
        for weight in (1.0, -1.0):
            for max_kl in (ControlParams.model_fields["max_kl"].default, MAX_KL_NATS):
                control = ControlParams.for_head(setup.head, weight=weight, max_kl=max_kl, **corner)
                arms[f"weight {weight:+.0f}, max_kl {max_kl}"] = setup.factory.control(control)
        return {"arms": setup.compare(arms), **setup.describe(), "control": corner}

    def save(self, folder: Path, result: dict[str, Any]) -> None:
        save_card(folder, self._setup.card(folder).model_copy(update={"stress": _for_card(result)}))

    def show(self, result: dict[str, Any]) -> None:
        _show(result)


class MapStudy:
    """RE-Control as published at many step sizes and numbers of steps, on validation prompts: without a budget, and
    with the same edits under the head's."""

    def __init__(self, setup: EvalSetup) -> None:
        self._setup = setup

    def run(self) -> dict[str, Any]:
        setup, strengths = self._setup, self._setup.strengths()
        middle = strengths.matched(Method.RE_CONTROL)
        step_sizes = [float(f"{middle * factor:.2g}") for factor in _MAP_FACTORS]
        maps = {
            name: [[self._cell(size, steps, max_kl) for steps in _MAP_STEPS] for size in step_sizes]
            for name, max_kl in (("without budget", math.inf), ("with budget", setup.max_kl))
        }
        return {"step_sizes": step_sizes, "steps": list(_MAP_STEPS), "max_kl": setup.max_kl, "maps": maps}

    def save(self, folder: Path, result: dict[str, Any]) -> None:
        self._setup.card(folder)
        write_text(folder / MAP_FILE, json.dumps(result, indent=1) + "\n")
        plot_map(result, folder / MAP_FILE.replace(".json", ".svg"), title=self._setup.head)

    def show(self, result: dict[str, Any]) -> None:
        for name, rows in result["maps"].items():
            print(name)
            for size, row in zip(result["step_sizes"], rows, strict=True):
                cells = (f"{cell['reward']:.2f} ({cell['diversity']:.2f})" for cell in row)
                print(f"  {size:<8g}", "  ".join(cells))

    def _cell(self, step_size: float, steps: int, max_kl: float) -> dict[str, float]:
        arm = self._setup.factory.control_without_limits(
            Method.RE_CONTROL.value, step_size=step_size, steps=steps, max_kl=max_kl
        )
        figures = self._setup.tune({f"{step_size:g} x {steps}": arm}, num_prompts=_NUM_MAP_PROMPTS)
        (cell,) = figures.values()
        return {metric: cell[metric]["mean"] for metric in _MAP_METRICS}


def _arms(setup: EvalSetup, strengths: StrengthSearch, sweep: Sweep) -> dict[str, Arm]:
    """Base first, then every method at the strengths that the sweep found."""
    arms = {"base": setup.factory.base()}
    for method in (Method.PROMPTING, Method.BEST_OF, Method.BLOCKWISE, Method.CONTROLLED_DECODING):
        if method in setup.methods:
            is_best_of = method in (Method.BEST_OF, Method.BLOCKWISE)
            strength = 4.0 if is_best_of else sweep.best.get(method, 0.0)
            arms[f"{method.label} 4" if is_best_of else method.label] = strengths.arm(method, strength)
    for method in (Method.RE_CONTROL, Method.STATIC_VECTOR, Method.HEAD):
        if method in sweep.matched:
            arms[method.label] = strengths.arm(method, sweep.matched[method])
            if sweep.best[method] != sweep.matched[method]:
                arms[f"{method.label}, best strength"] = strengths.arm(method, sweep.best[method])
    if Method.PROMPTING in setup.methods:
        assert setup.instruction is not None
        control = ControlParams.for_head(setup.head, step_size=setup.step_size, max_kl=setup.max_kl)
        arms[_WITH_PROMPTING] = setup.factory.prompting(setup.instruction, control)
    return arms


def _plain(strengths: Mapping[Method, float]) -> dict[str, float]:
    return {method.value: strength for method, strength in strengths.items()}


def _for_card(result: dict[str, Any]) -> dict[str, Any]:
    """Without what only the JSON of a run holds."""
    arms = {
        name: {key: value for key, value in figures.items() if key != "examples" and value != {}}
        for name, figures in result["arms"].items()
    }
    return {name: value for name, value in result.items() if name != "sweep"} | {"arms": arms}


def _show(result: dict[str, Any]) -> None:
    shown = ("reward", *result["judges"], "win_over_base", "diversity", "coherence", "nll", "kl")
    for name, figures in result["arms"].items():
        values = "  ".join(f"{metric} {figures[metric]['mean']:.3f}" for metric in shown)
        print(f"{name:28}{values}  {figures['wall_s']:.0f} s")
