"""Comparing ways to steer on held-out prompts: reward, judges, diversity, fluency and divergence, with intervals.

An arm is a name and a function that samples responses; what it does to the model is its own business. Intervals are
bootstrapped over prompts, since responses to one prompt are not independent. Knows nothing of engines. Enter at
`evaluate_arms`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from value_models.metrics import bootstrap_interval, load_metric
from value_models.rewards import load_reward
from value_models.rollouts import RolloutPrompt

_NUM_EXAMPLES = 3


@dataclass(slots=True, frozen=True)
class EvalSample:
    """One response. `nll` is the mean negative log-probability of its tokens under the base model, in nats."""

    prompt_id: str
    sample: int
    response: str
    num_tokens: int
    nll: float
    mean_kl: float
    max_kl: float
    is_finished: bool


Arm = Callable[[Sequence[RolloutPrompt]], Iterable[EvalSample]]


def evaluate_arms(
    arms: Mapping[str, Arm],
    prompts: Sequence[RolloutPrompt],
    *,
    reward_name: str,
    judges: Sequence[str],
    on_arm: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Arm -> metric -> {mean, low, high}; `gain_over` of an arm compares it with each earlier one, prompt by prompt.

    Raises RewardError, MetricError.
    """
    scorers = {name: load_metric(name) for name in (*judges, "diversity")}
    reward = load_reward(reward_name)
    figures: dict[str, Any] = {}
    earlier: dict[str, dict[str, list[float]]] = {}
    for name, arm in arms.items():
        on_arm(name)
        started_s = time.perf_counter()
        samples = list(arm(prompts))
        wall_s = time.perf_counter() - started_s
        values = _scores(samples, prompts, reward, scorers)
        by_prompt = {metric: _by_prompt(samples, prompts, scores) for metric, scores in values.items()}
        arm_figures: dict[str, Any] = {metric: _with_interval(means) for metric, means in by_prompt.items()}
        arm_figures["gain_over"] = {
            other: {metric: _gain(by_prompt[metric], theirs[metric]) for metric in ("reward", *judges)}
            for other, theirs in earlier.items()
        }
        earlier[name] = by_prompt
        arm_figures["largest_kl"] = max((sample.max_kl for sample in samples), default=0.0)
        arm_figures["wall_s"] = round(wall_s, 2)
        arm_figures["num_responses"] = len(samples)
        arm_figures["examples"] = _examples(samples, prompts)
        figures[name] = arm_figures
    return figures


def _scores(
    samples: list[EvalSample],
    prompts: Sequence[RolloutPrompt],
    reward: Callable[[Sequence[str], Sequence[str]], list[float]],
    scorers: Mapping[str, Callable[[str], float]],
) -> dict[str, list[float]]:
    texts = {prompt.id: prompt.text for prompt in prompts}
    responses = [sample.response for sample in samples]
    scores = {"reward": reward([texts[sample.prompt_id] for sample in samples], responses)}
    scores |= {name: [scorer(response) for response in responses] for name, scorer in scorers.items()}
    scores["nll"] = [sample.nll for sample in samples]
    scores["kl"] = [sample.mean_kl for sample in samples]
    scores["finished"] = [float(sample.is_finished) for sample in samples]
    scores["tokens"] = [float(sample.num_tokens) for sample in samples]
    return scores


def _examples(samples: list[EvalSample], prompts: Sequence[RolloutPrompt]) -> list[dict[str, str]]:
    """The first response to each of the first prompts: not chosen, and the same prompts and seeds in every arm."""
    first = {sample.prompt_id: sample.response for sample in samples if sample.sample == 0}
    return [{"prompt": prompt.text, "response": first[prompt.id]} for prompt in prompts[:_NUM_EXAMPLES]]


def _by_prompt(samples: list[EvalSample], prompts: Sequence[RolloutPrompt], scores: list[float]) -> list[float]:
    """The mean over each prompt's responses, in the prompts' order."""
    grouped: dict[str, list[float]] = {prompt.id: [] for prompt in prompts}
    for sample, score in zip(samples, scores, strict=True):
        grouped[sample.prompt_id].append(score)
    return [sum(group) / len(group) for group in grouped.values()]


def _gain(mine: list[float], theirs: list[float]) -> dict[str, float]:
    return _with_interval([a - b for a, b in zip(mine, theirs, strict=True)])


def _with_interval(values: list[float]) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {"mean": round(sum(values) / len(values), 4), "low": round(low, 4), "high": round(high, 4)}
