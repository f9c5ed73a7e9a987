from collections.abc import Callable
from typing import Any

import psutil
import pytest

from server.control.params import ControlParams
from server.engines.embedded.core import EngineCore
from server.errors import ConfigurationError
from server.types import FinishReason, GenerationChunk, GenerationRequest, SamplingParams
from tests.conftest import control, run, waiting_again
from tests.engines.conftest import prompt_tokens_read

# Torch's attention in both types, and the native one.
MODELS = [("llama", "float32"), ("llama", "bfloat16"), ("wide_llama", "bfloat16")]


def add(core: EngineCore, name: str, prompt_len: int, max_tokens: int, log: list[str]) -> None:
    def emit(chunk: GenerationChunk) -> None:
        log.extend([name] * len(chunk.token_ids))

    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    core.add(core.sequences(GenerationRequest(name, tuple(i % 250 for i in range(prompt_len)), sampling), emit))


def test_a_running_row_gets_a_token_at_every_step_while_a_long_prompt_comes_in(core: EngineCore) -> None:
    log: list[str] = []
    add(core, "short", 3, 30, log)
    core.step()
    add(core, "long", 220, 5, log)
    for step in range(2, 9):
        core.step()
        assert log.count("short") == step
    assert "long" in log


def test_a_request_joins_and_leaves_between_any_two_steps(core: EngineCore) -> None:
    log: list[str] = []
    add(core, "a", 4, 6, log)
    core.step()
    add(core, "b", 4, 2, log)
    core.step()
    core.step()
    assert log == ["a", "a", "b", "a", "b"]
    assert core.status().num_running == 1


def test_those_who_wait_are_served_in_their_order(core: EngineCore) -> None:
    log: list[str] = []
    for i in range(20):
        add(core, f"{i:02}", 4, 1, log)
    assert core.status().num_waiting == 20
    while core.has_work:
        core.step()
    assert log == sorted(log)


def test_pages_follow_use_and_none_is_left_held(core: EngineCore) -> None:
    pool = core.page_pool
    add(core, "long", 200, 3, [])
    add(core, "short", 3, 3, [])
    core.step()
    assert pool.num_held == 4 + 1
    while core.has_work:
        core.step()
    assert pool.num_held == 0


def small_core(make_core: Callable[..., EngineCore], num_pages: int, **options: Any) -> EngineCore:
    """With so many pages besides the null page, enough for one sequence of 256 tokens at least."""
    core = make_core(**options)
    core.states([1])
    page_gib = core.runner.kv.bytes_per_page / 2**30
    return make_core(kv_cache_gib=(num_pages + 1.5) * page_gib, **options)


@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_running_out_of_pages_changes_nobodys_tokens(
    make_core: Callable[..., EngineCore], model: tuple[str, str]
) -> None:
    architecture, dtype = model
    requests = [
        GenerationRequest(
            f"r{i}", tuple((i * j) % 250 for j in range(30 + 11 * i)), SamplingParams(max_tokens=90, seed=i),
            control({"good": 1.0}) if i % 2 else None, num_choices=1 + i % 2,
        )
        for i in range(5)
    ]  # fmt: skip
    roomy = make_core(architecture, dtype=dtype)
    tight = small_core(make_core, 5, architecture=architecture, dtype=dtype)
    preempted: set[str] = set()

    def watch(core: EngineCore) -> None:
        preempted.update(s.request.request_id for s in waiting_again(core))

    expected, got = run(roomy, requests), run(tight, requests, after_step=watch)
    assert preempted
    assert {key: r.token_ids for key, r in got.items()} == {key: r.token_ids for key, r in expected.items()}
    assert all(len(result.finish_reasons) == 1 for result in got.values())
    assert tight.page_pool.num_held == 0
    assert tight.status().num_preemptions >= len(preempted)


@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_a_shared_beginning_is_computed_once_and_changes_nothing(
    make_core: Callable[..., EngineCore], model: tuple[str, str]
) -> None:
    architecture, dtype = model

    def request(name: str, ending: int, steer: ControlParams | None, salt: str = "") -> GenerationRequest:
        prompt = (*(i % 250 for i in range(130)), ending)
        return GenerationRequest(name, prompt, SamplingParams(max_tokens=20, seed=5), steer, cache_salt=salt)

    steer = control({"good": 1.0})
    warm, cold = (make_core(architecture, dtype=dtype, has_prefix_cache=has) for has in (True, False))
    read = prompt_tokens_read(warm)
    for number, (ending, how) in enumerate([(1, None), (2, steer), (3, None), (1, steer)]):
        read.clear()
        sequences = warm.sequences(request("r", ending, how), lambda _: None)
        warm.add(sequences)
        while warm.has_work:
            warm.step()
        assert sum(read) == (3 if number else 131)
        assert sequences[0].token_ids == run(cold, [request("r", ending, how)])["r", 0].token_ids
    stranger = warm.sequences(request("r", 1, None, salt="another caller"), lambda _: None)
    read.clear()
    warm.add(stranger)
    while warm.has_work:
        warm.step()
    assert sum(read) == 131
    status = warm.status()
    assert (status.num_cache_queries, status.num_cache_hits) == (5 * 131, 3 * 128)
    assert status.num_preemptions == status.num_cache_evictions == 0


