"""What prompts that are being read promise to running rows and to each other, by a clock that steps move themselves."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.layout import DecodeRow, PromptChunk
from server.engines.embedded.sequence import Sequence
from server.engines.embedded.shares import Budget
from server.types import GenerationChunk, GenerationRequest, SamplingParams, ScoringParams
from tests.conftest import Collected, Results, control, run
from tests.engines.test_scheduler import MODELS, small_core


class Machine:
    """Takes 16 ms for a step of one row, `token_s` for each further row or token of a prompt, and `told_s` more for one
    that is told."""

    def __init__(self, token_s: float, told_s: float = 0.0) -> None:
        self.token_s, self.told_s, self.now_s = token_s, told_s, 0.0
        self.fed: list[int] = []
        """Tokens of each step beside one row for each sequence that feeds rows."""

    def runs(self, core: EngineCore) -> EngineCore:
        forward, add_prompt = core.runner.forward, core._scores.add_prompt

        def timed(decode: list[DecodeRow], chunks: list[PromptChunk], **options: Any) -> Any:
            num_tokens = len(decode) + sum(len(chunk.token_ids) for chunk in chunks)
            self.fed.append(num_tokens - len({id(row.pages) for row in decode}))
            self.now_s += 0.016 + self.token_s * num_tokens
            return forward(decode, chunks, **options)

        def tell(sequence: Sequence, chunk: PromptChunk, hidden_TD: Any) -> None:
            self.now_s += self.told_s * len(chunk.token_ids) * sequence.tells_prompt
            add_prompt(sequence, chunk, hidden_TD)

        core.runner.forward = timed  # type: ignore[method-assign]
        core._scores.add_prompt = tell  # type: ignore[method-assign]
        return core

    def clock(self) -> float:
        return self.now_s


def paced(make_core: Callable[..., EngineCore], machine: Machine, **options: Any) -> EngineCore:
    return machine.runs(make_core(max_step_stretch=2.0, clock=machine.clock, **options))


def request(name: str, prompt_len: int, max_tokens: int = 4, **options: Any) -> GenerationRequest:
    prompt = tuple((7 * i + len(name)) % 250 for i in range(prompt_len))
    return GenerationRequest(name, prompt, SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True), **options)


def start(
    core: EngineCore, asked: GenerationRequest, times: dict[str, list[float]], clock: Callable[[], float]
) -> None:
    """Each token's time goes to `times`."""

    def emit(chunk: GenerationChunk) -> None:
        times.setdefault(asked.request_id, []).extend([clock()] * chunk.num_drawn)

    core.add(core.sequences(asked, emit))


def gaps(times_s: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times_s)]


@pytest.mark.parametrize("token_s", [0.0001, 0.001, 0.004, 0.016])
def test_no_gap_in_a_stream_is_over_three_usual_steps_while_prompts_are_read(
    make_core: Callable[..., EngineCore], token_s: float
) -> None:
    machine = Machine(token_s)
    core, times = paced(make_core, machine, prefill_chunk_tokens=256), {}
    start(core, request("stream", 4, 240), times, machine.clock)
    for step in range(240):
        core.step()
        if step in (5, 6, 20):
            start(core, request(f"long{step}", 230, 1), times, machine.clock)
    usual_s = gaps(times["stream"])[0]
    assert max(gaps(times["stream"])) <= 3 * usual_s + 2 * token_s  # Of the rows that have joined it.
    assert "long5" in times


def test_no_gap_in_a_stream_is_over_three_usual_steps_while_prompts_are_told(
    make_core: Callable[..., EngineCore],
) -> None:
    machine = Machine(0.0005, told_s=0.004)
    core, times = paced(make_core, machine, prefill_chunk_tokens=256), {}
    start(core, request("stream", 4, 240), times, machine.clock)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=True, logprobs=2)
    for step in range(240):
        core.step()
        if step in (5, 6, 20):
            asked = request(f"told{step}", 200)
            start(core, replace(asked, sampling=sampling), times, machine.clock)
            start(core, request(f"plain{step}", 230, 1), times, machine.clock)
    usual_s = gaps(times["stream"])[0]
    assert max(gaps(times["stream"])) <= 3 * usual_s
    assert {"told5", "told20", "plain20"} <= set(times)


@pytest.mark.parametrize("has_stream", [False, True])
def test_a_short_prompts_wait_does_not_grow_with_the_number_of_long_ones(
    make_core: Callable[..., EngineCore], has_stream: bool
) -> None:
    waits: list[int] = []
    for num_long in (1, 3, 6, 30):
        machine, times = Machine(0.001), {}
        core = paced(make_core, machine)
        if has_stream:
            start(core, request("stream", 4, 200), times, machine.clock)
            core.step()
        for i in range(num_long):
            start(core, request(f"long{i:02}", 220), times, machine.clock)
        core.step()
        start(core, request("short", 10), times, machine.clock)
        waits.append(0)
        while "short" not in times:
            core.step()
            waits[-1] += 1
    assert len(set(waits)) == 1
    assert waits[0] <= (8 if has_stream else 1)


