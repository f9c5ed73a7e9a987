"""What tests of engines share: a count of what is read, and one real vLLM engine, whose start takes half a minute."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from torch import Tensor

from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.layout import DecodeRow, PromptChunk
from server.engines.embedded.model.loader import load_model
from server.engines.vllm.engine import VllmEngine
from server.settings import Settings
from tests.conftest import card_of, write_heads
from value_models.calibration import RewardLevels
from value_models.heads import ValueHead
from value_models.store import HeadCard, save_head


def prompt_tokens_read(core: EngineCore) -> list[int]:
    """How many tokens of prompts each step from now on reads; filled as the engine runs."""
    read: list[int] = []
    forward = core.runner.forward

    def counting(decode: list[DecodeRow], chunks: list[PromptChunk], **options: Any) -> Tensor:
        read.append(sum(len(chunk.token_ids) for chunk in chunks))
        return forward(decode, chunks, **options)

    core.runner.forward = counting  # type: ignore[method-assign]
    return read


def calibrated_card(name: str, head: ValueHead, identity: dict[str, Any] | None = None) -> HeadCard:
    """Its value held at 4 to 6 gives a mean reward of 0 to 1."""
    levels = RewardLevels(rewards=(0.0, 1.0), levels=(4.0, 6.0), base_reward=0.5, conditions={}, command="pytest")
    return card_of(name, head, identity).model_copy(update={"calibration": levels})


VLLM_OPTIONS = {"enforce_eager": True, "block_size": 32}


@pytest.fixture(scope="session")
def vllm_settings(
    model_folder: Callable[..., Path], heads: dict[str, ValueHead], tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    """vLLM's kernels for CPUs want wide attention heads. Reasoning ends at any letter or digit, which come soon."""
    folder = shutil.copytree(model_folder("wide_llama"), tmp_path_factory.mktemp("vllm model") / "wide_llama")
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    marks = {"open": "<eos>", "close": list(string.ascii_letters + string.digits)}
    tokenizer_config["response_template"] = {"fields": {"reasoning_content": marks}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    named = {"positive": heads["good"], "plain": heads["line"], "deep": heads["deep"]}
    identity = load_model(str(folder), device="cpu", dtype="float32").identity
    heads_dir = write_heads(tmp_path_factory.mktemp("vllm") / "heads", named, identity)
    save_head(heads_dir / "measured", heads["good"], calibrated_card("measured", heads["good"], identity))
    return Settings(
        engine="vllm",
        model=str(folder),
        heads_dir=heads_dir,
        dtype="float32",
        max_batch_size=8,
        max_waiting=24,
        kv_cache_gib=0.05,
        vllm_options=VLLM_OPTIONS,
    )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm_engine(vllm_settings: Settings) -> AsyncIterator[VllmEngine]:
    """Not yet started, for whoever comes first; harmless to start again."""
    engine = VllmEngine(vllm_settings)
    yield engine
    await engine.stop()