def distinct(number: int) -> GenerationRequest:
    """A prompt of 191 tokens that begins as no other one."""
    prompt = (number // 250, number % 250, *range(189))
    return GenerationRequest(f"r{number}", prompt, SamplingParams(max_tokens=1, ignore_eos=True))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_memory_of_distinct_prompts_settles_at_the_high_water_mark(
    make_core: Callable[..., EngineCore], share: float
) -> None:
    core = make_core(kv_cache_high_water=share)
    pool = core.page_pool
    for number in range(20):
        run(core, [distinct(number)])
    assert pool.num_used == pool.high_water == int(share * (pool.num_pages - 1))
    assert core.runner.kv_bytes == pool.num_pages * core.runner.kv.bytes_per_page


@pytest.mark.slow
def test_after_half_a_million_distinct_prompt_tokens_the_process_holds_the_mark_and_no_more(
    make_core: Callable[..., EngineCore],
) -> None:
    core = make_core("wide_llama", max_batch_size=512, prefill_chunk_tokens=4096, kv_cache_high_water=0.25)
    process, cache_bytes = psutil.Process(), core.runner.kv_bytes
    requests = [distinct(number) for number in range(500_000 // 191)]
    run(core, requests[:20])
    before_bytes = process.memory_info().rss
    for start in range(20, len(requests), 20):
        run(core, requests[start : start + 20])
    assert core.page_pool.num_used == core.page_pool.high_water
    # Beside the quarter of the cache, what allocators keep.
    assert process.memory_info().rss - before_bytes < 0.5 * cache_bytes


def test_a_prompt_that_is_preempted_half_way_is_scored_once(make_core: Callable[..., EngineCore]) -> None:
    sampling = SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=True, seed=1)
    scored = GenerationRequest("scored", tuple(i % 250 for i in range(200)), sampling)
    expected = run(make_core(), [scored])["scored", 0].chunks[0].prompt_logprobs
    core, chunks = make_core(), []
    (sequence,) = core.sequences(scored, chunks.append)
    core.add([sequence])
    core.step()
    admitted_s = sequence.scheduled_s
    core._scheduler._preempt(core._scheduler.running[0])
    while core.has_work:
        core.step()
    assert chunks[0].prompt_logprobs == expected
    # The time in the queue is the time before the first admission.
    assert sequence.arrival_s < admitted_s == sequence.scheduled_s


def test_a_cache_too_small_for_one_sequence_is_refused(make_core: Callable[..., EngineCore]) -> None:
    with pytest.raises(ConfigurationError, match="kv_cache_gib: a sequence of 256 tokens takes"):
        small_core(make_core, 3)


def test_what_a_failed_sequence_leaves_is_cleared(core: EngineCore) -> None:
    sequences = core.sequences(GenerationRequest("r", tuple(range(100)), SamplingParams(max_tokens=9)), lambda _: None)
    core.add(sequences)
    core.step()
    pages = list(sequences[0].pages)
    assert all(keys[pages].any() for keys, _ in core.runner.kv._layers.values())
    core.abort(sequences)
    assert not any(keys[pages].any() for keys, _ in core.runner.kv._layers.values())
    assert core.page_pool.find(sequences[0].group.digests) == []


def test_a_sequence_that_is_aborted_while_it_waits_never_runs_and_the_next_takes_its_turn(
    make_core: Callable[..., EngineCore],
) -> None:
    core, log = make_core(max_batch_size=1), []
    add(core, "runs", 4, 3, log)
    core.step()
    request = GenerationRequest("waits", (1, 2, 3), SamplingParams(max_tokens=5))
    chunks: list[GenerationChunk] = []
    waiting = core.sequences(request, chunks.append)
    core.add(waiting)
    add(core, "next", 4, 1, log)
    core.abort(waiting)
    assert [chunk.finish_reason for chunk in chunks] == [FinishReason.ABORT]
    assert core.status().num_waiting == 1
    while core.has_work:
        core.step()
    assert log == ["runs"] * 3 + ["next"]
    assert len(chunks) == 1


def test_no_more_run_at_once_than_are_allowed_and_no_fewer(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(max_batch_size=3)
    for i in range(8):
        add(core, str(i), 4, 3 + i % 2, [])
    running = []
    while core.has_work:
        core.step()
        running.append(core.status().num_running)
    assert max(running) == 3
    assert running[0] == 3


def test_a_known_beginning_is_held_by_all_who_use_it_and_each_takes_only_what_it_lacks(core: EngineCore) -> None:
    pool = core.page_pool
    add(core, "first", 130, 1, [])
    while core.has_work:
        core.step()
    assert pool.num_held == 0
    for number in (1, 2):
        add(core, "again", 130, 30, [])
        core.step()
        # Two full pages for all, and the third for each.
        assert pool.num_held == 2 + number
    while core.has_work:
        core.step()
    assert pool.num_held == 0


def test_one_that_has_to_wait_for_pages_holds_none_meanwhile(make_core: Callable[..., EngineCore]) -> None:
    core = small_core(make_core, 5)
    add(core, "first", 130, 1, [])
    while core.has_work:
        core.step()
    other = GenerationRequest("other", tuple(range(100, 200)), SamplingParams(max_tokens=20, ignore_eos=True))
    core.add(core.sequences(other, lambda _: None))
    core.step()
    log: list[str] = []
    # It knows two of its three pages, and there is one for the third, but none that the other may want meanwhile.
    add(core, "waits", 130, 1, log)
    for _ in range(5):
        core.step()
        assert core.status().num_waiting == 1
        assert core.page_pool.num_held == 2
    while core.has_work:
        core.step()
    assert log == ["waits"]
    assert core.page_pool.num_held == 0
