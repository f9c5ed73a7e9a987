"""The laws of control, on real vLLM: against vLLM without control, and against the embedded engine.

Tolerances are for float32, where both engines sum in orders of their own, in log-probabilities (nats), values (reward
units) and divergences (nats); values that are larger than 1 may differ by as large a share.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
import torch

from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import load_model
from server.engines.segments import OutputFormat, Segment
from server.engines.vllm.engine import VllmEngine
from server.engines.vllm.sampling import vllm_sampling
from server.engines.vllm.wire import CONTROL_KEY
from server.errors import UnknownHeadError, UnsupportedFieldError
from server.settings import Settings
from server.types import FinishReason, GenerationChunk, GenerationRequest, Opening, SamplingParams
from tests.conftest import Collected, control, run
from value_models.heads import ValueHead

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(600),
]
TOLERANCE = 1e-3
# Steps that end on a floor make a difference in rounding one of the side that the next step begins on: inside the
# embedded engine alone, states that differ by 1e-6 end with values 0.6 apart. Beside vLLM on AVX2 0.014 was seen, and a
# token that the other of two budgets held.
TOLERANCES = {"floor": 3e-2}


def params(body: dict[str, Any]) -> ControlParams:
    return ControlParams.model_validate({"step_size": 2.0, **body})


CONTROLS: dict[str, ControlParams | None] = {
    "none": None,
    "nonlinear": control({"positive": 1.0}, step_size=2.0),
    "linear": control({"plain": 1.0}, step_size=0.3),
    "mixed": control({"plain": -1.0, "positive": 0.5}, max_kl=0.1),
    "worst_case": params({"objective": {"type": "worst_case", "weights": {"positive": 1.0, "deep": 1.0}}}),
    "target": params({"objective": {"type": "target", "values": {"positive": 0.5}}}),
    "floor": params({"objective": {"type": "floor", "floors": {"deep": 0.2}, "weights": {"positive": 1.0}}}),
    "budget": control({"positive": 1.0}, step_size=2.0, max_response_kl=0.8),
    "conditions": params(
        {
            "objective": {"weights": {"positive": 1.0}},
            "gate": {"head": "plain", "below": 0.5, "hysteresis": 0.2},
            "window": {"start": 2, "end": 14},
            "schedule": {"type": "linear", "tokens": 12},
        }
    ),
}


PHASES = {
    "answer": control({"positive": 1.0}, step_size=2.0, phase="answer"),
    "answer within limits": control({"plain": 1.0}, phase="answer", max_response_kl=0.4, window={"start": 2}),
    "reasoning": control({"positive": 1.0}, step_size=2.0, phase="reasoning"),
}


def request(number: int, name: str = "none", *, length: int = 9, **sampling: Any) -> GenerationRequest:
    rng = random.Random(number)
    prompt = tuple(rng.randrange(256) for _ in range(length))
    options = {"max_tokens": 18, "temperature": 0.0, "logprobs": 3, "ignore_eos": True, **sampling}
    return GenerationRequest(f"r{number}", prompt, SamplingParams(**options), CONTROLS[name])


async def collect(engine: VllmEngine, asked: GenerationRequest) -> Collected:
    """The first choice."""
    collected = Collected()
    async for chunk in engine.generate(asked):
        if chunk.index == 0:
            collected.add(chunk)
    return collected


async def collect_all(engine: VllmEngine, asked: list[GenerationRequest]) -> list[Collected]:
    return list(await asyncio.gather(*(collect(engine, one) for one in asked)))


def logprobs(collected: Collected) -> torch.Tensor:
    return torch.tensor([chunk.logprobs[0].logprob for chunk in collected.chunks])


def assert_same_edits(mine: list[GenerationChunk], theirs: list[GenerationChunk], tolerance: float = TOLERANCE) -> None:
    for ours, other in zip(mine, theirs, strict=True):
        if ours.edit is None or other.edit is None:
            assert ours.edit is other.edit
            continue
        assert ours.edit.value_before == pytest.approx(other.edit.value_before, abs=tolerance, rel=tolerance)
        assert ours.edit.value_after == pytest.approx(other.edit.value_after, abs=tolerance, rel=tolerance)
        assert ours.edit.kl == pytest.approx(other.edit.kl, abs=tolerance, rel=tolerance)
        assert (ours.edit.held_by is None, ours.edit.is_gate_open) == (
            other.edit.held_by is None,
            other.edit.is_gate_open,
        )
        assert ours.edit.held_by is other.edit.held_by or tolerance > TOLERANCE


def assert_same_response(mine: Collected, theirs: Collected, tolerance: float = TOLERANCE) -> None:
    """Tokens, and within the tolerance log-probabilities and edits."""
    assert mine.token_ids == theirs.token_ids
    torch.testing.assert_close(logprobs(mine), logprobs(theirs), atol=tolerance, rtol=0)
    assert_same_edits(mine.chunks, theirs.chunks, tolerance)


@pytest_asyncio.fixture(loop_scope="session")
async def engine(vllm_engine: VllmEngine) -> AsyncIterator[VllmEngine]:
    await vllm_engine.start()
    yield vllm_engine
    assert vllm_engine.status().num_running + vllm_engine.status().num_waiting == 0


@pytest.fixture(scope="module")
def plain_vllm(vllm_settings: Settings) -> Iterator[Any]:
    """vLLM as anyone has it, on the same model."""
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    settings = vllm_settings
    llm = LLM(
        model=settings.model,
        dtype="float32",
        max_num_seqs=settings.max_batch_size,
        kv_cache_memory_bytes=int(0.05 * 2**30),
        skip_tokenizer_init=True,
        generation_config="vllm",
        **settings.vllm_options,
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture
def core(vllm_settings: Settings, heads: dict[str, ValueHead]) -> EngineCore:
    """The embedded engine on the same model and heads."""
    named = {"positive": heads["good"], "plain": heads["line"], "deep": heads["deep"]}
    loaded = load_model(vllm_settings.model, device="cpu", dtype="float32")
    return EngineCore(
        loaded, HeadRegistry(named), max_batch_size=8, output_format=OutputFormat.of(loaded.tokenizer, "auto")
    )


def by_plain_vllm(plain_vllm: Any, asked: list[GenerationRequest]) -> list[Any]:
    from vllm import SamplingParams as VllmSampling  # pyright: ignore[reportMissingImports]

    sampling = [VllmSampling(**vllm_sampling(one, 0, ())) for one in asked]
    prompts = [{"prompt_token_ids": list(one.prompt_token_ids)} for one in asked]
    return [output.outputs[0] for output in plain_vllm.generate(prompts, sampling, use_tqdm=False)]


async def test_the_runner_is_the_one_that_was_asked_for(engine: VllmEngine) -> None:
    """`make test-vllm` runs all of this once on each."""
    assert engine._llm.vllm_config.use_v2_model_runner is (os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1")


async def test_without_control_a_request_is_vllms_own_to_the_bit(engine: VllmEngine, plain_vllm: Any) -> None:
    for seed, temperature in ((1, 0.0), (2, 1.0)):
        asked = request(seed, temperature=temperature, seed=seed)
        mine, (theirs,) = await collect(engine, asked), by_plain_vllm(plain_vllm, [asked])
        assert mine.token_ids == list(theirs.token_ids)
        expected = [scores[token].logprob for token, scores in zip(theirs.token_ids, theirs.logprobs, strict=True)]
        assert logprobs(mine).equal(torch.tensor(expected))


async def test_controlled_neighbours_leave_the_others_as_plain_vllm_has_them(
    engine: VllmEngine, plain_vllm: Any
) -> None:
    names = ["none", "nonlinear", "none", "linear", "mixed", "none", "budget", "none"]
    asked = [request(seed, name, seed=seed, temperature=0.8) for seed, name in enumerate(names)]
    mine = await collect_all(engine, asked)
    free = [index for index, name in enumerate(names) if name == "none"]
    for index, theirs in zip(free, by_plain_vllm(plain_vllm, [asked[index] for index in free]), strict=True):
        assert mine[index].token_ids == list(theirs.token_ids)
    moved = by_plain_vllm(plain_vllm, [asked[index] for index in range(8) if index not in free])
    assert any(mine[i].token_ids != list(other.token_ids) for i, other in zip([1, 3, 4, 6], moved, strict=True))


@pytest.mark.parametrize("name", CONTROLS)
async def test_control_is_that_of_the_embedded_engine(engine: VllmEngine, core: EngineCore, name: str) -> None:
    asked = [request(seed, name, length=3 + 7 * seed) for seed in range(4)]
    expected, tolerance = run(core, asked), TOLERANCES.get(name, TOLERANCE)
    for one, mine in zip(asked, await collect_all(engine, asked), strict=True):
        theirs = expected[one.request_id, 0]
        assert_same_response(mine, theirs, tolerance)
        assert mine.text == theirs.text
        summary, other = mine.chunks[-1].control, theirs.chunks[-1].control
        assert (summary is None) == (other is None) == (CONTROLS[name] is None)
        if summary is not None and other is not None:
            assert summary.mean_kl == pytest.approx(other.mean_kl, abs=tolerance, rel=tolerance)
            assert summary.held_share == other.held_share or name in TOLERANCES


@pytest.mark.parametrize("name", PHASES)
async def test_control_of_a_part_of_a_response_is_that_of_the_embedded_engine(
    engine: VllmEngine, core: EngineCore, name: str
) -> None:
    asked = [
        replace(request(seed, length=3 + 7 * seed), control=PHASES[name], opening=opening)
        for seed, opening in enumerate([Opening.REASONING, Opening.EITHER, Opening.REASONING, Opening.ANSWER])
    ]
    expected = run(core, asked)
    parts: set[tuple[Segment, bool]] = set()
    for one, mine in zip(asked, await collect_all(engine, asked), strict=True):
        theirs = expected[one.request_id, 0]
        assert_same_response(mine, theirs)
        assert [chunk.segment for chunk in mine.chunks] == [chunk.segment for chunk in theirs.chunks]
        parts |= {(chunk.segment, chunk.edit is not None) for chunk in mine.chunks}
    acting = Segment.ANSWER if name.startswith("answer") else Segment.REASONING
    assert {(acting, True)} <= parts
    assert all(segment is acting for segment, is_edited in parts if is_edited)
    assert {segment for segment, _ in parts} == {Segment.ANSWER, Segment.REASONING}


async def test_under_load_every_token_comes_with_its_own_edit(engine: VllmEngine, core: EngineCore) -> None:
    rng = random.Random(0)
    asked = [
        request(seed, rng.choice(list(CONTROLS)), length=rng.choice([1, 20, 70]), seed=seed, temperature=1.0,
                max_tokens=rng.choice([1, 9, 30]))
        for seed in range(24)
    ]  # fmt: skip

    async def late(one: GenerationRequest) -> Collected:
        await asyncio.sleep(rng.random())
        return await collect(engine, one)

    for one, mine in zip(asked, await asyncio.gather(*map(late, asked)), strict=True):
        assert len(mine.token_ids) == one.sampling.max_tokens
        if one.control is None:
            assert all(chunk.edit is None for chunk in mine.chunks)
            continue
        # The state that each token was drawn from, computed anew, says what its values were.
        states_TD = core.states([*one.prompt_token_ids, *mine.token_ids])
        for position, chunk in enumerate(mine.chunks):
            state_BD = states_TD[len(one.prompt_token_ids) - 1 + position].expand(2, -1)
            assert chunk.edit is not None
            for name, value in chunk.edit.value_before.items():
                expected = float(core.registry.head(name).value(state_BD)[0])
                assert value == pytest.approx(expected, abs=TOLERANCE)


async def test_a_prompt_computed_without_control_serves_one_with_control_and_the_other_way(
    engine: VllmEngine,
) -> None:
    llm, cached = engine._llm, []
    get_output = llm.output_processor.process_outputs

    def process_outputs(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        cached.extend(output.prefill_stats.num_cached_tokens for output in outputs if output.prefill_stats)
        return get_output(outputs, *args, **kwargs)

    llm.output_processor.process_outputs = process_outputs
    try:
        controlled, free = request(5, "nonlinear", length=100), request(5, length=100)
        cold = []
        for one in (controlled, free):
            await llm.reset_prefix_cache()
            cold.append(await collect(engine, one))
        assert cached == [0, 0]
        for first, second, expected in ((controlled, free, cold[1]), (free, controlled, cold[0])):
            await llm.reset_prefix_cache()
            await collect(engine, first)
            mine = await collect(engine, second)
            assert cached[-1] >= 64
            assert mine.token_ids == expected.token_ids
            assert_same_edits(mine.chunks, expected.chunks)
    finally:
        del llm.output_processor.process_outputs


async def test_log_probabilities_of_a_prompt_are_those_without_control(engine: VllmEngine, core: EngineCore) -> None:
    asked = replace(request(7, "nonlinear", length=40, prompt_logprobs=True), num_choices=2)
    mine, expected = await collect(engine, asked), run(core, [asked])[asked.request_id, 0]
    ours, theirs = mine.chunks[0].prompt_logprobs, expected.chunks[0].prompt_logprobs
    assert ours is not None
    assert theirs is not None
    assert ours[0] is theirs[0] is None
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert one is not None
        assert other is not None
        assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE)
        assert [t.token_id for t in one.top] == [t.token_id for t in other.top]
    alone = await collect(engine, replace(asked, sampling=asked.sampling.model_copy(update={"max_tokens": 0})))
    assert alone.token_ids == []
    assert alone.chunks[-1].prompt_logprobs is not None
    assert alone.finish_reasons == [FinishReason.LENGTH]


async def test_a_guardrail_and_a_stop_string_end_a_response_as_in_the_embedded_engine(
    engine: VllmEngine, core: EngineCore
) -> None:
    free = await collect(engine, request(3, "nonlinear", max_tokens=30))
    values = [chunk.edit.value_after["positive"] for chunk in free.chunks if chunk.edit]
    stopped = ControlParams.model_validate(
        {"objective": {"weights": {"positive": 1.0}}, "step_size": 2.0, "stop_below": {"positive": min(values) + 1e-2}}
    )
    guarded = replace(request(3, max_tokens=30), control=stopped)
    cut = request(3, "nonlinear", max_tokens=30, stop=(free.text[6:9],))
    for one, reason in ((guarded, FinishReason.GUARDRAIL), (cut, FinishReason.STOP)):
        mine, theirs = await collect(engine, one), run(core, [one])[one.request_id, 0]
        assert mine.finish_reasons == theirs.finish_reasons == [reason]
        assert (mine.text, mine.token_ids) == (theirs.text, theirs.token_ids)


async def test_choices_draw_from_streams_of_their_own_and_are_reported_apart(engine: VllmEngine) -> None:
    asked = replace(request(9, "mixed", seed=4, temperature=1.5), num_choices=3)
    texts, again = ([""] * 3 for _ in range(2))
    for out in (texts, again):
        async for chunk in engine.generate(asked):
            out[chunk.index] += chunk.text
            assert chunk.edit is not None
    assert texts == again
    assert len(set(texts)) == 3


async def test_heads_come_and_go_on_every_worker(engine: VllmEngine) -> None:
    running = engine.generate(request(1, "linear", max_tokens=60))
    await anext(running)
    unloading = asyncio.create_task(engine.unload_head("plain"))
    await asyncio.sleep(0)
    with pytest.raises(UnknownHeadError):
        engine.generate(request(2, "linear"))
    reasons = [chunk.finish_reason async for chunk in running if chunk.finish_reason]
    assert reasons == [FinishReason.LENGTH]
    await unloading
    assert "plain" not in engine.info.heads
    await engine.load_head("plain")
    assert (await collect(engine, request(2, "linear"))).chunks[-1].control is not None
    with pytest.raises(UnknownHeadError):
        await engine.load_head("../plain")
    (problem,) = await engine._llm.collective_rpc("recontrol_read_head", args=("plain", {"name": "another"}))
    assert "not the same on every machine" in problem


async def test_control_that_fails_inside_ends_its_own_request_alone(engine: VllmEngine) -> None:
    from vllm import SamplingParams as VllmSampling  # pyright: ignore[reportMissingImports]

    beside = asyncio.create_task(collect(engine, request(1, "linear", max_tokens=40)))
    for payload in ('{"objective": 7}', '{"objective": {"weights": {"nobody": 1.0}}}'):
        sampling = VllmSampling(max_tokens=5, detokenize=False, extra_args={CONTROL_KEY: payload})
        last = [out async for out in engine._llm.generate({"prompt_token_ids": [1, 2]}, sampling, f"bad {payload}")][-1]
        assert last.outputs[0].finish_reason == "error"
    assert (await beside).finish_reasons == [FinishReason.LENGTH]
    assert engine.status().is_running


async def test_a_field_that_nobody_has_thought_of_is_refused(engine: VllmEngine) -> None:
    class Newer(SamplingParams):
        beams: int = 1

    asked = replace(request(1), sampling=Newer(beams=2))
    with pytest.raises(UnsupportedFieldError, match="beams"):
        engine.generate(asked)
