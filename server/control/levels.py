"""Targets and floors from the mean reward that a request asks for to the levels at which values are held.

Control acts at every token, so a value that is held a little above its mean gives responses of a much higher reward;
what gives what is measured and stands in a head's card (`value_models.calibration.RewardLevels`). The levels change
once, before a request is queued, so that engines, plans and kernels see levels of the value alone. A head without a
calibration takes the number as a level of its value, which `uncalibrated` tells. Knows nothing of HTTP. Enter at
`in_values`.
"""

from __future__ import annotations

from collections.abc import Mapping

from server.control.objectives import MAX_ABS_LEVEL, Floor, HeadsObjective, Instruction, Target
from server.control.params import ControlParams
from server.control.turns import Turn
from server.errors import InvalidRequestError
from value_models.calibration import RewardLevels

RewardMaps = Mapping[str, RewardLevels]
"""By name, of the heads that are calibrated."""


def in_values(control: ControlParams, maps: RewardMaps, turn: Turn | None = None) -> ControlParams:
    """The same control at a turn, by default the first, with targets and floors as levels of the value.

    Raises InvalidRequestError, which names the field, for a reward that control has not reached when the head was
    calibrated: a target beyond either end, or a floor, now or at a later turn, above the highest.
    """
    turn = turn or Turn()
    objective, field = _levelled(control)
    if objective is None or objective.unit == "value":
        return control.at_turn(turn)
    _check_unit(objective, maps, field)
    used = {name: maps[name] for name in objective.head_levels if name in maps}
    _check_reach(control, objective, used, field)
    worst = {name: used[name].reward_of(value) if name in used else value for name, value in turn.worst.items()}
    control = control.at_turn(turn, worst)
    objective, _ = _levelled(control)
    assert objective is not None
    levels = {
        name: _level(used[name], reward) if name in used else reward for name, reward in objective.head_levels.items()
    }
    return _with(control, objective.model_copy(update={_field(objective): levels, "unit": "value"}))


UNCALIBRATED = (
    "The value head {name!r} is uncalibrated: its target or floor is a level of its value, and responses may have "
    "quite another reward."
)
"""What to tell whoever asked for a target or floor of a head that `uncalibrated` names."""


def uncalibrated(control: ControlParams | None, maps: RewardMaps) -> list[str]:
    """The heads whose target or floor is asked for in reward, and taken as a level of the value."""
    objective, _ = (None, "") if control is None else _levelled(control)
    if objective is None or objective.unit == "value":
        return []
    return [name for name in objective.head_levels if name not in maps]


def _level(known: RewardLevels, reward: float) -> float:
    """What gives a reward. What earlier answers reached may lie above all that was measured, and a floor so far below
    it that its level is none that may be asked for: the lowest of those holds nothing either."""
    return max(known.level_of(min(reward, known.rewards[-1])), -MAX_ABS_LEVEL)


def _levelled(control: ControlParams) -> tuple[Target | Floor | None, str]:
    """Its objective that has levels, and the field where they are."""
    objective, where = control.heads_objective, "control.objective"
    if isinstance(control.objective, Instruction):
        where = f"{where}.beside"
    return (objective, f"{where}.{_field(objective)}") if isinstance(objective, Target | Floor) else (None, "")


def _field(objective: HeadsObjective) -> str:
    return "values" if isinstance(objective, Target) else "floors"


def _with(control: ControlParams, objective: Target | Floor) -> ControlParams:
    if isinstance(control.objective, Instruction):
        return control.model_copy(update={"objective": control.objective.model_copy(update={"beside": objective})})
    return control.model_copy(update={"objective": objective})


def _check_unit(objective: Target | Floor, maps: RewardMaps, field: str) -> None:
    """Whoever says that it is a reward must get one. Raises InvalidRequestError."""
    missing = [name for name in objective.head_levels if name not in maps]
    if missing and "unit" in objective.model_fields_set:
        name = f"{field.rpartition('.')[0]}.unit"
        raise InvalidRequestError(
            f"{name}: the head {missing[0]!r} is uncalibrated (`recontrol calibrate {missing[0]}`), so its level can "
            "only be a value",
            param=name,
        )


def _check_reach(control: ControlParams, objective: Target | Floor, used: RewardMaps, field: str) -> None:
    """Raises InvalidRequestError."""
    rules = {} if control.over_turns is None else control.over_turns.floors or {}
    for name, known in used.items():
        asked = {f"{field}.{name}": objective.head_levels[name]}
        if isinstance(objective, Floor) and name in rules and (highest := rules[name].to) is not None:
            asked[f"control.over_turns.floors.{name}.to"] = highest
        low = known.rewards[0] if isinstance(objective, Target) else -float("inf")
        for param, reward in asked.items():
            if not low <= reward <= known.rewards[-1]:
                raise InvalidRequestError(
                    f"{param}: control was not seen to reach a mean reward of {reward:g}; allowed are "
                    f'{_range(known, objective)}, or a level of the value with unit "value"',
                    param=param,
                )


def _range(known: RewardLevels, objective: Target | Floor) -> str:
    highest = f"{known.rewards[-1]:.6g}"
    return f"{known.rewards[0]:.6g} to {highest}" if isinstance(objective, Target) else f"at most {highest}"
