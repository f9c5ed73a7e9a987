"""The cards of heads that are trained here: what a head was made from, how, and how well it did.

Knows nothing of the command line or of servers. Enter at `trained_card` and `distilled_card`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from value_models.distillation import DistilledHead, DistilSettings, InstructedTexts
from value_models.heads import UNIT_COST_NATS
from value_models.order import order_figures
from value_models.store import BaseModelCard, HeadCard, architecture_card
from value_models.training import TrainedHead, TrainSettings
from value_models.training_data import TrainingData

_NORMALISATION = "mean and standard deviation of each dimension over training states"
_UNIT = f"an ascent of length 1 costs {UNIT_COST_NATS} nats a training token"


def trained_card(
    name: str,
    description: str,
    data: TrainingData,
    settings: TrainSettings,
    trained: TrainedHead,
    *,
    aim: str | None = None,
    command: str,
) -> HeadCard:
    """Of a head that was fitted to rewards; `aim` names them, by default the texts that brought them.

    `command` is what made the head.
    """
    aim = aim or f"{data.kind} of {data.manifest['given']['file']}"
    return HeadCard(
        name=name,
        description=description or f"Higher {aim}",
        base_model=BaseModelCard(**data.base_model),
        architecture=architecture_card(trained.head),
        normalisation=_NORMALISATION,
        metric=_metric_text(settings, data),
        reward=aim,
        reward_mean=trained.head.reward_mean,
        reward_scale=trained.head.reward_scale,
        targets=_targets_text(settings),
        data=_data(data),
        validation={**asdict(trained.figures), **order_figures(trained.head, data)},
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
        f"{distilled.validation['damping']}; {_UNIT}",
        reward="instruction",
        reward_mean=distilled.head.reward_mean,
        reward_scale=distilled.head.reward_scale,
        targets="mean over a response's tokens of the log of how much likelier the instruction makes them, in nats "
        f"a token; against the model {other}",
        data={
            "instruction": instruction,
            "contrast": contrast,
            "split": "by a hash of the prompt's id: 80% train, 10% validation, 10% test",
            "prompts": texts.num_prompts,
            "responses": {split: texts.split.count(split) for split in texts.num_prompts},
            "tokens": len(texts.token_ids_N),
            "settings": settings.model_dump(),
        },
        validation=distilled.validation,
        distillation=distilled.distillation,
        command=command,
    )


def _metric_text(settings: TrainSettings, data: TrainingData) -> str:
    if settings.metric == "natural":
        if data.is_given:
            of = "margin between chosen and rejected" if data.kind == "pairs" else "covariance with the texts' scores"
            return (
                f"natural gradient of the {of}, damping {settings.damping} and that of few tokens; "
                f"{_UNIT.replace('training', 'validation')}"
            )
        return (
            f"natural policy gradient, advantages with lambda {settings.advantage_trace}, damping {settings.damping}; "
        ) + _UNIT
    if settings.metric == "covariance":
        return f"correlation of training states, shrunk by {settings.shrinkage} towards the identity; {_UNIT}"
    return f"identity; {_UNIT}"


def _targets_text(settings: TrainSettings) -> str:
    centred = ", centred by prompt" if settings.center_by_prompt else ""
    trace = f"({settings.trace})" if settings.targets == "td_lambda" else ""
    return f"{settings.targets}{trace}{centred}"


def _data(data: TrainingData) -> dict[str, object]:
    responses = Counter(data.split)
    prompts = {split: len({int(p) for p, s in zip(data.prompt_B, data.split, strict=True) if s == split})
               for split in responses}  # fmt: skip
    counts = {"prompts": prompts, "responses": dict(responses), "tokens": int(data.offsets[-1])}
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
        "prompts_sha256": data.manifest["prompts_sha256"],
    }
