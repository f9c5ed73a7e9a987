"""The cards of heads that are trained here: what a head was made from, how, and how well it did.

Knows nothing of the command line or of servers. Enter at `trained_card` and `distilled_card`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from value_models.ascent import ADDED_DAMPING
from value_models.critic_choice import CriticFigures
from value_models.distillation import DistilledHead, DistilSettings, InstructedTexts
from value_models.fields import FieldFigures
from value_models.heads import UNIT_COST_NATS, FieldHead, ValueHead
from value_models.store import BaseModelCard, HeadCard, architecture_card
from value_models.training import TrainSettings, ValidationFigures
from value_models.training_data import TrainingData

_NORMALISATION = "mean and standard deviation of each dimension over training states"
_UNIT = f"an ascent of length 1 costs {UNIT_COST_NATS} nats a"
_FEW_PAIRS = 100
"""Of which a share has a standard error of 0.05 and more."""


@dataclass(slots=True, frozen=True)
class SourcePart:
    """One source of a head, and what the head does on its validation prompts."""

    data: TrainingData
    weight: float
    figures: ValidationFigures


def trained_card(
    name: str,
    head: ValueHead,
    parts: Sequence[SourcePart],
    settings: TrainSettings,
    *,
    critic: CriticFigures | None = None,
    field: FieldFigures | None = None,
    reward: str | None = None,
    description: str = "",
    command: str,
) -> HeadCard:
    """Of a head that was fitted to rewards. Of several sources the first stands for it, and all are below `sources`.

    `reward` names that of rollouts, and `command` is what made the head.
    """
    first = parts[0]
    aims = [_aim(part.data, reward) for part in parts]
    data, validation = _data(first.data), first.figures.as_dict()
    if len(parts) > 1:
        data["sources"] = [
            {"kind": part.data.kind, "weight": part.weight, "of": aim, **_data(part.data)}
            for part, aim in zip(parts, aims, strict=True)
        ]
        validation["sources"] = [{"kind": part.data.kind, **part.figures.as_dict()} for part in parts]
    if critic is not None:
        validation["critic"] = critic.as_dict()
    if field is not None:
        validation["field"] = field.as_dict()
    return HeadCard(
        name=name,
        description=description or _capitalised(" and ".join(_effect(part.data, reward) for part in parts)),
        base_model=BaseModelCard(**first.data.base_model),
        architecture=architecture_card(head),
        normalisation=_NORMALISATION,
        metric=_metric_text(settings, [part.data for part in parts], critic) + _field_text(head),
        # Of rollouts their reward alone, by which the head can be evaluated.
        reward=" and ".join(aims) if first.data.is_given else aims[0],
        reward_mean=head.reward_mean,
        reward_scale=head.reward_scale,
        targets=_targets_text(settings, [part.data for part in parts]),
        data=data,
        validation=validation,
        expected=first.figures.expected,
        command=command,
    )


def distilled_card(
    name: str,
    description: str,
    base_model: dict[str, Any],
    texts: InstructedTexts,
    settings: DistilSettings,
    distilled: DistilledHead,
    *,
    instruction: str,
    contrast: str | None,
    command: str,
) -> HeadCard:
    """Of a head that was made from an instruction. `command` is what made it."""
    other = "without it" if contrast is None else f"after {contrast!r}"
    return HeadCard(
        name=name,
        description=description or f"Like answers after {instruction!r} rather than {other}",
        base_model=BaseModelCard(**base_model),
        architecture=architecture_card(distilled.head),
        normalisation=_NORMALISATION,
        metric=f"natural gradient towards the instructed distributions, exact Fisher information, damping "
        f"{distilled.validation['damping']}; {_UNIT} training token",
        reward="instruction",
        reward_mean=distilled.head.reward_mean,
        reward_scale=distilled.head.reward_scale,
        targets="mean over a response's tokens of the log of how much likelier the instruction makes them, in nats "
        f"a token; against the model {other}",
        data={
            "instruction": instruction,
            "contrast": contrast,
            "split": "by a hash of the prompt's id: 80% train, 10% validation, 10% test; of these two prompts at least",
            "prompts": texts.num_prompts,
            "responses": {split: texts.split.count(split) for split in texts.num_prompts},
            "tokens": len(texts.token_ids_N),
            "settings": settings.model_dump(),
        },
        validation=distilled.validation,
        distillation=distilled.distillation,
        command=command,
    )


def figures_text(validation: dict[str, Any]) -> str:
    """A card's figures in a line."""
    rest = {name: value for name, value in validation.items() if name not in ("critic", "field")}
    parts = [_figures_text(rest)]
    if "critic" in validation:
        parts.append(_critic_text(validation["critic"]))
    if "field" in validation:
        parts.append(_field_choice_text(validation["field"]))
    return "; ".join(parts)


