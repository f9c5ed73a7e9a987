"""How many operations one draw of a step's tokens launches on a GPU, counted without one.

Counted are those of torch, most of them on tensors without values (launches.py); what has to look at numbers runs on a
CPU, as many times as it would there. Enter at `count`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.edit.launches import Launched
from server.engines.embedded.drawing import TokenDraw
from server.engines.embedded.logits import LogitRules, adjusted
from server.engines.embedded.sampler import RowSampling, sample
from server.engines.embedded.sequence import SequenceState
from server.engines.embedded.structure import constrained
from server.kernels import VARIABLE
from server.types import SamplingParams

_PROMPT, _OUTPUT = list(range(32)), [40, 41, 40, 42]
_SMALL_V = 64
"""A vocabulary for what runs: how often it does depends on none."""
_PENALTIES = SamplingParams(
    logit_bias={7: 1.0}, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2, top_p=0.9
)
CASES: dict[str, tuple[SamplingParams, bool]] = {
    "top-p alone": (SamplingParams(top_p=0.9), False),
    "bias, all penalties and top-p": (_PENALTIES, False),
    "a schema and top-p": (SamplingParams(top_p=0.9), True),
}
"""What each row asks for, and whether it holds a schema."""


@dataclass(slots=True, frozen=True)
class _Mask:
    size_V: int

    def allowed(self) -> np.ndarray:
        return np.arange(self.size_V) % 3 == 0

    def advance(self, token_id: int) -> None: ...


@dataclass(slots=True, eq=False)
class _Row:
    """What the draw reads of a sequence."""

    row_sampling: RowSampling
    logit_rules: LogitRules | None
    held_to: _Mask | None
    token_ids: list[int]
    state: SequenceState = SequenceState.DECODING


def count(num_rows: int, size_V: int) -> dict[str, dict[str, int]]:
    """By case, launches of a draw of so many rows: by torch's operations alone, and with the kernel."""
    result: dict[str, dict[str, int]] = {}
    for name, (sampling, has_schema) in CASES.items():
        rows: Any = [
            _Row(
                RowSampling(sampling.temperature, sampling.top_p, sampling.top_k, (0, row), sampling.min_p),
                LogitRules.of(sampling, _PROMPT), _Mask(size_V) if has_schema else None, list(_OUTPUT),
            )
            for row in range(num_rows)
        ]  # fmt: skip
        result[name] = {"torch": _by_torch(rows, size_V), "kernels": _by_kernels(rows, size_V)}
    return result


def _by_torch(rows: list[Any], size_V: int) -> int:
    logits_BV = torch.empty(len(rows), size_V, device="meta")
    small_BV = torch.zeros(len(rows), _SMALL_V)

    def draw() -> None:
        sample(
            constrained(logits_BV, [row.held_to for row in rows]), [row.row_sampling for row in rows], [0] * len(rows)
        )

    with _kernels("torch"):
        rules = _counted("cpu", lambda: adjusted(small_BV, [r.logit_rules for r in rows], [r.token_ids for r in rows]))
        return rules + _counted("meta", draw)


def _by_kernels(rows: list[Any], size_V: int) -> int:
    logits_BV, draw = torch.empty(len(rows), size_V, device="meta"), TokenDraw()
    with _kernels("triton"):
        draw.tokens(logits_BV, rows)  # What is laid out once for the rows is not counted.
        # On tensors without values the kernel is not launched.
        return _counted("meta", lambda: draw.tokens(logits_BV, rows)) + 1


def _counted(device: str, run: Callable[[], object]) -> int:
    with torch.inference_mode(), Launched(device) as launched:
        run()
    return launched.count


@contextmanager
def _kernels(name: str) -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
