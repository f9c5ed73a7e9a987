"""Candidates compared by value, on tiny models: what is kept, that nothing else can tell, and what is freed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.control.objective_rows import scores
from server.control.params import ControlParams
from server.engines.base import EngineStatus, NullObserver
from server.engines.embedded.core import EngineCore
from server.engines.embedded.sequence import Sequence
from server.errors import InvalidRequestError
from server.types import FinishReason, GenerationChunk, GenerationRequest, SamplingParams, SearchReport, TokenEdit
from tests.conftest import Collected, Results, run, waiting_again
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
    """Without the chunks that only count tokens, and without what only a search reports."""
    return [unsearched(chunk) for chunk in collected.chunks if not chunk.num_drawn]


def unsearched(chunk: GenerationChunk) -> GenerationChunk:
    return chunk if chunk.control is None else replace(chunk, control=replace(chunk.control, search=None))


def reported_score(collected: Collected) -> float | None:
    control = collected.chunks[-1].control
    assert control is not None
    assert control.search is not None
    return control.search.score


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


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    number=st.integers(0, 2),
    block=st.integers(1, 20),
    seed=st.integers(0, 2**40),
    stop_at=st.integers(0, 60),
    more=st.fixed_dictionaries(
        {},
        optional={
            "logprobs": st.just(2), "presence_penalty": st.just(1.5), "repetition_penalty": st.just(1.3),
            "logit_bias": st.just({65: 3.0}), "min_p": st.just(0.01), "ignore_eos": st.just(True),
        },
    ),
    how=st.sampled_from(
        [{}, {"max_response_kl": 1.0}, {"gate": {"head": "good", "below": 0.5, "hysteresis": 0.5}},
         {"window": {"start": 3, "end": 9}}, {"stop_below": {"line": -9.0}}]
    ),
)  # fmt: skip
def test_whoever_wins_the_text_goes_on_as_if_it_had_been_drawn_alone(
    core: EngineCore, number: int, block: int, seed: int, stop_at: int, more: dict[str, Any], how: dict[str, Any]
) -> None:
    """Text, log-probabilities, penalties, stop strings across borders and what control remembers."""
    way = {"objective": {"weights": {"line": 1.0}}, "step_size": 1.0, **how}
    plain = ask(ControlParams.model_validate(way), seed=seed, max_tokens=20, **more)
    free = solo(core, plain, number)
    if stop := free.text[stop_at : stop_at + 2]:
        plain = replace(plain, sampling=plain.sampling.model_copy(update={"stop": (stop,)}))
    expected = solo(core, plain, number)
    request = replace(plain, control=searching(way, 3, block))
    order = core._candidates._order
    core._candidates._order = lambda candidates: [(number, SearchReport(None)), *order(candidates)]  # type: ignore[method-assign]
    try:
        result = run(core, [request])["r", 0]
    finally:
        core._candidates._order = order  # type: ignore[method-assign]
    assert told(result) == [replace(chunk, num_drawn=0) for chunk in expected.chunks]
    assert sum(chunk.num_drawn for chunk in result.chunks) >= len(result.token_ids)
    assert core.page_pool.num_held == 0


def solo(core: EngineCore, request: GenerationRequest, number: int) -> Collected:
    """A generation without search that draws as a candidate does."""
    collected = Collected()
    (sequence,) = core.sequences(request, collected.add)
    stream = sequence.row_sampling.stream
    sequence.row_sampling = replace(sequence.row_sampling, stream=(*stream, number) if number else stream)
    core.add([sequence])
    while core.has_work:
        core.step()
    return collected


def mixed(seed: int = 0) -> list[GenerationRequest]:
    """Searches of all kinds among plain requests."""
    controls = [searching(way, 2 + i % 3, 1 + 3 * i) for i, way in enumerate(WAYS)]
    plain = requests(6, seed)
    searches = [replace(r, request_id=f"s{i}", control=controls[i]) for i, r in enumerate(requests(5, seed + 1))]
    whole = ask(ControlParams.model_validate(WAYS[1]), name="b", n=2, best_of=5, seed=seed)
    return [item for pair in itertools.zip_longest(plain, searches) for item in pair if item is not None] + [whole]


def kept(results: Results) -> dict[tuple[str, int], list[Any]]:
    return {key: [replace(c, num_drawn=0) for c in result.chunks if c.token_ids or c.finish_reason]
            for key, result in results.items()}  # fmt: skip


def drawn(results: Results) -> dict[str, int]:
    totals: dict[str, int] = {}
    for (name, _), result in results.items():
        totals[name] = totals.get(name, 0) + sum(chunk.num_drawn for chunk in result.chunks)
    return totals


@pytest.mark.parametrize(("architecture", "dtype"), [*MODELS, ("gpt2", "float32")])
def test_a_search_alone_equals_the_same_among_others_in_any_order(
    make_core: Callable[..., EngineCore], architecture: str, dtype: str
) -> None:
    core = make_core(architecture, dtype=dtype)
    together = run(core, mixed())
    assert kept(run(core, mixed()[::-1], steps_between=2)) == kept(together)
    assert kept(run(make_core(architecture, dtype=dtype, max_batch_size=4), mixed())) == kept(together)
    for request in mixed():
        alone = run(core, [request])
        assert kept(alone) == {key: value for key, value in kept(together).items() if key in alone}
        assert drawn(alone).items() <= drawn(together).items()
    assert core.page_pool.num_held == 0


@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_a_search_that_loses_its_pages_draws_the_same_and_counts_it_once(
    make_core: Callable[..., EngineCore], model: tuple[str, str]
) -> None:
    architecture, dtype = model
    asked = [
        ask(searching(WAYS[i % 2], 3, 5 + 30 * (i == 1)), prompt=tuple((i * j) % 250 for j in range(40 + 9 * i)),
            n=1 + i % 2, name=f"r{i}", seed=i, max_tokens=70, prompt_logprobs=True, logprobs=0)
        for i in range(4)
    ] + [ask(ControlParams.model_validate(WAYS[0]), name="b", best_of=3, max_tokens=70)]  # fmt: skip
    roomy = make_core(architecture, dtype=dtype)
    tight = small_core(make_core, 9, architecture=architecture, dtype=dtype)
    preempted: set[str] = set()

    def watch(core: EngineCore) -> None:
        preempted.update(s.request.request_id for s in waiting_again(core))

    expected, got = run(roomy, asked), run(tight, asked, after_step=watch)
    assert preempted & {"r0", "r1", "r2"}
    assert kept(got) == kept(expected)
    assert drawn(got) == drawn(expected)
    assert tight.page_pool.num_held == roomy.page_pool.num_held == 0


@pytest.fixture
def undisturbed(core: EngineCore) -> dict[tuple[str, int], list[Any]]:
    return kept(run(core, mixed()))


@pytest.fixture
def finite(make_core: Callable[..., EngineCore]) -> Callable[[int], EngineCore]:
    return cache(lambda num_pages: small_core(make_core, num_pages))


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    aborts=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 11)), max_size=6), num_pages=st.sampled_from([9, 24])
)
def test_no_page_is_left_and_no_neighbour_felt_whoever_is_aborted_when(
    finite: Callable[[int], EngineCore],
    undisturbed: dict[tuple[str, int], list[Any]],
    aborts: list[tuple[int, int]],
    num_pages: int,
) -> None:
    asked, core = mixed(), finite(num_pages)
    results: Results = {}
    sequences: list[list[Sequence]] = []
    for request in asked:

        def emit(chunk: GenerationChunk, name: str = request.request_id) -> None:
            results.setdefault((name, chunk.index), Collected()).add(chunk)

        sequences.append(core.sequences(request, emit))
        core.add(sequences[-1])
    aborted: set[str] = set()
    for step in itertools.count():
        for at, which in aborts:
            if at == step:
                core.abort(sequences[which])
                aborted.add(asked[which].request_id)
        if not core.has_work:
            break
        core.step()
    assert core.page_pool.num_held == 0
    assert core.status().num_running == 0
    for request in asked:
        for index in range(request.num_choices):
            result = results[request.request_id, index]
            assert len(result.finish_reasons) == 1
            assert result.chunks[-1].finish_reason is not None
            if request.request_id not in aborted:
                assert kept({("r", 0): result})["r", 0] == undisturbed[request.request_id, index]


def test_best_of_returns_the_best_of_the_choices_that_it_would_have_been(make_core: Callable[..., EngineCore]) -> None:
    core, way = make_core(), ControlParams.model_validate(WAYS[1])
    request = ask(way, n=2, best_of=6, max_tokens=9, stop=("\n",), logprobs=1)
    choices = run(core, [replace(request, num_choices=6, best_of=None)])
    values = [score_of(core, request, choices["r", i].token_ids) for i in range(6)]
    best = sorted(range(6), key=lambda i: -values[i])[:2]
    for engine in (core, make_core(max_batch_size=4)):
        results = run(engine, [request])
        assert sorted(results) == [("r", 0), ("r", 1)]
        for rank, i in enumerate(best):
            expected = [replace(chunk, index=rank, num_drawn=0) for chunk in choices["r", i].chunks]
            assert told(results["r", rank]) == expected
            assert reported_score(results["r", rank]) == pytest.approx(values[i], rel=1e-4)
            assert choices["r", i].chunks[-1].control.search is None
        assert drawn(results)["r"] == sum(len(choice.token_ids) for choice in choices.values())


def test_a_candidate_that_breaks_the_guardrail_is_kept_only_when_all_do(core: EngineCore) -> None:
    guarded = searching(WAYS[0], 4, 6, stop_below={"line": -2.0})
    reasons = set()
    for seed in range(12):
        request = ask(guarded, seed=seed, ignore_eos=True, max_tokens=6)
        tried = run(core, [replace(request, control=replace_search(guarded), num_choices=1)])
        singles = [solo(core, replace(request, control=replace_search(guarded)), j) for j in range(4)]
        assert singles[0].token_ids == tried["r", 0].token_ids
        broken = [single.finish_reasons[0] is FinishReason.GUARDRAIL for single in singles]
        chunks = run(core, [request])["r", 0].chunks
        reason = chunks[-1].finish_reason
        assert (reason is FinishReason.GUARDRAIL) == all(broken)
        assert bool(chunks[-1].control.stopped_by) == all(broken)
        reasons.add((any(broken), reason))
    assert (True, FinishReason.LENGTH) in reasons


def test_candidates_share_the_pages_of_what_they_go_on_from(core: EngineCore) -> None:
    core.add(core.sequences(ask(searching(WAYS[0], 4, 3), prompt=(1,) * 130), lambda _: None))
    for _ in range(4):
        core.step()
    # The prompt's two whole pages once, and the page after them for the leader and for each candidate.
    assert core.page_pool.num_held == 2 + 5
    assert core.status().num_running == 4


def test_rows_are_set_aside_for_all_candidates_at_once(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(max_batch_size=5)
    sizes: list[int] = []
    forward = core.runner.forward

    def counted(decode: list[Any], segments: list[Any], **options: Any) -> torch.Tensor:
        sizes.append(len(decode))
        return forward(decode, segments, **options)

    core.runner.forward = counted  # type: ignore[method-assign]
    run(core, [ask(searching(WAYS[0], 3, 2), n=2, name="a", ignore_eos=True), *requests(4)])
    assert max(sizes) == 5


def test_a_search_that_can_never_fit_is_refused_by_name(make_core: Callable[..., EngineCore]) -> None:
    core = small_core(make_core, 6)
    for control, message in (
        (searching(WAYS[0], 9, 4), "8 rows at once"),
        (searching(WAYS[0], 6, 100), "this server has 6"),
    ):
        with pytest.raises(InvalidRequestError, match=message) as error:
            core.check(ask(control))
        assert error.value.param == "control.search.candidates"
    core.check(ask(searching(WAYS[0], 2, 100)))


@pytest.mark.parametrize("where", ["before a draw", "behind the last token", "in a whole response"])
def test_a_candidate_that_is_not_finite_ends_its_request_alone(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = where == "in a whole response"
    broken = ask(ControlParams.model_validate(WAYS[0]), n=2, best_of=3, name="x", ignore_eos=True) if whole else ask(
        searching(WAYS[0], 3, 2), name="x", ignore_eos=True)  # fmt: skip
    others = [ask(None, name="p", seed=8), ask(searching(WAYS[0], 2, 3), name="s")]
    expected = kept(run(core, others))
    forward, steps = core.runner.forward, itertools.count()

    def failing(*args: Any, **options: Any) -> torch.Tensor:
        hidden = forward(*args, **options)
        if next(steps) == (2 if where == "behind the last token" else 1):
            hidden = hidden.clone()
            hidden[1] = float("nan")
        return hidden

    monkeypatch.setattr(core.runner, "forward", failing)
    results = run(core, [broken, *others])
    assert all(results.pop(("x", i)).finish_reasons == [FinishReason.ERROR] for i in range(broken.num_choices))
    assert kept(results) == expected
    assert core.page_pool.num_held == 0


def test_what_the_prompt_scored_and_when_it_began_is_told_once(make_core: Callable[..., EngineCore]) -> None:
    class Recorder(NullObserver):
        num_first, num_finished, num_tokens = 0, 0, 0

        def on_first_token(self, **_: float) -> None:
            self.num_first += 1

        def on_finish(self, **_: Any) -> None:
            self.num_finished += 1

        def on_token(self, *, inter_token_s: float | None, edit: TokenEdit | None) -> None:
            assert inter_token_s is None
            assert edit is not None
            self.num_tokens += 1

        def on_step(self, status: EngineStatus) -> None:
            assert status.num_running <= 8

    recorder = Recorder()
    core = make_core(observer=recorder)
    results = run(core, [ask(searching(WAYS[0], 2, 4), n=3, prompt_logprobs=True, logprobs=0)])
    scored = [c.prompt_logprobs for result in results.values() for c in result.chunks if c.prompt_logprobs is not None]
    assert [len(scores) for scores in scored] == [3]
    assert (recorder.num_first, recorder.num_finished) == (3, 3)
    assert recorder.num_tokens == drawn(results)["r"]
