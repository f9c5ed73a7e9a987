"""Faults inside the engine: whom each one ends, that everyone is told exactly once, and that the rest goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines import choice
from server.engines.embedded.core import EngineCore
from server.engines.embedded.engine import EmbeddedEngine
from server.engines.embedded.model.loader import load_model
from server.engines.embedded.sequence import Sequence
from server.settings import Settings
from server.types import FinishReason, GenerationRequest, SamplingParams
from tests.conftest import Collected, Results, control, random_linear_head, run
from value_models.heads import ValueHead

BAD_TOKEN = 77


def request(name: str, prompt: tuple[int, ...] = (5, 6), *, choices: int = 1, **sampling: Any) -> GenerationRequest:
    options = {"max_tokens": 6, "seed": 3, **sampling}
    return GenerationRequest(name, prompt, SamplingParams(**options), num_choices=choices)


def neighbours() -> list[GenerationRequest]:
    """One that decodes long, one whose prompt is scored, and a controlled one."""
    scored = request("scored", tuple(range(1, 50)), prompt_logprobs=True, logprobs=2)
    steered = GenerationRequest("steered", (9, 9), SamplingParams(max_tokens=8, seed=5), control({"good": 1.0}))
    return [request("long", max_tokens=20), scored, steered]


def reasons(results: Results, name: str) -> list[FinishReason]:
    return [reason for (key, _), result in sorted(results.items()) if key == name for reason in result.finish_reasons]


def chunks_of(results: Results, names: set[str]) -> dict[Any, Any]:
    return {key: result.chunks for key, result in results.items() if key[0] in names}


def break_tokenizer(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    works = core._vocabulary.token_bytes

    def broken(token_id: int, previous: int | None) -> bytes:
        if token_id == BAD_TOKEN:
            raise RuntimeError("the tokenizer does not know this token")
        return works(token_id, previous)

    monkeypatch.setattr(core._vocabulary, "token_bytes", broken)


@pytest.mark.parametrize("max_tokens", [0, 5])
@pytest.mark.parametrize("choices", [1, 3])
def test_a_tokenizer_that_fails_on_an_echoed_prompt_ends_only_that_request(
    make_core: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch, max_tokens: int, choices: int
) -> None:
    expected = run(make_core(), neighbours())
    core = make_core()
    break_tokenizer(core, monkeypatch)
    victim = request("victim", (1, BAD_TOKEN, 2), choices=choices, max_tokens=max_tokens, prompt_logprobs=True)
    results = run(core, [neighbours()[0], victim, *neighbours()[1:]])
    assert reasons(results, "victim") == [FinishReason.ERROR] * choices
    names = {"long", "scored", "steered"}
    assert chunks_of(results, names) == chunks_of(expected, names)
    assert core.page_pool.num_held == 0


def test_a_tokenizer_that_fails_on_a_drawn_token_ends_only_that_row(
    make_core: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [request("long", max_tokens=20), request("other", (3,), max_tokens=9)]
    expected = run(make_core(), plain)
    core = make_core()
    monkeypatch.setattr(choice, "with_texts", lambda *_: 1 / 0)
    results = run(core, [*plain, request("victim", logprobs=1)])
    assert reasons(results, "victim") == [FinishReason.ERROR]
    assert [chunk.token_ids for chunk in results["victim", 0].chunks] == [()]
    assert chunks_of(results, {"long", "other"}) == chunks_of(expected, {"long", "other"})


def test_a_text_that_cannot_be_decoded_ends_only_its_own_row(core: EngineCore) -> None:
    expected = run(core, neighbours())
    results: Results = {}
    victim = core.sequences(request("victim"), results.setdefault(("victim", 0), Collected()).add)
    victim[0].detokenizer = None  # type: ignore[assignment]
    core.add(victim)
    results |= run(core, neighbours())
    assert reasons(results, "victim") == [FinishReason.ERROR]
    names = {"long", "scored", "steered"}
    assert chunks_of(results, names) == chunks_of(expected, names)


def nan_head() -> ValueHead:
    head = random_linear_head(9)
    head.inputs_UD.fill_(float("nan"))
    return head


NAN_CONTROLS: dict[str, dict[str, Any]] = {
    "weighted sum": {"objective": {"weights": {"broken": 1.0, "good": 1.0}}},
    "worst case": {"objective": {"type": "worst_case", "weights": {"broken": 1.0, "good": 1.0}}},
    "target": {"objective": {"type": "target", "values": {"broken": 1.0}}},
    "floor": {"objective": {"type": "floor", "weights": {"good": 1.0}, "floors": {"broken": 0.0}}},
    "gate": {"objective": {"weights": {"good": 1.0}}, "gate": {"head": "broken", "below": 0.0}},
    "schedule": {"objective": {"weights": {"broken": 1.0}}, "schedule": {"type": "linear", "tokens": 4}},
    "response": {"objective": {"weights": {"broken": 1.0}}, "max_response_kl": 1.0},
}


@pytest.mark.parametrize("how", NAN_CONTROLS)
def test_a_head_that_is_not_finite_leaves_the_base_models_tokens_and_its_neighbours(core: EngineCore, how: str) -> None:
    core.use(core.registry.with_head("broken", nan_head()))
    base = run(core, [request("victim"), *neighbours()])
    steered = GenerationRequest(
        "victim", (5, 6), SamplingParams(max_tokens=6, seed=3), ControlParams.model_validate(NAN_CONTROLS[how])
    )
    results = run(core, [steered, *neighbours()])
    assert results["victim", 0].token_ids == base["victim", 0].token_ids
    assert reasons(results, "victim") == [FinishReason.LENGTH]
    names = {"long", "scored", "steered"}
    assert chunks_of(results, names) == chunks_of(base, names)


def test_a_guardrail_whose_head_is_not_finite_ends_the_response(core: EngineCore) -> None:
    core.use(core.registry.with_head("broken", nan_head()))
    guarded = ControlParams.model_validate({"objective": {"weights": {"good": 1.0}}, "stop_below": {"broken": -1e6}})
    victim = GenerationRequest("victim", (5, 6), SamplingParams(max_tokens=6, seed=3), guarded)
    assert reasons(run(core, [victim]), "victim") == [FinishReason.GUARDRAIL]


def test_running_out_of_memory_in_a_step_ends_what_runs_and_serves_what_waits(
    make_core: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request(f"r{i}", (i + 1,), seed=i) for i in range(7)]
    expected = run(make_core(), asked)
    core = make_core(max_batch_size=3)
    forward, steps = core.runner.forward, iter(range(1000))

    def short_of_memory(*args: Any, **options: Any) -> torch.Tensor:
        if next(steps) == 2:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return forward(*args, **options)

    monkeypatch.setattr(core.runner, "forward", short_of_memory)
    results = run(core, asked)
    ended = {request.request_id: reasons(results, request.request_id) for request in asked}
    failed = [name for name, told in ended.items() if told == [FinishReason.ERROR]]
    assert failed == ["r0", "r1", "r2"]
    others = {f"r{i}" for i in range(3, 7)}
    assert chunks_of(results, others) == chunks_of(expected, others)
    assert (core.page_pool.num_held, core.status().num_running) == (0, 0)


class Broken(BaseException):
    """Nothing catches it but the loop's own end."""


