"""What every engine promises, for the fake, the embedded and the vLLM one, and what the embedded one adds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from server.engines import heads as heads_module
from server.engines.base import Engine
from server.engines.embedded.engine import EmbeddedEngine
from server.engines.fake import FakeEngine
from server.errors import (
    ConfigurationError,
    ContextLengthError,
    EngineStoppedError,
    HeadMismatchError,
    InvalidRequestError,
    OverloadedError,
    UnknownHeadError,
    UnsupportedFieldError,
)
from server.settings import Settings
from server.types import (
    ChatRendering,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    PromptValues,
    SamplingParams,
    ScoringParams,
)
from tests.conftest import control, write_heads
from value_models.heads import ValueHead

# The loop that the vLLM engine of the session lives on.
pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture
def settings(
    model_folder: Callable[..., Path], load_tiny: Callable[..., Any], heads: dict[str, ValueHead], tmp_path: Path
) -> Settings:
    renamed = {"positive": heads["good"], "plain": heads["line"]}
    folder = write_heads(tmp_path / "heads", renamed, load_tiny().identity)
    return Settings(
        model=str(model_folder("llama")),
        heads_dir=folder,
        device="cpu",
        dtype="float32",
        max_batch_size=4,
        max_waiting=8,
    )


@pytest.fixture(
    params=["fake", "embedded", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.filterwarnings("ignore")])]
)
def made(request: pytest.FixtureRequest, settings: Settings) -> Engine:
    """Not started. vLLM's is the session's, which only a fixture that does not run on its loop may ask for."""
    if request.param == "fake":
        return FakeEngine(max_open=8)
    return EmbeddedEngine(settings) if request.param == "embedded" else request.getfixturevalue("vllm_engine")


@pytest_asyncio.fixture(loop_scope="session")
async def engine(made: Engine) -> AsyncIterator[Engine]:
    await made.start()
    yield made
    if isinstance(made, FakeEngine | EmbeddedEngine):
        await made.stop()


def ask(name: str = "r", **options: Any) -> GenerationRequest:
    sampling = {"max_tokens": 8, "seed": 1, **options.pop("sampling", {})}
    return GenerationRequest(name, (104, 105), SamplingParams(**sampling), **options)


async def everything(engine: Engine, request: GenerationRequest) -> list[GenerationChunk]:
    return [chunk async for chunk in engine.generate(request)]


async def test_each_choice_ends_with_exactly_one_finish_reason(engine: Engine) -> None:
    chunks = await everything(engine, ask(num_choices=3))
    ends = [chunk.index for chunk in chunks if chunk.finish_reason is not None]
    assert sorted(ends) == [0, 1, 2]
    for index in range(3):
        assert [c for c in chunks if c.index == index][-1].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)


async def test_the_same_seed_gives_the_same_text(engine: Engine) -> None:
    first, second = await asyncio.gather(everything(engine, ask("a")), everything(engine, ask("b")))
    assert "".join(c.text for c in first) == "".join(c.text for c in second)
    assert first[0].token_ids == second[0].token_ids


async def test_control_is_reported_at_the_end(engine: Engine) -> None:
    chunks = await everything(engine, ask(control=control({"positive": 1.0})))
    summary = chunks[-1].control
    assert summary is not None
    assert list(summary.value_after) == ["positive"]


@pytest.mark.parametrize(
    ("search", "best_of", "num_choices"), [({"type": "blocks", "candidates": 3}, None, 1), (None, 5, 2)]
)
async def test_candidates_are_all_counted_and_none_but_the_best_are_told_or_they_are_refused_by_name(
    engine: Engine, search: dict[str, Any] | None, best_of: int | None, num_choices: int
) -> None:
    steered = control({"positive": 1.0}, search=search)
    request = ask(control=steered, best_of=best_of, num_choices=num_choices, sampling={"ignore_eos": True})
    if not isinstance(engine, FakeEngine | EmbeddedEngine):
        with pytest.raises(UnsupportedFieldError, match=r"best_of|control\.search"):
            engine.generate(request)
        return
    chunks = await everything(engine, request)
    assert sorted(chunk.index for chunk in chunks if chunk.finish_reason is not None) == list(range(num_choices))
    assert sum(len(chunk.token_ids) for chunk in chunks) == 8 * num_choices
    assert sum(chunk.num_drawn for chunk in chunks) == 8 * request.num_sequences


async def test_an_unknown_head_is_refused_before_anything_is_queued(engine: Engine) -> None:
    with pytest.raises(UnknownHeadError, match="plain, positive"):
        engine.generate(ask(control=control({"nobody": 1.0})))
    assert engine.status().num_waiting == 0


async def test_closing_a_stream_before_or_after_its_first_chunk_frees_it(engine: Engine) -> None:
    for has_begun in (False, True):
        stream = engine.generate(ask(sampling={"max_tokens": 200}))
        if has_begun:
            await anext(stream.__aiter__())
        await stream.aclose()
        await stream.aclose()
        for _ in range(200):
            if engine.status().num_running + engine.status().num_waiting == 0:
                break
            await asyncio.sleep(0.01)
        assert engine.status().num_running == 0


async def test_closing_a_stream_spares_another_request_of_the_same_id(engine: Engine) -> None:
    first, second = (engine.generate(ask("same", sampling={"max_tokens": 60})) for _ in range(2))
    await anext(first.__aiter__())
    await first.aclose()
    reasons = [chunk.finish_reason async for chunk in second if chunk.finish_reason]
    assert reasons in ([FinishReason.LENGTH], [FinishReason.STOP])


async def test_beyond_its_limit_an_engine_is_overloaded_and_recovers(engine: Engine) -> None:
    streams = []

    def flood() -> None:
        for i in range(100):
            streams.append(engine.generate(ask(f"r{i}", sampling={"max_tokens": 200})))

    with pytest.raises(OverloadedError):
        flood()
    for stream in streams:
        await stream.aclose()
    assert await everything(engine, ask())


async def test_an_engine_that_has_not_been_started_says_so(settings: Settings) -> None:
    engine = EmbeddedEngine(settings)
    for use in (
        lambda: engine.info,
        lambda: engine.encode("a"),
        lambda: engine.decode([1]),
        lambda: engine.generate(ask()),
    ):
        with pytest.raises(EngineStoppedError):
            use()
    with pytest.raises(EngineStoppedError):
        await engine.load_head("plain")
    assert not engine.status().is_running


async def test_starting_again_changes_nothing_for_what_runs(engine: Engine) -> None:
    stream = engine.generate(ask(sampling={"max_tokens": 60}))
    await anext(stream.__aiter__())
    await engine.start()
    (reason,) = [chunk.finish_reason async for chunk in stream if chunk.finish_reason]
    assert reason in (FinishReason.LENGTH, FinishReason.STOP)


async def test_messages_that_the_models_template_refuses_are_a_clear_error(embedded: EmbeddedEngine) -> None:
    embedded._tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequestError, match=r"messages: .*roles must alternate"):
        embedded.encode_chat([{"role": "user", "content": "hi"}])
    embedded._tokenizer.chat_template = None
    with pytest.raises(InvalidRequestError, match="no chat template"):
        embedded.encode_chat([{"role": "user", "content": "hi"}])


async def test_a_stopped_engine_refuses(engine: Engine) -> None:
    assert engine.status().is_running
    await engine.stop()
    assert not engine.status().is_running
    with pytest.raises(EngineStoppedError):
        engine.generate(ask())


@pytest_asyncio.fixture(loop_scope="session")
async def embedded(settings: Settings) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(settings)
    await engine.start()
    yield engine
    await engine.stop()


async def test_stopping_ends_what_runs_with_an_abort(embedded: EmbeddedEngine) -> None:
    stream = embedded.generate(ask(sampling={"max_tokens": 250}))
    await anext(stream)
    await embedded.stop()
    reasons = [chunk.finish_reason async for chunk in stream if chunk.finish_reason]
    assert reasons == [FinishReason.ABORT]


async def test_a_loop_that_dies_ends_its_requests_and_reports_itself(
    embedded: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = embedded.generate(ask(sampling={"max_tokens": 250}))
    await anext(stream)

    def die() -> None:
        raise SystemExit

    monkeypatch.setattr(embedded._core, "step", die)
    reasons = [chunk.finish_reason async for chunk in stream if chunk.finish_reason]
    assert reasons == [FinishReason.ERROR]
    while any(thread.name == "recontrol-engine" for thread in threading.enumerate()):
        await asyncio.sleep(0.01)
    assert not embedded.status().is_running


async def test_bad_prompts_are_refused(embedded: EmbeddedEngine) -> None:
    for prompt, error in (((), InvalidRequestError), ((258,), InvalidRequestError), ((1,) * 250, ContextLengthError)):
        with pytest.raises(error):
            embedded.generate(GenerationRequest("r", prompt, SamplingParams(max_tokens=16)))


async def test_stop_strings_cut_the_text_and_the_stop_is_reported(embedded: EmbeddedEngine) -> None:
    text = "".join(chunk.text for chunk in await everything(embedded, ask(sampling={"max_tokens": 60})))
    stop = text[5:8]
    chunks = await everything(embedded, ask(sampling={"max_tokens": 60, "stop": (stop,)}))
    assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].finish_reason is FinishReason.STOP


async def test_heads_of_another_model_are_refused_with_what_differs(
    settings: Settings, model_folder: Callable[..., Path]
) -> None:
    other = settings.model_copy(update={"model": str(model_folder("qwen2"))})
    with pytest.raises(HeadMismatchError, match="fingerprint"):
        await EmbeddedEngine(other).start()


@pytest.mark.parametrize(
    ("file", "what"), [("head.safetensors", "cannot be loaded|not the file"), ("card.json", "card")]
)
async def test_a_heads_folder_with_a_broken_file_is_refused_and_the_file_named(
    settings: Settings, file: str, what: str
) -> None:
    assert settings.heads_dir is not None
    (Path(settings.heads_dir) / "plain" / file).write_bytes(b"broken")
    with pytest.raises(HeadMismatchError, match=f"heads_dir: .*plain/{file}.*({what})"):
        await EmbeddedEngine(settings).start()


async def test_a_head_in_a_folder_of_another_name_is_refused(settings: Settings) -> None:
    assert settings.heads_dir is not None
    folder = Path(settings.heads_dir)
    (folder / "plain").rename(folder / "fancy")
    with pytest.raises(HeadMismatchError, match="'plain'; the folder must have that name"):
        await EmbeddedEngine(settings).start()


async def test_a_heads_folder_that_is_not_there_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"heads_dir: .*nowhere is not a folder"):
        await EmbeddedEngine(settings.model_copy(update={"heads_dir": tmp_path / "nowhere"})).start()


async def test_a_model_that_only_shares_its_name_is_served_without_the_shipped_heads(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., Path]
) -> None:
    monkeypatch.setattr(heads_module, "shipped_heads_folder", lambda _: settings.heads_dir)
    engine = EmbeddedEngine(settings.model_copy(update={"heads_dir": None, "model": str(model_folder("qwen2"))}))
    await engine.start()
    assert engine.info.heads == {}
    await engine.stop()


async def test_more_choices_than_the_server_can_ever_hold_are_not_told_to_come_back(embedded: EmbeddedEngine) -> None:
    with pytest.raises(InvalidRequestError, match="12 sequences"):
        embedded.generate(ask(num_choices=13))


@pytest.mark.parametrize("sampling", [{"stop_token_ids": (10**6,)}, {"logit_bias": {-1: 1.0}}, {"max_tokens": 10**6}])
async def test_what_the_model_cannot_do_is_refused_before_anything_is_queued(
    engine: Engine, sampling: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError):
        engine.generate(ask(sampling=sampling))
    assert engine.status().num_running + engine.status().num_waiting == 0


async def test_a_stop_token_ends_the_text_and_gives_none(engine: Engine) -> None:
    tokens = [c.token_ids[0] for c in await everything(engine, ask())]
    third = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i >= 1)
    chunks = await everything(engine, ask(sampling={"stop_token_ids": (tokens[third],)}))
    assert [c.token_ids[0] for c in chunks] == tokens[: third + 1]
    assert chunks[-1].finish_reason is FinishReason.STOP
    # A character that the token before has begun ends as it does at the last token asked for.
    before = await everything(engine, ask(sampling={"max_tokens": third}))
    assert "".join(c.text for c in chunks) == "".join(c.text for c in before)


async def test_a_prompt_is_read_without_a_token_being_drawn(engine: Engine) -> None:
    if not engine.info.can_score:
        pytest.skip("it only generates")
    scoring = ScoringParams(("plain", "positive"), per_token=True, hidden_state=True)
    request = ask(sampling={"max_tokens": 0}, scoring=scoring)
    (first,), (second,) = await asyncio.gather(everything(engine, request), everything(engine, request))
    assert (first.finish_reason, first.token_ids, first.text) == (FinishReason.LENGTH, (), "")
    told = first.prompt_values
    assert told is not None
    assert told.token_values is not None
    assert list(told.values) == list(told.token_values) == ["plain", "positive"]
    assert {name: values[-1] for name, values in told.token_values.items()} == told.values
    assert {len(values) for values in told.token_values.values()} == {2}
    assert len(told.hidden_state or b"") % 4 == 0
    last_alone = replace(request, scoring=ScoringParams(("positive",)))
    (third,) = await everything(engine, last_alone)
    assert second.prompt_values == told
    assert third.prompt_values == PromptValues({"positive": told.values["positive"]})


async def test_a_prompt_is_not_read_by_a_head_that_is_unknown(engine: Engine) -> None:
    if not engine.info.can_score:
        pytest.skip("it only generates")
    with pytest.raises(UnknownHeadError, match="plain, positive") as raised:
        engine.generate(ask(sampling={"max_tokens": 0}, scoring=ScoringParams(("nobody",))))
    assert raised.value.param == "heads"


async def test_a_chat_that_goes_on_ends_behind_its_last_messages_text(engine: Engine) -> None:
    asked = [{"role": "user", "content": "hello"}]
    answered = [*asked, {"role": "assistant", "content": "good day"}]
    goes_on = ChatRendering(add_generation_prompt=False, continue_final_message=True)
    text = engine.decode(engine.encode_chat(answered, goes_on))
    assert text.endswith("assistant: good day")
    assert engine.decode(engine.encode_chat(answered)).startswith(f"{text}\n")


async def test_a_schema_is_held_or_refused_before_anything_is_queued(engine: Engine) -> None:
    try:
        structure = await engine.compile_schema('{"enum": ["a", "b"]}')
    except UnsupportedFieldError:
        return
    chunks = await everything(engine, ask(structure=structure))
    assert "".join(chunk.text for chunk in chunks) in ('"a"', '"b"')
    assert chunks[-1].finish_reason is FinishReason.STOP
    with pytest.raises(InvalidRequestError):
        engine.generate(ask(structure=structure, sampling={"ignore_eos": True}))
    with pytest.raises(InvalidRequestError):
        await engine.compile_schema("{")


async def test_an_engine_that_has_not_been_started_compiles_no_schema(settings: Settings) -> None:
    with pytest.raises(EngineStoppedError):
        await EmbeddedEngine(settings).compile_schema("{}")
