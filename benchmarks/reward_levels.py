"""The reward that a target or a floor asks for beside the one that responses get, before calibration and after.

python -m benchmarks.reward_levels positive,plain --out benchmarks/results/reward-levels.json --into docs/control.md

Rewards are asked for at some places of the range that each head's calibration reaches, on test prompts, which the
calibration has not seen. Before calibration the number is taken as a level of the value. A floor is held while another
head is raised, which by itself would break it or not. Enter at `RewardLevelsStudy`.

Shapes: P prompts, S responses to each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic_settings import CliPositionalArg

from benchmarks.markdown import header, row, with_range
from benchmarks.study import Study
from server.cli.arms import ArmFactory
from server.cli.calibrate import STEP_SIZE, Calibrate, rewards_of
from server.cli.command import HeadsModelCommand, read_prompts
from server.cli.program import run
from server.control.levels import in_values
from server.control.objectives import Floor, LevelUnit, Target
from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.errors import ConfigurationError
from value_models.generations import GenerationStore
from value_models.intervals import mean_interval
from value_models.prompt_sets import RolloutPrompt, in_mixed_order, split_of
from value_models.rewards import check_built_in, load_reward
from value_models.rollouts import RolloutSettings

SECTION = "bench-reward-levels"
UNITS: tuple[LevelUnit, ...] = ("value", "reward")
"""Before calibration, and after."""
_TARGETS = (0.1, 0.35, 0.65, 0.9)
_FLOOR = 0.8
"""Places in the calibrated range."""


@dataclass(slots=True, frozen=True)
class Asked:
    """A reward that is asked of a head, as a target, or as a floor while another head is raised."""

    head: str
    reward: float
    raised: str | None = None

    def control(self, unit: LevelUnit) -> ControlParams:
        level = {self.head: self.reward}
        if self.raised is None:
            return ControlParams(objective=Target(type="target", values=level, unit=unit), step_size=STEP_SIZE)
        objective = Floor(type="floor", weights={self.raised: 1.0}, floors=level, unit=unit)
        return ControlParams(objective=objective, step_size=STEP_SIZE)


class RewardLevelsStudy(Study, HeadsModelCommand):
    """Ask heads for mean rewards by targets and floors, and measure what responses get."""

    section: ClassVar[str] = SECTION

    heads_asked: CliPositionalArg[list[str]] = Field(description="comma-separated; each floor raises the next one")
    places: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)] = Field(
        list(_TARGETS), description="comma-separated; where in the calibrated range targets are, 0 its low end"
    )
    num_prompts: Annotated[int, Field(ge=2)] = 40
    num_samples: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] = 64
    top_p: float = Field(Calibrate.model_fields["top_p"].default, gt=0, le=1, description="as heads are calibrated")
    seed: int = 2
    work: Path = Field(Path("runs/eval"), description="folder for responses, used again by later runs")

    def measure(self) -> dict[str, Any]:
        loaded = self.load()
        registry = self.heads(loaded)
        registry.check(self.heads_asked, param="heads_asked")
        if missing := [name for name in self.heads_asked if name not in registry.calibrations()]:
            raise ConfigurationError(f"heads_asked: {missing[0]} is uncalibrated; run `recontrol calibrate` first")
        chats = read_prompts(None, ["chat"])
        prompts = in_mixed_order(prompt for prompt in chats if split_of(prompt.id) == "test")[: self.num_prompts]
        settings = RolloutSettings(
            num_samples=self.num_samples, max_tokens=self.max_tokens, top_p=self.top_p, seed=self.seed
        )
        factory = ArmFactory(loaded, self.core(loaded, registry), settings)
        asked = list(_asked(self.heads_asked, self.places, registry))
        found = [{"head": one.head, "asked": one.reward, "raised": one.raised,
                  **self._delivered(one, factory, registry, prompts)} for one in asked]  # fmt: skip
        return {"num_prompts": len(prompts), "settings": settings.model_dump(exclude={"prompts_per_shard"}),
                "max_kl": ControlParams.model_fields["max_kl"].default, "rows": found,
                "missed_by": _missed(found)}  # fmt: skip

    def _delivered(
        self, one: Asked, factory: ArmFactory, registry: HeadRegistry, prompts: Sequence[RolloutPrompt]
    ) -> dict[str, Any]:
        """Mean rewards and divergences, with 95% intervals over prompts, without control and by unit."""
        reward = load_reward(check_built_in(registry.cards()[one.head].reward, f"the card of {one.head}"))
        store, texts = GenerationStore(self.work / "responses"), {prompt.id: prompt.text for prompt in prompts}
        controls = {unit: in_values(one.control(unit), registry.calibrations()) for unit in UNITS}
        arms = {"base": factory.base()} | {unit: factory.control(control) for unit, control in controls.items()}
        found: dict[str, Any] = {}
        for name, arm in arms.items():
            samples = store.samples(arm.spec, prompts, self.num_samples, arm.sampler)
            rewards_PS = rewards_of(samples, texts, reward, len(prompts))
            mean_kl = sum(sample.mean_kl for sample in samples) / len(samples)
            found[name] = {"reward": mean_interval(rewards_PS), "kl": round(mean_kl, 4)}
        levels = controls["reward"].objective
        assert isinstance(levels, Target | Floor)
        return {**found, "level": levels.head_levels[one.head]}

    def body(self, result: Mapping[str, Any]) -> str:
        return table(result)


def _asked(heads: Sequence[str], places: Sequence[float], registry: HeadRegistry) -> Iterator[Asked]:
    for index, head in enumerate(heads):
        known = registry.calibrations()[head].rewards
        low, high = known[0], known[-1]
        yield from (Asked(head, round(low + place * (high - low), 2)) for place in places)
        if len(heads) > 1:
            raised = heads[(index + 1) % len(heads)]
            yield Asked(head, round(low + _FLOOR * (high - low), 2), raised)


def _missed(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By head and unit: the mean distance of what targets gave from what was asked for."""
    heads = dict.fromkeys(found["head"] for found in rows)
    targets = {head: [r for r in rows if r["head"] == head and r["raised"] is None] for head in heads}
    return {
        head: {
            unit: round(sum(abs(r[unit]["reward"]["mean"] - r["asked"]) for r in mine) / len(mine), 4) for unit in UNITS
        }
        for head, mine in targets.items()
    }


