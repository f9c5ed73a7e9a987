"""What the fake engine adds to the contract that test_contract.py holds every engine to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from server.control.objectives import WeightedSum
from server.control.params import ControlParams
from server.engines import create_engine
from server.engines.base import NullObserver
from server.engines.fake import FakeEngine
from server.settings import Settings
from server.types import FinishReason, GenerationChunk, GenerationRequest, SamplingParams


class Ends(NullObserver):
    """Remembers how sequences ended and how many tokens they had."""

    def __init__(self) -> None:
        self.reasons: Counter[FinishReason] = Counter()
        self.generation_tokens = 0

    def on_finish(self, *, reason: FinishReason, generation_tokens: int, **_: Any) -> None:
        self.reasons[reason] += 1
        self.generation_tokens += generation_tokens


@pytest.fixture
def ends() -> Ends:
    return Ends()


@pytest.fixture
async def engine(ends: Ends) -> FakeEngine:
    engine = FakeEngine(observer=ends)
    await engine.start()
    return engine


def ask(*, control: ControlParams | None = None, num_choices: int = 1, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(**{"max_tokens": 20, "seed": 1, **sampling})
    return GenerationRequest("r", (104, 105), params, control, num_choices)


async def everything(engine: FakeEngine, request: GenerationRequest) -> list[GenerationChunk]:
    return [chunk async for chunk in engine.generate(request)]


async def test_the_settings_can_choose_it() -> None:
    assert isinstance(create_engine(Settings(engine="fake")), FakeEngine)


async def test_a_stop_string_cuts_the_text_and_only_the_tokens_drawn_are_counted(
    engine: FakeEngine, ends: Ends
) -> None:
    text = "".join(chunk.text for chunk in await everything(engine, ask()))
    before = ends.generation_tokens
    chunks = await everything(engine, ask(stop=(text[3:6],)))
    assert "".join(chunk.text for chunk in chunks) == text[: text.index(text[3:6])]
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert ends.generation_tokens - before == sum(len(chunk.token_ids) for chunk in chunks) < 20


async def test_a_closed_stream_is_counted_as_aborted_choices_and_gives_nothing_more(
    engine: FakeEngine, ends: Ends
) -> None:
    stream = engine.generate(ask(num_choices=3))
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    assert engine.num_open == 0
    assert ends.reasons == {FinishReason.ABORT: 3}
    assert [chunk async for chunk in stream] == []


async def test_stopping_ends_every_choice_with_an_abort(engine: FakeEngine, ends: Ends) -> None:
    stream = engine.generate(ask(num_choices=2))
    await anext(stream)
    await engine.stop()
    reasons = [chunk.finish_reason async for chunk in stream if chunk.finish_reason]
    assert reasons == [FinishReason.ABORT] * 2
    assert ends.reasons == {FinishReason.ABORT: 2}
    assert engine.num_open == 0


async def test_control_is_summarised_even_when_no_token_is_drawn(engine: FakeEngine) -> None:
    (chunk,) = await everything(engine, ask(max_tokens=0, control=ControlParams.for_head("plain")))
    assert chunk.control is not None
    assert chunk.finish_reason is FinishReason.LENGTH


async def test_the_text_depends_on_seed_choice_and_prompt_and_on_nothing_else(engine: FakeEngine) -> None:
    def text(chunks: list[GenerationChunk], index: int = 0) -> str:
        return "".join(chunk.text for chunk in chunks if chunk.index == index)

    two = await everything(engine, ask(num_choices=2))
    assert text(two) == text(await everything(engine, ask()))
    assert len({text(two), text(two, 1), text(await everything(engine, ask(seed=2)))}) == 3


async def test_a_guardrail_ends_a_choice_with_its_own_reason(engine: FakeEngine) -> None:
    objective = WeightedSum(weights={"plain": 1.0})
    for bound, reason in ((0.6, FinishReason.GUARDRAIL), (0.4, FinishReason.LENGTH)):
        control = ControlParams(objective=objective, stop_below={"plain": bound})
        chunks = await everything(engine, ask(max_tokens=4, control=control))
        assert chunks[-1].finish_reason is reason
        assert len(chunks) == (1 if reason is FinishReason.GUARDRAIL else 4)
