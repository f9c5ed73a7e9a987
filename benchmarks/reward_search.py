"""Searches by a reward of the text at equal compute: the best of N responses, and block by block.

    python -m benchmarks.reward_search afinn,positive --out benchmarks/results/reward-search.json \
        --into docs/control.md

Every arm but the head's plain control draws N tokens for each that it keeps, under the same budget for a response's
edits, and is searched by the reward that it is judged by. The judges beside it are not searched by. Arms answer the
same prompts of the test split with the same seeds. Enter at `RewardSearch`.

Shapes: P prompts, S responses to each.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic_settings import CliPositionalArg

from benchmarks.markdown import header, row, with_range
from benchmarks.study import Study
from server.cli import run
from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines.base import NullObserver
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import load_model
from server.engines.embedded.rollouts import EngineRolloutSource
from server.errors import ConfigurationError
from server.settings import DEFAULT_MODEL
from server.types import TokenEdit
from value_models.generations import EvalSample, best_of_kl_bound
from value_models.intervals import mean_interval
from value_models.metrics import EVAL_METRICS
from value_models.prompt_sets import RolloutPrompt, load_prompts, own_prompts_file, split_of
from value_models.rewards import REWARDS
from value_models.rollouts import RolloutSettings
from value_models.store import load_head, shipped_heads_folder

BLOCK_TOKENS = 8
RIVALS = ("best of N", "best of N under control")
_TABLED = ("coherence", "diversity")


@dataclass(slots=True, frozen=True)
class Task:
    """A reward to search by, the head that is nearest to it, and judges that nothing is searched by."""

    head: str
    judges: tuple[str, ...]


TASKS = {
    "positive": Task("positive", ("afinn", "textblob_polarity")),
    "plain": Task("plain", ("word_frequency", "dale_chall_easy")),
    "afinn": Task("positive", ("positive", "textblob_polarity")),
    "prompt_word_recall": Task("relevance", ("wordllama_similarity", "relevance")),
}
KNOWN = {**EVAL_METRICS, **REWARDS}


@dataclass(slots=True, frozen=True)
class Way:
    """How an arm samples: so many responses under this control, of which the best is kept."""

    control: ControlParams | None
    num_samples: int = 1


def ways(reward: str, number: int, max_response_kl: float) -> dict[str, Way]:
    """The arms of one reward, at `number` tokens for each that is kept, but for plain control."""
    head = TASKS[reward].head

    def steered(weights: Mapping[str, float], search: Mapping[str, Any] | None = None, **more: Any) -> ControlParams:
        blocks = {"type": "blocks", "candidates": number, "block_tokens": BLOCK_TOKENS}
        options = None if search is None else {**blocks, **search}
        asked = {"objective": {"weights": weights}, "max_response_kl": max_response_kl, "search": options, **more}
        return ControlParams.model_validate(asked)

    near, by_reward = {head: 1.0}, {"reward": reward}
    return {
        "control": Way(steered(near)),
        "best of N": Way(None, number),
        "best of N under control": Way(steered(near), number),
        "blocks": Way(steered(near, by_reward, steps=0)),
        "blocks under control": Way(steered(near, by_reward)),
        "blocks under control, by value": Way(steered(near, {})),
    }


class RewardSearch(Study):
    """Search by rewards of the text, in several ways at equal compute."""

    section: ClassVar[str] = "bench-reward-search"

    rewards: CliPositionalArg[str] = Field(description=f"comma-separated: {', '.join(TASKS)}")
    model: str = DEFAULT_MODEL
    number: Annotated[int, Field(ge=2, le=32)] = Field(4, description="tokens drawn for each that is kept")
    max_response_kl: float = Field(8.0, gt=0, description="nats that a response's edits may diverge by")
    num_prompts: Annotated[int, Field(ge=1)] = Field(24, description="of the test split")
    max_tokens: Annotated[int, Field(ge=1)] = 64
    seed: int = 1

    def measure(self) -> dict[str, Any]:
        rewards = self.rewards.split(",")
        if unknown := [reward for reward in rewards if reward not in TASKS]:
            raise ConfigurationError(f"rewards: there is no {unknown[0]!r}; there are {', '.join(TASKS)}")
        prompts = [prompt for prompt in load_prompts(own_prompts_file()) if split_of(prompt.id) == "test"]
        sampler = _Sampler(self, prompts[: self.num_prompts])
        return {
            "number": self.number,
            "max_response_kl": self.max_response_kl,
            "num_prompts": len(sampler.prompts),
            "max_tokens": self.max_tokens,
            "rewards": {reward: _measured(sampler, reward, self) for reward in rewards},
        }

    def body(self, result: Mapping[str, Any]) -> str:
        return table(result)


class _Drawn(NullObserver):
    """Counts tokens, whether they are kept or not."""

    num_tokens = 0

    def on_token(self, *, inter_token_s: float | None, edit: TokenEdit | None) -> None:
        del inter_token_s, edit
        self.num_tokens += 1


class _Sampler:
    """Answers the study's prompts in one way after the other. What base model and seed decide is sampled once."""

    def __init__(self, study: RewardSearch, prompts: Sequence[RolloutPrompt]) -> None:
        loaded, folder = load_model(study.model), shipped_heads_folder(study.model)
        self.prompts, self._study, self._drawn = prompts, study, _Drawn()
        core = EngineCore(
            loaded,
            HeadRegistry({name: load_head(folder / name)[0] for name in sorted({t.head for t in TASKS.values()})}),
            max_batch_size=64,
            rewards={reward: KNOWN[reward] for reward in TASKS},
            observer=self._drawn,
        )
        self._source = EngineRolloutSource(loaded, core)
        self._known: dict[str, tuple[list[EvalSample], int]] = {}

    def sampled(self, way: Way) -> tuple[list[EvalSample], int]:
        """Its responses by prompt and number, and the tokens that were drawn for them."""
        key = repr(way)
        if key not in self._known:
            settings = RolloutSettings(
                num_samples=way.num_samples, max_tokens=self._study.max_tokens, top_p=0.95, seed=self._study.seed
            )
            before = self._drawn.num_tokens
            found = self._source.evaluate(self.prompts, settings, control=way.control)
            samples = sorted(found, key=lambda sample: (sample.prompt_id, sample.sample))
            self._known[key] = samples, self._drawn.num_tokens - before
        return self._known[key]


