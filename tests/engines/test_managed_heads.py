"""Heads that come and go while an engine runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from server.control.params import ControlParams
from server.engines.base import Engine
from server.engines.embedded.engine import EmbeddedEngine
from server.engines.fake import FakeEngine
from server.errors import HeadConflictError, HeadMismatchError, UnknownHeadError
from server.settings import Settings
from server.types import FinishReason
from tests.conftest import control, random_head, write_heads
from tests.engines.test_contract import ask, everything
from value_models.heads import ValueHead

STEER = {"step_size": 3.0, "max_kl": 0.5}


@pytest.fixture
def folder(heads: dict[str, ValueHead], load_tiny: Callable[..., Any], tmp_path: Path) -> Path:
    return write_heads(tmp_path, {"positive": heads["good"], "plain": heads["line"]}, load_tiny().identity)


@pytest.fixture
def settings(folder: Path, model_folder: Callable[..., Path]) -> Settings:
    return Settings(model=str(model_folder()), heads_dir=folder, device="cpu", dtype="float32", max_batch_size=4)


@pytest.fixture
async def embedded(settings: Settings) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(settings)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture(params=["fake", "embedded"])
async def engine(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[Engine]:
    engine: Engine = FakeEngine() if request.param == "fake" else EmbeddedEngine(settings)
    await engine.start()
    yield engine
    await engine.stop()


async def test_an_unloaded_head_is_refused_until_it_is_loaded_again(engine: Engine) -> None:
    request = ask(control=control({"plain": 1.0}))
    before = await everything(engine, request)
    await engine.unload_head("plain")
    assert "plain" not in engine.info.heads
    with pytest.raises(UnknownHeadError, match="Known heads: positive"):
        engine.generate(request)
    with pytest.raises(UnknownHeadError):
        await engine.unload_head("plain")
    assert await everything(engine, ask(control=control({"positive": 1.0})))
    await engine.load_head("plain")
    assert [c.token_ids for c in await everything(engine, request)] == [c.token_ids for c in before]


@pytest.mark.parametrize("name", ["nobody", "../plain", "/etc", "", "a/b", "http://x/y", "plain\n"])
async def test_what_is_no_heads_name_is_not_loaded(engine: Engine, name: str) -> None:
    with pytest.raises(UnknownHeadError):
        await engine.load_head(name)


async def test_unloading_lets_the_requests_that_run_under_the_head_end_first(embedded: EmbeddedEngine) -> None:
    request = ask(control=control({"positive": 1.0}, **STEER), sampling={"max_tokens": 120, "ignore_eos": True})
    expected = [c.token_ids for c in await everything(embedded, request)]
    stream = embedded.generate(request)
    got = [(await anext(stream)).token_ids]
    unloading = asyncio.create_task(embedded.unload_head("positive"))
    await asyncio.sleep(0)
    with pytest.raises(UnknownHeadError):
        embedded.generate(request)
    got += [chunk.token_ids async for chunk in stream]
    await unloading
    assert got == expected
    assert embedded._core is not None
    assert embedded._core.registry.names == ("plain",)


async def test_a_head_that_waits_to_be_unloaded_delays_no_other_and_may_be_loaded_again(
    embedded: EmbeddedEngine, folder: Path, load_tiny: Callable[..., Any]
) -> None:
    write_heads(folder, {"kind": random_head(7)}, load_tiny().identity)
    request = ask(control=control({"positive": 1.0}, **STEER), sampling={"max_tokens": 120, "ignore_eos": True})
    stream = embedded.generate(request)
    got = [await anext(stream)]
    unloading = asyncio.create_task(embedded.unload_head("positive"))
    await asyncio.sleep(0)
    for _ in range(2):
        await embedded.load_head("kind")
    await embedded.unload_head("plain")
    assert not got[-1].finish_reason
    assert embedded.status().num_running == 1
    await embedded.load_head("positive")
    with pytest.raises(HeadConflictError, match="loaded anew"):
        await unloading
    assert [chunk async for chunk in stream][-1].finish_reason is FinishReason.LENGTH
    assert set(embedded.info.heads) == {"positive", "kind"}
    assert await everything(embedded, request)


WATCHED: list[dict[str, Any]] = [{"gate": {"head": "plain", "below": 1e6}}, {"stop_below": {"plain": -1e6}}]


@pytest.mark.parametrize("watching", WATCHED)
async def test_a_head_that_a_gate_or_guardrail_watches_stays_until_its_requests_have_ended(
    embedded: EmbeddedEngine, folder: Path, load_tiny: Callable[..., Any], watching: dict[str, Any]
) -> None:
    steer = ControlParams.model_validate({"objective": {"weights": {"positive": 1.0}}, **STEER, **watching})
    request = ask(control=steer, sampling={"max_tokens": 60, "ignore_eos": True})
    expected = [c.token_ids for c in await everything(embedded, request)]
    stream = embedded.generate(request)
    got = [(await anext(stream)).token_ids]
    unloading = asyncio.create_task(embedded.unload_head("plain"))
    await asyncio.sleep(0)
    with pytest.raises(UnknownHeadError):
        embedded.generate(request)
    got += [chunk.token_ids async for chunk in stream]
    await unloading
    assert got == expected
    await embedded.load_head("plain")
    stream = embedded.generate(request)
    await anext(stream)
    write_heads(folder, {"plain": random_head(9)}, load_tiny().identity)
    await embedded.load_head("plain")
    assert [chunk async for chunk in stream][-1].finish_reason is FinishReason.LENGTH


async def test_a_reloaded_head_steers_what_comes_after_it_running_requests_too(
    embedded: EmbeddedEngine, folder: Path, load_tiny: Callable[..., Any]
) -> None:
    request = ask(control=control({"positive": 1.0}, **STEER), sampling={"max_tokens": 60, "ignore_eos": True})
    old = [c.token_ids for c in await everything(embedded, request)]
    write_heads(folder, {"positive": random_head(9)}, load_tiny().identity)
    stream = embedded.generate(request)
    await anext(stream)
    await embedded.load_head("positive")
    assert (await anext(stream)).control is None
    await stream.aclose()
    new = [c.token_ids for c in await everything(embedded, request)]
    assert new != old


async def test_a_head_of_another_model_is_not_loaded_and_the_old_one_stays(
    embedded: EmbeddedEngine, folder: Path
) -> None:
    card_path = folder / "plain" / "card.json"
    card = json.loads(card_path.read_text())
    card["base_model"]["fingerprint"] = "another"
    card_path.write_text(json.dumps(card))
    with pytest.raises(HeadMismatchError, match="fingerprint"):
        await embedded.load_head("plain")
    assert await everything(embedded, ask(control=control({"plain": 1.0})))


async def test_a_head_whose_file_or_name_is_wrong_is_not_loaded_and_the_old_one_stays(
    embedded: EmbeddedEngine, folder: Path
) -> None:
    (folder / "plain").rename(folder / "fancy")
    with pytest.raises(HeadMismatchError, match="'fancy' names its head 'plain'"):
        await embedded.load_head("fancy")
    (folder / "positive" / "head.safetensors").write_bytes(b"broken")
    with pytest.raises(HeadMismatchError, match="'positive' cannot be read"):
        await embedded.load_head("positive")
    assert await everything(embedded, ask(control=control({"plain": 1.0, "positive": 1.0})))
