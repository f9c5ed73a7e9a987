"""The judge finds what is wrong, and says what it found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engines.embedded.model.runner import ModelRunner
from server.errors import ModelLoadError
from tests.architectures.judge import Served, judge
from tests.architectures.models import Case, make_folder

Change = Callable[[Tensor, list[Any], list[Any]], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judged")
    make_folder(Case("llama"), path)
    return path


def judged(folder: Path, monkeypatch: pytest.MonkeyPatch, change: Change) -> Served:
    """With an engine whose states are changed."""
    plain = ModelRunner.forward

    def forward(self: ModelRunner, decode: list[Any], segments: list[Any], **options: Any) -> Tensor:
        return change(plain(self, decode, segments, **options), decode, segments)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    return judge(folder, torch.float32)


def test_numbers_that_are_not_transformers_own_are_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = judged(folder, monkeypatch, lambda states_TD, *_: states_TD * 1.01)
    assert served.outcome == "fault"
    assert "served by the general path" in served.reason
    assert "other bits" not in served.reason


def test_bits_that_depend_on_neighbours_are_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = judged(folder, monkeypatch, lambda states_TD, decode, _: states_TD * (1 + 1e-6 * len(decode)))
    assert served.outcome == "fault"
    assert served.reason.startswith("other bits alone than beside others")


def test_a_step_that_fails_is_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(states_TD: Tensor, decode: list[Any], _: list[Any]) -> Tensor:
        if len(decode) > 2:
            raise RuntimeError("the device is broken")
        return states_TD

    served = judged(folder, monkeypatch, fail)
    assert (served.outcome, served.reason) == (
        "fault",
        "a request ended with error: RuntimeError: the device is broken",
    )


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (ModelLoadError("not served"), "refused", "not served"),
        (ModelLoadError("not\nserved"), "fault", "refused in 2 lines: not"),
        (KeyError("layers"), "fault", "traceback: KeyError: 'layers'"),
    ],
)
def test_a_refusal_has_one_line_and_is_no_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: str, reason: str
) -> None:
    def create(*_: Any, **__: Any) -> ModelRunner:
        raise error

    monkeypatch.setattr(ModelRunner, "create", create)
    served = judge(folder, torch.float32)
    assert (served.outcome, served.reason) == (outcome, reason)
