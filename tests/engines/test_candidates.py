"""Candidates compared by value, on tiny models: what is kept, that nothing else can tell, and what is freed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.control.scores import scores
from server.engines.base import EngineStatus, NullObserver
from server.engines.embedded.core import EngineCore
from server.engines.embedded.sequence import Sequence
from server.errors import InvalidRequestError
from server.types import ControlParams, FinishReason, GenerationChunk, GenerationRequest, SamplingParams, TokenEdit
from tests.conftest import Collected, Results, run
from tests.engines.test_laws import requests
from tests.engines.test_scheduler import MODELS, small_core

ALONE = {"steps": 0}
WAYS: list[dict[str, Any]] = [
    {"objective": {"weights": {"good": 1.0}}, **ALONE},
    {"objective": {"weights": {"line": 1.0, "deep": -0.5}}, "step_size": 1.0},
    {"objective": {"type": "worst_case", "weights": {"good": 1.0, "line": 1.0}}, **ALONE},
    {"objective": {"type": "target", "values": {"good": 0.5}}, "step_size": 1.0},
    {"objective": {"type": "floor", "weights": {"line": 1.0}, "floors": {"good": 0.3}}, **ALONE},
]


def searching(way: dict[str, Any], candidates: int, block_tokens: int, **more: Any) -> ControlParams:
    search = {"type": "blocks", "candidates": candidates, "block_tokens": block_tokens}
    return ControlParams.model_validate({**way, "search": search, **more})


def ask(control: ControlParams | None, *, prompt: tuple[int, ...] = (5, 6, 7), n: int = 1, best_of: int | None = None,
        name: str = "r", **sampling: Any) -> GenerationRequest:  # fmt: skip
    params = SamplingParams(**{"max_tokens": 14, "seed": 3, "temperature": 1.3, **sampling})
    return GenerationRequest(name, prompt, params, control, num_choices=n, best_of=best_of)


def told(collected: Collected) -> list[GenerationChunk]:
    """Without the chunks that only count tokens."""
    return [chunk for chunk in collected.chunks if not chunk.num_drawn]


def has_ended(core: EngineCore, token_ids: list[int]) -> bool:
    return bool(core._eos_token_ids & set(token_ids[-1:]))


def score_of(core: EngineCore, request: GenerationRequest, token_ids: list[int]) -> float:
    """Of a text's last state, a token that ends it not counted, computed in one piece."""
    assert request.control is not None
    text = token_ids[:-1] if has_ended(core, token_ids) else token_ids
    states_TD = core.states([*request.prompt_token_ids, *text])
    return float(scores(states_TD[-1:].expand(2, -1), request.control.objective, core.registry)[0])


def continued(core: EngineCore, request: GenerationRequest, text: list[int], number: int, block: int) -> list[int]:
    """One candidate's block behind a text, by a generation of its own; draws are keyed by stream and place."""
    (sequence,) = core.sequences(replace(request, control=replace_search(request.control)), lambda _: None)
    stream = sequence.row_sampling.stream
    sequence.row_sampling = replace(sequence.row_sampling, stream=(*stream, number) if number else stream)
    # As if it had been preempted behind the text.
    sequence.token_ids = list(text)
    core.add([sequence])
    while core.has_work and len(sequence.token_ids) < len(text) + block:
        core.step()
    core.abort([sequence])
    return sequence.token_ids[len(text) :]


def replace_search(control: ControlParams | None) -> ControlParams | None:
    return None if control is None else control.model_copy(update={"search": None})


def by_hand(core: EngineCore, request: GenerationRequest) -> list[int]:
    """Blockwise best-of by generations of their own, each compared in float32."""
    search, max_tokens, text = request.search, request.sampling.max_tokens, []
    assert search is not None
    while len(text) < max_tokens and not has_ended(core, text):
        tried = [continued(core, request, text, j, search.block_tokens) for j in range(search.candidates)]
        values = [score_of(core, request, [*text, *block]) for block in tried]
        text += tried[values.index(max(values))]
    return text


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_blocks_keep_what_solo_generations_and_a_comparison_by_hand_keep(core: EngineCore, way: int) -> None:
    for candidates, block, seed in ((2, 5, 0), (3, 4, 1), (4, 1, 2), (2, 99, 4)):
        request = ask(searching(WAYS[way], candidates, block), seed=seed, top_p=0.9, max_tokens=11)
        result = run(core, [request])["r", 0]
        assert result.token_ids == by_hand(core, request)
        assert result.finish_reasons in ([FinishReason.LENGTH], [FinishReason.STOP])


@pytest.mark.parametrize("way", WAYS)
def test_one_candidate_gives_what_no_search_gives(core: EngineCore, way: dict[str, Any]) -> None:
    for block in (1, 4, 50):
        plain = run(core, [ask(ControlParams.model_validate(way), n=2, logprobs=2)])
        searched = run(core, [ask(searching(way, 1, block), n=2, logprobs=2)])
        for key, result in plain.items():
            assert [replace(chunk, num_drawn=0) for chunk in result.chunks] == told(searched[key])


def test_the_winner_of_a_block_has_the_highest_value_of_its_candidates(core: EngineCore) -> None:
    seen: list[tuple[list[float], float]] = []
    keep = core._candidates._keep_best
    request = ask(searching(WAYS[0], 4, 3), max_tokens=12)

    def watched(leader: Sequence) -> Any:
        values = [score_of(core, request, candidate.token_ids) for candidate in leader.candidates]
        rows = keep(leader)
        seen.append((values, score_of(core, request, leader.token_ids)))
        return rows

    core._candidates._keep_best = watched  # type: ignore[method-assign]
    run(core, [request])
    assert len(seen) == 4
    assert all(kept == pytest.approx(max(values), abs=1e-4) for values, kept in seen)
    assert any(len(set(values)) > 1 for values, _ in seen)
