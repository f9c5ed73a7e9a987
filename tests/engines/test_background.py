"""Texts that are read in spare rows: exactly as alone, beside requests that do not feel them and come first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engines.base import NullObserver
from server.engines.embedded.background import BESIDE_REQUESTS
from server.engines.embedded.core import EngineCore
from server.engines.embedded.engine import EmbeddedEngine
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.sequence import Sequence
from server.engines.embedded.spare_rows import SpareRows
from server.errors import EngineStoppedError
from server.settings import Settings
from server.training.control import JobCancelledError, JobControl
from server.types import GenerationRequest, SamplingParams
from tests.conftest import control, run
from tests.engines.test_scheduler import MODELS, small_core

TEXTS = [[(7 * i + j) % 250 for j in range(20 + 45 * i)] for i in range(4)]
REQUESTS = [
    GenerationRequest(
        f"r{i}", tuple((i * j) % 250 for j in range(30 + 11 * i)), SamplingParams(max_tokens=60, seed=i),
        control({"good": 1.0}) if i % 2 else None,
    )
    for i in range(5)
]  # fmt: skip


def add_background(core: EngineCore, texts: list[list[int]] = TEXTS) -> list[Sequence]:
    readers: list[Sequence] = []
    for i, token_ids in enumerate(texts):
        request = GenerationRequest(f"b{i}", tuple(token_ids), SamplingParams(max_tokens=0))
        (reader,) = core.sequences(request, lambda _: None, observer=NullObserver())
        reader.is_background, reader.prompt_states = True, []
        readers.append(reader)
    core.add(readers)
    return readers


def states(reader: Sequence) -> Tensor:
    return torch.cat(reader.prompt_states or [])


def add(core: EngineCore, request: GenerationRequest) -> Sequence:
    (sequence,) = core.sequences(request, lambda _: None)
    core.add([sequence])
    return sequence


@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_requests_and_texts_in_the_background_are_to_the_bit_what_they_are_alone(
    make_core: Callable[..., EngineCore], model: tuple[str, str]
) -> None:
    architecture, dtype = model
    alone = run(make_core(architecture, dtype=dtype), REQUESTS)
    expected = make_core(architecture, dtype=dtype).states_of(TEXTS)
    core = small_core(make_core, 7, architecture=architecture, dtype=dtype)
    readers = add_background(core)
    for _ in range(2):
        core.step()
    beside = run(core, REQUESTS, steps_between=5)
    assert {key: got.token_ids for key, got in beside.items()} == {key: got.token_ids for key, got in alone.items()}
    assert all(torch.equal(states(reader), one) for reader, one in zip(readers, expected, strict=True))
    assert core.page_pool.num_held == 0


def test_samples_in_the_background_are_those_of_requests(make_core: Callable[..., EngineCore]) -> None:
    alone = run(make_core(), REQUESTS)
    core = make_core(max_batch_size=3)
    samples = [core.sequences(request, lambda _: None, keep_states=True)[0] for request in REQUESTS]
    for sample in samples:
        sample.is_background = True
    core.add(samples)
    run(core, REQUESTS[:2], steps_between=9)
    assert [sample.token_ids for sample in samples] == [alone[f"r{i}", 0].token_ids for i in range(5)]


def test_beside_requests_a_step_holds_a_few_tokens_of_the_background_and_without_them_a_chunk(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = core.runner.forward

    def counted(decode: list[Any], segments: list[Any], **options: Any) -> Tensor:
        sizes.append(len(decode) + sum(len(segment.token_ids) for segment in segments))
        return forward(decode, segments, **options)

    monkeypatch.setattr(core.runner, "forward", counted)
    request = add(core, REQUESTS[0])
    core.step()
    add_background(core, TEXTS * 3)
    sizes.clear()
    while request.finish_reason is None:
        core.step()
    assert max(sizes) == 1 + BESIDE_REQUESTS
    while core.has_work:
        core.step()
    assert max(sizes) == 64


def test_a_request_takes_the_rows_of_the_background_at_once(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(max_batch_size=2, prefill_chunk_tokens=64)
    add_background(core, [TEXTS[3], TEXTS[3]])
    core.step()
    requests = [add(core, request) for request in REQUESTS[:2]]
    core.step()
    core.step()
    assert all(request.token_ids for request in requests)
    assert (core.status().num_running, core.status().num_waiting) == (2, 0)


def test_what_is_counted_and_cached_is_requests_alone(core: EngineCore) -> None:
    add_background(core, [TEXTS[3], TEXTS[3]])
    assert core.status().num_waiting == 0
    core.step()
    core.step()
    assert core.status().num_running == 0
    while core.has_work:
        core.step()
    status = core.status()
    assert (status.num_preemptions, status.num_cache_queries) == (0, 0)
    add(core, GenerationRequest("r", tuple(TEXTS[3]), SamplingParams(max_tokens=1)))
    while core.has_work:
        core.step()
    assert core.status().num_cache_hits == 0


@pytest.fixture
def spare(core: EngineCore, load_tiny: Callable[..., LoadedModel]) -> Iterator[tuple[SpareRows, JobControl]]:
    """Beside an engine's thread of its own."""
    job = JobControl(1)
    actions: list[Callable[[], None]] = []
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.wait(0.001):
            while actions:
                actions.pop(0)()
            if core.has_work:
                core.step()

    thread = threading.Thread(target=loop)
    thread.start()
    yield SpareRows(load_tiny(), core, actions.append, job.check), job
    is_over.set()
    thread.join()


def test_a_thread_beside_the_engine_reads_what_the_engine_itself_reads(
    spare: tuple[SpareRows, JobControl], make_core: Callable[..., EngineCore]
) -> None:
    rows, _ = spare
    read = rows.states_of(TEXTS)
    other = make_core()
    assert all(torch.equal(a, b) for a, b in zip(read, other.states_of(TEXTS), strict=True))
    assert torch.equal(rows.lm_head.logits(read[3]), other.lm_head.logits(read[3]))
    tokens = torch.tensor(TEXTS[3])
    assert torch.equal(rows.lm_head.logp_grads(read[3], tokens), other.lm_head.logp_grads(read[3], tokens))
    assert "_transposed" not in vars(rows._core.lm_head)


def test_a_cancelled_job_ends_where_it_waits_and_gives_its_rows_up(
    spare: tuple[SpareRows, JobControl], core: EngineCore
) -> None:
    rows, job = spare
    job.cancel()
    with pytest.raises(JobCancelledError):
        rows.states_of(TEXTS)
    rows.close()
    with pytest.raises(JobCancelledError):
        rows.lm_head.project(torch.zeros(3, 32))


async def test_an_engine_that_stops_ends_what_reads_in_it(model_folder: Callable[..., Any], tmp_path: Any) -> None:
    options: dict[str, Any] = {"model": str(model_folder()), "heads_dir": tmp_path, "dtype": "float32"}
    engine = EmbeddedEngine(Settings(**options, device="cpu", max_batch_size=2))
    await engine.start()
    sources = engine.training_sources(lambda: None)
    rows: Any = sources.texts.core  # type: ignore[attr-defined]
    await engine.stop()
    with pytest.raises(EngineStoppedError):
        rows.states_of(TEXTS)
