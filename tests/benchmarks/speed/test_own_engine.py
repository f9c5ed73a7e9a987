"""The looks into our own engine, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import own_engine
from benchmarks.speed.own_engine import PARTS, losses, step_parts_ms, timed_step_ms
from benchmarks.speed.process import PeerError
from benchmarks.speed.setup import Setup
from server.kernels import native
from server.types import GenerationRequest, SamplingParams

PROMPTS = [[(7 * i * j) % 250 + 1 for j in range(1, 9)] for i in range(1, 5)]


def test_the_parts_of_a_step_are_the_step(make_core: Callable[..., Any]) -> None:
    core = make_core()
    core.add(core.sequences(GenerationRequest("row", (1, 2, 3), SamplingParams(max_tokens=4)), lambda chunk: None))
    spent_ms = timed_step_ms(core)
    assert set(spent_ms) == set(PARTS)
    assert all(spent_ms[part] > 0 for part in ("layers", "LM head", "draw", "step"))
    assert sum(spent_ms[part] for part in PARTS if part != "step") == pytest.approx(spent_ms["step"])


def test_a_steps_parts_are_told_for_each_choice_of_heads(random_folder: Path) -> None:
    options = {"model": str(random_folder), "heads_dir": str(random_folder / "heads"), "device": "cpu",
               "dtype": "float32", "max_len": 128, "rows": 4, "steps": 2, "prompts": PROMPTS}  # fmt: skip
    figures = step_parts_ms({**options, "heads": [[], ["random-1"], ["random-1", "random-2"]]})
    assert list(figures) == ["", "random-1", "random-1,random-2"]
    assert all(parts.keys() == set(PARTS) and parts["layers"] > 0 for parts in figures.values())


@pytest.mark.skipif(native() is None, reason="no native kernels on this machine")
def test_fewer_bits_lose_more(model_folder: Callable[[str], Path]) -> None:
    options = {"model": str(model_folder("wide_llama")), "max_len": 128, "prompts": PROMPTS, "new_tokens": 20}
    result = losses(options)
    assert result["num_tokens"] == 80
    assert 0 < result["8"]["kl_nats"] < result["4"]["kl_nats"]


def test_a_look_is_told_in_full_or_fails_with_its_last_words(setup: Setup) -> None:
    options = {**setup.load_options(), "dtype": "float32", "max_len": 128, "rows": 2, "steps": 2, "heads": [[]],
               "prompts": [[1, 2, 3]] * 2}  # fmt: skip
    figures = own_engine._look(setup, "profile", options, "torch")
    assert figures[""]["step"] > 0
    with pytest.raises(PeerError, match=r"the look at profile failed: .*'nope'"):
        own_engine._look(setup, "profile", {**options, "heads": [["nope"]]}, "torch")
