"""A guardrail that repairs: what it gives is told by whole decodes from the kept tokens, and nobody else feels it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from server.control.params import ControlParams
from server.control.repair import DEFAULT_REPLACEMENT, Retry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.structure import CompiledSchema, SchemaCompiler
from server.types import FinishReason, GenerationRequest, GuardReport, SamplingParams
from tests.conftest import EOS, VOCAB, Collected, byte_tokenizer, control, run

PROMPT = (72, 101, 108, 108, 111)
UNBOUND = {"line": -1e6}
GOOD = {"good": 1.0}


def ask(
    name: str, steer: ControlParams | None, *, seed: int = 1, num_choices: int = 1, **sampling: Any
) -> GenerationRequest:
    params = SamplingParams(**{"max_tokens": 40, "seed": seed, "ignore_eos": True, **sampling})
    return GenerationRequest(name, PROMPT, params, steer, num_choices)


def values_of(result: Collected) -> list[float]:
    return [chunk.edit.value_after["line"] for chunk in result.chunks if chunk.edit is not None]


def bound_of(core: EngineCore, share: float, **changes: Any) -> float:
    """So large a share of tokens' values of `line` is below it."""
    steer = control(GOOD, stop_below=UNBOUND)
    free = run(core, [replace(ask(str(seed), steer, seed=seed), **changes) for seed in range(4)])
    values = sorted(value for result in free.values() for value in values_of(result))
    return values[int(len(values) * share)]


@pytest.fixture
def bound(core: EngineCore) -> float:
    return bound_of(core, 1 / 8)


def guarded(bound: float, on_stop: Any, **options: Any) -> ControlParams:
    return control(GOOD, stop_below={"line": bound}, on_stop=on_stop, **options)


def report_of(result: Collected) -> GuardReport:
    summary = result.chunks[-1].control
    assert summary is not None
    assert summary.guardrail is not None
    return summary.guardrail


def decoded(core: EngineCore, request: GenerationRequest, kept: list[int], num_retries: int) -> Collected:
    """The whole response without a guardrail whose first tokens are given, drawn as after so many retries."""
    assert request.control is not None
    steer = request.control.strengthened(num_retries)
    steer = steer.model_copy(update={"stop_below": UNBOUND, "on_stop": ControlParams.model_fields["on_stop"].default})
    result = Collected()
    (sequence,) = core.sequences(replace(request, control=steer), result.add)
    for token_id in kept:
        sequence.grow(token_id, [0.0] * 9)
    if num_retries:
        stream = (*sequence.row_sampling.stream, 0, num_retries)
        sequence.row_sampling = replace(sequence.row_sampling, stream=stream)
    core.add([sequence])
    while core.has_work:
        core.step()
    return result


def told(core: EngineCore, request: GenerationRequest) -> tuple[list[int], FinishReason, int]:
    """What a response under a guardrail that retries has to be, by whole decodes: tokens, why it ends, retries."""
    assert request.control is not None
    assert request.control.stop_below is not None
    on_stop, bound = request.control.on_stop, request.control.stop_below["line"]
    assert isinstance(on_stop, Retry)
    kept: list[int] = []
    num_shown = num_retries = 0
    while True:
        result = decoded(core, request, kept, num_retries)
        tokens, values = kept + result.token_ids, values_of(result)
        place = next((len(kept) + i for i, value in enumerate(values) if not value >= bound), None)
        if place is None:
            return tokens, result.finish_reasons[0], num_retries
        num_shown = max(num_shown, place - on_stop.hold_tokens)
        count = min(on_stop.rewind_tokens, place - num_shown)
        if num_retries == on_stop.max_retries or (count == 0 and on_stop.step_growth == 1):
            return tokens[:num_shown], FinishReason.GUARDRAIL, num_retries
        kept, num_retries = tokens[: place - count], num_retries + 1


