"""Controlled decoding: what is kept, what it costs, and that candidates do not mix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from benchmarks.quality.controlled_decoding import ControlledDecoder, ControlledDecoding
from benchmarks.quality.decoding import DecodingJob
from server.engines.embedded.core import EngineCore
from server.types import GenerationRequest, SamplingParams
from tests.conftest import CONFIGS, random_head, run

HEAD = random_head(1)
JOBS = [DecodingJob(f"p{i}", i % 2, tuple((7 * i + j) % 250 + 1 for j in range(3 + 5 * i)), i, 9) for i in range(5)]
THREE = ControlledDecoding(num_candidates=3)


def decode(
    core: EngineCore, jobs: list[DecodingJob], params: ControlledDecoding, eos: frozenset[int] = frozenset()
) -> dict:
    decoder = ControlledDecoder(core.runner, core.page_pool, HEAD, eos, max_rows=core.max_batch_size)
    return {result.job.prompt_id: result for result in decoder.run(jobs, params)}


def states(core: EngineCore, token_ids: tuple[int, ...] | list[int]) -> torch.Tensor:
    """All states of a text, computed in one piece."""
    return core.states(list(token_ids))


def value_of(core: EngineCore, token_ids: list[int]) -> float:
    return float(HEAD.readout(HEAD.units(states(core, token_ids)[-1:]))[0])


@pytest.mark.parametrize("architecture", CONFIGS)
def test_states_are_those_of_the_chosen_text(make_core: Callable[..., EngineCore], architecture: str) -> None:
    core = make_core(architecture)
    for result in decode(core, JOBS, THREE).values():
        assert len(result.token_ids) == len(result.states) == len(result.kl) == 9
        prompt = result.job.prompt_token_ids
        expected = states(core, [*prompt, *result.token_ids])[len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack(result.states), expected, atol=1e-4, rtol=1e-4)


def test_a_response_does_not_depend_on_the_others(core: EngineCore) -> None:
    together = decode(core, JOBS, THREE)
    for job in JOBS:
        assert decode(core, [job], THREE)[job.prompt_id].token_ids == together[job.prompt_id].token_ids


def test_a_great_weight_takes_the_likely_token_after_which_the_value_is_highest(core: EngineCore) -> None:
    job = dataclasses.replace(JOBS[1], max_tokens=1)
    result = decode(core, [job], ControlledDecoding(num_candidates=5, value_weight=1e4))[job.prompt_id]
    likely = core.lm_head.logits(states(core, job.prompt_token_ids)[-1:])[0].topk(5).indices.tolist()
    values = [value_of(core, [*job.prompt_token_ids, token]) for token in likely]
    assert result.token_ids == [likely[values.index(max(values))]]


def test_without_weight_divergence_is_what_the_tokens_left_out_held(core: EngineCore) -> None:
    job = dataclasses.replace(JOBS[2], max_tokens=1)
    result = decode(core, [job], ControlledDecoding(num_candidates=4, value_weight=0.0))[job.prompt_id]
    probs = core.lm_head.logits(states(core, job.prompt_token_ids)[-1:])[0].softmax(dim=-1)
    assert result.kl == pytest.approx([-math.log(float(probs.topk(4).values.sum()))], abs=1e-4)


def test_an_end_of_sequence_token_ends_a_response(core: EngineCore) -> None:
    free = decode(core, JOBS, THREE)
    eos = frozenset(token for result in free.values() for token in result.token_ids[3:5])
    for result in decode(core, JOBS, THREE, eos).values():
        ends = [i for i, token in enumerate(result.token_ids) if token in eos]
        assert result.is_finished == bool(ends)
        assert all(i == len(result.token_ids) - 1 for i in ends)


def test_no_page_is_left_held_and_too_many_candidates_are_refused(core: EngineCore) -> None:
    def first_tokens() -> list[int]:
        return run(core, [GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=8, seed=1))])["r", 0].token_ids

    before = first_tokens()
    decode(core, JOBS, THREE)
    assert core.page_pool.num_held == 0
    assert first_tokens() == before
    with pytest.raises(ValueError, match="num_candidates is 9, but only 8 rows"):
        decode(core, JOBS, ControlledDecoding(num_candidates=9))