@pytest.fixture
async def engine(model_folder: Callable[..., Path], tmp_path: Path) -> AsyncIterator[EmbeddedEngine]:
    (tmp_path / "heads").mkdir()
    engine = EmbeddedEngine(
        Settings(
            model=str(model_folder()), heads_dir=tmp_path / "heads", device="cpu", dtype="float32", max_batch_size=2
        )
    )
    await engine.start()
    yield engine
    await engine.stop()


async def ends_of(engine: EmbeddedEngine, break_it: Callable[[EngineCore], object]) -> list[list[FinishReason]]:
    """Of two requests that run, two that wait, and one that comes in just before the loop breaks."""
    streams = [engine.generate(request(f"r{i}", max_tokens=200)) for i in range(4)]
    for stream in streams[:2]:
        await anext(stream)
    core = engine._core
    assert core is not None
    engine._post(lambda: break_it(core))
    streams.append(engine.generate(request("late", choices=2)))
    listed = [[chunk.finish_reason async for chunk in stream if chunk.finish_reason] for stream in streams]
    while engine.status().is_running:
        await asyncio.sleep(0.01)
    return listed


async def test_a_loop_that_dies_tells_everyone_exactly_once(engine: EmbeddedEngine) -> None:
    def die(core: EngineCore) -> None:
        raise Broken

    running, waiting, late = [FinishReason.ERROR], [FinishReason.ERROR], [FinishReason.ABORT] * 2
    assert await ends_of(engine, die) == [running, running, waiting, waiting, late]


