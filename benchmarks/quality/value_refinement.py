"""Iterative value refinement: a value that guides decoding is trained again on the responses that it guided.

Values are fitted to the rewards of many base responses to each prompt (value exploration). Then each round samples
responses of training prompts by controlled decoding with the value of the round before, and fits a value to those and
the base model's together (iterative self-refinement), so that it has also seen where it leads to. Enter at
`refined_values`.

Source: Liu et al. 2025, Evolutionary guided decoding: iterative value refinement for LLMs (arXiv 2503.02368).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.quality.controlled_decoding import ControlledDecoding, decoder_of
from benchmarks.quality.decoding import jobs_of, text_of, vocabulary_of
from server.cli.methods import FitSources
from server.engines.embedded.rollouts import EngineRolloutSource
from value_models.heads import ValueHead, head_from_tensors
from value_models.kept_fits import fit_key, kept_tensors
from value_models.prompt_sets import RolloutPrompt, in_mixed_order, split_of
from value_models.rollouts import Rollout, RolloutSettings, collect_rollouts, open_rollouts
from value_models.training import TrainSettings, train_head
from value_models.training_data import load_training_data

_TRAINING = TrainSettings(center_by_prompt=False, hidden_widths=(512,), metric="identity", max_epochs=6)
_GUIDED = ControlledDecoding(num_candidates=8, value_weight=3.0)
_NUM_ROUNDS = 1
_NUM_PROMPTS = {"train": 96, "validation": 16}
_NUM_SAMPLES = 2


class GuidedSource:
    """A source of rollouts that a value guides; states and gradients are the base model's."""

    def __init__(self, source: EngineRolloutSource, head: ValueHead) -> None:
        self._source, self._head = source, head

    @property
    def base_model(self) -> dict[str, Any]:
        return self._source.base_model

    def sample(self, prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterator[Rollout]:
        source, vocabulary = self._source, vocabulary_of(self._source)
        jobs = jobs_of(source, prompts, settings)
        for result in decoder_of(source, self._head).run(jobs, _GUIDED):
            states_TD = torch.stack(result.states)
            streamed = text_of(result, vocabulary, source.loaded.eos_token_ids)
            with torch.inference_mode():
                grads_TD = source.core.lm_head.logp_grads(states_TD, torch.tensor(result.token_ids))
            yield Rollout(
                prompt_id=result.job.prompt_id,
                sample=result.job.index,
                response=streamed.text,
                token_ids=tuple(result.token_ids),
                is_finished=result.is_finished,
                text_ends=tuple(streamed.text_ends),
                states_TD=states_TD.cpu(),
                logp_grads_TD=grads_TD.cpu(),
            )


def refined_values(sources: FitSources) -> ValueHead:
    """From the folder for what is fitted, or fitted now and put there.

    Raises RolloutError, RewardError, TrainingDataError.
    """
    told = {
        "rollouts": open_rollouts(sources.rollouts).manifest,
        "reward": sources.reward_name,
        "training": _TRAINING.model_dump(),
        "guided": [_GUIDED.model_dump(), _NUM_ROUNDS, _NUM_PROMPTS, _NUM_SAMPLES],
    }
    key = fit_key(told)
    path = sources.folder / f"{key}-refined.safetensors"
    return head_from_tensors("mlp", kept_tensors(path, lambda: _refined(sources, key).state_dict()))


def _refined(sources: FitSources, key: str) -> ValueHead:
    base = sources.training_data()
    head = train_head([base], _TRAINING).head
    prompts = _guided_prompts(sources)
    texts = {prompt.id: prompt.text for prompt in prompts}
    for number in range(_NUM_ROUNDS):
        folder = sources.folder / f"{key}-round-{number}"
        settings = RolloutSettings(num_samples=_NUM_SAMPLES, max_tokens=base.manifest["settings"]["max_tokens"])
        collect_rollouts(GuidedSource(sources.factory.source, head), prompts, folder, settings, show_progress=True)
        head = train_head([base, load_training_data(folder, sources.reward_name, texts)], _TRAINING).head
    return head


def _guided_prompts(sources: FitSources) -> list[RolloutPrompt]:
    """Some of each split that a fit looks at."""
    mixed = in_mixed_order(sources.prompts().values())
    return [
        prompt
        for split, number in _NUM_PROMPTS.items()
        for prompt in [prompt for prompt in mixed if split_of(prompt.id) == split][:number]
    ]