WAYS: dict[str, dict[str, Any]] = {
    "as by default": {},
    "further back": {"rewind_tokens": 5, "max_retries": 8},
    "stronger each time": {"step_growth": 1.5, "max_retries": 16},
    "hardly held": {"hold_tokens": 1, "max_retries": 16},
    "stronger and further back": {"step_growth": 4.0, "rewind_tokens": 3, "hold_tokens": 20, "max_retries": 16},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_retried_response_is_what_decoding_from_the_kept_tokens_gives(
    core: EngineCore, bound: float, way: str
) -> None:
    num_retried = 0
    for seed, temperature in enumerate((1.0, 0.6, 1.0, 0.8)):
        request = ask("r", guarded(bound, {"type": "retry", **WAYS[way]}), seed=seed, temperature=temperature)
        result = run(core, [request])["r", 0]
        tokens, reason, num_retries = told(core, request)
        assert (result.token_ids, result.finish_reasons) == (tokens, [reason])
        assert report_of(result).retries == num_retries
        num_retried += num_retries
    assert num_retried > 1


def mixed(bound: float) -> list[GenerationRequest]:
    """Every second one retries; with penalties, filters, schedules and choices among them."""
    fields: list[dict[str, Any]] = [
        {}, {"frequency_penalty": 0.5}, {"top_k": 20}, {"stop": ("qz", "\n")}, {"repetition_penalty": 1.3},
    ]  # fmt: skip
    paced = [{}, {"max_response_kl": 2.0}, {"schedule": {"type": "linear", "tokens": 20}}, {"window": {"start": 3}}]
    requests: list[GenerationRequest] = []
    for i in range(10):
        way = {"type": "retry", "max_retries": 16, "rewind_tokens": 1 + i % 4}
        free = control(GOOD, **paced[i % len(paced)])
        steer = guarded(bound, way, **paced[i % len(paced)]) if i % 2 else free
        requests.append(ask(f"r{i}", steer, seed=i, num_choices=1 + i % 3, **fields[i % len(fields)]))
    return requests


def shown(results: dict[tuple[str, int], Collected]) -> dict[tuple[str, int], tuple[list[int], str, FinishReason]]:
    return {key: (result.token_ids, result.text, result.finish_reasons[0]) for key, result in results.items()}


def test_neighbours_and_those_that_retry_do_not_feel_each_other(core: EngineCore, bound: float) -> None:
    requests = mixed(bound)
    together = shown(run(core, requests))
    assert shown(run(core, requests[::-1], steps_between=2)) == together
    for request in requests:
        alone = shown(run(core, [request]))
        assert alone == {key: together[key] for key in alone}
    assert core.page_pool.num_held == 0


def test_who_loses_its_pages_while_it_retries_goes_on_as_it_would_have(core: EngineCore, bound: float) -> None:
    requests, num_steps, preempted = mixed(bound), itertools.count(), set[str]()
    expected = shown(run(core, requests))

    def preempt(core: EngineCore) -> None:
        retrying = [s for s in core._scheduler.running if s.guard is not None and s.guard.num_retries]
        if retrying and next(num_steps) % 4 == 0:
            core._scheduler._preempt(retrying[-1])
            preempted.add(retrying[-1].request.request_id)

    assert shown(run(core, requests, after_step=preempt)) == expected
    assert len(preempted) > 2
    assert core.page_pool.num_held == 0


def test_pages_behind_what_was_taken_back_are_given_back(core: EngineCore) -> None:
    way, prompt = {"type": "retry", "max_retries": 16, "rewind_tokens": 16, "hold_tokens": 16}, tuple(range(60))
    steer = guarded(bound_of(core, 1 / 8, prompt_token_ids=prompt), way)
    sizes: list[int] = []

    def note(core: EngineCore) -> None:
        sizes.extend(len(sequence.pages) for sequence in core._scheduler.running)

    for seed in range(3):
        run(core, [replace(ask("r", steer, seed=seed), prompt_token_ids=prompt)], after_step=note)
        sizes.append(0)
    assert (2, 1) in itertools.pairwise(sizes)


def test_what_was_taken_back_is_not_in_any_prompts_cache(make_core: Callable[..., EngineCore], bound: float) -> None:
    core, prompt = make_core(), tuple(range(130))
    requests = [replace(request, prompt_token_ids=prompt) for request in mixed(bound)]
    first = shown(run(core, requests))
    assert shown(run(core, requests)) == first
    assert core.status().num_cache_hits > 0


@pytest.mark.parametrize("on_stop", ["retry", "replace", {"type": "stop", "hold_tokens": 4}])
def test_nothing_that_is_taken_back_is_told(core: EngineCore, bound: float, on_stop: Any) -> None:
    for seed in range(5):
        request = ask("r", guarded(bound, on_stop), seed=seed, logprobs=2)
        result, report = (found := run(core, [request])["r", 0]), report_of(found)
        drawn = [chunk for chunk in result.chunks if chunk.token_ids]
        assert [score.token_id for chunk in drawn for score in chunk.logprobs] == result.token_ids
        assert len(drawn) == sum(chunk.edit is not None for chunk in drawn) == len(result.token_ids)
        assert all(value >= bound for value in values_of(result))
        ending = DEFAULT_REPLACEMENT if report.replaced else ""
        text = byte_tokenizer().decode(result.token_ids)
        assert result.text.removesuffix(ending) == text
        assert sum(chunk.num_drawn for chunk in result.chunks) == len(result.token_ids)
        assert sum(chunk.num_held for chunk in result.chunks) == report.tokens_taken_back


def test_a_token_is_told_when_so_many_more_have_come_and_the_last_ones_at_the_end(core: EngineCore) -> None:
    way = {"type": "replace", "hold_tokens": 3}
    result = run(core, [ask("r", guarded(-1e6, way), max_tokens=6)])["r", 0]
    assert [len(chunk.token_ids) for chunk in result.chunks] == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert [chunk.num_drawn + chunk.num_held for chunk in result.chunks] == [1] * 5 + [0, 0, 0, 1]
    assert result.token_ids == run(core, [ask("r", control(GOOD), max_tokens=6)])["r", 0].token_ids


def test_holding_back_alone_changes_no_token_of_a_response_that_stays_above(core: EngineCore) -> None:
    free = run(core, [ask("r", control(GOOD))])["r", 0]
    for on_stop in ("stop", "retry", "replace", {"type": "stop", "hold_tokens": 256}):
        result = run(core, [ask("r", guarded(-1e6, on_stop))])["r", 0]
        assert (result.token_ids, result.text, result.finish_reasons) == (free.token_ids, free.text, ["length"])


def test_a_prompt_below_the_bound_ends_at_once_unless_control_grows(core: EngineCore) -> None:
    for way, retries in (({}, 0), ({"step_growth": 2.0, "max_retries": 5}, 5)):
        result = run(core, [ask("r", guarded(1e6, {"type": "retry", "then": "replace", **way}))])["r", 0]
        assert (result.token_ids, result.text, result.finish_reasons) == ([], DEFAULT_REPLACEMENT, ["guardrail"])
        assert report_of(result) == GuardReport(retries, retries + 1, replaced=True)


@pytest.mark.parametrize("way", ["stop_token_ids", "stop", "max_tokens", "nothing else"])
def test_a_broken_bound_is_told_whatever_else_ends_the_text_with_its_token(core: EngineCore, way: str) -> None:
    free = run(core, [ask("r", control(GOOD))])["r", 0]
    ends = {"stop_token_ids": (free.token_ids[0],), "stop": (free.chunks[0].text,), "max_tokens": 1}
    end = {name: value for name, value in ends.items() if name == way}
    result = run(core, [ask("r", control(GOOD, stop_below={"line": 1e6}), **end)])["r", 0]
    assert result.finish_reasons == ["guardrail"]
    assert result.token_ids == free.token_ids[:1]
    summary = result.chunks[-1].control
    assert summary is not None
    assert summary.stopped_by is not None
    assert summary.stopped_by["line"].bound == 1e6


def test_a_prompt_that_stronger_control_lifts_over_the_bound_goes_on(core: EngineCore) -> None:
    def first_value(**options: Any) -> float:
        steer = control({"line": 1.0}, stop_below=UNBOUND, max_kl=0.5, max_shift=2.0, step_size=0.05, **options)
        return values_of(run(core, [ask("r", steer, max_tokens=1)])["r", 0])[0]

    weak, strong = first_value(), first_value(steps=40)
    assert weak < strong
    way = {"type": "retry", "step_growth": 4.0}
    steer = control({"line": 1.0}, stop_below={"line": (weak + strong) / 2}, on_stop=way, max_kl=0.5, max_shift=2.0,
                    step_size=0.05)  # fmt: skip
    result = run(core, [ask("r", steer, max_tokens=1)])["r", 0]
    assert (values_of(result), report_of(result).retries) == ([strong], 1)


def test_the_most_likely_token_is_not_drawn_again_without_stronger_control(core: EngineCore) -> None:
    bound = bound_of(core, 1 / 3, sampling=ask("r", None, temperature=0.0).sampling)
    certain: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1e-6}, {"top_k": 1}]
    for sampling, growth in itertools.product(certain, (1.0, 2.0)):
        way = {"type": "retry", "step_growth": growth, "max_retries": 3}
        result = run(core, [ask("r", guarded(bound, way), **sampling)])["r", 0]
        assert (result.finish_reasons == ["guardrail"]) or growth > 1
        assert (report_of(result).retries > 0) == (growth > 1)