def _measured(sampler: _Sampler, reward: str, study: RewardSearch) -> dict[str, Any]:
    texts = {prompt.id: prompt.text for prompt in sampler.prompts}

    def scored(name: str, samples: Sequence[EvalSample]) -> np.ndarray:
        asked = [texts[sample.prompt_id] for sample in samples]
        return np.array(KNOWN[name](asked, [sample.response for sample in samples]), dtype=float)

    names = (*TASKS[reward].judges, *_TABLED)
    tables: dict[str, dict[str, np.ndarray]] = {}
    drawn: dict[str, float] = {}
    for arm, way in ways(reward, study.number, study.max_response_kl).items():
        samples, num_drawn = sampler.sampled(way)
        best_P = scored(reward, samples).reshape(-1, way.num_samples).argmax(axis=1)
        kept = [samples[place * way.num_samples + best] for place, best in enumerate(best_P)]
        tables[arm] = {name: scored(name, kept) for name in (reward, *names)}
        # Of a search by blocks the bound is in it.
        tables[arm]["kl"] = np.array([sample.mean_kl * sample.num_tokens for sample in kept])
        drawn[arm] = num_drawn / len(kept)
    return {
        "head": TASKS[reward].head,
        "judges": list(TASKS[reward].judges),
        "arms": {
            arm: {"drawn": round(drawn[arm], 1)}
            | {name: mean_interval(values_P[:, None]) for name, values_P in found.items()}
            | {"above": {rival: mean_interval((found[reward] - tables[rival][reward])[:, None]) for rival in RIVALS}}
            for arm, found in tables.items()
        },
    }


def table(result: Mapping[str, Any]) -> str:
    titles = ["reward", "arm", "tokens drawn", "mean reward", *(f"above {rival}, 95%" for rival in RIVALS)]
    lines = header([*titles, "judges", *_TABLED, "KL"])
    for reward, one in result["rewards"].items():
        for name, way in ways(reward, result["number"], result["max_response_kl"]).items():
            arm = one["arms"][name]
            above = [with_range(arm["above"][rival], "+.2f") if rival != name else "" for rival in RIVALS]
            judges = "; ".join(f"{arm[judge]['mean']:.2f}" for judge in one["judges"])
            rest = [f"{arm[metric]['mean']:.2f}" for metric in _TABLED]
            kl = arm["kl"]["mean"] + best_of_kl_bound(way.num_samples)
            cells = [
                f"`{reward}`",
                name,
                f"{arm['drawn']:.0f}",
                f"{arm[reward]['mean']:.2f}",
                *above,
                judges,
                *rest,
                f"{kl:.2f}",
            ]
            lines.append(row(cells))
    judged = "; ".join(f"`{reward}` by {' and '.join(one['judges'])}" for reward, one in result["rewards"].items())
    told = (
        f"{result['num_prompts']} held-out prompts, responses of at most {result['max_tokens']} tokens, N = "
        f"{result['number']}, blocks of {BLOCK_TOKENS} tokens, max_response_kl {result['max_response_kl']:g}. Judges: "
        f"{judged}. KL is nats a response, with the bound of what keeping the best may add."
    )
    return "\n".join([*lines, "", told, "", f"`{result['command']}`, {result['system']['date'][:10]}."])


if __name__ == "__main__":
    raise SystemExit(run("benchmarks.reward_search:RewardSearch", "python -m benchmarks.reward_search", sys.argv[1:]))