async def test_a_device_that_fails_for_good_tells_everyone_exactly_once(engine: EmbeddedEngine) -> None:
    """After some CUDA errors every later operation fails, those that tidy up included."""

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def break_device(core: EngineCore) -> None:
        core.runner.forward = core.runner.kv.clear = fail  # type: ignore[method-assign,assignment]

    ends = await ends_of(engine, break_device)
    assert [len(told) for told in ends] == [1, 1, 1, 1, 2]
    assert {reason for told in ends for reason in told} <= {FinishReason.ERROR, FinishReason.ABORT}


async def test_what_comes_in_between_two_calls_to_stop_is_told_too(engine: EmbeddedEngine) -> None:
    stream = engine.generate(request("r", max_tokens=200))
    await anext(stream)
    everything_is_in = threading.Event()
    engine._post(lambda: everything_is_in.wait(30))
    for _ in range(2):
        engine._inbox.put(None)
    late = engine.generate(request("late"))
    everything_is_in.set()
    for each in (stream, late):
        assert [chunk.finish_reason async for chunk in each if chunk.finish_reason] == [FinishReason.ABORT]


MIXED = [None, control({"good": 1.0}, step_size=2.0), control({"line": -1.0, "good": 0.5}, max_kl=0.1)]
arrivals = st.lists(
    st.tuples(
        st.integers(0, 6),  # steps after the one before
        st.integers(1, 100),  # length of the prompt
        st.integers(1, 40),  # new tokens
        st.integers(1, 3),  # choices
        st.integers(0, len(MIXED) - 1),
        st.booleans(),  # whether the prompt is scored
        st.none() | st.integers(0, 30),  # steps until it is aborted
    ),
    min_size=1,
    max_size=8,
)


def make_roomy_core(folder: Path, heads: dict[str, ValueHead], **options: Any) -> EngineCore:
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    options = {"max_batch_size": 8, "prefill_chunk_tokens": 64, **options}
    return EngineCore(loaded, HeadRegistry(heads), **options)


@pytest.fixture(scope="module")
def alone(model_folder: Callable[..., Path], heads: dict[str, ValueHead]) -> EngineCore:
    return make_roomy_core(model_folder(), heads)


@examples(max_examples=15, deadline=None)
@given(plan=arrivals, pages=st.integers(4, 12), rows=st.integers(1, 5))
def test_whatever_arrives_and_is_aborted_everyone_ends_once_with_the_tokens_it_has_alone(
    model_folder: Callable[..., Path],
    heads: dict[str, ValueHead],
    alone: EngineCore,
    plan: list[Any],
    pages: int,
    rows: int,
) -> None:
    """Few pages and few rows, so that sequences wait, share, and are preempted, too."""
    alone.states([1])
    page_gib = alone.runner.kv.bytes_per_page / 2**30
    core = make_roomy_core(model_folder(), heads, max_batch_size=rows, kv_cache_gib=(pages + 1.5) * page_gib)
    results: Results = {}
    asked: list[GenerationRequest] = []
    aborts: list[tuple[int, list[Sequence]]] = []
    step = 0
    for number, (wait, length, new, choices, how, is_scored, abort_after) in enumerate(plan):
        for _ in range(wait):
            step = advance(core, aborts, step)
        sampling = SamplingParams(max_tokens=new, seed=number, prompt_logprobs=is_scored, logprobs=1)
        # Few different beginnings, so that some are shared.
        prompt = tuple((7 * i + length % 2) % 250 for i in range(length))
        asked.append(GenerationRequest(f"r{number}", prompt, sampling, MIXED[how], num_choices=choices))

        def emit(chunk: Any, name: str = f"r{number}") -> None:
            results.setdefault((name, chunk.index), Collected()).add(chunk)

        sequences = core.sequences(asked[-1], emit)
        core.add(sequences)
        if abort_after is not None:
            aborts.append((step + abort_after, sequences))
    while core.has_work:
        step = advance(core, aborts, step)
    for one in asked:
        solo = run(alone, [one])
        for index in range(one.num_choices):
            got, expected = results[one.request_id, index], solo[one.request_id, index]
            assert len(got.finish_reasons) == 1
            assert got.chunks[-1].finish_reason is not None
            if got.finish_reasons == [FinishReason.ABORT]:
                assert got.token_ids == expected.token_ids[: len(got.token_ids)]
            else:
                assert (got.token_ids, got.text) == (expected.token_ids, expected.text)
    assert (core.page_pool.num_held, core.status().num_running, core.status().num_waiting) == (0, 0, 0)


def advance(core: EngineCore, aborts: list[tuple[int, list[Sequence]]], step: int) -> int:
    for due, sequences in aborts:
        if due == step:
            core.abort(sequences)
    core.step()
    return step + 1