def test_no_request_draws_more_than_it_may(core: EngineCore, bound: float) -> None:
    for way in ({"rewind_tokens": 6, "max_retries": 16}, {"step_growth": 1.1, "max_retries": 16}):
        request = ask("r", guarded(bound, {"type": "retry", **way}), max_tokens=12)
        result = run(core, [request])["r", 0]
        assert sum(chunk.num_drawn + chunk.num_held for chunk in result.chunks) <= request.max_drawn
        assert len(result.token_ids) <= 12
    assert request.max_drawn == 12 + 16 * 2


def test_stop_without_holding_back_is_what_it_always_was(core: EngineCore, bound: float) -> None:
    plain, named = (run(core, [ask("r", steer)])["r", 0] for steer in (
        control(GOOD, stop_below={"line": bound}), guarded(bound, "stop")))  # fmt: skip
    assert plain.token_ids == named.token_ids
    assert values_of(named)[-1] < bound
    summary = named.chunks[-1].control
    assert summary is not None
    assert summary.guardrail is None


def test_what_broke_is_told_though_its_token_is_not(core: EngineCore, bound: float) -> None:
    result = run(core, [ask("r", guarded(bound, {"type": "stop", "hold_tokens": 4}))])["r", 0]
    summary = result.chunks[-1].control
    assert summary is not None
    assert summary.stopped_by is not None
    assert summary.stopped_by["line"].value < bound == summary.stopped_by["line"].bound
    assert summary.value_after["line"] == pytest.approx(sum(values_of(result)) / len(result.token_ids))


