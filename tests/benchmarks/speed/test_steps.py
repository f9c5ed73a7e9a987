"""The looks into our own engine, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.speed.own.profile_step import PARTS, profile
from benchmarks.speed.own.quantization_loss import losses
from server.kernels import native

PROMPTS = [[(7 * i * j) % 250 + 1 for j in range(1, 9)] for i in range(1, 5)]


def test_the_parts_of_a_step_are_the_step(model_folder: Callable[[str], Path]) -> None:
    options = {"device": "cpu", "dtype": "float32", "max_len": 128, "rows": 4, "steps": 6, "prompts": PROMPTS}
    figures = profile({**options, "model": str(model_folder("llama")), "heads": [[]]})[""]
    assert set(figures) == set(PARTS)
    assert all(figures[part] > 0 for part in ("layers", "LM head", "draw", "step"))
    assert figures["layers"] < figures["step"]
    # Medians of parts need not add up to the median of the whole, but nearly do.
    assert sum(figures[part] for part in PARTS if part != "step") == pytest.approx(figures["step"], rel=0.3)


@pytest.mark.skipif(native() is None, reason="no native kernels on this machine")
def test_fewer_bits_lose_more(model_folder: Callable[[str], Path]) -> None:
    options = {"model": str(model_folder("wide_llama")), "max_len": 128, "prompts": PROMPTS, "new_tokens": 20}
    result = losses(options)
    assert result["num_tokens"] == 80
    assert 0 < result["8"]["kl_nats"] < result["4"]["kl_nats"]