def _figures_text(validation: dict[str, Any]) -> str:
    if "sources" in validation:
        return "; ".join(f"of {part['kind']}: {_figures_text(part)}" for part in validation["sources"])
    figures = f"R2 {validation['r2']['all']:.3f}, ascent gain {validation['ascent_gain']:.3f}"
    order = validation.get("order")
    if not order or not order["compared"]:
        return figures
    shares = f"the direction puts {order['by_direction']:.0%} in order and the value {order['by_value']:.0%}"
    if order["what"] == "pairs" and order["compared"] < _FEW_PAIRS:
        shares += f" (they are few: by chance alone such a share is off by {0.5 / math.sqrt(order['compared']):.0%})"
    return f"{figures}; of {order['compared']} {order['what']}, {shares}"


def _critic_text(critic: dict[str, Any]) -> str:
    gains = critic["ascent_gain"]
    text = f"critic {critic['name']} with lambda {critic['advantage_trace']:g}"
    if "explained" in critic:
        text += f", which explains {critic['explained']:.0%} of the reward"
    if others := [f"{gain:.3f} by {name}" for name, gain in gains.items() if name != critic["name"]]:
        _, error = critic["above_value"]
        return f"{text} (the gain would be {others[0]}, and the standard error of the difference is {error:.3f})"
    if "prefix_reward_not_tried" in critic:
        return f"{text} (prefix_reward was not tried: {critic['prefix_reward_not_tried']})"
    return text


def _field_choice_text(field: dict[str, Any]) -> str:
    gains, (margin, error) = field["ascent_gain"], field["above_constant"]
    taken = f"follows the state by components: {field['num_features']}" if field["num_features"] else "is constant"
    return (
        f"the direction {taken} (gain {gains['field']:.3f} with them and {gains['constant']:.3f} without, difference "
        f"{margin:+.4f} with a standard error of {error:.4f})"
    )


def _field_text(head: ValueHead) -> str:
    if not isinstance(head, FieldHead):
        return ""
    components = f"principal components: {head.num_units - 1}"
    return f"; follows the state by {components}, damped {ADDED_DAMPING:g} times as much"


def _aim(data: TrainingData, reward: str | None) -> str:
    if data.is_given:
        return f"{data.kind} of {data.manifest['given']['file']}"
    assert reward is not None
    return reward


def _effect(data: TrainingData, reward: str | None) -> str:
    """What the head makes of responses."""
    if not data.is_given:
        return f"higher {reward}"
    file = data.manifest["given"]["file"]
    if data.kind == "pairs":
        return f"like the chosen responses rather than the rejected ones ({file})"
    return f"like the texts with high scores ({file})"


def _capitalised(phrase: str) -> str:
    return phrase[:1].upper() + phrase[1:]


def _metric_text(settings: TrainSettings, sources: Sequence[TrainingData], critic: CriticFigures | None) -> str:
    tokens = " and ".join(dict.fromkeys("validation" if data.is_given else "training" for data in sources))
    unit = f"{_UNIT} {tokens} token"
    if settings.metric == "covariance":
        return f"correlation of training states, shrunk by {settings.shrinkage} towards the identity; {unit}"
    if settings.metric == "identity":
        return f"identity; {unit}"
    damping = f"damping {settings.damping}"
    if any(data.is_given for data in sources):
        damping += " and that of few tokens"
    if len(sources) > 1:
        ways = ", ".join(_way(data, critic) for data in sources)
        return f"natural gradients of equal cost, added by the sources' weights ({ways}); {damping}; {unit}"
    if sources[0].is_given:
        return f"natural gradient of the {_way(sources[0], critic)}, {damping}; {unit}"
    return f"natural policy gradient, {_way(sources[0], critic)}, {damping}; {unit}"


def _way(data: TrainingData, critic: CriticFigures | None) -> str:
    if not data.is_given:
        assert critic is not None
        text = f"advantages with lambda {critic.trace}"
        return text if critic.name == "value" else f"{text} by a critic that saw the reward of the text so far"
    return "margin between chosen and rejected" if data.kind == "pairs" else "covariance with the texts' scores"


def _targets_text(settings: TrainSettings, sources: Sequence[TrainingData]) -> str:
    centred = [data.kind for data in sources if settings.centres(data.kind)]
    text = ", centred by prompt" if centred else ""
    if centred and len(centred) < len(sources):
        text += f" ({' and '.join(centred)})"
    trace = f"({settings.trace})" if settings.targets == "td_lambda" else ""
    return f"{settings.targets}{trace}{text}"


def _data(data: TrainingData) -> dict[str, Any]:
    responses = Counter(data.split)
    sides = dict(zip(map(int, data.prompt_B), data.split, strict=True))
    prompts = Counter(sides.values())
    counts = {
        "prompts": {split: prompts[split] for split in responses},
        "responses": dict(responses),
        "tokens": int(data.offsets[-1]),
    }
    if data.is_given:
        return {
            "split": "by a digest of the prompt: 80% train, 20% validation",
            **counts,
            "given": data.manifest["given"],
            "read": data.manifest["settings"],
        }
    return {
        "split": "by a hash of the prompt's id: 80% train, 10% validation, 10% test",
        **counts,
        "rollouts": data.manifest["settings"],
        **({"sampled_by": data.manifest["sampled_by"]} if "sampled_by" in data.manifest else {}),
        "prompts_sha256": data.manifest["prompts_sha256"],
    }