def test_the_prompts_scores_are_told_once_though_the_first_token_is_taken_back(core: EngineCore) -> None:
    free = [run(core, [ask("r", control(GOOD, stop_below=UNBOUND), seed=seed)])["r", 0] for seed in range(4)]
    second = max(values_of(result)[1] for result in free)
    first = values_of(free[0])[0]
    assert min(values_of(result)[1] for result in free) < min(first, second)
    way = {"type": "retry", "max_retries": 16}
    limit = min(first, sorted(values_of(result)[1] for result in free)[-1])
    retried = 0
    for seed in range(4):
        request = ask("r", guarded(limit, way), seed=seed, prompt_logprobs=True, logprobs=0)
        result = run(core, [request])["r", 0]
        assert [len(c.prompt_logprobs) for c in result.chunks if c.prompt_logprobs is not None] == [len(PROMPT)]
        retried += report_of(result).retries
    assert retried > 0


@pytest.fixture(scope="module")
def schema() -> CompiledSchema:
    tokenizer = byte_tokenizer()
    compiler = SchemaCompiler(tokenizer, vocab_size=VOCAB, eos_token_ids=[EOS])
    return compiler.compile('{"type": "array", "items": {"enum": ["cat", "dog", 12]}, "minItems": 9, "maxItems": 9}')


def test_a_text_with_a_schema_holds_it_however_often_it_goes_back(core: EngineCore, schema: CompiledSchema) -> None:
    asked = replace(ask("r", None, ignore_eos=False, max_tokens=90), structure=schema)
    bound = bound_of(core, 1 / 40, sampling=asked.sampling, structure=schema)
    steer = guarded(bound, {"type": "retry", "max_retries": 16, "rewind_tokens": 4})
    num_repaired = 0
    for seed in range(6):
        sampling = asked.sampling.model_copy(update={"seed": seed})
        result = run(core, [replace(asked, control=steer, sampling=sampling)])["r", 0]
        if result.finish_reasons == ["stop"]:
            num_repaired += report_of(result).retries
            assert set(json.loads(result.text)) <= {"cat", "dog", 12}
    assert num_repaired > 0
