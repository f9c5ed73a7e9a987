"""Control on a part of a response alone, on tiny models: where it does not act, everything is as without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from server.control.params import ControlParams
from server.engines.embedded.core import EngineCore
from server.engines.embedded.structure import SchemaCompiler
from server.engines.segments import FORMATS, OutputFormat, Segment
from server.errors import InvalidRequestError
from server.types import GenerationChunk, GenerationRequest, Opening, SamplingParams
from tests.conftest import EOS, VOCAB, Collected, Results, byte_tokenizer, control, run, waiting_again
from tests.engines.test_scheduler import MODELS, small_core

# A token that is no text, which these requests do not let end one.
MARK = 257
BIAS = 4.0
FORMAT = OutputFormat.reasoning("tiny", ("<eos>",), ("<eos>",))
STEER: dict[str, Any] = {"weights": {"good": 1.0, "line": -0.5}, "step_size": 2.0}
OPENINGS = list(Opening)


def ask(name: str, steer: ControlParams | None, opening: Opening | None, **options: Any) -> GenerationRequest:
    seed = options.pop("seed", 3)
    sampling = {
        "max_tokens": 24,
        "seed": seed,
        "temperature": 1.2,
        "logit_bias": {MARK: BIAS},
        "ignore_eos": True,
        **options,
    }
    return GenerationRequest(name, (5, 6, seed), SamplingParams(**sampling), steer, opening=opening)


def phased(phase: str, **options: Any) -> ControlParams:
    return control(**{**STEER, "phase": phase, **options})


@pytest.fixture(params=MODELS[::2], ids="-".join)
def core(request: pytest.FixtureRequest, make_core: Callable[..., EngineCore]) -> EngineCore:
    return make_core(request.param[0], dtype=request.param[1], output_format=FORMAT)


def parts(result: Collected) -> list[Segment]:
    return [chunk.segment for chunk in result.chunks if chunk.token_ids]


def edited(result: Collected) -> list[bool]:
    return [chunk.edit is not None for chunk in result.chunks if chunk.token_ids]


def test_reasoning_is_drawn_as_without_control_that_acts_on_the_answer(core: EngineCore) -> None:
    lengths = []
    for seed in range(5):
        base, ours = (
            run(core, [ask("r", steer, Opening.REASONING, seed=seed, logprobs=2)])["r", 0]
            for steer in (None, phased("answer"))
        )
        size = parts(base).count(Segment.REASONING)
        assert [replace(c, finish_reason=None, control=None) for c in ours.chunks[:size]] == [
            replace(c, finish_reason=None) for c in base.chunks[:size]
        ]
        assert edited(ours) == [part is Segment.ANSWER for part in parts(ours)]
        lengths.append((size, base.token_ids == ours.token_ids))
    assert any(0 < size < 20 and not is_same for size, is_same in lengths)


def test_the_answer_is_drawn_as_without_control_that_acts_on_the_reasoning(core: EngineCore) -> None:
    seen = 0
    for seed in range(5):
        ours = run(core, [ask("r", phased("reasoning"), Opening.REASONING, seed=seed, logprobs=0)])["r", 0]
        size = parts(ours).count(Segment.REASONING)
        assert edited(ours) == [True] * size + [False] * (len(ours.token_ids) - size)
        # A prompt's log-probabilities are the base model's.
        whole = GenerationRequest(
            "s", (5, 6, seed, *ours.token_ids), SamplingParams(max_tokens=0, prompt_logprobs=True)
        )
        scored = run(core, [whole])["s", 0].chunks[0].prompt_logprobs
        assert scored is not None
        for chunk, score in list(zip(ours.chunks, scored[3:], strict=True))[size:]:
            assert score is not None
            assert chunk.logprobs[0].logprob == pytest.approx(score.logprob, abs=1e-4)
            seen += 1
    assert seen


def test_a_response_that_may_still_reason_is_under_control_of_both_parts_alone(core: EngineCore) -> None:
    for phase, acts in (("answer", False), ("reasoning", False), ("both", True)):
        result = run(core, [ask("r", phased(phase), Opening.EITHER)])["r", 0]
        assert edited(result)[0] is acts
    for opening in (Opening.ANSWER, None):
        one, two = (run(core, [ask("r", phased(phase), opening)])["r", 0].chunks for phase in ("answer", "both"))
        assert one == two


def mixed() -> list[GenerationRequest]:
    steers = [None, *(phased(phase) for phase in ("answer", "reasoning", "both"))]
    steers.append(phased("answer", max_response_kl=0.3, window={"start": 2, "end": 6}, max_kl=0.2))
    steers.append(phased("answer", search={"type": "blocks", "candidates": 2, "block_tokens": 4}))
    return [
        ask(f"{i}{opening}", steer, opening, seed=7 * i + j)
        for i, steer in enumerate(steers)
        for j, opening in enumerate(OPENINGS)
    ]


def tokens(results: Results) -> dict[tuple[str, int], list[tuple[int, Segment]]]:
    return {key: list(zip(result.token_ids, parts(result), strict=True)) for key, result in results.items()}


def test_phases_change_nothing_for_neighbours_and_nothing_by_the_time_of_arrival(core: EngineCore) -> None:
    requests = mixed()
    together = tokens(run(core, requests, steps_between=1))
    assert tokens(run(core, requests[::-1])) == together
    for request in requests[::3]:
        assert tokens(run(core, [request])) == {(request.request_id, 0): together[request.request_id, 0]}


def test_preemption_leaves_every_token_in_its_part(make_core: Callable[..., EngineCore]) -> None:
    requests = [replace(r, sampling=r.sampling.model_copy(update={"max_tokens": 90})) for r in mixed()]
    expected = tokens(run(make_core(output_format=FORMAT), requests))
    core, preempted = small_core(make_core, 6, output_format=FORMAT), set[str]()
    results = run(core, requests, after_step=lambda c: preempted.update(s.request.request_id for s in waiting_again(c)))
    assert tokens(results) == expected
    assert len(preempted) > 1


def test_budget_window_and_summary_count_the_tokens_on_which_control_acts(core: EngineCore) -> None:
    for seed in range(4):
        steer = phased("answer", window={"start": 1}, max_response_kl=0.4, max_kl=0.3)
        chunks = [c for c in run(core, [ask("r", steer, Opening.REASONING, seed=seed)])["r", 0].chunks if c.token_ids]
        edits = [chunk.edit for chunk in chunks if chunk.edit is not None]
        assert len(edits) == sum(chunk.segment is Segment.ANSWER for chunk in chunks)
        summary = chunks[-1].control
        assert summary is not None
        if edits:
            assert (edits[0].held_by, edits[0].kl) == ("window", 0.0)
            assert sum(edit.kl for edit in edits) <= 0.4
            assert summary.mean_kl == pytest.approx(sum(edit.kl for edit in edits) / len(edits))
        else:
            assert summary.value_before == {}


def test_a_guardrail_watches_the_parts_on_which_control_acts(core: EngineCore) -> None:
    bound = {"stop_below": {"good": 1e6}}
    reasoned = run(core, [ask("r", phased("answer", **bound), Opening.REASONING, seed=4)])["r", 0]
    assert parts(reasoned)[-1] is Segment.ANSWER
    assert [part for part in parts(reasoned) if part is Segment.ANSWER] == [Segment.ANSWER]
    assert reasoned.finish_reasons == ["guardrail"]
    assert len(run(core, [ask("r", phased("both", **bound), Opening.REASONING)])["r", 0].token_ids) == 1


def test_search_keeps_off_the_parts_on_which_control_does_not_act(core: EngineCore) -> None:
    search = {"search": {"type": "blocks", "candidates": 3, "block_tokens": 4}, "steps": 0}
    for seed in range(5):
        request = ask("r", phased("answer", **search), Opening.REASONING, seed=seed)
        base, ours = (run(core, [r])["r", 0] for r in (replace(request, control=None), request))
        size = parts(base).count(Segment.REASONING)
        assert ours.token_ids[:size] == base.token_ids[:size]
        assert parts(ours).count(Segment.REASONING) == size
        drawn = {part: _num_drawn(ours.chunks, part) for part in (Segment.REASONING, Segment.ANSWER)}
        assert drawn[Segment.REASONING] == size
        kept = len(ours.token_ids) - size
        assert kept <= drawn[Segment.ANSWER] <= 3 * kept + 12


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_schema_holds_the_answer_behind_reasoning_that_is_free(core: EngineCore, opening: Opening) -> None:
    compiler = SchemaCompiler(byte_tokenizer(), vocab_size=VOCAB, eos_token_ids={EOS})
    compiled = compiler.compile(json.dumps({"enum": ["cat", "dog", 7]}))
    # For this tokenizer the mark is an end too, as no model's is.
    core._eos_token_ids = frozenset({EOS})
    reasoned = []
    for seed in range(6):
        steer = phased("answer") if seed % 2 else None
        options = {"max_tokens": 90, "ignore_eos": False, "logit_bias": {MARK: 5.0, EOS: 5.0}}
        result = run(core, [replace(ask("r", steer, opening, seed=seed, **options), structure=compiled)])["r", 0]
        size = parts(result).count(Segment.REASONING)
        if size < 90:
            assert json.loads(result.text) in ("cat", "dog", 7)
            assert result.finish_reasons == ["stop"]
        assert EOS not in result.token_ids[:size]
        reasoned.append(size)
    assert any(reasoned) is (opening is not Opening.ANSWER)


def test_a_schema_is_refused_behind_reasoning_whose_marks_are_no_tokens(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(output_format=FORMATS["think"])
    compiler = SchemaCompiler(byte_tokenizer(), vocab_size=VOCAB, eos_token_ids={EOS})
    asked = GenerationRequest("r", (5,), SamplingParams(max_tokens=60, seed=1), structure=compiler.compile("{}"))
    with pytest.raises(InvalidRequestError, match="response_format: this model's marks of reasoning are no tokens"):
        core.check(replace(asked, opening=Opening.REASONING))
    for opening in (None, Opening.EITHER, Opening.ANSWER):
        core.check(replace(asked, opening=opening))


def _num_drawn(chunks: list[GenerationChunk], part: Segment) -> int:
    return sum(chunk.num_drawn for chunk in chunks if chunk.segment is part)