def test_a_long_prompt_is_read_while_short_ones_keep_coming(make_core: Callable[..., EngineCore]) -> None:
    core, times = make_core(), {}
    for name in ("long", "next"):
        start(core, request(name, 220, 1), times, lambda: 0.0)
    for step in range(16):
        for i in range(4):
            start(core, request(f"{step}-{i}", 30, 1), times, lambda: 0.0)
        core.step()
    # Half of 64 tokens are theirs in every step.
    assert {"long", "next"} <= set(times)


def test_short_ones_pass_one_that_lacks_pages_but_not_for_ever(make_core: Callable[..., EngineCore]) -> None:
    core, times = small_core(make_core, 5, max_batch_size=2), {}
    start(core, request("holds", 10, 200), times, lambda: 0.0)
    core.step()
    start(core, request("stuck", 250, 1), times, lambda: 0.0)
    for i in range(6):
        start(core, request(f"short{i}", 10, 1), times, lambda: 0.0)
    for _ in range(20):
        core.step()
    assert [name for name in times if name != "holds"] == ["short0", "short1"]
    while core.has_work:
        core.step()
    assert [name for name in times if name != "holds"][2] == "stuck"
    assert len(times) == 8


def test_a_prompt_is_read_once_for_all_choices_however_it_is_shared(make_core: Callable[..., EngineCore]) -> None:
    machine = Machine(0.001)
    core, times = paced(make_core, machine), {}
    for name in ("a", "bc"):
        start(core, request(name, 150, 1, num_choices=3), times, machine.clock)
    while core.has_work:
        core.step()
    assert sum(machine.fed) == 300
    assert len(times["a"]) == len(times["bc"]) == 3


def test_what_is_fed_again_after_preemption_is_rationed_like_a_prompt(make_core: Callable[..., EngineCore]) -> None:
    machine = Machine(0.002)
    core, times = paced(make_core, machine, prefill_chunk_tokens=256), {}
    start(core, request("stream", 4, 200), times, machine.clock)
    start(core, request("late", 4, 120), times, machine.clock)
    for _ in range(100):
        core.step()
    core._scheduler._preempt(core._scheduler.running[-1])
    machine.fed.clear()
    while core.has_work:
        core.step()
    assert sum(machine.fed) >= 80
    assert max(machine.fed) <= 16
    assert (len(times["stream"]), len(times["late"])) == (200, 120)


def ration(core: EngineCore, seed: int) -> EngineCore:
    """Each step gets any budget at all."""
    rng = random.Random(seed)
    core._scheduler._budget = lambda _: Budget(rng.choice([1, 2, 3, 17, 40, 64, 100]))  # type: ignore[method-assign]
    return core


def mixed_requests() -> list[GenerationRequest]:
    rng = random.Random(3)
    asked: list[GenerationRequest] = []
    for i, length in enumerate([150, 9, 64, 200, 65, 130, 1, 90]):
        prompt = tuple(rng.randrange(250) for _ in range(length))
        sampling = SamplingParams(max_tokens=10, seed=i, prompt_logprobs=i % 3 == 0, logprobs=2)
        steer = control(
            {"good": 1.0}, search={"type": "blocks", "candidates": 2, "block_tokens": 4} if i == 3 else None
        )
        asked.append(GenerationRequest(f"g{i}", prompt, sampling, steer if i % 2 else None, num_choices=1 + i % 2))
        scoring = ScoringParams(heads=("good", "deep"), per_token=bool(i % 2), hidden_state=True)
        asked.append(GenerationRequest(f"s{i}", prompt[::-1], SamplingParams(max_tokens=0), scoring=scoring))
    return asked


def told(results: Results) -> dict[tuple[str, int], Any]:
    def of(result: Collected) -> Any:
        tokens = [(chunk.token_ids, chunk.logprobs, chunk.prompt_values) for chunk in result.chunks]
        return tokens, [chunk.prompt_logprobs for chunk in result.chunks if chunk.prompt_logprobs], result.text

    return {key: of(result) for key, result in results.items()}


@pytest.mark.parametrize("model", [*MODELS, ("gpt2", "float32"), ("gemma2", "bfloat16")], ids="-".join)
def test_nothing_that_is_told_depends_on_where_prompts_were_cut(
    make_core: Callable[..., EngineCore], model: tuple[str, str]
) -> None:
    architecture, dtype = model
    whole = make_core(architecture, dtype=dtype, prefill_chunk_tokens=2048, has_prefix_cache=False)
    expected = told(run(whole, mixed_requests()))
    for seed in range(2):
        core = ration(make_core(architecture, dtype=dtype, has_prefix_cache=bool(seed)), seed)
        assert told(run(core, mixed_requests(), steps_between=seed)) == expected