def table(result: Mapping[str, Any]) -> str:
    """A row for each reward that was asked for."""
    lines = header(["head", "asked", "delivered, calibrated", "delivered, uncalibrated", "level of the value",
                    "without control", "KL, calibrated", "uncalibrated"])  # fmt: skip
    for one in result["rows"]:
        before, after = one["value"], one["reward"]
        kind = "target" if one["raised"] is None else f"floor, `{one['raised']}` raised,"
        lines.append(
            row([f"`{one['head']}`", f"{kind} {one['asked']:.2f}", with_range(after["reward"]),
                 with_range(before["reward"]), f"{one['level']:.3f}", f"{one['base']['reward']['mean']:.2f}",
                 f"{after['kl']:.3f}", f"{before['kl']:.3f}"])
        )  # fmt: skip
    missed = "; ".join(
        f"`{head}` by {by['reward']:.3f} calibrated and {by['value']:.3f} uncalibrated"
        for head, by in result["missed_by"].items()
    )
    settings, system = result["settings"], result["system"]
    told = (
        f"Targets miss, in the mean over those asked for, {missed}. {result['num_prompts']} held-out prompts, "
        f"{settings['num_samples']} responses of at most {settings['max_tokens']} tokens to each, temperature "
        f"{settings['temperature']:g}, top_p {settings['top_p']:g}, max_kl {result['max_kl']:g}, step_size "
        f"{STEP_SIZE:g}; 95% intervals over prompts."
    )
    return "\n".join([*lines, "", told, "", f"`{result['command']}`, {system['cpu']}, {system['date'][:10]}."])


if __name__ == "__main__":
    sys.exit(run("benchmarks.reward_levels:RewardLevelsStudy", "python -m benchmarks.reward_levels", sys.argv[1:]))
